"""What `sft` would train on: rows as text with the trained tokens marked, and a report on whole files.

    for line, row in shown_rows(reader, encode, 5): print(marked(segments(row, files)))
    report = check_rows(reader, encode, context=4096)

`encode` maps the fields of a row to its encoded rows.
"""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import groupby, islice
from typing import Any

import numpy as np
import xxhash

from llmkit.chat.encode import Encode, bounded, fitting_rows
from llmkit.chat.masks import EncodedRow
from llmkit.chat.rows import read_rows
from llmkit.chat.templates import special_contents, tokenizer_of
from llmkit.io.documents import BadLine, DocumentReader
from llmkit.io.names import printable

OPEN, CLOSE, CONTROL = "⟦", "⟧", "‹{}›"  # what is trained, and control tokens, where there are no colours
PAGE = """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; border-left: 3px solid #8888; padding-left: 1em }}
mark {{ background: #3a35; color: inherit }}
b {{ opacity: .65 }}
</style></head><body>
<h1>{title}</h1>
<p><mark>Trained tokens</mark> are marked, <b>control tokens</b> are bold.</p>
{rows}
</body></html>
"""


@dataclass(frozen=True, slots=True)
class Segment:
    """Neighbouring tokens as text: the weight of their loss, and whether they are control tokens."""

    text: str
    weight: float
    is_control: bool


def segments(row: EncodedRow, files: Mapping[str, str]) -> list[Segment]:
    """The tokens of a row, in order, joined where weight and kind are the same."""
    controls, tokenizer = set(special_contents(files).values()), tokenizer_of(files)
    tokens = zip(row.tokens.tolist(), row.weights.tolist(), strict=True)
    return [
        Segment(tokenizer.decode([token for token, _ in group], skip_special_tokens=False), weight, is_control)
        for (weight, is_control), group in groupby(tokens, key=lambda pair: (pair[1], pair[0] in controls))
    ]


def shown_rows(
    reader: DocumentReader, encode: Encode, names: Mapping[str, str], count: int, context: int, too_long: str
) -> Iterator[tuple[str, EncodedRow]]:
    """The first encoded rows as they are trained, with the file and line of each, and what becomes of those of over
    `context` tokens; nothing of a row that is dropped is trained. `names` as in `read_rows`.
    """

    def shown() -> Iterator[tuple[str, EncodedRow]]:
        for document, rows in read_rows(reader, bounded(encode, context, too_long), names):
            for row in rows:
                where, size = f"{document.file}:{document.line}", len(row.tokens)
                if size <= context:
                    yield where, row
                elif fitting := fitting_rows([row], context, too_long):
                    yield f"{where}, cut from {size:,} to {len(fitting[0].tokens):,} tokens", fitting[0]
                else:
                    reason = f"{where}, dropped: {size:,} tokens, a sequence has {context:,}"
                    yield reason, replace(row, weights=np.zeros_like(row.weights))

    return islice(shown(), count)


def marked(parts: Iterable[Segment]) -> str:
    """The text with signs around what is trained, and around control tokens."""
    return "".join(
        f"{OPEN}{text}{CLOSE}" if trained else text
        for trained, group in groupby(parts, key=lambda part: part.weight != 0)
        for text in ["".join(CONTROL.format(part.text) if part.is_control else part.text for part in group)]
    )


def page(rows: Iterable[tuple[str, list[Segment]]], title: str) -> str:
    """The rows as one HTML page without scripts or external parts."""
    blocks = (f"<h2>{html.escape(where)}</h2>\n<pre>{''.join(map(_as_html, parts))}</pre>" for where, parts in rows)
    return PAGE.format(title=html.escape(title), rows="\n".join(blocks))


def _as_html(part: Segment) -> str:
    text = html.escape(printable(part.text))
    text = f"<b>{text}</b>" if part.is_control else text
    weight = "" if part.weight in (0, 1) else f' title="weight {part.weight:g}"'
    return f"<mark{weight}>{text}</mark>" if part.weight else text


@dataclass(slots=True)
class FileReport:
    """Counts of one file. `refused`: for each kind of fault the first reason, its line, and the number of rows."""

    rows: int = 0
    tokens: int = 0
    trained: int = 0
    too_long: int = 0
    dropped: int = 0  # of those that are too long
    duplicates: int = 0
    refused: dict[str, tuple[str, int, int]] = field(default_factory=dict)
    lost: Counter[str] = field(default_factory=Counter)
    unused: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)

    def refuse(self, reason: str, line: int) -> None:
        """Count a row that cannot be used; reasons that differ in numbers only are of one kind."""
        kind = re.sub(r"\d+", "", reason)
        first, at, count = self.refused.get(kind, (reason, line, 0))
        self.refused[kind] = (first, at, count + 1)

    def as_json(self) -> dict[str, Any]:
        """The report, with the share of trained tokens; `errors` is the number of rows that cannot be used."""
        return {
            "rows": self.rows,
            "tokens": self.tokens,
            "trained_tokens": self.trained,
            "trained_share": round(self.trained / self.tokens, 4) if self.tokens else 0.0,
            "too_long": self.too_long,
            "dropped": self.dropped,
            "duplicates": self.duplicates,
            "errors": sum(count for _, _, count in self.refused.values()),
            "refused": [
                {"first_line": line, "reason": reason, "rows": count}
                for reason, line, count in sorted(self.refused.values(), key=lambda item: item[1])
            ],
            "not_shown_by_the_template": dict(self.lost),
            "unused_fields": dict(self.unused),
            "left_out": dict(self.left_out),
        }


class _Reports(DocumentReader):
    """A reader that reports bad lines by file instead of stopping at the first."""

    files: dict[str, FileReport]

    def accept(self, bad: list[BadLine]) -> None:
        for item in bad:
            self.files.setdefault(item.file, FileReport()).refuse(item.reason, item.line)
            self.bad += 1


def check_rows(
    paths: list[str], options: Any, encode: Encode, names: Mapping[str, str], context: int, too_long: str = "drop"
) -> dict[str, FileReport]:
    """A report by file on all rows; those longer than `context` tokens (with what `too_long` leaves of them), and those
    seen before, are counted.

    Memory: 16 bytes per row.
    """
    reader = _Reports(paths, options)
    reader.files = {}
    seen: set[bytes] = set()
    with reader:
        for document, rows in read_rows(reader, bounded(encode, context, too_long), names):
            report = reader.files.setdefault(document.file, FileReport())
            report.unused.update(rows.unused)
            report.left_out += rows.left_out
            for row in rows:
                report.rows += 1
                report.tokens += len(row.tokens)
                report.trained += row.trained
                report.too_long += len(row.tokens) > context
                report.dropped += not fitting_rows([row], context, too_long)
                report.lost.update(row.lost)
                digest = xxhash.xxh3_128_digest(row.tokens.tobytes() + row.weights.tobytes())
                report.duplicates += digest in seen
                seen.add(digest)
    for bad in reader.bad_files:
        reader.files.setdefault(bad.file, FileReport()).refuse(bad.reason, bad.line)
    return reader.files
