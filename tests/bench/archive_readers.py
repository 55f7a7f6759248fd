"""Archives as they are and damaged: records and pages that llmkit, warcio and FastWARC find, and whether any is lost.

    python tests/bench/archive_readers.py > tests/bench/archive_readers.md      # needs fastwarc, and warcio if installed

Reads every archive of ../shared/data/web/warc (those of warcio's tests included) and ../shared/cases/web, and COPIES
damaged copies of each, with a seed: truncated, bytes overwritten, Content-Lengths changed, records swapped. Records are
counted as each reader yields them, pages by the xxh3 of their decoded payload. The damage is known, hence which records
are intact in a copy: those of which no stored byte changed (a compressed member counts as a whole), and whose length
was right in the original. "missing" counts intact pages that a reader does not give, by id and payload.
"""

from __future__ import annotations

import argparse
import gzip
import io
import random
import re
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import xxhash
from peers import SHARED, members

from llmkit.corpus.extract.archives import BrokenRecord, read_pages
from llmkit.corpus.extract.records import Fault, read_records
from llmkit.corpus.extract.stored import Stored
from llmkit.errors import LlmkitError

NOTES = """
Where the readers differ: a page counts twice if two readers give it with another payload or URL.

* bad.arc: warcio gives the records without a valid length as empty pages; llmkit reports them.
* length_huge.warc: warcio and FastWARC give the rest of the file as the content of the record with the huge length.
* example-trunc.warc, example-space-in-url.arc: the lengths are wrong; llmkit takes the content that the Content-Length
  of the response confirms. Spaces in a URL: warcio writes %20, llmkit and FastWARC keep them.
* example-bad*.gz: one gzip member for all records, at which warcio stops by design. blank_line_first.warc: warcio
  takes the file for one record. example-wrong-chunks.warc.gz: warcio gives no content; llmkit keeps what follows the
  invalid chunk as it is, FastWARC the same bytes.
* FastWARC reads no ARC files here, and stops at a body that is not coded as its header says. Both stop at the first
  damaged gzip member.
"""
COPIES = 20
LIMIT = 16 << 20
PAGES = ("response", "resource", "conversion")
Key = tuple[str, str]  # URL, digest of the decoded payload


@dataclass
class Seen:
    """What a reader gives: records, pages, and for llmkit what it skipped."""

    records: int = 0
    pages: Counter[Key] = field(default_factory=Counter)
    faults: int = 0
    skipped: int = 0
    error: str = ""


def with_llmkit(path: Path) -> Seen:
    seen = Seen()
    with open(path, "rb") as file:
        seen.records = sum(not isinstance(record, Fault) for record in read_records(Stored(file), LIMIT))
    try:
        for page in read_pages(str(path)):
            if isinstance(page, BrokenRecord):
                seen.faults += 1
                seen.skipped += page.size
            else:
                seen.pages[page.url, xxhash.xxh3_128_hexdigest(page.content)] += 1
    except LlmkitError as error:
        seen.error = error.message
    return seen


def with_warcio(path: Path) -> Seen:
    from warcio.archiveiterator import ArchiveIterator

    seen = Seen()
    try:
        with open(path, "rb") as file:
            for record in ArchiveIterator(file):
                seen.records += 1
                if record.rec_type in PAGES or (record.format == "arc" and record.rec_type != "arc_header"):
                    url = record.rec_headers.get_header("WARC-Target-URI") or record.rec_headers.get_header("uri") or ""
                    seen.pages[url.strip("<> "), xxhash.xxh3_128_hexdigest(record.content_stream().read())] += 1
    except Exception as error:
        seen.error = type(error).__name__
    return seen


def with_fastwarc(path: Path) -> Seen:
    from fastwarc.warc import ArchiveIterator, any_type

    seen = Seen()
    try:
        with open(path, "rb") as file:
            for record in ArchiveIterator(file, record_types=any_type, parse_http=False, fsspec_args=False):
                seen.records += 1
                if str(record.record_type).rpartition(".")[2] in PAGES:
                    if record.is_http and "http" in (record.headers.get("Content-Type") or ""):
                        record.parse_http(auto_decode="all")
                    url = (record.headers.get("WARC-Target-URI") or "").strip("<> ")
                    seen.pages[url, xxhash.xxh3_128_hexdigest(record.reader.read())] += 1
    except Exception as error:
        seen.error = type(error).__name__
    return seen


