"""metrics.jsonl: exactly one line per step, whatever interruptions happened in between.

    {"step": 500, "tokens": 1024000, "loss": 3.21, "lr": 0.003, "grad_norm": 0.7, "tokens_per_second": 4700.0, ...}

curves.py explains each name. Speeds and times are those of this machine at this moment; they are written here
and nowhere else.

MFU (model FLOPs utilisation) is the model's FLOPs per token × tokens/s over the peak of the hardware: on a
GPU the vendor's dense figure for the precision, on a CPU the best of a few large matrix products measured at
the start with the same number of threads. Forward and backward passes count, causal attention with half of
PaLM's quadratic term, and nothing that is recomputed.
"""

from __future__ import annotations

import errno
import json
import math
import os
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch

from llmkit.io.atomic import own_file

# Dense peak in TFLOP/s by part of torch.cuda.get_device_name: (bf16 and fp16, fp32 or tf32 as torch uses it
# by default). NVIDIA data sheets.
GPU_PEAKS = {
    "B200": (2250.0, 75.0),
    "H200": (989.0, 67.0),
    "H100 PCIe": (756.0, 51.0),
    "H100": (989.0, 67.0),
    "A100": (312.0, 19.5),
    "L40S": (362.0, 91.6),
    "L4": (121.0, 30.3),
    "A10": (125.0, 31.2),
    "RTX 4090": (165.2, 82.6),
    "RTX 3090": (71.0, 35.6),
    "V100": (125.0, 15.7),
    "T4": (65.0, 8.1),
}
# The convention, as recorded in events.jsonl.
MFU = (
    "(6 N + 6 layers heads head_dim length) FLOPs a token over the peak: "
    "causal attention at half, recomputation not counted"
)
BLOCK = 1 << 14  # bytes of a log read at once
WINDOW = 20  # steps that the displayed speed is averaged over


class MetricsLog:
    """Appends lines to metrics.jsonl. Lines after `after_step`, which a resumed run repeats, are removed."""

    def __init__(self, path: Path, after_step: int) -> None:
        self.last: dict[str, Any] = {}
        self._path = path
        self._size = self._last_size = 0
        self._pending: list[bytes] = []  # lines not yet written because the disk was full
        self._file = open(path, "ab", buffering=0, opener=own_file)
        self.truncate_after(after_step)

    def truncate_after(self, after_step: int) -> None:
        """Remove the lines of later steps, and an incomplete line after a crash.

        Reads from the end: the cost does not grow with the run.
        """
        self._flush()
        self._pending = [line for line in self._pending if json.loads(line)["step"] <= after_step]
        self.last, self._last_size, self._size = {}, 0, 0
        with open(self._path, "rb") as file:
            end = file.seek(0, os.SEEK_END)
            while end and not self._size:
                start = _line_start(file, end)
                file.seek(start)
                record = _parse(line := file.read(end - start))
                if record is not None and record["step"] <= after_step:
                    self.last, self._last_size, self._size = record, len(line), end
                end = start
        self._file.truncate(self._size)
        if self._pending:
            self.last = json.loads(self._pending[-1])

    def write(self, record: dict[str, Any]) -> None:
        """Append one line; a second record of the last step replaces its line.

        On a full disk lines are kept until there is room.
        """
        if record["step"] == self.last.get("step"):
            if self._pending:
                self._pending.pop()
            else:
                self._size -= self._last_size
                self._file.truncate(self._size)
        line = _line(record)
        self._pending.append(line)
        self._flush()
        self.last, self._last_size = record, len(line)

    def _flush(self) -> None:
        lines = b"".join(self._pending)
        try:
            written = self._file.write(lines)
            if written != len(lines):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            with suppress(OSError):
                self._file.truncate(self._size)  # no partial line
            return
        self._size += len(lines)
        self._pending = []

    def sync(self) -> None:
        """Make all lines durable; called before a checkpoint, so that none of its steps is missing.

        Raises OSError if the disk is full.
        """
        self._flush()
        if self._pending:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_metrics(path: str | Path) -> Iterator[dict[str, Any]]:
    """The records of a metrics.jsonl; a last line that is still being written is left out."""
    with open(path, "rb") as file:
        for line in file:
            record = _parse(line)
            if record is None:
                return
            yield record


def _line_start(file: BinaryIO, end: int) -> int:
    """Start of the line that ends, with or without a line feed, at byte `end`."""
    stop = end - 1
    while stop > 0:
        start = max(0, stop - BLOCK)
        file.seek(start)
        position = file.read(stop - start).rfind(b"\n")
        if position >= 0:
            return start + position + 1
        stop = start
    return 0


def _line(record: dict[str, Any]) -> bytes:
    # JSON has no infinity, which is the gradient norm of a step that fp16 skips.
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()
    }
    return json.dumps(finite).encode() + b"\n"


def _parse(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


class Throughput:
    """Tokens per second over the last steps, MFU and remaining time; evaluation and saving do not count."""

    def __init__(self, flops_per_token: float, peak: float) -> None:
        self._flops, self._peak = flops_per_token, peak
        self._steps: deque[tuple[int, float]] = deque(maxlen=WINDOW)

    def update(self, tokens: int, seconds: float, tokens_left: int) -> dict[str, float]:
        """Add one step.

        Returns its metrics, with the time that the remaining tokens take at the speed of the last steps.
        """
        self._steps.append((tokens, seconds))
        speed = tokens / max(seconds, 1e-9)
        metrics = {"tokens_per_second": _four_digits(speed)}
        if self._peak:
            metrics["mfu"] = _four_digits(speed * self._flops / self._peak)
        return metrics | {"eta_seconds": round(tokens_left / max(self.tokens_per_second, 1e-9), 1)}

    @property
    def tokens_per_second(self) -> float:
        """Average over the last steps."""
        return sum(tokens for tokens, _ in self._steps) / max(sum(seconds for _, seconds in self._steps), 1e-9)


def _four_digits(value: float) -> float:
    return float(f"{value:.4g}")


def peak_flops(device: torch.device, precision: str, processes: int = 1) -> tuple[float, str]:
    """(FLOP/s of all processes together, its origin); (0, "unknown") for a GPU missing from the table."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for model, (half, single) in GPU_PEAKS.items():
            if model in name:
                return (single if precision == "fp32" else half) * 1e12 * processes, f"{name}, data sheet"
        return 0.0, "unknown"
    return _measure_gemm(torch.bfloat16 if precision == "bf16" else torch.float32) * processes, (
        f"CPU, {torch.get_num_threads()} threads, measured on 768×768 matrix products"
    )


def _measure_gemm(dtype: torch.dtype, size: int = 768, tries: int = 4) -> float:
    """Best FLOP/s of a square matrix product."""
    a, b = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    best = float("inf")
    for _ in range(tries):
        started = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
