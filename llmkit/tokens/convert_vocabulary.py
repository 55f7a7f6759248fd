"""Byte-level vocabularies of other libraries as tokenizer.json.

| file | holds | besides needs |
|---|---|---|
| *.tiktoken | each token's bytes in base64 and its rank, which is its id | pattern, special tokens |
| tekken.json (Mistral) | the same, the pattern, special tokens before the ranks | |
| vocab.json, merges.txt (GPT-2) | tokens and merges | pattern, unless it is GPT-2's |

tiktoken merges the adjacent pair whose union has the lowest rank, and a word in the vocabulary becomes its id at once.
In terms of tokenizer.json: every split of a token into two others is a merge of the token's rank, with `ignore_merges`.

Memory: about twenty times the file, and seven times the text of the merges. A token of n bytes has up to n - 1 splits,
so that text grows with the cube of the longest run of one character in the vocabulary; over 64 Mi characters are
refused.

    llmkit vocab convert o200k_base.tiktoken --pattern llama-bpe --eos '<|endoftext|>=199999' -o tok/
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from types import MappingProxyType
from typing import Any

from llmkit.errors import LlmkitError, UsageError
from llmkit.shards.tokenizer_info import MAX_ID
from llmkit.tokens.pretokenize import Pattern, byte_alphabet, find_pattern, pre_tokenizer

DAMAGED = "the file is damaged, or of another kind"
MAX_FILE = 64 << 20  # bytes; the largest vocabularies in use have 10 MB
MAX_TOKEN = 1 << 10  # bytes; finding the merges of a token takes time quadratic in its length
MAX_MERGES = 64 << 20  # characters of all merges; the largest vocabularies in use have 5 million
MAX_SPECIAL = 1 << 16  # tokens that a tekken file reserves
EXCERPT = 40  # characters of a token in a message
LOST = "texts would lose them; " + DAMAGED


def convert(file: Path, pattern: str | None, special: Sequence[str]) -> str:
    """The tokenizer.json of a vocabulary. `special` are names of tokens, or NAME=ID; without an id the next free one.

    Raises UsageError where the format needs a pattern, LlmkitError where the file is not one of the formats, or
    damaged: every token and id occurs once, ids have no gaps that special tokens do not fill, and each byte is a token.
    """
    try:
        data = _read(file)
        if file.name == "vocab.json":
            return _from_merges(file, data, pattern or "gpt-2", special)
        if data.lstrip().startswith(b"{"):
            return _from_tekken(file, json.loads(data), special)
    except KeyError as error:
        raise LlmkitError(f"{file}: not a vocabulary (no field {error})", DAMAGED) from None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {_first_line(error)}"
        raise LlmkitError(f"{file}: not a vocabulary ({reason})", DAMAGED) from None
    ranks = _from_lines(file, data)
    if pattern is None:
        raise UsageError(
            f"{file} does not say how it splits text",
            "--pattern llama-bpe for cl100k_base and Llama 3, or qwen2, gpt-2",
        )
    return _byte_level(file, ranks, find_pattern(pattern), special_ids(special, max(ranks.values()) + 1))


class _Ids(dict[Any, int]):
    """Ids by token. Raises LlmkitError, which names the place, for a token or id that is invalid or already there."""

    def __init__(self) -> None:
        super().__init__()
        self._taken: dict[int, str] = {}

    def enter(self, token: bytes | str, id: Any, place: str) -> None:
        problem = ""
        if not 0 < len(token) <= MAX_TOKEN:
            problem = f"a token of {len(token):,} bytes (1 to {MAX_TOKEN:,} are possible)"
        elif type(id) is not int or not 0 <= id < MAX_ID:
            problem = f"{str(id)[:20]} is not an id (0 to {MAX_ID - 1:,})"
        elif token in self:
            problem = f"a token that is already at {self._taken[self[token]]}"
        elif id in self._taken:
            problem = f"id {id}, which is already at {self._taken[id]}"
        if problem:
            raise LlmkitError(f"{place}: {problem}", DAMAGED)
        self[token] = id
        self._taken[id] = place.rpartition("/")[2]


def _read(file: Path) -> bytes:
    try:
        if file.stat().st_size > MAX_FILE:
            raise LlmkitError(f"{file}: over {MAX_FILE >> 20} MiB, too large for a vocabulary", "check the path")
        return file.read_bytes()
    except OSError as error:
        raise LlmkitError(f"{file}: {error.strerror}", "check the path and its permissions") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:200]


def _from_lines(file: Path, data: bytes) -> _Ids:
    """The ids of a .tiktoken file."""
    ids = _Ids()
    for number, line in enumerate(io.BytesIO(data), 1):
        place, fields = f"{file}:{number}", line.split()
        if fields and (len(fields) != 2 or not fields[1].removeprefix(b"-").isdigit()):
            raise LlmkitError(f"{place}: not a token in base64 and its rank", DAMAGED)
        if fields:
            rank = int(fields[1]) if len(fields[1]) < 20 else fields[1].decode()
            ids.enter(_from_base64(fields[0], place), rank, place)
    if not ids:
        raise LlmkitError(f"{file}: empty file", DAMAGED)
    return ids


def _from_base64(text: str | bytes, place: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise LlmkitError(f"{place}: invalid base64 ({_first_line(error)})", DAMAGED) from None


def special_ids(special: Sequence[str], first: int, known: Mapping[str, int] = MappingProxyType({})) -> dict[str, int]:
    """The ids of special tokens given as NAME or NAME=ID. Those without an id have that in `known`, or else follow the
    one before, from `first` on.
    """
    ids: dict[str, int] = {}
    for text in special:
        name, equals, number = text.rpartition("=")
        has_id = bool(equals) and number.isdecimal()
        name, named = name if has_id else text, f"special token {text[:EXCERPT]!r}"
        if not name:
            raise UsageError(f"{named}: no name", "give NAME or NAME=ID")
        if has_id:
            id = int(number) if len(number) < 20 else MAX_ID
        else:
            id = ids.get(name, known.get(name, first))
        if id >= MAX_ID:
            raise UsageError(f"{named}: the id is too large", f"at most {MAX_ID - 1:,}")
        if ids.get(name, id) != id:
            raise UsageError(f"{named}: it already has the id {ids[name]}", "give each token one id")
        if has_id or id == first:
            first = id + 1
        ids[name] = id
    return ids


def _from_tekken(file: Path, content: dict[str, Any], special: Sequence[str]) -> str:
    config = content["config"]
    reserved, size = int(config["default_num_special_tokens"]), int(config["default_vocab_size"])
    if not 0 <= reserved <= min(size, MAX_SPECIAL):
        raise LlmkitError(f"{file}: {reserved} special tokens in a vocabulary of {size}", DAMAGED)
    names = _Ids()
    for number, token in enumerate(content.get("special_tokens") or []):
        names.enter(str(token["token_str"]), token["rank"], f"{file}: special_tokens[{number}]")
        if token["rank"] >= reserved:
            raise LlmkitError(f"{file}: special_tokens[{number}]: rank {token['rank']} of {reserved}", DAMAGED)
    by_rank = {rank: name for name, rank in names.items()}
    special_names = {by_rank.get(i, f"<SPECIAL_{i}>"): i for i in range(reserved)}
    if len(special_names) < reserved:
        raise LlmkitError(f"{file}: a special token has the name of one without a name, <SPECIAL_...>", DAMAGED)
    ranks = _Ids()
    for number, row in enumerate(content["vocab"][: size - reserved]):
        place, rank = f"{file}: vocab[{number}]", row["rank"]
        token = _from_base64(row["token_bytes"], place)
        ranks.enter(token, rank + reserved if type(rank) is int and rank >= 0 else rank, place)
    given = special_ids(special, reserved + len(ranks), special_names)
    return _byte_level(file, ranks, Pattern(config["pattern"], ignore_merges=True), special_names | given)


def _from_merges(file: Path, data: bytes, pattern: str, special: Sequence[str]) -> str:
    vocabulary = _Ids()
    for token, id in json.loads(data, object_pairs_hook=list):
        vocabulary.enter(token, id, f"{file}: {token[:EXCERPT]!r}")
    path, merges = file.parent / "merges.txt", []
    for number, line in enumerate(io.BytesIO(_read(path)), 1):
        parts = line.decode().rstrip("\r\n").split(" ")
        if line.startswith(b"#version") or parts == [""]:
            continue
        if len(parts) != 2 or not all(part in vocabulary for part in [*parts, "".join(parts)]):
            raise LlmkitError(f"{path}:{number}: not a merge of two tokens into a third of {file.name}", DAMAGED)
        merges.append(tuple(parts))
    ids = special_ids(special, max(vocabulary.values(), default=-1) + 1, vocabulary)
    return _as_json(file, vocabulary, merges, find_pattern(pattern), ids)


def _byte_level(file: Path, ranks: _Ids, pattern: Pattern, special: dict[str, int]) -> str:
    alphabet = byte_alphabet()
    texts = {token: "".join(alphabet[byte] for byte in token) for token in ranks}
    merges, size = [], 0
    for token, rank in ranks.items():
        splits = ((token[:i], token[i:]) for i in range(1, len(token)))
        pairs = [(rank, ranks[a], ranks[b], texts[a], texts[b]) for a, b in splits if a in ranks and b in ranks]
        merges += pairs
        size += len(pairs) * len(token)
        if size > MAX_MERGES:
            raise LlmkitError(
                f"{file}: too many ways to merge its tokens ({MAX_MERGES >> 20} MiB of merges)",
                "long runs of one character are not tokens of vocabularies in use; " + DAMAGED,
            )
    ordered = [(a, b) for *_, a, b in sorted(merges)]
    vocabulary = {texts[token]: rank for token, rank in ranks.items()}
    return _as_json(file, vocabulary, ordered, Pattern(pattern.regex, pattern.single_digits, True), special)


def _as_json(
    file: Path, vocabulary: dict[str, int], merges: list[Any], pattern: Pattern, special: dict[str, int]
) -> str:
    from tokenizers import Tokenizer, decoders, models

    used = set(vocabulary.values())
    taken = set(used)
    for name, id in special.items():
        if vocabulary.get(name, id) != id or (id in taken and name not in vocabulary):
            raise UsageError(f"special token {name!r}: id {id} is taken", "give it another one: NAME=ID")
        taken.add(id)
    missing = [byte for byte, symbol in enumerate(byte_alphabet()) if symbol not in vocabulary]
    if missing:
        named = ", ".join(f"0x{byte:02x}" for byte in missing[:4]) + ", ..." * (len(missing) > 4)
        raise LlmkitError(f"{file}: no token for {len(missing)} of the 256 bytes ({named})", LOST)
    used |= {id for id in special.values() if id < max(used)}
    gaps = max(used) + 1 - len(used)
    if gaps:
        first = next(id for id in count() if id not in used)
        raise LlmkitError(
            f"{file}: no token with id {first}" + (f", and {gaps - 1:,} other gaps" if gaps > 1 else ""),
            "name the special tokens that have them: --special NAME=ID; or the file is damaged",
        )
    try:
        tokenizer = Tokenizer(models.BPE(vocabulary | special, merges, ignore_merges=pattern.ignore_merges))
        tokenizer.pre_tokenizer = pre_tokenizer(pattern)
    except Exception as error:  # the library raises no other class
        raise LlmkitError(f"{file}: not a vocabulary ({_first_line(error)})", DAMAGED) from None
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([*special])
    return str(tokenizer.to_str(pretty=True)) + "\n"
