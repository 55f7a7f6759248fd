"""A lineage record as an indented tree for people."""

from __future__ import annotations

import json
from typing import Any

from llmkit.io.inputs import STDIN
from llmkit.io.names import one_line
from llmkit.io.record import base_name
from llmkit.lineage.fields import MAX_DEPTH, Record, counts_of, inputs_of, options_of


def as_tree(record: Record, name: str) -> str:
    """The record as an indented tree with the artefact at the top and the original files as leaves."""
    lines: list[str] = []

    def show(node: Record, title: str, prefix: str, depth: int) -> None:
        options = " ".join(f"{key}={_short(value)}" for key, value in sorted(options_of(node).items()))
        counts = ", ".join(
            f"{value:,} {key}" if isinstance(value, int) else f"{key} {value}" for key, value in counts_of(node).items()
        )
        lines.append(f"{title}  <- {node.get('command')} {options}".rstrip())
        if counts:
            lines.append(f"{prefix}   [{counts}]")
        inputs = inputs_of(node)
        for i, item in enumerate(inputs):
            last = i + 1 == len(inputs)
            input_name = "(pipe)" if item["name"] == STDIN else item["part"] or item["name"]
            label = f"{prefix}{'└─ ' if last else '├─ '}{_role(item)}{input_name}"
            below = prefix + ("   " if last else "│  ")
            if item["lineage"] and depth < MAX_DEPTH:
                show(item["lineage"], label, below, depth + 1)
            else:
                lines.append(f"{label}  {item['digest']}")

    show(record, base_name(name), "", 0)
    return "\n".join(map(one_line, lines)) + "\n"


def _short(value: Any) -> str:
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    except RecursionError:
        text = "..."
    return text if len(text) <= 60 else text[:57] + "..."


def _role(item: Record) -> str:
    return "" if item["role"] == "input" else f"{item['role']}: "
