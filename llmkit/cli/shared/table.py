"""The subcommands, in the order of the pipeline: name, group, one-line summary. `module_of` says where each is.

Standard library only, and little of it: `llmkit --help` prints this table within a few milliseconds. Help, completions
and the dispatcher all read it. A name may have two words, `filter train` beside `filter`: the second one is taken
before an input file of that name (which is ./train), and a hyphen between them does as well.
"""

from __future__ import annotations

COMMANDS: dict[str, tuple[str, str]] = {
    "extract": ("Text", "Get the text out of web archives, HTML and PDF"),
    "filter": ("Text", "Keep the documents that pass quality rules"),
    "filter train": ("Text", "Train the classifier that filter judges quality by"),
    "dedup": ("Text", "Remove exact and near duplicates"),
    "vocab": ("Tokens", "Train a byte-level BPE tokenizer"),
    "vocab report": ("Tokens", "Measure what tokenizers make of real text"),
    "vocab advise": ("Tokens", "Recommend a vocabulary size for a model and a corpus"),
    "vocab extend": ("Tokens", "Add tokens to a tokenizer, and rows to its model"),
    "tokenize": ("Tokens", "Turn documents into token shards"),
    "mix": ("Tokens", "Combine sources by weight into training order"),
    "train": ("Training", "Pre-train a decoder from scratch"),
    "anneal": ("Training", "Continue a run while its learning rate falls to zero"),
    "average": ("Training", "Average the weights of models or checkpoints"),
    "trace": ("Training", "Show the documents of a training step, or the steps of a document"),
    "sft": ("Alignment", "Fine-tune on conversations, loss on the answers only"),
    "dpo": ("Alignment", "Align with preference pairs"),
    "quantize": ("Release", "Store weights in 8 or 4 bits"),
    "eval": ("Release", "Score models on tasks and by perplexity"),
    "generate": ("Release", "Complete prompts, or chat"),
    "lineage": ("Release", "Show how an artefact was made, check it, make it again"),
}

EXAMPLE = """\
  llmkit filter docs.jsonl.zst | llmkit dedup | llmkit tokenize -t tok/ -o shards/
  llmkit mix shards/ --tokens 10M -o mix/ && llmkit train mix/ -m tiny --tokens 10M -o run/
  llmkit generate run/ --prompt "Once upon a time"
"""


def module_of(name: str) -> str:
    """The module that holds a subcommand: the folder of its group, the file of its name."""
    group = COMMANDS[name][0].lower()
    return f"llmkit.cli.{group}.{name.replace(' ', '_')}"


def split(arguments: list[str]) -> tuple[str, list[str]]:
    """The name of the subcommand that a call begins with, known or not, and the arguments behind it."""
    two, one = " ".join(arguments[:2]), arguments[0]
    if two in COMMANDS:
        return two, arguments[2:]
    return one.replace("-", " ") if one.replace("-", " ") in COMMANDS else one, arguments[1:]


def followers(name: str) -> list[str]:
    """The second words that may follow a command: `train` after `filter`."""
    return [other.removeprefix(f"{name} ") for other in COMMANDS if other.startswith(f"{name} ")]


def overview() -> str:
    """Text of `llmkit --help`."""
    lines = ["Usage: llmkit COMMAND [OPTIONS] [ARGS]", "", "The whole language-model pipeline as composable commands."]
    group = ""
    for name, (section, summary) in COMMANDS.items():
        if section != group:
            group = section
            lines += ["", f"{group}:"]
        lines.append(f"  {name:<12} {summary}")
    lines += [
        "",
        "Options:",
        "  -h, --help     this text; llmkit COMMAND --help for one command",
        "  -V, --version  the version",
    ]
    lines += ["", "Examples:", EXAMPLE]
    return "\n".join(lines)
