"""From a step back to its documents, and from a document to its steps: RUN/trace/, written once when a run starts.

    RUN/trace/trace.json      how steps cut the stream, and the shard files with their sizes and digests
    RUN/trace/offsets.npy     int64 [documents + 1], where each document of the stream starts; mapped, not read
    RUN/trace/{source,document,epoch,start}.npy    of a stream that follows a plan: which stored document each row is, in the fewest bytes

    trace = Trace("run/")
    for piece in trace.step(1234): print(piece.id, piece.source, piece.start, piece.stop)
    for piece in trace.find("doc-17"): print(piece.step)

Steps count from 1, as in metrics.jsonl. Only the shard files that are asked for are opened, and only if size and digest are still those of the start.
Cost: a search in a mapped table for a step, one pass over the ids for a document (tests/bench/trace_speed.md); 8 bytes a document on disk, some 6
more where it follows a plan. No torch here: the command starts in a blink.
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
from llmkit.io.run_layout import is_run
from llmkit.shards.arrow import as_numpy, string_data
from llmkit.shards.shard import PADDING_SOURCE, Shard, batch_tokens

VERSION = 1
NAME = "trace"
HINT = "the trace is written when a run starts; --resume writes it anew"
Phase = tuple[int, int, int, int]  # from this step on, which begins at this token: rows a step, tokens a row


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens [start, stop) of a document, which stood at [first, last) of row `row` of step `step`; `epoch` is how often it was seen before."""

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


def write_trace(run: Path, stream: Any, phases: Iterable[Phase], total: int) -> None:
    """Store what leads from steps to documents. `stream` is an OrderedTokens or TokenStore, `total` the tokens of the run."""
    order = getattr(stream, "order", None)
    stores = stream.stores if order is not None else [stream]
    described = {
        "version": VERSION,
        "legs": list(map(list, phases)),
        "total": total,
        "stores": [[_described(part, run) for part in store.shards] for store in stores],
    }
    text = json.dumps(described, indent=1)
    place = run / NAME
    try:
        if (place / "trace.json").read_text() == text:
            return
    except OSError:
        pass
    shutil.rmtree(place, ignore_errors=True)  # of other data, or of the same elsewhere
    with atomic_directory(place) as partial:
        np.save(partial / "offsets.npy", np.asarray(stream.offsets))
        if order is not None:
            columns = {
                "source": order.source + 1,
                "document": order.document,
                "epoch": order.epoch,
                "start": order.start,
            }
            for name, column in columns.items():
                if column is not None:  # a source of 0 is padding
                    np.save(partial / f"{name}.npy", column.astype(np.min_scalar_type(int(column.max(initial=0)))))
        (partial / "trace.json").write_text(text)


def _described(part: Shard, run: Path) -> list[Any]:
    path = part.path.resolve()
    inside = path.is_relative_to(run.resolve())
    name = str(path.relative_to(run.resolve())) if inside else str(path)
    return [name, path.stat().st_size, part.trailer["documents"], part.trailer["digest"]]


