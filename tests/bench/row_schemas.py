"""Which published files of rows do `sft` and `dpo` take? Prints a dated table.

    python tests/bench/row_schemas.py > tests/bench/row_schemas.md

Reads every file of ../shared/data/instruct and pref with both commands' schemas. A row may hold several conversations
or pairs, or none; what is valid but not used is in the column "left out".
"""

from __future__ import annotations

import datetime
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peers import ROOT, SHARED

sys.path.insert(0, str(ROOT))

from llmkit.chat.rows import Converted, listed, read_rows, to_conversations, to_preferences
from llmkit.errors import LlmkitError
from llmkit.io.documents import BadLine, DocumentReader, ReadOptions

COLUMNS = ("file", "command", "rows", "used", "conversations or pairs", "left out", "refused", "why", "fields not used")


class Counting(DocumentReader):
    """Counts the reasons of refused rows."""

    reasons: Counter[str]

    def accept(self, bad: list[BadLine]) -> None:
        self.bad += len(bad)
        self.reasons.update(item.reason.partition(" (")[0] for item in bad)


def cells(path: Path, command: str, convert: Callable[..., Converted[Any]]) -> tuple[str, ...]:
    """One row of the table."""
    reader = Counting([str(path)], ReadOptions(text_key=None, on_bad_line="skip"))
    reader.reasons = Counter()
    try:
        rows = [made for _, made in read_rows(reader, convert)]
    except LlmkitError as error:
        return (path.name, command, "", "", "", "", "the file", error.message.removeprefix(f"{path}: "), "")
    unused = Counter(name for made in rows for name in made.unused)
    left_out = sum((made.left_out for made in rows), Counter[str]())
    return (
        path.name,
        command,
        f"{len(rows) + reader.bad:,}",
        f"{sum(1 for made in rows if made):,}",
        f"{sum(map(len, rows)):,}",
        listed(left_out),
        f"{reader.bad:,}",
        "; ".join(f"{reason} ({count:,})" for reason, count in reader.reasons.most_common()),
        ", ".join(f"{name} ({count:,})" for name, count in unused.items()),
    )


def main() -> None:
    began = time.process_time()
    print(f"# Row schemas\n\n{datetime.date.today()}; `python tests/bench/row_schemas.py`\n")
    print("|", " | ".join(COLUMNS), "|")
    print("|---" * len(COLUMNS) + "|")
    for path in sorted([*(SHARED / "instruct").iterdir(), *(SHARED / "pref").iterdir()]):
        for command, convert in (("sft", to_conversations), ("dpo", to_preferences)):
            print("|", " | ".join(cells(path, command, convert)), "|", flush=True)
    print(f"\n{time.process_time() - began:.1f} s of CPU time. A tree that is used may leave out lower-ranked answers.")


if __name__ == "__main__":
    main()
