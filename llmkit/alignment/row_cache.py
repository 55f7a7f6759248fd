"""Encoded rows on disk, for runs on the same rows with the same template and tokenizer (`--row-cache DIR`).

    DIR/<key>/00000.safetensors, 00001.safetensors, ...          CHUNK_ROWS rows of the file each

The key is a digest of what decides the encoded rows: content of the file, tokenizer and template, options of reading
and encoding, FORMAT. A chunk holds what became of each row: token ids, weights, what was not used, or why it was
refused, so that a run with the cache reports, counts and trains as one without. What is left to the run is done
afterwards: limits of length, amounts, order.

Chunks are written as rows are encoded, each atomically. A run continues where one was killed; it reads the file again
up to there, but encodes nothing. Equal keys give equal chunks, so that several runs may write at once. Each chunk has
a digest of its content, key and number; one that differs is encoded again. Of several processes the main one encodes,
and the others read.

Cost of a warm cache: reading the file once for its digest, and 8 bytes per token.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
import xxhash

from llmkit import __version__
from llmkit.chat.encode import RowEncoding
from llmkit.chat.masks import EncodedRow
from llmkit.chat.rows import Converted, Refused, read_outcomes, read_rows
from llmkit.chat.schemas.table import Fields
from llmkit.errors import LlmkitError, LockedError, UsageError
from llmkit.io.atomic import atomic_file, is_special, no_follow
from llmkit.io.documents import BadLine, DocumentReader, ReadOptions
from llmkit.io.inputs import display_name, is_pipe, is_remote
from llmkit.io.record import Input

if TYPE_CHECKING:
    from llmkit.training.distributed.processes import Processes

FORMAT = 1  # of a chunk, and of what `encode` makes of a row
CHUNK_ROWS = 2048
TENSORS = {"tokens": np.int32, "weights": np.float32, "lengths": np.int64, "outcomes": np.uint8, "digest": np.uint8}

Outcome = Converted[EncodedRow] | Refused


@dataclass(frozen=True, slots=True)
class Chunk:
    """What became of successive rows of a file; `last`: the file ends with them."""

    outcomes: list[Outcome]
    last: bool


@dataclass(slots=True)
class RowCache:
    """A directory of encoded rows. `counts` are chunks that were read and encoded."""

    directory: Path
    processes: Processes
    warn: Callable[[str], None]
    dry_run: bool = False
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        if self.directory.exists() and not self.directory.is_dir():
            raise UsageError(f"--row-cache {self.directory}: not a directory", "name one, which need not exist yet")

    def read(self, reader: DocumentReader, encoding: RowEncoding) -> Iterator[Converted[EncodedRow]]:
        """What `encoding` makes of every row of `reader`, which counts and quarantines what is refused."""
        paths = reader.paths
        for path in paths:
            entry = self._entry(path, reader.options, encoding)
            if entry is None:
                reader.paths = [path]
                yield from (rows for _, rows in read_rows(reader, encoding.encode, encoding.names))
                continue
            if self.processes.world_size > 1:
                self._fill(entry)
            name = display_name(path)
            for chunk in self._chunks(entry):
                for outcome in chunk.outcomes:
                    if isinstance(outcome, Refused):
                        reader.accept([replace(bad, file=name) for bad in outcome.lines])
                    else:
                        yield outcome
            reader.inputs.append(entry.input)
        reader.paths = paths

    def _entry(self, path: str, options: ReadOptions, encoding: RowEncoding) -> _Entry | None:
        """The entry of a file; None if it is damaged, or can be read only once."""
        if is_pipe(path) or (not is_remote(path) and is_special(Path(path))):
            return None
        status = _status(path)
        reader = DocumentReader([path], replace(options, on_bad_line="skip", on_bad_file="stop"))
        try:
            for _ in reader.chunks():
                pass
        except (LlmkitError, OSError):  # to be reported by the reader of the run
            return None
        (file,) = reader.inputs
        decides = [FORMAT, __version__, file.digest, options.text_key, options.id_key, options.max_line_bytes]
        key = xxhash.xxh3_128_hexdigest(repr((decides, encoding.identity)).encode("utf-8", "backslashreplace"))
        if (self.directory / key).is_symlink():
            self.warn(f"{self.directory / key} is a link, which is not followed: the rows are not stored")
            return None
        return _Entry(self.directory / key, key, path, file, status, reader.options, encoding)

    def _fill(self, entry: _Entry) -> None:
        """Encode what is missing on the main process, in collectives that are short however long that takes."""
        chunks = self._chunks(entry) if self.processes.is_main else iter(())
        advanced = True
        while advanced:
            advanced = False
            with suppress(Exception):  # every process meets it again when it reads the chunk
                advanced = next(chunks, None) is not None
            advanced = self.processes.broadcast(advanced)

    def _chunks(self, entry: _Entry) -> Iterator[Chunk]:
        """The chunks of a file, from the cache or encoded and stored."""
        encoder, number, last = _Encoder(entry), 0, False
        while not last:
            chunk = self._load(entry, number)
            if chunk is None:
                chunk = encoder.chunk(number)
                self._store(entry, number, chunk)
            self.counts["encoded" if encoder.number == number else "read"] += 1
            yield chunk
            last = chunk.last
            number += 1

    def _load(self, entry: _Entry, number: int) -> Chunk | None:
        """A stored chunk; None if there is none, or if it is damaged."""
        path = entry.chunk_path(number)
        try:
            with open(path, "rb", opener=no_follow) as file:
                return _unpack(file.read(), f"{entry.key} {number}")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except Exception as error:  # of several libraries, for bytes that may be anything
            if self.processes.is_main:
                self.warn(f"{path} is damaged ({type(error).__name__}): its rows are encoded again")
            return None

    def _store(self, entry: _Entry, number: int, chunk: Chunk) -> None:
        """Store a chunk. One with an unexpected error is not stored, and where that fails the run continues."""
        bad = [line for outcome in chunk.outcomes if isinstance(outcome, Refused) for line in outcome.lines]
        if self.dry_run or not self.processes.is_main or any(line.trace for line in bad):
            return
        if _status(entry.path) != entry.status:
            raise LlmkitError(f"{entry.path} changed while it was read", "run the command again")
        try:
            entry.directory.mkdir(parents=True, exist_ok=True)
            with atomic_file(entry.chunk_path(number), force=True, follow=False) as sink:
                sink.write(_pack(chunk, f"{entry.key} {number}"))
        except LockedError:
            pass  # another run writes the same bytes
        except (LlmkitError, OSError) as error:
            self.warn(f"--row-cache: {getattr(error, 'message', error)}: the rows are not stored")
            self.dry_run = True


@dataclass(frozen=True, slots=True)
class _Entry:
    """The chunks of one file in one encoding."""

    directory: Path
    key: str
    path: str
    input: Input
    status: tuple[int, ...]
    options: ReadOptions
    encoding: RowEncoding

    def chunk_path(self, number: int) -> Path:
        return self.directory / f"{number:05}.safetensors"


def _status(path: str) -> tuple[int, ...]:
    """What changes with the content of a file; nothing for URLs."""
    if is_remote(path):
        return ()
    status = os.stat(path) if os.path.exists(path) else None
    return (status.st_ino, status.st_size, status.st_mtime_ns) if status else ()


class _Encoder(DocumentReader):
    """Encodes chunks of a file in ascending order; what is between them is read, but not encoded."""

    def __init__(self, entry: _Entry) -> None:
        super().__init__([entry.path], entry.options)
        self.number = -1  # of the chunk that is wanted
        self._encoding, self._present = entry.encoding, 0
        self._outcomes: list[Outcome] = []
        self._made = self._all_chunks()

    def chunk(self, number: int) -> Chunk:
        """Chunk `number`, which is above that of the last call."""
        self.number = number
        return next(chunk for present, chunk in self._made if present == number)

    def accept(self, bad: list[BadLine]) -> None:
        if bad and self._present == self.number:
            self._outcomes.append(Refused(bad))

    def _all_chunks(self) -> Iterator[tuple[int, Chunk]]:
        for count, (_, outcome) in enumerate(read_outcomes(self, self._encode, self._encoding.names), 1):
            self._outcomes.append(outcome)
            if count % CHUNK_ROWS == 0:
                yield self._present, Chunk(self._outcomes, last=False)
                self._present, self._outcomes = self._present + 1, []
        yield self._present, Chunk(self._outcomes, last=True)

    def _encode(self, fields: Fields) -> Converted[EncodedRow]:
        return self._encoding.encode(fields) if self._present == self.number else Converted()


def _pack(chunk: Chunk, name: str) -> bytes:
    """A chunk as safetensors; `name` is its key and number."""
    from safetensors.numpy import save

    rows = [row for outcome in chunk.outcomes if isinstance(outcome, list) for row in outcome]
    outcomes = [chunk.last, *map(_as_json, chunk.outcomes)]
    tensors = {
        "tokens": np.concatenate([np.zeros(0, np.int32), *(row.tokens for row in rows)]),
        "weights": np.concatenate([np.zeros(0, np.float32), *(row.weights for row in rows)]),
        "lengths": np.array([len(row.tokens) for row in rows], np.int64),
        "outcomes": np.frombuffer(orjson.dumps(outcomes), np.uint8),
    }
    return save(tensors | {"digest": _digest(tensors, name)})


def _unpack(stored: bytes, name: str) -> Chunk:
    """The chunk that `_pack` stored. Raises an exception of any kind for other bytes."""
    from safetensors.numpy import load

    tensors = load(stored)
    digest = tensors.pop("digest")
    if any(tensors[key].dtype != TENSORS[key] for key in tensors) or not np.array_equal(digest, _digest(tensors, name)):
        raise ValueError("another digest")
    ends = np.cumsum(tensors["lengths"]).tolist()
    spans = iter(zip([0, *ends], ends, strict=False))
    last, *outcomes = orjson.loads(tensors["outcomes"].tobytes())

    def row(lost: list[str]) -> EncodedRow:
        span = slice(*next(spans))
        return EncodedRow(tensors["tokens"][span], tensors["weights"][span], tuple(lost))

    return Chunk([_from_json(item, row) for item in outcomes], last)


def _as_json(outcome: Outcome) -> Any:
    """An outcome without its tokens; bytes are text of the same code points."""
    if isinstance(outcome, Refused):
        return {"bad": [[bad.line, bad.reason, bad.raw.decode("latin-1")] for bad in outcome.lines]}
    return [[row.lost for row in outcome], outcome.unused, list(outcome.left_out.items())]


def _from_json(item: Any, row: Callable[[list[str]], EncodedRow]) -> Outcome:
    if isinstance(item, dict):
        return Refused([BadLine("", line, reason, raw.encode("latin-1")) for line, reason, raw in item["bad"]])
    lost, unused, left_out = item
    converted = Converted(map(row, lost), unused)
    converted.left_out = Counter(dict(left_out))
    return converted


def _digest(tensors: dict[str, np.ndarray], name: str) -> np.ndarray:
    state = xxhash.xxh3_128(name.encode())
    for key, tensor in sorted(tensors.items()):
        state.update(f"{key} {len(tensor)}".encode())
        state.update(tensor.tobytes())
    return np.frombuffer(state.digest(), np.uint8)
