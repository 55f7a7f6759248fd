"""A file that holds the digest of all its own bytes.

    sink = SealedSink(file)
    sink.write(content)
    sink.hold()                                    # what follows is short, and stays in memory
    sink.write(json.dumps({"bytes": PENDING}))
    sink.complete()                                # enters the digest where the placeholder is

The digest is that of the file with the placeholder in its place. So no byte is exempt, not even one that no reader
looks at: headers of compressed frames, padding, statistics. Cost: one xxh3-128 of what is written.
"""

from __future__ import annotations

import mmap
import re
from pathlib import Path
from typing import BinaryIO

import xxhash

PENDING = "xxh3:" + "0" * 32  # placeholder of a digest that is not known yet, and as long as any
BYTES = "bytes"  # the key of the digest; it sorts before all other keys of a record, so that no format cuts it in two
_PLACE = re.compile(rf'"{BYTES}\\?": ?\\?"({PENDING})'.encode())  # also inside a string of TOML
_STEP = 1 << 20


class SealedSink:
    """A sink that digests what is written. With `hold`, the rest stays in memory until `complete`."""

    def __init__(self, sink: BinaryIO) -> None:
        self.state, self.closed = xxhash.xxh3_128(), False
        self._sink, self._size = sink, 0
        self._held: bytearray | None = None

    def write(self, data: bytes) -> int:
        self._size += len(data)
        if self._held is not None:
            self._held += data
        else:
            self.state.update(data)
            self._sink.write(data)
        return len(data)

    def hold(self) -> None:
        self._held = bytearray()

    def complete(self) -> None:
        """Write what was held, with the digest in its place."""
        held = bytes(self._held or b"")
        self._held = None
        self._sink.write(_filled(held, self.state))

    def tell(self) -> int:
        return self._size

    def flush(self) -> None:
        self._sink.flush()

    def close(self) -> None:
        """Leave the sink open: its owner completes it."""


def _filled(end: bytes, state: xxhash.xxh3_128) -> bytes:
    """The end of a file with the digest in its place; `state`: that of the bytes before it."""
    state.update(end)
    for place in list(_PLACE.finditer(end))[-1:]:  # the content of a Parquet footer may look like one
        end = end[: place.start(1)] + f"xxh3:{state.hexdigest()}".encode() + end[place.end(1) :]
    return end


def filled(data: bytes) -> bytes:
    """A whole file with the digest in its place."""
    return _filled(data, xxhash.xxh3_128())


def is_sealed_by(path: str | Path, digest: str) -> bool:
    """Whether the bytes of a local file are those that the digest in it was computed from."""
    with open(path, "rb") as file:
        try:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:  # an empty file
            return False
        with data, memoryview(data) as view:
            return is_sealed(view, digest)


def is_sealed(data: memoryview, digest: str) -> bool:
    """`is_sealed_by` for the bytes of a file in memory."""
    start, found = len(data), -1
    while start and found < 0:  # near the end, usually
        start = max(0, len(data) - 16 * max(256, len(data) - start))
        found = bytes(data[start:]).rfind(digest.encode(errors="surrogatepass"))
    if found < 0:
        return False
    state, place = xxhash.xxh3_128(), start + found
    for begin in range(0, place, _STEP):
        state.update(data[begin : min(begin + _STEP, place)])
    state.update(PENDING.encode())
    for begin in range(place + len(PENDING), len(data), _STEP):
        state.update(data[begin : begin + _STEP])
    return f"xxh3:{state.hexdigest()}" == digest
