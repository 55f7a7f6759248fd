"""The lineage record and the content digest of token shards, for lineage/formats.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmkit.shards.part import Part, combined_digest, part_digest
from llmkit.shards.reader import stream_files


def read_record(path: str) -> dict[str, Any] | None:
    """Lineage record of one part; complete in the last one."""
    return Part(Path(path), path).lineage()


def shard_digest(path: str | Path) -> str:
    """Digest of the content of a .arrow file or a directory of parts, computed from the documents; equals the one in an intact trailer."""
    return combined_digest([part_digest(Part(file, name))[0] for file, name in stream_files(str(path), None)])
