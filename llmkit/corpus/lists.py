"""List files that the user supplies to filters.

A list is UTF-8 text with one entry per line, plain or compressed in any format that documents may have. Blank
lines and lines that begin with "#" are skipped. No list is shipped with the package.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import xxhash
from numpy.typing import NDArray

from llmkit.errors import LlmkitError
from llmkit.io.compression import Notes, decompress
from llmkit.io.inputs import open_raw

SENTINEL = np.uint64((1 << 64) - 1)
MAX_LINE = 1 << 16  # bytes


def entries(paths: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(file:line, entry without surrounding whitespace) for every entry of the lists.

    Raises LlmkitError where a file cannot be read or is not UTF-8 text.
    """
    for path in paths:
        number, pending = 0, b""
        with open_raw(path) as raw:
            for block in decompress(raw, path, Notes()):
                *lines, pending = (pending + block).split(b"\n")
                for line in lines:
                    number += 1
                    yield from _entry(line, path, number)
                if len(pending) > MAX_LINE:
                    raise LlmkitError(
                        f"{path}:{number + 1}: a line of over {MAX_LINE} bytes", "write one entry per line"
                    )
        yield from _entry(pending, path, number + 1)


def _entry(line: bytes, path: str, number: int) -> Iterator[tuple[str, str]]:
    if number == 1:
        line = line.removeprefix(b"\xef\xbb\xbf")
    try:
        entry = line.decode().strip()
    except UnicodeDecodeError as error:
        raise LlmkitError(f"{path}:{number}: not UTF-8 text", "a list is a text file in UTF-8") from error
    if entry and not entry.startswith("#"):
        yield f"{path}:{number}", entry


class StringSet:
    """A set of strings as sorted 64-bit hashes: 8 bytes per entry, in memory that forked workers share.

    With 10 million entries, one look-up in 10^12 gives a false positive.
    """

    def __init__(self, items: Iterable[str]) -> None:
        hashes = np.unique(np.fromiter(map(_hash, items), np.uint64))
        self.hashes: NDArray[np.uint64] = np.append(hashes, SENTINEL)  # so that searchsorted never returns len(hashes)

    def first_member(self, items: list[str]) -> str | None:
        """The first of `items` that is in the set."""
        members = self.members(items)
        return members[0] if members else None

    def members(self, items: list[str]) -> list[str]:
        """The `items` that are in the set, in order."""
        if len(self.hashes) == 1 or not items:
            return []
        hashes = np.fromiter(map(_hash, items), np.uint64, len(items))
        equal = self.hashes[self.hashes.searchsorted(hashes)] == hashes
        return [items[i] for i in equal.nonzero()[0].tolist()]


def _hash(item: str) -> int:
    return xxhash.xxh3_64_intdigest(item.encode("utf-8", "surrogatepass"))
