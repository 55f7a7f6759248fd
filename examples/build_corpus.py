#!/usr/bin/env python3
"""Build everything that examples/quickstart.sh trains and tests on from Python's own documentation. Standard library only, 15 s.

    python examples/build_corpus.py data/

data/train/docs.jsonl code.jsonl prose.jsonl      documents of the training modules (80 % of them): real, noisy, with real duplicates
data/development/documents.jsonl                  documents of held-out modules, for choosing settings
data/test/documents.jsonl sample.jsonl            documents of other held-out modules, for reporting, and a small even sample of them
data/rows/answers.jsonl bare.jsonl sums.jsonl pairs.jsonl    rows for fine-tuning, preference pairs; from training modules alone
data/tasks/*.yaml *.jsonl                         tasks for lm-eval, from held-out modules alone, once for development and once for testing
data/prompts.jsonl                                questions from held-out modules and held-out sums, to see a model speak
data/summary.json                                 counts, and what a rule without any model scores on the multiple-choice task

The same Python installation gives the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections import defaultdict
from pathlib import Path

from quickstart import documents, questions, sums
from quickstart.definitions import DEVELOPMENT, TEST, TRAIN, Definition, Source, of_extensions, of_source, sources
from quickstart.tasks import CHOICE, SUMS, write_lines, write_task

SAMPLE_BYTES = {"docs": 60_000, "code": 30_000, "prose": 30_000}  # of the sample of test documents, by source
LONGEST_SAMPLE = 12_000  # characters of a sampled document


def build(out: Path, items: int, repeats: int, seed: int) -> dict[str, object]:
    """Write all files under `out`; `items` at most per multiple-choice task, every training question in `repeats` preference pairs."""
    modules = list(sources())
    definitions = [*(item for module in modules for item in of_source(module)), *of_extensions()]
    asked = questions.questions(definitions)
    summary: dict[str, object] = {"modules": len(modules), "definitions": len(definitions)}
    summary["documents"] = write_documents(out, modules, definitions)
    summary["rows"] = write_rows(out, asked, repeats, seed)
    summary["tasks"] = write_tasks(out, asked, items, seed)
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return summary


def write_documents(out: Path, modules: list[Source], definitions: list[Definition]) -> dict[str, int]:
    """Training documents by source, held-out documents together."""
    rows = [
        *documents.entries(definitions, documents.module_docstrings(modules)),
        *documents.code(modules),
        *documents.prose(),
    ]
    files: dict[str, list[documents.Document]] = defaultdict(list)
    for split, row in rows:
        files[f"train/{row['source']}" if split == TRAIN else f"{split}/documents"].append(row)
    files["test/sample"] = sample(files["test/documents"])
    return {name: write_lines(out / f"{name}.jsonl", content) for name, content in sorted(files.items())}


def sample(rows: list[documents.Document]) -> list[documents.Document]:
    """A small selection of documents by a hash of their ids, so many bytes of each source."""
    left = dict(SAMPLE_BYTES)
    chosen = []
    for row in sorted(rows, key=lambda row: hashlib.sha256(row["id"].encode()).digest()):
        if 100 <= len(row["text"]) <= min(LONGEST_SAMPLE, left[row["source"]]):
            left[row["source"]] -= len(row["text"])
            chosen.append(row)
    return chosen


def write_rows(out: Path, asked: list[questions.Question], repeats: int, seed: int) -> dict[str, int]:
    """Rows for fine-tuning and preference pairs."""
    pairs = questions.preference_pairs(asked, repeats, seed)
    asked = random.Random(seed).sample(asked, len(asked))  # so that the first n rows are from all modules
    return {
        "answers": write_lines(out / "rows/answers.jsonl", questions.answer_rows(asked)),
        "bare": write_lines(out / "rows/bare.jsonl", questions.bare_rows(asked)),
        "sums": write_lines(out / "rows/sums.jsonl", sums.sum_rows(sums.sums(seed)[TRAIN])),
        "pairs": write_lines(out / "rows/pairs.jsonl", pairs),
    }


def write_tasks(out: Path, asked: list[questions.Question], items: int, seed: int) -> dict[str, object]:
    """Both tasks for both held-out splits, and prompts for a sample conversation."""
    found: dict[str, object] = {}
    for split, suffix in ((TEST, ""), (DEVELOPMENT, "_development")):
        rng = random.Random(seed)
        choice = list(questions.choice_items(asked, split, seed))
        choice = rng.sample(choice, min(items, len(choice)))
        name = f"docstring_choice{suffix}"
        write_task(out / "tasks", name, CHOICE, choice)
        score, error = questions.word_rule(choice)
        found[name] = {"items": len(choice), "rule": round(score, 4), "rule_stderr": round(error, 4)}
        name = f"two_digit_sums{suffix}"
        added = list(sums.sum_items(sums.sums(seed)[split]))
        found[name] = {"items": write_task(out / "tasks", name, SUMS, added)}
        if split == TEST:
            asked_of_all = [item["question"] for item in choice[:4]] + [item["question"] for item in added[:4]]
            prompts = [{"messages": [{"role": "user", "content": question}]} for question in asked_of_all]
            write_lines(out / "prompts.jsonl", prompts)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="directory to write")
    parser.add_argument("--items", type=int, default=420, help="items per multiple-choice task (default 420)")
    parser.add_argument("--pairs", type=int, default=2, help="preference pairs per training question (default 2)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(json.dumps(build(options.out, options.items, options.pairs, options.seed), indent=1))


if __name__ == "__main__":
    main()
