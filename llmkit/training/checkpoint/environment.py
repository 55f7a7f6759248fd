"""What a run was made with beside its options, so that nothing of it changes unnoticed in the middle.

A resumed run is the run that was started to the bit, if the machinery is the same: numeric type, kind of device, versions of torch and llmkit,
deterministic mode or not, compiled or not, and the configuration of the model. These are recorded at each start, in the event and in every checkpoint's
state/trainer.json, and a change is refused unless `--accept-change NAME` names it. Recorded and free to change: processes, threads, layout and the
processor, which move sums in their last bits at most.

    refuse_drift(old["environment"], environment(precision, device), accepted=("torch",))
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from llmkit import __version__
from llmkit.errors import LlmkitError, unknown_name

SPOKEN = {"deterministic": "deterministic mode", "model": "the model's configuration"}
NAMES = ("deterministic", "device", "kernels", "llmkit", "model", "precision", "torch")


def environment(precision: str, device: torch.device) -> dict[str, Any]:
    """What must not change by itself, by the names that --accept-change takes; `kernels` (model.runtime) and `model` (`model_digest`) are added when
    they are known."""
    return {
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "device": device.type,
        "llmkit": __version__,
        "precision": precision,
        # The local part names the build (cpu, cu130), which `device` tells.
        "torch": torch.__version__.partition("+")[0],
    }


def machine(device: torch.device) -> dict[str, Any]:
    """What is worth knowing and may change."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return {"hardware": name, "threads": torch.get_num_threads(), "python": platform.python_version()}


def model_digest(config_json: Mapping[str, Any]) -> str:
    """A short digest of a model's configuration, but for what a stage may change."""
    lasting = {key: value for key, value in config_json.items() if key != "rope_theta"}
    return hashlib.sha256(json.dumps(lasting, sort_keys=True).encode()).hexdigest()[:16]


def accepted_names(text: str) -> tuple[str, ...]:
    """The names in --accept-change NAME,NAME; UsageError for one that is none."""
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        if name not in NAMES:
            raise unknown_name("--accept-change", name, NAMES)
    return names


def refuse_drift(old: Mapping[str, Any], new: Mapping[str, Any], accepted: Sequence[str]) -> list[str]:
    """Names of what has changed, all accepted; LlmkitError where one is not. What only one of both records is not compared."""
    changed = [name for name in sorted(old.keys() & new.keys()) if old[name] != new[name]]
    refused = [name for name in changed if name not in accepted]
    if refused:
        name = refused[0]
        what = SPOKEN.get(name, name)
        others = f" (and {', '.join(refused[1:])})" if refused[1:] else ""
        names = ",".join(sorted({*accepted, *refused}))
        raise LlmkitError(
            f"{what} was {_shown(old[name])} when the run was started and is {_shown(new[name])} now{others}",
            f"--accept-change {names} goes on; bits may differ",
        )
    return changed


def _shown(value: Any) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)
