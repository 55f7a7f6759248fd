"""Headers and streams that ask for far more than a record: they end at once, within little memory."""

from __future__ import annotations

import io
import json
import struct
import time
import tracemalloc
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.errors import LlmkitError
from llmkit.io.compression import NOTE_MAGIC, Notes, StoredFrame, decompress, encode_note
from llmkit.io.record import join_notes
from llmkit.lineage.documents import read_record
from llmkit.model.pretrained import content, header


def safetensors(path: Path, text: bytes) -> Path:
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    return path


def tensors(shape: list[int], stop: int) -> bytes:
    return json.dumps({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, stop]}}).encode()


@pytest.mark.parametrize("shape", [[10**4000] * 300, [1 << 40, 1 << 40], [1] * 65, [-1, -4]])
def test_impossible_shapes_end_at_once(tmp_path: Path, shape: list[int]) -> None:
    """Behaviour: sizes are multiplied no further than to the size of the file."""
    started = time.process_time()
    with pytest.raises(LlmkitError, match="shape"):
        header.read_header(safetensors(tmp_path / "m.safetensors", tensors(shape, 16)))
    assert time.process_time() - started < 2


def test_empty_tensors_are_read(tmp_path: Path) -> None:
    """Behaviour: a tensor with a side of zero is empty, however long the others are."""
    file = safetensors(tmp_path / "m.safetensors", tensors([1 << 40, 0], 0))
    assert header.read_header(file)["w"].shape == (1 << 40, 0)


@pytest.mark.parametrize("value", [b"{}", b"[]", b"1"])
def test_a_header_of_many_values_takes_little_memory(tmp_path: Path, value: bytes) -> None:
    """Behaviour: all that read a header refuse one that grows to many times its size."""
    file = safetensors(tmp_path / "m.safetensors", b'{"a":[' + value + (b"," + value) * (5 << 20) + b"]}")
    tracemalloc.start()
    for read in (header.read_header, lambda path: header.read_record(str(path)), content.verify):
        with pytest.raises(LlmkitError, match="not a readable safetensors file"):
            read(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 20


def note(kind: str) -> bytes:
    payload = encode_note(kind, {"command": "filter", "counts": {}})
    return NOTE_MAGIC + struct.pack("<I", len(payload)) + payload


def test_a_record_is_found_without_decompressing(tmp_path: Path) -> None:
    """Behaviour: the record of a stream of 64 GB in 2 MB is found by stepping over its blocks."""
    block, last = (struct.pack("<I", (1 << 17) << 3 | 1 << 1 | end)[:3] + b"\0" for end in (0, 1))
    frame = b"\x28\xb5\x2f\xfd\0\x38" + block * (1 << 19) + last
    (file := tmp_path / "d.jsonl.zst").write_bytes(note("header") + frame + note("trailer"))
    started = time.process_time()
    assert (read_record(str(file)) or {})["command"] == "filter" and time.process_time() - started < 5


PARTS = st.one_of(
    st.binary(max_size=300).map(lambda data: zstandard.ZstdCompressor(write_content_size=len(data) % 2 == 0).compress(data)),
    st.binary(max_size=300).map(lambda data: (lambda frame: frame.compress(data) + frame.flush())(StoredFrame())),
    st.binary(max_size=300).map(lambda data: b"\x50\x2a\x4d\x18" + struct.pack("<I", len(data)) + data),
    st.integers(1, 1 << 20).map(
        lambda size: zstandard.ZstdCompressor(write_checksum=True).compress(b"a" * size)
    ),
    st.sampled_from([note("header"), note("trailer")]),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.lists(PARTS, min_size=1, max_size=5), st.integers(0, 40))
def test_notes_are_those_of_a_full_read(tmp_path_factory: pytest.TempPathFactory, parts: list[bytes], cut: int) -> None:
    """Parity with decompression: the same record, or an error as well, for any sequence of frames, cut or not."""
    data = b"".join(parts)
    data = data[: len(data) - cut] if cut < 20 else data
    if data[:4] not in (b"\x28\xb5\x2f\xfd", NOTE_MAGIC, b"\x50\x2a\x4d\x18"):
        return
    (file := tmp_path_factory.mktemp("stream") / "d.zst").write_bytes(data)

    def fully() -> object:
        notes = Notes()
        for _ in decompress(io.BytesIO(data), str(file), notes):
            pass
        return join_notes(notes.entries, str(file))

    def outcome(read: object) -> object:
        try:
            return read()  # type: ignore[operator]
        except LlmkitError as error:
            return error.message

    assert outcome(lambda: read_record(str(file))) == outcome(fully)
