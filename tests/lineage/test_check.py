"""`llmkit lineage --check`: every kind of artefact, one damaged byte in each of its files; inputs of one name."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from llmkit.errors import LlmkitError
from llmkit.io.document_writer import DocumentWriter
from llmkit.io.record import Lineage, record_digest
from llmkit.lineage.check import check
from llmkit.lineage.formats import digest_path, files_digest, own_digest, read_lineage

Call = Callable[..., subprocess.CompletedProcess[bytes]]
ROWS = b"".join(json.dumps({"id": str(i), "text": f"seven birds over {i} stones"}).encode() + b"\n" for i in range(50))
KINDS = [
    "docs.jsonl.zst",
    "docs.jsonl.gz",
    "docs.parquet",
    "shards",
    "one.arrow",
    "mix",
    "plan.toml",
    "tok",
    "int8",
    "avg",
    "run",
]


@pytest.fixture(scope="module")
def artefacts(
    tmp_path_factory: pytest.TempPathFactory, write_shards: Callable[..., Path], make_model: Callable[..., Path]
) -> Path:
    """One artefact of each kind."""
    from llmkit.cli.main import run_command
    from llmkit.training.checkpoint.run_directory import RunDirectory
    from llmkit.training.checkpoint.trainer_state import TrainerState

    root = tmp_path_factory.mktemp("kinds")
    for name in KINDS[:3]:
        with DocumentWriter(str(root / name), Lineage("filter")) as writer:
            writer.write(ROWS)
            writer.finish({"documents": 50}, [])
    write_shards(root / "shards", [20] * 60, max_tokens_per_shard=400)
    write_shards(root / "one.arrow", [20] * 60)
    make_model(root / "a"), make_model(root / "b", seed=1)
    calls = [
        ("mix", "shards", "--holdout", "20%", "-o", "mix"),
        ("mix", "shards", "--plan", "-o", "plan.toml"),
        ("vocab", "docs.jsonl.gz", "--size", "320", "-o", "tok"),
        ("quantize", "a", "--to", "int8", "-o", "int8"),
        ("average", "a", "b", "-o", "avg"),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for name, *arguments in calls:
            assert run_command(name, [*arguments, "-q"]) == 0
    (root / "run" / "checkpoints").mkdir(parents=True)
    run = RunDirectory(root / "run")
    state = TrainerState("train", {}, [], 1, 0, 0.0, 1, 8, {}, {})
    saved = run.save(state, {}, lambda directory: shutil.copytree(root / "avg", directory, dirs_exist_ok=True) and None)
    run.link_final(saved)
    (root / "run" / "trace").mkdir()
    for name in ("config.toml", "metrics.jsonl", "trace/trace.json"):
        (root / "run" / name).write_text(f"{name} = 0.5\n" * 3)
    run.event("end")
    run.seal()
    return root


def states(path: Path) -> dict[str, str]:
    record = read_lineage(path)
    assert record is not None
    return {name: state for name, state, _ in list(check(record, str(path), []))[: 1 + path.is_dir() * 2]}


def files_of(path: Path) -> Iterator[Path]:
    yield from sorted(p for p in path.rglob("*") if p.is_file() and not p.is_symlink()) if path.is_dir() else [path]


def places(size: int, count: int) -> Iterator[int]:
    """Positions in all parts of a file: the first and last bytes, and evenly spaced ones."""
    ends = count // 3
    yield from sorted(
        {*range(min(ends, size)), *range(max(0, size - ends), size), *range(0, size, max(1, size // count))}
    )


def is_damage(path: Path, states_of: Callable[[], dict[str, str]]) -> Callable[[int, int], bool]:
    """A function that changes the byte of a file at a position by a mask, and returns whether that is found."""
    stored = path.read_bytes()

    def damaged(place: int, mask: int) -> bool:
        with open(path, "r+b") as file:
            file.seek(place)
            file.write(bytes([stored[place] ^ mask]))
            file.flush()
            try:
                return "DIFFERS" in states_of().values()
            except (LlmkitError, AssertionError):
                return True
            finally:
                file.seek(place)
                file.write(stored[place : place + 1])

    return damaged


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_byte_is_found(artefacts: Path, kind: str, tmp_path: Path) -> None:
    """Property: an intact artefact is ok; with one byte changed anywhere in any of its files (headers, footers, padding and
    white space included) it differs, or cannot be read at all."""
    intact = states(artefacts / kind)
    assert set(intact.values()) <= {"ok", "not found"} and "ok" in intact.values(), intact
    copy = tmp_path / kind
    subprocess.run(["cp", "-a", str(artefacts / kind), str(copy)], check=True)
    for name in ("shards", "a", "b"):
        (tmp_path / name).exists() or shutil.copytree(artefacts / name, tmp_path / name)
    count = 12 if copy.is_dir() else 150
    for file in files_of(copy):
        damaged, size = is_damage(file, lambda: states(copy)), file.stat().st_size
        for number, place in enumerate(places(size, count)):
            mask = (1, 0x29, 0x80, 0xFF)[number % 4]  # 0x29 makes a tab of a space
            assert damaged(place, mask), f"{file.relative_to(tmp_path)}: byte {place} of {size}, mask {mask}"
    assert "DIFFERS" not in states(copy).values()


def test_a_damaged_byte_of_an_index_is_found(tmp_path: Path, llmkit_here: Call) -> None:
    """Property: an index that an artefact was made with is ok, also with later runs in it, and differs with one byte
    changed anywhere, or where its runs are others."""
    (tmp_path / "docs.jsonl").write_bytes(ROWS)
    (tmp_path / "more.jsonl").write_bytes(ROWS.replace(b"seven", b"eight"))
    for number, name in enumerate(("docs", "more")):
        call = (
            "dedup",
            f"{name}.jsonl",
            "--method",
            "exact",
            "--index",
            "seen.duckdb",
            "-q",
            "-o",
            f"{number}.jsonl.zst",
        )
        assert llmkit_here(*call, cwd=tmp_path).returncode == 0

    def state() -> dict[str, str]:
        record = read_lineage(tmp_path / "1.jsonl.zst")
        assert record is not None
        results = check(record, str(tmp_path / "1.jsonl.zst"), [])
        return {f"{number} {result.name}": result.state for number, result in enumerate(results)}

    assert list(state().values()) == ["ok"] * 5, state()  # the index before both runs, too
    damaged, size = is_damage(tmp_path / "seen.duckdb", state), (tmp_path / "seen.duckdb").stat().st_size
    assert all(damaged(place, 0x29) for place in (*places(size, 30), 4096, 8192, 12_288))
    (tmp_path / "seen.duckdb").unlink()
    call = ("dedup", "more.jsonl", "--method", "exact", "--index", "seen.duckdb", "-q", "-o", "other.jsonl.zst")
    assert llmkit_here(*call, cwd=tmp_path).returncode == 0
    assert state()["2 seen.duckdb"] == "DIFFERS"


@contextmanager
def at_once(what: object, seconds: int = 20) -> Iterator[None]:
    """Fail where the block does not end: a pipe waits for a writer, and a device has no end."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"{what} does not end"))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


