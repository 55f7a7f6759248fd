"""Token files of other trainers: nanoGPT's, llm.c's, Megatron-LM's."""

from __future__ import annotations

import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.errors import InputWarning, LlmkitError
from llmkit.shards import token_block
from llmkit.shards.formats import FOREIGN_FORMATS, megatron, nanogpt
from llmkit.shards.token_block import TokenBlock
from llmkit.shards.tokenizer_info import TokenizerInfo

SMALL, WIDE = TokenizerInfo("xxh3:0", 300, 0), TokenizerInfo("xxh3:1", 70_001, 0)
# Written by megatron-core 0.16.1's IndexedDatasetBuilder: uint16 [5 6 0], [7 8] and [9 0] as one document, [4]; int32 [5 70000 0].
MEGATRON_16 = (
    "4d4d494449445800000100000000000000080400000000000000040000000000000003000000020000000200000001000000000000000000000006000000000000000a0000"
    "00000000000e000000000000000000000000000000010000000000000003000000000000000400000000000000",
    "05000600000007000800090000000400",
)
MEGATRON_32 = (
    "4d4d494449445800000100000000000000040100000000000000020000000000000003000000000000000000000000000000000000000100000000000000",
    "050000007011010000000000",
)


def write(path: Path, kind: str, info: TokenizerInfo, *blocks: list[list[int]], force: bool = False) -> None:
    dtype = np.uint16 if info.vocab_size <= 1 << 16 else np.uint32
    with FOREIGN_FORMATS.get(kind).writer(str(path), info, force=force) as writer:
        for documents in blocks:
            flat = np.array([id for tokens in documents for id in tokens], dtype)
            writer.write(TokenBlock(flat, np.array([len(tokens) for tokens in documents], np.int64), [], []))
        writer.finish({}, [])


def tokens_of(blocks: list[TokenBlock]) -> list[list[int]]:
    return [tokens.tolist() for block in blocks for tokens, _, _ in block.documents()]


def read_by_specification(prefix: str) -> list[list[int]]:
    """Another reader of Megatron's files, from the layout that Megatron-LM's indexed_dataset.py describes."""
    with open(prefix + ".idx", "rb") as index:
        assert index.read(9) == b"MMIDIDX\0\0" and struct.unpack("<Q", index.read(8)) == (1,)
        form = {8: "H", 4: "i"}[index.read(1)[0]]
        sequences, documents = struct.unpack("<QQ", index.read(16))
        lengths = struct.unpack(f"<{sequences}i", index.read(4 * sequences))
        byte_offsets = struct.unpack(f"<{sequences}q", index.read(8 * sequences))
        first_sequences = struct.unpack(f"<{documents}q", index.read(8 * documents))
        assert index.read() == b""
    data = Path(prefix + ".bin").read_bytes()
    assert first_sequences == (*range(sequences), sequences)
    return [
        list(struct.unpack_from(f"<{n}{form}", data, offset)) for n, offset in zip(lengths, byte_offsets, strict=True)
    ]


@given(
    documents=st.lists(st.lists(st.integers(1, 299), min_size=1, max_size=9), max_size=12),
    wide=st.booleans(),
    block=st.integers(1, 20),
    cut=st.integers(0, 12),
)
@settings(max_examples=25, deadline=None)
def test_written_documents_are_read_back(documents: list[list[int]], wide: bool, block: int, cut: int) -> None:
    """Property: documents come back from both formats, however they are cut into blocks; the bytes follow the specification."""
    info = WIDE if wide else SMALL
    ended = [[*tokens[:-1], 70_000 if wide else tokens[-1], 0] for tokens in documents]
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_block, "BLOCK_TOKENS", block)
        for kind, name in (("nanogpt", "a.bin"), ("megatron", "b")):
            path = Path(directory, name)
            write(path, kind, info, ended[:cut], ended[cut:])
            blocks = list(FOREIGN_FORMATS.get(kind).read(str(path), info, None))
            assert tokens_of(blocks) == ended and sum(b.ended + b.empty for b in blocks) == 0
            assert {source for b in blocks for source in b.sources} <= {path.stem}
            ids = [id for b in blocks for id in b.ids]
            assert len(set(ids)) == len({tuple(tokens) for tokens in ended})
        flat = np.fromfile(Path(directory, "a.bin"), np.uint32 if wide else np.uint16)
        assert flat.tolist() == [id for tokens in ended for id in tokens]
        assert read_by_specification(str(Path(directory, "b"))) == ended


def test_megatrons_own_files(tmp_path: Path) -> None:
    """Parity with megatron-core 0.16.1: its files are read, a document of two sequences as one; ours are the same bytes."""
    for name, files in (("x", MEGATRON_16), ("y", MEGATRON_32)):
        for end, text in zip((".idx", ".bin"), files, strict=True):
            (tmp_path / f"{name}{end}").write_bytes(bytes.fromhex(text))
    with pytest.warns(InputWarning, match="sequences are the parts of 3 documents; their borders are not kept"):
        (block,) = megatron.read(str(tmp_path / "x"), SMALL)
    assert tokens_of([block]) == [[5, 6, 0], [7, 8, 9, 0], [4, 0]] and block.ended == 1
    assert tokens_of(list(megatron.read(str(tmp_path / "y"), WIDE))) == [[5, 70_000, 0]]
    write(tmp_path / "ours", "megatron", WIDE, [[5, 70_000, 0]])
    assert (tmp_path / "ours.idx").read_bytes() == (tmp_path / "y.idx").read_bytes()
    assert (tmp_path / "ours.bin").read_bytes() == (tmp_path / "y.bin").read_bytes()


