"""Another place for the figures: TensorBoard, wandb or trackio, through Accelerate's trackers.

    tracker = Tracker("tensorboard", accelerator, "run/", options)
    tracker.log(record)            # every number of a record of metrics.jsonl, at its step
    tracker.finish()

metrics.jsonl stays what counts: a tracker may lack what a killed run did again. TensorBoard's files lie in RUN/tracker/, what the others do with theirs is
up to their own settings (WANDB_MODE=offline, ...).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmkit.errors import LlmkitError, unknown_name

TRACKERS = ("tensorboard", "wandb", "trackio")


def check_tracker(name: str) -> None:
    """LlmkitError where there is no such tracker, or its package is missing."""
    from accelerate import tracking

    if name not in TRACKERS:
        raise unknown_name("--tracker", name, TRACKERS)
    # Not `filter_trackers`, which speaks of what is missing through a logger that there is in a run alone.
    if name not in map(str, tracking.get_available_trackers()):
        raise LlmkitError(f"--tracker {name}: the package {name} is not installed", f"pip install 'llmkit[{name}]'")


class Tracker:
    """One tracker of a run; only the main process makes one. `options` are those of the run."""

    def __init__(self, name: str, accelerator: Any, run: Path, options: Mapping[str, Any]) -> None:
        from accelerate.tracking import filter_trackers

        self._accelerator = accelerator
        accelerator.project_configuration.logging_dir = str(run)
        accelerator.log_with = filter_trackers([name], str(run))
        plain = {key: value for key, value in options.items() if isinstance(value, (bool, int, float, str))}
        project = "tracker" if name == "tensorboard" else run.resolve().name  # there it is a directory in the run
        accelerator.init_trackers(project, config=plain)

    def log(self, record: Mapping[str, Any]) -> None:
        """The numbers of one record."""
        numbers = {
            name: value for name, value in record.items() if isinstance(value, (int, float)) and math.isfinite(value)
        }
        step = numbers.pop("step")
        self._accelerator.log(numbers, step=step)

    def finish(self) -> None:
        """Let everything arrive. Not `end_training`, which would leave the group of processes too."""
        for tracker in self._accelerator.trackers:
            tracker.finish()
