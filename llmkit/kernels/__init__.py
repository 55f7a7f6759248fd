"""How kernels are compiled and kept: loops over UTF-8 bytes and numbers that numba compiles on first use and caches.

Here is what all of them share: eight bytes at a time (swar), UTF-8 and hashes (utf8). Those over documents stand in corpus/kernels, those over
tokens in tokens/kernels. One signature each, so that little is compiled.
"""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import xxhash

# numba looks for the BLAS of SciPy, and so loads that. No kernel of ours needs one.
BLAS = "scipy.linalg.cython_blas"
_loaded: dict[str, Any] = sys.modules
if BLAS in _loaded:
    import numba
else:
    _loaded[BLAS] = None  # it cannot be imported
    import numba
    import numba.np.arraymath

    del _loaded[BLAS]

HERE = Path(__file__).parent
COMPILED = (
    "kernels",
    "corpus",
    "corpus/kernels",
    "corpus/filters/kernels",
    "corpus/dedup/kernels",
    "tokens/kernels",
)  # where compiled functions stand


def _place_of_cache() -> str:
    """Where compiled kernels are kept: beside the source, else in the user's cache directory; where neither can be written to, for this process alone.

    In a directory named by all sources together: numba looks for changes in the file of a function alone, not in those of the functions that were
    compiled into it.
    """
    digest = xxhash.xxh3_64()
    for source in sorted(path for part in COMPILED for path in HERE.parent.glob(f"{part}/*.py")):
        digest.update(source.read_bytes())
    name = f"kernels-{digest.hexdigest()}"
    settings: Any = numba.config
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    exists = next((path for path in (home, *home.parents) if path.exists()), home)
    if settings.CACHE_DIR:
        return str(Path(settings.CACHE_DIR, name))
    if os.access(HERE, os.W_OK):
        return str(HERE / "__pycache__" / name)
    if os.access(exists, os.W_OK):
        return str(home / "llmkit" / name)
    directory = tempfile.mkdtemp(prefix="llmkit-kernels-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


numba.config.CACHE_DIR = _place_of_cache()  # type: ignore[attr-defined]


_ALONE: dict[str, Any] = {"cache": True, "nogil": True, "_nrt": False}


def kernel(function: Any) -> Any:
    """Compile a function that is given all its arrays and makes none.

    No references to arrays are counted then, which numba does else with two atomic operations wherever one kernel calls another.
    """
    return numba.njit(**_ALONE)(function)


def inner(function: Any) -> Any:
    """A `kernel` that is written into those that call it: for what is called for every word, where handing arrays over costs as much as the work."""
    return numba.njit(**_ALONE, forceinline=True)(function)


def cold(kernel: str = "*") -> bool:
    """Whether nothing is compiled yet on this machine, or not this kernel: "file.function"."""
    settings: Any = numba.config
    return not settings.DISABLE_JIT and not any(Path(settings.CACHE_DIR).glob(f"*/{kernel}-*.nbi"))
