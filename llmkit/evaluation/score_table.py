"""The scores of several models as one table, for people; a column per model, a row per metric.

columns, rows = score_table({"run/": {"perplexity": {"heldout.jsonl": {...}}, "tasks": {"arc_easy": {...}}}})
print(as_text(columns, rows), end="")
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

PERPLEXITY_METRICS = ("nats_per_token", "bits_per_byte", "perplexity")


def score_table(results: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """(columns, rows) of `results`, model -> perplexity and tasks; scores with their standard error, "" where a
    model has none.
    """
    rows: dict[str, dict[str, str]] = {}
    for model, scores in results.items():
        for documents, figures in scores.get("perplexity", {}).items():
            for metric in PERPLEXITY_METRICS:
                rows.setdefault(f"{Path(documents).name} {metric}", {})[model] = f"{figures[metric]:.4f}"
        for task, metrics in scores.get("tasks", {}).items():
            for metric, value in metrics.items():
                name, comma, filter_name = metric.partition(",")
                if name.endswith("_stderr") or metric in ("items", "sample_len"):
                    continue
                error = metrics.get(f"{name}_stderr{comma}{filter_name}")
                cell = f"{value:.4f}" + (f" ± {error:.4f}" if error is not None and error == error else "")
                rows.setdefault(f"{task} {metric}", {})[model] = cell
    return ["", *results], [[row, *(cells.get(model, "") for model in results)] for row, cells in rows.items()]


def as_text(columns: list[str], rows: list[list[str]]) -> str:
    """The table as aligned lines, the first column to the left and the others to the right."""
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    lines = []
    for first, *others in (columns, *rows):
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip() + "\n")
    return "".join(lines)
