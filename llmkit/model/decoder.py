"""The decoder: a pre-norm transformer in plain torch, parameters named as Hugging Face names them.

Shape suffixes: B batch, T query tokens, S key tokens (cached and new), D model width, H heads, G key-value heads, K head width, F feed-forward
width, V vocabulary. Norms and the rotary embedding compute in float32, as the reference implementation does.

    model = Decoder(config)
    model.initialise(seed=0)
    logits_BTV = model(ids_BT)                                   # causal
    logits_BTV = model(ids_BT, document_ids=documents_BT)        # and within documents only (padding: any id of its own, such as -1)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkit.model.config import ModelConfig
from llmkit.model.initial import initial


class KeyValueCache:
    """Keys and values of the tokens so far, [B, S, G, K] a layer, and their document ids [B, S]. For inference: it is written in place.

    Memory: 2 · layers · B · G · K · capacity elements; the capacity doubles when it is used up, so a step costs no copy of the past.
    """

    def __init__(self, layers: int, capacity: int = 256) -> None:
        self.document_ids: Tensor | None = None
        self._capacity = capacity
        self._buffers: list[tuple[Tensor, Tensor] | None] = [None] * layers
        self._lengths = [0] * layers

    @property
    def length(self) -> int:
        """Tokens held."""
        return self._lengths[0]

    def extend(self, layer: int, k_BTGK: Tensor, v_BTGK: Tensor) -> tuple[Tensor, Tensor]:
        """Append new keys and values; returns all of the layer's, [B, S, G, K]."""
        past, new = self._lengths[layer], self._lengths[layer] + k_BTGK.shape[1]
        buffers = self._buffers[layer]
        if buffers is None or buffers[0].shape[1] < new:
            while self._capacity < new:
                self._capacity *= 2
            b, _, g, k = k_BTGK.shape
            # Laid out head by head, as attention reads them.
            new_k, new_v = k_BTGK.new_empty(2, b, g, self._capacity, k).transpose(2, 3)
            grown = (new_k, new_v)
            if buffers is not None:
                for old, larger in zip(buffers, grown, strict=True):
                    larger[:, :past] = old[:, :past]
            self._buffers[layer] = buffers = grown
        buffers[0][:, past:new] = k_BTGK
        buffers[1][:, past:new] = v_BTGK
        self._lengths[layer] = new
        return buffers[0][:, :new], buffers[1][:, :new]

    def keep_rows(self, rows: Tensor) -> None:
        """Go on with some rows of the batch only; `rows` holds their indices."""
        self._buffers = [pair and (pair[0][rows], pair[1][rows]) for pair in self._buffers]
        if self.document_ids is not None:
            self.document_ids = self.document_ids[rows]


class Operations:
    """What a layer computes beside its matrix products, in plain torch. model/runtime.py gives a model others, which compute the same."""

    def prepare(
        self, x_BTD: Tensor, document_ids: Tensor | None, cache: KeyValueCache | None
    ) -> tuple[Operations, Any]:
        """What will do for this pass, and the `mask` that its `attend` takes; once for all layers."""
        return PLAIN, attention_mask(x_BTD, document_ids, cache)

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x / rms(x) · weight over the last dimension (arXiv:1910.07467)."""
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
        return weight * x32.to(x.dtype)

    def project(self, x: Tensor, matrices: Sequence[nn.Linear]) -> Sequence[Tensor]:
        """x through each of the matrices."""
        return [matrix(x) for matrix in matrices]

    def rotate(self, x_BTHK: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """Rotary embedding; dimension i is paired with i + K/2 (Hugging Face's convention; arXiv:2104.09864)."""
        cos, sin = (part.unsqueeze(-2) for part in rotation)
        first, second = x_BTHK.chunk(2, -1)
        return x_BTHK * cos + torch.cat([-second, first], -1) * sin

    def attend(self, q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, mask: Any) -> Tensor:
        """softmax(q · kᵀ / √K) · v where the mask allows, [B, T, H, K]."""
        allowed, causal = mask
        q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BSGK, v_BSGK))
        share = q.shape[1] // k.shape[1]
        if share > 1 and allowed is not None and q.is_cuda:  # the fused kernels that take a mask know no groups
            k, v, share = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1), 1
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, is_causal=causal, enable_gqa=share > 1)
        return out.transpose(1, 2)

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) · up (arXiv:2002.05202)."""
        return F.silu(gate) * up


PLAIN = Operations()


class RMSNorm(nn.Module):
    """The gains of a norm."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor, operations: Operations = PLAIN) -> Tensor:
        return operations.norm(x, self.weight, self.eps)


@dataclass(slots=True)
class Pass:
    """What all layers of one forward pass share."""

    operations: Operations
    rotation: tuple[Tensor, Tensor]  # cos and sin, [T, K] or [B, T, K]
    mask: Any
    cache: KeyValueCache | None


