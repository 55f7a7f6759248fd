"""`llmkit trace`: the documents of a step are those that training read, and the steps of a document are found."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmkit.cli.main import run_command
from llmkit.io.record import Lineage
from llmkit.mixing.order import OrderedTokens
from llmkit.shards.tokenizer_info import parse_tokenizer
from llmkit.shards.writer import ShardWriter
from llmkit.training.data import StreamSource
from llmkit.training.trace import Trace, write_trace

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog"]
SIZES = {
    "vocab_size": 0, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 32, "model_type": "qwen3",
}  # fmt: skip


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """web/ (40 documents in several parts), code/ (20), mixes of both in every form, and a run of two rounds through web/."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    directory = tmp_path_factory.mktemp("trace")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        [" ".join(WORDS)] * 4,
        trainers.BpeTrainer(
            vocab_size=280, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    info = parse_tokenizer(
        {"tokenizer.json": tokenizer.to_str(), "tokenizer_config.json": '{"eos_token": "<|endoftext|>"}'}, "t"
    )
    draw = np.random.default_rng(0)
    for name, documents in (("web", 40), ("code", 20)):
        with ShardWriter(str(directory / name), info, Lineage("tokenize"), max_tokens_per_shard=500) as writer:
            for i in range(documents):
                words = draw.choice(WORDS, size=int(draw.integers(3, 60)))
                writer.write([*tokenizer.encode(" ".join(words)).ids, info.eos_id], f"{name}-{i}", name)
            writer.finish({}, [])
    (directory / "config.json").write_text(json.dumps(SIZES | {"vocab_size": info.vocab_size}))
    for form, more in {
        "mixed": [],
        "plan": ["--plan"],
        "packed": ["--plan", "--pack", "best-fit", "--sequence-length", "32"],
    }.items():
        call = [
            str(directory / "web") + ":x2",
            str(directory / "code") + ":x3",
            "-o",
            str(directory / form),
            "-q",
            *more,
        ]
        assert run_command("mix", call) == 0
    assert train(directory, "web", "--tokens", "4k", "-o", str(directory / "run")) == 0
    return directory


def train(directory: Path, data: str, *more: str) -> int:
    call = [
        str(directory / data),
        "-m",
        str(directory / "config.json"),
        "-q",
        "--batch-size",
        "4",
        "--sequence-length",
        "32",
    ]
    return run_command("train", [*call, *more])


@pytest.fixture
def traced(directory: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., list[dict[str, Any]]]:
    """The records that `llmkit trace run --json` prints."""

    def go(*arguments: str, run: str = "run") -> list[dict[str, Any]]:
        assert run_command("trace", [str(directory / run), "--json", "-q", *arguments]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return go


@pytest.mark.parametrize("data", ["web", "mixed", "plan", "packed"])
def test_trace_is_what_training_reads(directory: Path, tmp_path: Path, data: str) -> None:
    """Property: over more than one epoch, the tokens of the pieces equal the batch; ids, sources and epochs equal those of the stream;
    every piece of a document is found by its id."""
    stream = OrderedTokens.open(str(directory / data))
    source = StreamSource(stream, 32, 4, int(stream.tokens * 1.4))
    phases = [(phase.step, phase.token, phase.rows, phase.length) for phase in source.phases]
    (tmp_path / "checkpoints").mkdir()
    write_trace(tmp_path, stream, phases, source.tokens(source.steps))
    trace = Trace(tmp_path)
    assert trace.steps == source.steps
    by_id: dict[str, list[Any]] = {}
    for step in range(1, source.steps + 1):
        batch = source.batch(step - 1, 0, source.rows(step - 1)).input_ids.numpy()
        covered = np.zeros_like(batch, dtype=bool)
        for piece in trace.step(step):
            assert not covered[piece.row, piece.first : piece.last].any()
            covered[piece.row, piece.first : piece.last] = True
            if piece.id:
                assert piece.tokens.tolist() == batch[piece.row, piece.first : piece.last].tolist()
            by_id.setdefault(piece.id, []).append(piece)
            at = source.tokens(step - 1) + piece.row * 32 + piece.first
            row = int(np.searchsorted(stream.offsets, at % stream.tokens, side="right")) - 1
            expected = stream.id(row), stream.source(row), stream.epoch(row) + at // stream.tokens
            assert (piece.id, piece.source, piece.epoch) == expected
        assert covered.all()
    padding = by_id.pop("", [])
    assert bool(padding) == (data == "packed")
    for id in list(by_id)[::7]:
        found = [piece.to_json() for piece in trace.find(id)]
        assert found == [piece.to_json() for piece in by_id[id]]
    assert not list(trace.find("web-3", steps=0))


def test_phases_of_other_sizes(directory: Path, tmp_path: Path) -> None:
    """Property: when rows and lengths change during a run, pieces still cover each step and are found by id."""
    stream = OrderedTokens.open(str(directory / "web"))
    phases, total = [(0, 0, 2, 16), (5, 160, 4, 32), (9, 160 + 4 * 128, 3, 64)], 160 + 512 + 3 * 64 + 64
    (tmp_path / "checkpoints").mkdir()
    write_trace(tmp_path, stream, phases, total)
    trace = Trace(tmp_path)
    assert trace.steps == 11
    sizes = [sum(p.last - p.first for p in trace.step(n)) for n in range(1, 12)]
    assert sizes == [32] * 5 + [128] * 4 + [192, 64]
    write_trace(tmp_path, stream, [(0, 0, 2, 16)], total)
    assert Trace(tmp_path).steps == -(-total // 32)  # rewritten
    for n in (5, 6, 10):
        for piece in trace.step(n):
            assert piece.to_json() in [found.to_json() for found in trace.find(piece.id)]


def test_step_and_find(
    traced: Callable[..., list[dict[str, Any]]], directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Behaviour: --step lists documents with their text; --find lists steps, two in two epochs; one line per piece."""
    pieces = traced("--step", "3", "--text")
    assert {piece["row"] for piece in pieces} == {0, 1, 2, 3}
    assert all(
        set(piece["text"].replace("<|endoftext|>", "").split())
        <= {*WORDS, *(w[i:] for w in WORDS for i in range(9)), *(w[:i] for w in WORDS for i in range(9))}
        for piece in pieces
    )
    found = traced("--find", pieces[0]["id"])
    assert {piece["epoch"] for piece in found} == {0, 1}
    assert {key: pieces[0][key] for key in pieces[0] if key != "text"} in found
    assert run_command("trace", [str(directory / "run"), "--step", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(pieces)
    assert lines[0].startswith("step 3 row 0 [0:")


def test_skipped_step_is_named(directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Behaviour: a step skipped by the guard is marked."""
    run = shutil.copytree(directory / "run", tmp_path / "run", symlinks=True)
    with open(run / "events.jsonl", "a") as events:
        events.write(json.dumps({"event": "rollback", "skipped": [2, 3], "cause": "broken documents"}) + "\n{broken\n")
    assert run_command("trace", [str(run), "--step", "2", "--json"]) == 0
    out, err = capsys.readouterr()
    assert all(json.loads(line)["skipped"] == "broken documents" for line in out.splitlines())
    assert "skipped by the guard: broken documents" in err


def failed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run_command("trace", list(arguments)) in (1, 2)
    return capsys.readouterr().err


def test_mistakes_are_one_line(directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Behaviour: unknown steps, ids and runs, and both options or none, are one-line errors."""
    run = str(directory / "run")
    assert "no step 1,000" in failed(capsys, run, "--step", "1000")
    assert "no document 'web-99'" in failed(capsys, run, "--find", "web-99")
    assert "no document ''" in failed(capsys, run, "--find", "")
    assert "either --step or --find" in failed(capsys, run)
    assert "either --step or --find" in failed(capsys, run, "--step", "1", "--find", "a")
    assert "not a run" in failed(capsys, str(tmp_path), "--step", "1")
    (tmp_path / "checkpoints").mkdir()
    assert "no trace" in failed(capsys, str(tmp_path), "--step", "1")


def test_moved_and_changed_data(directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Behaviour: data that is missing, of another size, or of the same size with other content is named."""
    shutil.copytree(directory / "web", tmp_path / "web")
    shutil.copy(directory / "config.json", tmp_path / "config.json")
    assert train(tmp_path, "web", "--tokens", "1k", "-o", str(tmp_path / "run")) == 0
    run, part = str(tmp_path / "run"), tmp_path / "web" / "part-00000.arrow"
    os.rename(part, tmp_path / "part")
    assert "part-00000.arrow: No such file" in failed(capsys, run, "--step", "1")
    whole = (tmp_path / "part").read_bytes()
    part.write_bytes(whole + b"0")
    assert "not the data that the run read" in failed(capsys, run, "--step", "1")
    digest = json.loads((tmp_path / "run" / "trace" / "trace.json").read_text())["stores"][0][0][3].encode()
    part.write_bytes(whole.replace(digest, digest[:-1] + (b"0" if digest[-1:] != b"0" else b"1")))
    assert "not the data that the run read" in failed(capsys, run, "--step", "1")
    part.write_bytes(whole)
    os.rename(tmp_path / "run", tmp_path / "elsewhere")  # the run may move
    assert run_command("trace", [str(tmp_path / "elsewhere"), "--step", "1", "-q"]) == 0


@pytest.mark.parametrize("damage", ["offsets", "document", "legs", "json", "pickle", "version"])
def test_hostile_trace_is_an_error(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    """Behaviour: truncated, out-of-range or pickled tables and another version are one-line errors; nothing is unpickled."""
    stream = OrderedTokens.open(str(directory / "plan"))
    (tmp_path / "checkpoints").mkdir()
    write_trace(tmp_path, stream, [(0, 0, 4, 32)], 1000)
    trace = tmp_path / "trace"
    content = json.loads((trace / "trace.json").read_text())
    if damage == "offsets":
        (trace / "offsets.npy").write_bytes((trace / "offsets.npy").read_bytes()[:-9])
    elif damage == "document":
        np.save(trace / "document.npy", np.full(len(stream.order.document), 1 << 20, np.uint32))
    elif damage == "pickle":
        np.save(trace / "source.npy", np.array([{}] * stream.documents, object), allow_pickle=True)
    elif damage == "json":
        (trace / "trace.json").write_text("[" * 100_000)
    else:
        changed = {"version": 9} if damage == "version" else {"legs": [[0, 0, 4, 0]]}
        (trace / "trace.json").write_text(json.dumps(content | changed))
    assert str(trace) in failed(capsys, str(tmp_path), "--step", "1")


def test_reading_needs_no_torch(directory: Path) -> None:
    """Property: the command imports neither torch nor pandas."""
    code = (
        "import sys; from llmkit.cli.main import run_command\n"
        f"assert run_command('trace', [{str(directory / 'run')!r}, '--find', 'web-3', '--text', '-q']) == 0\n"
        "assert not {'torch', 'pandas', 'numba', 'accelerate'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
