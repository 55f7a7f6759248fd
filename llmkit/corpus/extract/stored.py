"""The stored bytes of an archive, read once and in order; the last of them can be read again.

Crafted data could have every part of it read again and again. What is read again, and what is decompressed from it, is
limited to REREAD bytes and REREAD_SHARE times what was read once.
"""

from __future__ import annotations

from typing import Any

from llmkit.errors import LlmkitError

KEEP = 4 << 20  # stored bytes that can be read again
READ = 256 << 10  # bytes of a read
REREAD, REREAD_SHARE = 16 << 20, 4


class Stored:
    """The bytes of an unseekable stream; the last KEEP of them can be read again."""

    def __init__(self, raw: Any, name: str = "") -> None:
        self._raw, self._name = raw, name
        self._window = bytearray()
        self._base = 0  # offset of the window
        self._ended = False
        self._furthest = 0  # stored bytes that were read
        self._output = 0  # bytes that were decompressed from them
        self._again = 0  # stored and decompressed bytes of what was read before
        self.offset = 0

    def peek(self, size: int) -> bytes:
        """The next `size` bytes, fewer at the end."""
        start = self.offset - self._base
        while len(self._window) - start < size and not self._ended:
            surplus = start - KEEP
            if surplus > 0:
                del self._window[:surplus]
                self._base += surplus
                start = KEEP
            try:
                block = self._raw.read(max(READ, size))
            except OSError as error:
                raise LlmkitError(f"{self._name}: {error.strerror or error}", "check the disk") from error
            self._ended = not block
            self._window += block
        return bytes(memoryview(self._window)[start : start + size])

    def read(self, size: int) -> bytes:
        """The next bytes, as of a file."""
        data = self.peek(size)
        self.offset += len(data)
        return data

    def advance(self, size: int) -> None:
        """Move on by bytes that were peeked at."""
        self.offset += size

    def give_back(self, size: int) -> None:
        """Go back by bytes that were read just now, and not used."""
        self.offset -= size

    def decompressed(self, size: int) -> None:
        """Count `size` bytes that came from those before the current position."""
        if self.offset >= self._furthest:
            self._furthest = self.offset
            self._output += size
        else:
            self._again += size

    def rewind(self, offset: int, free: int = 0) -> bool:
        """Go to `offset`, or back as far as bytes are kept. Returns whether it was reached.

        Going back more than `free` bytes is limited in total.
        """
        self._furthest = max(self._furthest, self.offset)
        target = max(offset, self._base)
        again = self._again + max(0, self.offset - target - free)
        if target < self.offset and again > REREAD + REREAD_SHARE * (self._furthest + self._output):
            return False
        self._again, self.offset = again, target
        return target == offset