@pytest.mark.parametrize("device", [False, True])
@pytest.mark.parametrize("kind", ["shards", "mix", "tok", "int8", "run"])
def test_special_files_do_not_hang(artefacts: Path, tmp_path: Path, kind: str, device: bool) -> None:
    """Property: with a pipe, or a link to a device, in the place of any file of an artefact it is not read without end,
    by lineage or by a command that takes it as input; a file that counts differs, or is named in one line."""
    from llmkit.mixing.order import OrderedTokens
    from llmkit.model.pretrained.directory import load_info, weight_files
    from llmkit.shards.tokenizer_info import read_tokenizer
    from llmkit.training.checkpoint.run_directory import starting_point

    copy = tmp_path / kind
    subprocess.run(["cp", "-a", str(artefacts / kind), str(copy)], check=True)
    for name in ("shards", "a", "b"):
        (tmp_path / name).exists() or shutil.copytree(artefacts / name, tmp_path / name)
    readers: list[Callable[[str], object]] = [own_digest, OrderedTokens.open, load_info, read_tokenizer]
    readers += [lambda path: starting_point(path, None), lambda path: weight_files(Path(path))]
    for file in files_of(copy):
        stored = file.read_bytes()
        file.unlink()
        file.symlink_to("/dev/zero") if device else os.mkfifo(file)
        with at_once(file):
            with suppress(LlmkitError):
                assert {"DIFFERS", "not found"} & set(states(copy).values()), file
            for read in readers:
                with suppress(LlmkitError):
                    read(str(copy))
        file.unlink()
        file.write_bytes(stored)
    assert "DIFFERS" not in states(copy).values()


