"""Control tokens come from templates only: `<|im_end|>` in a row is text, and ends no turn.

    (messages, tools), marker = hide((messages, tools), files)        # nothing is copied where there is nothing to hide
    text = render(messages, files, True, tools)
    encoded = encode(text, files, marker)                             # ids, and where in `text` each token starts

The names of control tokens in a row are replaced by markers before the template sees them. The rendered text is then
encoded in one piece, but for where it is cut, so that its tokens are those of inference: by the tokenizer itself, or
where there is a marker, by a copy of it in which control tokens have other names.

A tokenizer's own beginning (its BOS token) is in front of every sequence exactly once, whether the template writes it
or not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import orjson

from llmkit.chat.messages import RowError
from llmkit.chat.templates import special_contents, tokenizer_of
from llmkit.tokens.tokenizer_json import LoadedTokenizer, load

Value = TypeVar("Value")
Files = Mapping[str, str]

BYTE = re.compile("<0x[0-9A-F]{2}>")
NONCHARACTERS = tuple(map(chr, range(0xFDD0, 0xFDF0)))  # which Unicode reserves for uses like this


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids, and the character of the text at which each starts, int64 [n]; -1 for the tokenizer's beginning."""

    ids: list[int]
    starts: np.ndarray


def hide(value: Value, files: Files) -> tuple[Value, str]:
    """`value` with markers for the names of control tokens in its strings, at any depth, and the character that
    begins and ends a marker; the value itself and "" if there are none."""
    names = _names(files)
    pattern = _pattern(names)
    strings = [string for string in _strings(value) if pattern.search(string)] if names else []
    if not strings:
        return value, ""
    marker = _unused("".join(_strings(value)))
    markers = {name: _renamed(number, marker) for number, name in enumerate(names)}

    def hidden(part: Any) -> Any:
        if isinstance(part, str):
            return pattern.sub(lambda match: markers[match[0]], part)
        if isinstance(part, Mapping):
            return {hidden(key): hidden(item) for key, item in part.items()}
        if isinstance(part, (list, tuple)):
            return type(part)(hidden(item) for item in part)
        return part

    return hidden(value), marker


def encode(text: str, files: Files, marker: str = "", cuts: Sequence[int] = ()) -> Encoded:
    """Ids of a rendered text with the markers of `hide`, which are encoded as the text that they stand for.

    A token that lies across one of the characters `cuts`, ascending, is taken apart there, as where a prompt ends and
    its answer begins, if the tokenizer can encode the rest of a text without its beginning.
    """
    encoded = _encode(text, files, marker, cuts)
    beginning = beginning_of(files)
    if beginning and tuple(encoded.ids[: len(beginning)]) != beginning:
        starts = np.concatenate([np.full(len(beginning), -1, np.int64), encoded.starts])
        return Encoded([*beginning, *encoded.ids], starts)
    return encoded


def _encode(text: str, files: Files, marker: str, cuts: Sequence[int] = ()) -> Encoded:
    whole = _encode_marked(text, files, marker) if marker else _encode_plain(text, files)
    for number, cut in reversed([*enumerate(cuts)]):
        if 0 < cut < len(text) and cut not in whole.starts:
            parted = _parted(whole, _encode(text[:cut], files, marker, cuts[:number]), text[cut:], cut, files, marker)
            if parted is not None:
                return parted
    return whole


def _encode_plain(text: str, files: Files) -> Encoded:
    encoding = tokenizer_of(files).encode(text, add_special_tokens=False)
    return Encoded(list(encoding.ids), _starts(encoding))


def _parted(whole: Encoded, first: Encoded, rest: str, cut: int, files: Files, marker: str) -> Encoded | None:
    """`first`, and the `rest` of the text from `cut` on; None where that would be another text."""
    decode = tokenizer_of(files).decode
    for before in ("", "\n"):  # some tokenizers put a space in front of a text, but not behind a line
        encoded = _encode(before + rest, files, marker)
        own = int(np.searchsorted(encoded.starts, len(before)))
        ids = [*first.ids, *encoded.ids[own:]]
        starts_there = own < len(encoded.ids) and encoded.starts[own] == len(before)
        if starts_there and decode(ids, skip_special_tokens=False) == decode(whole.ids, skip_special_tokens=False):
            return Encoded(ids, np.concatenate([first.starts, encoded.starts[own:] - len(before) + cut]))
    return None


def marker_in(text: str) -> str:
    """The character of the markers in a text that holds some; "" if it holds none."""
    match = re.search(f"([{NONCHARACTERS[0]}-{NONCHARACTERS[-1]}])\\d+\\1", text)
    return match[1] if match else ""


def beginning_of(files: Files) -> tuple[int, ...]:
    """The ids that the tokenizer puts in front of a text, usually none or a BOS token."""
    return _beginning(files.get("tokenizer.json", ""), tokenizer_of(files))


