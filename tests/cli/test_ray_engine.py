"""`--engine ray` on a simulated cluster of two machines: the same bytes, whichever process is killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest
from waiting import wait_until

HEAD = """
import sys
from ray.cluster_utils import Cluster
store = {"num_cpus": 1, "object_store_memory": 100 << 20}
cluster = Cluster(initialize_head=True, head_node_args=store | {"include_dashboard": False})
cluster.add_node(**store)
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


class Machines:
    """The cluster: its address and its processes."""

    def __init__(self) -> None:
        environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_enable_metrics_collection": "0"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", HEAD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        assert self._process.stdout
        self.address = self._process.stdout.readline().decode().strip()

    def processes(self, named: str) -> list[int]:
        """Process ids of descendants whose command contains `named`."""
        parents, names = {}, {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(") ")[2].split()[1])
                    names[int(entry.name)] = (entry / "cmdline").read_text()
                except (OSError, ValueError):
                    continue
        result = []
        for pid, name in names.items():
            ancestor = pid
            while ancestor in parents and ancestor != self._process.pid:
                ancestor = parents[ancestor]
            if ancestor == self._process.pid and named in name[: name.find("\0")]:
                result.append(pid)
        return sorted(result)

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(60)


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    pytest.importorskip("ray")
    cluster = Machines()
    yield cluster
    cluster.close()


