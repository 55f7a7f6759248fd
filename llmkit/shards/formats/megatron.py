"""Token ids in Megatron-LM's .bin and .idx files (megatron/core/datasets/indexed_dataset.py).

The ids are in PREFIX.bin; PREFIX.idx holds, little-endian:

    "MMIDIDX\\0\\0", uint64 version 1, uint8 code of the ids' type, uint64 sequences n, uint64 d = documents + 1
    int32 length of each sequence [n], int64 byte offset of each in the .bin [n], int64 first sequence of each
    document and n [d]

We write one sequence per document, as uint16 below 65,500 ids and int32 above, as Megatron does.
"""

from __future__ import annotations

import struct
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from llmkit.errors import InputWarning, LlmkitError, UsageError
from llmkit.io.atomic import atomic_file
from llmkit.shards.formats import FOREIGN_FORMATS, ForeignFormat, without_suffix

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from llmkit.io.record import Input
    from llmkit.shards.token_block import TokenBlock
    from llmkit.shards.tokenizer_info import TokenizerInfo

SUFFIXES = (".bin", ".idx")
HEADER = struct.Struct("<9sQBQQ")
MAGIC = b"MMIDIDX\x00\x00"
TYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # code -> type of the ids
UINT16_VOCABULARY = 65_500  # Megatron-LM stores smaller vocabularies in two bytes
HINT_CUT = "the copy is incomplete, or it is a file of another kind"


class Writer:
    """Documents to PREFIX.bin and PREFIX.idx, both or neither."""

    def __init__(self, output: str | None, info: TokenizerInfo, *, force: bool = False) -> None:
        if output is None:
            raise UsageError("--to megatron makes two files", "give their common prefix with -o PREFIX")
        self._prefix = without_suffix(output, SUFFIXES)
        self._info = info
        self._force = force
        self._dtype = "<u2" if info.vocab_size < UINT16_VOCABULARY else "<i4"
        self._lengths: list[NDArray[np.int64]] = []
        self._stack = ExitStack()

    def __enter__(self) -> Writer:
        # Committed in reverse: PREFIX.bin gets its name first, and without PREFIX.idx nobody reads it.
        self._index = self._stack.enter_context(atomic_file(self._prefix + ".idx", self._force))
        self._sink = self._stack.enter_context(atomic_file(self._prefix + ".bin", self._force))
        return self

    def write(self, block: TokenBlock) -> None:
        """Append documents; LlmkitError where an id is over the vocabulary."""
        from llmkit.shards.token_block import check_ids

        check_ids(block.tokens, self._info, "the input")
        if block.lengths.max(initial=0) >= 1 << 31:
            raise LlmkitError("a document of over 2^31 tokens", "Megatron's index holds lengths as int32")
        self._sink.write(block.tokens.astype(self._dtype, copy=False).data)
        self._lengths.append(block.lengths)

    def finish(self, counts: dict[str, Any], inputs: list[Input]) -> None:
        """Complete the content; call it once, last. The format has no room for counts and inputs."""
        import numpy as np

        lengths = np.concatenate([np.zeros(0, np.int64), *self._lengths])
        n, code = len(lengths), next(code for code, dtype in TYPES.items() if dtype == self._dtype)
        self._index.write(HEADER.pack(MAGIC, 1, code, n, n + 1))
        self._index.write(lengths.astype("<i4").data)
        self._index.write(((np.cumsum(lengths) - lengths) * np.dtype(self._dtype).itemsize).astype("<i8").data)
        self._index.write(np.arange(n + 1, dtype="<i8").data)
        if self._force:  # the index of an earlier run beside these ids would be worse than none
            Path(self._prefix + ".idx").unlink(missing_ok=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)


def read(prefix: str, info: TokenizerInfo, source: str | None = None) -> Iterator[TokenBlock]:
    """The documents of PREFIX.bin and PREFIX.idx.

    LlmkitError where the files are truncated, do not belong together, or hold ids that are not in the
    vocabulary of `info`.
    """
    import numpy as np

    from llmkit.io.record import base_name
    from llmkit.shards import token_block

    source = source or base_name(without_suffix(prefix, SUFFIXES))
    name, index = prefix + ".idx", token_block.map_file(prefix + ".idx")
    not_an_index = LlmkitError(
        f"{name}: not a Megatron index", "it comes from Megatron-LM's preprocess_data.py, or --to megatron"
    )
    if len(index) < HEADER.size:
        raise not_an_index
    magic, version, code, n, d = HEADER.unpack_from(index.data)
    if (magic, version) != (MAGIC, 1) or code not in TYPES:
        raise not_an_index
    if len(index) != HEADER.size + 12 * n + 8 * d or d < 1:
        raise LlmkitError(
            f"{name}: {n:,} sequences and {d - 1:,} documents do not fit into {len(index):,} bytes", HINT_CUT
        )
    lengths = np.frombuffer(index, "<i4", n, HEADER.size)
    byte_offsets = np.frombuffer(index, "<i8", n, HEADER.size + 4 * n)
    first_sequences = np.frombuffer(index, "<i8", d, HEADER.size + 12 * n)
    data, dtype = token_block.map_file(prefix + ".bin"), np.dtype(TYPES[code])
    offsets = np.zeros(n + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    in_order = (
        first_sequences[0] == 0 and first_sequences[-1] == n and (first_sequences[1:] >= first_sequences[:-1]).all()
    )
    if (lengths < 0).any() or not in_order:
        raise LlmkitError(f"{name}: damaged (lengths or documents out of range)", HINT_CUT)
    if len(data) != offsets[-1] * dtype.itemsize or (byte_offsets != offsets[:-1] * dtype.itemsize).any():
        raise LlmkitError(f"{prefix}.bin: its {len(data):,} bytes are not those that {name} describes", HINT_CUT)
    if n != d - 1:
        parts = f"{n:,} sequences are the parts of {d - 1:,} documents"
        warnings.warn(f"{name}: {parts}; their borders are not kept", InputWarning, stacklevel=1)
    tokens, bounds = data.view(dtype), offsets[first_sequences]
    first = 0
    while first < d - 1:
        full = int(np.searchsorted(bounds, bounds[first] + token_block.BLOCK_TOKENS, side="right")) - 1
        stop = max(full, first + 1)
        documents = np.diff(bounds[first : stop + 1])
        yield token_block.cut_block(tokens, int(bounds[first]), documents, info, source, prefix + ".bin")
        first = stop


FOREIGN_FORMATS.register("megatron")(ForeignFormat("PREFIX.bin and PREFIX.idx", SUFFIXES, read, Writer))
