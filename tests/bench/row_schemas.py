"""Which published files of rows do `sft` and `dpo` take? Prints a dated table.

    python tests/bench/row_schemas.py > tests/bench/row_schemas.md

Reads every file of ../shared/data/instruct and pref. A row may hold several conversations or pairs, or none.
"""

from __future__ import annotations

import datetime
import sys
from collections import Counter

from peers import ROOT, SHARED

sys.path.insert(0, str(ROOT))

from llmkit.chat.rows import read_rows, to_conversations, to_preferences
from llmkit.io.documents import BadLine, DocumentReader, ReadOptions


class Counting(DocumentReader):
    """Counts the reasons of refused rows."""

    reasons: Counter[str]

    def accept(self, bad: list[BadLine]) -> None:
        self.bad += len(bad)
        self.reasons.update(item.reason.partition("(")[0].strip() for item in bad)


def main() -> None:
    print(f"# Row schemas\n\n{datetime.date.today()}; `python tests/bench/row_schemas.py`\n")
    print("| file | command | rows | conversations or pairs | refused | why | fields not used |")
    print("|---|---|---|---|---|---|---|")
    for path in sorted([*(SHARED / "instruct").iterdir(), *(SHARED / "pref").iterdir()]):
        for command, convert in (("sft", to_conversations), ("dpo", to_preferences)):
            reader = Counting([str(path)], ReadOptions(text_key=None, on_bad_line="skip"))
            reader.reasons = Counter()
            rows = [made for _, made in read_rows(reader, convert)]
            if not rows:
                continue
            unused = Counter(name for made in rows for name in made.unused)
            why = "; ".join(reason for reason, _ in reader.reasons.most_common(2))
            cells = (
                path.name,
                command,
                f"{len(rows):,}",
                f"{sum(map(len, rows)):,}",
                reader.bad,
                why,
                ", ".join(unused),
            )
            print("|", " | ".join(map(str, cells)), "|", flush=True)


if __name__ == "__main__":
    main()
