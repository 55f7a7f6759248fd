"""The two lm-eval tasks of the quickstart: a YAML file and a local JSONL file each, without downloads.

`llmkit eval MODEL --tasks docstring_choice,two_digit_sums --include-path DIR`. Data files have absolute paths, since
lm-eval resolves relative ones against the current directory.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

CHOICE = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {directory}/{name}.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: gold
metric_list:
  - metric: acc              # most probable choice
  - metric: acc_norm         # most probable for its length
  - metric: acc_mutual_info  # highest gain in probability from the question
metadata:
  version: 1.0
"""

SUMS = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {directory}/{name}.jsonl
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  until: ["\\n"]
  do_sample: false
  max_gen_toks: 24
filter_list:
  - name: last_number        # the sum, after the working
    filter:
      - function: regex
        regex_pattern: '(\\d+)\\s*$'
      - function: take_first
metric_list:
  - metric: exact_match
metadata:
  version: 1.0
"""


def write_task(directory: Path, name: str, template: str, items: Iterable[dict[str, object]]) -> int:
    """Write `NAME.yaml` and `NAME.jsonl`; returns the number of items."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{name}.yaml").write_text(template.format(name=name, directory=directory.resolve()))
    return write_lines(directory / f"{name}.jsonl", items)


def write_lines(path: Path, rows: Iterable[object]) -> int:
    """Write rows as JSON lines; returns their number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with open(path, "w", encoding="utf-8", errors="replace") as sink:
        for row in rows:
            sink.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count
