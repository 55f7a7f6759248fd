"""Every command killed, and run under every fault of its surroundings: is anything lost, half-written, or not said in one clear line?

    python tests/bench/faults.py [--work DIR] [--seed 0] [--only COMMAND,...] [--faults FAULT,...] > tests/bench/faults.md

A call is a fork of this process, which has imported everything (tests/preloaded.py), with the fault in the child alone; faults of the start (locale,
HOME) get a new process. Kills and signals fall at calls that change the file system (fsync, rename, unlink, ..., counted in an undisturbed run) and at random
times, over no output and over an older one that -f replaces. After each, the output is absent (where none was), the old one or the new one, whole;
and the same line run again gives the bytes of an undisturbed run and leaves nothing else. A fault gives the documented exit code, at most one error
line with its hint, and keeps the old output, or does no harm. Prints a table of command by fault; exit code 1 where a cell is wrong. Needs
root, for small file systems and read-only ones (in a mount namespace of its own), and another user; ten minutes on a quiet core.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import random
import resource
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from byte_equality import MODEL, differing_metrics, digest

SECONDS = 60.0  # a call that takes longer hangs
NOBODY = 65534
RENAMES = ("replace", "rename", "exchange")
HOOKED = (*RENAMES, "fsync", "unlink", "rmdir", "mkdir", "ftruncate", "symlink", "fchmod")
NOISE = ("Traceback", "Exception ignored", "internal error", "Fatal Python", "most recent call")


@dataclass(frozen=True)
class Case:
    """A command. `older` replaces words of its line for another output; `source` is the input that faults are in."""

    name: str
    line: str
    output: str
    older: tuple[str, str]
    source: str
    streams: bool = False  # it writes to stdout without -o
    more: tuple[str, ...] = ()  # other outputs

    @property
    def run(self) -> bool:
        return self.output == "run"


TRAINING = "--batch-size 2 --save-every 2"
CASES = (
    Case("extract", "extract web.warc", "out.jsonl.zst", ("web", "older"), "web.warc", True),
    Case("filter", "filter docs.jsonl --preset gopher --rejects cell/dropped.jsonl.zst -j 2", "out.jsonl.zst", ("docs", "older"), "docs.jsonl", True, ("dropped.jsonl.zst",)),
    Case("dedup", "dedup docs.jsonl", "out.parquet", ("docs", "older"), "docs.jsonl", True),
    Case("dedup --index", "dedup docs.jsonl --index cell/seen.duckdb", "out.jsonl.gz", ("docs", "older"), "docs.jsonl", True, ("seen.duckdb",)),
    Case("vocab", "vocab docs.jsonl --size 400", "out", ("docs", "older"), "docs.jsonl"),
    Case("tokenize", "tokenize docs.jsonl -t tok -j 2 --max-tokens-per-shard 4k", "out", ("docs", "older"), "docs.jsonl", True),
    Case("mix", "mix shards --tokens 8k", "out.arrow", ("8k", "7k"), "shards/part-00000.arrow", True),
    Case("train", f"train shards -m model.json --tokens 2k {TRAINING}", "run", ("2k", "1k"), "shards/part-00000.arrow"),
    Case("anneal", "anneal base shards --tokens 1k --save-every 2", "run", ("1k", "2k"), "shards/part-00000.arrow"),
    Case("average", "average base --last 2", "out", ("2", "3"), "base/checkpoints/{last}/model.safetensors"),
    Case("sft", f"sft base rows.jsonl {TRAINING} --chat-template chat.jinja", "run", ("--seed 0", "--seed 1"), "rows.jsonl"),
    Case("dpo", f"dpo chat pairs.jsonl {TRAINING}", "run", ("--seed 0", "--seed 1"), "pairs.jsonl"),
    Case("quantize", "quantize base --to int4", "out", ("int4", "int8"), "base/checkpoints/{last}/model.safetensors"),
    Case("generate", "generate chat prompts.jsonl --max-tokens 12", "out.jsonl.zst", ("12", "11"), "prompts.jsonl", True),
    Case("eval", "eval base chat --perplexity held.jsonl", "out.json", ("base chat", "base"), "held.jsonl", True),
    Case("lineage", "lineage base --script", "out.sh", ("base", "chat"), "base/checkpoints/{last}/model.safetensors", True),
)  # fmt: skip


# ---- calls


@dataclass
class Ended:
    """How a call ended: its exit code as a shell shows it, its stderr, and the seconds it took."""

    code: int
    said: str
    seconds: float = 0.0
    events: list[str] = field(default_factory=list)


@dataclass
class Hook:
    """What happens at the n-th change of the file system (of these `kinds`) in the first process of a call: a signal, before or after it."""

    at: int = -1
    number: int = 0
    after: bool = False
    kinds: tuple[str, ...] = HOOKED
    log: int = -1  # descriptor that the names of the changes go to

    def install(self) -> None:
        from llmkit.io import atomic

        self.count, self.process = 0, os.getpid()
        for name in self.kinds:
            owner = atomic if name == "exchange" else os
            if hasattr(owner, name):
                setattr(owner, name, self.hooked(name, getattr(owner, name)))

    def hooked(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def replacement(*arguments: Any, **named: Any) -> Any:
            if os.getpid() != self.process:
                return original(*arguments, **named)
            self.count += 1
            mine = self.count
            if self.log >= 0:
                os.write(self.log, f"{name}\n".encode())
            if mine == self.at and not self.after:
                os.kill(os.getpid(), self.number)
            result = original(*arguments, **named)
            if mine == self.at and self.after:
                os.kill(os.getpid(), self.number)
            return result

        return replacement


class Call:
    """A fork of this process that runs a command; `fault` is called in it first."""

    def __init__(
        self, arguments: list[str], fault: Callable[[], object] = lambda: None, hook: Hook | None = None
    ) -> None:
        self.said = tempfile.TemporaryFile()
        self.log, log = os.pipe()
        os.set_blocking(self.log, False)
        self.began = time.monotonic()
        self.process = os.fork()
        if self.process == 0:
            os.close(self.log)
            run_call(arguments, fault, hook, self.said.fileno(), log)
        os.close(log)

    def wait(self, limit: float = SECONDS) -> Ended:
        """How it ended; code -1 where it hangs."""
        poll = select.poll()
        descriptor = os.pidfd_open(self.process)
        poll.register(descriptor, select.POLLIN)
        hangs = not poll.poll(limit * 1000)
        os.close(descriptor)
        if hangs:
            os.kill(self.process, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])
        seconds = time.monotonic() - self.began
        self.said.seek(0)
        events = b""
        while part := (os.read(self.log, 1 << 16) if select.select([self.log], [], [], 0)[0] else b""):
            events += part
        os.close(self.log)
        text = self.said.read().decode("utf-8", "replace")
        return Ended(-1 if hangs else status if status >= 0 else 128 - status, text, seconds, events.decode().split())

    def wait_stopped(self) -> bool:
        """Whether it stops, rather than ends."""
        return os.WIFSTOPPED(os.waitpid(self.process, os.WUNTRACED)[1])


def run_call(arguments: list[str], fault: Callable[[], object], hook: Hook | None, said: int, log: int) -> None:
    """The process of a call: streams, fault, command, and what the interpreter does at its end."""
    import atexit
    import threading

    code: Any = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number, descriptor in enumerate((os.open(os.devnull, os.O_RDONLY), os.open(os.devnull, os.O_WRONLY), said)):
            os.dup2(descriptor, number)
        os.dup2(log, 200)
        os.closerange(3, 200)
        tempfile.tempdir = None
        if hook:
            hook.log = 200 if hook.log == 0 else -1
        fault()
        for name, number in (("stdin", 0), ("stdout", 1), ("stderr", 2)):
            try:
                os.fstat(number)
                opened = open(number, "w" if number else "r", encoding="utf-8", closefd=False)
            except OSError:
                opened = None  # as Python does for a stream that was closed
            setattr(sys, name, opened)
            setattr(sys, f"__{name}__", opened)
        if hook:
            hook.install()
        sys.argv = ["llmkit", *arguments]
        from llmkit.cli.main import main

        try:
            main()
        except SystemExit as error:
            code = error.code or 0
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        try:
            if sys.stdout:
                sys.stdout.flush()
        except OSError as error:
            print(f"Exception ignored at exit: {error}", file=sys.stderr, flush=True)
            code = 120
    except BaseException:
        import traceback

        traceback.print_exc()
    os._exit(int(code))


def anew(arguments: list[str], environment: dict[str, str | None], said: int = subprocess.PIPE) -> Ended:
    """A new process, with a changed environment (None: unset)."""
    inherited = {key: value for key, value in os.environ.items() if key not in environment}
    given = {key: value for key, value in environment.items() if value is not None}
    done = subprocess.run([sys.executable, "-m", "llmkit", *arguments], env=inherited | given, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=said, timeout=4 * SECONDS)  # fmt: skip
    return Ended(
        done.returncode if done.returncode >= 0 else 128 - done.returncode,
        (done.stderr or b"").decode("utf-8", "replace"),
    )


# ---- a command and its outputs


class Wrong(Exception):
    """What a cell found wrong."""


class Subject:
    """A case in its directory cell/, with the contents of its older and its new output."""

    def __init__(self, case: Case) -> None:
        self.case = case
        last = max(p.name for p in Path("base/checkpoints").iterdir())
        self.source = case.source.format(last=last)
        self.older: dict[str, Any] = {}
        self.new: dict[str, dict[str, Any]] = {}  # by whether an older one was there
        self.names: dict[bool, set[str]] = {}
        self.events: dict[bool, list[str]] = {}
        self.seconds = 0.0
        self.kept = Path("kept")
        shutil.rmtree(self.kept, ignore_errors=True)
        self.clear()
        self.expect(self.call(self.words(older=True)), (0,))
        self.older = self.content()
        shutil.copytree("cell", self.kept, symlinks=True)
        for replace in (False, True):
            self.prepare(replace)
            done = self.call(self.words(replace), hook=Hook(log=0))
            self.expect(done, (0,))
            self.new[replace], self.names[replace] = self.content(), set(os.listdir("cell"))
            self.events[replace], self.seconds = done.events, done.seconds
        assert self.older != self.new[False], case.name
        self.prepare(False)
        self.call(self.words())
        if self.content() != self.new[False]:
            raise SystemExit(f"{case.name}: two undisturbed runs differ: {self.differences(self.new[False])}")

    def words(
        self, replace: bool = False, older: bool = False, output: str | None = "", quiet: bool = True
    ) -> list[str]:
        line = f"{self.case.line} --seed 0" if "--seed" in self.case.older[0] else self.case.line
        line = line.replace(*self.case.older) if older else line
        named = ["-o", output or f"cell/{self.case.output}"] if output is not None else []
        more = (["-f"] if replace else ["--resume"]) if self.case.run else ["-f"] * replace
        return [*shlex.split(line), *named, *more, *["-q"] * quiet]

    def hook(self, draw: random.Random, replace: bool, number: int, rename: bool) -> Hook:
        """A signal at any change of the file system, or any rename."""
        kinds = RENAMES if rename else HOOKED
        count = sum(name in kinds for name in self.events[replace])
        return Hook(draw.randint(1, max(1, count)), number, draw.random() < 0.5, kinds)

    def clear(self) -> None:
        shutil.rmtree("cell", ignore_errors=True)
        os.mkdir("cell")

    def prepare(self, replace: bool) -> None:
        """The directory before a call: empty, or with the older output."""
        self.clear()
        if replace:
            shutil.copytree(self.kept, "cell", symlinks=True, dirs_exist_ok=True)

    def call(self, words: list[str], fault: Callable[[], object] = lambda: None, hook: Hook | None = None) -> Ended:
        return Call(words, fault, hook).wait()

    def content(self) -> dict[str, Any]:
        """Digests of all files of the outputs; of a run, what is decided by its inputs. An index is compared by what a later run finds in it."""
        found: dict[str, Any] = {}
        for name in (self.case.output, *self.case.more):
            path = Path("cell", name)
            if name.endswith(".duckdb"):
                continue
            if self.case.run:
                for file in [*path.glob("config.toml"), *path.glob("checkpoints/step-*/**/*"), *path.glob("samples.jsonl"), *path.glob("final")]:  # fmt: skip
                    if file.is_symlink():
                        found[str(file)] = os.readlink(file)
                    elif file.is_file():
                        found[str(file)] = digest(file)
            else:
                for file in [path, *path.rglob("*")]:
                    if file.is_file():
                        found[str(file)] = digest(file)
        return found

    def differences(self, expected: dict[str, Any]) -> str:
        now = self.content()
        return ", ".join(sorted(name for name in now.keys() | expected.keys() if now.get(name) != expected.get(name)))

    def expect(self, done: Ended, codes: tuple[int, ...], silent: bool = False) -> None:
        """Exit code and stderr as documented: at most one error, which a failure has, with at most one hint."""
        lines = [line for line in done.said.splitlines() if line and ": warning: " not in line]
        errors = [line for line in lines if ": error: " in line]
        short = " / ".join(lines)[:300]
        if done.code == -1:
            raise Wrong("hangs")
        if noise := [word for word in NOISE if word in done.said]:
            raise Wrong(
                f"exit {done.code}, {noise[0]}: {short if noise[0] == 'internal error' else (lines[-1:] or [''])[0]}"
            )
        if done.code not in codes:
            raise Wrong(f"exit {done.code}, not {' or '.join(map(str, codes))}: {short}")
        if not silent and done.code in (1, 2, 75) and len(errors) != 1:
            raise Wrong(f"exit {done.code} with {len(errors)} error lines: {short}")
        if len(lines) > 2 or (done.code in (141, 143) and lines):
            raise Wrong(f"exit {done.code}: {len(lines)} lines: {short}")

    def whole(self, replace: bool, done: bool | None = None, strays: bool = True) -> None:
        """The outputs are those before or those after (`done`: must be these), and nothing else is left."""
        now = self.content()
        before = self.older if replace else {}
        if self.case.run:
            self.whole_run(now)
            if done and any(
                now.get(name) != value for name, value in self.new[replace].items()
            ):  # a stop adds a checkpoint
                raise Wrong(f"not the bytes of an undisturbed run: {self.differences(self.new[replace])}")
        else:
            for name in (self.case.output, *self.case.more):
                mine = [
                    {k: v for k, v in state.items() if Path(k).parts[1] == name}
                    for state in (now, before, self.new[replace])
                ]
                if mine[0] not in mine[2 if done else 1 :]:
                    raise Wrong(f"{name} is neither what it was nor what it becomes: {', '.join(mine[0]) or 'lost'}")
        allowed = (
            self.names[replace] | {name for name in os.listdir(self.kept) if replace} | {"seen.duckdb.wal"}
        )  # said to be a part of it
        if strays and (more := [str(p) for p in Path("cell").rglob("*") if ".partial" in p.name or p.name.endswith((".old", ".removed"))] or sorted(set(os.listdir("cell")) - allowed)):  # fmt: skip
            raise Wrong(f"left behind: {', '.join(more)}")

    def whole_run(self, now: dict[str, Any]) -> None:
        from llmkit.training.checkpoint.run_directory import find_damage

        path = Path("cell", self.case.output)
        for checkpoint in path.glob("checkpoints/step-*"):
            if damage := find_damage(checkpoint):
                raise Wrong(f"{checkpoint}: {damage}")
        for link in ("final", "latest"):
            if (path / link).is_symlink() and not (path / link).exists():
                raise Wrong(f"{link} leads nowhere")

    def again(self, replace: bool) -> None:
        """The same line once more gives the bytes of an undisturbed run; what a run logged is equal too."""
        done = self.call(self.words(replace))
        known = done.code == 1 and self.case.output.endswith((".json", ".sh")) and " exists" in done.said
        self.expect(done, (1,) if known else (0,))  # such a file cannot hold how it was made
        self.whole(replace, done=True)
        if self.case.run:
            log = Path("cell/run/metrics.jsonl")
            reference = Path(f"metrics-{self.case.name}.jsonl")
            if not reference.exists():
                self.prepare(False)
                self.call(self.words())
                shutil.copy(log, reference)
            elif apart := differing_metrics(reference, log):
                raise Wrong(f"metrics.jsonl: {apart}")
        if "seen.duckdb" in self.case.more:
            later = self.call(shlex.split("dedup later.jsonl --index cell/seen.duckdb -q -o cell/later.jsonl"))
            self.expect(later, (0,))
            found, reference = Path("cell/later.jsonl").read_bytes(), Path(f"later-{replace}.jsonl")
            if not reference.exists():
                self.prepare(replace)
                self.call(self.words(replace))
                self.call(shlex.split(f"dedup later.jsonl --index cell/seen.duckdb -q -o {reference}"))
            if found != reference.read_bytes():
                raise Wrong("the index finds other duplicates than that of an undisturbed run")

    def harmless(self, done: Ended, replace: bool = True, codes: tuple[int, ...] = (0,), silent: bool = False) -> None:
        """The call succeeded with the new output, or failed with one of the codes and kept what was there."""
        self.expect(done, codes, silent)
        fresh = self.case.run and done.code != 0
        self.whole(replace, done=done.code == 0)
        if fresh and not replace:
            self.again(replace)


# ---- faults: each takes a subject and raises Wrong


def kills(subject: Subject, draw: random.Random, count: int = 6) -> int:
    """SIGKILL at changes of the file system, at the last renames before all, and at random times."""
    dealt = 0
    for number in range(count):
        replace = number % 2 == 1 and not subject.case.run
        subject.prepare(replace)
        while True:
            if number < 2 or number % 3 == 2:
                done = subject.call(
                    subject.words(replace), hook=subject.hook(draw, replace, signal.SIGKILL, number < 2)
                )
            else:
                call = Call(subject.words(replace))
                time.sleep(draw.uniform(0, subject.seconds))
                os.kill(call.process, signal.SIGKILL)
                done = call.wait()
            if done.code == 137:
                break
            subject.expect(done, (0,))
            subject.prepare(replace)
        dealt += 1
        subject.whole(replace, strays=False)
        subject.again(replace)
    return dealt


def mounted(subject: Subject, options: str, replace: bool) -> None:
    subject.clear()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "faults", "cell"], check=True)
    if replace:
        shutil.copytree(subject.kept, "cell", symlinks=True, dirs_exist_ok=True)


def pages(place: Path) -> int:
    return sum(-(-p.stat().st_size // 4096) for p in place.rglob("*") if p.is_file() and not p.is_symlink())


def full_disk(subject: Subject, draw: random.Random) -> None:
    replace = not subject.case.run
    subject.prepare(replace)
    subject.expect(subject.call(subject.words(replace)), (0,))
    size = pages(Path("cell"))
    old = pages(subject.kept) if replace else 0
    for part in (0.0, 0.5, 0.9):
        mounted(subject, f"size={max(1, old + int(part * size)) * 4}k", replace)
        try:
            done = subject.call(subject.words(replace))
            subject.harmless(done, replace, (0, 1)) if not subject.case.run else (
                subject.expect(done, (0, 1)),
                subject.whole(replace),
            )
            if done.code and "No space left" not in done.said:
                raise Wrong(f"another error than a full disk: {done.said.strip()[:200]}")
            if subject.case.run:
                subprocess.run(["mount", "-o", "remount,size=64m", "cell"], check=True)
                subject.again(False)
        finally:
            subprocess.run(["umount", "cell"], check=True)


def file_limit(subject: Subject, draw: random.Random) -> None:
    replace = not subject.case.run
    subject.prepare(replace)
    subject.call(subject.words(replace))
    largest = max(p.stat().st_size for p in Path("cell").rglob("*") if p.is_file())
    for part in (0.1, 0.9):
        subject.prepare(replace)
        limit = int(largest * part)
        done = subject.call(
            subject.words(replace), lambda limit=limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        )
        subject.harmless(done, replace, (0, 1))


def redirect(number: int, path: str, flags: int = os.O_WRONLY) -> None:
    descriptor = os.open(path, flags)
    os.dup2(descriptor, number)


def dev_full(subject: Subject, draw: random.Random) -> None:
    """/dev/full as stdout and as -o; and as stderr, which must not matter."""
    if subject.case.streams:
        subject.prepare(False)
        done = subject.call(subject.words(output=None), lambda: redirect(1, "/dev/full"))
        subject.expect(done, (1,))
    subject.prepare(False)
    subject.expect(subject.call(subject.words(output="/dev/full")), (1, 2))
    for more in [[], ["--json"]] if subject.case.name != "lineage" else [[]]:  # --json is another output there
        subject.prepare(True)
        done = subject.call([*subject.words(True, quiet=False), *more], lambda: redirect(2, "/dev/full"))
        subject.harmless(done)


def closed_stdout(subject: Subject, draw: random.Random) -> None:
    if subject.case.streams:
        subject.prepare(False)
        subject.expect(subject.call(subject.words(output=None), lambda: os.close(1)), (1,))
    subject.prepare(True)
    subject.harmless(subject.call(subject.words(True), lambda: os.close(1)))


def closed_others(subject: Subject, draw: random.Random) -> None:
    """stdin, stderr and all three closed."""
    for numbers in ((0,), (2,), (0, 1, 2)):
        subject.prepare(True)
        words = subject.words(True, quiet=False)
        done = subject.call(words, lambda numbers=numbers: [os.close(n) for n in numbers])
        if numbers == (0,):
            done.said = "\n".join(line for line in done.said.splitlines() if "error" in line or "Traceback" in line)
        subject.harmless(done)


def gone_reader(subject: Subject, draw: random.Random) -> None:
    """The reader of stdout, or of stderr, has gone before the first byte."""

    def broken(number: int) -> None:
        reading, writing = os.pipe()
        os.close(reading)
        os.dup2(writing, number)

    if subject.case.streams:
        subject.prepare(False)
        subject.expect(subject.call(subject.words(output=None), lambda: broken(1)), (141,))
    for more in [[], ["--json"]] if subject.case.name != "lineage" else [[]]:  # --json is another output there
        subject.prepare(True)
        subject.harmless(subject.call([*subject.words(True, quiet=False), *more], lambda: broken(2)))


def as_nobody() -> None:
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)


def read_only(subject: Subject, draw: random.Random) -> None:
    """A directory of another user, and a read-only file system."""
    for replace in (True, False):
        subject.prepare(replace)
        subject.harmless(
            subject.call(subject.words(replace), as_nobody), True if replace else replace, (1,)
        ) if replace or not subject.case.run else subject.expect(subject.call(subject.words(), as_nobody), (1,))
        subject.whole(replace) if replace else None
        mounted(subject, "size=64m", replace)
        try:
            subprocess.run(["mount", "-o", "remount,ro", "cell"], check=True)
            done = subject.call(subject.words(replace))
            subject.expect(done, (1,))
            subject.whole(replace)
        finally:
            subprocess.run(["umount", "cell"], check=True)


def two_runs(subject: Subject, draw: random.Random) -> None:
    """A second run while the first is stopped before its first sync or rename, with either line first; then both at once."""
    replace = not subject.case.run
    for first_older in (False, True):
        lines = [subject.words(True, older=older) for older in (first_older, not first_older)]
        if subject.case.run:
            lines = [[w for w in line if w != "-f"] + ["--resume"] for line in lines]
        for kinds in (("fsync",), RENAMES):
            subject.prepare(replace)
            first = Call(lines[0], hook=Hook(1, signal.SIGSTOP, kinds=kinds))
            if not first.wait_stopped():
                continue
            second = subject.call(lines[1])
            os.kill(first.process, signal.SIGCONT)
            ended = first.wait()
            subject.expect(second, (75,))
            subject.expect(ended, (0,))
            if not first_older:
                subject.whole(replace, done=True)
    for _ in range(2):
        subject.prepare(replace)
        calls = [Call(subject.words(replace)) for _ in range(2)]
        ended = [call.wait() for call in calls]
        for done in ended:
            subject.expect(done, (0, 75))
        if 0 not in [done.code for done in ended]:
            raise Wrong("neither of two runs at once succeeded")
        subject.whole(replace, done=True)


def few_descriptors(subject: Subject, draw: random.Random) -> None:
    subject.prepare(True)
    subject.harmless(subject.call(subject.words(True), lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))))


def no_home(subject: Subject, draw: random.Random) -> None:
    """HOME, TMPDIR and the caches in a directory that cannot be made."""
    subject.prepare(True)
    names = ("HOME", "TMPDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "HF_HOME")
    subject.harmless(anew(subject.words(True), dict.fromkeys(names, "/proc/nowhere")))


def c_locale(subject: Subject, draw: random.Random) -> None:
    """The C locale without any of Python's remedies, with names that are not ASCII."""
    subject.prepare(True)
    names = "äöü 文.d"
    shutil.rmtree(names, ignore_errors=True)
    os.mkdir(names)
    environment = {"LC_ALL": "C", "LANG": None, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    words = subject.words(True)
    root = Path(subject.source).parts[0]
    os.symlink(f"../{root}", f"{names}/{root}")
    words = [f"{names}/{word}" if word == root else word for word in words]
    os.symlink("../cell", f"{names}/cell")
    words[words.index("-o") + 1] = f"{names}/cell/{subject.case.output}"
    done = anew(words, environment)
    subject.expect(done, (0,))
    if subject.case.name not in ("eval", "lineage"):  # which show the names
        subject.whole(True, done=True)
    missing = anew(
        [word if not word.startswith(names) or "/cell/" in word else f"{names}/没有.x" for word in words], environment
    )
    subject.expect(missing, (1, 2))
    if "没有" not in missing.said:
        raise Wrong(f"the name is not readable: {missing.said.strip()[:100]}")


def signals(subject: Subject, draw: random.Random) -> None:
    """SIGINT, SIGTERM and SIGHUP at changes of the file system and at random times."""
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)):
        for kind in ("change", "rename", "time"):
            replace = not subject.case.run
            subject.prepare(replace)
            if kind == "time":
                call = Call(subject.words(replace))
                time.sleep(draw.uniform(0.02, subject.seconds))
                os.kill(call.process, number)
                done = call.wait()
            else:
                done = subject.call(subject.words(replace), hook=subject.hook(draw, replace, number, kind == "rename"))
            try:
                lines = [line for line in done.said.splitlines() if ": warning: " not in line]
                if done.code == 130 and lines and not (len(lines) == 1 and lines[0].endswith(": interrupted")):
                    raise Wrong(f"exit 130: {' / '.join(lines)}")
                subject.expect(done, (0, code))
                subject.whole(replace, done=True if done.code == 0 else None)
                if subject.case.run and done.code:
                    subject.again(replace)
            except Wrong as error:
                raise Wrong(f"{signal.Signals(number).name} ({kind}): {error}") from None


