"""What is done with each tensor of a model: how it starts, how fast it learns, whether it decays, by which optimiser, in which type.

    rows = table(shapes, config, "muon", 0.1, "bf16")      # what `optimizer.build` makes its groups of
    for name, row, count in kinds(rows): ...               # what --dry-run prints, one line for all layers

A tensor follows the rule of its kind (model/family.py). Vectors (norm gains, biases) and embeddings do not decay: a gain would be pulled
away from 1, and a rare token's row would shrink without ever being used. Muon is for the matrices of the layers; a head's rows are tokens, as
those of an embedding are. How a tensor starts is model.initial's; both are functions of the configuration, so rates and standard deviations
by width (muP) belong into them.
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
    muon: bool = False  # where Muon is asked for
    rate: float = 1.0  # times the learning rate of the step


RULES = {
    "gain": TensorRule(decays=False),
    "bias": TensorRule(decays=False),
    "embedding": TensorRule(decays=False),
    "linear": TensorRule(decays=True, muon=True),
    "head": TensorRule(decays=True),
}


@dataclass(frozen=True, slots=True)
class Row:
    """One tensor: `initial` for people, `rate` a factor, `decay` a step and learning rate, `stored` and `computed` the types of the weight
    and of the products with it."""

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
        """Numbers that the optimiser keeps for each weight."""
        return 1 if self.optimizer == "muon" else 2


def table(
    shapes: Mapping[str, Iterable[int]],
    config: ModelConfig,
    optimizer: str,
    weight_decay: float,
    precision: str = "fp32",
) -> list[Row]:
    """A row for each tensor, in the order of `shapes`; UsageError where there is no such optimiser."""
    if optimizer not in OPTIMIZERS:
        raise unknown_name("optimizer", optimizer, OPTIMIZERS)
    rows = []
    for name, sizes in shapes.items():
        shape = tuple(sizes)
        parameter = find_parameter(config, name)
        assert parameter is not None, name
        found = RULES[parameter.kind]
        rows.append(
            Row(
                name,
                shape,
                str(initial(config, name, len(shape))),
                found.rate,
                weight_decay if found.decays else 0.0,
                "muon" if found.muon and optimizer == "muon" else "adamw",
                computed=precision.replace("fp", "f") if len(shape) > 1 else "f32",
            )
        )
    return rows


def kinds(rows: Iterable[Row]) -> list[tuple[Row, int]]:
    """One row, named with `*` for the number of the layer, for those that differ in nothing else, and how many they are."""
    counts: dict[Row, int] = {}
    for row in rows:
        kind = replace(row, name=re.sub(r"\.\d+\.", ".*.", row.name))
        counts[kind] = counts.get(kind, 0) + 1
    return list(counts.items())
