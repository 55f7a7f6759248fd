"""Reading cases in forked workers with limits on time and memory, many cases in each.

    result = run(target, seed=16, first=0, count=2000)          # a Result: counts, and Findings

A worker draws its cases itself (`case`), so that only outcomes pass through the pipe, and writes the number of the case
into shared memory first, so that a case that kills it is known. It is killed by SIGPROF after SECONDS of CPU time on
one case, also inside of a library, and by the parent after WALL seconds. Memory is measured as its peak beyond the
target's budget; address space is limited far above that, so that a bomb ends in MemoryError. An audit hook reports
what no reader may do: start programs, open connections, unpickle, or write a file outside its scratch directory.

Not hypothesis, whose examples cost a millisecond each and end with the first signal; not atheris, which needs compiled
instrumentation of the libraries that parse here. What a mutation reaches is shown by the share of intact cases instead.
"""

from __future__ import annotations

import faulthandler
import hashlib
import importlib.metadata
import mmap
import os
import pickle
import random
import resource
import select
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

from mutation import mutated
from readers import CORPUS, Target, Unread, preload

from llmkit.errors import LlmkitError
from llmkit.memory import set_budget

SECONDS, WALL = 10, 60
BUDGET, SLACK = 512 << 20, 300 << 20  # bytes that a reader may take beyond those of the worker
ADDRESSES = 6 << 30  # beyond those of the worker; libraries reserve more than they use
CASES_PER_WORKER = 20_000
FOUND, BOMB = "found-", "bomb-"  # files of the corpus that were findings, and may be refused; bombs are not mutated
SHRINK_ROUNDS, SHRINK_PIECES = 40, 200
OUTCOMES = ("intact", "refused", "skipped")  # read; LlmkitError; failed inside of a guard that skips it
FORBIDDEN = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "pty.spawn",
    "socket.connect",
    "pickle.find_class",
)
OWN = ("llmkit.", "numpy.", "numba.")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass(slots=True)
class Finding:
    """A case that a reader must not fail on, in the way that it does."""

    target: str
    case: int
    name: str  # of the file
    data: bytes
    kind: str  # "ValueError", "signal 11", "time", "memory", "forbidden"
    detail: str = ""

    @property
    def key(self) -> str:
        """Findings of one cause have one key: the kind, and the last place of llmkit in the traceback."""
        places = [
            line.strip() for line in self.detail.splitlines() if line.startswith("  File ") and "/llmkit/" in line
        ]
        return f"{self.target}: {self.kind} {places[-1] if places else ''}"


@dataclass(slots=True)
class Result:
    """Of a run over a target."""

    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(OUTCOMES, 0))
    findings: dict[str, Finding] = field(default_factory=dict)  # the first one of each key
    seconds: float = 0.0
    peak: int = 0  # bytes beyond those of the worker at its start

    @property
    def cases(self) -> int:
        return sum(self.counts.values())


def seeds_of(target: Target) -> list[tuple[str, bytes]]:
    """(file name, content) of the kept files of a target, intact ones first."""
    paths = sorted(
        (CORPUS / target.corpus).iterdir(), key=lambda path: (path.name.startswith((FOUND, BOMB)), path.name)
    )
    return [(path.name, path.read_bytes()) for path in paths]


def case(target: Target, seeds: list[tuple[str, bytes]], seed: int, number: int) -> tuple[str, bytes]:
    """(file name, content) of a case: first the seeds themselves, then mutations of them."""
    if number < len(seeds):
        name, data = seeds[number]
    else:
        draw = random.Random(f"{seed} {target.name} {number}")
        seeds = [seed for seed in seeds if not seed[0].startswith(BOMB)]
        name, data = draw.choice(seeds)
        data = mutated(target.unpacked(data), draw, [target.unpacked(d) for _, d in seeds], target.words, target.views)
        return name.removesuffix(".zst") if target.packed else name, data
    return name.removesuffix(".zst") if target.packed else name, target.unpacked(data)


