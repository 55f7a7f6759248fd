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

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkit.model.config import ModelConfig
from llmkit.model.initial import initial
from llmkit.model.kv_cache import KeyValueCache
from llmkit.model.modules import Layer, Pass
from llmkit.model.operations import PLAIN, rotation_angles


class Body(nn.Module):
    """Embedding, layers and final norm: what Hugging Face calls `model`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        # Not nn.Embedding(V, D): its own initialisation, on the meta device, imports torch's compiler, which takes 2 s.
        self.embed_tokens = nn.Embedding.from_pretrained(
            torch.empty(config.vocab_size, config.hidden_size), freeze=False
        )
        self.layers = nn.ModuleList(Layer(config, number) for number in range(config.num_hidden_layers))
        self.norm = config.family.final_norm(config).build()


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
    ) -> Tensor:
        """Outputs of the final norm [B, T, D].

        `document_ids` [B, T]: a token attends only to earlier tokens with its own id. `positions` [T] or [B, T]
        default to the number of preceding tokens. With a `cache`, the ids continue the cached sequence, and the
        cache is extended in place.
        """
        if positions is None:
            past = cache.length if cache is not None else 0
            positions = torch.arange(past, past + input_ids.shape[1], device=input_ids.device)
        x_BTD = self.model.embed_tokens(input_ids)
        operations, mask = self.operations.prepare(x_BTD, document_ids, cache)
        dtype = torch.float32 if self.config.family.float32_rotation else x_BTD.dtype
        shared = Pass(operations, rotation_angles(self.config, positions, dtype), mask, cache)
        for number, layer in enumerate(self.model.layers):
            x_BTD = layer(x_BTD, shared, number)
        return self.model.norm(x_BTD, operations)

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., D]."""
        weight_VD = self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        return F.linear(hidden_BTD, weight_VD)
