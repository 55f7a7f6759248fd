"""Several processes: layouts, restarts, the watchdog, stragglers."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from group_of_two import STEPS, train, untied
from waiting import wait_until

from llmkit.errors import ExitCode, LlmkitError, UsageError
from llmkit.io.run_layout import find_checkpoints
from llmkit.training.checkpoint.run_directory import RunDirectory
from llmkit.training.checkpoint.trainer_state import load_trainer_state
from llmkit.training.distributed import elastic, stragglers, watchdog
from llmkit.training.distributed import processes as distributed
from llmkit.training.distributed.layout import create_layout, local_shard
from llmkit.training.metrics.log import read_metrics


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run / "metrics.jsonl")]


def events(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def only_until(run: Path, step: int) -> None:
    """Reset a finished run to its checkpoint `step`."""
    for link in ("final", "latest"):
        (run / link).unlink()
    for checkpoint in find_checkpoints(run):
        if int(checkpoint.name[-8:]) > step:
            shutil.rmtree(checkpoint)


def test_layouts_agree_with_one_process(tmp_path: Path) -> None:
    """Parity: DDP and FSDP2 on 2 processes agree with one process within 1e-5 over 20 steps of unequal
    shares, also with Muon and after NaN weights. Checkpoints of 2 processes resume on 1, and of 1 on 2."""
    from llmkit.model.pretrained.checkpoint import load_model

    alone = distributed.start()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train(alone, tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "one_then_two", symlinks=True)
    only_until(tmp_path / "one_then_two", 10)
    group = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    script = Path(__file__).with_name("group_of_two.py")
    call = [*group, "--rdzv-endpoint", "127.0.0.1:0", str(script), str(tmp_path)]
    subprocess.run(call, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, timeout=240)
    expected = losses(tmp_path / "one")
    assert len(expected) == STEPS
    heldout = [r["heldout_loss"] for r in read_metrics(tmp_path / "one" / "metrics.jsonl") if "heldout_loss" in r]
    for name in ("ddp", "fsdp", "one_then_two", "ddp_poisoned", "fsdp_poisoned"):
        assert losses(tmp_path / name) == pytest.approx(expected, abs=1e-5), name
        records = list(read_metrics(tmp_path / name / "metrics.jsonl"))
        assert [r["heldout_loss"] for r in records if "heldout_loss" in r] == pytest.approx(heldout, abs=1e-5)
        assert name == "one_then_two" or records[-1]["slowest_rank"] in (0, 1)
        model, _ = load_model(tmp_path / name)
        for key, value in load_model(tmp_path / "one")[0].state_dict().items():
            assert torch.allclose(model.state_dict()[key], value, atol=1e-4), (name, key)
        rollbacks = [event["to"] for event in events(tmp_path / name) if event["event"] == "rollback"]
        assert len(rollbacks) == name.endswith("poisoned"), name
        assert load_trainer_state(tmp_path / name / "final").noise[2] == 2, name  # measurements of the gradient noise
    train(alone, tmp_path / "muon_alone", optimizer="muon")
    assert losses(tmp_path / "muon") == pytest.approx(losses(tmp_path / "muon_alone"), abs=1e-5)
    assert losses(tmp_path / "muon")[-1] != pytest.approx(expected[-1], abs=1e-3)
    assert events(tmp_path / "one_then_two")[-2]["environment"]["parallel"] == "fsdp"
    only_until(tmp_path / "fsdp", 10)
    train(alone, tmp_path / "fsdp", resume=True)
    assert losses(tmp_path / "fsdp") == pytest.approx(expected, abs=1e-5)
    torch.set_num_threads(threads)


class Mesh:
    """A one-dimensional mesh for `local_shard`."""

    def __init__(self, size: int, mine: int) -> None:
        self.size, self.get_local_rank = (lambda dimension: size), (lambda dimension: mine)


@pytest.mark.parametrize("rows", [1, 2, 5, 8])
def test_parts_cover_the_whole_once(rows: int) -> None:
    """Property: the shards of 3 processes, the last of which may be empty, make up the tensor."""
    from torch.distributed.tensor import Shard

    class Parameter:
        placements = (Shard(0),)

    whole, parts = torch.arange(rows * 2.0).view(rows, 2), []
    for rank in range(3):
        Parameter.device_mesh = Mesh(3, rank)  # type: ignore[attr-defined]
        parts.append(local_shard(whole, Parameter))  # type: ignore[arg-type]
    assert torch.equal(torch.cat(parts), whole)


def test_layouts_are_named() -> None:
    """Behaviour: an unknown layout gets a suggestion; fsdp refuses fp16."""
    with pytest.raises(UsageError, match="unknown --parallel 'fdsp'") as error:
        create_layout("fdsp", 2)
    assert "fsdp" in error.value.hint
    with pytest.raises(UsageError, match="fp16"):
        create_layout("fsdp", 2).parallelize(untied(), torch.device("cpu"), "fp16")
    assert create_layout("auto", 4).name == create_layout("fsdp", 1).name == "ddp"


@pytest.mark.parametrize(("rows", "micro_batch"), [(1, 1), (3, 1), (5, 2), (8, 3), (7, 8)])
def test_lockstep_makes_equal_passes(rows: int, micro_batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Property: in lockstep all processes make the same number of passes, and every row counts once.

    Otherwise there are no extra passes.
    """

    class Model:
        last: list[bool]

        def set_requires_gradient_sync(self, last: bool) -> None:
            self.last.append(last)

    processes = distributed.start()
    monkeypatch.setattr(distributed.Processes, "world_size", 3)
    for name in ("fsdp", "ddp"):
        processes.layout, counts, seen = create_layout(name, 3), set(), []
        for rank in range(3):
            monkeypatch.setattr(distributed.Processes, "rank", rank)
            model = Model()
            model.last = []
            turns = list(processes.micro_batches(model, rows, micro_batch))  # type: ignore[arg-type]
            counts.add(len(turns))
            seen += [row for start, stop, factor in turns if factor for row in range(start, stop)]
            assert name == "ddp" or model.last == [False] * (len(turns) - 1) + [True]
        assert seen == list(range(rows))
        assert name == "ddp" or len(counts) == 1


