"""Compressed byte streams: recognised by magic bytes when read, chosen by suffix when written, with room for lineage.

Reading recognises zstd, gzip, xz, bzip2 and plain bytes by their first bytes, whatever the name of the file.
zstd and gzip have a place for metadata that other readers skip; llmkit stores lineage there:

* zstd: a skippable frame (RFC 8878, section 3.1.2) of magic 0x184D2A5B whose payload starts with `llmkit\\0`;
* gzip: an empty member whose extra field (RFC 1952, section 2.3.1.1) holds a subfield `LK`.

A *header* note comes before the content, a *trailer* note after it. A stream with a header and no trailer was
cut off, and reading it is an error. Memory is bounded: input is fed in pieces of 8 KiB, so that the worst zstd
bomb (128 KiB from each 4 bytes) expands to 256 MiB at a time; zstd windows and xz dictionaries have a limit
(memory.window). A block of bzip2 is held until its checksum is verified: 46 MB at most, 0.9 MB as a rule.
"""

from __future__ import annotations

import json
import re
import struct
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, Protocol

import xxhash

from llmkit.errors import UNREADABLE, LlmkitError
from llmkit.io.sealed_file import BYTES, PENDING, SealedSink
from llmkit.memory import over_window, window, zstd_decompressor

ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
GZIP_MAGIC = b"\x1f\x8b"
XZ_MAGIC = b"\xfd7zXZ\x00"
BZIP2_MAGIC = b"BZh"
LZ4_MAGICS = (b"\x04\x22\x4d\x18", b"\x02\x21\x4c\x18")  # not read, but not text either

PACKED = {".zst": "zstd", ".gz": "gzip", ".xz": "xz", ".bz2": "bzip2"}  # suffix -> format

NOTE_MAGIC = struct.pack("<I", 0x184D2A5B)
NOTE_PREFIX = b"llmkit\0"
MAX_NOTE_BYTES = 64 << 20  # longer notes are skipped, never held in memory
MAX_NOTE_VALUES = 8 << 20  # about 500 MB of Python objects
FEED, GZIP_FEED = 8 << 10, 64 << 10  # bytes at a time; what a member does not use is copied
BLOCK = 1 << 20
# The numbers before each block of bzip2 and after the last, at any bit: five bytes of the seven that may hold them.
BORDER = re.compile(
    b"|".join(
        re.escape((number << 8 - bit).to_bytes(7, "big")[1:6])
        for number in (0x314159265359, 0x177245385090)
        for bit in range(8)
    )
)

STORED = 0  # level of a pipe: not compressed
FILE_LEVEL = 1  # compression is a large part of the time of a text stage; level 3 makes files only a little smaller


def is_zstd(magic: bytes) -> bool:
    """Whether `magic` (4 bytes or more) starts a zstd stream; skippable frames (0x184D2A50 to 5F) count."""
    return magic[:4] == ZSTD_MAGIC or (len(magic) >= 4 and magic[0] & 0xF0 == 0x50 and magic[1:4] == b"\x2a\x4d\x18")


class Notes:
    """The lineage notes in one stream, in order: (kind, content), kind "header" or "trailer"."""

    def __init__(self) -> None:
        self.entries: list[tuple[str, dict[str, Any]]] = []
        self.partial = bytearray()  # the first parts of a note that spans several gzip members

    def add(self, payload: bytes) -> None:
        """Add one note. Payloads of other tools are skipped, as the formats demand.

        One of ours that cannot be read stands for the note that should be there.
        """
        if not payload.startswith(NOTE_PREFIX):
            return
        try:
            if sum(map(payload.count, (b",", b"[", b"{"))) > MAX_NOTE_VALUES:
                raise ValueError("too many values")
            note = json.loads(payload[len(NOTE_PREFIX) :])
            kind, content = note["kind"], note["content"]
            if kind not in ("header", "trailer") or not isinstance(content, dict):
                raise ValueError("neither a header nor a trailer")
        except (ValueError, RecursionError, TypeError, KeyError) as error:
            content = {UNREADABLE: f"a damaged note ({(str(error).splitlines() or [''])[0]})"}
            kind = "header" if self.complete() else "trailer"
        self.entries.append((kind, content))

    def complete(self) -> bool:
        """Whether every header has its trailer."""
        kinds = [kind for kind, _ in self.entries]
        return kinds.count("header") == kinds.count("trailer")


