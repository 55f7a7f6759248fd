"""How each tensor of a model is trained: initial values, learning-rate factor, weight decay, optimizer, numeric
types.

    rows = tensor_table(shapes, config, "muon", 0.1, "bf16")   # build_optimizer makes its groups from this
    for row, count in merge_layers(rows): ...                  # as printed by --dry-run, one line for all layers

A tensor follows the rule of its kind (model/family.py). Vectors (norm gains, biases) and
embeddings do not decay: a gain would be pulled away from 1, and the row of a rare token would shrink without
being used. Muon is for the matrices of the layers; the rows of a head are tokens, as those of an embedding
are. Initial values come from model/initial.py. Both are functions of the configuration, so learning rates and
standard deviations that depend on the width (muP) would belong there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from llmkit.errors import unknown_name
from llmkit.model.config import ModelConfig
from llmkit.model.family import find_parameter
from llmkit.model.initial import initial

OPTIMIZERS = ("adamw", "muon")


@dataclass(frozen=True, slots=True)
class TensorRule:
    """For tensors of one kind."""

    decays: bool
    muon: bool = False  # if the run uses Muon
    rate: float = 1.0  # factor of the learning rate of the step


RULES = {
    "gain": TensorRule(decays=False),
    "bias": TensorRule(decays=False),
    "embedding": TensorRule(decays=False),
    "linear": TensorRule(decays=True, muon=True),
    "head": TensorRule(decays=True),
    "lora_A": TensorRule(decays=True),
    "lora_B": TensorRule(decays=True),
    "magnitude": TensorRule(decays=False),
    "tokens": TensorRule(decays=False),
}


@dataclass(frozen=True, slots=True)
class TensorRow:
    """One tensor: `initial` describes its initial values, `rate` is a factor of the learning rate, `decay` is
    per step and learning rate; `stored` and `computed` are the types of the weight and of the products with
    it."""

    name: str
    shape: tuple[int, ...]
    initial: str
    rate: float
    decay: float
    optimizer: str
    stored: str = "f32"
    computed: str = "f32"

    @property
    def moments(self) -> int:
        """Numbers that the optimizer keeps for each weight."""
        return 1 if self.optimizer == "muon" else 2


def tensor_table(
    shapes: Mapping[str, Iterable[int]],
    config: ModelConfig,
    optimizer: str,
    weight_decay: float,
    precision: str = "fp32",
    b_rate: float = 1.0,
) -> list[TensorRow]:
    """A row for each tensor, in the order of `shapes`; raises UsageError for an unknown optimizer.

    `b_rate` is LoraConfig.b_rate.
    """
    if optimizer not in OPTIMIZERS:
        raise unknown_name("optimizer", optimizer, OPTIMIZERS)
    rows = []
    for name, sizes in shapes.items():
        shape = tuple(sizes)
        parameter = find_parameter(config, name)
        assert parameter is not None, name
        rule = RULES[parameter.kind]
        rows.append(
            TensorRow(
                name,
                shape,
                str(initial(config, name, len(shape))),
                rule.rate * (b_rate if parameter.kind == "lora_B" else 1.0),
                weight_decay if rule.decays else 0.0,
                "muon" if rule.muon and optimizer == "muon" else "adamw",
                computed=precision.replace("fp", "f") if len(shape) > 1 else "f32",
            )
        )
    return rows


def merge_layers(rows: Iterable[TensorRow]) -> list[tuple[TensorRow, int]]:
    """Merge the rows that differ only in the number of the layer, written as `*`.

    Returns each merged row with their count.
    """
    counts: dict[TensorRow, int] = {}
    for row in rows:
        merged = replace(row, name=re.sub(r"\.\d+\.", ".*.", row.name))
        counts[merged] = counts.get(merged, 0) + 1
    return list(counts.items())