class Attention(nn.Module):
    """Grouped-query attention with rotary positions, and QK-norm where the family has it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, k, bias = config.hidden_size, config.head_dim, config.attention_bias
        heads, groups, self.head_dim = config.num_attention_heads, config.num_key_value_heads, k
        self.q_proj = nn.Linear(d, heads * k, bias=bias)
        self.k_proj = nn.Linear(d, groups * k, bias=bias)
        self.v_proj = nn.Linear(d, groups * k, bias=bias)
        self.o_proj = nn.Linear(heads * k, d, bias=bias)
        if config.family.qk_norm:
            self.q_norm = RMSNorm(k, config.rms_norm_eps)
            self.k_norm = RMSNorm(k, config.rms_norm_eps)
        self.qk_norm = config.family.qk_norm

    def forward(self, x_BTD: Tensor, shared: Pass, layer: int) -> Tensor:
        b, t, _ = x_BTD.shape
        operations = shared.operations
        parts = operations.project(x_BTD, (self.q_proj, self.k_proj, self.v_proj))
        q_BTHK, k_BTGK, v_BTGK = (part.view(b, t, -1, self.head_dim) for part in parts)
        if self.qk_norm:
            q_BTHK, k_BTGK = self.q_norm(q_BTHK, operations), self.k_norm(k_BTGK, operations)
        q_BTHK, k_BTGK = (operations.rotate(x, shared.rotation) for x in (q_BTHK, k_BTGK))
        if shared.cache is not None:
            k_BTGK, v_BTGK = shared.cache.extend(layer, k_BTGK, v_BTGK)
        return self.o_proj(operations.attend(q_BTHK, k_BTGK, v_BTGK, shared.mask).reshape(b, t, -1))


class MLP(nn.Module):
    """SwiGLU between matrices: down(silu(gate(x)) · up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, f, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(d, f, bias=bias)
        self.up_proj = nn.Linear(d, f, bias=bias)
        self.down_proj = nn.Linear(f, d, bias=bias)

    def forward(self, x_BTD: Tensor, operations: Operations) -> Tensor:
        return self.down_proj(operations.swiglu(*operations.project(x_BTD, (self.gate_proj, self.up_proj))))


class Layer(nn.Module):
    """Attention and feed-forward, each behind a norm and added to its input."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x_BTD: Tensor, shared: Pass, layer: int) -> Tensor:
        operations = shared.operations
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD, operations), shared, layer)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD, operations), operations)


class Body(nn.Module):
    """Embeddings, layers and the last norm: what Hugging Face calls `model`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        # Not nn.Embedding(V, D): its own initialisation, on the meta device, imports torch's compiler, which takes 2 s.
        self.embed_tokens = nn.Embedding.from_pretrained(
            torch.empty(config.vocab_size, config.hidden_size), freeze=False
        )
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Decoder(nn.Module):
    """A language model: token ids to logits of the next token."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.operations = PLAIN
        self.model = Body(config)
        self.lm_head = (
            None if config.tie_word_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        )

    def initialise(self, seed: int) -> None:
        """Draw every weight as `initial` says, in the order of the parameters."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                drawn = initial(self.config, name, parameter.dim())
                if drawn.std:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * drawn.std)
                else:
                    parameter.fill_(drawn.value)

    def forward(
        self,
        input_ids: Tensor,
        *,
        document_ids: Tensor | None = None,
        positions: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Logits [B, T, V] of ids [B, T]; see `hidden` for the arguments."""
        return self.logits(self.hidden(input_ids, document_ids=document_ids, positions=positions, cache=cache))

    def hidden(
        self,
        input_ids: Tensor,
        *,
        document_ids: Tensor | None = None,
        positions: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Normed outputs of the last layer [B, T, D].

        `document_ids` [B, T]: a token attends to earlier ones of its own id only. `positions` [T] or [B, T] default to the number of tokens
        before. With a `cache`, ids are the continuation of what it holds, and it is extended.
        """
        if positions is None:
            past = cache.length if cache is not None else 0
            positions = torch.arange(past, past + input_ids.shape[1], device=input_ids.device)
        x_BTD = self.model.embed_tokens(input_ids)
        operations, mask = self.operations.prepare(x_BTD, document_ids, cache)
        shared = Pass(operations, self._rotation(positions, x_BTD.dtype), mask, cache)
        for number, layer in enumerate(self.model.layers):
            x_BTD = layer(x_BTD, shared, number)
        return self.model.norm(x_BTD, operations)

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., D]."""
        weight_VD = self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        return F.linear(hidden_BTD, weight_VD)

    def _rotation(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin, [T, K] or [B, T, K]."""
        frequencies = inverse_frequencies(self.config).to(positions.device)
        angles = positions.float()[..., None] * frequencies
        angles = torch.cat([angles, angles], -1)
        return angles.cos().to(dtype), angles.sin().to(dtype)


def attention_mask(
    x_BTD: Tensor, document_ids: Tensor | None, cache: KeyValueCache | None
) -> tuple[Tensor | None, bool]:
    """(mask [B, 1, T, S] or [T, S], whether plain causal attention will do) of a pass over x."""
    t, past = x_BTD.shape[1], cache.length if cache is not None else 0
    if cache is not None and document_ids is not None:
        if cache.document_ids is not None:
            document_ids = torch.cat([cache.document_ids, document_ids], 1)
        cache.document_ids = document_ids
    if document_ids is None:
        if past == 0:
            return None, t > 1
        if t == 1:
            return None, False
    order = torch.arange(past + t, device=x_BTD.device)
    mask_TS = order[past:, None] >= order[None, :]
    if document_ids is None:
        return mask_TS, False
    same_BTS = document_ids[:, past:, None] == document_ids[:, None, :]
    return (same_BTS & mask_TS)[:, None], False


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight of the decoder that `config` describes, without making it."""
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in Decoder(config).state_dict().items()}


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """Rotary frequencies [K/2], float32, in radians a token, scaled as `rope_scaling` says.

    Computed in float32 in the reference implementation's order of operations: one unit in the last place here is 1e-4 rad at token 2,000.
    """
    base = 1.0 / (
        config.rope_theta ** (torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim)
    )
    scaling = config.rope_scaling
    if scaling is None:
        return base
    factor = float(scaling["factor"])
    if scaling["rope_type"] == "linear":
        return base / factor
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    old = float(scaling["original_max_position_embeddings"])
    # Llama 3.1: short wavelengths stay, long ones are stretched, those between are blended.
    wavelength = 2 * math.pi / base
    smooth = ((old / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * base / factor + smooth * base
