"""Copies metrics to TensorBoard, wandb or trackio, through Accelerate's trackers.

    tracker = Tracker("tensorboard", accelerator, "run/", options)
    tracker.log(record)            # every number in a record of metrics.jsonl, at its step
    tracker.finish()

metrics.jsonl is authoritative: a tracker may lack steps that a killed run repeated. TensorBoard's files are
in RUN/tracker/; the others store theirs according to their own settings (WANDB_MODE=offline, ...).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmkit.errors import LlmkitError, unknown_name

TRACKERS = ("tensorboard", "wandb", "trackio")


def check_tracker(name: str) -> None:
    """Raise LlmkitError if there is no such tracker, or its package is missing."""
    from accelerate import tracking

    if name not in TRACKERS:
        raise unknown_name("--tracker", name, TRACKERS)
    # Not `filter_trackers`, which reports a missing package through a logger that exists only during a run.
    if name not in map(str, tracking.get_available_trackers()):
        raise LlmkitError(f"--tracker {name}: the package {name} is not installed", f"pip install 'llmkit[{name}]'")


class Tracker:
    """A tracker of a run, on the main process only. `options` are those of the run."""

    def __init__(self, name: str, accelerator: Any, run: Path, options: Mapping[str, Any]) -> None:
        from accelerate.tracking import filter_trackers

        self._accelerator = accelerator
        accelerator.project_configuration.logging_dir = str(run)
        accelerator.log_with = filter_trackers([name], str(run))
        scalars = {key: value for key, value in options.items() if isinstance(value, (bool, int, float, str))}
        project = "tracker" if name == "tensorboard" else run.resolve().name  # for TensorBoard a directory in the run
        accelerator.init_trackers(project, config=scalars)

    def log(self, record: Mapping[str, Any]) -> None:
        """Log the finite numbers of one record."""
        numbers = {
            name: value for name, value in record.items() if isinstance(value, (int, float)) and math.isfinite(value)
        }
        step = numbers.pop("step")
        self._accelerator.log(numbers, step=step)

    def finish(self) -> None:
        """Flush everything. Not `end_training`, which would leave the process group too."""
        for tracker in self._accelerator.trackers:
            tracker.finish()
