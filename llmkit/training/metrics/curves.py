"""Every curve of metrics.jsonl: name, unit, meaning. Nothing else is written there; objectives and held-out data add names of their own.

`NAME/*` stands for one curve a group, source or domain. When: "step" is every step; "some" every --log-every steps and after the first, since these
cost a little; "eval" the steps after which the held-out data is read. A figure that has no meaning in a run (no GPU, one source only, tokens
whose bytes are not known) is left out of its lines.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple


class Curve(NamedTuple):
    """One row of the table."""

    name: str
    unit: str
    when: str
    meaning: str


GROUPS = ("embedding", "attention", "mlp", "norms", "head")  # of parameters; a tied head is the embedding

CURVES = tuple(
    Curve(*row)
    for row in (
        ("step", "steps", "step", "finished steps"),
        ("tokens", "tokens", "step", "seen after this step"),
        ("epoch", "passes", "step", "through the data so far"),
        ("skipped", "flag", "step", "the guard passed over this step"),
        ("loss", "nats/token", "step", "mean -log p over what counts in the step; of dpo its own loss"),
        ("loss_smooth", "nats/token", "step", "mean of the first 50 losses, then an exponential mean with that memory"),
        ("loss/*", "nats/token", "step", "the same of each source, the 15 largest and `other`"),
        ("loss_first", "nats/token", "step", "on documents that were never seen before"),
        ("loss_repeated", "nats/token", "step", "on documents that were: below loss_first by what was memorised"),
        ("bits_per_byte", "bits/byte", "step", "the loss by bytes of text, which compares tokenizers"),
        ("z_loss", "nats/token", "step", "what --z-loss adds to the loss that is minimised"),
        ("lr", "1", "step", "learning rate"),
        ("grad_norm", "1", "step", "length of the gradient before clipping"),
        ("clipped", "share", "step", "part of that length that clipping took away"),
        ("tokens_counted", "tokens", "step", "positions with a loss"),
        ("sequences", "rows", "step", "in the batch"),
        ("documents", "documents", "step", "in the batch, whole or in part"),
        ("padding", "share", "step", "positions that hold nothing"),
        ("step_seconds", "s", "step", "whole step, without evaluation and saving"),
        ("data_seconds", "s", "step", "of it spent waiting for the batch, mean over processes"),
        ("tokens_per_second", "tokens/s", "step", "all processes together"),
        ("mfu", "share", "step", "model FLOPs over the hardware's peak; convention in events.jsonl's start line"),
        ("eta_seconds", "s", "step", "left at the speed of the last steps"),
        ("noise_scale", "tokens", "some", "gradient noise scale: a batch well above it adds little (noise.py)"),
        ("slowest_rank", "rank", "some", "the process that took longest for its rows, of several"),
        ("rank_spread", "1", "some", "its time over the median's"),
        ("grad_norm/*", "1", "some", "gradient of a group of parameters: " + ", ".join(GROUPS)),
        ("param_norm/*", "1", "some", "length of a group of parameters"),
        ("update_ratio/*", "1", "some", "length of the step over that of the parameters, on up to 65,536 elements a tensor"),
        ("token_accuracy", "share", "some", "most probable token is the right one, on up to 256 tokens of the batch"),
        ("entropy", "nats", "some", "of the prediction, on the same tokens"),
        ("activation_max", "1", "some", "largest |x| in the residual stream, on the same tokens"),
        ("activation_max_layer", "layer", "some", "where that is"),
        ("attention_logit_max", "1", "some", "largest q·k/sqrt(d), on the same tokens"),
        ("attention_logit_max_layer", "layer", "some", "where that is"),
        ("memory", "bytes", "some", "resident, of the first process"),
        ("memory_peak", "bytes", "some", "the most that was"),
        ("gpu_memory", "bytes", "some", "allocated by torch on the first GPU"),
        ("gpu_memory_peak", "bytes", "some", "the most that was"),
        ("gpu_utilisation", "percent", "some", "of the first GPU, by NVML"),
        ("gpu_temperature", "°C", "some", "by NVML"),
        ("gpu_power", "W", "some", "by NVML"),
        ("disk_free", "bytes", "some", "where the run is kept"),
        ("heldout_loss", "nats/token", "eval", "mean over the tokens of the held-out data"),
        ("heldout/*", "nats/token", "eval", "of each domain"),
        ("heldout_bpb", "bits/byte", "eval", "the held-out loss by bytes of text, ends of documents included"),
        ("heldout_bpb/*", "bits/byte", "eval", "of each domain"),
        ("eval/*", "1", "save", "metrics of --eval-tasks, TASK/METRIC"),
    )
)  # fmt: skip


def known(name: str) -> bool:
    """Whether the table has this curve."""
    names = {curve.name for curve in CURVES}
    return name in names or f"{name.partition('/')[0]}/*" in names


def smoothed(last: Mapping[str, Any], record: Mapping[str, Any], memory: int = 50) -> float | None:
    """`loss_smooth` of a record that follows `last`: a function of the logged losses alone. A step without a loss, or skipped, changes nothing."""
    before: float | None = last.get("loss_smooth")
    loss = None if "skipped" in record else record.get("loss")
    if loss is None or not math.isfinite(loss):
        return before
    return loss if before is None else before + (loss - before) / min(max(record["step"], 1), memory)  # type: ignore[no-any-return]