@lru_cache(maxsize=8)
def _beginning(tokenizer_json: str, tokenizer: LoadedTokenizer) -> tuple[int, ...]:
    bare, whole = (list(tokenizer.encode("a", add_special_tokens=special).ids) for special in (False, True))
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return tuple(whole[:start])
    return ()


def _encode_marked(text: str, files: Files, marker: str) -> Encoded:
    names = _names(files)
    renaming = _unused(text)
    new = {name: _renamed(number, renaming) for number, name in enumerate(names)}
    for number, name in enumerate(names):
        for character in (marker, marker.encode("ascii", "backslashreplace").decode()):  # as it is, and as JSON has it
            new[_renamed(number, character)] = name
    pieces, written, at, length = [], [], 0, 0
    borders: list[tuple[int, int, bool]] = []  # in the final text, in `text`, and whether what follows was replaced
    for match in _pattern(tuple(sorted(new, key=len, reverse=True))).finditer(text):
        written += [match[0]] if match[0] in names else []
        for piece, start, replaced in ((text[at : match.start()], at, False), (new[match[0]], match.start(), True)):
            borders.append((length, start, replaced))
            pieces.append(piece)
            length += len(piece)
        at = match.end()
    borders.append((length, at, False))
    contents = special_contents(files)
    copy = _copy(files.get("tokenizer.json", ""), tuple((name, contents[name]) for name in names), renaming)
    encoding = copy.tokenizer.encode("".join(pieces) + text[at:], add_special_tokens=False)
    ids = [copy.ids.get(i, i) for i in encoding.ids]
    controls = set(contents.values()) - copy.text_ids
    if sum(map(controls.__contains__, ids)) != sum(contents[name] in controls for name in written):
        raise RowError("the tokenizer makes control tokens of plain text")
    final, original, is_replaced = (np.array(column) for column in zip(*borders, strict=True))
    starts = _starts(encoding)
    border = np.searchsorted(final, starts, side="right") - 1
    return Encoded(ids, original[border] + np.where(is_replaced[border], 0, starts - final[border]))


def _starts(encoding: Any) -> np.ndarray:
    return np.fromiter((start for start, _ in encoding.offsets), dtype=np.int64, count=len(encoding.ids))


def _names(files: Files) -> tuple[str, ...]:
    """The control tokens, long ones first, as the tokenizer prefers them."""
    return tuple(sorted(filter(None, special_contents(files)), key=len, reverse=True))


@lru_cache(maxsize=8)
def _pattern(names: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, names)))


def _strings(value: Any) -> list[str]:
    found, rest = [], [value]
    while rest:
        part = rest.pop()
        if isinstance(part, str):
            found.append(part)
        elif isinstance(part, Mapping):
            rest += part
            rest += part.values()
        elif isinstance(part, (list, tuple)):
            rest += part
    return found


def _unused(text: str) -> str:
    for character in NONCHARACTERS:
        if character not in text:
            return character
    raise RowError("it holds every noncharacter of Unicode, U+FDD0 to U+FDEF")


def _renamed(number: int, character: str) -> str:
    return f"{character}{number}{character}"


@dataclass(frozen=True, slots=True)
class _Copy:
    """A tokenizer with other names for its control tokens, and the ids of those that have another one in it."""

    tokenizer: LoadedTokenizer
    ids: dict[int, int]
    text_ids: frozenset[int]  # of control tokens that text may have: of what is unknown, and of bytes


@lru_cache(maxsize=2)
def _copy(tokenizer_json: str, controls: tuple[tuple[str, int], ...], character: str) -> _Copy:
    content = orjson.loads(tokenizer_json)
    new = {name: _renamed(number, character) for number, (name, _) in enumerate(controls)}
    for token in content["added_tokens"]:
        token["content"] = new.get(token["content"], token["content"])
    model = content["model"]
    # What merges make, and bytes, have to keep their names.
    made = {
        "".join(merge) if isinstance(merge, list) else merge.replace(" ", "") for merge in model.get("merges") or ()
    }
    kept = made | {name for name, _ in controls if BYTE.fullmatch(name)}
    moved = {name: other for name, other in new.items() if name not in kept}
    if isinstance(model["vocab"], dict):
        model["vocab"] = {moved.get(name, name): i for name, i in model["vocab"].items()}
    else:
        model["vocab"] = [[moved.get(piece[0], piece[0]), *piece[1:]] for piece in model["vocab"]]
    unknown = model.get("unk_token")
    model |= {"unk_token": moved[unknown]} if unknown in moved else {}
    tokenizer = load(orjson.dumps(content).decode(), "the model: tokenizer.json is not readable", "the file is damaged")
    ids = {tokenizer.token_to_id(new[name]): i for name, i in controls}
    text = {i for name, i in controls if name == unknown or i == model.get("unk_id") or BYTE.fullmatch(name)}
    return _Copy(tokenizer, {copied: i for copied, i in ids.items() if copied != i}, frozenset(text))
