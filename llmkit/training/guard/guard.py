"""The guard: detects steps that a run should not take, from metrics that every step computes anyway.

Each step supplies its loss, gradient norm and the loss of its worst sequence. The expected value is the
median of the last few good steps; the usual deviation from it is estimated over the last 128 good steps (with
medians, which neither a few outliers nor a falling loss disturb). Relative to that a step is

    good         close to the expected values
    spike        far from them: are its documents broken (guard/diagnosis.py)? If so it is skipped, else it is taken
    persistent   one more spike in a row: was the model better before them? If so, roll back and skip those steps
    non-finite   NaN or infinite: such a batch is skipped; non-finite weights are replaced by the last good state

A hard or rare batch spikes once and is then forgotten. A new kind of data spikes for many steps without
harming what was learnt, and becomes the new normal.

Every decision is a function of the metrics, which are the same on all processes. `state()` is stored in
checkpoints and snapshots, so a run killed between a rollback and a checkpoint makes the same decisions again.
guard/recovery.py acts on the verdicts.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

WINDOW = 128  # good steps a new step is compared with
RECENT = 8  # the last of them give the expected value
ENOUGH = (
    12  # further steps needed to estimate the deviation; until then only a loss worse than a uniform guess is a spike
)
THRESHOLD = 8.0  # robust standard deviations
PATIENCE = 5  # consecutive spikes before they count as persistent
SPREAD = 1.4826  # standard deviation of a normal distribution over its median absolute deviation
MIN_SPREAD = 0.005  # relative to the expected value: ripples of a loss that hardly moves are not spikes
METRICS = ("loss", "grad_norm", "worst")


class StepVerdict(Enum):
    GOOD = "good"
    SPIKE = "spike"
    PERSISTENT = "persistent"
    NON_FINITE = "non-finite"


@dataclass(slots=True)
class Guard:
    """Judges steps by their METRICS and remembers the decisions.

    `uniform_loss` is the loss of a uniform guess over the vocabulary, in nats (infinity: no such bound). More
    than `max_rollbacks` rollbacks within a window are too many.
    """

    uniform_loss: float = math.inf
    max_rollbacks: int = 8
    skipped: list[int] = field(default_factory=list)  # numbers of the steps that are not taken
    rollbacks: list[int] = field(default_factory=list)  # the step at which each was decided
    spike_start: int = 0  # first of the current consecutive spikes; 0: none
    spike_count: int = 0
    retried: int = 0  # the step last repeated because of non-finite weights
    history: deque[tuple[float, float, float]] = field(default_factory=lambda: deque(maxlen=WINDOW))
    last_good: tuple[int, float] = (0, math.inf)  # number and loss
    poor_start: bool = False  # the initial model was worse than a uniform guess

    def judge(self, step: int, metrics: Sequence[float]) -> StepVerdict:
        """The verdict on step `step` with these METRICS (NaN: unknown). Changes nothing."""
        if not all(map(math.isfinite, metrics[:2])):
            return StepVerdict.NON_FINITE
        worse_than_uniform = metrics[0] > self.uniform_loss + 1 and not self.poor_start
        if self.deviation(metrics) <= THRESHOLD and not worse_than_uniform:
            return StepVerdict.GOOD
        return StepVerdict.PERSISTENT if self.spike_count + 1 >= PATIENCE else StepVerdict.SPIKE

    def deviation(self, metrics: Sequence[float]) -> float:
        """Largest deviation of any metric in robust standard deviations: the loss on either side, the others above.

        0 without enough history.
        """
        if len(self.history) < RECENT + ENOUGH:
            return 0.0
        history = _log_norms(np.array(self.history))
        medians = np.median(sliding_window_view(history, RECENT, axis=0), axis=-1)
        residuals = history[RECENT:] - medians[:-1]
        typical = np.median(residuals, axis=0)
        spread = SPREAD * np.median(np.abs(residuals - typical), axis=0)
        deviations = _log_norms(np.array(metrics)) - medians[-1] - typical
        deviations /= np.maximum(spread, MIN_SPREAD * np.maximum(np.abs(medians[-1]), (1e-12, 1.0, 1e-12)))
        deviations[0] = abs(deviations[0])
        return float(np.nanmax(deviations, initial=0.0))

    def accept(self, step: int, metrics: Sequence[float]) -> None:
        """Record a good step, which ends any series of spikes."""
        self.history.append((metrics[0], metrics[1], metrics[2]))
        self.last_good = (step, metrics[0])
        self.spike_start = self.spike_count = 0
        self.poor_start &= metrics[0] > self.uniform_loss

    def record_spike(self, step: int) -> None:
        """Record that a spike was taken."""
        self.spike_start = self.spike_start or step
        self.spike_count += 1

    def reset_baseline(self) -> None:
        """Accept the spikes as the new normal: estimate the expected values afresh."""
        self.history.clear()
        self.spike_start = self.spike_count = 0
        self.poor_start = not self.last_good[0]

    def model_degraded(self, loss_before: float, metrics: Sequence[float]) -> bool:
        """Whether the model got worse since the spikes began.

        `loss_before` is the loss that the model before them has on this step's batch; a batch that is hard
        for both models is merely new.
        """
        rise = metrics[0] - min(self.last_good[1], self.uniform_loss)
        return metrics[0] - loss_before > 0.5 * max(rise, 0.0) > 0

    def skip(self, first: int, last: int, decided_at: int) -> bool:
        """Skip the steps `first` to `last`; False after too many such decisions within the window."""
        self.skipped = sorted({*self.skipped, *range(first, last + 1)})
        return self.record_rollback(decided_at)

    def record_rollback(self, decided_at: int) -> bool:
        """Record a decision made at step `decided_at`; False after too many within the window."""
        self.rollbacks.append(decided_at)
        return sum(decided_at - step < WINDOW for step in self.rollbacks) <= self.max_rollbacks

    def recently_rolled_back(self, first: int) -> bool:
        """Whether spikes from step `first` on directly follow an earlier rollback, whose cause must then lie
        further back."""
        return any(0 <= first - step <= 2 * PATIENCE for step in self.rollbacks)

    def state(self) -> dict[str, Any]:
        """Everything as JSON values; floats keep every bit."""
        return {
            "skipped": list(self.skipped),
            "rollbacks": list(self.rollbacks),
            "since": self.spike_start,
            "odd": self.spike_count,
            "retried": self.retried,
            "history": [[_to_json(x) for x in row] for row in self.history],
            "reference": [self.last_good[0], _to_json(self.last_good[1])],
            "started_badly": self.poor_start,
        }

    def restore(self, state: dict[str, Any], *, rollback: bool = False) -> None:
        """Inverse of `state`; on a `rollback` later decisions stay in force.

        Raises ValueError or TypeError for an invalid state.
        """
        if not rollback:
            self.skipped = sorted(map(_step_number, state.get("skipped", [])))
            self.rollbacks = list(map(_step_number, state.get("rollbacks", [])))
            self.retried = _step_number(state.get("retried", 0))
        self.spike_start, self.spike_count = _step_number(state.get("since", 0)), _step_number(state.get("odd", 0))
        rows = [tuple(map(_from_json, row)) for row in state.get("history", [])]
        if any(len(row) != len(METRICS) for row in rows):
            raise ValueError("a history of other metrics")
        self.history = deque(rows, maxlen=WINDOW)  # type: ignore[arg-type]
        self.poor_start = bool(state.get("started_badly", False))
        number, loss = state.get("reference", [0, None])
        self.last_good = (_step_number(number), _from_json(loss, math.inf))


def _log_norms(metrics: NDArray[np.float64]) -> NDArray[np.float64]:
    """Replace gradient norms by their logarithms, since they vary by factors."""
    scaled = metrics.copy()
    scaled[..., 1] = np.log(np.maximum(scaled[..., 1], 1e-30))
    return scaled


def _to_json(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _from_json(value: Any, default: float = math.nan) -> float:
    return default if value is None else float(value)


def _step_number(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is not a step number")
    return value
