"""Running an extraction engine over pages in guarded workers, in order and with counts of outcomes.

Pages come from local files, or from files that the workers of a cluster read.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from llmkit.corpus.extract.archives import BrokenRecord, PageRecord, read_pages
from llmkit.corpus.extract.engines import ENGINES, Skip, document_of
from llmkit.engine.guarded import Failure, guarded_map
from llmkit.errors import LlmkitError
from llmkit.io.atomic import is_special
from llmkit.io.documents import Document, DocumentReader, ReadOptions
from llmkit.io.inputs import DOCUMENT_SUFFIXES, STDIN, has_suffix, is_remote
from llmkit.io.record import Input, base_name
from llmkit.lineage.formats import digest_path

ROWS = DOCUMENT_SUFFIXES  # names of files with HTML in a field of JSON rows; other formats are recognised by content
TASK_BYTES = 8 << 20  # minimum size of the files in one task for a cluster
BATCH_PAGES, BATCH_BYTES = 64, 1 << 20  # a batch ends at whichever is reached first
MEMORY_PER_BYTE, MEMORY_BASE = 48, 1 << 30  # memory limit of a worker: per byte of the longest page, plus a constant


@dataclass(slots=True)
class ExtractionResult:
    """The outcome for a batch of pages: lines to keep, lines for --rejects, broken records, counts of skip reasons."""

    kept: bytes = b""
    rejected: bytes = b""
    pages: int = 0
    documents: int = 0
    truncated: int = 0  # documents of pages that their records mark as cut
    characters: int = 0
    broken: list[BrokenRecord] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class Extractor:
    """Runs an engine over pages; `seconds` limits the time per page, `max_bytes` its size."""

    engine: str
    seconds: float
    max_bytes: int

    def run(self, pages: Iterable[PageRecord | BrokenRecord], jobs: int = 1) -> Iterator[ExtractionResult]:
        """Documents and rejects of the pages, in order."""
        engine = ENGINES[self.engine]

        def work(record: PageRecord | BrokenRecord) -> dict[str, Any] | str:
            if isinstance(record, BrokenRecord):
                return record.reason
            try:
                return document_of(record, engine)
            except Skip as skip:
                return str(skip)
            except MemoryError:
                raise
            except Exception as error:  # hostile pages trigger bugs of parsers: count the page, do not end the run
                return f"engine failed ({type(error).__name__})"

        pending: list[list[PageRecord | BrokenRecord]] = []  # batches without results yet; few, see guarded_map

        def batches() -> Iterator[list[PageRecord | BrokenRecord]]:
            for batch in _batches(pages):
                pending.append(batch)
                yield batch

        memory = MEMORY_BASE + MEMORY_PER_BYTE * self.max_bytes
        for results in guarded_map(work, batches(), jobs=jobs, seconds=self.seconds, memory=memory):
            yield _outcome(pending.pop(0), results)


def _outcome(batch: list[PageRecord | BrokenRecord], results: list[dict[str, Any] | str | Failure]) -> ExtractionResult:
    outcome = ExtractionResult()
    kept, rejected = [], []
    for record, result in zip(batch, results, strict=True):
        if isinstance(result, dict):
            try:
                kept.append(orjson.dumps(result, default=orjson.Fragment))
                outcome.characters += len(result["text"])
                outcome.truncated += isinstance(record, PageRecord) and record.truncated != ""
                continue
            except TypeError as error:
                result = f"cannot be written ({error})"
        reason = result.reason if isinstance(result, Failure) else result
        if isinstance(record, BrokenRecord):
            outcome.broken.append(record)
            row = {"file": record.file, "offset": record.offset, "bytes": record.size, "reason": reason}
        else:
            outcome.skipped[reason] += 1
            page_id = record.fields.get("id", record.id)
            row = {"id": page_id, "url": record.url, "content_type": record.content_type, "reason": reason}
        rejected.append(orjson.dumps(row, default=orjson.Fragment))
    outcome.pages, outcome.documents = len(batch) - len(outcome.broken), len(kept)
    outcome.kept = b"".join(line + b"\n" for line in kept)
    outcome.rejected = b"".join(line + b"\n" for line in rejected)
    return outcome


@dataclass(frozen=True, slots=True)
class PageReader:
    """Reads the pages of files.

    `rows` are the options for JSON lines, including the field that holds the page; with `verify`, records with a wrong
    digest are broken; with `allow_empty`, an archive without any page is no error. `names` replace those of files in
    ids (`distinct_names`).
    """

    rows: ReadOptions
    max_bytes: int
    verify: bool = False
    allow_empty: bool = False
    names: dict[str, str] = field(default_factory=dict)

    def pages(
        self, path: str, files: FilesRead, reader_of: Callable[[str], DocumentReader] | None = None
    ) -> Iterator[PageRecord | BrokenRecord]:
        """The pages of one file; it is added to `files` at the end."""
        if has_suffix(path, ROWS):
            reader = reader_of(path) if reader_of else DocumentReader([path], self.rows)
            try:
                for document in reader.documents():
                    files.replaced += self.rows.text_key != "text" and document.fields.get("text") is not None
                    yield PageRecord(
                        document.id,
                        document.text.encode("utf-8", "replace"),
                        charset="utf-8",
                        fields=self._other_fields(document),
                    )
            except LlmkitError as error:
                column = f"field {self.rows.text_key!r}"
                if f": no {column}" in error.message or f": {column} is not" in error.message:
                    hint = f"--html-key names the field that holds the page; {error.hint}"
                    raise LlmkitError(error.message, hint) from error
                raise
            finally:
                files.bad_lines += reader.bad
            files.inputs += reader.inputs
            return
        read_once = path == STDIN or is_special(Path(path))  # the digest of a file can be computed later
        digest: list[str] | None = [] if read_once else None
        pages = read_pages(
            path, max_bytes=self.max_bytes, verify=self.verify, digest=digest, allow_empty=self.allow_empty
        )
        name = base_name(path)
        for page in pages:
            if path in self.names and isinstance(page, PageRecord) and f"{page.id}#".startswith(f"{name}#"):
                page.id = self.names[path] + page.id.removeprefix(name)
            yield page
        files.inputs.append(Input("input", base_name(path), digest[0] if digest else digest_path(path)))

    def _other_fields(self, document: Document) -> dict[str, Any]:
        """The fields of a row but for the page, as they are stored; also an id that is not text."""
        raw, id_key = document.raw_fields(), self.rows.id_key
        fields = {key: value for key, value in raw.items() if key not in (self.rows.text_key, "id")}
        for key in (id_key, "id"):
            value = document.fields.get(key)
            if value is not None and (key != id_key or not isinstance(value, str)):
                fields["id"] = raw[key]
        return fields


@dataclass(slots=True)
class FilesRead:
    """The lineage of files, the number of bad lines in them, and that of rows with another text beside the page."""

    inputs: list[Input] = field(default_factory=list)
    bad_lines: int = 0
    replaced: int = 0


def distinct_names(paths: Sequence[str]) -> dict[str, str]:
    """Names for files of which an earlier one has the same base name: `2/x.html`, as lineage scripts lay them out."""
    counts, names = Counter[str](), dict[str, str]()
    for path in dict.fromkeys(paths):
        name = base_name(path)
        counts[name] += 1
        if counts[name] > 1:
            names[path] = f"{counts[name]}/{name}"
    return names


def extract_files(
    extractor: Extractor, reader: PageReader, paths: Sequence[str]
) -> Iterator[ExtractionResult | FilesRead]:
    """The outcomes for the pages of some files, then what was read: the work of one task on a cluster."""
    files = FilesRead()
    yield from extractor.run(page for path in paths for page in reader.pages(path, files))
    yield files


def tasks(paths: Iterable[str]) -> Iterator[list[str]]:
    """Groups of files, one per task on a cluster: large files alone, small files together."""
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


def _batches(pages: Iterable[PageRecord | BrokenRecord]) -> Iterator[list[PageRecord | BrokenRecord]]:
    batch: list[PageRecord | BrokenRecord] = []
    size = 0
    for page in pages:
        batch.append(page)
        size += len(page.content) if isinstance(page, PageRecord) else 0
        if len(batch) >= BATCH_PAGES or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
