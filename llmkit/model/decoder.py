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

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkit.model.config import ModelConfig
from llmkit.model.initial import initial


class KeyValueCache:
    """Keys and values of the tokens so far, [B, G, S, K] a layer, and their document ids [B, S]. For inference: it is written in place.

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

    def extend(self, layer: int, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Append new keys and values; returns all of the layer's, [B, G, S, K]."""
        past, new = self._lengths[layer], self._lengths[layer] + k_BGTK.shape[2]
        buffers = self._buffers[layer]
        if buffers is None or buffers[0].shape[2] < new:
            while self._capacity < new:
                self._capacity *= 2
            b, g, _, k = k_BGTK.shape
            grown = (k_BGTK.new_empty(b, g, self._capacity, k), v_BGTK.new_empty(b, g, self._capacity, k))
            if buffers is not None:
                for old, larger in zip(buffers, grown, strict=True):
                    larger[:, :, :past] = old[:, :, :past]
            self._buffers[layer] = buffers = grown
        buffers[0][:, :, past:new] = k_BGTK
        buffers[1][:, :, past:new] = v_BGTK
        self._lengths[layer] = new
        return buffers[0][:, :, :new], buffers[1][:, :, :new]

    def keep_rows(self, rows: Tensor) -> None:
        """Go on with some rows of the batch only; `rows` holds their indices."""
        self._buffers = [pair and (pair[0][rows], pair[1][rows]) for pair in self._buffers]
        if self.document_ids is not None:
            self.document_ids = self.document_ids[rows]


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last dimension (arXiv:1910.07467)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * x32.to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions, and QK-norm where the family has it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, k, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.heads, self.groups, self.head_dim = config.num_attention_heads, config.num_key_value_heads, k
        self.q_proj = nn.Linear(d, self.heads * k, bias=bias)
        self.k_proj = nn.Linear(d, self.groups * k, bias=bias)
        self.v_proj = nn.Linear(d, self.groups * k, bias=bias)
        self.o_proj = nn.Linear(self.heads * k, d, bias=bias)
        if config.family.qk_norm:
            self.q_norm = RMSNorm(k, config.rms_norm_eps)
            self.k_norm = RMSNorm(k, config.rms_norm_eps)
        self.qk_norm = config.family.qk_norm

    def forward(
        self,
        x_BTD: Tensor,
        rotation: tuple[Tensor, Tensor],
        mask: Tensor | None,
        causal: bool,
        cache: KeyValueCache | None,
        layer: int,
    ) -> Tensor:
        b, t, _ = x_BTD.shape
        q_BTHK = self.q_proj(x_BTD).view(b, t, self.heads, self.head_dim)
        k_BTGK = self.k_proj(x_BTD).view(b, t, self.groups, self.head_dim)
        v_BGTK = self.v_proj(x_BTD).view(b, t, self.groups, self.head_dim).transpose(1, 2)
        if self.qk_norm:
            q_BTHK, k_BTGK = self.q_norm(q_BTHK), self.k_norm(k_BTGK)
        q_BHTK = rotate(q_BTHK.transpose(1, 2), *rotation)
        k_BGTK = rotate(k_BTGK.transpose(1, 2), *rotation)
        if cache is not None:
            k_BGTK, v_BGTK = cache.extend(layer, k_BGTK, v_BGTK)
        grouped = self.groups != self.heads
        if grouped and mask is not None and x_BTD.is_cuda:  # the fused kernels that take a mask know no groups
            k_BGTK, v_BGTK = (x.repeat_interleave(self.heads // self.groups, 1) for x in (k_BGTK, v_BGTK))
            grouped = False
        out_BHTK = F.scaled_dot_product_attention(
            q_BHTK, k_BGTK, v_BGTK, attn_mask=mask, is_causal=causal, enable_gqa=grouped
        )
        return self.o_proj(out_BHTK.transpose(1, 2).reshape(b, t, -1))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x)) (arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, f, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(d, f, bias=bias)
        self.up_proj = nn.Linear(d, f, bias=bias)
        self.down_proj = nn.Linear(f, d, bias=bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


class Layer(nn.Module):
    """Attention and feed-forward, each behind a norm and added to its input."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        x_BTD: Tensor,
        rotation: tuple[Tensor, Tensor],
        mask: Tensor | None,
        causal: bool,
        cache: KeyValueCache | None,
        layer: int,
    ) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), rotation, mask, causal, cache, layer)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


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
        b, t = input_ids.shape
        past = cache.length if cache is not None else 0
        device = input_ids.device
        if positions is None:
            positions = torch.arange(past, past + t, device=device)
        x_BTD = self.model.embed_tokens(input_ids)
        rotation = self._rotation(positions, x_BTD.dtype)
        mask, causal = self._mask(document_ids, cache, b, t, past, device)
        for number, layer in enumerate(self.model.layers):
            x_BTD = layer(x_BTD, rotation, mask, causal, cache, number)
        return self.model.norm(x_BTD)

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., D]."""
        weight_VD = self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        return F.linear(hidden_BTD, weight_VD)

    def _rotation(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin, [T, K] or [B, 1, T, K]."""
        frequencies = inverse_frequencies(self.config).to(positions.device)
        angles = positions.float()[..., None] * frequencies
        angles = torch.cat([angles, angles], -1)
        if angles.dim() == 3:
            angles = angles[:, None]
        return angles.cos().to(dtype), angles.sin().to(dtype)

    @staticmethod
    def _mask(
        document_ids: Tensor | None, cache: KeyValueCache | None, b: int, t: int, past: int, device: torch.device
    ) -> tuple[Tensor | None, bool]:
        """(mask [B, 1, T, S] or [T, S], whether plain causal attention will do), built once for all layers."""
        if cache is not None and document_ids is not None:
            if cache.document_ids is not None:
                document_ids = torch.cat([cache.document_ids, document_ids], 1)
            cache.document_ids = document_ids
        if document_ids is None:
            if past == 0:
                return None, t > 1
            if t == 1:
                return None, False
        order = torch.arange(past + t, device=device)
        mask_TS = order[past:, None] >= order[None, :]
        if document_ids is None:
            return mask_TS, False
        same_BTS = document_ids[:, past:, None] == document_ids[:, None, :]
        return (same_BTS & mask_TS)[:, None], False


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight of the decoder that `config` describes, without making it."""
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in Decoder(config).state_dict().items()}


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [B, H, T, K]; dimension i is paired with i + K/2 (Hugging Face's convention; arXiv:2104.09864)."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


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
