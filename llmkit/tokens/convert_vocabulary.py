"""Byte-level vocabularies of other libraries as tokenizer.json.

| file | holds | besides needs |
|---|---|---|
| *.tiktoken | each token's bytes in base64 and its rank, which is its id | pattern, special tokens |
| tekken.json (Mistral) | the same, the pattern, special tokens before the ranks | |
| vocab.json, merges.txt (GPT-2) | tokens and merges | pattern, unless it is GPT-2's |

tiktoken merges the adjacent pair whose union has the lowest rank, and a word in the vocabulary becomes its id at once.
In terms of tokenizer.json: every split of a token into two others is a merge of the token's rank, with `ignore_merges`.

    llmkit vocab convert o200k_base.tiktoken --pattern llama-bpe --eos '<|endoftext|>=199999' -o tok/
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from llmkit.errors import LlmkitError, UsageError
from llmkit.tokens.pretokenize import Pattern, byte_alphabet, find_pattern, pre_tokenizer

DAMAGED = "the file is damaged, or of another kind"


def convert(file: Path, pattern: str | None, special: Sequence[str]) -> str:
    """The tokenizer.json of a vocabulary. `special` are names of tokens, or NAME=ID; without an id the next free one.

    Raises UsageError where the format needs a pattern, LlmkitError where the file is not one of the formats.
    """
    try:
        if file.name == "vocab.json":
            return _from_merges(file, pattern or "gpt-2", special)
        data = file.read_bytes()
        if data.lstrip().startswith(b"{"):
            return _from_tekken(json.loads(data), special)
        ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, data.splitlines())}
    except (ValueError, KeyError, TypeError, binascii.Error) as error:
        raise LlmkitError(f"{file}: not a vocabulary ({type(error).__name__}: {error})", DAMAGED) from None
    if pattern is None:
        raise UsageError(
            f"{file} does not say how it splits text",
            "--pattern llama-bpe for cl100k_base and Llama 3, or qwen2, gpt-2",
        )
    return _byte_level(ranks, find_pattern(pattern), special_ids(special, max(ranks.values()) + 1))


def special_ids(special: Sequence[str], first: int, known: Mapping[str, int] = MappingProxyType({})) -> dict[str, int]:
    """The ids of special tokens given as NAME or NAME=ID. Those without an id have that in `known`, or else follow the
    one before, from `first` on.
    """
    ids: dict[str, int] = {}
    for text in special:
        name, equals, number = text.rpartition("=")
        if equals and number.isdecimal():
            ids[name], first = int(number), int(number) + 1
        elif text in known:
            ids[text] = known[text]
        else:
            ids[text], first = first, first + 1
    return ids


def _from_tekken(content: dict[str, Any], special: Sequence[str]) -> str:
    config = content["config"]
    reserved = int(config["default_num_special_tokens"])
    names = {int(token["rank"]): str(token["token_str"]) for token in content.get("special_tokens") or []}
    ids = {names.get(i, f"<SPECIAL_{i}>"): i for i in range(reserved)}
    rows = content["vocab"][: int(config["default_vocab_size"]) - reserved]
    ranks = {base64.b64decode(row["token_bytes"]): int(row["rank"]) + reserved for row in rows}
    return _byte_level(
        ranks, Pattern(config["pattern"], ignore_merges=True), ids | special_ids(special, reserved + len(ranks), ids)
    )


def _from_merges(file: Path, pattern: str, special: Sequence[str]) -> str:
    vocabulary = json.loads(file.read_bytes())
    lines = (file.parent / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    return _as_json(
        vocabulary, merges, find_pattern(pattern), special_ids(special, max(vocabulary.values()) + 1, vocabulary)
    )


def _byte_level(ranks: dict[bytes, int], pattern: Pattern, special: dict[str, int]) -> str:
    alphabet = byte_alphabet()
    texts = {token: "".join(alphabet[byte] for byte in token) for token in ranks}
    merges = []
    for token, rank in ranks.items():
        splits = [(token[:i], token[i:]) for i in range(1, len(token))]
        pairs = [(a, b) for a, b in splits if a in ranks and b in ranks]
        merges += [(rank, ranks[a], ranks[b], texts[a], texts[b]) for a, b in pairs]
    ordered = [(a, b) for *_, a, b in sorted(merges)]
    vocabulary = {texts[token]: rank for token, rank in ranks.items()}
    return _as_json(vocabulary, ordered, Pattern(pattern.regex, pattern.single_digits, True), special)


def _as_json(vocabulary: dict[str, int], merges: list[Any], pattern: Pattern, special: dict[str, int]) -> str:
    from tokenizers import Tokenizer, decoders, models

    used = set(vocabulary.values())
    for name, id in special.items():
        if vocabulary.get(name, id) != id or (id in used and name not in vocabulary):
            raise UsageError(f"special token {name!r}: id {id} is taken", "give it another one: NAME=ID")
    tokenizer = Tokenizer(models.BPE(vocabulary | special, merges, ignore_merges=pattern.ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizer(pattern)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([*special])
    return str(tokenizer.to_str(pretty=True)) + "\n"
