"""`vocab report`, `vocab advise` and `vocab extend` from the command line, and names of two words."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from llmkit.lineage.formats import read_lineage
from llmkit.shards.reader import load_tokenizer_info

Command = Callable[..., subprocess.CompletedProcess[bytes]]
ENGLISH = "The mixture of words in this document is plain English prose, number {} of many that say about the same. "
GERMAN = "Die Mischung der Wörter dieses Dokuments ist schlichtes Deutsch, Nummer {} von vielen ähnlichen Inhalts. "


@pytest.fixture
def place(tmp_path: Path, small_tokenizer: dict[str, str]) -> Path:
    """A directory with en.jsonl, de.jsonl and tok/."""
    for name, text in (("en", ENGLISH), ("de", GERMAN)):
        rows = [json.dumps({"text": text.format(i) * 3, "language": name}) + "\n" for i in range(100)]
        (tmp_path / f"{name}.jsonl").write_text("".join(rows))
    (tmp_path / "tok").mkdir()
    for name, text in small_tokenizer.items():
        (tmp_path / "tok" / name).write_text(text)
    return tmp_path


def test_names_of_two_words(place: Path, llmkit: Command) -> None:
    """Behaviour: two words or a hyphen reach the same command; a file of that name is ./NAME; typos get a suggestion."""
    for words in (("vocab", "report"), ("vocab-report",)):
        done = llmkit(*words, "-h")
        assert done.returncode == 0 and b"Usage: llmkit vocab report" in done.stdout
        assert b"LLMKIT_VOCAB_REPORT_OPTION" in done.stdout
    (place / "report").write_bytes((place / "en.jsonl").read_bytes())
    assert llmkit("vocab", "./report", "-s", "320", "-n", cwd=place, env={"LLMKIT_VOCAB_OUTPUT": "x"}).returncode == 0
    for words, near in ((("vocab", "reprot"), b"'report'"), (("vocab-reprot",), b"'vocab report'")):
        done = llmkit(*words, cwd=place)
        assert done.returncode == 2 and b"did you mean " + near in done.stderr
    (place / "c.toml").write_text("[vocab-report]\nbaseline = 'de'\n[vocab]\nsize = 999\n")
    shown = llmkit("vocab", "report", "tok", "-c", "c.toml", "--print-config", cwd=place).stdout
    assert b"# llmkit vocab report, resolved" in shown and b'baseline = "de"  # config file' in shown


def test_report(place: Path, llmkit_here: Command) -> None:
    """Behaviour: JSON on stdout or in -o, the same for any -j and from stdin; the table and the warning on stderr."""
    call = ("vocab report", "tok", "tok/tokenizer.json", "--text", "en.jsonl", "--text", "de.jsonl")
    done = llmkit_here(*call, cwd=place)
    report = json.loads(done.stdout)
    groups = {(group["field"], group["value"]): group for group in report["groups"]}
    assert set(groups) == {("", "all"), ("language", "en"), ("language", "de"), ("source", "en"), ("source", "de")}
    assert groups["language", "de"]["documents"] == 100 and report["baseline"] == "en"
    assert groups["source", "en"]["tokenizers"][0] == groups["source", "en"]["tokenizers"][1]
    said = done.stderr.decode()
    assert "tokens/word" in said and "tokenizer.json" in said and "200 documents measured" in said
    assert llmkit_here(*call, "-j", "2", "-o", "r.json", cwd=place).stdout == b""
    assert (place / "r.json").read_bytes() == done.stdout
    mixed = b'{"text": "plain words", "language": "eng"}\n{"text": "{}[]()#!", "language": "x"}\n{"text": "a + b", "language": "y"}\n'
    done = llmkit_here("vocab report", "tok", stdin=mixed, cwd=place)
    assert b"warning: tok: fertility over 1.5 times that of eng" not in done.stderr  # it knows no English either
    done = llmkit_here("vocab report", "tok", "--baseline", "eng", "--by", "language", stdin=mixed * 2, cwd=place)
    assert done.returncode == 0 and json.loads(done.stdout)["groups"][0]["words"] == 8
    done = llmkit_here("vocab report", "tok", "--by", "lang", stdin=mixed, cwd=place)
    assert b"warning: no document has a field 'lang'" in done.stderr
    empty = llmkit_here("vocab report", "tok", stdin=b"\n", cwd=place)
    assert empty.returncode == 0 and b"no documents were read" in empty.stderr


def test_report_warns(place: Path, llmkit_here: Command) -> None:
    """Behaviour: a tokenizer trained on English costs German more than 1.5 times as much, and says so; without English it says that."""
    assert llmkit_here("vocab", "en.jsonl", "-s", "512", "-q", "-o", "entok", cwd=place).returncode == 0
    done = llmkit_here("vocab report", "entok", "-q", "--text", "en.jsonl", "--text", "de.jsonl", cwd=place)
    assert b"warning: entok: fertility over 1.5 times that of en: de (" in done.stderr
    done = llmkit_here("vocab report", "entok", "--text", "de.jsonl", cwd=place)
    assert b"no English among the groups" in done.stderr and b"warning" not in done.stderr


def test_patterns_that_gguf_cannot_name(place: Path, llmkit_here: Command) -> None:
    """Behaviour: a byte-level tokenizer that cuts text its own way is warned of, one of ours is not."""
    other = json.loads((place / "tok/tokenizer.json").read_text())
    other["pre_tokenizer"]["add_prefix_space"] = True
    (place / "other").mkdir()
    for file in (place / "tok").iterdir():
        (place / "other" / file.name).write_bytes(file.read_bytes())
    (place / "other/tokenizer.json").write_text(json.dumps(other))
    done = llmkit_here("vocab report", "tok", "other", "--text", "en.jsonl", cwd=place)
    assert done.stderr.count(b"GGUF") == 1 and b"warning: other: cuts text as none of llama-bpe" in done.stderr
    extended = llmkit_here("vocab extend", "other", "de.jsonl", "--add", "4", "-o", "more", cwd=place)
    assert extended.returncode == 0 and b"GGUF" in extended.stderr


def test_advise(place: Path, llmkit_here: Command) -> None:
    """Behaviour: a table for each model, the same JSON in another order of documents, and a warning where the corpus is too small."""
    randomness = random.Random(1)
    known = ["".join(randomness.choices("abcdefghijklmnop", k=randomness.randint(3, 9))) for _ in range(1000)]
    lines = []
    for i in range(600):
        text = " ".join(randomness.choices(known, k=60))
        lines.append(json.dumps({"text": f"{text} {ENGLISH.format(i)}", "language": "en" if i % 2 else "xx"}) + "\n")
    (place / "many.jsonl").write_text("".join(lines))
    (place / "back.jsonl").write_text("".join(lines[::-1]))
    done = llmkit_here("vocab advise", "many.jsonl", "-m", "tiny,llama-125m", cwd=place)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [model["model"] for model in found["models"]] == ["tiny", "llama-125m"]
    for model in found["models"]:
        rows = model["sizes"]
        assert model["recommended"] in [row["size"] for row in rows] and rows[0]["size"] == 1024
        assert 0 < rows[0]["share"] < 1 and rows[0]["embedding_parameters"] % 1024 == 0
        assert [row["bytes_per_token"] for row in rows] == sorted(row["bytes_per_token"] for row in rows)
    assert b"are not judged" in done.stderr and b"Tokens a word by language" in done.stderr
    other = json.loads(llmkit_here("vocab advise", "back.jsonl", "-m", "tiny,llama-125m", cwd=place).stdout)
    assert other["models"] == found["models"]


def test_extend(place: Path, llmkit_here: Command, make_model: Callable[..., Path]) -> None:
    """Behaviour: a tokenizer directory, or with --model a model with its rows; the same bytes again; the lineage names what was read."""
    import torch

    from llmkit.model.pretrained.checkpoint import load_model

    make_model(place / "base")
    call = ("vocab extend", "tok", "de.jsonl", "--add", "50")
    assert llmkit_here(*call, "-o", "wider", cwd=place).returncode == 0
    assert load_tokenizer_info(place / "wider").vocab_size == 384
    done = llmkit_here(*call, "--model", "base", "-o", "bigger", "--json", cwd=place)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stderr.splitlines()[-1]) | {"added": 50, "size": 384, "rows": 384} == json.loads(
        done.stderr.splitlines()[-1]
    )
    assert load_tokenizer_info(place / "bigger").digest == load_tokenizer_info(place / "wider").digest
    model, info = load_model(place / "bigger")
    old, _ = load_model(place / "base")
    ids = torch.arange(299)[None]
    assert torch.equal(model(ids)[..., :299], old(ids)[..., :299]) and info.config.vocab_size == 384
    record = read_lineage(place / "bigger")
    assert record is not None and record["command"] == "vocab extend"
    assert [(item["role"], item["name"]) for item in record["inputs"]] == [
        ("model", "base"), ("input", "tok"), ("input", "de.jsonl"),
    ]  # fmt: skip
    script = llmkit_here("lineage", "bigger", "--script", cwd=place).stdout.decode()
    assert 'llmkit vocab extend "$IN"/tok "$IN"/de.jsonl' in script and '--model "$IN"/base' in script
    assert b"up to date" in llmkit_here(*call, "--model", "base", "-o", "bigger", cwd=place).stderr
    first = {path.name: path.read_bytes() for path in (place / "bigger").iterdir()}
    assert llmkit_here(*call, "--model", "base", "-o", "bigger", "-f", cwd=place).returncode == 0
    assert {path.name: path.read_bytes() for path in (place / "bigger").iterdir()} == first
    (place / "words.txt").write_text("Mischung\n\nDokument\nMischung\n")
    done = llmkit_here("vocab extend", "tok", "--tokens", "words.txt", "--multiple", "1", "-o", "words", cwd=place)
    assert done.returncode == 0 and b"2 tokens added, 299 to 301" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["vocab report"], 2, "Missing argument"),
        (["vocab report", "nowhere", "--text", "en.jsonl"], 1, "no such tokenizer"),
        (["vocab report", "tok", "--text", "bad.jsonl"], 1, "bad.jsonl:1: invalid JSON"),
        (["vocab report", "tok", "--text", "en.jsonl", "--baseline", "fr"], 2, "--baseline fr"),
        (["vocab report", "tok", "--text", "en.jsonl", "-o", "en.jsonl"], 1, "en.jsonl exists"),
        (["vocab advise", "en.jsonl", "-m", ","], 2, "names no model"),
        (["vocab advise", "en.jsonl", "-m", "125k"], 2, "unknown preset"),
        (["vocab advise", "en.jsonl", "--largest", "500"], 2, "no size to judge"),
        (["vocab advise", "en.jsonl", "-p", "lama-bpe"], 2, "did you mean 'llama-bpe'"),
        (["vocab advise", "en.jsonl"], 1, "too few for any size"),
        (["vocab extend", "tok", "de.jsonl", "-o", "x"], 2, "what to add?"),
        (["vocab extend", "tok", "de.jsonl", "--add", "9", "--tokens", "empty", "-o", "x"], 2, "what to add?"),
        (["vocab extend", "tok", "de.jsonl", "--tokens", "empty", "-o", "x"], 2, "learns nothing from documents"),
        (["vocab extend", "tok", "--tokens", "empty", "-o", "x"], 1, "empty: no words"),
        (["vocab extend", "tok", "--tokens", "nowhere", "-o", "x"], 1, "nowhere"),
        (["vocab extend", "tok", "de.jsonl", "--add", "0", "-o", "x"], 2, "one token at least"),
        (["vocab extend", "tok", "de.jsonl", "--add", "9"], 2, "no output"),
        (["vocab extend", "tok", "de.jsonl", "--add", "9", "-o", "tok"], 1, "tok exists"),
        (["vocab extend", "tok", "de.jsonl", "--add", "1T", "-o", "x", "--multiple", "9000000"], 2, "the largest is"),
        (["vocab extend", "tok", "de.jsonl", "--add", "9", "--model", "tok", "-o", "x"], 1, "not a model directory"),
        (["vocab extend", "words", "de.jsonl", "--add", "9", "-o", "x"], 1, "its model is WordLevel"),
        (["vocab extend", "tok", "bad.jsonl", "--add", "9", "-o", "x"], 1, "bad.jsonl:1: invalid JSON"),
        (["vocab extend", "tok", "empty", "--add", "9", "-o", "x"], 1, "no text to learn from"),
    ],
)
def test_bad_calls(place: Path, llmkit_here: Command, arguments: list[str], code: int, message: str) -> None:
    """Behaviour: exit code, one clear line, a hint, and nothing left behind."""
    (place / "empty").write_text("")
    (place / "bad.jsonl").write_text('{"text": \n')
    (place / "words").mkdir()
    words = {"model": {"type": "WordLevel", "vocab": {"a": 0, "</s>": 1}, "unk_token": "a"}}
    (place / "words" / "tokenizer.json").write_text(json.dumps(words))
    before = sorted(path.name for path in place.iterdir())
    done = llmkit_here(*arguments, cwd=place)
    said = done.stderr.decode()
    assert done.returncode == code and message in said and "hint: " in said and "Traceback" not in said, said
    assert sorted(path.name for path in place.iterdir()) == before
