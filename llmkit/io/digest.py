"""Digests of content as lineage records hold them: `xxh3:` and the 128-bit XXH3 hash in hex."""

from __future__ import annotations

from collections.abc import Iterable

import xxhash

from llmkit.errors import LlmkitError
from llmkit.io.compression import BLOCK, Notes, decompress
from llmkit.io.inputs import display_name, open_raw


def digest_text(state: xxhash.xxh3_128) -> str:
    """A hash as records hold it."""
    return "xxh3:" + state.hexdigest()


def digest_bytes(blocks: Iterable[bytes]) -> str:
    """Digest of all blocks together."""
    state = xxhash.xxh3_128()
    for block in blocks:
        state.update(block)
    return digest_text(state)


def digest_stored(path: str) -> str:
    """Digest of a file's bytes as they are stored."""
    with open_raw(path) as raw:
        return digest_bytes(iter(lambda: raw.read(BLOCK), b""))


def digest_damaged(path: str) -> str:
    """Digest of the stored bytes of a file that is not what it should be; "unreadable" where they cannot be read."""
    try:
        return digest_stored(path)
    except (LlmkitError, OSError):
        return "unreadable"


def digest_content(path: str) -> str:
    """Digest of a file's bytes, decompressed where it is compressed."""
    with open_raw(path) as raw:
        return digest_bytes(decompress(raw, display_name(path), Notes()))