@pytest.mark.parametrize("name", ["/dev/zero", "../secret", "trace/../../secret", "link", "pipe"])
def test_digests_of_files_elsewhere_differ(artefacts: Path, tmp_path: Path, name: str) -> None:
    """Behaviour: a list of digests that names a file outside of its directory, or what is no file, is never followed."""
    run = tmp_path / "run"
    subprocess.run(["cp", "-a", str(artefacts / "run"), str(run)], check=True)
    (tmp_path / "secret").write_text("x")
    (run / "link").symlink_to("../secret")
    os.mkfifo(run / "pipe")
    for place in (run, run / "final" / "state"):
        listed = {name: digest_path(tmp_path / "secret")}
        (place / "digests.json").write_text(json.dumps(listed, indent=1))
    with at_once(name):
        record = read_lineage(run)
        assert record is not None
        found = [(result.name, result.state) for result in check(record, str(run), [])][1:3]
    assert found == [("run/checkpoints/step-00000001", "DIFFERS"), ("run/digests.json", "DIFFERS")]


def test_inputs_that_are_pipes_are_not_read(tmp_path: Path) -> None:
    """Behaviour: a pipe of the name of an input is not that input."""
    os.mkfifo(tmp_path / "docs.jsonl")
    (tmp_path / "out.jsonl").write_text("")
    record = {"command": "mix", "inputs": [{"name": "docs.jsonl", "digest": "xxh3:0"}], "counts": {}}
    with at_once("docs.jsonl"):
        states = [result.state for result in check(record, str(tmp_path / "out.jsonl"), [])]
    assert states[1:] == ["not found"]


@pytest.mark.parametrize("key", ["digest", "files", "bytes"])
def test_a_digest_that_is_not_text_differs(artefacts: Path, key: str) -> None:
    """Behaviour: no llmkit writes a number or a list as a digest, or an input without one."""
    record = read_lineage(artefacts / "docs.parquet")
    assert record is not None
    path = str(artefacts / "docs.parquet")
    assert next(check(record, path, [])).state == "ok"
    for changed in (record | {key: 5}, record | {"inputs": [{"name": "x", "digest": []}]}, record | {"inputs": "x"}):
        changed["record"] = record_digest(changed)
        assert next(check(changed, path, [])).state == "DIFFERS"


