"""Pages through an engine in guarded workers, in order, with counts of what became of them; of files here, or on a cluster."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from llmkit.corpus.extract.archives import Broken, Page, read_pages
from llmkit.corpus.extract.engines import ENGINES, Skip, document_of
from llmkit.engine.guarded import Failure, guarded_map
from llmkit.io.documents import DocumentReader, ReadOptions
from llmkit.io.inputs import DOCUMENT_SUFFIXES, STDIN, is_remote
from llmkit.io.record import Input, base_name
from llmkit.lineage.formats import digest_path

ROWS = DOCUMENT_SUFFIXES  # rows with HTML in a field, by name; everything else says itself what it is
TASK_BYTES = 8 << 20  # of files that one task on a cluster reads, at least
BATCH_PAGES, BATCH_BYTES = 64, 1 << 20  # a batch ends at whichever comes first
MEMORY_A_BYTE, MEMORY_BASE = 48, 1 << 30  # a worker's memory: so much for each byte of the longest page, and this


@dataclass(slots=True)
class Extracted:
    """What became of some pages: lines to keep, lines for --rejects, broken records, and why pages gave no document."""

    kept: bytes = b""
    rejected: bytes = b""
    pages: int = 0
    documents: int = 0
    characters: int = 0
    broken: list[Broken] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class Extractor:
    """Runs an engine over pages; `seconds` bounds the time of one page, `max_bytes` its size."""

    engine: str
    seconds: float
    max_bytes: int

    def run(self, pages: Iterable[Page | Broken], jobs: int = 1) -> Iterator[Extracted]:
        """Documents and rejects of the pages, in their order."""
        engine = ENGINES[self.engine]

        def work(found: Page | Broken) -> dict[str, Any] | str:
            if isinstance(found, Broken):
                return found.reason
            try:
                return document_of(found, engine)
            except Skip as skip:
                return str(skip)
            except MemoryError:
                raise
            except Exception as error:  # hostile pages find the faults of parsers: one page, counted, not the whole run
                return f"engine failed ({type(error).__name__})"

        sent: list[list[Page | Broken]] = []  # batches whose results are not there yet; few, see guarded_map

        def batches() -> Iterator[list[Page | Broken]]:
            for batch in _batches(pages):
                sent.append(batch)
                yield batch

        memory = MEMORY_BASE + MEMORY_A_BYTE * self.max_bytes
        for results in guarded_map(work, batches(), jobs=jobs, seconds=self.seconds, memory=memory):
            yield _outcome(sent.pop(0), results)


def _outcome(batch: list[Page | Broken], results: list[dict[str, Any] | str | Failure]) -> Extracted:
    out = Extracted()
    kept, rejected = [], []
    for found, result in zip(batch, results, strict=True):
        if isinstance(result, dict):
            kept.append(orjson.dumps(result))
            out.characters += len(result["text"])
            continue
        reason = result.reason if isinstance(result, Failure) else result
        if isinstance(found, Broken):
            out.broken.append(found)
            row = {"file": found.file, "offset": found.offset, "reason": reason}
        else:
            out.skipped[reason] += 1
            row = {"id": found.id, "url": found.url, "content_type": found.content_type, "reason": reason}
        rejected.append(orjson.dumps(row))
    out.pages, out.documents = len(batch) - len(out.broken), len(kept)
    out.kept = b"".join(line + b"\n" for line in kept)
    out.rejected = b"".join(line + b"\n" for line in rejected)
    return out


@dataclass(frozen=True, slots=True)
class Reading:
    """How files become pages: `rows` says of JSON lines how they are read, pages of which field; `verify`: records with a wrong digest are broken."""

    rows: ReadOptions
    max_bytes: int
    verify: bool = False

    def pages(
        self, path: str, read: list[Input], reader_of: Callable[[str], DocumentReader] | None = None
    ) -> Iterator[Page | Broken]:
        """The pages of one file; `read` takes its lineage when it is done with."""
        if path.endswith(ROWS):
            reader = reader_of(path) if reader_of else DocumentReader([path], self.rows)
            for document in reader.documents():
                rest = {key: value for key, value in document.fields.items() if key not in (self.rows.text_key, "id")}
                yield Page(document.id, document.text.encode("utf-8", "replace"), charset="utf-8", fields=rest)
            read += reader.inputs
            return
        digest: list[str] | None = [] if path == STDIN else None  # a file's can be had later
        yield from read_pages(path, max_bytes=self.max_bytes, verify=self.verify, digest=digest)
        read.append(Input("input", base_name(path), digest[0] if digest else digest_path(path)))


def extract_files(extractor: Extractor, reading: Reading, paths: Sequence[str]) -> Iterator[Extracted | list[Input]]:
    """What became of the pages of some files, then their lineage: what a worker of a cluster does."""
    read: list[Input] = []
    yield from extractor.run(page for path in paths for page in reading.pages(path, read))
    yield read


def tasks(paths: Iterable[str]) -> Iterator[list[str]]:
    """Files in tasks for a cluster: large ones alone, small ones together."""
    task: list[str] = []
    size = 0
    for path in paths:
        task.append(path)
        size += TASK_BYTES if is_remote(path) else os.path.getsize(path)
        if size >= TASK_BYTES:
            yield task
            task, size = [], 0
    if task:
        yield task


def _batches(pages: Iterable[Page | Broken]) -> Iterator[list[Page | Broken]]:
    batch: list[Page | Broken] = []
    size = 0
    for page in pages:
        batch.append(page)
        size += len(page.content) if isinstance(page, Page) else 0
        if len(batch) >= BATCH_PAGES or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