class Trace:
    """The trace of a run; LlmkitError where there is none, it is damaged, or the data is no longer what the run read."""

    def __init__(self, run: str | Path) -> None:
        self._run = Path(run)
        self._parts: dict[tuple[int, int], Shard] = {}
        self._tokens: dict[tuple[int, int, int], tuple[NDArray[np.int64], NDArray[Any]]] = {}  # of a batch
        place = self._run / NAME
        if not place.is_dir():
            if not is_run(self._run):
                raise LlmkitError(f"{run}: not a run", "name the directory that train or anneal wrote")
            raise LlmkitError(f"{run}: holds no trace", "train and anneal write one; rows of sft and dpo have no ids")
        try:
            content = json.loads((place / "trace.json").read_bytes())
            if content["version"] != VERSION:
                raise ValueError(f"version {content['version']}")
            self.phases: list[Phase] = [(int(a), int(b), int(c), int(d)) for a, b, c, d in content["legs"]]
            self.total = int(content["total"])
            self._files = [[(str(a), int(b), int(c), str(d)) for a, b, c, d in files] for files in content["stores"]]
            self._offsets = _mapped(place / "offsets.npy")
            names = [name for name in ("source", "document", "epoch", "start") if (place / f"{name}.npy").exists()]
            self._columns = {name: _mapped(place / f"{name}.npy") for name in names}
            self._check()
            self._whole = int(self._offsets[-1])
        except (OSError, ValueError, KeyError, TypeError, RecursionError, EOFError) as error:
            raise LlmkitError(f"{place}: not a readable trace ({error})", HINT) from error
        self._firsts = [np.cumsum([0, *(file[2] for file in files)]) for files in self._files]

    def _check(self) -> None:
        """ValueError where the tables do not fit together."""
        offsets, tables = self._offsets, list(self._columns.values())
        if offsets.dtype != np.int64 or offsets.ndim != 1 or len(offsets) < 2 or offsets[-1] < 2:
            raise ValueError("offsets.npy")
        if any(table.shape != (len(offsets) - 1,) or table.dtype.kind != "u" for table in tables):
            raise ValueError("tables of different lengths")
        if bool(tables) != ({"source", "document", "epoch"} <= self._columns.keys()) or not self._files:
            raise ValueError("a table is missing")
        rising = all(a[0] < b[0] and a[1] < b[1] for a, b in zip(self.phases, self.phases[1:], strict=False))
        if (
            not self.phases
            or self.phases[0][:2] != (0, 0)
            or min(x for phase in self.phases for x in phase[2:]) < 1
            or not rising
        ):
            raise ValueError("legs")

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        step, token, rows, length = self.phases[-1]
        return step + -(-(self.total - token) // (rows * length))

    def step(self, number: int) -> Iterator[Piece]:
        """What step `number`, counted from 1, read, row by row."""
        if not 1 <= number <= self.steps:
            raise LlmkitError(f"{self._run}: no step {number:,}", f"the run has steps 1 to {self.steps:,}")
        phase = self.phases[bisect_right(self.phases, number - 1, key=lambda phase: phase[0]) - 1]
        step_tokens = phase[2] * phase[3]
        start = phase[1] + (number - 1 - phase[0]) * step_tokens
        at, end = start, min(start + step_tokens, self._end(phase))
        while at < end:
            rounds, inside = divmod(at, self._whole)
            row = int(np.searchsorted(self._offsets, inside, side="right")) - 1
            until = min(end, rounds * self._whole + int(self._offsets[row + 1]))
            yield from self._pieces(row, at, until)
            at = until

    def find(self, id: str, done: int | None = None) -> Iterator[Piece]:
        """Every piece of the documents of this id in the first `done` steps (all), in the order in which they were read."""
        rows = [self._rows(store, document) for store, document in self._named(id)]
        if not rows:
            raise LlmkitError(
                f"{self._run}: no document {id!r} in its data", "ids are those of the documents that were tokenized"
            )
        whole, found = self._whole, np.sort(np.concatenate(rows)).tolist()
        total = self.total if done is None or done >= self.steps else self._begins(done)
        for rounds in range(-(-total // whole)):
            for row in found:
                first, last = (rounds * whole + int(at) for at in self._offsets[row : row + 2])
                if first < min(last, total):
                    yield from self._pieces(row, first, min(last, total))

    def _begins(self, step: int) -> int:
        """The token before which `step` steps are done."""
        phase = self.phases[bisect_right(self.phases, step, key=lambda phase: phase[0]) - 1]
        return min(phase[1] + (step - phase[0]) * phase[2] * phase[3], self.total)

    def _end(self, phase: Phase) -> int:
        following = self.phases.index(phase) + 1
        return self.phases[following][1] if following < len(self.phases) else self.total

    def _pieces(self, row: int, at: int, until: int) -> Iterator[Piece]:
        """Tokens [at, until) of the endless stream, which are of document `row`, cut where sequences end."""
        rounds = at // self._whole
        shift = rounds * self._whole + int(self._offsets[row])  # of the document's first token
        store, document, epoch, start = self._origin(row)
        name, source, seen, tokens = self._document(store, document) if store >= 0 else ("", PADDING_SOURCE, 0, None)
        while at < until:
            phase = self.phases[bisect_right(self.phases, at, key=lambda phase: phase[1]) - 1]
            sequence, first = divmod(at - phase[1], phase[3])
            step, place = divmod(sequence, phase[2])
            size = min(until - at, phase[3] - first)
            a, b = start + at - shift, start + at - shift + size
            text = np.zeros(0, np.uint16) if tokens is None else tokens[a:b]
            yield Piece(
                phase[0] + step + 1, place, first, first + size, name, source, a, b, epoch + seen + rounds, text
            )
            at += size

    def _origin(self, row: int) -> tuple[int, int, int, int]:
        """Store (-1: padding) and document of a row, how often it was seen before in this order, and the token that it begins with."""
        if not self._columns:
            return 0, row, 0, 0
        values = {name: int(column[row]) for name, column in self._columns.items()}
        return values["source"] - 1, values["document"], values["epoch"], values.get("start", 0)

    def _rows(self, store: int, document: int) -> NDArray[np.int64]:
        """Rows of the order that a stored document stands in."""
        if not self._columns:
            return np.array([document], np.int64)
        here = self._columns["document"] == document
        return np.flatnonzero(here & (self._columns["source"] == store + 1))

    def _document(self, store: int, document: int) -> tuple[str, str, int, NDArray[Any]]:
        """Id, source, times seen before and tokens of a stored document."""
        if store >= len(self._files) or document >= self._firsts[store][-1]:
            raise LlmkitError(f"{self._run / NAME}: names a document that is not there", HINT)
        file = int(np.searchsorted(self._firsts[store], document, side="right")) - 1
        part, row = self.part(store, file), document - int(self._firsts[store][file])
        number = 0
        while number < len(part.batches) and row >= part.batches[number].num_rows:
            row -= part.batches[number].num_rows
            number += 1
        if number == len(part.batches):
            raise LlmkitError(f"{part.name}: fewer documents than when the run read it", "put the data back as it was")
        batch = part.batches[number]
        if (store, file, number) not in self._tokens:  # checked once: a step has many documents of one batch
            self._tokens[store, file, number] = batch_tokens(batch, part.name)
        offsets, values = self._tokens[store, file, number]
        epoch = int(as_numpy(batch.column("epoch"))[row]) if "epoch" in batch.schema.names else 0
        id, source = str(batch.column("id")[row].as_py()), str(batch.column("source")[row].as_py())
        return id, source, epoch, values[offsets[row] - offsets[0] : offsets[row + 1] - offsets[0]]

    def _named(self, id: str) -> Iterator[tuple[int, int]]:
        """Store and number of every stored document of this id."""
        wanted = id.encode()
        for store, files in enumerate(self._files):
            for number, first in zip(range(len(files)), self._firsts[store].tolist(), strict=False):
                for batch in self.part(store, number).batches:
                    starts, text = string_data(batch.column("id"))
                    yield from ((store, first + row) for row in _rows_of(wanted, starts, text))
                    first += batch.num_rows

    def part(self, store: int, number: int) -> Shard:
        """A shard file, mapped, if it is still what the run read."""
        if (store, number) not in self._parts:
            name, size, _, digest = self._files[store][number]
            path = Path(os.path.join(self._run, name))
            hint = "put the data back where it was when the run read it, or --resume the run with it where it is now"
            try:
                same = path.stat().st_size == size
            except OSError as error:
                raise LlmkitError(f"{path}: {error.strerror}", hint) from error
            part = Shard(path, str(path)) if same else None
            if part is None or part.trailer.get("digest") != digest:
                raise LlmkitError(f"{path}: not the data that the run read", hint)
            self._parts[store, number] = part
        return self._parts[store, number]


def _mapped(path: Path) -> NDArray[Any]:
    """An array on disk; plain, as reading single elements of numpy's own kind of mapped array takes ten times as long."""
    return np.asarray(np.load(path, mmap_mode="r"))


def _rows_of(wanted: bytes, starts: NDArray[np.int32], text: NDArray[np.uint8]) -> list[int]:
    """The rows whose text is `wanted`. One search through all bytes; not pyarrow.compute, which takes longer to import."""
    if not wanted:
        return np.flatnonzero(np.diff(starts) == 0).tolist()  # type: ignore[no-any-return]
    found = np.array([match.start() for match in re.finditer(re.escape(wanted), text.data)], np.int64)
    row = np.searchsorted(starts, found, side="right") - 1
    row, found = row[row < len(starts) - 1], found[row < len(starts) - 1]
    whole = (starts[row] == found) & (starts[row + 1] == found + len(wanted))
    return row[whole].tolist()  # type: ignore[no-any-return]


def skipped_steps(run: str | Path) -> dict[int, str]:
    """Steps that the guard passed over, and why, from the run's events."""
    found: dict[int, str] = {}
    for record in _lines(Path(run) / "events.jsonl"):
        steps = record.get("skipped")
        if isinstance(steps, list):
            found |= {step: str(record.get("cause", "")) for step in steps if isinstance(step, int)}
    return found


def steps_done(run: str | Path) -> int:
    """The last step in the log of the run."""
    try:
        with open(Path(run) / "metrics.jsonl", "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - (1 << 16)))
            lines = file.read().splitlines()
    except OSError:
        return 0
    found = [record["step"] for line in lines if isinstance((record := _parsed(line)).get("step"), int)]
    return max(found, default=0)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with open(path, "rb") as file:
            yield from map(_parsed, file)
    except OSError:
        return


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}
