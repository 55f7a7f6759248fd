"""Token shards: documents are read back as written, and anything else is refused."""

from __future__ import annotations

import dataclasses
import errno
import io
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.errors import LlmkitError, UsageError
from llmkit.io.record import Lineage
from llmkit.io.splice import raw_values
from llmkit.lineage.formats import digest_path, read_lineage
from llmkit.shards import writer as shards
from llmkit.shards.arrow import as_arrow
from llmkit.shards.lineage import shard_digest
from llmkit.shards.reader import TokenStore, load_tokenizer_info
from llmkit.shards.tokenizer_info import TokenizerInfo, parse_tokenizer
from llmkit.shards.writer import ShardWriter

BARE = TokenizerInfo("xxh3:0", 300, 0)
Write = Callable[..., Path]
Documents = list[tuple[list[int], str, str, int]]

documents = st.lists(
    st.tuples(
        st.lists(st.integers(0, 299), max_size=12),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
        st.sampled_from(["web", "code", "", "ü"]),
        st.integers(0, 3),
    ),
    max_size=30,
)


def write_all(path: Path, content: Documents, **options: Any) -> None:
    with ShardWriter(str(path), BARE, Lineage("tokenize"), epochs=True, **options) as writer:
        for document in content:
            writer.write(*document)
        writer.finish({"documents": len(content)}, [])


@given(documents, st.sampled_from(["one.arrow", "parts"]), st.integers(1, 40), st.integers(1, 20), st.data())
@settings(max_examples=30, deadline=None)
def test_documents_are_read_back(content: Documents, name: str, part: int, batch: int, data: st.DataObject) -> None:
    """Property: tokens, ids, sources and epochs are read back, whatever the sizes of shards and batches; any span is a slice of the flat order."""
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "BATCH_TOKENS", batch)
        path = Path(directory) / name
        write_all(path, content, max_tokens_per_shard=part)
        store = TokenStore.open(str(path))
        flat = [token for tokens, *_ in content for token in tokens]
        assert (store.documents, store.tokens) == (len(content), len(flat))
        found = [
            (store.document(i).tolist(), store.id(i), store.source(i), store.epoch(i)) for i in range(len(content))
        ]
        assert found == content
        start = data.draw(st.integers(0, len(flat)))
        stop = data.draw(st.integers(start, len(flat)))
        assert store.span(start, stop).tolist() == flat[start:stop]
        store.verify()
        record = read_lineage(path)
        assert record is not None and record["digest"] == shard_digest(path) == store.inputs[0].digest == digest_path(
            path
        )
        assert record["counts"] == {"documents": len(content)}


@given(documents, st.integers(1, 40), st.integers(1, 20), st.integers(1, 6), st.data())
@settings(max_examples=60, deadline=None)
def test_extend_equals_repeated_write(
    content: Documents, part: int, batch: int, rows: int, data: st.DataObject
) -> None:
    """Property: the bytes depend neither on the number of documents per call nor on the numbering of their sources."""
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "BATCH_TOKENS", batch)
        patch.setattr(shards, "BATCH_DOCUMENTS", rows)
        one, many = Path(directory) / "one", Path(directory) / "many"
        write_all(one, content, max_tokens_per_shard=part)
        names = data.draw(st.permutations(["unused", *dict.fromkeys(source for _, _, source, _ in content)]))
        with ShardWriter(str(many), BARE, Lineage("tokenize"), epochs=True, max_tokens_per_shard=part) as writer:
            at = 0
            while at < len(content):
                some = content[at : (at := at + data.draw(st.integers(0, len(content))))]
                flat = np.array([token for tokens, *_ in some for token in tokens], np.uint16)
                lengths = np.array([len(tokens) for tokens, *_ in some], np.int64)
                codes = np.array([names.index(source) for _, _, source, _ in some], np.int32)
                epochs = np.array([epoch for *_, epoch in some], np.int32)
                writer.extend(flat, lengths, as_arrow([id for _, id, _, _ in some]), (codes, names), epochs)
            writer.finish({"documents": len(content)}, [])
        assert {path.name: path.read_bytes() for path in one.iterdir()} == {
            path.name: path.read_bytes() for path in many.iterdir()
        }


