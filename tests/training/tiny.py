"""A tiny model and a tiny stream of tokens for the tests of training."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from llmkit.model.config import ModelConfig
from llmkit.model.decoder import Decoder
from llmkit.options import from_values
from llmkit.training.options import PretrainOptions
from llmkit.training.runner import loop_options
from llmkit.training.session import LoopOptions

CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=32,
)


def loop_settings(output: str, force: bool = False, **options: Any) -> LoopOptions:
    """Options of the loop by their names on the command line, without the watch-dog."""
    usual = {"hang_timeout": 0.0, "weight_decay": 0.1, "clip": 1.0}
    return loop_options(from_values(PretrainOptions, usual | options), output, force)


class ListStream:
    """Documents of random length over a small vocabulary, in memory."""

    def __init__(self, lengths: list[int], vocabulary: int = 64, seed: int = 0) -> None:
        self.offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self.tokens = int(self.offsets[-1])
        draw = np.random.default_rng(seed)
        # Every token depends on the one before, so that there is something to learn.
        steps = draw.integers(0, 3, size=self.tokens)
        self.data = (np.cumsum(steps) % vocabulary).astype(np.uint16)

    padding = None

    def span(self, start: int, stop: int) -> np.ndarray:
        return self.data[start:stop]

    def id(self, i: int) -> str:
        return f"d{i}"

    def document(self, i: int) -> np.ndarray:
        return self.data[self.offsets[i] : self.offsets[i + 1]]


def tiny_model(seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    model = Decoder(CONFIG)
    model.initialize(seed)
    return model
