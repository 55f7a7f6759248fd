"""A group of processes on this machine, restarted if one of them is lost.

    code = launch(2, ["train", "mix/", "-o", "run/"], "run/", restarts=3)

torch's elastic agent starts the processes and passes each its rank in the environment, as torchrun does. A
signal to this process reaches all of them, SIGUSR1 included; if this process is killed they end as by SIGTERM
(watchdog.py sees to it). If one is killed, hangs or loses its device, the agent stops the others and a new
group resumes from the last checkpoint: the order of the data is a function of the step, so the same number of
processes ends in the same bytes. A new group that dies before it trains a step (a device that is gone for
good) is followed by one with a process fewer. Each restart is an event in events.jsonl with its reason.
Errors that would recur (bad data, a full disk, a non-finite loss) end the run at once.
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

SHUTDOWN_SECONDS = 600  # time a stopped group has to save
RESTARTED = "LLMKIT_RESTARTED"  # set for processes that resume what others have begun


def restarted() -> bool:
    """Whether this process replaces a lost one: it resumes, whatever its command line says. torchrun restarts too."""
    return RESTARTED in os.environ or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") not in ("", "0")


def launch(count: int, arguments: Sequence[str], output: str, restarts: int = 0) -> int:
    """Run `python -m llmkit ARGUMENTS`, which trains in `output`, as a group of `count` processes.

    Returns the exit code.
    """
    # Not more threads than processors, whatever the number of processes.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // count)))
    logging.disable(logging.CRITICAL)  # the processes report their own errors
    run = RunDirectory(output)
    with _forward_to_children(signal.SIGUSR1):
        return _run_groups(run, count, arguments, restarts)


def _run_groups(run: RunDirectory, count: int, arguments: Sequence[str], restarts: int) -> int:
    """Start one group after the other until one finishes."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    for attempt in range(restarts + 1):
        before = _modification_times(run)
        try:
            elastic_launch(_launch_config(count), sys.executable)("-m", "llmkit", *arguments)
            return 0
        except SignalException as error:
            return 128 + int(error.sigval)
        except ChildFailedError as error:
            rank, code = _first_failure({rank: (f.timestamp, f.exitcode) for rank, f in error.failures.items()})
        if code > 0 and code != ExitCode.LOST:
            return code
        after = _modification_times(run)
        if attempt == restarts:
            if code > 0:  # the process has reported the error
                return code
            hint = "continue with --resume" + ("" if restarts else ", or automatically with --max-restarts")
            raise LostError(f"a training process was killed by signal {-code} (rank {rank})", hint)
        if after[0] is not None and after != before:  # the run has begun: the next group resumes it
            os.environ[RESTARTED] = "1"
        if attempt and after[1] == before[1] and count > 1:  # this group did not train a step
            count -= 1
        reason = _describe_failure(run, rank, code)
        if after[0] is not None:
            run.event("restart", number=attempt + 1, rank=rank, reason=reason, processes=count)
        print(f"llmkit: {reason}; restarting with {count} processes", file=sys.stderr, flush=True)
    raise AssertionError


@contextmanager
def _forward_to_children(number: signal.Signals) -> Iterator[None]:
    """Forward this signal, which torch's agent does not handle, to the processes.

    They start with it blocked, and unblock it when ready.
    """
    import psutil

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


def _launch_config(count: int) -> Any:
    import dataclasses

    from torch.distributed.launcher.api import LaunchConfig

    fields = {field.name for field in dataclasses.fields(LaunchConfig)}
    optional: dict[str, Any] = {"shutdown_timeout": SHUTDOWN_SECONDS} if "shutdown_timeout" in fields else {}
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=0,  # the agent's own restarts would give no reason
        monitor_interval=0.1,
        **optional,
    )


def _first_failure(failures: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """(rank, exit code) of the process that was lost first: the others are stopped because of it, or fail
    because it is gone.

    `failures` holds (time in whole seconds, exit code) by rank.
    """
    first = min(time for time, _ in failures.values())
    rank = min((_failure_order(code), rank) for rank, (time, code) in failures.items() if time == first)[1]
    return rank, failures[rank][1]


def _failure_order(code: int) -> int:
    """Order of exit codes from cause to consequence: killed, failed, lost the others, stopped because of them."""
    if code in (-signal.SIGTERM, ExitCode.TERMINATED):
        return 3
    return 0 if code < 0 else 2 if code == ExitCode.LOST else 1


def _describe_failure(run: RunDirectory, rank: int, code: int) -> str:
    """What happened to the group, for the event and the message."""
    with suppress(OSError, ValueError, KeyError):
        for line in reversed((run.path / "events.jsonl").read_text(encoding="utf-8").splitlines()):
            event = json.loads(line)
            if event["event"] == "hang":
                return f"rank {', '.join(map(str, event['ranks']))} made no progress for {event['seconds']:g} s"
            if event["event"] in ("start", "resume"):
                break
    if code < 0:
        return f"rank {rank} was killed by signal {-code} ({signal.Signals(-code).name})"
    return f"rank {rank} lost the others or its device"


def _modification_times(run: RunDirectory) -> tuple[int | None, int | None]:
    """When the run's configuration and its events were last written, in nanoseconds; None for a missing file."""
    return tuple(
        path.stat().st_mtime_ns if path.exists() else None for path in (run.path / CONFIG, run.path / "events.jsonl")
    )  # type: ignore[return-value]
