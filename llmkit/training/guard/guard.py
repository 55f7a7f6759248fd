"""The guard: which steps a run should not have taken, decided from the figures that the step gives anyway.

Every step hands over its loss, gradient norm and the loss of its worst sequence. What is expected is the median of the last few good steps, and how
far steps usually lie from that is known from the last 128 (by medians, which a few wild values do not move, nor a loss that falls). Against
that a step is

    good     as the others
    odd      far from them: are its documents broken (training.diagnosis)? Then it is skipped; else it is taken, and doubt begins
    lasting  odd, and so were those before it: did the model as it was before them know better? Then back to there, and past those steps
    broken   not a number: a batch that gives no number is skipped, weights that are none are taken from the last good state

A hard or rare batch is odd once and then forgotten; a new kind of data is odd for long without harm to what was learnt, and becomes the new normal.

All of it is a function of the figures, the same on every process; `state()` goes into checkpoints and snapshots, so a run that was
killed between a rollback and a checkpoint comes to the same decisions again.
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

WINDOW = 128  # good steps that a step is held against
RECENT = 8  # of them say what is expected
ENOUGH = 12  # more are needed to say how far steps lie from that; before, only what is worse than a guess is odd
THRESHOLD = 8.0  # robust standard deviations
PATIENCE = 5  # odd steps in a row that are waited for
SPREAD = 1.4826  # of a normal distribution's standard deviation over its median absolute deviation
LEAST = 0.005  # spread that is assumed at least, relative to what is expected: a loss that hardly moves makes no spike of a ripple
FIGURES = ("loss", "grad_norm", "worst")


class StepVerdict(Enum):
    GOOD = "good"
    ODD = "odd"
    LASTING = "lasting"
    BROKEN = "broken"


@dataclass(slots=True)
class Guard:
    """`chance` is the loss of a guess among all tokens, in nats (infinity: there is no such bound); `limit` rollbacks within a window are one too many."""

    chance: float = math.inf
    limit: int = 8
    skipped: list[int] = field(default_factory=list)  # steps that are not taken, by number
    rollbacks: list[int] = field(default_factory=list)  # the step that each was decided at
    since: int = 0  # the first of the odd steps in a row; 0: none
    odd: int = 0  # how many there are
    retried: int = 0  # the step that was last repeated because weights were no numbers
    history: deque[tuple[float, float, float]] = field(default_factory=lambda: deque(maxlen=WINDOW))
    reference: tuple[int, float] = (0, math.inf)  # number and loss of the last good step
    started_badly: bool = False  # the model that the run began with is worse than a guess

    def judge(self, step: int, figures: Sequence[float]) -> StepVerdict:
        """What to think of step `step` with its FIGURES (nan for one that is not known); nothing is remembered yet."""
        if not all(map(math.isfinite, figures[:2])):
            return StepVerdict.BROKEN
        worse_than_a_guess = figures[0] > self.chance + 1 and not self.started_badly
        if self.deviation(figures) <= THRESHOLD and not worse_than_a_guess:
            return StepVerdict.GOOD
        return StepVerdict.LASTING if self.odd + 1 >= PATIENCE else StepVerdict.ODD

    def deviation(self, figures: Sequence[float]) -> float:
        """How many robust standard deviations the oddest figure lies away: the loss to either side, the others above; 0 where little is known."""
        if len(self.history) < RECENT + ENOUGH:
            return 0.0
        seen = _scaled(np.array(self.history))
        middles = np.median(sliding_window_view(seen, RECENT, axis=0), axis=-1)
        residuals = seen[RECENT:] - middles[:-1]
        usual = np.median(residuals, axis=0)
        spread = SPREAD * np.median(np.abs(residuals - usual), axis=0)
        away = _scaled(np.array(figures)) - middles[-1] - usual
        away /= np.maximum(spread, LEAST * np.maximum(np.abs(middles[-1]), (1e-12, 1.0, 1e-12)))
        away[0] = abs(away[0])
        return float(np.nanmax(away, initial=0.0))

    def accept(self, step: int, figures: Sequence[float]) -> None:
        """Remember a good step; doubts are over."""
        self.history.append((figures[0], figures[1], figures[2]))
        self.reference = (step, figures[0])
        self.since = self.odd = 0
        self.started_badly &= figures[0] > self.chance

    def doubt(self, step: int) -> None:
        """Remember that an odd step was taken."""
        self.since = self.since or step
        self.odd += 1

    def settle(self) -> None:
        """What was odd is the new normal: measure anew."""
        self.history.clear()
        self.since = self.odd = 0
        self.started_badly = not self.reference[0]

    def harmed(self, before: float, figures: Sequence[float]) -> bool:
        """Whether the model got worse since the doubts began: `before` is what the step's batch would have cost it then. A batch that is hard for both is
        merely new."""
        rise = figures[0] - min(self.reference[1], self.chance)
        return figures[0] - before > 0.5 * max(rise, 0.0) > 0

    def skip(self, first: int, last: int, at: int) -> bool:
        """Leave out the steps `first` to `last`; False where there were too many such decisions lately."""
        self.skipped = sorted({*self.skipped, *range(first, last + 1)})
        return self.rolled_back(at)

    def rolled_back(self, at: int) -> bool:
        """Remember a decision made at step `at`; False where there were too many lately."""
        self.rollbacks.append(at)
        return sum(at - step < WINDOW for step in self.rollbacks) <= self.limit

    def again(self, first: int) -> bool:
        """Whether doubts from step `first` on come right after a place that was already rolled back: its cause lies further back."""
        return any(0 <= first - step <= 2 * PATIENCE for step in self.rollbacks)

    def state(self) -> dict[str, Any]:
        """All of it as JSON holds it; floats keep every bit."""
        return {
            "skipped": list(self.skipped),
            "rollbacks": list(self.rollbacks),
            "since": self.since,
            "odd": self.odd,
            "retried": self.retried,
            "history": [[_stored(x) for x in row] for row in self.history],
            "reference": [self.reference[0], _stored(self.reference[1])],
            "started_badly": self.started_badly,
        }

    def restore(self, state: dict[str, Any], *, rollback: bool = False) -> None:
        """Inverse of `state`; after a `rollback` what was decided since stays decided. ValueError or TypeError where it is no such state."""
        if not rollback:
            self.skipped = sorted(map(_whole, state.get("skipped", [])))
            self.rollbacks = list(map(_whole, state.get("rollbacks", [])))
            self.retried = _whole(state.get("retried", 0))
        self.since, self.odd = _whole(state.get("since", 0)), _whole(state.get("odd", 0))
        rows = [tuple(map(_known, row)) for row in state.get("history", [])]
        if any(len(row) != len(FIGURES) for row in rows):
            raise ValueError("a history of other figures")
        self.history = deque(rows, maxlen=WINDOW)  # type: ignore[arg-type]
        self.started_badly = bool(state.get("started_badly", False))
        number, loss = state.get("reference", [0, None])
        self.reference = (_whole(number), _known(loss, math.inf))


def _scaled(figures: NDArray[np.float64]) -> NDArray[np.float64]:
    """Gradient norms as logarithms, since they vary by factors."""
    scaled = figures.copy()
    scaled[..., 1] = np.log(np.maximum(scaled[..., 1], 1e-30))
    return scaled


def _stored(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _known(value: Any, otherwise: float = math.nan) -> float:
    return otherwise if value is None else float(value)


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is no step")
    return value
