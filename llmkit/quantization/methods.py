"""Quantization methods, one row each: what `llmkit quantize --to NAME` does with the matrices of a model's layers.

A method turns weights [out, in] into integers of `bits` bits and one scale per `group` neighbouring weights of
a row, or per row. `fit_method` adapts the group to a model's widths. A new row is an option of the command,
with its help; the directory layout (formats/compressed_tensors.py) stores any number of bits that divides a
32-bit word. No torch here: the command's help reads this table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from llmkit.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

GROUPS = (128, 64, 32)  # sizes to choose from where a method's own does not divide every width


@dataclass(frozen=True, slots=True)
class QuantizationMethod:
    """`quantize(weight, method, dtype)` returns integers int8 [out, in] and scales [out, groups] of type
    `dtype`. A `group` of None is a whole row."""

    bits: int
    group: int | None
    help: str
    quantize: Callable[[Tensor, QuantizationMethod, torch.dtype], tuple[Tensor, Tensor]]

    def __str__(self) -> str:
        return f"{self.bits} bits, one scale per " + (f"{self.group} weights" if self.group else "row")


def round_to_nearest(weight: Tensor, method: QuantizationMethod, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scales from the largest magnitude."""
    return _round_to_nearest(weight, method, dtype, search=False)


def round_with_search(weight: Tensor, method: QuantizationMethod, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The best of sixteen scales by squared error."""
    return _round_to_nearest(weight, method, dtype, search=True)


def _round_to_nearest(weight: Tensor, method: QuantizationMethod, dtype: Any, search: bool) -> tuple[Tensor, Tensor]:
    from llmkit.quantization.round_to_nearest import quantize

    return quantize(weight, method.bits, method.group, search=search, dtype=dtype)


METHODS = {
    "int8": QuantizationMethod(8, None, "8 bits, one scale per row", round_to_nearest),
    "int4": QuantizationMethod(
        4,
        GROUPS[0],
        "4 bits, one scale per group of weights in a row, the best of 16 by squared error",
        round_with_search,
    ),
}


def fit_method(method: QuantizationMethod, widths: Iterable[int], group: int | None = None) -> QuantizationMethod:
    """The method with a group that divides rows of all these widths: its own, else the largest of GROUPS, else
    a whole row.

    UsageError if an explicit `group` does not divide every width.
    """
    widths = sorted(set(widths))
    if group is not None:
        if misfits := [width for width in widths if width % group]:
            raise UsageError(
                f"groups of {group} do not divide rows of {misfits[0]} weights", "choose another --group-size"
            )
        return replace(method, group=group)
    if method.group is None:
        return method
    fitting = [size for size in GROUPS if size <= method.group and not any(width % size for width in widths)]
    return replace(method, group=fitting[0] if fitting else None)
