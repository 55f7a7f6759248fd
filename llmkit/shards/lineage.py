"""The lineage record and the content digest of token shards, for lineage/formats.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmkit.shards.digest import combined_digest
from llmkit.shards.reader import stream_files
from llmkit.shards.shard import Shard, scan_shard


def read_record(path: str) -> dict[str, Any] | None:
    """Lineage record of one shard; complete in the last one of a directory."""
    return Shard(Path(path), path).lineage()


def shard_digest(path: str | Path) -> str:
    """Digest of a .arrow file or directory of shards, from the documents; equals the one in an intact trailer."""
    return combined_digest([scan_shard(Shard(file, name))[0] for file, name in stream_files(str(path), None)])
