"""Every curve of metrics.jsonl: name, unit, meaning.

Nothing else is logged, except for metrics that an objective names itself.

To add a curve, add a row here and measure it in the file that fits; a test fails for a logged name without a
row. `NAME/*` stands for one curve per group, source or domain. When: "step" is every step; "some" is the
first step and every --log-every steps, for metrics that cost a little; "eval" is the steps after which the
held-out data is evaluated; "save" is the checkpoints. Curves that do not apply to a run (no GPU, a single
source, tokens whose bytes are unknown) are left out of its lines.
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
        ("skipped", "flag", "step", "the guard skipped this step"),
        ("loss", "nats/token", "step", "mean -log p over the predicted tokens; for dpo its own loss"),
        ("loss_smooth", "nats/token", "step", "mean of the first 50 losses, then an exponential mean with that memory"),
        ("loss/*", "nats/token", "step", "loss by source: the 15 largest and `other`"),
        ("loss_first", "nats/token", "step", "on documents seen for the first time"),
        ("loss_repeated", "nats/token", "step", "on documents seen before: below loss_first by what was memorised"),
        ("bits_per_byte", "bits/byte", "step", "loss per byte of text, comparable between tokenizers"),
        ("z_loss", "nats/token", "step", "contribution of --z-loss to the minimised loss"),
        ("lr", "1", "step", "learning rate"),
        ("grad_norm", "1", "step", "gradient norm before clipping"),
        ("clipped", "share", "step", "of the gradient norm removed by clipping"),
        ("tokens_counted", "tokens", "step", "positions with a loss"),
        ("sequences", "rows", "step", "in the batch"),
        ("documents", "documents", "step", "in the batch, whole or in part"),
        ("padding", "share", "step", "of positions that are padding"),
        ("step_seconds", "s", "step", "whole step, without evaluation and saving"),
        ("data_seconds", "s", "step", "spent waiting for the batch, mean over processes"),
        ("tokens_per_second", "tokens/s", "step", "all processes together"),
        ("mfu", "share", "step", "model FLOPs over the hardware's peak; convention in events.jsonl's start line"),
        ("eta_seconds", "s", "step", "time remaining at the speed of the last steps"),
        ("noise_scale", "tokens", "some", "gradient noise scale: a much larger batch adds little (gradient_noise.py)"),
        ("slowest_rank", "rank", "some", "the process with the longest time per row, of several"),
        ("rank_spread", "1", "some", "its time over the median"),
        ("grad_norm/*", "1", "some", "gradient norm by parameter group: " + ", ".join(GROUPS)),
        ("param_norm/*", "1", "some", "weight norm by parameter group"),
        ("update_ratio/*", "1", "some", "update norm over weight norm, on up to 65,536 elements per tensor"),
        ("token_accuracy", "share", "some", "most probable token is correct, on up to 256 tokens of the batch"),
        ("entropy", "nats", "some", "of the prediction, on the same tokens"),
        ("activation_max", "1", "some", "largest |x| in the residual stream, on the same tokens"),
        ("activation_max_layer", "layer", "some", "of that maximum"),
        ("attention_logit_max", "1", "some", "largest q·k/sqrt(d), on the same tokens"),
        ("attention_logit_max_layer", "layer", "some", "of that maximum"),
        ("memory", "bytes", "some", "resident, of the first process"),
        ("memory_peak", "bytes", "some", "peak of memory"),
        ("gpu_memory", "bytes", "some", "allocated by torch on the first GPU"),
        ("gpu_memory_peak", "bytes", "some", "peak of gpu_memory"),
        ("gpu_utilisation", "percent", "some", "of the first GPU, by NVML"),
        ("gpu_temperature", "°C", "some", "by NVML"),
        ("gpu_power", "W", "some", "by NVML"),
        ("disk_free", "bytes", "some", "on the disk of the run directory"),
        ("heldout_loss", "nats/token", "eval", "mean over the tokens of the held-out data"),
        ("heldout/*", "nats/token", "eval", "held-out loss by domain"),
        ("heldout_bpb", "bits/byte", "eval", "held-out loss per byte of text, ends of documents included"),
        ("heldout_bpb/*", "bits/byte", "eval", "the same by domain"),
        ("eval/*", "1", "save", "metrics of --eval-tasks, TASK/METRIC"),
    )
)  # fmt: skip


def is_known(name: str) -> bool:
    """Whether the table has this curve."""
    names = {curve.name for curve in CURVES}
    return name in names or f"{name.partition('/')[0]}/*" in names


def smoothed_loss(last: Mapping[str, Any], record: Mapping[str, Any], memory: int = 50) -> float | None:
    """`loss_smooth` of the record after `last`: a function of the logged losses alone.

    A skipped step, or one without a loss, changes nothing.
    """
    before: float | None = last.get("loss_smooth")
    loss = None if "skipped" in record else record.get("loss")
    if loss is None or not math.isfinite(loss):
        return before
    if before is None:
        return loss  # type: ignore[no-any-return]
    return before + (loss - before) / min(max(record["step"], 1), memory)  # type: ignore[no-any-return]
