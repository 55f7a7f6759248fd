"""Groups of processes on this machine, started again where one of them is lost.

    code = launch(2, ["train", "mix/", "-o", "run/"], "run/", restarts=3)

torch's elastic agent starts the processes and tells each its place by the environment, as torchrun does; a signal to this process reaches all of
them, SIGUSR1 too, and where this process is killed they end as by SIGTERM (the watch-dog sees to it). Where one is killed, hangs (see `watchdog`) or loses its device, the agent stops the others, and a new group goes on from the last checkpoint:
the order of the data is a function of the step, so the same number of processes ends in the same bytes. A new group that dies before it comes to
train (a device that is gone for good) is followed by one with a process fewer. Each restart stands in events.jsonl with its reason. Errors that
would come again (bad data, a full disk, a loss that is not finite) end the run at once.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from llmkit.errors import ExitCode, LostError
from llmkit.training.checkpoint.run_directory import CONFIG, RunDirectory

SHUTDOWN_SECONDS = 600  # what a stopped group may take to save
RESTARTED = "LLMKIT_RESTARTED"  # set for processes that go on with what others have begun


def restarted() -> bool:
    """Whether this process takes the place of one that was lost: it goes on, whatever its command line says. torchrun restarts too."""
    return RESTARTED in os.environ or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") not in ("", "0")


def launch(count: int, arguments: Sequence[str], output: str, restarts: int = 0) -> int:
    """Run `python -m llmkit ARGUMENTS`, which trains in `output`, as a group of `count` processes; returns the exit code."""
    # Not more threads than processors, whatever the number of processes.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // count)))
    logging.disable(logging.CRITICAL)  # the processes speak for themselves
    run = RunDirectory(output)
    with _passed_on(signal.SIGUSR1):
        return _groups(run, count, arguments, restarts)


def _groups(run: RunDirectory, count: int, arguments: Sequence[str], restarts: int) -> int:
    """One group after the other, until one comes to an end."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    for attempt in range(restarts + 1):
        before = _stamps(run)
        try:
            elastic_launch(_configuration(count), sys.executable)("-m", "llmkit", *arguments)
            return 0
        except SignalException as error:
            return 128 + int(error.sigval)
        except ChildFailedError as error:
            rank, code = _cause({rank: (f.timestamp, f.exitcode) for rank, f in error.failures.items()})
        if code > 0 and code != ExitCode.LOST:
            return code
        after = _stamps(run)
        if attempt == restarts:
            if code > 0:  # it has said what happened
                return code
            hint = "go on with --resume" + ("" if restarts else "; --max-restarts does so by itself")
            raise LostError(f"a training process was killed by signal {-code} (rank {rank})", hint)
        if after[0] is not None and after != before:  # the run has begun: it is gone on with
            os.environ[RESTARTED] = "1"
        if attempt and after[1] == before[1] and count > 1:  # this group did not come to train
            count -= 1
        reason = _reason(run, rank, code)
        if after[0] is not None:
            run.event("restart", number=attempt + 1, rank=rank, reason=reason, processes=count)
        print(f"llmkit: {reason}; starting again with {count} processes", file=sys.stderr, flush=True)
    raise AssertionError


@contextmanager
def _passed_on(number: signal.Signals) -> Iterator[None]:
    """Hand this signal, of which torch's agent knows nothing, to the processes. They are born with it blocked, and take it when they can."""
    import psutil  # Accelerate needs it too

    ended = threading.Event()

    def wait() -> None:
        while not ended.is_set():
            if signal.sigtimedwait({number}, 0.2):
                for child in psutil.Process().children():
                    with suppress(psutil.Error):
                        child.send_signal(number)

    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _configuration(count: int) -> Any:
    import dataclasses

    from torch.distributed.launcher.api import LaunchConfig

    known = {field.name for field in dataclasses.fields(LaunchConfig)}
    more: dict[str, Any] = {"shutdown_timeout": SHUTDOWN_SECONDS} if "shutdown_timeout" in known else {}
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=0,  # the agent's own would say no reason
        monitor_interval=0.1,
        **more,
    )


def _cause(failures: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """(rank, exit code) of the process that was lost first: the others are stopped because of it, or fail because it is gone.

    `failures` holds (time in whole seconds, exit code) by rank.
    """
    first = min(when for when, _ in failures.values())
    rank = min((_guilt(code), rank) for rank, (when, code) in failures.items() if when == first)[1]
    return rank, failures[rank][1]


def _guilt(code: int) -> int:
    """Order of exit codes from cause to consequence: killed, failed, lost the others, stopped because of them."""
    if code in (-signal.SIGTERM, ExitCode.TERMINATED):
        return 3
    return 0 if code < 0 else 2 if code == ExitCode.LOST else 1


def _reason(run: RunDirectory, rank: int, code: int) -> str:
    """What became of the group, in words."""
    with suppress(OSError, ValueError, KeyError):
        for line in reversed((run.path / "events.jsonl").read_text().splitlines()):
            event = json.loads(line)
            if event["event"] == "hang":
                return f"rank {', '.join(map(str, event['ranks']))} made no progress for {event['seconds']:g} s"
            if event["event"] in ("start", "resume"):
                break
    if code < 0:
        return f"rank {rank} was killed by signal {-code} ({signal.Signals(-code).name})"
    return f"rank {rank} lost the others or its device"


def _stamps(run: RunDirectory) -> tuple[int | None, int | None]:
    """When the run's configuration and its events were last written."""
    return tuple(
        path.stat().st_mtime_ns if path.exists() else None for path in (run.path / CONFIG, run.path / "events.jsonl")
    )  # type: ignore[return-value]