def start(*arguments: str) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "llmkit", *arguments], env=environment, stderr=subprocess.PIPE)


def child(group: subprocess.Popen[bytes], rank: int) -> int:
    """Process id of a rank."""
    for place in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((place / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == group.pid and f"\0RANK={rank}\0" in "\0" + (place / "environ").read_text():
                return int(place.name)
        except OSError:
            continue
    raise AssertionError(f"no rank {rank}")


@pytest.mark.skipif(sys.platform != "linux", reason="looks for the processes in /proc")
def test_killed_and_hung_ranks_are_replaced(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Property: with rank 1 killed, then stopped, the run restarts by itself, reports the rank, and ends in
    the bytes of the undisturbed run (FSDP, 2 processes)."""
    monkeypatch.chdir(workplace)
    call = ("train", "shards", "-m", "config.json", "--tokens", "50k", "--save-every", "10", "--processes", "2")
    call = (*call, "--parallel", "fsdp", "-q")
    whole, run = tmp_path / "whole", tmp_path / "run"
    begin = time.monotonic()
    undisturbed = start(*call, "-o", str(whole))
    assert undisturbed.wait(400) == 0, undisturbed.stderr.read().decode()  # type: ignore[union-attr]
    # No pause of a healthy rank is as long as a third of a whole run, however busy the machine is.
    patience = str(max(10, round((time.monotonic() - begin) / 3)))
    group = start(*call, "-o", str(run), "--max-restarts", "2", "--hang-timeout", patience)

    def trained(steps: int, starts: int) -> Callable[[], bool]:
        def reached() -> bool:
            if not (run / "events.jsonl").exists():
                return False
            begun = [event for event in events(run) if event["event"] in ("start", "resume")]
            return len(begun) >= starts and len(losses(run)) >= steps

        return reached

    wait_until(trained(15, 1), group)

    def saved_between() -> bool:
        """Request a checkpoint; whether there is one besides those of every 10 steps."""
        os.kill(group.pid, signal.SIGUSR1)
        return any(int(place.name[-1]) for place in find_checkpoints(run))

    wait_until(saved_between, group)
    os.kill(child(group, 1), signal.SIGKILL)
    wait_until(trained(25, 2), group)
    os.kill(child(group, 1), signal.SIGSTOP)
    stderr = group.communicate(timeout=400)[1].decode()
    assert group.returncode == 0, stderr
    log = events(run)
    names = [event["event"] for event in log if event["event"] not in ("straggler", "spike", "change")]
    assert names == ["start", "restart", "resume", "hang", "restart", "resume", "end"]
    restarts = [event for event in log if event["event"] == "restart"]
    assert [r["reason"] for r in restarts] == [
        "rank 1 was killed by signal 9 (SIGKILL)",
        f"rank 1 made no progress for {patience} s",
    ]
    # Whether rank 0 still says that it lost rank 1 depends on which is first, its read or the agent's SIGTERM.
    assert all(f"llmkit: {r['reason']}; restarting with 2 processes" in stderr for r in restarts)
    assert "File " in stderr  # the stack of the rank that was stopped
    assert losses(run) == losses(whole)
    assert (run / "final/model.safetensors").read_bytes() == (whole / "final/model.safetensors").read_bytes()


class Group:
    """Replaces torch's agent: fails according to a script of (exit codes by rank, what the group does before
    it dies)."""

    def __init__(self, script: list[tuple[dict[int, int], Callable[[], None]]]) -> None:
        self.script, self.calls = list(script), []  # type: ignore[var-annotated]

    def __call__(self, configuration: Any, program: str) -> Callable[..., None]:
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

        def run(*arguments: str) -> None:
            self.calls.append((configuration.nproc_per_node, elastic.restarted()))
            codes, act = self.script.pop(0)
            act()
            if codes:
                failures = {rank: ProcessFailure(rank, 1, code, "") for rank, code in codes.items()}
                for failure in failures.values():
                    failure.timestamp = 1
                raise ChildFailedError("group", failures)

        return run


def test_restarts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Behaviour: what is restarted, with how many processes and whether as a resumption.

    What is not; and when restarts end.
    """
    monkeypatch.setenv("LLMKIT_RESTARTED", "")
    monkeypatch.delenv("LLMKIT_RESTARTED")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run = RunDirectory(tmp_path)

    def begin() -> None:
        time.sleep(0.01)  # so that the file's modification time differs
        (tmp_path / "config.toml").touch()
        run.event("start")

    def launch(restarts: int, *script: tuple[dict[int, int], Callable[[], None]]) -> tuple[int, list[Any]]:
        group = Group(list(script))
        monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", group)
        os.environ.pop("LLMKIT_RESTARTED", None)
        return elastic.launch(3, [], str(tmp_path), restarts), group.calls

    nothing = lambda: None  # noqa: E731
    # Died before the run had begun: the same call again. Then a resumption; a group that trains no step is
    # made smaller.
    code, calls = launch(
        4, ({1: -9}, nothing), ({0: 69, 2: -9}, begin), ({2: -6}, nothing), ({0: 143, 1: 69}, begin), ({}, begin)
    )
    assert (code, calls) == (0, [(3, False), (3, False), (3, True), (2, True), (2, True)])
    assert [e["reason"].split(" (")[0] for e in events(tmp_path) if e["event"] == "restart"] == [
        "rank 2 was killed by signal 9",
        "rank 2 was killed by signal 6",
        "rank 1 lost the others or its device",
    ]
    assert "restarting with 2 processes" in capsys.readouterr().err
    # Errors that would recur, and a run that was stopped, are not restarted.
    assert launch(3, ({0: 69, 1: 1}, begin)) == (1, [(3, False)])
    assert launch(3, ({0: 143, 1: 143}, begin)) == (143, [(3, False)])
    assert launch(1, ({0: 69}, begin), ({0: 69}, begin))[0] == ExitCode.LOST
    with pytest.raises(LlmkitError, match=r"killed by signal 9 \(rank 1\)") as error:
        launch(0, ({1: -9}, begin))
    assert "--max-restarts" in error.value.hint and error.value.code == ExitCode.LOST


class Clock:
    """The watchdog's clock, advanced only by the test, so that the load of the machine does not matter."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._now = time.monotonic()
        monkeypatch.setattr(watchdog, "time", SimpleNamespace(monotonic=lambda: self._now, sleep=time.sleep))

    def pass_seconds(self, seconds: float) -> None:
        self._now += seconds

    def wait_for_look(self, dog: watchdog.Watchdog) -> None:
        """Wait until the watchdog's thread has looked at the time."""
        messages = dog._messages
        wait_until(lambda: dog._messages >= messages + 2)


def test_hung_process_names_itself(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Behaviour: a step that sleeps is reported with its stack and ends the process with LOST.

    One with heartbeats is left alone.
    """
    ended, codes, reported = threading.Event(), [], []  # type: ignore[var-annotated]

    def leave(code: int) -> None:
        codes.append(code)
        dog.stop()
        ended.set()

    monkeypatch.setattr(watchdog.os, "_exit", leave)
    clock = Clock(monkeypatch)
    dog = watchdog.Watchdog(0, 1, 0.4, lambda name, **details: reported.append((name, details)))
    dog.start()
    for _ in range(8):
        clock.pass_seconds(0.3)
        clock.wait_for_look(dog)
        dog.heartbeat()
    assert not codes
    clock.pass_seconds(0.5)
    assert ended.wait(60)
    assert codes == [ExitCode.LOST]
    assert reported[0][0] == "hang"
    assert reported[0][1]["ranks"] == [0]
    assert any("test_hung_process_names_itself" in line for line in reported[0][1]["stack"])
    stderr = capfd.readouterr().err
    assert "rank 0 made no progress for 0.4 s" in stderr
    assert "test_hung_process_names_itself" in stderr


class Store:
    """A store in memory."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}

    def set(self, key: str, value: str) -> None:
        self.values[key] = value

    def check(self, keys: list[str]) -> bool:
        return keys[0] in self.values

    def get(self, key: str) -> bytes:
        return self.values[key].encode()


def test_who_is_behind_is_hung(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behaviour: of three processes the one that has entered fewer collectives is hung, unless it still makes
    passes or another's thread is silent."""
    clock = Clock(monkeypatch)
    dogs, store = [watchdog.Watchdog(rank, 3, 0.2, lambda name, **details: None) for rank in range(3)], Store()
    for dog in dogs:
        dog._store = store
        dog.enter_collective()
    dogs[0].enter_collective()
    dogs[2].enter_collective()

    def look(*awake: int) -> list[int]:
        for _ in range(15):
            for rank in awake:
                dogs[rank]._publish()
            for dog in dogs:
                dog._read_peers()
            clock.pass_seconds(0.01)
        return dogs[0]._hung_ranks()

    assert look(0, 1, 2) == [1]
    dogs[1].heartbeat()
    dogs[1]._publish()
    dogs[0]._read_peers()
    assert dogs[0]._hung_ranks() == []
    assert look(0, 1, 2) == [1]
    assert look(0, 1) == [2]


def test_lost_errors_are_recognised() -> None:
    """Behaviour: errors of gloo, NCCL and a dead device become one line; our own errors and out-of-memory do not."""
    text = "[/a/pair.cc:537] Read error [127.0.0.1]:8942: Connection reset by peer. This is typically caused by ..."
    error = distributed.as_lost_error(RuntimeError(text))
    assert error is not None
    assert error.message == "lost the other processes (Read error [127.0.0.1]:8942: Connection reset by peer)"
    assert error.code == ExitCode.LOST
    assert distributed.as_lost_error(torch.distributed.DistBackendError("NCCL error")) is not None
    for other in (RuntimeError("shapes do not fit"), ValueError("gloo"), torch.OutOfMemoryError("CUDA error")):
        assert distributed.as_lost_error(other) is None


def test_pace() -> None:
    """Behaviour: metrics every window.

    A rank over 1.3 times the median is reported once until it has recovered; ranks without rows do not count.
    """
    compare = stragglers.StragglerDetector()
    slow, even = [1.0, 0.0, 1.5, 1.1], [1.0, 0.0, 1.2, 1.1]
    reports = [compare.update(step, slow if step <= 40 else even) for step in range(1, 61)]
    assert [i + 1 for i, (figures, _) in enumerate(reports) if figures] == [20, 40, 60]
    assert reports[19] == ({"slowest_rank": 2, "rank_spread": pytest.approx(1.5 / 1.1, abs=1e-3)}, 2)
    assert reports[39][1] is None
    assert reports[59][1] is None
    assert stragglers.StragglerDetector().update(20, [1.0]) == ({}, None)


def test_garbage_is_collected_at_chosen_steps() -> None:
    """Behaviour: a reference cycle lives until the next step that is a multiple of 50.

    Afterwards Python's own collector is as it was.
    """
    import weakref

    class Node:
        me: Any

    with stragglers.scheduled_garbage_collection() as collect:
        assert not gc.isenabled()
        node = Node()
        node.me, gone = node, weakref.ref(node)
        del node
        collect(49)
        assert gone() is not None
        collect(50)
        assert gone() is None
    assert gc.isenabled()
