"""From a step to its documents, and from a document to its steps: RUN/trace/, written once when a run starts.

    RUN/trace/trace.json      how the steps divide the stream, and the shard files with their sizes and digests
    RUN/trace/offsets.npy     int64 [documents + 1], start of each document in the stream; mapped, not read
    RUN/trace/{source,document,epoch,start}.npy
                              for a stream that follows a plan: the stored document of each row, in the fewest bytes

    trace = Trace("run/")
    for span in trace.step(1234): print(span.id, span.source, span.start, span.stop)
    for span in trace.find("doc-17"): print(span.step)

Steps count from 1, as in metrics.jsonl. Only the shard files that are needed are opened, and only if their
size and digest have not changed since the start. Cost: a search in a mapped table for a step, one pass over
the ids for a document (tests/bench/trace_speed.md); 8 bytes per document on disk, about 6 more with a plan.
No torch here, so that the command starts fast.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmkit.errors import LlmkitError
from llmkit.io.atomic import atomic_directory
from llmkit.io.run_layout import is_run, regular
from llmkit.shards.arrow import as_numpy, string_data
from llmkit.shards.shard import PADDING_SOURCE, Shard, batch_tokens

VERSION = 1
NAME = "trace"
HINT = "the trace is written when a run starts; --resume writes it again"
PhaseSizes = tuple[int, int, int, int]  # from this step on, which starts at this token: rows per step, tokens per row


@dataclass(frozen=True, slots=True)
class DocumentSpan:
    """Tokens [start, stop) of a document, at positions [first, last) of row `row` of step `step`.

    `epoch` is how often it was seen before.
    """

    step: int
    row: int
    first: int
    last: int
    id: str
    source: str
    start: int
    stop: int
    epoch: int
    tokens: NDArray[Any]

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__ if name != "tokens"}


def write_trace(run: Path, stream: Any, phases: Iterable[PhaseSizes], total: int) -> None:
    """Write the trace of a run. `stream` is an OrderedTokens or TokenStore, `total` the tokens of the run."""
    order = getattr(stream, "order", None)
    stores = stream.stores if order is not None else [stream]
    description = {
        "version": VERSION,
        "legs": list(map(list, phases)),
        "total": total,
        "stores": [[_describe_file(shard, run) for shard in store.shards] for store in stores],
    }
    text = json.dumps(description, indent=1)
    directory = run / NAME
    try:
        if regular(directory / "trace.json").read_text(encoding="utf-8") == text:
            return
    except (OSError, ValueError, LlmkitError):
        pass
    shutil.rmtree(directory, ignore_errors=True)  # of other data, or of the same data at another path
    with atomic_directory(directory) as partial:
        np.save(partial / "offsets.npy", np.asarray(stream.offsets))
        if order is not None:
            columns = {
                "source": order.source + 1,
                "document": order.document,
                "epoch": order.epoch,
                "start": order.start,
            }
            for name, column in columns.items():
                if column is not None:  # source 0 is padding
                    np.save(partial / f"{name}.npy", column.astype(np.min_scalar_type(int(column.max(initial=0)))))
        (partial / "trace.json").write_text(text, encoding="utf-8")


def _describe_file(shard: Shard, run: Path) -> list[Any]:
    path = shard.path.resolve()
    inside = path.is_relative_to(run.resolve())
    name = str(path.relative_to(run.resolve())) if inside else str(path)
    return [name, path.stat().st_size, shard.trailer["documents"], shard.trailer["digest"]]


class Trace:
    """The trace of a run.

    Raises LlmkitError if there is none, it is damaged, or the data has changed since the run read it.
    """

    def __init__(self, run: str | Path) -> None:
        self._run = Path(run)
        self._shards: dict[tuple[int, int], Shard] = {}
        self._tokens: dict[tuple[int, int, int], tuple[NDArray[np.int64], NDArray[Any]]] = {}  # by record batch
        directory = self._run / NAME
        if not directory.is_dir():
            if not is_run(self._run):
                raise LlmkitError(f"{run}: not a run", "give the output directory of train or anneal")
            raise LlmkitError(f"{run}: no trace", "only train and anneal write one; rows of sft and dpo have no ids")
        try:
            content = json.loads(regular(directory / "trace.json").read_bytes())
            if content["version"] != VERSION:
                raise ValueError(f"version {content['version']}")
            self.phases: list[PhaseSizes] = [(int(a), int(b), int(c), int(d)) for a, b, c, d in content["legs"]]
            self.total = int(content["total"])
            self._files = [[(str(a), int(b), int(c), str(d)) for a, b, c, d in files] for files in content["stores"]]
            self._offsets = _load_mapped(directory / "offsets.npy")
            columns = ("source", "document", "epoch", "start")
            names = [name for name in columns if (directory / f"{name}.npy").exists()]
            self._columns = {name: _load_mapped(directory / f"{name}.npy") for name in names}
            self._check()
            self._stream_tokens = int(self._offsets[-1])
        except Exception as error:  # of many kinds: numpy evaluates the header of a table
            raise LlmkitError(f"{directory}: not a readable trace ({error})", HINT) from error
        self._firsts = [np.cumsum([0, *(file[2] for file in files)]) for files in self._files]

    def _check(self) -> None:
        """Raise ValueError if the tables are inconsistent."""
        offsets, tables = self._offsets, list(self._columns.values())
        if offsets.dtype != np.int64 or offsets.ndim != 1 or len(offsets) < 2 or offsets[-1] < 2:
            raise ValueError("offsets.npy")
        if any(table.shape != (len(offsets) - 1,) or table.dtype.kind != "u" for table in tables):
            raise ValueError("tables of different lengths")
        if bool(tables) != ({"source", "document", "epoch"} <= self._columns.keys()) or not self._files:
            raise ValueError("a table is missing")
        increasing = all(a[0] < b[0] and a[1] < b[1] for a, b in zip(self.phases, self.phases[1:], strict=False))
        if (
            not self.phases
            or self.phases[0][:2] != (0, 0)
            or min(x for phase in self.phases for x in phase[2:]) < 1
            or not increasing
        ):
            raise ValueError("legs")

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        step, token, rows, length = self.phases[-1]
        return step + -(-(self.total - token) // (rows * length))

    def step(self, number: int) -> Iterator[DocumentSpan]:
        """The documents that step `number`, counted from 1, read, row by row."""
        if not 1 <= number <= self.steps:
            raise LlmkitError(f"{self._run}: no step {number:,}", f"the run has steps 1 to {self.steps:,}")
        phase = self.phases[bisect_right(self.phases, number - 1, key=lambda phase: phase[0]) - 1]
        step_tokens = phase[2] * phase[3]
        start = phase[1] + (number - 1 - phase[0]) * step_tokens
        position, end = start, min(start + step_tokens, self._end(phase))
        while position < end:
            epoch, offset = divmod(position, self._stream_tokens)
            row = int(np.searchsorted(self._offsets, offset, side="right")) - 1
            stop = min(end, epoch * self._stream_tokens + int(self._offsets[row + 1]))
            yield from self._spans(row, position, stop)
            position = stop

    def find(self, id: str, steps: int | None = None) -> Iterator[DocumentSpan]:
        """Every span of the documents with this id in the first `steps` steps (None: all), in the order in
        which they were read."""
        rows = [self._rows(store, document) for store, document in self._documents_with_id(id)]
        if not rows:
            raise LlmkitError(
                f"{self._run}: no document {id!r} in its data", "ids are those of the tokenized documents"
            )
        stream_tokens, sorted_rows = self._stream_tokens, np.sort(np.concatenate(rows)).tolist()
        total = self.total if steps is None or steps >= self.steps else self._tokens_before(steps)
        for epoch in range(-(-total // stream_tokens)):
            for row in sorted_rows:
                first, last = (epoch * stream_tokens + int(offset) for offset in self._offsets[row : row + 2])
                if first < min(last, total):
                    yield from self._spans(row, first, min(last, total))

    def _tokens_before(self, step: int) -> int:
        """The number of tokens in the first `step` steps."""
        phase = self.phases[bisect_right(self.phases, step, key=lambda phase: phase[0]) - 1]
        return min(phase[1] + (step - phase[0]) * phase[2] * phase[3], self.total)

    def _end(self, phase: PhaseSizes) -> int:
        following = self.phases.index(phase) + 1
        return self.phases[following][1] if following < len(self.phases) else self.total

    def _spans(self, row: int, position: int, stop: int) -> Iterator[DocumentSpan]:
        """Tokens [position, stop) of the endless stream, which belong to document `row`, cut at the ends of
        sequences."""
        stream_epoch = position // self._stream_tokens
        document_start = stream_epoch * self._stream_tokens + int(self._offsets[row])  # in the endless stream
        store, document, order_epoch, start = self._origin(row)
        name, source, stored_epoch, tokens = (
            self._document(store, document) if store >= 0 else ("", PADDING_SOURCE, 0, None)
        )
        epoch = order_epoch + stored_epoch + stream_epoch
        while position < stop:
            phase = self.phases[bisect_right(self.phases, position, key=lambda phase: phase[1]) - 1]
            sequence, first = divmod(position - phase[1], phase[3])
            step, batch_row = divmod(sequence, phase[2])
            size = min(stop - position, phase[3] - first)
            a, b = start + position - document_start, start + position - document_start + size
            span_tokens = np.zeros(0, np.uint16) if tokens is None else tokens[a:b]
            yield DocumentSpan(
                phase[0] + step + 1, batch_row, first, first + size, name, source, a, b, epoch, span_tokens
            )
            position += size

    def _origin(self, row: int) -> tuple[int, int, int, int]:
        """Store (-1: padding) and document of a row, how often it was seen before in this order, and its
        first token in the document."""
        if not self._columns:
            return 0, row, 0, 0
        values = {name: int(column[row]) for name, column in self._columns.items()}
        return values["source"] - 1, values["document"], values["epoch"], values.get("start", 0)

    def _rows(self, store: int, document: int) -> NDArray[np.int64]:
        """Rows of the order that contain a stored document."""
        if not self._columns:
            return np.array([document], np.int64)
        matches = self._columns["document"] == document
        return np.flatnonzero(matches & (self._columns["source"] == store + 1))

    def _document(self, store: int, document: int) -> tuple[str, str, int, NDArray[Any]]:
        """Id, source, times seen before and tokens of a stored document."""
        if store >= len(self._files) or document >= self._firsts[store][-1]:
            raise LlmkitError(f"{self._run / NAME}: refers to a missing document", HINT)
        file = int(np.searchsorted(self._firsts[store], document, side="right")) - 1
        shard, row = self.shard(store, file), document - int(self._firsts[store][file])
        number = 0
        while number < len(shard.batches) and row >= shard.batches[number].num_rows:
            row -= shard.batches[number].num_rows
            number += 1
        if number == len(shard.batches):
            raise LlmkitError(
                f"{shard.name}: fewer documents than when the run read it", "restore the data that the run read"
            )
        batch = shard.batches[number]
        if (store, file, number) not in self._tokens:  # checked once: a step reads many documents of one batch
            self._tokens[store, file, number] = batch_tokens(batch, shard.name)
        offsets, values = self._tokens[store, file, number]
        epoch = int(as_numpy(batch.column("epoch"))[row]) if "epoch" in batch.schema.names else 0
        id, source = str(batch.column("id")[row].as_py()), str(batch.column("source")[row].as_py())
        return id, source, epoch, values[offsets[row] - offsets[0] : offsets[row + 1] - offsets[0]]

    def _documents_with_id(self, id: str) -> Iterator[tuple[int, int]]:
        """Store and number of every stored document with this id."""
        encoded_id = id.encode()
        for store, files in enumerate(self._files):
            for number, first in zip(range(len(files)), self._firsts[store].tolist(), strict=False):
                for batch in self.shard(store, number).batches:
                    starts, text = string_data(batch.column("id"))
                    yield from ((store, first + row) for row in _matching_rows(encoded_id, starts, text))
                    first += batch.num_rows

    def shard(self, store: int, number: int) -> Shard:
        """A shard file, mapped; raises LlmkitError if it has changed since the run read it."""
        if (store, number) not in self._shards:
            name, size, _, digest = self._files[store][number]
            path = Path(os.path.join(self._run, name))
            hint = "restore the data at its former path, or --resume the run with the data at its new path"
            try:
                same_size = path.stat().st_size == size
            except OSError as error:
                raise LlmkitError(f"{path}: {error.strerror}", hint) from error
            except ValueError as error:  # no path at all
                raise LlmkitError(f"{self._run}: its trace names {name!r}", "the trace is damaged") from error
            shard = Shard(path, str(path)) if same_size else None
            if shard is None or shard.trailer.get("digest") != digest:
                raise LlmkitError(f"{path}: not the data that the run read", hint)
            self._shards[store, number] = shard
        return self._shards[store, number]


def _load_mapped(path: Path) -> NDArray[Any]:
    """A memory-mapped array as a plain one, since reading single elements of numpy's memmap type takes ten
    times as long."""
    return np.asarray(np.load(regular(path), mmap_mode="r"))


def _matching_rows(pattern: bytes, starts: NDArray[np.int32], text: NDArray[np.uint8]) -> list[int]:
    """The rows whose text equals `pattern`.

    One search through all bytes; not pyarrow.compute, which takes longer to import.
    """
    if not pattern:
        return np.flatnonzero(np.diff(starts) == 0).tolist()  # type: ignore[no-any-return]
    matches = np.array([match.start() for match in re.finditer(re.escape(pattern), text.data)], np.int64)
    row = np.searchsorted(starts, matches, side="right") - 1
    row, matches = row[row < len(starts) - 1], matches[row < len(starts) - 1]
    equal = (starts[row] == matches) & (starts[row + 1] == matches + len(pattern))
    return row[equal].tolist()  # type: ignore[no-any-return]


def skipped_steps(run: str | Path) -> dict[int, str]:
    """Steps that the guard skipped, with the cause, from the run's events."""
    causes: dict[int, str] = {}
    for record in _lines(Path(run) / "events.jsonl"):
        steps = record.get("skipped")
        if isinstance(steps, list):
            causes |= {step: str(record.get("cause", "")) for step in steps if isinstance(step, int)}
    return causes


def steps_done(run: str | Path) -> int:
    """The last step in the run's log."""
    try:
        with open(regular(Path(run) / "metrics.jsonl"), "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - (1 << 16)))
            lines = file.read().splitlines()
    except OSError:
        return 0
    steps = [record["step"] for line in lines if isinstance((record := _parse(line)).get("step"), int)]
    return max(steps, default=0)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with open(regular(path), "rb") as file:
            yield from map(_parse, file)
    except OSError:
        return


def _parse(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}