def encode_note(kind: str, content: dict[str, Any]) -> bytes:
    """Payload of a note: prefix and JSON with sorted keys. A trailer has a place for the digest of all bytes."""
    content = content | ({BYTES: PENDING} if kind == "trailer" else {})
    body = json.dumps({"kind": kind, "content": content}, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return NOTE_PREFIX + body.encode()


def decompress(raw: BinaryIO, name: str, notes: Notes, min_bytes: int = BLOCK) -> Iterator[bytes]:
    """Blocks of decompressed bytes of `raw`, all but the last of `min_bytes` or more.

    `name` is for messages; `notes` receives the lineage notes. Raises LlmkitError where the stream is
    truncated, corrupt, or has a header and no trailer.
    """
    magic = _fill(raw, b"", 6)
    if not magic:
        refuse_empty(name)
    if is_zstd(magic):
        pieces = _read_zstd(raw, magic, name, notes)
    elif magic.startswith(GZIP_MAGIC):
        pieces = _read_gzip(raw, magic, name, notes)
    elif magic.startswith(LZ4_MAGICS):
        raise LlmkitError(f"{name}: compressed with LZ4, which is not read", "lz4 -dc FILE | llmkit ... reads it")
    elif magic.startswith((XZ_MAGIC, BZIP2_MAGIC)):
        pieces = _read_stdlib(raw, magic, name)
    else:
        pieces = _read_plain(raw, magic)
    yield from _in_blocks(pieces, min_bytes)
    if not notes.complete():
        raise LlmkitError(
            f"{name}: the stream ends before its trailer", "the command that wrote it did not finish; run it again"
        )


def _fill(raw: BinaryIO, data: bytes, size: int) -> bytes:
    """`data` extended from `raw` to `size` bytes, fewer only at the end: a pipe may return less than requested."""
    while len(data) < size:
        more = raw.read(size - len(data))
        if not more:
            break
        data += more
    return data


def _in_blocks(pieces: Iterator[bytes], min_bytes: int) -> Iterator[bytes]:
    block: list[bytes] = []
    size = 0
    try:
        for piece in pieces:
            block.append(piece)
            size += len(piece)
            if size >= min_bytes:
                yield b"".join(block)
                block, size = [], 0
    except LlmkitError:
        if size:
            yield b"".join(block)  # intact content before the damage
        raise
    if size:
        yield b"".join(block)


def _read_plain(raw: BinaryIO, data: bytes) -> Iterator[bytes]:
    while data:
        yield data
        data = raw.read(BLOCK)


def _read_zstd(raw: BinaryIO, data: bytes, name: str, notes: Notes) -> Iterator[bytes]:
    import zstandard

    while data:
        data = _fill(raw, data, 18)  # at least the header of a frame
        if not is_zstd(data):
            raise LlmkitError(
                f"{name}: bytes that are not zstd follow a zstd frame", "was something else appended to the file?"
            )
        if data[:4] != ZSTD_MAGIC:  # skippable frame: magic, u32 size, payload
            if len(data) < 8:
                raise _truncated(name, "zstd")
            (size,) = struct.unpack("<I", data[4:8])
            keep = data[:4] == NOTE_MAGIC and size <= MAX_NOTE_BYTES
            payload = bytearray(data[8 : 8 + size]) if keep else bytearray()
            remaining, data = size - len(data[8 : 8 + size]), data[8 + size :]
            while remaining:
                more = raw.read(min(remaining, BLOCK))
                if not more:
                    raise _truncated(name, "zstd")
                remaining -= len(more)
                if keep:
                    payload += more
            notes.add(bytes(payload))
            data = data or raw.read(FEED)
            continue
        head, frame = data, zstd_decompressor().decompressobj()
        try:
            while True:
                out = frame.decompress(data[:FEED]) if len(data) > FEED else frame.decompress(data)
                unfed = data[FEED:]
                if out:
                    yield out
                if frame.eof:
                    data = frame.unused_data + unfed or raw.read(FEED)
                    break
                data = unfed or raw.read(FEED)
                if not data:
                    raise _truncated(name, "zstd")
        except zstandard.ZstdError as error:
            raise _unreadable(name, "zstd", error, head) from error


def _read_gzip(raw: BinaryIO, data: bytes, name: str, notes: Notes) -> Iterator[bytes]:
    while data:
        data = _fill(raw, data, 12)
        if not data.startswith(GZIP_MAGIC):
            if data := data.lstrip(b"\0") or _after_padding(raw):  # gzip allows zeros after a member
                data = _fill(raw, data, 12)
            if not data:
                return
        if not data.startswith(GZIP_MAGIC):
            raise LlmkitError(
                f"{name}: bytes that are not gzip follow a gzip member", "was something else appended to the file?"
            )
        if len(data) >= 12 and data[3] & 4:
            (size,) = struct.unpack("<H", data[10:12])
            data = _fill(raw, data, 12 + size)
            extra = data[12 : 12 + size]
            if extra[:2] == b"LK":
                notes.add(_gather_gzip_note(extra[4:], notes))
        member = zlib.decompressobj(wbits=31)
        try:
            while not member.eof:
                out = member.decompress(data, BLOCK)
                if out:
                    yield out
                data = member.unconsumed_tail or (b"" if member.eof else raw.read(GZIP_FEED))
                if not data and not member.eof:
                    raise _truncated(name, "gzip")
        except zlib.error as error:
            raise _unreadable(name, "gzip", error) from error
        data = member.unused_data or raw.read(GZIP_FEED)


def _gather_gzip_note(part: bytes, notes: Notes) -> bytes:
    """The note that ends with this part, empty if more parts follow.

    A note over 64 KiB spans several members; each part starts with a byte that is 1 where more follow.
    """
    if len(notes.partial) <= MAX_NOTE_BYTES:
        notes.partial += part[1:]
    if part[:1] == b"\1":
        return b""
    note, notes.partial = bytes(notes.partial), bytearray()
    return note if len(note) <= MAX_NOTE_BYTES else b""


def _read_stdlib(raw: BinaryIO, data: bytes, name: str) -> Iterator[bytes]:
    """The streams of an xz or bzip2 file. Anything but another stream or padding after one is damage."""
    import lzma

    kind, magic = ("xz", XZ_MAGIC) if data.startswith(XZ_MAGIC) else ("bzip2", BZIP2_MAGIC)
    while data := (data.lstrip(b"\0") or _after_padding(raw)):
        data = _fill(raw, data, len(magic))
        if not data.startswith(magic):
            raise LlmkitError(f"{name}: corrupt {kind} data (after the end of a stream)", "the file is damaged")
        stream: Any = lzma.LZMADecompressor(lzma.FORMAT_XZ, window()) if kind == "xz" else Bzip2Decoder()
        while not stream.eof:
            if stream.needs_input and not (data := data or raw.read(FEED)):
                raise _truncated(name, kind)
            try:
                block = stream.decompress(data, BLOCK)
            except (lzma.LZMAError, OSError, ValueError) as error:
                raise _unreadable(name, kind, error) from error
            data = b""
            if block:
                yield block
        data = stream.unused_data


class Bzip2Decoder:
    """Like bz2.BZ2Decompressor, which gives the content of a block before it verifies it; this one only afterwards."""

    def __init__(self) -> None:
        import bz2

        self._decoder = bz2.BZ2Decompressor()
        self._input, self._at = b"", 0  # what was read, and where the part begins that was not yet taken
        self._verified, self._start = memoryview(b""), 0

    @property
    def needs_input(self) -> bool:
        return self._at == len(self._input) and self._start == len(self._verified)

    @property
    def eof(self) -> bool:
        return self._decoder.eof and self._start == len(self._verified)

    @property
    def unused_data(self) -> bytes:
        return self._decoder.unused_data + self._input[self._at :]

    def decompress(self, data: bytes, max_length: int) -> bytes:
        """Up to `max_length` bytes of content; OSError where a block is damaged, once all before it have been given."""
        if data:
            self._input, self._at = self._input[self._at :] + data, 0
        while self._start == len(self._verified) and self._at < len(self._input) and not self._decoder.eof:
            border = BORDER.search(self._input, self._at + 1)  # so that a piece has the end of one block at most
            begin, self._at = self._at, border.start() if border else len(self._input)
            self._verified, self._start = memoryview(self._block(self._input[begin : self._at])), 0
        start, self._start = self._start, min(self._start + max_length, len(self._verified))
        return bytes(self._verified[start : self._start])

    def _block(self, piece: bytes) -> bytes:
        """All that the next piece of input completes. libbz2 verifies a block once all of it has been taken."""
        parts = [self._decoder.decompress(piece, BLOCK)]
        while parts[-1] and not self._decoder.eof:
            parts.append(self._decoder.decompress(b"", BLOCK))
        return b"".join(parts)


def _after_padding(raw: BinaryIO) -> bytes:
    """The next bytes that are not zeros; empty at the end."""
    while block := raw.read(FEED):
        if rest := block.lstrip(b"\0"):
            return rest
    return b""


def _unreadable(name: str, kind: str, error: Exception, head: bytes = b"") -> LlmkitError:
    if reason := over_window(error, head):
        tool = "zstd -dc --long=31" if head else f"{kind} -dc"
        return LlmkitError(f"{name}: {reason}", f"if you trust it: --memory SIZE, or {tool} FILE | llmkit ...")
    return LlmkitError(f"{name}: corrupt {kind} data ({error})", f"check the file with: {kind} -t")


def _truncated(name: str, kind: str, detail: str = "") -> LlmkitError:
    return LlmkitError(f"{name}: truncated {kind} stream{detail}", "the file is incomplete; fetch or make it again")


def refuse_empty(name: str) -> None:
    """Raise LlmkitError for a file without any byte if its name is that of a compressed file, which has some."""
    for suffix, kind in PACKED.items():
        if name.lower().endswith(suffix):
            raise _truncated(name, kind, ": the file is empty")


class OutputFormat(Protocol):
    """The interface of an output format for document writers."""

    def note(self, kind: str, content: dict[str, Any]) -> None: ...
    def write(self, data: bytes) -> None: ...
    def finish(self) -> None: ...


class ZstdOutput:
    """One zstd frame, compressed or STORED, between a header and a trailer note.

    The bytes depend on the content alone, not on how it was divided into writes.
    """

    def __init__(self, sink: BinaryIO, level: int) -> None:
        import zstandard

        self._sink = SealedSink(sink)
        self._frame = (
            zstandard.ZstdCompressor(level=level, write_checksum=True).compressobj() if level else StoredFrame()
        )
        self._pending: list[bytes] = []
        self._size = 0

    def note(self, kind: str, content: dict[str, Any]) -> None:
        """Write a skippable frame.

        It would split the content between two `write`s: call it before the first, or after `finish`.
        """
        payload = encode_note(kind, content)
        self._sink.hold()
        self._sink.write(NOTE_MAGIC + struct.pack("<I", len(payload)) + payload)
        self._sink.complete()

    def write(self, data: bytes) -> None:
        self._pending.append(data)
        self._size += len(data)
        if self._size >= BLOCK:
            pending = memoryview(b"".join(self._pending))
            end = self._size // BLOCK * BLOCK
            for start in range(0, end, BLOCK):
                self._sink.write(self._frame.compress(pending[start : start + BLOCK]))
            self._pending, self._size = [bytes(pending[end:])], self._size - end

    def finish(self) -> None:
        self._sink.write(self._frame.compress(b"".join(self._pending)) + self._frame.flush())


class StoredFrame:
    """A zstd frame of uncompressed blocks (RFC 8878, section 3.1.1) with checksum, used like a compressobj."""

    MAX_BLOCK = 1 << 17

    def __init__(self) -> None:
        self._checksum = xxhash.xxh64()
        self._head = ZSTD_MAGIC + b"\x04\x38"  # checksum, no content size, smallest window that holds a block

    def compress(self, data: bytes | memoryview) -> bytes:
        self._checksum.update(data)
        parts: list[bytes | memoryview] = [self._head]
        for start in range(0, len(data), self.MAX_BLOCK):
            block = data[start : start + self.MAX_BLOCK]
            parts += struct.pack("<I", len(block) << 3)[:3], block
        self._head = b""
        return b"".join(parts)

    def flush(self) -> bytes:
        """The end of the frame: an empty last block, and the lower half of the checksum."""
        return self._head + b"\1\0\0" + self._checksum.digest()[:3:-1]


class GzipOutput:
    """One gzip member between empty members that hold the notes. No name, no time: equal content, equal bytes."""

    def __init__(self, sink: BinaryIO, level: int = 6) -> None:
        self._sink = SealedSink(sink)
        self._member = zlib.compressobj(level, wbits=31)

    def note(self, kind: str, content: dict[str, Any]) -> None:
        payload = encode_note(kind, content)
        parts = [payload[i : i + 65_000] for i in range(0, len(payload), 65_000)]
        self._sink.hold()
        for i, part in enumerate(parts):
            body = (b"\1" if i + 1 < len(parts) else b"\0") + part
            extra = b"LK" + struct.pack("<H", len(body)) + body
            # Magic, deflate, FEXTRA, no time, no flags, unknown system; extra; empty deflate block; CRC and size 0.
            self._sink.write(
                b"\x1f\x8b\x08\x04\0\0\0\0\0\xff" + struct.pack("<H", len(extra)) + extra + b"\x03\0" + bytes(8)
            )
        self._sink.complete()

    def write(self, data: bytes) -> None:
        self._sink.write(self._member.compress(data))

    def finish(self) -> None:
        self._sink.write(self._member.flush())


class PlainOutput:
    """Plain bytes; the format has no room for notes."""

    def __init__(self, sink: BinaryIO) -> None:
        self._sink = sink

    def note(self, kind: str, content: dict[str, Any]) -> None:
        pass

    def write(self, data: bytes) -> None:
        self._sink.write(data)

    def finish(self) -> None:
        pass
