"""Token ids in the files of other trainers: nanoGPT's .bin and Megatron-LM's .bin with .idx, written and read.

nanoGPT (data/*/prepare.py): the ids alone, uint16, or uint32 where the vocabulary is over 65,536; each document ends with the end-of-text id.
That of llm.c and modded-nanogpt has 1,024 bytes in front, int32 little-endian: magic 20240520 and version 1 (uint16) or 20240801 and 7
(uint32), then the number of ids; it is read too, and not written.

Megatron (megatron/core/datasets/indexed_dataset.py): the ids in PREFIX.bin, and in PREFIX.idx, little-endian:

    "MMIDIDX\\0\\0", uint64 version 1, uint8 code of the ids' type, uint64 sequences n, uint64 d, which is documents + 1
    int32 length of each sequence [n], int64 byte offset of each in the .bin [n], int64 first sequence of each document and n [d]

We write one sequence a document, as uint16 below 65,500 ids and int32 above, as Megatron does. Neither format holds sources, ids, the
tokenizer or a lineage: read again, a document's source is its file's name and its id the xxh3-128 of its tokens. Documents without the end-of-text
id get it, those without any other are left out, and both are counted: files that begin each document with that id, as modded-nanogpt's,
come out right. Files are mapped into memory and pass in blocks of about 2^20 tokens; a document has 2^28 at most.
"""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import xxhash
from numpy.typing import NDArray

from llmkit.errors import LlmkitError, UsageError
from llmkit.io.atomic import atomic_file
from llmkit.io.documents import BadLine
from llmkit.io.record import Input
from llmkit.shards.tokenizer_info import TokenizerInfo

Tokens = NDArray[Any]
BLOCK_TOKENS = 1 << 20
MAX_DOCUMENT = 1 << 28  # a file in which no document ends is no file of this tokenizer
NANOGPT_HEADERS = {(20240520, 1): np.uint16, (20240801, 7): np.uint32}
NANOGPT_HEADER_BYTES = 1024
MEGATRON_HEADER = struct.Struct("<9sQBQQ")
MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
MEGATRON_TYPES: dict[int, Any] = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
MEGATRON_UINT16 = 65_500  # vocabularies that Megatron-LM keeps in two bytes are smaller
HINT_CUT = "the copy is incomplete, or it is a file of another kind"


@dataclass(slots=True)
class Block:
    """Documents in order: `tokens` flat [sum of lengths], `lengths` int64 [n] with the end-of-text id, ids and sources [n]."""

    tokens: Tokens
    lengths: NDArray[np.int64]
    ids: list[str]
    sources: list[str]
    sizes: list[int] = field(default_factory=list)  # UTF-8 bytes of each text, where it is known
    empty: int = 0  # documents without text, left out
    ended: int = 0  # documents that lacked the end-of-text id
    duplicates: list[int] = field(default_factory=list)  # how often each was found by dedup, where that is kept
    bad: list[BadLine] = field(default_factory=list)  # lines that are no documents

    def documents(self) -> Iterator[tuple[Tokens, str, str]]:
        """(tokens, id, source) of each document."""
        ends = np.cumsum(self.lengths).tolist()
        for end, length, id, source in zip(ends, self.lengths.tolist(), self.ids, self.sources, strict=True):
            yield self.tokens[end - length : end], id, source


