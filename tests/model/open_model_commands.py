"""Every command that takes a model, on one small directory that transformers wrote. Shared by the test of a sample and
by tests/bench/families.py, which runs all of them on all families."""

from __future__ import annotations

import json
from pathlib import Path

from open_models import model_directory

from llmkit.cli.main import run_command

TEXTS = [f"the quick brown fox {n} jumps over the lazy dog and rests, {n * n} times over" for n in range(60)]
# Each command with the output that shows that it worked; a later one may read what an earlier one has written.
COMMANDS: dict[str, tuple[str, ...]] = {
    "generate": ("generate", "model", "--prompt", "the quick", "--max-tokens", "3", "--temperature", "0"),
    "train": ("train", "shards", "--from", "model", "--tokens", "256", "--sequence-length", "64", "--batch-size", "2", "-o", "out"),
    "sft": ("sft", "model", "chat.jsonl", "--epochs", "1", "--batch-size", "2", "--sequence-length", "64", "-o", "out"),
    "dpo": ("dpo", "model", "pairs.jsonl", "--epochs", "1", "--batch-size", "2", "--sequence-length", "64", "-o", "out"),
    "average": ("average", "model", "other", "-o", "out"),
    "quantize int8": ("quantize", "model", "--to", "int8", "-o", "out"),
    "quantize int4": ("quantize", "model", "--to", "int4", "-o", "out"),
    "eval": ("eval", "model", "--perplexity", "docs.jsonl", "-o", "scores.json"),
}  # fmt: skip
OF_THE_OUTPUT = ("generate", "out", "--prompt", "the quick", "--max-tokens", "3", "--temperature", "0")


def prepare(directory: Path, family: str, tokenizer_files: dict[str, str]) -> None:
    """Two models of a family, and data for the commands, in `directory`, which must be the current one."""
    for seed, name in enumerate(("model", "other")):
        model_directory(directory / name, family, tokenizer_files, {"vocab_size": 320}, seed)
    Path("docs.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    rows = [[{"role": "user", "content": text[:15]}, {"role": "assistant", "content": text[-9:]}] for text in TEXTS[:4]]
    Path("chat.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    pairs = [{"prompt": text[:15], "chosen": text[-9:], "rejected": "never"} for text in TEXTS[:4]]
    Path("pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    assert run_command("tokenize", ["docs.jsonl", "-t", "model", "-o", "shards", "-q"]) == 0


def run(name: str) -> list[str]:
    """Run one of COMMANDS in the current directory, then what opens its output: generate and lineage --check. Returns
    those that failed."""
    calls = [COMMANDS[name]]
    if COMMANDS[name][-1] == "out":
        calls += [("lineage", "out", "--check"), OF_THE_OUTPUT]
    return [" ".join(call) for call in calls if run_command(call[0], [*call[1:], "-q"]) != 0]
