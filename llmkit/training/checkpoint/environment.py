"""The environment of a run besides its options, recorded so that nothing of it changes unnoticed on a
resumption.

A resumed run matches the original bit for bit if the environment is the same: numeric type, kind of device,
versions of torch and llmkit, deterministic mode, compilation, and the model's configuration. These are
recorded at each start, in the event and in every checkpoint's state/trainer.json, and a change is refused
unless `--accept-change NAME` names it. Recorded but free to change: processes, threads, layout and the
processor, which affect at most the last bits of sums.

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

LABELS = {"deterministic": "deterministic mode", "model": "the model's configuration"}
NAMES = ("deterministic", "device", "kernels", "llmkit", "model", "precision", "torch")


def environment(precision: str, device: torch.device) -> dict[str, Any]:
    """What must not change unnoticed, by the names that --accept-change takes.

    `kernels` (model/runtime.py) and `model` (`model_digest`) are added once known.
    """
    return {
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "device": device.type,
        "llmkit": __version__,
        "precision": precision,
        # Without the local part, which names the build (cpu, cu130): that is covered by `device`.
        "torch": torch.__version__.partition("+")[0],
    }


def hardware_info(device: torch.device) -> dict[str, Any]:
    """What is worth recording and may change."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return {"hardware": name, "threads": torch.get_num_threads(), "python": platform.python_version()}


ROPE_KEYS = ("rope_theta", "rope_parameters", "rotary_emb_base")  # where config.json has the base of rotary embeddings


def model_digest(config_json: Mapping[str, Any]) -> str:
    """A short digest of a model's configuration, except for what a stage may change."""
    fixed = {key: value for key, value in config_json.items() if key not in ROPE_KEYS}
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()[:16]


def accepted_names(text: str) -> tuple[str, ...]:
    """The names in --accept-change NAME,NAME; raises UsageError for an unknown one."""
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        if name not in NAMES:
            raise unknown_name("--accept-change", name, NAMES)
    return names


def refuse_drift(old: Mapping[str, Any], new: Mapping[str, Any], accepted: Sequence[str]) -> list[str]:
    """Names of accepted changes; raises LlmkitError for a change that is not accepted.

    Names missing from either record are not compared.
    """
    changed = [name for name in sorted(old.keys() & new.keys()) if old[name] != new[name]]
    refused = [name for name in changed if name not in accepted]
    if refused:
        name = refused[0]
        label = LABELS.get(name, name)
        others = f" (and {', '.join(refused[1:])})" if refused[1:] else ""
        names = ",".join(sorted({*accepted, *refused}))
        raise LlmkitError(
            f"{label} was {_display(old[name])} when the run was started and is {_display(new[name])} now{others}",
            f"accept it with --accept-change {names}; results may not be bit-identical",
        )
    return changed


def _display(value: Any) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)
