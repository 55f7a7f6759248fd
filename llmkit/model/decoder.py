"""The decoder in plain torch: an embedding, the layers of an architecture's block (model/families/), a final
norm and an output layer.

Parameters are named as in Hugging Face's checkpoints. Shape suffixes: B batch, T query tokens, S key tokens
(cached and new), D model width, H heads, G key-value heads, K head width, F feed-forward width, V vocabulary.

    model = Decoder(config)
    model.initialize(seed=0)
    logits_BTV = model(ids_BT)                                   # causal
    logits_BTV = model(ids_BT, document_ids=documents_BT)        # causal within documents (padding: an id such as -1)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkit.errors import LlmkitError
from llmkit.model.config import ModelConfig
from llmkit.model.initial import initial
from llmkit.model.kv_cache import KeyValueCache
from llmkit.model.lora.config import LoraConfig
from llmkit.model.lora.tokens import TokenTable
from llmkit.model.modules import Layer, Pass
from llmkit.model.operations import PLAIN


class Body(nn.Module):
    """Embedding, layers and final norm: what Hugging Face calls `model`, under the names of the family."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        names = config.family.names
        self.add_module(names.embedding, _table(config.vocab_size, config.hidden_size))
        if names.positions:
            self.add_module(names.positions, _table(config.max_position_embeddings, config.hidden_size))
        self.add_module(
            names.layers, nn.ModuleList(Layer(config, number) for number in range(config.num_hidden_layers))
        )
        self.add_module(names.norm, config.family.norm(config).build())


def _table(rows: int, width: int) -> nn.Embedding:
    # Not nn.Embedding(V, D): its own initialisation, on the meta device, imports torch's compiler, which takes 2 s.
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)


class Decoder(nn.Module):
    """A language model: token ids to logits of the next token."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.operations = PLAIN
        self.adapter: LoraConfig | None = None  # of a model whose other weights are frozen
        names = config.family.names
        self.add_module(names.body, Body(config))
        if not config.tie_word_embeddings:
            self.add_module(names.head, nn.Linear(config.hidden_size, config.vocab_size, bias=False))

    @property
    def body(self) -> Any:
        """Embedding, layers and final norm."""
        return getattr(self, self.config.family.names.body)

    @property
    def layers(self) -> Any:
        """The layers, a ModuleList."""
        return getattr(self.body, self.config.family.names.layers)

    @property
    def head_weight(self) -> Tensor:
        """The matrix [V, D] of the output layer."""
        layer = self._head
        weight: Tensor = layer.current() if isinstance(layer, TokenTable) else layer.weight
        return weight

    @property
    def head_rows(self) -> tuple[Tensor, Tensor] | None:
        """The rows of `head_weight` that are trained where the others are frozen: ids [n] and rows [n, D]."""
        layer = self._head
        return (layer.ids, layer.rows) if isinstance(layer, TokenTable) else None

    @property
    def _head(self) -> Any:
        names = self.config.family.names
        return getattr(self.body, names.embedding) if self.config.tie_word_embeddings else getattr(self, names.head)

    @property
    def by_length(self) -> bool:
        """Whether what a layer computes depends on the length of the sequence, not on its own tokens alone."""
        ropes = (self.config.family.rope(self.config, layer) for layer in range(len(self.layers)))
        return any(rope is not None and rope.by_length for rope in ropes)

    @property
    def softcap(self) -> float | None:
        """c where logits are c · tanh(head · hidden / c)."""
        softcap: float | None = self.config.family.softcap(self.config)
        return softcap

    def trained_state(self) -> dict[str, Tensor]:
        """What training changes, by name: the state_dict, or the tensors of the adapters alone."""
        state = self.state_dict()
        return state if self.adapter is None else {name: state[name] for name in self.adapter.tensors(self.config)}

    def initialize(self, seed: int) -> None:
        """Draw every weight from its distribution (model/initial.py), in the order of the parameters."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                distribution = initial(self.config, name, parameter.dim())
                if distribution.std:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * distribution.std)
                else:
                    parameter.fill_(distribution.value)

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
        noise: Tensor | None = None,
    ) -> Tensor:
        """Outputs of the final norm [B, T, D], times the family's hidden_scale.

        `noise` [B, T, D] is added to the embeddings of the tokens. `document_ids` [B, T]: a token attends only to
        earlier tokens with its own id. `positions` [T] or [B, T] default to the number of preceding tokens, in their
        document where the model depends on it. With a `cache`, the ids continue the cached sequence, and the cache is
        extended in place.
        """
        config, past = self.config, cache.length if cache is not None else 0
        family, names = config.family, config.family.names
        kinds = [(family.rope(config, layer), family.window(config, layer)) for layer in range(len(self.layers))]
        lengths = None  # of the sequences
        if positions is not None:
            lengths = positions.amax(-1, keepdim=True) + 1
        elif document_ids is not None and cache is None and (names.positions or self.by_length):
            positions, lengths = positions_in_documents(document_ids)
        else:
            positions = torch.arange(past, past + input_ids.shape[1], device=input_ids.device)
        if cache is not None and document_ids is not None:
            document_ids = cache.with_documents(document_ids)
        try:
            x_BTD = getattr(self.body, names.embedding)(input_ids)
        except IndexError as error:
            raise LlmkitError(
                f"token id {int(input_ids.max()):,} has no embedding in a model of {config.vocab_size:,} tokens",
                "the text has a token that was added to the tokenizer but not to the model",
            ) from error
        if noise is not None:
            x_BTD = x_BTD + noise.to(x_BTD.dtype)
        if (scale := family.embedding_scale(config)) != 1:
            x_BTD = x_BTD * (
                torch.tensor(scale, dtype=x_BTD.dtype, device=x_BTD.device) if family.rounded_scale else scale
            )
        if names.positions:
            x_BTD = x_BTD + getattr(self.body, names.positions)(positions)
        # Layers of one kind share these; they are made before a layer extends the cache.
        passes: dict[Any, Pass] = {}
        for rope, window in kinds:
            if (rope, window) not in passes:
                operations, mask = self.operations.prepare(x_BTD, document_ids, cache, window)
                rotation = rope.rotation(positions, x_BTD.dtype, lengths) if rope else None
                passes[rope, window] = Pass(
                    operations, rotation, mask, cache, family.residual_scale(config), family.parallel(config)
                )
        for number, (layer, kind) in enumerate(zip(self.layers, kinds, strict=True)):
            x_BTD = layer(x_BTD, passes[kind], number)
        x_BTD = getattr(self.body, names.norm)(x_BTD, passes[kinds[0]].operations)
        return x_BTD if (scale := family.hidden_scale(config)) == 1 else x_BTD * scale

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., D]."""
        logits, cap = F.linear(hidden_BTD, self.head_weight), self.softcap
        if self.head_rows and torch.is_grad_enabled():
            ids, rows = self.head_rows
            logits = logits.index_copy(-1, ids, F.linear(hidden_BTD, rows))
        return logits if cap is None else cap * torch.tanh(logits / cap)


def positions_in_documents(document_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The number of preceding tokens in the document of each token, and its length, both [B, T], of ids [B, T]."""
    index = torch.arange(document_ids.shape[1], device=document_ids.device)
    border = document_ids[:, 1:] != document_ids[:, :-1]
    edge = torch.ones_like(document_ids[:, :1], dtype=torch.bool)
    first = torch.where(torch.cat([edge, border], 1), index, 0).cummax(1).values
    last = torch.where(torch.cat([border, edge], 1), index, len(index)).flip(1).cummin(1).values.flip(1)
    return index - first, last - first + 1
