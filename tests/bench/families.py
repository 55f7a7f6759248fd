"""Every family by every command that takes a model, on small directories that transformers wrote. Prints a dated table.

    python tests/bench/families.py [--family NAME]... > tests/bench/families.md

A cell is "yes" if the command, `generate` from its output and `lineage --check` of it end with exit code 0, and if
transformers opens what was trained and finds the same next token. Logits, gradients and files are compared with
transformers by tests/model/test_open_models.py. Takes about four minutes.
"""

from __future__ import annotations

import argparse
import datetime
import os
import shutil
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

import torch
from peers import ROOT

sys.path[:0] = [str(ROOT / "tests" / "model"), str(ROOT / "tests")]

from open_model_commands import COMMANDS, prepare, run
from open_models import MODELS
from small_tokenizer import small_tokenizer_files


@torch.no_grad()
def opens_in_transformers() -> bool:
    """Whether transformers reads the run in `out`, and has our logits."""
    from transformers import AutoModelForCausalLM

    from llmkit.io.run_layout import resolve_model
    from llmkit.model.pretrained.checkpoint import load_model

    ids = torch.arange(3, 60)[None]
    theirs, report = AutoModelForCausalLM.from_pretrained(
        resolve_model("out"), dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    ours = load_model("out", torch.float32)[0](ids)
    return not report["missing_keys"] and bool((theirs(ids).logits - ours).abs().max() < 1e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", action="append", choices=MODELS)
    given = parser.parse_args()
    names = [*COMMANDS, "trained, in transformers"]
    print(f"# Families by commands\n\n{datetime.date.today()}, torch {torch.__version__.partition('+')[0]};", end=" ")
    print(
        f"`python tests/bench/families.py`\n\n| family | {' | '.join(names)} |\n|---|{'---|' * len(names)}", flush=True
    )
    for family in given.family or MODELS:
        with tempfile.TemporaryDirectory() as directory, redirect_stdout(sys.stderr):
            os.chdir(directory)
            prepare(Path(directory), family, small_tokenizer_files())
            cells = []
            for name in COMMANDS:
                shutil.rmtree("out", ignore_errors=True)
                failed = run(name)
                cells.append("; ".join(failed) or "yes")
                if name == "train":
                    opened = "yes" if opens_in_transformers() else "no"
            os.chdir(ROOT)
        print(f"| {family} | {' | '.join([*cells, opened])} |", flush=True)


if __name__ == "__main__":
    main()
