#!/usr/bin/env python3
"""Build the data of examples/quickstart.sh from Python's own documentation. Takes 15 s; standard library only.

    python examples/build_corpus.py data/

data/train/{docs,code,prose}.jsonl           documents of the training modules (80 %): real, noisy, with duplicates
data/development/documents.jsonl             documents of held-out modules, for choosing settings
data/test/{documents,sample}.jsonl           documents of other held-out modules, for reporting, and a small sample
data/rows/{answers,bare,sums,pairs}.jsonl    rows for fine-tuning and preference pairs, from training modules only
data/tasks/*.yaml *.jsonl                    lm-eval tasks from held-out modules only, for development and for testing
data/prompts.jsonl                           questions on held-out modules and held-out sums, for a conversation
data/summary.json                            counts, and the score of a rule without a model on the multiple-choice task

The output is byte-identical for the same Python installation.
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
    """Write all files under `out`: at most `items` items per multiple-choice task, `repeats` pairs per question."""
    modules = list(sources())
    definitions = [*(item for module in modules for item in of_source(module)), *of_extensions()]
    all_questions = questions.questions(definitions)
    summary: dict[str, object] = {"modules": len(modules), "definitions": len(definitions)}
    summary["documents"] = write_documents(out, modules, definitions)
    summary["rows"] = write_rows(out, all_questions, repeats, seed)
    summary["tasks"] = write_tasks(out, all_questions, items, seed)
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return summary


def write_documents(out: Path, modules: list[Source], definitions: list[Definition]) -> dict[str, int]:
    """Write training documents by source and held-out documents by split; returns the counts."""
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
    """A sample of documents, selected by a hash of the id, up to SAMPLE_BYTES of each source."""
    remaining = dict(SAMPLE_BYTES)
    chosen = []
    for row in sorted(rows, key=lambda row: hashlib.sha256(row["id"].encode()).digest()):
        if 100 <= len(row["text"]) <= min(LONGEST_SAMPLE, remaining[row["source"]]):
            remaining[row["source"]] -= len(row["text"])
            chosen.append(row)
    return chosen


def write_rows(out: Path, all_questions: list[questions.Question], repeats: int, seed: int) -> dict[str, int]:
    """Write rows for fine-tuning and preference pairs; returns the counts."""
    pairs = questions.preference_pairs(all_questions, repeats, seed)
    # Shuffled, so that the first n rows come from all modules.
    all_questions = random.Random(seed).sample(all_questions, len(all_questions))
    return {
        "answers": write_lines(out / "rows/answers.jsonl", questions.answer_rows(all_questions)),
        "bare": write_lines(out / "rows/bare.jsonl", questions.bare_rows(all_questions)),
        "sums": write_lines(out / "rows/sums.jsonl", sums.sum_rows(sums.sums(seed)[TRAIN])),
        "pairs": write_lines(out / "rows/pairs.jsonl", pairs),
    }


def write_tasks(out: Path, all_questions: list[questions.Question], items: int, seed: int) -> dict[str, object]:
    """Write both tasks for both held-out splits, and prompts for a conversation; returns counts and rule scores."""
    summary: dict[str, object] = {}
    for split, suffix in ((TEST, ""), (DEVELOPMENT, "_development")):
        rng = random.Random(seed)
        choice = list(questions.choice_items(all_questions, split, seed))
        choice = rng.sample(choice, min(items, len(choice)))
        name = f"docstring_choice{suffix}"
        write_task(out / "tasks", name, CHOICE, choice)
        score, error = questions.word_rule(choice)
        summary[name] = {"items": len(choice), "rule": round(score, 4), "rule_stderr": round(error, 4)}
        name = f"two_digit_sums{suffix}"
        added = list(sums.sum_items(sums.sums(seed)[split]))
        summary[name] = {"items": write_task(out / "tasks", name, SUMS, added)}
        if split == TEST:
            prompt_texts = [item["question"] for item in choice[:4]] + [item["question"] for item in added[:4]]
            prompts = [{"messages": [{"role": "user", "content": question}]} for question in prompt_texts]
            write_lines(out / "prompts.jsonl", prompts)
    return summary


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
