"""The lineage record and the content digest of token shards, for lineage/formats.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmkit.errors import LlmkitError
from llmkit.io.sealed_file import BYTES, is_sealed_by
from llmkit.shards.digest import combined_digest
from llmkit.shards.reader import TokenStore, described_digest, stream_files
from llmkit.shards.shard import Shard, scan_shard

TRAILER_KEYS = {"part", "last", "documents", "tokens", "digest", "lineage", BYTES}


def read_record(path: str) -> dict[str, Any] | None:
    """Lineage record of one shard; complete in the last one of a directory."""
    return Shard(Path(path), path).lineage()


def shard_digest(path: str | Path) -> str:
    """Digest of a .arrow file or directory of shards, from the documents; equals the one in an intact trailer."""
    return combined_digest([scan_shard(Shard(file, name))[0] for file, name in stream_files(str(path), None)])


def files_digest(path: Path) -> str:
    """Digest of the metadata of the shards, which is the same in all of them, and of the tokenizer beside them."""
    shards = TokenStore.open(str(path)).shards
    if any(shard.metadata != shards[0].metadata for shard in shards):
        raise LlmkitError(f"{path}: the shards do not have the same metadata", "one of them is damaged")
    return described_digest(shards)


def verify(path: Path) -> None:
    """Raise LlmkitError where a byte of a shard is not what was written, whatever it stands for."""
    for file, name in stream_files(str(path), None):
        trailer = Shard(file, name).trailer
        digest = trailer.get(BYTES)
        is_sealed = isinstance(digest, str) and is_sealed_by(file, digest)
        if (BYTES in trailer and not is_sealed) or not trailer.keys() <= TRAILER_KEYS:
            raise LlmkitError(f"{name}: not what was written", "the file is damaged")
