"""The table of subcommands, in the order of the pipeline: name, group, one-line summary.

Help, completions and the dispatcher all read it. It uses the standard library alone, so that `llmkit --help` prints it
within a few milliseconds. A name may have two words: `filter train` beside `filter`. The second word takes precedence
over an input file of that name (written ./train), and the words may be joined by a hyphen.
"""

from __future__ import annotations

COMMANDS: dict[str, tuple[str, str]] = {
    "extract": ("Text", "Extract text from web archives, HTML and PDF"),
    "filter": ("Text", "Keep the documents that pass quality rules"),
    "filter train": ("Text", "Train the quality classifier of filter"),
    "dedup": ("Text", "Remove exact and near duplicates"),
    "vocab": ("Tokens", "Train a byte-level BPE tokenizer"),
    "vocab report": ("Tokens", "Compare tokenizers on real text"),
    "vocab advise": ("Tokens", "Recommend a vocabulary size for a model and a corpus"),
    "vocab extend": ("Tokens", "Add tokens to a tokenizer, and embeddings to its model"),
    "vocab convert": ("Tokens", "Convert a vocabulary of tiktoken, Mistral or GPT-2"),
    "tokenize": ("Tokens", "Encode documents as token shards"),
    "mix": ("Tokens", "Combine sources by weight into training order"),
    "train": ("Training", "Pre-train a decoder"),
    "anneal": ("Training", "Continue a run while its learning rate decays to zero"),
    "average": ("Training", "Average the weights of models or checkpoints"),
    "trace": ("Training", "Show the documents of a training step, or the steps of a document"),
    "sft": ("Alignment", "Fine-tune on conversations, with loss on the answers only"),
    "dpo": ("Alignment", "Align with preference pairs"),
    "quantize": ("Release", "Store weights in 8 or 4 bits"),
    "eval": ("Release", "Score models on tasks and by perplexity"),
    "generate": ("Release", "Complete prompts, or chat"),
    "lineage": ("Release", "Show how an artefact was made, verify it, reproduce it"),
}

EXAMPLE = """\
  llmkit filter docs.jsonl.zst | llmkit dedup | llmkit tokenize -t tok/ -o shards/
  llmkit mix shards/ --tokens 10M -o mix/ && llmkit train mix/ -m tiny --tokens 10M -o run/
  llmkit generate run/ --prompt "Once upon a time"
"""


def module_of(name: str) -> str:
    """The module of a subcommand: its group is the folder, its name the file."""
    group = COMMANDS[name][0].lower()
    return f"llmkit.cli.{group}.{name.replace(' ', '_')}"


def split(arguments: list[str]) -> tuple[str, list[str]]:
    """Split a call into the name of the subcommand, known or not, and its arguments."""
    two_words, word = " ".join(arguments[:2]), arguments[0]
    if two_words in COMMANDS:
        return two_words, arguments[2:]
    return word.replace("-", " ") if word.replace("-", " ") in COMMANDS else word, arguments[1:]


def subcommands(name: str) -> list[str]:
    """The second words of the commands that begin with `name`: `train` for `filter`."""
    return [other.removeprefix(f"{name} ") for other in COMMANDS if other.startswith(f"{name} ")]


def overview() -> str:
    """Text of `llmkit --help`."""
    lines = ["Usage: llmkit COMMAND [OPTIONS] [ARGS]", "", "The whole language-model pipeline as composable commands."]
    group = ""
    for name, (section, summary) in COMMANDS.items():
        if section != group:
            group = section
            lines += ["", f"{group}:"]
        lines.append(f"  {name:<13} {summary}")
    lines += [
        "",
        "Options:",
        "  -h, --help     Show this help; llmkit COMMAND --help describes a command",
        "  -V, --version  Print the version",
    ]
    lines += ["", "Examples:", EXAMPLE]
    return "\n".join(lines)
