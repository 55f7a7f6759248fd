"""Fields of a lineage record, which may come from an untrusted file: a value of the wrong type reads as an absent one.

A record is a tree: a command, its options, and its inputs with their own records (llmkit/io/record.py). An
input named `-` came through a pipe from the command of its record; one without a record is an original file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

Record = dict[str, Any]
MAX_DEPTH = 200  # nested records beyond this depth are ignored


def options_of(node: Record) -> dict[str, Any]:
    options = node.get("options")
    return options if isinstance(options, dict) else {}


def counts_of(node: Record) -> dict[str, Any]:
    counts = node.get("counts")
    return counts if isinstance(counts, dict) else {}


def inputs_of(node: Record) -> list[Record]:
    inputs = node.get("inputs")
    items = (
        [item for item in inputs if isinstance(item, dict) and isinstance(item.get("name"), str)]
        if isinstance(inputs, list)
        else []
    )
    return [item | {"lineage": item["lineage"] if isinstance(item.get("lineage"), dict) else None} for item in items]


def file_name(name: str) -> str:
    """The last component of an input's name, which leads out of no directory; "input" if it has none."""
    last = Path(name).name
    return "input" if last in ("", ".", "..") else last
