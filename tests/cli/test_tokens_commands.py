"""`vocab` and `tokenize` from the command line."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from waiting import wait_until

from llmkit.cli.main import run_command
from llmkit.io.documents import DocumentReader, ReadOptions
from llmkit.lineage.formats import read_lineage
from llmkit.shards.reader import TokenStore

Command = Callable[..., subprocess.CompletedProcess[bytes]]


def rows(count: int = 120) -> list[dict[str, str]]:
    return [
        {"id": f"d{i}", "text": f"Document {i} says <|endoftext|>, then {'some more words ' * (i % 9)}and ends.\n"}
        for i in range(count)
    ]


def store_rows(path: Path, items: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """What a command in this process does with SIGTERM ends with it."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vocabulary: Path) -> Path:
    """An empty working directory with docs.jsonl and tok/."""
    monkeypatch.chdir(tmp_path)
    store_rows(tmp_path / "docs.jsonl", rows())
    (tmp_path / "tok").symlink_to(vocabulary)
    return tmp_path


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer directory of 320 tokens."""
    directory = tmp_path_factory.mktemp("vocabulary")
    store_rows(directory / "docs.jsonl", rows())
    assert (
        run_command("vocab", [str(directory / "docs.jsonl"), "--size", "320", "-q", "-o", str(directory / "tok")]) == 0
    )
    return directory / "tok"


def store_tokenizer(directory: Path, model: dict[str, object], **more: object) -> None:
    directory.mkdir()
    (directory / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model} | more))


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_vocab_is_the_same_for_any_number_of_jobs_and_order(place: Path, llmkit: Command) -> None:
    """Behaviour: equal bytes for -j 1 and -j 2; the same tokenizer for the same documents in another order, cut into other files."""
    items = rows()
    random.Random(2).shuffle(items)
    store_rows(place / "a.jsonl", items[:50])
    store_rows(place / "b.jsonl", items[50:])
    for jobs in ("1", "2"):
        assert llmkit("vocab", "docs.jsonl", "--size", "320", "-j", jobs, "-o", f"tok{jobs}", cwd=place).returncode == 0
    assert files(place / "tok1") == files(place / "tok2")
    assert run_command("vocab", ["a.jsonl", "b.jsonl", "--size", "320", "-q", "-o", "tok3"]) == 0
    assert (place / "tok3" / "tokenizer.json").read_bytes() == (place / "tok1" / "tokenizer.json").read_bytes()
    assert run_command("vocab", ["docs.jsonl", "--size", "320", "-o", "tok1"]) == 0  # up to date


def test_vocab_digits_sample_and_special(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Behaviour: --digits names a pattern, and the lineage has it; --sample takes the same documents for any -j; --special gives ids behind ours."""
    call = ["docs.jsonl", "--size", "320", "--digits", "single", "--sample", "0.5", "--special", "<think>", "--json"]
    for jobs in ("1", "2"):
        assert run_command("vocab", [*call, "-j", jobs, "-o", f"tok{jobs}"]) == 0
    assert files(place / "tok1") == files(place / "tok2")
    counts = json.loads(capfd.readouterr().err.splitlines()[-1])
    assert counts["documents"] == 120 and 30 < counts["taken"] < 90
    record = read_lineage(place / "tok1")
    assert (
        record is not None and record["options"]["pattern"] == "qwen2" and record["counts"]["taken"] == counts["taken"]
    )
    assert json.loads((place / "tok1" / "tokenizer.json").read_text())["model"]["vocab"]["<think>"] == 11
    for digits, name in (("three", "llama-bpe"), ("single", "smollm")):
        assert run_command("vocab", ["docs.jsonl", "-q", "--digits", digits, "-p", name, "--dry-run", "-o", "new"]) == 0