def run(target: Target, seed: int, first: int, count: int, deadline: float = float("inf")) -> Result:
    """Read `count` cases from number `first` on, or until `deadline` (monotonic)."""
    preload()
    seeds, result, begin, number = seeds_of(target), Result(), time.monotonic(), first
    while number < first + count and time.monotonic() < deadline:
        batch = range(number, min(number + CASES_PER_WORKER, first + count))
        number = _run_worker(target, partial(case, target, seeds, seed), batch, deadline, result)
    result.seconds = time.monotonic() - begin
    return result


def shrunk(target: Target, finding: Finding) -> Finding:
    """A finding with as few bytes as some rounds of removing pieces give; as it is where a case takes long."""
    if finding.kind in ("time", "memory"):
        return finding
    smallest, size = finding, len(finding.data) // 2
    for _ in range(SHRINK_ROUNDS):
        data = smallest.data
        pieces = [data[:i] + data[i + size :] for i in range(0, len(data), max(1, size))][:SHRINK_PIECES]
        if not size or not pieces:
            break
        result = Result()
        _run_worker(
            target, lambda i, pieces=pieces: (finding.name, pieces[i]), range(len(pieces)), float("inf"), result
        )  # type: ignore[misc]
        if finding.key in result.findings:
            smallest = result.findings[finding.key]
        else:
            size //= 2
    return smallest


def keep(finding: Finding, target: Target, directory: Path) -> Path:
    """Write a finding to a corpus."""
    folder = directory / target.corpus
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(finding.data).hexdigest()[:8]
    path = folder / f"{FOUND}{digest}{Path(finding.name).suffix if target.file is None else ''}"
    path.write_bytes(finding.data)
    return path


def _run_worker(
    target: Target, draw: Callable[[int], tuple[str, bytes]], numbers: range, deadline: float, result: Result
) -> int:
    """Run one worker over the cases `numbers`; the number of the first case that was not read."""
    position = mmap.mmap(-1, 16)  # number of the case, monotonic start
    receiver, sender = os.pipe()
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as scratch:
        sys.stdout.flush()
        process = os.fork()
        if process == 0:
            try:
                os.close(receiver)
                _work(target, draw, numbers, deadline, Path(scratch), position, sender)
            except BaseException:
                _send(sender, {"broken": traceback.format_exc()})
            finally:
                os._exit(0)
        os.close(sender)
        number, report = _await(process, receiver, position)
        os.close(receiver)
    if "broken" in report:
        raise AssertionError(report["broken"])
    for outcome, n in report.get("counts", {}).items():
        result.counts[outcome] += n
    result.peak = max(result.peak, report.get("peak", 0))
    for finding in report.get("findings", []):
        result.findings.setdefault(finding.key, finding)
    if "signal" not in report:
        return int(report["next"])
    result.counts["refused"] += number - numbers.start  # what became of them died with the worker
    result.counts["skipped"] += 1
    if not target.guarded:
        finding = Finding(target.name, number, *draw(number), report["signal"])
        result.findings.setdefault(finding.key, finding)
    return number + 1


def _await(process: int, receiver: int, position: mmap.mmap) -> tuple[int, dict[str, Any]]:
    """Wait for the end of a worker; the number of its last case, and its report, or the signal that ended it."""
    parts, killed = [], False
    while True:
        ready, _, _ = select.select([receiver], [], [], 1.0)
        if ready:
            part = os.read(receiver, 1 << 16)
            if not part:
                break
            parts.append(part)
        number, since = struct.unpack("<qd", position[:])
        if since and time.monotonic() - since > WALL and not killed:
            killed = True
            os.killpg(process, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    with suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)  # what it has started
    number, _ = struct.unpack("<qd", position[:])
    if status == 0:
        return number, pickle.loads(b"".join(parts))
    name = "time" if killed or status == -signal.SIGPROF else f"signal {-status}" if status < 0 else f"exit {status}"
    return number, {"signal": name}


