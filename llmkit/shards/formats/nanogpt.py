"""Token ids in a nanoGPT .bin file (data/*/prepare.py): the ids alone, each document ended by the end-of-text id.

Ids are uint16, or uint32 where the vocabulary is over 65,536. llm.c and modded-nanogpt put 1,024 bytes in
front, int32 little-endian: magic 20240520 and version 1 (uint16) or 20240801 and 7 (uint32), then the number of
ids. Such files are read too, and not written.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

from llmkit.errors import LlmkitError, UsageError
from llmkit.io.atomic import atomic_file
from llmkit.shards.formats import FOREIGN_FORMATS, ForeignFormat, without_suffix

if TYPE_CHECKING:
    from llmkit.io.record import Input
    from llmkit.shards.arrow import Tokens
    from llmkit.shards.token_block import TokenBlock
    from llmkit.shards.tokenizer_info import TokenizerInfo

SUFFIX = ".bin"
HEADERS = {(20240520, 1): "<u2", (20240801, 7): "<u4"}  # (magic, version) -> type of the ids
HEADER_BYTES = 1024
HINT_CUT = "the copy is incomplete, or it is a file of another kind"


class Writer:
    """Documents to a file (None: stdout), whole or not at all. Raises UsageError where stdout is a terminal."""

    def __init__(self, output: str | None, info: TokenizerInfo, *, force: bool = False) -> None:
        self._output = output
        self._info = info
        self._force = force
        self._dtype = id_type(info)
        self._stack = ExitStack()
        if output is None and sys.stdout.isatty():
            raise UsageError("token ids are binary: not written to a terminal", "redirect stdout, or give -o PATH")

    def __enter__(self) -> Writer:
        self._sink: BinaryIO = sys.stdout.buffer
        if self._output:
            self._sink = self._stack.enter_context(atomic_file(self._output, self._force))
        return self

    def write(self, block: TokenBlock) -> None:
        """Append documents; LlmkitError where an id is over the vocabulary."""
        from llmkit.shards.token_block import check_ids

        check_ids(block.tokens, self._info, "the input")
        self._sink.write(block.tokens.astype(self._dtype, copy=False).data)

    def finish(self, counts: dict[str, Any], inputs: list[Input]) -> None:
        """Complete the content; call it once, last. The format has no room for counts and inputs."""
        self._sink.flush()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)


def read(path: str, info: TokenizerInfo, source: str | None = None) -> Iterator[TokenBlock]:
    """The documents of a file. LlmkitError where it is truncated or its ids are not in the vocabulary of `info`."""
    import numpy as np

    from llmkit.io.record import base_name
    from llmkit.shards import token_block

    source = source or base_name(without_suffix(path, [SUFFIX]))
    tokens = _ids(path, info)
    start = position = 0
    while position < len(tokens):
        stop = min(position + token_block.BLOCK_TOKENS, len(tokens))
        ends = np.flatnonzero(tokens[position:stop] == info.eos_id) + position + 1
        if len(ends):
            yield token_block.cut_block(tokens, start, np.diff(ends, prepend=start), info, source, path)
            start = int(ends[-1])
        position = stop
    if start < len(tokens):
        yield token_block.cut_block(tokens, start, np.array([len(tokens) - start]), info, source, path)


def id_type(info: TokenizerInfo) -> str:
    """The type of the ids of this vocabulary, as numpy writes it."""
    return "<u2" if info.vocab_size <= 1 << 16 else "<u4"


def _caveat(info: TokenizerInfo) -> str:
    if id_type(info) == "<u2":
        return ""
    return (
        f"a vocabulary of {info.vocab_size:,} needs uint32: nanoGPT's train.py reads np.uint16, change it to np.uint32"
    )


def _ids(path: str, info: TokenizerInfo) -> Tokens:
    import numpy as np

    from llmkit.shards.token_block import map_file

    data, dtype = map_file(path), id_type(info)
    if len(data) >= HEADER_BYTES:
        magic, version, count = struct.unpack_from("<iii", data.data)
        if (magic, version) in HEADERS:
            data, dtype = data[HEADER_BYTES:], HEADERS[magic, version]
            if len(data) != count * np.dtype(dtype).itemsize:
                raise LlmkitError(f"{path}: {count:,} tokens in its header, but {len(data):,} bytes after it", HINT_CUT)
    width = np.dtype(dtype).itemsize
    if len(data) % width:
        raise LlmkitError(f"{path}: {len(data):,} bytes are not a whole number of tokens of {width} bytes", HINT_CUT)
    return data.view(dtype)


FOREIGN_FORMATS.register("nanogpt")(ForeignFormat("FILE.bin, ids alone", (SUFFIX,), read, Writer, True, _caveat))