def test_vocab_says_what_it_made(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Behaviour: rounding and a shortage of merges are said; the lineage stands in the directory."""
    assert run_command("vocab", ["docs.jsonl", "--size", "5000", "-p", "qwen2", "--json", "-o", "new"]) == 0
    said = capfd.readouterr().err
    assert "5,000 rounded up to 5,056" in said and "warning: the texts hold" in said
    counts = json.loads(said.splitlines()[-1])
    assert counts["size"] % 64 == 0 and counts["size"] < 5056 and counts["documents"] == 120
    record = read_lineage(place / "new")
    assert record is not None and record["command"] == "vocab" and record["options"]["pattern"] == "qwen2"
    assert [item["name"] for item in record["inputs"]] == ["docs.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["vocab", "docs.jsonl"], 2, "no output"),
        (["vocab", "docs.jsonl", "-o", "x", "--size", "100"], 2, "cannot hold"),
        (["vocab", "docs.jsonl", "-o", "x", "--size", "0"], 2, "cannot hold"),
        (["vocab", "docs.jsonl", "-o", "x", "--size", "many"], 2, "is not a count"),
        (["vocab", "docs.jsonl", "-o", "x", "--size", "1T"], 2, "the largest is"),
        (["vocab", "docs.jsonl", "-o", "x", "--pattern", "lama-bpe"], 2, "did you mean 'llama-bpe'"),
        (["vocab", "docs.jsonl", "-o", "x", "--digits", "two"], 2, "unknown --digits"),
        (["vocab", "docs.jsonl", "-o", "x", "--digits", "single", "-p", "llama-bpe"], 2, "contradict each other"),
        (["vocab", "docs.jsonl", "-o", "x", "--digits", "three", "-p", "gpt-2"], 2, "contradict each other"),
        (["vocab", "docs.jsonl", "-o", "x", "--special", "word"], 2, "a special token 'word'"),
        (["vocab", "docs.jsonl", "-o", "x", "--sample", "0"], 2, "--sample 0"),
        (["vocab", "docs.jsonl", "-o", "x", "--sample", "nan"], 2, "--sample nan"),
        (["vocab", "docs.jsonl", "-o", "x", "--sample", "1e-9"], 1, "takes none of 120 documents"),
        (["vocab", "docs.jsonl", "-o", "x", "--min-frequency", "0"], 2, "min-frequency"),
        (["vocab", "empty.jsonl", "-o", "x"], 1, "no text to train on"),
        (["vocab", "bad.jsonl", "-o", "x"], 1, "bad.jsonl:2: invalid JSON"),
        (["vocab", "docs.jsonl", "-o", "there"], 1, "there exists"),
        (["tokenize", "docs.jsonl", "-o", "x"], 2, "no tokenizer"),
        (["tokenize", "docs.jsonl", "-t", "nowhere", "-o", "x"], 1, "no such tokenizer"),
        (["tokenize", "docs.jsonl", "-t", "there", "-o", "x"], 1, "no tokenizer.json"),
        (["tokenize", "docs.jsonl", "-t", "broken", "-o", "x"], 1, "broken: tokenizer.json is not valid JSON"),
        (["tokenize", "docs.jsonl", "-t", "tok", "-o", "there"], 1, "there exists"),
        (["tokenize", "docs.jsonl", "-t", "tok", "-o", "there/x/y"], 1, "is not a directory"),
        (["tokenize", "there", "-t", "tok", "-o", "x"], 1, "no input files in this directory"),
        (["tokenize", "bad.jsonl", "-t", "tok", "-o", "x"], 1, "bad.jsonl:2: invalid JSON"),
        (["tokenize", "docs.jsonl", "-t", "tok", "-o", "x", "--max-tokens-per-shard", "0"], 2, "at least one token"),
        (["tokenize", "--decode", "docs.jsonl", "-o", "x.jsonl"], 1, "not a token shard"),
        (["tokenize", "docs.jsonl", "-t", "gpt2", "-o", "x"], 1, "nothing is fetched from a hub"),
        (["tokenize", "docs.jsonl", "-t", "tok", "-o", "x", "--engine", "rai"], 2, "did you mean 'ray'"),
        (["tokenize", "--decode", "one.arrow", "-o", "x.jsonl", "--engine", "ray"], 2, "--engine is for encoding"),
        (["tokenize", "--decode", "one.arrow", "-o", "x.jsonl", "--bos"], 2, "--bos is for encoding"),
        (["tokenize", "one.arrow", "--to", "jsonl", "--source-key", "x"], 2, "--source-key is for encoding"),
        (["tokenize", "one.arrow", "--to", "jsonl", "--fim-source", "x"], 2, "--fim-source is for encoding"),
        (["tokenize", "--decode", "one.arrow", "-o", "x.jsonl", "-t", "other"], 1, "made with another tokenizer"),
        (
            ["tokenize", "--decode", "one.arrow", "-o", "x.jsonl", "--to", "jsonl"],
            2,
            "--decode turns tokens into documents",
        ),
        (["tokenize", "one.arrow", "-t", "tok", "-o", "x"], 2, "token shards already"),
        (["tokenize", "docs.jsonl", "-t", "tok", "-o", "x", "--to", "megatrom"], 2, "did you mean 'megatron'"),
        (["tokenize", "docs.jsonl", "-t", "tok", "-o", "x", "--from", "nano"], 2, "did you mean 'nanogpt'"),
        (["tokenize", "docs.jsonl", "-t", "tok", "--to", "megatron"], 2, "-o PREFIX"),
        (["tokenize", "docs.jsonl", "-t", "tok", "--to", "nanogpt", "-o", "there"], 1, "there exists"),
        (["tokenize", "odd.bin", "--from", "nanogpt", "-o", "x"], 2, "no tokenizer"),
        (
            ["tokenize", "odd.bin", "--from", "nanogpt", "-t", "tok", "-o", "x"],
            1,
            "odd.bin: 3 bytes are not a whole number",
        ),
        (["tokenize", "-", "--from", "nanogpt", "-t", "tok", "-o", "x"], 2, "stdin is none"),
        (["tokenize", "odd", "--from", "megatron", "-t", "tok", "-o", "x"], 1, "odd.idx: no such file"),
        (["tokenize", "docs.jsonl", "-t", "tok", "-o", "x", "--bos"], 2, "tok: no beginning-of-text token"),
        (["tokenize", "docs.jsonl", "-t", "other", "-o", "x", "--fim-rate", "0.5"], 2, "no fill-in-the-middle tokens"),
        (["tokenize", "docs.jsonl", "-t", "tok", "-o", "x", "--fim-rate", "2"], 2, "--fim-rate 2.0"),
        (["tokenize", "docs.jsonl", "-t", "tok", "-o", "x", "--fim-spm-rate", "0.1"], 2, "without --fim-rate"),
        (
            ["tokenize", "docs.jsonl", "-t", "tok", "--to", "jsonl", "--max-tokens-per-shard", "9"],
            2,
            "only token shards",
        ),
        (["tokenize", "docs.jsonl", "-t", "tok", "-o", "x", "--fim-source", "code"], 2, "--fim-source without"),
        (["tokenize", "--decode", "empty.jsonl", "-o", "x.jsonl"], 1, "empty file"),
    ],
)
def test_bad_calls(
    place: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    """Behaviour: exit code, one clear line, a hint, and nothing left behind."""
    (place / "there").mkdir()
    (place / "broken").mkdir()
    (place / "broken" / "tokenizer.json").write_text('{"model": ')
    (place / "odd.bin").write_bytes(b"\1\0\0")
    vocabulary = {"a": 0, "</s>": 1}
    store_tokenizer(place / "other", {"type": "BPE", "vocab": vocabulary, "merges": []})
    assert run_command("tokenize", ["docs.jsonl", "-t", "tok", "-q", "-o", "one.arrow"]) == 0
    (place / "empty.jsonl").write_text("")
    (place / "bad.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    before = sorted(path.name for path in place.iterdir())
    assert run_command(arguments[0], arguments[1:]) == code
    error = capfd.readouterr().err
    assert message in error and "hint: " in error and "Traceback" not in error
    assert sorted(path.name for path in place.iterdir()) == before


def test_tokenize_is_the_same_for_any_number_of_jobs(place: Path, llmkit: Command) -> None:
    """Behaviour: equal bytes for -j 1 and -j 2, over several chunks and parts."""
    store_rows(place / "big.jsonl", rows(9000))
    for jobs in ("1", "2"):
        done = llmkit(
            "tokenize",
            "big.jsonl",
            "-t",
            "tok",
            "-j",
            jobs,
            "-o",
            f"s{jobs}",
            "--max-tokens-per-shard",
            "60k",
            cwd=place,
        )
        assert done.returncode == 0, done.stderr
    assert files(place / "s1") == files(place / "s2")
    assert len(list((place / "s1").glob("part-*.arrow"))) > 2
    assert TokenStore.open("s1").documents == 9000


def test_directory_file_and_stream_hold_the_same(place: Path, llmkit: Command) -> None:
    """Behaviour: the three outputs differ in form alone; each carries its tokenizer, and gives it on; decoding gives the texts back."""
    assert run_command("tokenize", ["docs.jsonl", "-t", "tok", "-q", "-o", "shards"]) == 0
    assert run_command("tokenize", ["docs.jsonl", "-t", "shards", "-q", "-o", "one.arrow"]) == 0
    piped = llmkit(
        "tokenize", "-t", "one.arrow", "--source", "docs", stdin=(place / "docs.jsonl").read_bytes(), cwd=place
    )
    (place / "piped.arrow").write_bytes(piped.stdout)
    ids = llmkit("tokenize", "--to", "nanogpt", stdin=piped.stdout, cwd=place).stdout  # known for what it is
    assert ids == TokenStore.open("shards").span(0, len(ids) // 2).tobytes()
    stores = [TokenStore.open(name) for name in ("shards", "one.arrow", "piped.arrow")]
    assert len({store.inputs[0].digest for store in stores}) == 1
    assert all(
        store.tokenizer.files["tokenizer.json"] == (place / "tok/tokenizer.json").read_text() for store in stores
    )
    assert all(store.document(i)[-1] == 0 and 0 not in store.document(i)[:-1] for store in stores for i in range(120))
    assert stores[0].sources == ["docs"]
    assert stores[2].inputs[0].lineage["inputs"][1]["name"] == "-"
    decoded = llmkit("tokenize", "--decode", "--plain", stdin=piped.stdout, cwd=place)
    assert [json.loads(line) for line in decoded.stdout.splitlines()] == [row | {"source": "docs"} for row in rows()]
    assert run_command("tokenize", ["--decode", "shards", "-q", "-o", "back.jsonl"]) == 0
    assert (place / "back.jsonl").read_bytes() == decoded.stdout


BPE = {"type": "BPE", "vocab": {"a": 0, "b": 1, "</s>": 2}, "merges": []}


@pytest.mark.parametrize(
    ("model", "more", "message"),
    [
        ({"type": "Mystery", "vocab": {"a": 0}}, {}, "unknown tokenizer model 'Mystery'"),
        ({"type": "BPE", "merges": []}, {}, "tokenizer.json is malformed"),
        (BPE | {"vocab": {"a": 0}}, {}, "has no end-of-text token"),
        (BPE | {"vocab": {"a": 0, "</s>": 1 << 40}}, {}, "tokenizer.json is malformed"),
        (BPE | {"merges": [["a", "z"]]}, {}, "does not load"),
        (BPE | {"merges": "a b"}, {}, "does not load"),
        (BPE | {"vocab": {"a": 0, "": 1, "</s>": 2}, "merges": [["a", ""]], "continuing_subword_prefix": "#"}, {}, "does not load"),  # a panic
        (BPE, {"normalizer": {"type": "Nothing"}}, "does not load"),
        (BPE, {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}}, "does not load"),
        ({"type": "Unigram", "vocab": [["</s>", 0.0]], "unk_id": 7}, {}, "does not load"),
        ({"type": "WordPiece", "vocab": {"a": 0, "</s>": 1}, "unk_token": "[U]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 9}, {}, "does not encode: WordPiece error"),
    ],
)  # fmt: skip
def test_bad_tokenizers(
    place: Path, capfd: pytest.CaptureFixture[str], model: dict[str, object], more: dict[str, object], message: str
) -> None:
    """Behaviour: a tokenizer that cannot work is one clear line with a hint, and leaves nothing behind."""
    store_tokenizer(place / "bad", model, **more)
    assert run_command("tokenize", ["docs.jsonl", "-t", "bad", "-o", "x"]) == 1
    error = capfd.readouterr().err
    assert message in error and "hint: " in error and "Traceback" not in error and not (place / "x").exists()


def test_absurd_size_of_a_tokenizer(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Behaviour: a file of 300 MB is not read."""
    with open(place / "tokenizer.json", "wb") as sink:
        sink.truncate(300 << 20)
    assert run_command("tokenize", ["docs.jsonl", "-t", "tokenizer.json", "-o", "x"]) == 1
    assert "over 256 MiB, too large for a tokenizer file" in capfd.readouterr().err


def test_other_formats_and_back(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Property: shards to nanoGPT or Megatron files and back are the same tokens, under the file's name; texts come from them too;
    encoding into a format and converting to it are the same bytes."""

    def call(*arguments: str) -> None:
        assert run_command("tokenize", [*arguments, "-q"]) == 0

    call("docs.jsonl", "-t", "tok", "-o", "shards", "--max-tokens-per-shard", "500")
    call("shards", "--to", "nanogpt", "-o", "a.bin")
    call("docs.jsonl", "-t", "tok", "--to", "nanogpt", "-o", "b.bin")
    call("shards", "--to", "megatron", "-o", "m")
    call("a.bin", "--from", "nanogpt", "-t", "shards", "-o", "from-a")
    call("m", "m.bin", "--from", "megatron", "-t", "tok", "--source", "docs", "-o", "from-m.arrow")
    call("m.idx", "--from", "megatron", "-t", "tok", "--decode", "-o", "texts.jsonl")
    call("shards", "--to", "jsonl", "-o", "ids.jsonl.zst")
    assert (place / "a.bin").read_bytes() == (place / "b.bin").read_bytes() == (place / "m.bin").read_bytes()
    stores = [TokenStore.open(name) for name in ("shards", "from-a", "from-m.arrow")]
    expected = [stores[0].document(i).tolist() for i in range(120)]
    for store, source in zip(stores, ("docs", "a", "docs"), strict=True):
        assert [store.document(i).tolist() for i in range(store.documents)] == expected
        assert store.sources == [source]
    assert [json.loads(line)["text"] for line in (place / "texts.jsonl").open()] == [row["text"] for row in rows()]
    with DocumentReader(["ids.jsonl.zst"], ReadOptions(text_key=None)) as reader:
        lines = [document.fields for document in reader.documents()]
    assert lines == [{"id": f"d{i}", "source": "docs", "tokens": tokens} for i, tokens in enumerate(expected)]
    record = read_lineage(place / "from-m.arrow")
    assert record is not None and [item["name"] for item in record["inputs"]] == ["tok", "m.bin", "m.idx"]
    assert record["options"].keys() == {"to", "decode", "from_", "source", "tokenizer", "max_tokens_per_shard"}
    assert run_command("tokenize", ["shards", "--to", "jsonl", "-o", "ids.jsonl.zst"]) == 0
    assert "up to date" in capfd.readouterr().err
    assert run_command("tokenize", ["shards", "--to", "nanogpt", "-o", "a.bin"]) == 1  # no place for a record


def test_fill_in_the_middle(place: Path, llmkit: Command) -> None:
    """Behaviour: equal bytes for any -j; the same documents are cut the same way in another order and in other files; the record names
    what decides it; only the sources asked for are cut."""
    items = [row | {"repository": "ab"[i % 2]} for i, row in enumerate(rows(9000))]
    store_rows(place / "big.jsonl", items)
    store_rows(place / "turned.jsonl", items[::-1])
    asked = ["-t", "tok", "--fim-rate", "0.5", "--seed", "3", "--source-key", "repository", "--fim-source", "a", "-q"]
    for jobs in ("1", "2"):
        done = llmkit("tokenize", "big.jsonl", *asked, "-j", jobs, "-o", f"s{jobs}", cwd=place)
        assert done.returncode == 0, done.stderr
    assert files(place / "s1") == files(place / "s2")
    assert run_command("tokenize", ["turned.jsonl", *asked, "-o", "t"]) == 0
    one, other = TokenStore.open("s1"), TokenStore.open("t")
    documents = [one.document(i).tolist() for i in range(9000)]
    assert documents == [other.document(i).tolist() for i in range(9000)][::-1]
    middle = json.loads((place / "tok" / "tokenizer.json").read_text())["model"]["vocab"]["<|fim_middle|>"]
    cut = [middle in tokens for tokens in documents]
    assert not any(cut[1::2]) and 0.45 < sum(cut[::2]) / 4500 < 0.55
    options = (read_lineage(place / "s1") or {})["options"]
    assert (options["fim_rate"], options["fim_source"], options["seed"]) == (0.5, ["a"], 3)
    assert run_command("tokenize", ["docs.jsonl", "-t", "tok", "-q", "-o", "plain", "--seed", "1"]) == 0
    assert (
        not {"seed", "fim_rate", "fim_spm_rate", "stats", "engine"}
        & (read_lineage(place / "plain") or {})["options"].keys()
    )


def test_beginning_of_text_and_statistics(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Behaviour: --bos puts the token in front; --stats counts documents, tokens and bytes of each source; sources come from the field named."""
    (place / "bos").mkdir()
    (place / "bos" / "tokenizer.json").write_bytes((place / "tok" / "tokenizer.json").read_bytes())
    (place / "bos" / "tokenizer_config.json").write_text('{"bos_token": "<|im_start|>"}')
    store_rows(
        place / "two.jsonl", [{"text": "abc", "lang": "x"}, {"text": "\u00e9", "lang": "y"}, {"text": "d", "lang": "x"}]
    )
    call = ["two.jsonl", "-t", "bos", "--bos", "--source-key", "lang", "--stats", "--json", "-o", "s"]
    assert run_command("tokenize", [*call]) == 0
    said = capfd.readouterr().err
    store = TokenStore.open("s")
    assert [store.document(i)[[0, -1]].tolist() for i in range(3)] == [[1, 0]] * 3
    lengths = [len(store.document(i)) for i in range(3)]
    assert json.loads(said.splitlines()[-1])["sources"] == [
        {"source": "x", "documents": 2, "tokens": lengths[0] + lengths[2], "bytes": 4},
        {"source": "y", "documents": 1, "tokens": lengths[1], "bytes": 2},
    ]
    assert len(said.splitlines()) == 1  # of the two, --json is for machines
    assert run_command("tokenize", [*call[:-3], "-o", "s2"]) == 0
    assert capfd.readouterr().err.startswith("sources\nsource  documents  tokens  bytes\n")
    assert run_command("tokenize", [*call, "--engine", "rai"]) == 2  # also where there is nothing to do


def test_allow_special(place: Path) -> None:
    """Behaviour: with --allow-special a special token's name in a text is that token."""
    assert run_command("tokenize", ["docs.jsonl", "-t", "tok", "-q", "--allow-special", "-o", "s.arrow"]) == 0
    store = TokenStore.open("s.arrow")
    assert all(np.count_nonzero(store.document(i) == 0) == 2 for i in range(store.documents))


def test_repeated_runs(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Behaviour: a finished run repeated does nothing; with other options it is refused; -f replaces; -n writes nothing."""
    assert run_command("tokenize", ["docs.jsonl", "-t", "tok", "-o", "s"]) == 0
    made = files(place / "s")
    assert run_command("tokenize", ["docs.jsonl", "-t", "tok", "-o", "s"]) == 0
    assert "up to date" in capfd.readouterr().err
    assert run_command("tokenize", ["docs.jsonl", "-t", "tok", "-o", "s", "--source", "x"]) == 1
    assert "s exists" in capfd.readouterr().err
    assert run_command("tokenize", ["docs.jsonl", "-t", "tok", "-f", "-o", "s", "--source", "x", "-n"]) == 0
    assert files(place / "s") == made
    assert run_command("tokenize", ["docs.jsonl", "-t", "tok", "-f", "-o", "s", "--source", "x"]) == 0
    assert TokenStore.open("s").sources == ["x"]


def test_inputs_listed_on_stdin(place: Path, llmkit: Command) -> None:
    """Behaviour: --files-from - reads the names of inputs from stdin, once, though they are asked for twice."""
    done = llmkit("tokenize", "--files-from", "-", "-t", "tok", "-o", "s", stdin=b"docs.jsonl\n", cwd=place)
    assert done.returncode == 0, done.stderr
    assert TokenStore.open(str(place / "s")).documents == 120


def test_nothing_in(place: Path, llmkit: Command) -> None:
    """Behaviour: no documents give valid shards without rows, and a warning; bad lines can be passed over and are counted."""
    done = llmkit("tokenize", "-t", "tok", "-q", "-o", "none.arrow", stdin=b"\n", cwd=place)
    assert done.returncode == 0 and b"warning: no documents were read" in done.stderr
    assert TokenStore.open(str(place / "none.arrow")).documents == 0
    done = llmkit(
        "tokenize",
        "-t",
        "tok",
        "--json",
        "--on-bad-line",
        "skip",
        "-o",
        "some.arrow",
        stdin=b'{"text": "a"}\n{\n{"text": " "}\n',
        cwd=place,
    )
    counts = json.loads(done.stderr.splitlines()[-1])
    assert (counts["documents"], counts["empty"], counts["bad_lines"]) == (2, 1, 1)


def test_closed_pipe_and_terminal(place: Path) -> None:
    """Behaviour: a reader that goes away ends it quietly with 141; tokens are not written to a terminal."""
    store_rows(place / "big.jsonl", rows(3000))
    command = [sys.executable, "-m", "llmkit", "tokenize", "big.jsonl", "-t", "tok"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(10)
    process.stdout.close()
    assert (process.wait(), process.stderr.read()) == (141, b"")
    process.stderr.close()
    ours, theirs = os.openpty()
    done = subprocess.run(command, stdout=theirs, stderr=subprocess.PIPE)
    os.close(theirs)
    os.close(ours)
    assert done.returncode == 2 and b"not written to a terminal" in done.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted(place: Path, number: signal.Signals, code: int) -> None:
    """Behaviour: stopped in the middle, its exit code says by what, and nothing stands under the final name."""
    process = subprocess.Popen(
        [sys.executable, "-m", "llmkit", "tokenize", "-t", "tok", "-o", "s"], stdin=subprocess.PIPE
    )
    assert process.stdin is not None
    process.stdin.write(b"".join(json.dumps(row).encode() + b"\n" for row in rows()))
    process.stdin.flush()
    wait_until((place / ".s.partial").exists, process)
    process.send_signal(number)
    assert process.wait(timeout=60) == code
    process.stdin.close()
    assert not (place / "s").exists() and not (place / ".s.partial").exists()


def test_full_disk(place: Path, llmkit: Command) -> None:
    """Behaviour: a full disk is one line with a hint and exit code 1."""
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    store_rows(place / "big.jsonl", rows(3000))
    done = llmkit("tokenize", "big.jsonl", "-t", "tok", "-o", "/dev/full", cwd=place)
    assert done.returncode == 1 and b"No space left" in done.stderr and b"Traceback" not in done.stderr