def test_any_arrow_library_reads_it(tmp_path: Path, write_shards: Write) -> None:
    """Parity: pyarrow alone reads the same documents, with the types of the format."""
    path = write_shards(tmp_path / "a.arrow", [3, 0, 5])
    table = pa.ipc.open_stream(path.read_bytes()).read_all()
    store = TokenStore.open(str(path))
    assert table.column("tokens").to_pylist() == [store.document(i).tolist() for i in range(3)]
    assert table.column("id").to_pylist() == ["web-0", "web-1", "web-2"]
    assert table.schema.field("tokens").type.value_type == pa.uint16()
    assert pa.types.is_dictionary(table.schema.field("source").type)


@pytest.mark.parametrize(("size", "kind"), [(1 << 16, np.uint16), ((1 << 16) + 1, np.uint32)])
def test_width_by_vocabulary(tmp_path: Path, size: int, kind: type) -> None:
    """Behaviour: two bytes per token as long as they suffice; the largest id is read back."""
    info = dataclasses.replace(BARE, vocab_size=size)
    with ShardWriter(str(tmp_path / "a.arrow"), info, Lineage("tokenize")) as writer:
        writer.write([0, size - 1], "a", "web")
        writer.finish({}, [])
    tokens = TokenStore.open(str(tmp_path / "a.arrow")).document(0)
    assert tokens.dtype == kind and tokens.tolist() == [0, size - 1]


def test_batches_are_bounded(tmp_path: Path, write_shards: Write) -> None:
    """Behaviour: a batch closes at about a million tokens, so memory does not grow with the input."""
    path = write_shards(tmp_path / "a.arrow", [300_000] * 9)
    sizes = [len(batch.column("tokens").flatten()) for batch in pa.ipc.open_stream(path.read_bytes())]
    assert sizes == [1_200_000, 1_200_000, 300_000, 0]


def test_reading_copies_nothing(tmp_path: Path, write_shards: Write) -> None:
    """Behaviour: documents and spans are read-only views of one mapping."""
    store = TokenStore.open(str(write_shards(tmp_path / "a.arrow", [50, 60])))
    document, span = store.document(1), store.span(40, 100)
    assert not document.flags.owndata and not document.flags.writeable and np.shares_memory(document, span)