def test_the_command_tells_what_it_compared(tmp_path: Path, llmkit_here: Call) -> None:
    """Behaviour: the path of each input is printed, also of another file of its name; what is unchecked is counted; -o
    names a file for the report."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "docs.jsonl").write_bytes(ROWS)
    call = ("dedup", "in/docs.jsonl", "--method", "exact", "-q", "-o", "out.jsonl.zst")
    assert llmkit_here(*call, cwd=tmp_path).returncode == 0
    done = llmkit_here("lineage", "out.jsonl.zst", "--check", "--inputs", "in", cwd=tmp_path)
    assert done.stdout == b"ok        out.jsonl.zst\nok        docs.jsonl  (in/docs.jsonl)\n"
    assert b"2 artefacts verified, 0 not found, 0 unchecked" in done.stderr
    (tmp_path / "docs.jsonl").write_text("unrelated\n")
    done = llmkit_here("lineage", "out.jsonl.zst", "--check", "-o", "report.txt", cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == b""
    assert b"/docs.jsonl: content differs" in done.stderr and b"or is another file of that name" in done.stderr
    assert "DIFFERS   docs.jsonl" in (tmp_path / "report.txt").read_text()
    assert llmkit_here("lineage", "out.jsonl.zst", "-o", "report.txt", cwd=tmp_path).returncode == 1  # exists
    assert llmkit_here("lineage", "out.jsonl.zst", "-f", "-o", "report.txt", cwd=tmp_path).stdout == b""
    assert (tmp_path / "report.txt").read_text().startswith("out.jsonl.zst  <- dedup")
    joined = (tmp_path / "out.jsonl.zst").read_bytes() * 2  # has no digest of its own
    (tmp_path / "joined.jsonl.zst").write_bytes(joined)
    (tmp_path / "docs.jsonl").unlink()
    done = llmkit_here("lineage", "joined.jsonl.zst", "--check", "--inputs", "in", cwd=tmp_path)
    assert b"unchecked; joined.jsonl.zst itself was not checked" in done.stderr


def test_the_digest_of_a_model_does_not_depend_on_the_record(artefacts: Path) -> None:
    """Property: `files` covers everything but the record, so that two versions of llmkit make equal models."""
    record = read_lineage(artefacts / "avg")
    assert record is not None and record["files"] == files_digest(artefacts / "avg") == own_digest(
        str(artefacts / "avg")
    )
    assert read_lineage(artefacts / "run") == record


def test_records_without_digests_are_unchecked(artefacts: Path) -> None:
    """Behaviour: a model of an earlier version has no digest of itself: unchecked, not an alarm."""
    record = read_lineage(artefacts / "int8")
    assert record is not None
    old = {key: value for key, value in record.items() if key not in ("files", "record")}
    assert next(check(old, str(artefacts / "int8"), []))[1] == "unchecked"


def test_inputs_of_one_name(tmp_path: Path) -> None:
    """Behaviour: a file with the digest of another input of the same name is that one, and no alarm; the numbered
    directories of a script are searched; a file that is neither differs."""
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "page.html").write_text("<p>x</p>")
    (tmp_path / "2").mkdir()
    (tmp_path / "2" / "web").write_text("shards")
    first, second = digest_path(tmp_path / "web"), digest_path(tmp_path / "2" / "web")
    inputs: list[dict[str, Any]] = [{"name": "web", "digest": digest} for digest in (first, second)]
    record = {"command": "mix", "inputs": inputs, "counts": {}}
    (tmp_path / "out.jsonl").write_text("")
    assert [state for _, state, _ in check(record, str(tmp_path / "out.jsonl"), [])][1:] == ["ok", "ok"]
    shutil.rmtree(tmp_path / "2")
    assert [state for _, state, _ in check(record, str(tmp_path / "out.jsonl"), [])][1:] == ["ok", "not found"]
    (tmp_path / "web" / "page.html").write_text("<p>y</p>")
    assert [state for _, state, _ in check(record, str(tmp_path / "out.jsonl"), [])][1:] == ["DIFFERS", "DIFFERS"]


def test_an_earlier_checkpoint_of_a_run_is_found(tmp_path: Path, make_model: Callable[..., Path]) -> None:
    """Behaviour: an input that is a run is compared with its final model and its checkpoints; one of another run differs."""
    run, other = tmp_path / "run", make_model(tmp_path / "other", seed=9)
    first, second = (make_model(run / f"checkpoints/step-0000000{step}", seed=step) for step in (1, 2))
    (run / "final").symlink_to("checkpoints/step-00000002")
    for path, state, place in ((first, "ok", first), (second, "ok", run), (other, "DIFFERS", run)):
        record = {"command": "anneal", "inputs": [{"name": "run", "digest": digest_path(path)}]}
        found = [checked for checked in check(record, str(tmp_path / "out"), [str(tmp_path)]) if checked.name == "run"]
        assert found == [("run", state, str(place))]
