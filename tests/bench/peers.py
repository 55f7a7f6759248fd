"""Long-lived processes of several tools that do their work in turn, for benchmarks of CPU time."""

from __future__ import annotations

import os
import subprocess
import venv
from pathlib import Path

import orjson
import zstandard

ROOT = Path(__file__).resolve().parents[2]

LOOP = """
print("ready", flush=True)
for line in sys.stdin:
    begin = time.process_time()
    work(*line.split())
    print(time.process_time() - begin, flush=True)
"""


class Peer:
    """A process, pinned to the first core, that does one tool's work on a file, again and again: `code` defines work(source, target)."""

    def __init__(self, name: str, python: str, code: str) -> None:
        command = ["taskset", "-c", "0", python, "-c", code + LOOP]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        assert self.process.stdout is not None and self.process.stdin is not None
        self.out, self.into = self.process.stdout, self.process.stdin
        assert self.out.readline() == "ready\n", f"{name} does not start"

    def run(self, source: Path, target: Path) -> float:
        """CPU seconds."""
        print(source, target, file=self.into, flush=True)
        return float(self.out.readline())

    def memory(self) -> float:
        """Peak resident megabytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024


def environment_of(name: str, requirements: list[str]) -> str:
    """Python of the peer's own environment, made on first use."""
    directory = ROOT / ".cache" / f"{name}-speed"
    if not (directory / "complete").exists():
        venv.create(directory, with_pip=True)
        subprocess.run([directory / "bin" / "python", "-m", "pip", "install", "-q", *requirements], check=True)
        (directory / "complete").touch()
    return str(directory / "bin" / "python")


def store(rows: list[dict[str, str]], path: Path) -> float:
    """Write JSONL.zst; megabytes of text."""
    path.write_bytes(zstandard.compress(b"".join(orjson.dumps(row) + b"\n" for row in rows), 3))
    return sum(len(row["text"].encode()) for row in rows) / 1e6