def archives(shared: Path) -> Iterator[tuple[str, bytes]]:
    for folder in (shared / "web" / "warc", shared.parent / "cases" / "web"):
        for path in sorted(folder.iterdir()):
            if path.name.endswith(".tar.zst"):
                yield from ((f"warcio/{name.removeprefix('./')}", data) for name, data in sorted(members(path)))
            elif re.search(r"\.w?arc\b", path.name):
                yield path.name, path.read_bytes()


# ---- damage: a copy, and its intact pieces (stored bytes that hold complete records)


def split(data: bytes) -> list[bytes]:
    """The gzip members of an archive, or its plain records with what separates them."""
    if data.startswith(b"\x1f\x8b"):
        parts = []
        while data.startswith(b"\x1f\x8b"):
            member = zlib.decompressobj(31)
            try:
                member.decompress(data)
            except zlib.error:
                break
            size = len(data) - len(member.unused_data)
            parts.append(data[:size])
            data = data[size:]
        return parts + ([data] if data else [])
    starts = [0]
    for record in read_records(Stored(io.BytesIO(data)), LIMIT):
        if record.place.offset if not isinstance(record, Fault) else record.offset:
            starts.append(record.place.offset if not isinstance(record, Fault) else record.offset)
    return [data[a:b] for a, b in zip(starts, [*starts[1:], len(data)], strict=True)]


def truncated(parts: list[bytes], random: random.Random) -> tuple[bytes, list[bytes]]:
    whole = b"".join(parts)
    size = random.randrange(1, len(whole) + 1)
    intact, end = [], 0
    for part in parts:
        end += len(part)
        if end <= size:
            intact.append(part)
    return whole[:size], intact


def overwritten(parts: list[bytes], random: random.Random) -> tuple[bytes, list[bytes]]:
    whole = bytearray(b"".join(parts))
    touched = []
    for _ in range(random.choice((1, 2, 5))):
        size = random.choice((1, 4, 64, 700))
        at = random.randrange(len(whole))
        end = min(at + size, len(whole))
        whole[at:end] = random.randbytes(end - at)
        touched.append((at, end))
    intact, start = [], 0
    for part in parts:
        if not any(at < start + len(part) and start < end for at, end in touched):
            intact.append(part)
        start += len(part)
    return bytes(whole), intact


def relength(parts: list[bytes], random: random.Random) -> tuple[bytes, list[bytes]]:
    """Wrong, missing and huge Content-Lengths of up to three records."""
    changed = set(random.sample(range(len(parts)), min(3, len(parts))))
    wrong = (b"10", b"1000000000000000", b"many", b"-1", b"9%(old)s", b"%(less)s", b"%(more)s", b"")
    out = []
    for number, part in enumerate(parts):
        if number in changed:
            packed = part.startswith(b"\x1f\x8b")
            text = gzip.decompress(part) if packed else part

            def swap(match: re.Match[bytes]) -> bytes:
                old = int(match[2])
                values = {b"old": match[2], b"less": b"%d" % max(0, old - 7), b"more": b"%d" % (old + 300)}
                return match[1] + random.choice(wrong) % values + match[3]

            pattern = rb"(Content-Length: )(\d+)(\r?\n)" if text.startswith(b"WARC/") else rb"( text/html )(\d+)(\n)"
            text = re.sub(pattern, swap, text, count=1)
            part = gzip.compress(text, mtime=0) if packed else text
        out.append(part)
    return b"".join(out), [part for number, part in enumerate(parts) if number not in changed]


def swapped(parts: list[bytes], random: random.Random) -> tuple[bytes, list[bytes]]:
    """Records in another order, one of them cut."""
    order = [*parts]
    random.shuffle(order)
    cut = random.randrange(len(order))
    intact = [part for number, part in enumerate(order) if number != cut]
    order[cut] = order[cut][: random.randrange(len(order[cut]))]
    return b"".join(order), intact


