"""Reading token shards: directories, files or a stream as one list of documents, mapped into memory.

shards/writer.py describes the format.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from llmkit.errors import LlmkitError, UsageError
from llmkit.io.atomic import atomic_file, is_special
from llmkit.io.inputs import STDIN, display_name, open_raw
from llmkit.io.record import Input, base_name, record_or_warning
from llmkit.lineage.formats import describe_input
from llmkit.shards.arrow import Tokens, as_numpy
from llmkit.shards.digest import LINEAGE, combined_digest, metadata_digest
from llmkit.shards.shard import HINT_REMAKE, PADDING_SOURCE, TOKENIZER_TEXTS, Shard, batch_tokens, scan_shard
from llmkit.shards.tokenizer_info import TOKENIZER_FILES, TokenizerInfo, read_tokenizer

if TYPE_CHECKING:
    import pyarrow as pa


class TokenStore:
    """Documents as token ids in the order in which they are stored, mapped into memory.

    tokenizer: TokenizerInfo · documents, tokens: int · offsets: int64 [documents + 1], where each document
    starts in the flat order · codes: int32 [documents], index into `sources` · sources: list[str] · inputs:
    list[Input], one for each path opened.
    """

    def __init__(self) -> None:
        self.tokenizer: TokenizerInfo
        self.offsets: NDArray[np.int64]
        self.codes: NDArray[np.int32]
        self.inputs: list[Input] = []
        self.has_epochs = True
        self._values: list[Tokens] = []  # tokens of each batch, views into the mapped files
        self._columns: list[tuple[Any, Any]] = []  # id column, and epoch column or None, of each batch
        self._json_marks: list[NDArray[np.uint8] | None] = []  # of each batch
        self._duplicates: list[NDArray[np.int64]] = []  # of each batch that has that column, views
        self._shards: list[Shard] = []
        self._opened: list[list[Shard]] = []  # the shards of each path
        self._first_document: list[int] = []
        self._first_token: list[int] = []
        self._counted = (0, 0)  # documents and tokens of the shards so far
        self._source_codes: dict[str, int] = {}

    @classmethod
    def open(cls, paths: list[str] | str, *, spool: Path | None = None) -> TokenStore:
        """Map shard directories, .arrow files, or stdin ("-") as one store, in the order given.

        stdin is first copied to `spool` (a file, which is kept, or a directory, where it is called
        stdin.arrow), or else to a temporary file. Raises LlmkitError where a file is missing, truncated, not a
        token shard, or of another tokenizer than the first.
        """
        store = cls()
        paths = [paths] if isinstance(paths, str) else paths
        if not paths:
            raise UsageError("no token shards named", "name a directory or .arrow files")
        lengths: list[NDArray[np.int64]] = []
        codes: list[NDArray[np.int32]] = []
        for path in paths:
            shards: list[Shard] = []
            for file, name in stream_files(path, spool):
                shard = Shard(file, name)
                shards.append(shard)
                store._add(shard, lengths, codes)
            if Path(path).is_dir():
                _check_complete(shards, path)
            store._opened.append(shards)
            digest = combined_digest([str(shard.trailer.get("digest")) for shard in shards])
            store.inputs.append(_describe(path, digest, shards))
        counts = np.concatenate(lengths) if lengths else np.zeros(0, np.int64)
        store.offsets = np.zeros(len(counts) + 1, np.int64)
        np.cumsum(counts, out=store.offsets[1:])
        store.codes = np.concatenate(codes) if codes else np.zeros(0, np.int32)
        return store

    def _add(self, shard: Shard, lengths: list[NDArray[np.int64]], codes: list[NDArray[np.int32]]) -> None:
        if not self._shards:
            self.tokenizer = shard.tokenizer()
        elif shard.tokenizer_identity() != self._shards[0].tokenizer_identity():
            raise LlmkitError(
                f"{shard.name}: made with another tokenizer than {self._shards[0].name}",
                "tokenize all sources with the same one",
            )
        self._shards.append(shard)
        token_type = shard.token_type()
        if token_type != self._shards[0].token_type():
            raise LlmkitError(
                f"{shard.name}: {token_type} tokens, but {self._shards[0].token_type()} in {self._shards[0].name}",
                HINT_REMAKE,
            )
        documents = tokens = 0
        self._json_marks += shard.json_marks
        for batch in shard.batches:
            offsets, values = batch_tokens(batch, shard.name)
            source = batch.column("source")
            names = source.dictionary.to_pylist()
            table = np.array([self._source_codes.setdefault(name, len(self._source_codes)) for name in names], np.int32)
            indices = as_numpy(source.indices)
            if len(indices) and not 0 <= indices.min() <= indices.max() < len(names):
                raise LlmkitError(f"{shard.name}: damaged (a source out of range)", HINT_REMAKE)
            epoch = batch.column("epoch") if "epoch" in batch.schema.names else None
            self.has_epochs &= epoch is not None
            self._first_document.append(self._counted[0] + documents)
            self._first_token.append(self._counted[1] + tokens)
            lengths.append(np.diff(offsets))
            codes.append(table[indices] if len(indices) else np.zeros(0, np.int32))
            self._values.append(values)
            self._columns.append((batch.column("id"), epoch))
            if "duplicates" in batch.schema.names:
                self._duplicates.append(as_numpy(batch.column("duplicates")))
            documents, tokens = documents + batch.num_rows, tokens + len(values)
        self._counted = (self._counted[0] + documents, self._counted[1] + tokens)
        for key, count in {"documents": documents, "tokens": tokens}.items():
            if shard.trailer.get(key) != count:
                raise LlmkitError(
                    f"{shard.name}: {count} {key}, but {shard.trailer.get(key)} in its trailer", HINT_REMAKE
                )

    @property
    def sources(self) -> list[str]:
        return list(self._source_codes)

    @property
    def shards(self) -> list[Shard]:
        """The shards that hold the documents, in order."""
        return list(self._shards)

    @property
    def sequence_length(self) -> int | None:
        """The sequence length that `mix` packed the documents for; None where they may be cut anywhere."""
        return self._shards[0].sequence_length() if self._shards else None

    @property
    def stages(self) -> list[int]:
        """Tokens after which each stage of the mix ends.

        The last is the total, and the only one outside a mix of several stages.
        """
        ends = self._shards[0].stages() if self._shards else []
        if ends and ends[-1] != self.tokens:
            raise LlmkitError(
                f"{self._shards[0].name}: stages of {ends[-1]:,} tokens, but {self.tokens:,} here", HINT_REMAKE
            )
        return ends or [self.tokens]

    @property
    def padding(self) -> NDArray[np.bool_] | None:
        """Which documents only fill up a packed sequence, bool [documents]; None where none do."""
        code = self._source_codes.get(PADDING_SOURCE)
        return None if code is None else self.codes == code

    @property
    def duplicates(self) -> NDArray[np.int64] | None:
        """How often `dedup` found each document, int64 [documents]; None where that was not kept."""
        return np.concatenate(self._duplicates) if len(self._duplicates) == len(self._values) > 0 else None

    @property
    def json_marks(self) -> NDArray[np.uint8] | None:
        """Which ids and sources are not text in the documents (shards/arrow.py) [documents]; None where all are."""
        if all(marks is None for marks in self._json_marks):
            return None
        sizes = [len(ids) for ids, _ in self._columns]
        return np.concatenate(
            [
                np.zeros(n, np.uint8) if marks is None else marks
                for marks, n in zip(self._json_marks, sizes, strict=True)
            ]
        )

    @property
    def documents(self) -> int:
        return len(self.offsets) - 1

    @property
    def tokens(self) -> int:
        return int(self.offsets[-1])

    def document(self, i: int) -> Tokens:
        """Token ids of document `i`, a view."""
        return self.span(int(self.offsets[i]), int(self.offsets[i + 1]))

    def span(self, start: int, stop: int) -> Tokens:
        """Tokens `start` to `stop` of the flat order; a view within one batch, otherwise a copy."""
        if not 0 <= start <= stop <= self.tokens:
            raise IndexError(f"tokens {start} to {stop} of {self.tokens}")
        if start == stop:
            return np.zeros(0, self.dtype)
        batch = bisect_right(self._first_token, start) - 1
        pieces: list[Tokens] = []
        while start < stop:
            begin = start - self._first_token[batch]
            piece = self._values[batch][begin : begin + stop - start]
            pieces.append(piece)
            start += len(piece)
            batch += 1
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    @property
    def dtype(self) -> Any:
        return self._values[0].dtype if self._values else np.dtype(np.uint16)

    def _row(self, i: int) -> tuple[int, int]:
        """Batch of document `i`, and its row in that batch."""
        if not 0 <= i < self.documents:
            raise IndexError(f"document {i} of {self.documents}")
        batch = bisect_right(self._first_document, i) - 1
        return batch, i - self._first_document[batch]

    def id(self, i: int) -> str:
        """Id of document `i`."""
        batch, row = self._row(i)
        return str(self._columns[batch][0][row].as_py())

    def source(self, i: int) -> str:
        """Source of document `i`."""
        return self.sources[int(self.codes[i])]

    def epoch(self, i: int) -> int:
        """How often document `i` was seen before; 0 in shards that do not come from `mix`."""
        batch, row = self._row(i)
        column = self._columns[batch][1]
        return 0 if column is None else int(column[row].as_py())

    def origins(self) -> tuple[NDArray[np.int32], list[str], NDArray[np.int32] | None]:
        """Source index of each document int32 [documents], the sources, and times seen before (None: all zero)."""
        if not self.has_epochs or not self._columns:
            return self.codes, self.sources, None
        return self.codes, self.sources, np.concatenate([as_numpy(epoch) for _, epoch in self._columns])

    def batches(self) -> Iterator[tuple[Tokens, pa.Array, pa.Array | None]]:
        """Token ids, ids of documents and times seen before (where stored) of each batch of documents, views."""
        for values, (ids, epochs) in zip(self._values, self._columns, strict=True):
            yield values, ids, epochs

    def verify(self) -> None:
        """Read all bytes once; LlmkitError where they are not what was written, or a token id is over the vocabulary.

        If only bytes differ on which neither documents nor their tokenizer depend, such as those of the lineage record,
        that is left to `llmkit lineage --check`.
        """
        for shards in self._opened:
            if all(shard.is_sealed() for shard in shards):
                continue
            hint = f"copy or make it again; llmkit lineage --check {shards[-1].name} shows whether a file is intact"
            for shard in shards:
                digest, largest = scan_shard(shard)
                if digest != shard.trailer.get("digest"):
                    raise LlmkitError(f"{shard.name}: the content does not match its digest", hint)
                if largest >= self.tokenizer.vocab_size:
                    raise LlmkitError(
                        f"{shard.name}: token id {largest} is over the vocabulary of {self.tokenizer.vocab_size}",
                        "the tokens come from another tokenizer",
                    )
            lineage = shards[-1].trailer.get("lineage")
            recorded = lineage.get("files") if isinstance(lineage, dict) else None
            used = [{key: value for key, value in shard.metadata.items() if key != LINEAGE} for shard in shards]
            if any(other != used[0] for other in used) or (recorded and recorded != described_digest(shards)):
                raise LlmkitError(f"{shards[-1].name}: the metadata do not match their digest", hint)


def described_digest(shards: list[Shard]) -> str:
    """Digest of the metadata of the first shard, which all have, and of the tokenizer beside it."""
    first = shards[0]
    beside = [] if TOKENIZER_TEXTS in first.metadata else [first.path.parent / name for name in TOKENIZER_FILES]
    texts = {file.name: file.read_bytes().decode("utf-8", "replace") for file in beside if file.is_file()}
    return metadata_digest(
        first.metadata, texts, combined_digest([str(shard.trailer.get("digest")) for shard in shards])
    )


def stream_files(path: str, spool: Path | None) -> Iterator[tuple[Path, str]]:
    """The stream files that `path` stands for, with their names for messages."""
    if path == STDIN:
        yield from _spooled(spool)
    elif Path(path).is_dir():
        files = sorted(Path(path).glob("*.arrow"))
        if not files:
            raise LlmkitError(f"{path}: no token shards (*.arrow) in this directory", "make some with: llmkit tokenize")
        yield from ((file, str(file)) for file in files)
    elif not Path(path).exists():
        raise LlmkitError(f"{path}: no such file or directory", "check the path")
    elif is_special(Path(path)):
        with open(path, "rb") as source:
            yield from _copied(source, spool, path)
    else:
        yield Path(path), path


def _describe(path: str, digest: str, shards: list[Shard]) -> Input:
    """The input of a record: a stream has only its content, and a single shard of several may lie anywhere."""
    if path == STDIN or is_special(Path(path)):
        return Input("input", base_name(path), digest, record_or_warning(shards[-1].lineage))
    item = describe_input(path, digest=digest)
    trailer = shards[0].trailer
    if not item.part and not Path(path).is_dir() and (trailer["part"], trailer.get("last")) != (0, True):
        complete = trailer.get("last") and item.lineage
        item.lineage, item.part = (item.lineage, f"shards/{part_name(trailer['part'])}") if complete else (None, "")
    return item


def part_name(number: int) -> str:
    """The name of a shard in its directory."""
    return f"part-{number:05d}.arrow"


def _spooled(spool: Path | None) -> Iterator[tuple[Path, str]]:
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError("no input: stdin is a terminal", "name token shards, or pipe them in")
    yield from _copied(open_raw(STDIN), spool, display_name(STDIN))


def _copied(source: BinaryIO, spool: Path | None, name: str) -> Iterator[tuple[Path, str]]:
    """A copy of a stream on disk, where it can be mapped; a temporary file is removed once it is mapped."""
    if spool is None:
        with tempfile.NamedTemporaryFile(prefix="llmkit-", suffix=".arrow") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
            sink.flush()
            yield Path(sink.name), name
        return
    target = spool / "stdin.arrow" if spool.is_dir() else spool
    with atomic_file(target, force=True) as sink:
        shutil.copyfileobj(source, sink, 1 << 20)
    yield target, name


def _check_complete(shards: list[Shard], path: str) -> None:
    """LlmkitError unless a directory holds parts 0 to n of one run, the last of them marked as such."""
    numbers = [shard.trailer["part"] for shard in shards]
    if numbers != list(range(len(shards))) or not shards[-1].trailer.get("last"):
        missing = next((i for i, number in enumerate(numbers) if i != number), len(shards))
        raise LlmkitError(f"{path}: {part_name(missing)} is missing", "copy the whole directory, or make it again")


def load_tokenizer_info(path: str | Path, eos: str | None = None) -> TokenizerInfo:
    """The tokenizer at `path`: that of a .arrow file, or whatever `read_tokenizer` reads; `eos` as there.

    LlmkitError where there is none.
    """
    path = Path(path)
    if path.suffix != ".arrow":
        return read_tokenizer(path, eos)
    if eos is not None:
        raise UsageError("--eos: token shards have theirs", "name the tokenizer directory with -t")
    info = Shard(path, str(path)).tokenizer()
    if "tokenizer.json" not in info.files:
        raise LlmkitError(f"{path}: holds no tokenizer.json", "name the tokenizer directory")
    return info
