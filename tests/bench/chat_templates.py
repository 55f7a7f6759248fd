"""What is trained of a conversation, by the chat template of each model that TRL collects? Prints a dated table.

    python tests/bench/chat_templates.py > tests/bench/chat_templates.md

A cell is "yes" where the answers, calls or thoughts are trained as a sampler would emit them (the tables of
tests/chat/stock_templates.py), or says why rows are refused. Two turns count as text. Needs trl, which is only read.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import sys

from peers import ROOT

sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "chat")]

from stock_templates import REASONING, STOCK, SYSTEM, TEXT, TOOL, TOOLS, files_of, learnt

from llmkit.chat.masks import check_template


def cell(found: list[str] | str, expected: list[str]) -> str:
    if isinstance(found, str):
        return found.removeprefix("!").partition(": the chat template fails: ")[2] or found.removeprefix(
            "!the chat template "
        )
    return "yes" if found == expected else "WRONG"


def main() -> None:
    print(
        f"# Chat templates\n\n{datetime.date.today()}; trl {importlib.metadata.version('trl')}; `python tests/bench/chat_templates.py`\n"
    )
    columns = ("text", "system", "names of control tokens", "tool calls and results", "reasoning")
    print("| template | stops at |", " | ".join(columns), "|")
    print("|---|---|" + "---|" * len(columns))
    right = dict.fromkeys(columns, 0)
    for name, stock in STOCK.items():
        files = files_of(name)
        stops = check_template(files)
        answers = [(stock.first or stock.answer).format("first answer"), stock.answer.format("second answer")]
        named = [*TEXT[:3], {"role": "assistant", "content": f"second {stops[0]} answer"}]
        cells = (
            cell(learnt(TEXT, files), answers),
            cell(learnt(SYSTEM, files), answers),
            cell(learnt(named, files), [answers[0], stock.answer.format(f"second {stops[0]} answer")]),
            cell(learnt(TOOL, files, TOOLS), [stock.call, answers[1]]),
            cell(learnt(REASONING, files), [stock.reasoning]),
        )
        for column, text in zip(columns, cells, strict=True):
            right[column] += text == "yes"
        print("|", name, "|", " ".join(f"`{stop}`" for stop in stops).replace("|", "\\|"), "|", " | ".join(cells), "|")
    print("| right | |", " | ".join(f"{count} of {len(STOCK)}" for count in right.values()), "|")


if __name__ == "__main__":
    main()
