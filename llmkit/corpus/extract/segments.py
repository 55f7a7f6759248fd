"""Segmented records (ISO 28500, section 7): a record in parts, of which the later ones are continuation records.

Parts that follow each other in one archive are joined, up to `max_bytes`. Writers also split records between files: a
record without all of its continuations is marked as cut, and a continuation without its beginning is a `Fault`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from llmkit.corpus.extract.records import PAGES, Fault, Record

SEGMENTED = "segmented"  # like the values of WARC-Truncated


def join_segments(records: Iterable[Record | Fault], max_bytes: int) -> Iterator[Record | Fault]:
    """The records, with segments joined. Records that are no pages may lie between them, and are yielded first."""
    parts: list[Record] = []  # of a segmented record, in order
    for record in records:
        if isinstance(record, Record) and ("warc-segment-number" in record.head.fields or _is_later(record)):
            if not _is_later(record):
                yield from _joined(parts, complete=False)
                parts = [record]
            elif parts and _continues(record, parts):
                parts.append(record)
                if sum(len(part.block) for part in parts) > max_bytes:
                    size = sum(part.size for part in parts)
                    yield Fault(parts[0].offset, size, f"longer than {max_bytes:,} bytes with its segments")
                    parts = []
                elif "warc-segment-total-length" in record.head.fields:
                    yield from _joined(parts, complete=True)
                    parts = []
            else:
                yield Fault(record.offset, record.size, "a segment without the ones before it")
            continue
        if parts and (isinstance(record, Fault) or record.head.kind in PAGES):
            yield from _joined(parts, complete=False)
            parts = []
        yield record
    yield from _joined(parts, complete=False)


def _is_later(record: Record) -> bool:
    return record.head.kind == "continuation"


def _continues(record: Record, parts: list[Record]) -> bool:
    fields, origin = record.head.fields, parts[0].head.fields.get("warc-record-id")
    return fields.get("warc-segment-origin-id") == origin and fields.get("warc-segment-number") == str(len(parts) + 1)


def _joined(parts: list[Record], complete: bool) -> Iterator[Record]:
    if not parts:
        return
    first = parts[0]
    if not any(part.digest_is_wrong() for part in parts):
        first.head.fields.pop("warc-block-digest", None)  # that of the first part alone
    first.block = b"".join(part.block for part in parts)
    first.size = sum(part.size for part in parts)
    if not complete:
        first.head.fields["warc-truncated"] = SEGMENTED
    yield first
