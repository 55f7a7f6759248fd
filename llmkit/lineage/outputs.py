"""Output directories: a directory is replaced only where llmkit made it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

from llmkit.errors import LlmkitError
from llmkit.io.atomic import atomic_directory
from llmkit.io.run_layout import STATE
from llmkit.lineage.formats import FORMATS, read_lineage, seal

HINT_NOT_OURS = "choose another output, or move it first"
# All that commands write into directories, by patterns; a directory that holds anything else is not replaced.
MODEL_FILES = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json", "generation_config.json")
LAYOUT = {*MODEL_FILES, STATE, *(part.partition("/")[0] for format in FORMATS for part in format.parts)}


@contextmanager
def artefact_directory(path: str | Path, force: bool = False) -> Iterator[Path]:
    """`atomic_directory`, but LlmkitError where `path` has no lineage record or holds other files, `force` or not.

    Once all files are written, their digest is entered into the record.
    """

    def check_replaced(directory: Path) -> None:
        names = sorted(entry.name for entry in directory.iterdir()) if directory.is_dir() else []
        foreign = [name for name in names if not any(fnmatchcase(name, pattern) for pattern in LAYOUT)]
        has_lineage = bool(names) and _has_lineage(directory)
        if foreign or (names and not has_lineage):
            what = f"{foreign[0]}, which" if has_lineage else "what"
            raise LlmkitError(f"{path} holds {what} llmkit did not make; -f does not replace it", HINT_NOT_OURS)

    with atomic_directory(path, force, check_replaced) as directory:
        yield directory
        seal(directory)


def _has_lineage(directory: Path) -> bool:
    try:
        return read_lineage(directory) is not None
    except LlmkitError:
        return False
