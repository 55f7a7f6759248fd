"""Output directories: a directory is replaced only where llmkit made it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from llmkit.errors import LlmkitError
from llmkit.io.atomic import atomic_directory
from llmkit.lineage.formats import read_lineage


def artefact_directory(path: str | Path, force: bool = False) -> AbstractContextManager[Path]:
    """`atomic_directory`, but LlmkitError where `path` holds anything without a lineage record, `force` or not."""

    def check_replaced(directory: Path) -> None:
        if directory.is_dir() and any(directory.iterdir()) and not _has_lineage(directory):
            raise LlmkitError(
                f"{path} holds what llmkit did not make; -f does not replace it",
                "choose another output, or remove it first",
            )

    return atomic_directory(path, force, check_replaced)


def _has_lineage(directory: Path) -> bool:
    try:
        return read_lineage(directory) is not None
    except LlmkitError:
        return False
