"""Rotary position embeddings (arXiv:2104.09864) and their scalings for longer contexts: configuration and angles.

    rope = Rope(theta=1e4, dims=64, longest=4096)
    rotation = rope.rotation(positions, torch.float32)      # cos and sin, [T, K] or [B, T, K]

Kinds: default; linear (positions divided by a factor); dynamic (the base grows with the length); llama3 (long
wavelengths stretched); yarn (arXiv:2309.00071); longrope (arXiv:2402.13753). Formulas are those of transformers,
computed in float32 in its order of operations: one unit in the last place of a frequency is 1e-4 rad at token 2,000.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from llmkit.errors import LlmkitError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ORIGINAL = "original_max_position_embeddings"
FULL, SLIDING = "full_attention", "sliding_attention"  # kinds of layers in `layer_types`
# Kinds, the numbers that each requires, and those that it may have.
KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), (ORIGINAL,)),
    "yarn": (
        (),
        (
            "factor", ORIGINAL, "attention_factor", "beta_fast", "beta_slow", "mscale",
            "mscale_all_dim",
        ),
    ),
    "longrope": ((), ("factor", ORIGINAL, "attention_factor")),
}  # fmt: skip
LISTS = {"longrope": ("short_factor", "long_factor")}  # one number for each pair of dimensions
SWITCHES = {"yarn": ("truncate",)}


class Rotation(NamedTuple):
    """cos and sin, [T, K] or [B, T, K] for K rotated dimensions, the second half a copy of the first. With
    `adjacent`, dimension 2i is paired with 2i + 1, otherwise i with i + K/2."""

    cos: Tensor
    sin: Tensor
    adjacent: bool = False


@dataclass(frozen=True, slots=True)
class Rope:
    """A rotary embedding of the first `dims` dimensions of each head, with base `theta`.

    `scaling` are the numbers of its kind; `longest` is the context for which it is configured, in tokens. `adjacent`
    is that of `Rotation`; with `float32`, cos and sin keep that type in models of half precision.
    """

    theta: float
    dims: int
    longest: int
    kind: str = "default"
    scaling: tuple[tuple[str, Any], ...] = ()
    adjacent: bool = False
    float32: bool = False

    @property
    def by_length(self) -> bool:
        """Whether the angles depend on the length of the sequence."""
        return self.kind in ("dynamic", "longrope")

    def changes_at(self, length: int) -> bool:
        """Whether a sequence that grows to this length has other angles from its beginning, as in transformers: of
        cached keys too."""
        return self.kind == "longrope" and length - 1 <= self._original() < length

    def rotation(self, positions: Tensor, dtype: torch.dtype, lengths: Tensor | None = None) -> Rotation:
        """Angles at `positions` [T] or [B, T]. `lengths`, of the sequence that each token is in, can be broadcast to
        the positions; by default all are in one that ends with the last."""
        import torch

        if self.by_length and positions.numel():
            lengths = positions.max() + 1 if lengths is None else lengths
            fewest = self.longest if self.kind == "dynamic" else math.floor(self._original())
            distinct, which = lengths.clamp(fewest, None if self.kind == "dynamic" else fewest + 1).unique(
                return_inverse=True
            )
            tables = [self.frequencies(length) for length in distinct.tolist()]
            frequencies, factor = torch.stack([table for table, _ in tables])[which.cpu()], tables[0][1]
        else:
            frequencies, factor = self.frequencies()
        angles = positions.float()[..., None] * frequencies.to(positions.device)
        angles = torch.cat([angles, angles], -1)
        dtype = torch.float32 if self.float32 else dtype
        return Rotation((angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype), self.adjacent)

    def frequencies(self, length: int = 0) -> tuple[Tensor, float]:
        """(radians per token [K/2], float32; the factor of cos and sin), for a sequence of `length` tokens."""
        import torch

        numbers, theta, dims = dict(self.scaling), self.theta, self.dims
        if self.kind == "dynamic":
            stretched = numbers["factor"] * max(length, self.longest) / self.longest - (numbers["factor"] - 1)
            theta *= stretched ** (dims / (dims - 2))
        wavelengths = theta ** (torch.arange(0, dims, 2, dtype=torch.int64).float() / dims)
        if self.kind == "yarn":
            return self._yarn(wavelengths)
        if self.kind == "longrope":
            old = self._original()
            stretch = torch.tensor(numbers["long_factor" if length > old else "short_factor"], dtype=torch.float32)
            factor = numbers.get("factor") or self.longest / old
            default = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(old))
            return 1.0 / (stretch * wavelengths), numbers.get("attention_factor") or default
        base = 1.0 / wavelengths
        if self.kind == "linear":
            base = base / numbers["factor"]
        elif self.kind == "llama3":
            # Short wavelengths are kept, long ones stretched, those in between interpolated.
            low, high = numbers["low_freq_factor"], numbers["high_freq_factor"]
            smooth = ((self._original() / (2 * math.pi / base) - low) / (high - low)).clamp(0, 1)
            base = (1 - smooth) * base / numbers["factor"] + smooth * base
        return base, 1.0

    def _original(self) -> float:
        """The context before it was extended."""
        return float(dict(self.scaling).get(ORIGINAL) or self.longest)

    def _yarn(self, wavelengths: Tensor) -> tuple[Tensor, float]:
        import torch

        numbers, old = dict(self.scaling), self._original()
        factor = numbers.get("factor") or self.longest / old

        def dimension(rotations: float) -> float:  # that turns so often over the original context
            return self.dims * math.log(old / (rotations * 2 * math.pi)) / (2 * math.log(self.theta))

        low, high = dimension(numbers.get("beta_fast") or 32), dimension(numbers.get("beta_slow") or 1)
        if numbers.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.dims - 1)
        if low == high:
            high += 0.001
        ramp = ((torch.arange(self.dims // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
        kept = 1 - ramp
        frequencies = 1.0 / (factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept

        def magnitude(scale: float) -> float:
            return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

        some, every = numbers.get("mscale"), numbers.get("mscale_all_dim")
        default = magnitude(some) / magnitude(every) if some and every else magnitude(1)
        return frequencies, numbers.get("attention_factor") or default


def rope_fields(content: dict[str, Any], where: str, family: Any, theta: Any) -> dict[str, Any]:
    """rope_theta, rope_scaling, partial_rotary_factor and local_rope from old-style keys or from transformers 5's
    rope_parameters."""
    default = family.defaults.get("rope_scaling")
    local_theta = family.local_theta
    ropes = {FULL: content.get("rope_scaling") or content.get("rope_parameters") or default or {}}
    if isinstance(ropes[FULL], dict) and isinstance(ropes[FULL].get(FULL) or ropes[FULL].get(SLIDING), dict):
        # `truncate` of nested parameters has no effect in transformers.
        ropes = {name: _without(ropes[FULL].get(name) or {}, "truncate") for name in (FULL, SLIDING)}
    elif family.local_theta and content.get("rope_parameters") and not content.get("rope_scaling"):
        flat = check_scaling(ropes[FULL], where, family.rope_kinds), ropes[FULL].get("rope_theta") or theta
        usual = family.defaults["rope_theta"]
        if family.local_theta == usual:  # early releases of transformers 5: the scaling is for full attention
            local_theta = flat[1]
        elif flat != ({"rope_type": "default"}, usual):  # which transformers ignores
            raise LlmkitError(
                f"{where}: rope_parameters does not say for which layers it is",
                f"write one object for {FULL} and one for {SLIDING}",
            )
    fields: dict[str, Any] = {}
    for name, rope in ropes.items():
        scaling = check_scaling(rope, where, family.rope_kinds)
        base = rope.get("rope_theta") or (theta if name == FULL else local_theta)
        if not is_positive(base):
            raise LlmkitError(
                f"{where}: rope_theta of the rotary embedding is {base!r}", "it must be a positive number"
            )
        former = None if len(ropes) > 1 or ORIGINAL in family.keys else content.get(ORIGINAL)
        if former is not None and ORIGINAL in KINDS[scaling["rope_type"]][1]:  # it is preferred to the nested one
            scaling = check_scaling(scaling | {ORIGINAL: former}, where, {})
        if rope.get("partial_rotary_factor") is not None:
            fields["partial_rotary_factor"] = rope["partial_rotary_factor"]
        if name == FULL:
            plain = scaling["rope_type"] == "default"
            fields |= {"rope_theta": float(base), "rope_scaling": None if plain else scaling}
        elif family.local_theta:
            fields["local_rope"] = scaling | {"rope_theta": float(base)}
        elif (float(base), scaling) != (fields["rope_theta"], fields["rope_scaling"] or {"rope_type": "default"}):
            raise LlmkitError(f"{where}: sliding layers with a rotary embedding of their own", "not supported here")
    if family.local_theta and "local_rope" not in fields:
        base = content.get("rope_local_base_freq") or local_theta
        if not is_positive(base):
            raise LlmkitError(f"{where}: rope_local_base_freq is {base!r}", "it must be a positive number")
        fields["local_rope"] = {"rope_type": "default", "rope_theta": float(base)}
    return fields


def _without(rope: Any, name: str) -> Any:
    return {key: value for key, value in rope.items() if key != name} if isinstance(rope, dict) else rope


def check_scaling(rope: Any, where: str, renamed: Mapping[str, str]) -> dict[str, Any]:
    """The content of `rope_scaling` or `rope_parameters`: its `rope_type` and the numbers of that kind, if they are
    valid. `renamed` are other names of kinds. Raises LlmkitError that names what is not."""
    if not isinstance(rope, dict):
        raise LlmkitError(f"{where}: rope_parameters is not a JSON object", "see the model's documentation")
    kind = str(rope.get("rope_type") or rope.get("type") or "default")
    kind = renamed.get(kind, kind)
    if kind not in KINDS:
        raise LlmkitError(f"{where}: rope scaling {kind!r} is not supported", "known: " + ", ".join(KINDS))
    required, optional = KINDS[kind]
    found: dict[str, Any] = {}
    for name in (*required, *optional):
        value = rope.get(name)
        if name in optional and (value is None or (value == 0 and name.startswith("mscale"))):
            continue
        if value is None or not is_positive(value):
            raise LlmkitError(f"{where}: {name} of the rotary embedding is {value!r}", "it must be a positive number")
        found[name] = value if isinstance(value, int) and name.startswith("original") else float(value)
    if kind == "llama3" and found["high_freq_factor"] <= found["low_freq_factor"]:
        raise LlmkitError(
            f"{where}: high_freq_factor of the rotary embedding is {found['high_freq_factor']}",
            f"it must be above low_freq_factor, which is {found['low_freq_factor']}",
        )
    for name in LISTS.get(kind, ()):
        values = rope.get(name)
        if not isinstance(values, list) or not values or not all(map(is_positive, values)):
            raise LlmkitError(f"{where}: {name} of the rotary embedding is not a list of positive numbers")
        found[name] = [float(value) for value in values]
    for name in SWITCHES.get(kind, ()):
        if name in rope:
            found[name] = bool(rope[name])
    return {"rope_type": kind} | found


def is_positive(value: Any) -> bool:
    """Whether a value from JSON is a positive number of reasonable size."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e30