def changing_input(subject: Subject, draw: random.Random) -> None:
    """The input is removed, or cut in half, before one of the times that it is opened."""
    replace = not subject.case.run
    source = Path(subject.source)
    saved = source.read_bytes()
    times = opened(subject, replace)
    for how in ("vanishes", "shrinks"):
        for nth in range(1, times + 1):
            subject.prepare(replace)
            done = subject.call(subject.words(replace), lambda nth=nth, how=how: watch(source, nth, how, saved))
            kept = source.exists()
            source.write_bytes(saved)
            try:
                if done.code == 0 and (how == "shrinks" or not kept):
                    subject.expect(done, (0,))  # read before, or by the descriptor that it had
                    continue
                subject.harmless(done, replace, (0, 1, 2))
            except Wrong as error:
                raise Wrong(f"{how} at the {nth}. of {times} openings: {error}") from None


def opened(subject: Subject, replace: bool) -> int:
    """How often the input is opened."""
    subject.prepare(replace)
    count = subject.call(subject.words(replace), lambda: watch(Path(subject.source), 0, "", b"")).said.count("OPENED\n")
    return min(count, 4)


def watch(source: Path, nth: int, how: str, saved: bytes) -> None:
    """In a call: do something to the input just before it is opened for the nth time."""
    wanted, count, process = os.stat(source), [0], os.getpid()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event != "open" or os.getpid() != process or not isinstance(arguments[0], (str, bytes)) or not count:
            return
        try:
            same = os.path.basename(
                arguments[0] if isinstance(arguments[0], str) else arguments[0].decode()
            ) == source.name and os.path.samestat(os.stat(arguments[0]), wanted)
        except OSError:
            return
        if not same:
            return
        count[0] += 1
        if not nth:
            os.write(2, b"OPENED\n")
        elif count[0] == nth:
            count.clear()
            if how == "vanishes":
                os.unlink(source)
            else:
                os.truncate(source, len(saved) // 2)

    sys.addaudithook(hook)


def fifo(subject: Subject, draw: random.Random) -> None:
    """The input is a pipe with a name: read, or refused."""
    if "/" in subject.source:
        return
    replace = not subject.case.run
    source, aside = Path(subject.source), Path(f"{subject.source}.aside")
    subject.prepare(replace)
    source.rename(aside)
    os.mkfifo(source)
    feeder = subprocess.Popen(["sh", "-c", f"cat {aside} > {source}"], stderr=subprocess.DEVNULL)
    try:
        done = Call(subject.words(replace)).wait(20)
    finally:
        feeder.kill()
        feeder.wait()
        source.unlink()
        aside.rename(source)
    subject.harmless(done, replace, (0, 1, 2))


FAULTS: dict[str, Callable[[Subject, random.Random], Any]] = {
    "SIGKILL": kills,
    "full disk": full_disk,
    "file limit": file_limit,
    "/dev/full": dev_full,
    "closed stdout": closed_stdout,
    "closed stdin, stderr": closed_others,
    "reader gone": gone_reader,
    "read-only": read_only,
    "two at once": two_runs,
    "64 files": few_descriptors,
    "no HOME, TMPDIR": no_home,
    "C locale": c_locale,
    "INT, TERM, HUP": signals,
    "input changes": changing_input,
    "FIFO": fifo,
}


# ---- inputs, and the table


def build_inputs() -> None:
    """Documents, pages, rows and prompts, a tokenizer, shards, a model and a chat model, each made by its command."""
    from pydoc_data.topics import topics

    texts = [" ".join(topics[name].split()[:220]) for name in sorted(topics)]
    for name, part in (
        ("docs", texts[:40] + texts[30:34]),
        ("older", texts[20:50]),
        ("later", texts[35:60]),
        ("held", texts[60:64]),
    ):
        rows = [{"id": f"{name}-{i}", "text": f"{text} Ünï 文"} for i, text in enumerate(part)]
        Path(f"{name}.jsonl").write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
        )
    for name, part in (("web", texts[:12]), ("older", texts[12:20])):
        with open(f"{name}.warc", "wb") as file:
            for i, text in enumerate(part):
                page = f"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n\r\n<html><body><p>{text}</p></body></html>".encode()
                head = f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Record-ID: <urn:uuid:{i:032}>\r\nWARC-Target-URI: http://a.example/{i}\r\nWARC-Date: 2026-01-01T00:00:00Z\r\nContent-Type: application/http; msgtype=response\r\nContent-Length: {len(page)}\r\n\r\n"
                file.write(head.encode() + page + b"\r\n\r\n")
    sums = [(f"What is {i} plus {i + 1}?", f"It is {2 * i + 1}.", f"It is {i}.") for i in range(12)]
    files = {
        "rows.jsonl": [
            {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]} for a, b, _ in sums
        ],
        "pairs.jsonl": [{"prompt": a, "chosen": b, "rejected": c} for a, b, c in sums],
        "prompts.jsonl": [{"prompt": a} for a, _, _ in sums[:3]],
    }
    for name, rows in files.items():
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("chat.jinja").write_text(
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    Path("model.json").write_text(
        json.dumps(MODEL | {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "head_dim": 8})
    )
    os.mkdir("cell")
    for line in (
        "vocab docs.jsonl --size 400 -o tok",
        "tokenize docs.jsonl -t tok -o shards",
        f"train shards -m model.json --tokens 4k {TRAINING} -o base",
        f"sft base rows.jsonl {TRAINING} --chat-template chat.jinja -o chat",
    ):
        done = Call([*shlex.split(line), "-q"]).wait()
        if done.code:
            raise SystemExit(f"llmkit {line}: {done.said}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=5, help="of each command")
    parser.add_argument("--only", help="commands, separated by commas")
    parser.add_argument("--faults", help="faults, separated by semicolons")
    arguments = parser.parse_args()
    if os.geteuid():
        raise SystemExit("faults.py needs root: it mounts small file systems in a namespace of its own")
    began = time.monotonic()
    work = arguments.work or Path(tempfile.mkdtemp(prefix="faults-"))
    work.mkdir(parents=True, exist_ok=True)
    work.chmod(0o755)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x20000):  # CLONE_NEWNS: what is mounted below is seen here only
        raise OSError(ctypes.get_errno(), "unshare")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    from preloaded import preload

    preload(False)
    os.chdir(work)
    build_inputs()
    cases = [case for case in CASES if not arguments.only or case.name in arguments.only.split(",")]
    faults = {n: f for n, f in FAULTS.items() if not arguments.faults or n in arguments.faults.split(";")}
    rows: list[tuple[str, dict[str, str]]] = []
    dealt = 0
    for case in cases:
        subject = Subject(case)
        row: dict[str, str] = {}
        for name, fault in faults.items():
            draw = random.Random(f"{arguments.seed} {case.name} {name}")
            at = time.monotonic()
            try:
                made = fault(subject, draw, arguments.kills) if fault is kills else fault(subject, draw)
                dealt += made or 0
                row[name] = "ok"
            except Wrong as error:
                row[name] = str(error)
            print(f"{case.name}, {name}: {time.monotonic() - at:.1f} s: {row[name]}", file=sys.stderr, flush=True)
        rows.append((case.name, row))
    report(rows, faults, dealt, arguments, time.monotonic() - began)
    if not arguments.work:
        shutil.rmtree(work)
    os._exit(any(cell != "ok" for _, row in rows for cell in row.values()))


def report(
    rows: list[tuple[str, dict[str, str]]], faults: Any, dealt: int, arguments: argparse.Namespace, seconds: float
) -> None:
    wrong = [(command, name, cell) for command, row in rows for name, cell in row.items() if cell != "ok"]
    cells = sum(len(row) for _, row in rows)
    print(f"# Faults\n\n{time.strftime('%Y-%m-%d')}, two shared CPU cores, Python {platform.python_version()}. `python tests/bench/faults.py --seed {arguments.seed} --kills {arguments.kills}`, {seconds:.0f} s\n")  # fmt: skip
    print(f"{cells} cells, {len(wrong)} wrong; {dealt} SIGKILLs.\n")
    print(f"| command | {' | '.join(faults)} |\n|---|{'---|' * len(faults)}")
    for command, row in rows:
        print(f"| {command} | {' | '.join('ok' if row[name] == 'ok' else '**wrong**' for name in faults)} |")
    for command, name, cell in wrong:
        print(f"\n- {command}, {name}: {cell}", end="")
    print(flush=True)


if __name__ == "__main__":
    main()