DAMAGES: tuple[Callable[[list[bytes], random.Random], tuple[bytes, list[bytes]]], ...] = (
    truncated,
    overwritten,
    relength,
    swapped,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=SHARED)
    parser.add_argument("--keep", type=Path, help="directory for the copies in which llmkit misses a page")
    parser.add_argument("--largest", type=int, default=1 << 30, help="leave out larger archives (bytes)")
    options = parser.parse_args()
    readers = {"llmkit": with_llmkit, "warcio": with_warcio, "fastwarc": with_fastwarc}
    versions = {}
    for name in list(readers):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "this checkout" if name == "llmkit" else ""
        if not versions[name]:
            del readers[name]
    print("# Readers of archives, intact and damaged\n")
    shown = ", ".join(f"{name} {versions[name]}" for name in readers)
    print(f"`python tests/bench/archive_readers.py`, {time.strftime('%Y-%m-%d')}, {shown}.\n")
    print(
        "Records / pages (by URL and digest of the decoded payload) that differ from llmkit's; faults and bytes skipped.\n"
    )
    print(
        "| archive | " + " | ".join(readers) + " | faults | bytes skipped |\n|---" + "|---" * (len(readers) + 2) + "|"
    )
    lost: dict[str, Counter[str]] = {name: Counter() for name in readers}
    totals: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as temporary:
        for name, data in archives(options.shared):
            if len(data) > options.largest:
                continue
            suffix = ".warc" if "warc" in name.rpartition("/")[2] else ".arc"
            path = Path(temporary, "x" + suffix)
            path.write_bytes(data)
            seen = {reader: read(path) for reader, read in readers.items()}
            mine = seen["llmkit"]
            cells = []
            for of in seen.values():
                differ = (of.pages - mine.pages).total() + (mine.pages - of.pages).total()
                ending = f", {of.error}" if of.error else ""
                cells.append(
                    f"{of.records} / {of.pages.total()}" + (f" ({differ} differ{ending})" if differ or ending else "")
                )
            print(f"| {name} | " + " | ".join(cells) + f" | {mine.faults} | {mine.skipped:,} |", flush=True)
            parts = split(data)
            pages_of = {}
            for part in set(parts):
                path.write_bytes(part)
                is_whole = all(
                    not isinstance(record, Fault) and record.head.length == len(record.block)
                    for record in read_records(Stored(io.BytesIO(part)), LIMIT)
                )
                pages_of[part] = with_llmkit(path).pages if is_whole else Counter[Key]()
            for copy in range(COPIES):
                damage = DAMAGES[copy % len(DAMAGES)]
                content, intact = damage(parts, random.Random(f"{name} {copy}"))
                path.write_bytes(content)
                expected = sum((pages_of[part] for part in intact), Counter[Key]())
                totals["copies", damage.__name__] += 1
                totals["intact", damage.__name__] += expected.total()
                for reader, read in readers.items():
                    got = read(path)
                    missing = (expected - got.pages).total()
                    lost[reader][damage.__name__] += missing
                    if reader == "llmkit":
                        totals["faults", damage.__name__] += got.faults
                        totals["skipped", damage.__name__] += got.skipped
                        if missing:
                            print(f"{name}, copy {copy} ({damage.__name__}): {missing} missing", file=sys.stderr)
                            if options.keep:
                                Path(options.keep, f"{name.replace('/', '_')}.{copy}{suffix}").write_bytes(content)
    print(NOTES)
    print("\nDamaged copies:\n")
    print(
        "| damage | copies | intact pages | "
        + " | ".join(f"missing, {name}" for name in readers)
        + " | faults | bytes skipped |"
    )
    print("|---" * (5 + len(readers)) + "|")
    for damage in (of.__name__ for of in DAMAGES):
        counts = [totals[what, damage] for what in ("copies", "intact")]
        counts += [lost[reader][damage] for reader in readers]
        counts += [totals[what, damage] for what in ("faults", "skipped")]
        print(f"| {damage} | " + " | ".join(f"{count:,}" for count in counts) + " |")


if __name__ == "__main__":
    main()