def text(seed: int, count: int = 90) -> str:
    random_ = random.Random(seed)
    return " ".join("".join(random_.choices("abcdefghijklmnop", k=6)) for _ in range(count))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six files, 4 MB: every fifth document is a copy of an earlier one, every seventh a near copy."""
    directory = tmp_path_factory.mktemp("files")
    for number in range(6):
        lines = []
        for i in range(number * 1000, number * 1000 + 1000):
            source, suffix = (i // 2, "") if i % 5 == 4 else (i // 3, " and so on") if i % 7 == 6 else (i, "")
            row = {"id": f"d{i}", "text": text(source) + suffix, "site": source % 3, "score": i * 7 % 11}
            lines.append(orjson.dumps(row))
        (directory / f"in{number}.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return directory


@pytest.fixture(scope="module")
def connected(machines: Machines) -> Iterator[None]:
    """A connection of this process, so that its commands share Ray's workers instead of starting new ones."""
    import ray

    ray.init(machines.address, logging_level="ERROR", log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def both(llmkit_here, connected: None, files: Path, tmp_path: Path):
    """Run a command locally and on the cluster: the files that each wrote, by name."""

    def run(*arguments: str, stdin: bytes = b"") -> list[dict[str, bytes]]:
        results = []
        for name, engine in (("local", []), ("ray", ["--engine", "ray"])):
            directory = tmp_path / name
            directory.mkdir()
            done = llmkit_here(*arguments, *engine, "-q", cwd=directory, stdin=stdin)
            assert done.returncode == 0, done.stderr.decode()
            written = {path.name: path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}
            results.append(written | ({"stdout": done.stdout} if done.stdout else {}))
        return results

    return run


@pytest.mark.parametrize(
    "arguments",
    [
        ("dedup", "--keep", "best:score", "--clusters", "components", "--annotate", "--group", "site"),
        ("dedup", "--method", "exact,minhash", "--index", "seen.duckdb", "--against", "in3.jsonl", "--memory", "200k"),
        ("dedup", "--method", "lines"),
        ("filter", "--preset", "gopher", "--rule", "own.py:even", "--rule", "gopher_quality.min_stop_words=off"),
    ],
    ids=lambda arguments: "_".join(arguments[1:5]),
)
def test_the_same_bytes_as_locally(both, files: Path, arguments: tuple[str, ...]) -> None:
    """Behaviour: documents, rejects and lineage are byte for byte those of one process."""
    (files / "own.py").write_text("def even(page):\n    return len(page.text) % 2 == 0\n")
    named = [str(files / argument) if argument.startswith(("in", "own")) else argument for argument in arguments]
    local, remote = both(*named, str(files), "-o", "out.jsonl.zst")
    for name in local.keys() - {"seen.duckdb"}:
        assert local[name] == remote[name], name
    assert local.keys() == remote.keys()


def test_tokens_and_stdin(both, llmkit, files: Path, tmp_path: Path) -> None:
    """Behaviour: shards are the same, also for stdin, which is read where the command runs."""
    assert llmkit("vocab", str(files / "in0.jsonl"), "--size", "512", "-o", "tok/", "-q", cwd=tmp_path).returncode == 0
    data = b"".join(path.read_bytes() for path in sorted(files.glob("in*"))[:3])
    local, remote = both("tokenize", "-t", str(tmp_path / "tok"), "-o", "shards/", stdin=data)
    assert local == remote and "part-00000.arrow" in local


def test_a_directory_is_made_file_by_file(both, files: Path) -> None:
    """Behaviour: with -o DIRECTORY each machine makes whole files, the same as one process makes."""
    local, remote = both(
        "filter", str(files), "--filter", "sample", "--rule", "sample.rate=0.5", "-o", "out/", "--rejects", "gone/"
    )
    assert local == remote and len(local) == 6


def test_errors(llmkit, machines: Machines, files: Path, tmp_path: Path) -> None:
    """Behaviour: a bad line on another machine and an unknown engine give one line each; no output remains."""
    (tmp_path / "bad.jsonl").write_bytes((files / "in0.jsonl").read_bytes() + b"no JSON\n")
    for output in ("o.jsonl.zst", "d/"):
        done = llmkit(
            "dedup", "bad.jsonl", "--engine", "ray", "-o", output, cwd=tmp_path, env={"RAY_ADDRESS": machines.address}
        )
        assert done.returncode == 1 and b"error: bad.jsonl:1001: invalid JSON" in done.stderr
        assert b"Traceback" not in done.stderr
    assert not list(tmp_path.rglob("*.zst"))
    done = llmkit("filter", "bad.jsonl", "--engine", "ray", cwd=tmp_path, env={"RAY_ADDRESS": "127.0.0.1:1"})
    assert done.returncode == 1 and b"error: no Ray cluster at 127.0.0.1:1: " in done.stderr
    done = llmkit("filter", "bad.jsonl", "--engine", "dask", cwd=tmp_path)
    assert done.returncode == 2 and b"unknown --engine 'dask'" in done.stderr


def test_pages_and_a_signal(both, llmkit, machines: Machines, files: Path, tmp_path: Path) -> None:
    """Behaviour: pages are extracted as locally; SIGTERM ends a call with its exit code."""
    pytest.importorskip("resiliparse")
    for path in sorted(files.glob("in*"))[:2]:
        rows = [
            {"id": row["id"], "html": f"<p>{row['text']}."} for row in map(orjson.loads, path.read_bytes().splitlines())
        ]
        (tmp_path / path.name).write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    local, remote = both("extract", str(tmp_path / "in0.jsonl"), str(tmp_path / "in1.jsonl"), "-o", "pages.jsonl.zst")
    assert local == remote
    call = [sys.executable, "-m", "llmkit", "dedup", str(files), "--engine", "ray", "-o", str(tmp_path / "x.jsonl")]
    process = subprocess.Popen(call, env=os.environ | {"RAY_ADDRESS": machines.address}, stderr=subprocess.PIPE)
    wait_until(lambda: machines.processes("ray::_"), process)
    process.terminate()
    _, messages = process.communicate(timeout=60)
    assert process.returncode == 143 and b"internal error" not in messages
    assert not (tmp_path / "x.jsonl").exists()


@pytest.mark.parametrize("command", ["extract", "dedup"])
def test_lost_work_is_repeated(llmkit, machines: Machines, files: Path, tmp_path: Path, command: str) -> None:
    """Property: with workers killed repeatedly, and finally a machine lost with all its objects, the output is the same."""
    if command == "extract":
        pytest.importorskip("resiliparse")
        lines = max(files.glob("in*")).read_bytes().splitlines()
        pages = [b"<html><body>" + b"".join(b"<p>" + line for line in lines[i::8]) for i in range(8)]
        for number in range(12):
            rows = (orjson.dumps({"id": f"{number}.{i}", "html": page.decode() * 4}) for i, page in enumerate(pages))
            (tmp_path / f"p{number:02}.jsonl").write_bytes(b"\n".join(rows))
        sources = [str(path) for path in sorted(tmp_path.glob("p*.jsonl"))]
    else:
        sources = [str(files)]
    call = (command, *sources, "--rejects", "r.jsonl.zst", "-o", "out.jsonl.zst", "-q")
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    assert llmkit(*call, cwd=tmp_path / "whole").returncode == 0
    killed: list[int] = []
    ended = threading.Event()
    wanted = 3 if command == "dedup" else 2

    def kill() -> None:
        while not ended.wait(0.1) and len(killed) < wanted:
            working = machines.processes("ray::_")
            if working:
                killed.append(random.choice(working))
                os.kill(killed[-1], signal.SIGKILL)
        if command == "dedup" and not ended.is_set():
            killed.append(machines.processes("raylet")[-1])
            os.kill(killed[-1], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    started = time.monotonic()
    done = llmkit(*call, "--engine", "ray", cwd=tmp_path / "killed", env={"RAY_ADDRESS": machines.address})
    ended.set()
    killer.join()
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout == b"" and len(killed) >= wanted, f"{len(killed)} killed in {time.monotonic() - started:.1f} s"
    for name in ("out.jsonl.zst", "r.jsonl.zst"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
