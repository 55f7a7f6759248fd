"""Records that are there but cannot be read: no command takes them for none."""

from __future__ import annotations

import json
import re
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from llmkit.errors import UnreadableRecordError
from llmkit.io.compression import NOTE_MAGIC
from llmkit.io.document_writer import DocumentWriter
from llmkit.io.record import Lineage, parse_record
from llmkit.lineage.formats import describe_input, read_lineage
from llmkit.lineage.script import as_script, unknown_steps
from llmkit.lineage.tree import as_tree

Call = Callable[..., subprocess.CompletedProcess[bytes]]
ROWS = b"".join(json.dumps({"id": str(i), "text": f"seven birds over {i} stones"}).encode() + b"\n" for i in range(50))


def edit(path: Path, old: bytes, new: bytes) -> None:
    """Replace bytes of a file; nothing may follow that depends on their number."""
    stored = path.read_bytes()
    assert stored.count(old) >= 1, old
    path.write_bytes(stored.replace(old, new, 1))


@pytest.fixture
def artefacts(
    tmp_path: Path, write_shards: Callable[..., Path], make_model: Callable[..., Path], llmkit_here: Call
) -> Path:
    """One artefact of each format, with a record that is cut, is no JSON, or has the wrong type."""
    for name in ("header.jsonl.zst", "trailer.jsonl.zst", "docs.jsonl.gz", "docs.parquet", "list.parquet"):
        with DocumentWriter(str(tmp_path / name), Lineage("filter", {"preset": "c4"})) as writer:
            writer.write(ROWS)
            writer.finish({"documents": 50}, [])
    edit(tmp_path / "header.jsonl.zst", b'"command"', b'"command:')
    edit(tmp_path / "trailer.jsonl.zst", b'"counts":{', b'"counts":[')
    edit(tmp_path / "docs.jsonl.gz", b'"command":"filter"', b'"command"; filter"')
    rewrite_parquet(tmp_path / "docs.parquet", lambda text: text[: len(text) // 2])
    rewrite_parquet(tmp_path / "list.parquet", lambda text: b"[" + text + b"]")
    write_shards(tmp_path / "shards", [20] * 30)
    edit(tmp_path / "shards" / "part-00000.arrow", b'"command"', b'"Command"')
    (tmp_path / "docs.jsonl").write_bytes(ROWS)
    for words in (("vocab", "docs.jsonl", "--size", "300", "-o", "tok"), ("mix", "good", "--plan", "-o", "mix")):
        if words[0] == "mix":
            write_shards(tmp_path / "good", [20] * 30)
        assert llmkit_here(*words, "-q", cwd=tmp_path).returncode == 0
    edit(tmp_path / "tok" / "tokenizer_config.json", b'"command"', b'"Command"')
    edit(tmp_path / "mix" / "plan.toml", b"llmkit = ", b"llmkit = 7 # ")
    make_model(tmp_path / "model", tokenizer=False)
    with_record(tmp_path / "model" / "model.safetensors", '{"command": "average", "inputs": "a"}')
    return tmp_path


def rewrite_parquet(path: Path, change: Callable[[bytes], bytes]) -> None:
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    record = pq.read_metadata(path).metadata[b"llmkit"]
    pq.write_table(table.replace_schema_metadata({b"llmkit": change(record)}), path)


def with_record(path: Path, record: str) -> None:
    """Store the text of a record in the header of a safetensors file."""
    stored = path.read_bytes()
    (length,) = struct.unpack("<Q", stored[:8])
    header = json.loads(stored[8 : 8 + length])
    header["__metadata__"] = {"format": "pt", "llmkit": record}
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + stored[8 + length :])


FILES = {
    "header.jsonl.zst": "a damaged note", "trailer.jsonl.zst": "a damaged note", "docs.jsonl.gz": "a damaged note",
    "docs.parquet": "not JSON", "list.parquet": "not an object", "shards": "names no command", "tok": "names no command",
    "tok/tokenizer.json": "names no command", "mix": "not an object", "model": "wrong type",
}  # fmt: skip


def test_every_format(artefacts: Path, llmkit_here: Call) -> None:
    """Behaviour: of each format, `lineage` fails, naming the file and what is wrong, whatever it should print; as an
    input, the artefact gives one warning, and its description tells the reason."""
    for name, reason in FILES.items():
        path = artefacts / name
        if name != "tok/tokenizer.json":
            for option in ([], ["--script"], ["--check"], ["--json"]):
                done = llmkit_here("lineage", name, *option, cwd=artefacts)
                assert done.returncode == 1 and not done.stdout, (name, option)
                assert name.encode() in done.stderr and reason.encode() in done.stderr, done.stderr
                assert b"is there" in done.stderr and b"no lineage" not in done.stderr
        with pytest.warns(UserWarning, match=f"{re.escape(name.partition('/')[0])}.*{reason}") as caught:
            item = describe_input(path)
        assert len(caught) == 1
        (tree_line,) = as_tree({"command": "x", "inputs": [item.to_dict()]}, "y").splitlines()[1:]
        assert "unknown step" in tree_line and reason in tree_line


@pytest.mark.parametrize(
    ("words", "source"),
    [
        *((("filter", name, "--filter", "length"), name) for name in FILES if name.startswith(("header", "trailer", "docs"))),
        (("tokenize", "--decode", "shards"), "shards"),
        (("vocab", "header.jsonl.zst", "--size", "300"), "header.jsonl.zst"),
    ],
    ids=str,
)  # fmt: skip
def test_a_command_warns_once_and_its_script_names_the_step(
    artefacts: Path, llmkit_here: Call, words: tuple[str, ...], source: str
) -> None:
    """Behaviour: a command that reads such an artefact warns in one line, makes the same content, and the script of its
    output names the step that is not known."""
    output = "tok2" if words[0] == "vocab" else "out.jsonl.zst"
    done = llmkit_here(*words, "-q", "-o", output, cwd=artefacts)
    assert done.returncode == 0
    (line,) = [line for line in done.stderr.decode().splitlines() if "record" in line]
    assert line.startswith(f"llmkit {words[0]}: warning: {source}") and FILES[source] in line
    printed = llmkit_here("lineage", output, "--script", cwd=artefacts)
    assert printed.returncode == 0
    for text in (printed.stderr, printed.stdout):
        assert f"the step that made {source} is unknown".encode() in text
    assert f'original "$IN"/{source} xxh3:'.encode() in printed.stdout


def test_joined_streams_and_inner_records(artefacts: Path, llmkit_here: Call) -> None:
    """Behaviour: of two streams joined by cat, the record of the intact one stays; a record inside a record that has
    another type is named too."""
    with DocumentWriter(str(artefacts / "good.jsonl.zst"), Lineage("dedup")) as writer:
        writer.write(ROWS)
        writer.finish({"documents": 50}, [])
    parts = [(artefacts / name).read_bytes() for name in ("good.jsonl.zst", "trailer.jsonl.zst", "good.jsonl.zst")]
    (artefacts / "all.jsonl.zst").write_bytes(b"".join(parts))
    with pytest.warns(UserWarning, match=r"all\.jsonl\.zst.*damaged note"):
        record = read_lineage(artefacts / "all.jsonl.zst")
    assert record is not None and [bool(item["lineage"].get("command")) for item in record["inputs"]] == [
        True,
        False,
        True,
    ]
    for inner in ([1], {"command": 3}, {"command": "filter", "inputs": [{"name": 1}]}, "text", 0):
        outer = {"command": "dedup", "inputs": [{"name": "a.jsonl.zst", "digest": "1", "lineage": inner}]}
        assert len(unknown_steps(outer)) == 1
        assert "# the step that made a.jsonl.zst is unknown" in as_script(outer, "x", lambda command: {})


def test_what_is_no_record_of_ours_is_none(tmp_path: Path) -> None:
    """Behaviour: an empty slot, notes of other tools, and broken files of others have no record, without a warning."""
    assert parse_record(None, "x") is None
    (tmp_path / "preset.toml").write_text("name = [")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": ')
    with DocumentWriter(str(tmp_path / "docs.jsonl.zst"), Lineage("filter")) as writer:
        writer.write(ROWS)
        writer.finish({"documents": 50}, [])
    foreign = NOTE_MAGIC + struct.pack("<I", 4) + b"tool"
    (tmp_path / "docs.jsonl.zst").write_bytes(foreign + (tmp_path / "docs.jsonl.zst").read_bytes())
    assert read_lineage(tmp_path / "preset.toml") is None and read_lineage(tmp_path) is None
    assert (read_lineage(tmp_path / "docs.jsonl.zst") or {}).get("command") == "filter"
    for text in ("{", "[1]", "3", '{"options": {}}', "[" * 100_000, '{"command": ' + "9" * 10_000 + "}"):
        with pytest.raises(UnreadableRecordError, match="x: its lineage record is there"):
            parse_record(text, "x")
