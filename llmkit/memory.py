"""A budget for the memory that reading somebody's file may take.

Formats that compress can ask for any amount: 700 bytes of Parquet hold rows of 7 GB. What a decoder will allocate is
often known only when it has done so; a limit of the process stops it there.

    with limited("crawl.parquet"):
        batch = next(batches)
"""

from __future__ import annotations

import os
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llmkit.errors import LlmkitError

LEAST, MOST = 64 << 20, 4 << 30  # of a budget, and of the default
WINDOW = 256 << 20
_budget = 0
_is_limited = False


class MemoryLimitError(LlmkitError):
    """Reading a file needs more memory than its budget."""


def set_budget(size: int) -> None:
    """Set the budget of this process and its forks, in bytes, at least 64 MiB; 0: the default."""
    global _budget
    _budget = max(size, LEAST) if size else 0


def budget() -> int:
    """The budget in bytes: by default half of the machine's memory, at most 4 GiB."""
    return _budget or min(MOST, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)


def window() -> int:
    """Most bytes of a decompressor's window (zstd) or memory (xz): 256 MiB, or what --memory allows if that is more."""
    return max(WINDOW, _budget)


def zstd_decompressor(dictionary: Any = None) -> Any:
    """A ZstdDecompressor that allows a window as large as memory.window()."""
    import zstandard

    return zstandard.ZstdDecompressor(dictionary, max_window_size=min(window(), 1 << 31))  # the format's limit


def over_window(error: Exception, head: bytes = b"") -> str:
    """What is wrong if a decoder refuses data for its window, otherwise empty; `head`: of the zstd frame."""
    if not re.search("too much memory|Memory usage limit", str(error)):
        return ""
    if not head:
        return f"needs more than {window() >> 20:,} MiB of memory to decompress"
    import zstandard

    try:
        size = zstandard.get_frame_parameters(head).window_size
    except zstandard.ZstdError:  # more than any decoder allows: the header is damaged
        return ""
    return f"needs {size >> 20:,} MiB of memory to decompress, which is over {window() >> 20:,} MiB"


@contextmanager
def limited(name: str, size: int = 0, hint: str = "allow more with --memory if you trust the file") -> Iterator[None]:
    """MemoryLimitError about the file `name` where the block needs more memory than the budget, or `size`, in bytes.

    What is in use already does not count. On Linux this is enforced by a limit on the data of the process; elsewhere
    there is no limit but the machine's. A block inside another has the limit of the outer one.
    """
    global _is_limited
    size, is_outer = size or budget(), not _is_limited and sys.platform == "linux"
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    try:
        if is_outer:
            limit = _in_use() + size
            bounds = [bound for bound in (soft, hard) if bound != resource.RLIM_INFINITY]
            resource.setrlimit(resource.RLIMIT_DATA, (min([limit, *bounds]), hard))
            _is_limited = True
        yield
    except MemoryError:
        if _is_limited and not is_outer:
            raise
        raise MemoryLimitError(f"{name}: needs more than {size >> 20:,} MiB of memory", hint) from None
    finally:
        if is_outer:
            _is_limited = False
            resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _in_use() -> int:
    """The private memory of this process, in bytes, as RLIMIT_DATA counts it."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        return next((int(line.split()[1]) << 10 for line in file if line.startswith("VmData")), 0)
