"""Any command with files whose names are not UTF-8, and in a locale whose encoding is not UTF-8."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest

from llmkit.lineage.formats import read_lineage

Command = Callable[..., subprocess.CompletedProcess[bytes]]
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
TEXT = "Ein Käse, zwei Käse und noch viele mehr, die hier in Reihe {} liegen."


def named(name: str) -> str:
    """A name with Latin-1, a space and a line break in it."""
    return os.fsdecode(b"caf\xe9 \n" + name.encode())


@pytest.fixture
def place(tmp_path: Path, small_tokenizer: dict[str, str]) -> Path:
    rows = [orjson.dumps({"id": str(i), "text": TEXT.format(i) * 3}) + b"\n" for i in range(60)]
    (tmp_path / named("in.jsonl")).write_bytes(b"".join(rows))
    (tmp_path / named("bad.jsonl")).write_bytes(rows[0] + b"{bad\n")
    (tmp_path / named("list")).write_bytes(os.fsencode(named("in.jsonl")) + b"\0")
    (tmp_path / named("tok")).mkdir()
    for name, text in small_tokenizer.items():
        (tmp_path / named("tok") / name).write_text(text)
    return tmp_path


def test_every_kind_of_file(place: Path, llmkit: Command, preloaded_bin: Path) -> None:
    """Behaviour: inputs, outputs, rejects, summaries, quarantine, lists, configurations, tokenizers, shards, plans and
    foreign formats of such names work; records and reports escape them; the script makes the same again.
    """

    def call(*words: str, code: int = 0) -> subprocess.CompletedProcess[bytes]:
        done = llmkit(*words, cwd=place)
        assert done.returncode == code, done.stderr
        return done

    source, shards, mix = named("in.jsonl"), named("shards"), named("mix")
    call("filter", source, "--rejects", named("r.jsonl"), "-o", named("f.jsonl.zst"), "--summary", named("s.json"))
    call("filter", "--files-from", named("list"), "-o", named("f.parquet"))
    done = call("filter", named("bad.jsonl"), "-o", named("b.jsonl"), code=1)
    assert rb"error: caf\xe9 \nbad.jsonl:2: invalid JSON" in done.stderr
    error = orjson.loads(call("filter", named("bad.jsonl"), "-o", named("b.jsonl"), "--json", code=1).stderr)["error"]
    assert error["file"] == "caf\\xe9 \nbad.jsonl" and error["line"] == 2
    call("filter", named("bad.jsonl"), "--on-bad-line", "quarantine=" + named("q.jsonl"), "-o", named("b.jsonl.zst"))
    assert orjson.loads((place / named("q.jsonl")).read_bytes())["file"] == "caf\\xe9 \nbad.jsonl"
    (place / named("c.toml")).write_bytes(call("dedup", source, "-o", named("d.jsonl.zst"), "--print-config").stdout)
    call("dedup", source, "-c", named("c.toml"))
    assert (place / named("d.jsonl.zst")).exists()
    call("tokenize", named("d.jsonl.zst"), "-t", named("tok"), "-o", shards, "--stats")
    call("tokenize", "--decode", shards, "-o", named("decoded.jsonl"))
    for form, name in (("megatron", "m.idx"), ("nanogpt", "n.bin")):
        call("tokenize", shards, "--to", form, "-o", named(name))
        call("tokenize", named(name), "--from", form, "-t", named("tok"), "-o", named(f"{form}.arrow"))
    done = call("mix", f"{shards}:1.0", "--holdout", "10%", "-o", mix, "--json")
    assert orjson.loads(done.stderr.splitlines()[-1])["sources"][0]["source"] == "caf\\xe9 \nshards"
    call("mix", shards, "--plan", "-o", named("p.toml"))
    call("vocab", "report", named("tok"), "--text", source, "-o", named("v.json"))
    assert b"\\xe9" in (place / named("v.json")).read_bytes()
    record = read_lineage(place / shards)
    assert record and record["options"]["tokenizer"] == "caf\\xe9 \ntok"
    assert "caf\\xe9 \nd.jsonl.zst" in [item["name"] for item in record["inputs"]]
    assert b"caf\\xe9 \\nd.jsonl.zst" in call("lineage", shards).stdout
    assert b"DIFFERS" not in call("lineage", shards, "--check", "--inputs", ".").stdout
    (place / "again.sh").write_bytes(call("lineage", mix, "--script").stdout)
    environment = os.environ | {"PATH": f"{preloaded_bin}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "again.sh", ".", "again"], cwd=place, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    part = "part-00000.arrow"
    assert (place / "again" / mix / part).read_bytes() == (place / mix / part).read_bytes()
    call("dedup", source, "--index", named("i.duckdb"), "-o", named("i.jsonl.zst"), code=2)


def test_ascii_locale(place: Path, llmkit_anew: Command) -> None:
    """Behaviour: in a locale of ASCII, texts, lists and names in UTF-8 are read and written as in any other."""
    (place / "größe.jsonl").write_bytes((place / named("in.jsonl")).read_bytes())
    (place / "list").write_text("größe.jsonl\n", encoding="utf-8")
    shutil.copytree(place / named("tok"), place / "wörter")
    for words in (
        ("tokenize", "--files-from", "list", "-t", "wörter", "--source", "Käse", "-q", "-o"),
        ("tokenize", "--decode", "{}.arrow", "-q", "-o"),
    ):
        suffix = ".jsonl" if "--decode" in words else ".arrow"
        for name, locale in (("a", ASCII), ("ü", {"LC_ALL": "C.UTF-8"})):
            done = llmkit_anew(*(word.format(name) for word in words), name + suffix, cwd=place, env=locale)
            assert done.returncode == 0, done.stderr
        assert (place / f"a{suffix}").read_bytes() == (place / f"ü{suffix}").read_bytes()
    assert "Käse" in (place / "a.jsonl").read_text(encoding="utf-8")
    done = llmkit_anew("lineage", "ü.arrow", cwd=place, env=ASCII)
    assert "größe.jsonl" in done.stdout.decode()
    done = llmkit_anew("filter", "nicht-da-ß.jsonl", cwd=place, env=ASCII)
    assert done.returncode == 1 and "nicht-da-ß.jsonl" in done.stderr.decode()
