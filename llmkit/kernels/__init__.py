"""Compilation and caching of kernels: loops over UTF-8 bytes and numbers that numba compiles on first use.

This package holds what all kernels share: eight bytes at a time (swar), UTF-8 and hashes (utf8). Kernels over
documents are in corpus/kernels, those over tokens in tokens/kernels. Each has one signature, which keeps
compilation short.
"""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import xxhash

# numba imports SciPy to find its BLAS. None of our kernels needs one, so that import is blocked. With yaml, it would
# read .numba_config.yaml in the working directory, which may be a download: one that names a cache of compiled code,
# which is pickled, runs any code.
BLAS, YAML = "scipy.linalg.cython_blas", "yaml"
_loaded: dict[str, Any] = sys.modules
_yaml = {name: module for name, module in _loaded.items() if name == YAML}
_blocked = [YAML] if BLAS in _loaded else [YAML, BLAS]
_loaded.update(dict.fromkeys(_blocked))  # makes the imports fail
with warnings.catch_warnings(action="ignore"):  # that the file needs yaml
    import numba
    import numba.np.arraymath
for _name in _blocked:
    del _loaded[_name]
_loaded.update(_yaml)
numba.core.config._config_fname = os.devnull  # type: ignore[attr-defined]  # it is looked for again at each compilation

HERE = Path(__file__).parent
COMPILED = (
    "kernels",
    "corpus",
    "corpus/kernels",
    "corpus/filters/kernels",
    "corpus/dedup/kernels",
    "tokens/kernels",
)  # folders with compiled functions


def _cache_directory() -> str:
    """Directory of compiled kernels: beside the source, else in the user's cache; if neither is writable, a
    temporary one.

    Its name is a digest of all sources together, since numba checks for changes only in the file of a function,
    not in those of the functions compiled into it.
    """
    digest = xxhash.xxh3_64()
    for source in sorted(path for part in COMPILED for path in HERE.parent.glob(f"{part}/*.py")):
        digest.update(source.read_bytes())
    name = f"kernels-{digest.hexdigest()}"
    settings: Any = numba.config
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    nearest = next((path for path in (home, *home.parents) if path.exists()), home)
    if settings.CACHE_DIR:
        return str(Path(settings.CACHE_DIR, name))
    if os.access(HERE, os.W_OK):
        return str(HERE / "__pycache__" / name)
    if os.access(nearest, os.W_OK):
        return str(home / "llmkit" / name)
    directory = tempfile.mkdtemp(prefix="llmkit-kernels-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


numba.config.CACHE_DIR = _cache_directory()  # type: ignore[attr-defined]


_OPTIONS: dict[str, Any] = {"cache": True, "nogil": True, "_nrt": False}


def kernel(function: Any) -> Any:
    """Compile a function that receives all its arrays and allocates none.

    numba then omits reference counting of arrays, which otherwise costs two atomic operations wherever one
    kernel calls another.
    """
    return numba.njit(**_OPTIONS)(function)


def inner(function: Any) -> Any:
    """A `kernel` inlined into its callers: for functions called per word, where passing arrays costs as much as
    the work.
    """
    return numba.njit(**_OPTIONS, forceinline=True)(function)


def cold(kernel: str = "*") -> bool:
    """Whether no kernel has been compiled on this machine yet, or not this one ("file.function")."""
    settings: Any = numba.config
    return not settings.DISABLE_JIT and not any(Path(settings.CACHE_DIR).glob(f"*/{kernel}-*.nbi"))