@pytest.mark.parametrize(("magic", "version", "dtype"), [(20240520, 1, np.uint16), (20240801, 7, np.uint32)])
def test_llm_c_files(tmp_path: Path, magic: int, version: int, dtype: type) -> None:
    """Behaviour: the header of llm.c and modded-nanogpt is recognised; documents that begin, rather than end, with the end-of-text id are read correctly."""
    header, ids = np.zeros(256, np.int32), np.array([0, 5, 6, 0, 7, 0, 8, 9], dtype)
    header[:3] = magic, version, len(ids)
    path = tmp_path / "fineweb_train_000001.bin"
    path.write_bytes(header.tobytes() + ids.tobytes())
    (first, last) = nanogpt.read(str(path), SMALL, "web")
    assert tokens_of([first, last]) == [[5, 6, 0], [7, 0], [8, 9, 0]]
    assert (first.empty, last.ended, first.sources) == (1, 1, ["web"] * 2)
    path.write_bytes(header.tobytes() + ids.tobytes()[:-2])
    with pytest.raises(LlmkitError, match=r"8 tokens in its header"):
        list(nanogpt.read(str(path), SMALL))


def change(position: int, value: bytes) -> tuple[str, str]:
    data = bytearray.fromhex(MEGATRON_16[0])
    data[position : position + len(value)] = value
    return data.hex(), MEGATRON_16[1]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (("", MEGATRON_16[1]), "not a Megatron index"),
        ((MEGATRON_16[0][:60], MEGATRON_16[1]), "not a Megatron index"),
        (change(0, b"X"), "not a Megatron index"),
        (change(9, b"\2"), "not a Megatron index"),
        (change(17, b"\7"), "not a Megatron index"),  # float32
        ((MEGATRON_16[0][:-2], MEGATRON_16[1]), "do not fit"),
        ((MEGATRON_16[0] + "00000000", MEGATRON_16[1]), "do not fit"),  # modes of a multimodal set
        (change(18, b"\xff" * 8), "do not fit"),
        (change(26, b"\0" * 8), "do not fit"),
        (change(34, b"\xff" * 4), "lengths or documents"),
        (change(34, b"\xff\xff\xff\x7f"), "are not those"),
        (change(50, b"\2"), "are not those"),
        (change(82, b"\1"), "lengths or documents"),
        (change(90, b"\4"), "lengths or documents"),
        (change(106, b"\3"), "lengths or documents"),
        ((MEGATRON_16[0], MEGATRON_16[1][:-2]), "are not those"),
        ((MEGATRON_16[0], MEGATRON_16[1][:-4] + "2c01"), "token id 300 is not in the vocabulary of 300"),
        ((change(17, b"\3")[0], MEGATRON_16[1][:-4] + "ffff"), "token id -1 is not in the vocabulary"),
    ],
)
def test_damaged_megatron_files(tmp_path: Path, files: tuple[str, str], message: str) -> None:
    """Behaviour: any damage to the index or to the ids is one error that names the file."""
    (tmp_path / "x.idx").write_bytes(bytes.fromhex(files[0]))
    (tmp_path / "x.bin").write_bytes(bytes.fromhex(files[1]))
    with pytest.raises(LlmkitError, match=rf"x\.(idx|bin): .*{message}"):
        list(megatron.read(str(tmp_path / "x"), SMALL))


def test_damaged_nanogpt_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behaviour: odd bytes, ids of another vocabulary, a file without the end-of-text id, a missing file, a directory: refused by name."""
    path = tmp_path / "x.bin"
    for content, message in (
        (b"\1\0\0", "not a whole number of tokens of 2 bytes"),
        (b"\1\0\x2c\1\0\0", "token id 300 is not"),
    ):
        path.write_bytes(content)
        with pytest.raises(LlmkitError, match=rf"x\.bin: .*{message}"):
            list(nanogpt.read(str(path), SMALL))
    monkeypatch.setattr(token_block, "MAX_DOCUMENT", 10)
    path.write_bytes(b"\1\0" * 11)
    with pytest.raises(LlmkitError, match=r"x\.bin: 11 tokens without the end-of-text id 0"):
        list(nanogpt.read(str(path), SMALL))
    for missing in (tmp_path / "nowhere.bin", tmp_path):
        with pytest.raises(LlmkitError, match="no such file"):
            list(nanogpt.read(str(missing), SMALL))
    path.write_bytes(b"")
    assert list(nanogpt.read(str(path), SMALL)) == []


def test_outputs_are_whole_or_not_there(tmp_path: Path) -> None:
    """Behaviour: nothing is replaced without force; an error leaves the old pair; ids over the vocabulary are refused."""
    for name in ("x", "y.bin", "z.idx"):
        write(tmp_path / name, "megatron", SMALL, [[1, 0]])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(before) == [f"{name}.{end}" for name in "xyz" for end in ("bin", "idx")]
    with pytest.raises(LlmkitError, match="exists"):
        write(tmp_path / "x", "megatron", SMALL, [[2, 0]])
    with pytest.raises(LlmkitError, match="not in the vocabulary"):
        write(tmp_path / "x", "megatron", SMALL, [[2, 300]], force=True)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write(tmp_path / "x", "megatron", SMALL, [[2, 3, 0], [0]], force=True)
    assert read_by_specification(str(tmp_path / "x")) == [[2, 3, 0], [0]]