def _work(
    target: Target,
    draw: Callable[[int], tuple[str, bytes]],
    numbers: range,
    deadline: float,
    scratch: Path,
    position: mmap.mmap,
    sender: int,
) -> None:
    os.setsid()
    for descriptor in (1, 2):  # what libraries print
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    inside, empty = scratch / "files", scratch / "empty"
    inside.mkdir()
    empty.mkdir()
    os.chdir(empty)
    os.environ["TMPDIR"] = tempfile.tempdir = str(inside)
    importlib.metadata.entry_points = cache(importlib.metadata.entry_points)  # 50 ms for each configuration
    sys.dont_write_bytecode = True  # a reader that writes is a finding
    faulthandler.disable()  # a signal is reported by the parent
    set_budget(target.budget or BUDGET)
    target.prepare(inside)
    for name, data in seeds_of(target):  # load and compile what a reader needs, before its time counts
        if not name.startswith((FOUND, BOMB)):
            kind, detail = _outcome(target, _stored(target, inside, name, target.unpacked(data)))
            if kind != "intact":
                raise AssertionError(f"{target.name}: the intact file {name} is not read: {kind} {detail}")
    pages = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
    resource.setrlimit(resource.RLIMIT_AS, (pages + ADDRESSES, resource.RLIM_INFINITY))
    trespasses = _audited(scratch)
    counts, findings, peak = dict.fromkeys(OUTCOMES, 0), dict[str, Finding](), 0
    limit, number = target.budget or BUDGET, numbers.start
    for number in numbers:
        if time.monotonic() > deadline:
            break
        try:
            name, data = draw(number)
        except MemoryError:  # of a mutation, which would leave its reader less than the budget
            counts["skipped"] += 1
            number += 1
            break
        path = _stored(target, inside, name, data)
        trespasses.clear()
        present, before = _resident(), _peak()  # the mutation may have taken more than the reader
        position[:] = struct.pack("<qd", number, time.monotonic())
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        kind, detail = _outcome(target, path)
        signal.setitimer(signal.ITIMER_PROF, 0)
        used = _peak() - present if _peak() > before else 0
        if trespasses or os.listdir(empty):
            kind, detail = "forbidden", f"{trespasses[:3]} {os.listdir(empty)}"
        elif used > limit + SLACK:
            kind, detail = "memory", f"{used >> 20} MiB"
        peak = max(peak, used)
        if kind in counts:
            counts[kind] += 1
        else:
            counts["refused"] += 1
            finding = Finding(target.name, number, name, data, kind, detail)
            findings.setdefault(finding.key, finding)
        if before - present > limit + SLACK or peak > limit + SLACK:
            number += 1
            break  # a new worker can measure the next one
    else:
        number = numbers.stop
    _send(sender, {"counts": counts, "findings": list(findings.values()), "peak": peak, "next": number})


def _resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _send(sender: int, report: dict[str, Any]) -> None:
    data = pickle.dumps(report)
    while data:
        data = data[os.write(sender, data) :]


def _stored(target: Target, directory: Path, name: str, data: bytes) -> Path:
    path = directory / (
        target.file or "case" + "".join(Path(name.removesuffix(".zst") if target.packed else name).suffixes[-2:])
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def _outcome(target: Target, path: Path) -> tuple[str, str]:
    try:
        target.function(path)
        return "intact", ""
    except LlmkitError as error:
        if type(error.__cause__).__name__ == "WorkerError":  # a line at which a stage failed
            return "internal error", str(error.__cause__)
        return "refused", ""
    except Unread:
        return "skipped", ""
    except MemoryError:
        return ("skipped" if target.guarded else "memory"), traceback.format_exc()
    except BaseException as error:
        if target.guarded and isinstance(error, Exception):
            return "skipped", ""
        return type(error).__name__, traceback.format_exc()


def _audited(scratch: Path) -> list[str]:
    """Events that no reader may cause, as they happen."""
    events: list[str] = []
    allowed = (f"{scratch}/", "/dev/", "/proc/self/")

    def hook(event: str, arguments: Any) -> None:
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES:
            name = arguments[0]
            if isinstance(name, bytes):
                name = os.fsdecode(name)
            if isinstance(name, (str, os.PathLike)) and not os.path.abspath(name).startswith(allowed):
                events.append(f"open {name}")
        elif event == "pickle.find_class" and str(arguments[0]).startswith(OWN):
            return  # what guarded workers send
        elif event.startswith(FORBIDDEN):
            events.append(f"{event} {str(arguments)[:100]}")

    sys.addaudithook(hook)
    return events
