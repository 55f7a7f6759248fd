"""`llmkit lineage --check`: every kind of artefact, one damaged byte in each of its files; inputs of one name."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llmkit.errors import LlmkitError
from llmkit.io.document_writer import DocumentWriter
from llmkit.io.record import Lineage
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
    return root


def states(path: Path) -> dict[str, str]:
    record = read_lineage(path)
    assert record is not None
    return dict(list(check(record, str(path), []))[: 1 + path.is_dir() * 2])


def files_of(path: Path) -> Iterator[Path]:
    yield from sorted(p for p in path.rglob("*") if p.is_file() and not p.is_symlink()) if path.is_dir() else [path]


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_byte_is_found(artefacts: Path, kind: str, tmp_path: Path) -> None:
    """Property: an intact artefact is ok; with one byte changed at any of several places in any of its files it differs,
    or cannot be read at all."""
    intact = states(artefacts / kind)
    assert set(intact.values()) <= {"ok", "not found"} and "ok" in intact.values(), intact
    copy = tmp_path / kind
    subprocess.run(["cp", "-a", str(artefacts / kind), str(copy)], check=True)
    for name in ("shards", "a", "b"):
        (tmp_path / name).exists() or shutil.copytree(artefacts / name, tmp_path / name)
    for file in files_of(copy):
        stored = file.read_bytes()
        size = len(stored)
        if file.suffix == ".parquet":  # the statistics in its footer are not covered
            size -= int.from_bytes(stored[-8:-4], "little") + 8
        for place in (size // 3, size // 2, 2 * size // 3):
            file.write_bytes(stored[:place] + bytes([stored[place] ^ 1]) + stored[place + 1 :])
            try:
                found = "DIFFERS" in states(copy).values()
            except (LlmkitError, AssertionError):
                found = True
            padding = file.suffix == ".arrow" and stored[place] == 0
            assert found or padding, f"{file.relative_to(tmp_path)}: byte {place} of {len(stored)}"
        file.write_bytes(stored)


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
    assert [state for _, state in check(record, str(tmp_path / "out.jsonl"), [])][1:] == ["ok", "ok"]
    shutil.rmtree(tmp_path / "2")
    assert [state for _, state in check(record, str(tmp_path / "out.jsonl"), [])][1:] == ["ok", "not found"]
    (tmp_path / "web" / "page.html").write_text("<p>y</p>")
    assert [state for _, state in check(record, str(tmp_path / "out.jsonl"), [])][1:] == ["DIFFERS", "DIFFERS"]
