"""Output directories: a directory is replaced only where llmkit made it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmkit.errors import LlmkitError
from llmkit.io.atomic import atomic_directory
from llmkit.lineage.formats import read_lineage, seal


@contextmanager
def artefact_directory(path: str | Path, force: bool = False) -> Iterator[Path]:
    """`atomic_directory`, but LlmkitError where `path` holds anything without a lineage record, `force` or not.

    Once all files are written, their digest is entered into the record.
    """

    def check_replaced(directory: Path) -> None:
        if directory.is_dir() and any(directory.iterdir()) and not _has_lineage(directory):
            raise LlmkitError(
                f"{path} holds what llmkit did not make; -f does not replace it",
                "choose another output, or remove it first",
            )

    with atomic_directory(path, force, check_replaced) as directory:
        yield directory
        seal(directory)


def _has_lineage(directory: Path) -> bool:
    try:
        return read_lineage(directory) is not None
    except LlmkitError:
        return False