def test_equal_content_gives_equal_bytes(tmp_path: Path, write_shards: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """Property: writing twice gives the same bytes; other batch sizes give the same digest."""
    first = write_shards(tmp_path / "a.arrow", [30, 1, 200])
    assert write_shards(tmp_path / "b.arrow", [30, 1, 200]).read_bytes() == first.read_bytes()
    monkeypatch.setattr(shards, "BATCH_TOKENS", 30)
    other = write_shards(tmp_path / "c.arrow", [30, 1, 200])
    assert other.read_bytes() != first.read_bytes() and shard_digest(other) == shard_digest(first)


def test_tokenizer_travels_with_the_shards(
    tmp_path: Path, write_shards: Write, small_tokenizer: dict[str, str]
) -> None:
    """Behaviour: the tokenizer is inside single files, and beside the shards of a directory; both are read as the same."""
    expected = parse_tokenizer(small_tokenizer, "small")
    for name in ("one.arrow", "parts"):
        path = write_shards(tmp_path / name, [5, 5])
        info = TokenStore.open(str(path)).tokenizer
        assert info == expected and info.files == small_tokenizer
        assert load_tokenizer_info(path) == expected
    schema = pa.ipc.open_stream((tmp_path / "parts" / "part-00000.arrow").read_bytes()).schema
    assert b"llmkit.tokenizer_files" not in schema.metadata


def test_truncated_shards_are_refused(tmp_path: Path, write_shards: Write) -> None:
    """Behaviour: a shard truncated at any byte is refused; the message names the file."""
    intact = write_shards(tmp_path / "intact.arrow", [40, 3, 80]).read_bytes()
    cut = tmp_path / "cut.arrow"
    for size in [*range(0, len(intact) - 8, 61), *range(len(intact) - 300, len(intact) - 8)]:
        cut.write_bytes(intact[:size])
        with pytest.raises(LlmkitError, match=r"cut\.arrow"):
            TokenStore.open(str(cut))


@pytest.mark.filterwarnings("ignore:.*lineage record")
def test_damage_anywhere_never_crashes(tmp_path: Path, write_shards: Write) -> None:
    """Property: a shard with changed bytes is read, or refused with an error that names it; Arrow alone would crash the process."""
    intact = write_shards(tmp_path / "intact.arrow", [40, 3, 80] * 8).read_bytes()
    path = tmp_path / "bad.arrow"
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(400):
        data = bytearray(intact)
        for position in random.integers(0, len(data), random.integers(1, 4)):
            data[position] = random.choice([0, 255, data[position] ^ 1 << random.integers(8)])
        path.write_bytes(data)
        try:
            store = TokenStore.open(str(path))
            for i in range(store.documents):
                assert store.document(i).sum() >= 0 and store.epoch(i) == 0
                assert isinstance(store.id(i) + store.source(i), str)
            store.verify()
        except LlmkitError as error:
            refused += "bad.arrow" in error.message
    assert refused > 100


def stream(schema: pa.Schema, *batches: pa.RecordBatch) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return sink.getvalue()


def test_foreign_files_are_refused(tmp_path: Path, write_shards: Write) -> None:
    """Behaviour: the message names the file and the reason."""
    intact = write_shards(tmp_path / "intact.arrow", [40, 3]).read_bytes()
    reader = pa.ipc.open_stream(intact)
    batch = pa.record_batch({"x": [1, 2]})
    arrow_file = io.BytesIO()
    with pa.ipc.new_file(arrow_file, batch.schema) as writer:
        writer.write_batch(batch)
    retyped = pa.schema([pa.field("tokens", pa.list_(pa.int64())), *list(reader.schema)[1:]], reader.schema.metadata)
    cases = {
        "no trailer": (stream(reader.schema, *list(reader)[:1]), "before its trailer"),
        "another stream": (stream(batch.schema, batch), "not a token shard"),
        "an Arrow file": (arrow_file.getvalue(), "not an Arrow stream"),
        "documents": (b'{"text": "x"}\n', "not a token shard"),
        "empty": (b"", "empty file"),
        "other columns": (stream(retyped), "has type"),
        "two streams": (intact + intact, "bytes follow"),
    }
    for name, (data, message) in cases.items():
        (tmp_path / "bad.arrow").write_bytes(data)
        with pytest.raises(LlmkitError, match=rf"bad\.arrow: .*{message}"):
            TokenStore.open(str(tmp_path / "bad.arrow"))
        assert name
    (tmp_path / "bare").mkdir()
    for path, message in ((tmp_path / "bare", "no token shards"), (tmp_path / "nowhere", "no such file")):
        with pytest.raises(LlmkitError, match=message):
            TokenStore.open(str(path))


@pytest.mark.parametrize("number", [0, 1, 3])
def test_missing_shards_are_reported(tmp_path: Path, write_shards: Write, number: int) -> None:
    """Behaviour: a directory without its first, a middle or its last shard is refused."""
    path = write_shards(tmp_path / "parts", [30] * 8, max_tokens_per_shard=60)
    assert len(list(path.glob("*.arrow"))) == 4
    (path / f"part-{number:05d}.arrow").unlink()
    with pytest.raises(LlmkitError, match=f"part-{number:05d}.arrow is missing"):
        TokenStore.open(str(path))


def test_other_tokenizers_are_refused(tmp_path: Path, write_shards: Write, small_tokenizer: dict[str, str]) -> None:
    """Behaviour: shards of two tokenizers are not read together, nor shards beside a tokenizer.json of another tokenizer."""
    a = write_shards(tmp_path / "a.arrow", [5])
    b = write_shards(tmp_path / "b.arrow", [5], tokenizer=BARE)
    with pytest.raises(LlmkitError, match=r"b\.arrow: made with another tokenizer than .*a\.arrow"):
        TokenStore.open([str(a), str(b)])
    parts = write_shards(tmp_path / "parts", [5])
    (parts / "tokenizer.json").write_text(small_tokenizer["tokenizer.json"].replace('"fo"', '"fö"'))
    with pytest.raises(LlmkitError, match="not the one that made them"):
        TokenStore.open(str(parts))


def test_verify_finds_changed_tokens(tmp_path: Path, write_shards: Write) -> None:
    """Behaviour: the recomputed digest differs from the trailer's when one token changes."""
    path = write_shards(tmp_path / "a.arrow", [100])
    data = bytearray(path.read_bytes())
    position = data.find(TokenStore.open(str(path)).document(0).tobytes())
    data[position + 20] ^= 1
    (tmp_path / "b.arrow").write_bytes(data)
    with pytest.raises(LlmkitError, match=r"b\.arrow: the content does not match its digest"):
        TokenStore.open(str(tmp_path / "b.arrow")).verify()


@pytest.mark.parametrize("stored", ["parts", "a.arrow"])
def test_readers_refuse_damaged_shards(
    tmp_path: Path, write_shards: Write, llmkit_here: Callable[..., Any], stored: str
) -> None:
    """Behaviour: a changed token, id or tokenizer is an error of each command that reads shards, one that follows a plan
    too; a change of the record is not. A copy without a digest of all bytes, as earlier versions wrote, is read."""
    from llmkit.training.inputs import open_stream

    path = write_shards(tmp_path / stored, [60, 70, 80], **({"max_tokens_per_shard": 100} if stored == "parts" else {}))
    file = path / "part-00001.arrow" if path.is_dir() else path
    intact, store = file.read_bytes(), TokenStore.open(str(path))
    assert llmkit_here("mix", stored, "--plan", "-o", "p.toml", cwd=tmp_path).returncode == 0
    token = store.document(1).tobytes()[:40]
    changes = [
        ("content", token, b"\1" + token[1:]),
        ("content", store.id(1).encode(), b"x" * len(store.id(1))),
        ("metadata", b'"bos_id":null', b'"bos_id":1   '),
        ("", b'"command":"tokenize"', b'"command":"tokenise"'),
        ("", b'"bytes":', b'"bytez":'),
    ]
    for message, old, new in changes:
        assert old in intact
        file.write_bytes(intact.replace(old, new))
        for data in (path, tmp_path / "p.toml"):
            with pytest.raises(LlmkitError, match=message) if message else nullcontext():
                open_stream(str(data), None)  # type: ignore[arg-type]
        for words in (("mix", stored), ("tokenize", "--decode", stored), ("tokenize", stored, "--to", "jsonl")):
            done = llmkit_here(*words, "-f", "-q", "-o", "o.jsonl" if words[0] == "tokenize" else "m", cwd=tmp_path)
            assert done.returncode == bool(message), done.stderr
            assert not message or (message.encode() in done.stderr and b"llmkit lineage --check" in done.stderr)


def test_failed_writes_leave_no_file(tmp_path: Path) -> None:
    """Behaviour: an exception, such as for ids over the vocabulary, leaves no file."""
    for name in ("a.arrow", "parts"):
        with pytest.raises(LlmkitError, match="token id 300 is over the vocabulary of 300"):
            write_all(tmp_path / name, [([300], "a", "web", 0)])
    assert list(tmp_path.iterdir()) == []
    write_all(tmp_path / "a.arrow", [])
    with pytest.raises(LlmkitError, match=r"a\.arrow exists"):
        write_all(tmp_path / "a.arrow", [])


def test_terminal_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behaviour: binary output to a terminal is a usage error, before any work."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    with pytest.raises(UsageError, match="terminal"):
        ShardWriter(None, BARE, Lineage("tokenize"))


@pytest.mark.parametrize("kept", [True, False])
def test_stdin_is_spooled(tmp_path: Path, write_shards: Write, monkeypatch: pytest.MonkeyPatch, kept: bool) -> None:
    """Behaviour: a stream is mapped from a temporary file, or from one that is kept; messages and lineage call it stdin."""
    path = write_shards(tmp_path / "a.arrow", [7, 9])
    with open(path) as source:
        monkeypatch.setattr(sys, "stdin", source)
        store = TokenStore.open("-", spool=tmp_path / "kept.arrow" if kept else None)
    assert store.span(0, 16).tolist() == TokenStore.open(str(path)).span(0, 16).tolist()
    assert store.inputs[0].name == "-" and (tmp_path / "kept.arrow").exists() == kept
    shutil.copy(path, tmp_path / "cut.arrow")
    with open(tmp_path / "cut.arrow", "r+b") as cut:
        cut.truncate(200)
    with open(tmp_path / "cut.arrow") as source:
        monkeypatch.setattr(sys, "stdin", source)
        with pytest.raises(LlmkitError, match="<stdin>: truncated"):
            TokenStore.open("-")


def test_malformed_tokenizers(tmp_path: Path, small_tokenizer: dict[str, str]) -> None:
    """Behaviour: a malformed tokenizer.json is refused with a message that names it."""
    cases = {
        "{": "not valid JSON",
        "[]": "not a JSON object",
        "{}": "malformed",
        '{"model": {"type": "Magic", "vocab": {"a": 0}}}': "unknown tokenizer model 'Magic'",
        '{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}': "malformed",
        '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}': "has no end-of-text token",
    }
    for text, message in cases.items():
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(LlmkitError, match=message):
            load_tokenizer_info(tmp_path)
    with pytest.raises(LlmkitError, match="no such tokenizer"):
        load_tokenizer_info(tmp_path / "nowhere")
    (tmp_path / "bare").mkdir()
    with pytest.raises(LlmkitError, match=r"no tokenizer\.json"):
        load_tokenizer_info(tmp_path / "bare")
    layout = {**small_tokenizer, "tokenizer.json": small_tokenizer["tokenizer.json"].replace(" ", "  ", 1)}
    assert parse_tokenizer(layout, "x").digest == parse_tokenizer(small_tokenizer, "y").digest


def test_ids_and_sources_stay_json(llmkit: Callable[..., Any], tmp_path: Path, small_tokenizer: dict[str, str]) -> None:
    """Behaviour: ids and sources that are not text come back as they were in JSON lines of ids and of texts, straight
    and through shards, mixes and held-out parts."""
    values = [
        b"7",
        b'"7"',
        b"18446744073709551617",
        b"1.5",
        b'"a"',
        b"null",
        b"true",
        b"-3",
        b"[1, null]",
        b'{"a": "b"}',
    ] * 32
    rows = [b'{"id":%s,"text":"a %d","source":%s}\n' % (id, i, values[i // 10]) for i, id in enumerate(values)]
    (tmp_path / "d.jsonl").write_bytes(b"".join(rows))
    (tmp_path / "tok").mkdir()
    for name, text in small_tokenizer.items():
        (tmp_path / "tok" / name).write_text(text)
    for call in (
        ("tokenize", "d.jsonl", "-t", "tok", "-o", "s", "--max-tokens-per-shard", "200"),
        ("mix", "s", "--holdout", "20%", "-o", "m"),
        ("tokenize", "d.jsonl", "-t", "tok", "--to", "jsonl", "-o", "direct.jsonl"),
        *(("tokenize", name, "--to", "jsonl", "-o", f"{out}.jsonl") for name, out in (("s", "s"), ("m", "m"), ("m/heldout", "h"))),
        ("tokenize", "--decode", "s", "-o", "texts.jsonl"),
    ):  # fmt: skip
        done = llmkit(*call, cwd=tmp_path)
        assert done.returncode == 0, done.stderr

    def origins(*names: str) -> list[tuple[bytes, bytes]]:
        lines = b"".join((tmp_path / name).read_bytes() for name in names).splitlines()
        return [(fields["id"], fields["source"]) for fields in map(raw_values, lines)]

    direct = origins("direct.jsonl")
    expected = [(id, b'"d"' if values[i // 10] == b"null" else values[i // 10]) for i, id in enumerate(values)]
    assert [(b"null" if len(id) > 30 else id, source) for id, source in direct] == expected
    assert origins("s.jsonl") == direct == origins("texts.jsonl")
    assert sorted(origins("m.jsonl", "h.jsonl")) == sorted(direct) and origins("h.jsonl")
    TokenStore.open([str(tmp_path / "s"), str(tmp_path / "m")]).verify()
    (tmp_path / "p.jsonl").write_text('{"text": "a", "source": "<padding>"}\n')
    assert (
        b"p.jsonl:1: the source '<padding>' is reserved"
        in llmkit("tokenize", "p.jsonl", "-t", "tok", cwd=tmp_path).stderr
    )


@pytest.mark.skipif(sys.platform != "linux", reason="counts the files in /proc/self/fd")
def test_mapped_shards_are_not_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behaviour: a store of any number of shards keeps none of their files open, and can still be read and verified."""
    write_all(tmp_path / "parts", [([number], "a", "", 0) for number in range(50)], max_tokens_per_shard=1)
    before = len(list(Path("/proc/self/fd").iterdir()))
    store = TokenStore.open(str(tmp_path / "parts"))
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2
    assert [store.document(number).tolist() for number in range(50)] == [[number] for number in range(50)]
    assert all(shard.is_sealed() for shard in store.shards)


def test_a_limit_of_open_files_is_named(
    tmp_path: Path, llmkit_here: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: where a file cannot be opened because too many are, the hint names the limit, not its permissions."""
    from llmkit.shards import shard

    def too_many(*_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    write_all(tmp_path / "one.arrow", [([1], "a", "", 0)])
    monkeypatch.setattr(shard, "open", too_many, raising=False)
    done = llmkit_here("mix", str(tmp_path / "one.arrow"), "--tokens", "1", "-o", str(tmp_path / "out"))
    assert done.returncode == 1 and b"Too many open files" in done.stderr and b"ulimit -n" in done.stderr