class TokenFileWriter:
    """Documents to FILE (`kind` "nanogpt"; None: stdout) or to PREFIX.bin and PREFIX.idx ("megatron"), whole or not at all."""

    def __init__(self, output: str | None, info: TokenizerInfo, kind: str, *, force: bool = False) -> None:
        self._megatron = kind == "megatron"
        self._info = info
        self._force = force
        self._stack = ExitStack()
        self._lengths: list[NDArray[np.int64]] = []
        self._paths = [output] if output else []
        if self._megatron:
            if output is None:
                raise UsageError("--to megatron makes two files", "name their common beginning with -o PREFIX")
            self._paths = [dataset_prefix(output) + end for end in (".bin", ".idx")]
            self._dtype: Any = np.dtype("<u2" if info.vocab_size < MEGATRON_UINT16 else "<i4")
        else:
            self._dtype = np.dtype("<u2" if info.vocab_size <= 1 << 16 else "<u4")
        if output is None and sys.stdout.isatty():
            raise UsageError("token ids are binary: not written to a terminal", "redirect stdout, or name -o PATH")

    def __enter__(self) -> TokenFileWriter:
        # Left in reverse: PREFIX.bin gets its name first, and without PREFIX.idx nobody reads it.
        opened = [self._stack.enter_context(atomic_file(path, self._force)) for path in reversed(self._paths)]
        self._sinks: list[BinaryIO] = opened[::-1] or [sys.stdout.buffer]
        return self

    def extend(self, tokens: Tokens, lengths: NDArray[np.int64], ids: list[str], sources: list[str]) -> None:
        """Append n documents: ids flat [sum of lengths], lengths [n]; their names and sources have no place here."""
        check_ids(tokens, self._info, "the input")
        self._sinks[0].write(tokens.astype(self._dtype, copy=False).data)
        if self._megatron:
            self._lengths.append(lengths)

    def finish(self, counts: dict[str, Any], inputs: list[Input]) -> None:
        """Complete the content; call it once, last."""
        if self._megatron:
            self._write_index(np.concatenate([np.zeros(0, np.int64), *self._lengths]))
            if self._force:  # an index beside another's ids would be worse than none
                Path(self._paths[1]).unlink(missing_ok=True)
        else:
            self._sinks[0].flush()

    def _write_index(self, lengths: NDArray[np.int64]) -> None:
        n, code = len(lengths), next(code for code, kind in MEGATRON_TYPES.items() if kind == self._dtype)
        ends = np.cumsum(lengths)
        sink = self._sinks[1]
        sink.write(MEGATRON_HEADER.pack(MEGATRON_MAGIC, 1, code, n, n + 1))
        sink.write(lengths.astype("<i4").data)
        sink.write(((ends - lengths) * self._dtype.itemsize).astype("<i8").data)
        sink.write(np.arange(n + 1, dtype="<i8").data)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)


def dataset_prefix(path: str) -> str:
    """How Megatron names a data set: without .bin or .idx."""
    return path.removesuffix(".bin").removesuffix(".idx")


def read_nanogpt(path: str, info: TokenizerInfo, source: str | None = None) -> Iterator[Block]:
    """The documents of a nanoGPT or llm.c file. LlmkitError where it is cut or its ids are not of `info`'s vocabulary."""
    tokens = _nanogpt_tokens(path, info)
    start = at = 0
    while at < len(tokens):
        stop = min(at + BLOCK_TOKENS, len(tokens))
        ends = np.flatnonzero(tokens[at:stop] == info.eos_id) + at + 1
        if len(ends):
            yield _block(tokens, start, np.diff(ends, prepend=start), info, source, path)
            start = int(ends[-1])
        at = stop
    if start < len(tokens):
        yield _block(tokens, start, np.array([len(tokens) - start]), info, source, path)


def _nanogpt_tokens(path: str, info: TokenizerInfo) -> Tokens:
    data = _mapped(path)
    dtype: Any = np.uint16 if info.vocab_size <= 1 << 16 else np.uint32
    if len(data) >= NANOGPT_HEADER_BYTES:
        magic, version, count = struct.unpack_from("<iii", data.data)
        if (magic, version) in NANOGPT_HEADERS:
            data, dtype = data[NANOGPT_HEADER_BYTES:], NANOGPT_HEADERS[magic, version]
            if len(data) != count * np.dtype(dtype).itemsize:
                raise LlmkitError(f"{path}: its header says {count:,} tokens, but {len(data):,} bytes follow", HINT_CUT)
    width = np.dtype(dtype).itemsize
    if len(data) % width:
        raise LlmkitError(f"{path}: {len(data):,} bytes are no whole number of tokens of {width} bytes", HINT_CUT)
    return data.view(np.dtype(dtype).newbyteorder("<"))


