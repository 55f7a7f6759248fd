"""What filters read besides the text: lists in files that the user gives, and nested fields of a document.

A list is UTF-8 text, plain or compressed by any format that documents may have, one entry a line. Blank lines and lines that begin with "#" are
passed over. No list is shipped with the package.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from llmkit.errors import LlmkitError
from llmkit.io.compression import Notes, decompress
from llmkit.io.inputs import open_raw

LAST = np.uint64((1 << 64) - 1)
LONGEST_LINE = 1 << 16  # characters; no entry is so long


def entries(paths: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(file:line, entry without surrounding whitespace) of every list. LlmkitError where a file cannot be read or is no UTF-8 text."""
    for path in paths:
        number, rest = 0, b""
        with open_raw(path) as raw:
            for block in decompress(raw, path, Notes()):
                *lines, rest = (rest + block).split(b"\n")
                for line in lines:
                    number += 1
                    yield from _entry(line, path, number)
                if len(rest) > LONGEST_LINE:
                    raise LlmkitError(f"{path}:{number + 1}: a line of over {LONGEST_LINE} bytes", "one entry a line")
        yield from _entry(rest, path, number + 1)


def _entry(line: bytes, path: str, number: int) -> Iterator[tuple[str, str]]:
    if number == 1:
        line = line.removeprefix(b"\xef\xbb\xbf")
    try:
        entry = line.decode().strip()
    except UnicodeDecodeError as error:
        raise LlmkitError(f"{path}:{number}: not UTF-8 text", "a list is a text file in UTF-8") from error
    if entry and not entry.startswith("#"):
        yield f"{path}:{number}", entry


class Table:
    """A set of strings as sorted 64-bit hashes: 8 bytes an entry, and nothing in it that a forked worker would copy.

    Of 10 million entries one lookup in 10^12 is wrongly found.
    """

    def __init__(self, items: Iterable[str]) -> None:
        found = np.unique(np.fromiter(map(_hash, items), np.uint64))
        self.hashes: NDArray[np.uint64] = np.append(found, LAST)  # so that every place that is looked up exists

    def first(self, items: list[str]) -> str | None:
        """The first of `items` that is in the set."""
        found = self.all(items)
        return found[0] if found else None

    def all(self, items: list[str]) -> list[str]:
        """Those of `items` that are in the set, in order."""
        if len(self.hashes) == 1 or not items:
            return []
        wanted = np.fromiter(map(_hash, items), np.uint64, len(items))
        equal = self.hashes[self.hashes.searchsorted(wanted)] == wanted
        return [items[i] for i in equal.nonzero()[0].tolist()]


def _hash(item: str) -> int:
    return xxhash.xxh3_64_intdigest(item.encode("utf-8", "surrogatepass"))


def dotted(fields: Mapping[str, Any], path: str) -> Any:
    """The value at "metadata.lang", or of a field whose name has the dot in it; None where there is none."""
    if path in fields or "." not in path:
        return fields.get(path)
    found: Any = fields
    for name in path.split("."):
        if not isinstance(found, Mapping) or name not in found:
            return None
        found = found[name]
    return found
