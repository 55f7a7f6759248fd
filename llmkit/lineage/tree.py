"""A lineage record as an indented tree for people."""

from __future__ import annotations

import json
import textwrap
from typing import Any

from llmkit.io.inputs import STDIN
from llmkit.io.names import one_line
from llmkit.io.record import base_name
from llmkit.lineage.fields import MAX_DEPTH, Record, counts_of, inputs_of, options_of


def as_tree(record: Record, name: str, width: int = 0) -> str:
    """The record as an indented tree with the artefact at the top and the original files as leaves.

    Lines are wrapped at `width` characters, if it is given.
    """
    lines: list[str] = []

    def add(line: str, indent: str) -> None:
        line = one_line(line)
        lines.extend(
            textwrap.wrap(line, max(width, len(indent) + 40), subsequent_indent=indent, break_on_hyphens=False)
            if width
            else [line]
        )

    def show(node: Record, title: str, prefix: str, depth: int) -> None:
        options = " ".join(f"{key}={_short(value)}" for key, value in sorted(options_of(node).items()))
        counts = ", ".join(
            f"{value:,} {key}" if isinstance(value, int) else f"{key} {value}" for key, value in counts_of(node).items()
        )
        add(f"{title}  <- {node.get('command')} {options}".rstrip(), f"{prefix}     ")
        if counts:
            add(f"{prefix}   [{counts}]", f"{prefix}    ")
        inputs = inputs_of(node)
        for i, item in enumerate(inputs):
            last = i + 1 == len(inputs)
            input_name = "(pipe)" if item["name"] == STDIN else item["part"] or item["name"]
            label = f"{prefix}{'└─ ' if last else '├─ '}{_role(item)}{input_name}"
            below = prefix + ("   " if last else "│  ")
            if item["lineage"] and depth < MAX_DEPTH:
                show(item["lineage"], label, below, depth + 1)
            else:
                unknown = f"  (made by an unknown step: its record was unreadable, {item['unreadable']})"
                add(f"{label}  {item['digest']}{unknown * bool(item['unreadable'])}", f"{below}  ")

    show(record, base_name(name), "", 0)
    return "\n".join(lines) + "\n"


def _short(value: Any) -> str:
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    except RecursionError:
        text = "..."
    return text if len(text) <= 60 else text[:57] + "..."


def _role(item: Record) -> str:
    return "" if item["role"] == "input" else f"{item['role']}: "
