"""Compiled text kernels: what rules measure, in loops over UTF-8 bytes that numba compiles on first use and caches.

Every kernel takes a text as `uint8[bytes]` (valid UTF-8) and the table of character classes (`characters.classes()`); lengths that they return
are in characters. One signature each, so that little is compiled.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numba


def _find_cache() -> None:
    """Numba keeps what it compiled beside the source, else in the user's cache directory. Where neither can be written to, for this process alone."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    exists = next((path for path in (home, *home.parents) if path.exists()), home)
    settings: Any = numba.config
    if not (settings.CACHE_DIR or os.access(Path(__file__).parent, os.W_OK) or os.access(exists, os.W_OK)):
        settings.CACHE_DIR = tempfile.mkdtemp(prefix="llmkit-kernels-")
        atexit.register(shutil.rmtree, settings.CACHE_DIR, ignore_errors=True)


_find_cache()
