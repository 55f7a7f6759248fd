"""Vocabularies in formats other than tokenizer.json: which one a file is, and how to convert it.

    name_format(Path("cl100k_base.tiktoken"))    # ("ranks of tiktoken", "llmkit vocab convert ...")

`llmkit vocab convert` reads those that state how to encode with them (tokens/convert_vocabulary.py).
"""

from __future__ import annotations

import re
from pathlib import Path

RANKS = re.compile(rb"[A-Za-z0-9+/]+={0,2} [0-9]+\r?\n")
SENTENCEPIECE = re.compile(rb"\n.\n", re.DOTALL)  # the first piece, in protocol buffers
HEAD = 1 << 16
SPM_HINT = (
    "pip install transformers sentencepiece protobuf; then in Python: "
    "transformers.AutoTokenizer.from_pretrained(MODEL_DIRECTORY).save_pretrained('tok/')"
)


def convertible_file(path: Path) -> Path | None:
    """The file that `llmkit vocab convert` reads for a file or directory; None where there is none."""
    if path.is_file():
        return path if name_format(path) and "vocab convert" in name_format(path)[1] else None  # type: ignore[index]
    found = [path / "tekken.json", *sorted(path.glob("*.tiktoken")), path / "vocab.json", path / "tokenizer.model"]
    return next((file for file in found if file.is_file() and convertible_file(file)), None)


def name_format(path: Path) -> tuple[str, str] | None:
    """The format of a vocabulary, file or directory, and the way to convert it; None where it is not a known one."""
    if path.is_dir():
        files = [*sorted(path.glob("*.json")), *sorted(path.glob("*.tiktoken")), *sorted(path.glob("*.model"))]
        return next((named for file in files if file.is_file() and (named := name_format(file))), None)
    try:
        with open(path, "rb") as file:
            head = file.read(HEAD)
    except OSError:
        return None
    if RANKS.match(head) or path.suffix == ".tiktoken":
        return "the ranks of a tiktoken vocabulary", f"llmkit vocab convert {path} --pattern NAME --eos NAME -o tok/"
    if b'"token_bytes"' in head or path.name == "tekken.json":
        return "a tekken vocabulary", f"llmkit vocab convert {path} -o tok/"
    if SENTENCEPIECE.match(head):
        return "a SentencePiece model", SPM_HINT
    pair = path.parent / "vocab.json", path.parent / "merges.txt"
    if path in pair and all(file.is_file() for file in pair):
        return "a vocabulary in vocab.json and merges.txt", f"llmkit vocab convert {path.parent} -o tok/"
    return None