def read_megatron(prefix: str, info: TokenizerInfo, source: str | None = None) -> Iterator[Block]:
    """The documents of PREFIX.bin and PREFIX.idx. LlmkitError where they are cut, do not belong together, or are of another vocabulary."""
    name, index = prefix + ".idx", _mapped(prefix + ".idx")
    broken = LlmkitError(
        f"{name}: no Megatron index", "it comes from Megatron-LM's preprocess_data.py, or --to megatron"
    )
    if len(index) < MEGATRON_HEADER.size:
        raise broken
    magic, version, code, n, d = MEGATRON_HEADER.unpack_from(index.data)
    if (magic, version) != (MEGATRON_MAGIC, 1) or code not in MEGATRON_TYPES:
        raise broken
    if len(index) != MEGATRON_HEADER.size + 12 * n + 8 * d or d < 1:
        raise LlmkitError(
            f"{name}: {n:,} sequences and {d - 1:,} documents do not fit into {len(index):,} bytes", HINT_CUT
        )
    at = MEGATRON_HEADER.size
    lengths = np.frombuffer(index, "<i4", n, at)
    places = np.frombuffer(index, "<i8", n, at + 4 * n)
    firsts = np.frombuffer(index, "<i8", d, at + 12 * n)
    data, dtype = _mapped(prefix + ".bin"), np.dtype(MEGATRON_TYPES[code]).newbyteorder("<")
    offsets = np.zeros(n + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    if (lengths < 0).any() or firsts[0] != 0 or firsts[-1] != n or (np.diff(firsts) < 0).any():
        raise LlmkitError(f"{name}: damaged (lengths or documents out of range)", HINT_CUT)
    if len(data) != offsets[-1] * dtype.itemsize or (places != offsets[:-1] * dtype.itemsize).any():
        raise LlmkitError(f"{prefix}.bin: its {len(data):,} bytes are not those that {name} describes", HINT_CUT)
    tokens, bounds = data.view(dtype), offsets[firsts]
    first = 0
    while first < d - 1:
        behind = max(int(np.searchsorted(bounds, bounds[first] + BLOCK_TOKENS, side="right")) - 1, first + 1)
        yield _block(tokens, int(bounds[first]), np.diff(bounds[first : behind + 1]), info, source, prefix + ".bin")
        first = behind


def check_file(path: str) -> None:
    """LlmkitError where `path` is no file that can be mapped."""
    if not os.path.isfile(path):
        raise LlmkitError(f"{path}: no such file, or not a regular one", "ids are mapped into memory from files")


def _mapped(path: str) -> NDArray[np.uint8]:
    check_file(path)
    try:
        return np.memmap(path, np.uint8, "r") if os.path.getsize(path) else np.zeros(0, np.uint8)
    except OSError as error:
        raise LlmkitError(f"{path}: {error.strerror}", "check the path and its permissions") from error


def check_ids(tokens: Tokens, info: TokenizerInfo, name: str) -> None:
    """LlmkitError where an id is not of the tokenizer's vocabulary."""
    if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < info.vocab_size:
        wrong = int(tokens.min()) if int(tokens.min()) < 0 else int(tokens.max())
        raise LlmkitError(
            f"{name}: token id {wrong} is not in the vocabulary of {info.vocab_size}",
            "the tokens come from another tokenizer",
        )


def _block(
    tokens: Tokens, start: int, lengths: NDArray[np.int64], info: TokenizerInfo, source: str | None, name: str
) -> Block:
    """The documents of these lengths from `start`, each ended by the end-of-text id."""
    if lengths.max() > MAX_DOCUMENT:
        raise LlmkitError(
            f"{name}: {int(lengths.max()):,} tokens without the end-of-text id {info.eos_id}",
            "the tokens come from another tokenizer",
        )
    flat = np.asarray(tokens[start : start + int(lengths.sum())])
    check_ids(flat, info, name)
    flat = flat.astype(np.uint16 if info.vocab_size <= 1 << 16 else np.uint32)
    stops = np.cumsum(lengths)
    ended = np.zeros(len(lengths), bool)
    ended[lengths > 0] = flat[stops[lengths > 0] - 1] == info.eos_id
    kept = lengths > ended
    if not (ended & kept).all():
        flat = np.insert(flat[np.repeat(kept, lengths)], np.cumsum(lengths[kept])[~ended[kept]], info.eos_id)
    lengths = (lengths + ~ended)[kept]
    behind = np.cumsum(lengths).tolist()
    ids = [
        xxhash.xxh3_128_hexdigest(flat[end - length : end].data)
        for end, length in zip(behind, lengths.tolist(), strict=True)
    ]
    sources = [source or os.path.basename(dataset_prefix(name))] * len(ids)
    return Block(flat, lengths, ids, sources, [], int((~kept).sum()), int((kept & ~ended).sum()))
