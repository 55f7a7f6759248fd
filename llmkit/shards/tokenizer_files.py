"""The digest of the files of a tokenizer's directory, which its record in tokenizer_config.json holds as `files`.

That of the tokenizer itself (tokenizer_info.py) covers what decides the ids. This one covers the rest too: the chat
template, the names of special tokens, the layout of tokenizer.json. The record itself is left out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmkit.errors import LlmkitError
from llmkit.io.digest import digest_bytes, digest_stored
from llmkit.io.record import sealed
from llmkit.io.run_layout import regular
from llmkit.shards.tokenizer_info import TOKENIZER_FILES, read_record

CONFIG = "tokenizer_config.json"


def files_digest(directory: Path) -> str | None:
    """Digest of the tokenizer's files in a directory, without the record; None where there is no configuration."""
    config = _config(directory)
    if config is None:
        return None
    lines = [json.dumps({key: value for key, value in config.items() if key != "llmkit"}, sort_keys=True)]
    lines += [
        f"{name} {digest_stored(str(directory / name))}"
        for name in TOKENIZER_FILES
        if name != CONFIG and (directory / name).is_file()
    ]
    return digest_bytes(line.encode() + b"\n" for line in lines)


def seal(directory: Path) -> None:
    """Enter the digest of the files into the record."""
    record, config, digest = read_record(str(directory / CONFIG)), _config(directory), files_digest(directory)
    if isinstance(record, dict) and config is not None and digest is not None:
        (directory / CONFIG).write_bytes(_encoded(config | {"llmkit": sealed(record, digest)}))


def verify(directory: Path) -> None:
    """Raise LlmkitError where a configuration with a digest has another form than the one that was written."""
    config = _config(directory)
    record = config.get("llmkit") if config else None
    is_sealed = isinstance(record, dict) and "files" in record
    if config and is_sealed and (directory / CONFIG).read_bytes() != _encoded(config):
        raise LlmkitError(f"{directory / CONFIG}: not what was written", "the file is damaged, or was edited")


def _encoded(config: dict[str, Any]) -> bytes:
    return json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n"


def _config(directory: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(regular(directory / CONFIG).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None
