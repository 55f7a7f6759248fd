"""What the machine says of itself while it trains: memory, disk, GPU. Numbers for the log, which decide nothing.

    machine_figures(device, "run/")  ->  {"memory": 412_000_000, "memory_peak": 520_000_000, "disk_free": ...}

What a system does not tell is left out. A tenth of a millisecond without a GPU; NVML takes some milliseconds.
"""

from __future__ import annotations

import os
import resource
import shutil
import sys
from contextlib import suppress
from pathlib import Path

import torch


def machine_figures(device: torch.device, directory: str | Path) -> dict[str, float]:
    """Curves by name (see curves.py)."""
    figures: dict[str, float] = {}
    with suppress(OSError):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        figures["memory"] = pages * os.sysconf("SC_PAGE_SIZE")
    # Kilobytes, on macOS bytes.
    figures["memory_peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
    with suppress(OSError):
        figures["disk_free"] = shutil.disk_usage(directory).free
    if device.type == "cuda":
        figures["gpu_memory"] = torch.cuda.memory_allocated(device)
        figures["gpu_memory_peak"] = torch.cuda.max_memory_allocated(device)
        with suppress(Exception):  # NVML's Python package or its library may be missing, or not allowed
            figures["gpu_utilisation"] = torch.cuda.utilization(device)
            figures["gpu_temperature"] = torch.cuda.temperature(device)
            figures["gpu_power"] = torch.cuda.power_draw(device) / 1000
    return figures
