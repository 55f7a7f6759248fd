"""What the benchmarks share: real documents to read, environments for other tools, and processes that work in turn.

A benchmark that compares libraries in one process calls `inside`, which starts it again in an environment that has them; one that compares whole tools
makes an environment a tool (`environment_of`) and lets them `compete`. Only the standard library is loaded here: environments differ in the others.
"""

from __future__ import annotations

import argparse
import io
import os
import shlex
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"
INSIDE = "LLMKIT_BENCH_INSIDE"

# ---- documents


def decompress(path: Path) -> bytes:
    import zstandard

    with open(path, "rb") as file:
        return zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True).read()


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL.zst."""
    import orjson

    return [orjson.loads(line) for line in decompress(path).splitlines()]


def members(path: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of each file in a .tar.zst."""
    with tarfile.open(fileobj=io.BytesIO(decompress(path))) as packed:
        for member in packed:
            if member.isfile():
                yield member.name, packed.extractfile(member).read()  # type: ignore[union-attr]


def store(rows: list[dict[str, str]], path: Path) -> float:
    """Write JSONL.zst; megabytes of text."""
    import orjson
    import zstandard

    path.write_bytes(zstandard.compress(b"".join(orjson.dumps(row) + b"\n" for row in rows), 3))
    return sum(len(row["text"].encode()) for row in rows) / 1e6


# ---- environments


def environment_of(name: str, requirements: list[str]) -> str:
    """Python of the environment .cache/NAME, made on first use."""
    directory = ROOT / ".cache" / name
    if not (directory / "complete").exists():
        venv.create(directory, with_pip=True)
        subprocess.run([directory / "bin" / "python", "-m", "pip", "install", "-q", *requirements], check=True)
        (directory / "complete").touch()
    return str(directory / "bin" / "python")


def inside(name: str, requirements: list[str], python: str | None = None) -> None:
    """Start the running benchmark again with that environment's Python (or with `python`), and end with it; there, go on."""
    if not os.environ.get(INSIDE):
        environment = os.environ | {INSIDE: "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [python or environment_of(name, requirements), *sys.argv]
        sys.exit(subprocess.run(command, env=environment).returncode)


# ---- command lines


def asked(what: str, peers: Mapping[str, list[str]]) -> tuple[argparse.Namespace, dict[str, str]]:
    """Options of a benchmark that compares tools, `--shared` and `--pairs`, and the Python of each tool: `--NAME`, or of an environment made for it."""
    parser = argparse.ArgumentParser(description=what.splitlines()[0])
    parser.add_argument("--shared", type=Path, default=SHARED)
    parser.add_argument("--pairs", type=int, default=5)
    for name in peers:
        parser.add_argument(f"--{name}", help=f"interpreter that has {name} (default: make an environment)")
    given = parser.parse_args()
    return given, {name: getattr(given, name) or environment_of(f"{name}-speed", peers[name]) for name in peers}


def call() -> str:
    """The command line of the running benchmark, without options that name a place on this machine."""
    words = sys.argv[1:]
    kept = [
        word
        for word, after in zip(words, [*words, ""][1:], strict=True)
        if "/" not in word and not (word.startswith("--") and "/" in after)
    ]
    return shlex.join(["python", f"tests/bench/{Path(sys.argv[0]).name}", *kept])


# ---- turns

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

    def close(self) -> None:
        self.into.close()
        self.process.wait()


# Waits for the call that it starts: what a process is forked from counts as memory of its own, and this one is small.
MEASURE = """
import os, subprocess, sys, time
start = time.perf_counter()
process = subprocess.Popen(sys.argv[2:])
_, status, used = os.wait4(process.pid, 0)
with open(sys.argv[1], "w") as report:
    print(used.ru_utime + used.ru_stime, time.perf_counter() - start, used.ru_maxrss / 1024, file=report)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def measured(*arguments: object, drain: bool = False, cores: str = "0") -> tuple[float, float, float]:
    """(CPU s, wall s, peak MB) of one call of llmkit on some cores; `drain`: into a pipe that is read."""
    return measured_python("-m", "llmkit", *arguments, drain=drain, cores=cores)


def measured_python(*arguments: object, drain: bool = False, cores: str = "0") -> tuple[float, float, float]:
    """The same of one call of Python."""
    with tempfile.NamedTemporaryFile("r") as report:
        call = ["taskset", "-c", cores, sys.executable, "-c", MEASURE, report.name, sys.executable]
        process = subprocess.Popen([*call, *map(str, arguments)], stdout=subprocess.PIPE if drain else None)
        while process.stdout and process.stdout.read(1 << 20):
            pass
        assert process.wait() == 0
        cpu, wall, peak = map(float, report.read().split())
    return cpu, wall, peak


def seconds(work: Callable[[Any], object], items: Sequence[Any], times: int = 1) -> float:
    """CPU seconds of this process for all items, once; the mean of so many times."""
    begin = time.process_time()
    for _ in range(times):
        for item in items:
            work(item)
    return (time.process_time() - begin) / times


def in_turn(ways: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each way gives, once a round, all of them in turn: what slows the machine down meets all."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            found[name].append(way())
    return found


def compete(
    workers: Mapping[str, tuple[str, str]], rounds: int, source: Path, warm: Path
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """CPU seconds of every round and peak megabytes of tools, each given as (Python, code of a `Peer`), after one go at the file `warm`.

    What they write lies beside the source: NAME.jsonl.zst.
    """
    peers = {name: Peer(name, *worker) for name, worker in workers.items()}
    first, then = (
        {name: partial(peer.run, path, source.with_name(f"{name}.jsonl.zst")) for name, peer in peers.items()}
        for path in (warm, source)
    )
    in_turn(first, 1)
    seconds = in_turn(then, rounds)
    memory = {name: peer.memory() for name, peer in peers.items()}
    for peer in peers.values():
        peer.close()
    return seconds, memory


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """Of each round."""
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Median (least to most)."""
    middle, least, most = (f"{value:.{digits}f}" for value in (statistics.median(values), min(values), max(values)))
    return f"{middle} ({least} to {most})"
