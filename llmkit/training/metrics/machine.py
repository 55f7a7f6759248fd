"""Metrics of the machine during training: memory, disk, GPU. They are logged and influence nothing.

    machine_metrics(device, "run/")  ->  {"memory": 412_000_000, "memory_peak": 520_000_000, "disk_free": ...}

What a system does not report is left out. Cost: a tenth of a millisecond without a GPU; NVML takes a few milliseconds.
"""

from __future__ import annotations

import os
import resource
import shutil
import sys
from contextlib import suppress
from pathlib import Path

import torch


def machine_metrics(device: torch.device, directory: str | Path) -> dict[str, float]:
    """Metrics by name (see curves.py)."""
    metrics: dict[str, float] = {}
    with suppress(OSError):
        pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
        metrics["memory"] = pages * os.sysconf("SC_PAGE_SIZE")
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, kilobytes elsewhere
    metrics["memory_peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    with suppress(OSError):
        metrics["disk_free"] = shutil.disk_usage(directory).free
    if device.type == "cuda":
        metrics["gpu_memory"] = torch.cuda.memory_allocated(device)
        metrics["gpu_memory_peak"] = torch.cuda.max_memory_allocated(device)
        with suppress(Exception):  # NVML's Python package or its library may be missing, or access denied
            metrics["gpu_utilisation"] = torch.cuda.utilization(device)
            metrics["gpu_temperature"] = torch.cuda.temperature(device)
            metrics["gpu_power"] = torch.cuda.power_draw(device) / 1000
    return metrics
