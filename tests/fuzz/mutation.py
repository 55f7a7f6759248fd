"""Mutations of bytes and of JSON, drawn by a seed: the same seed gives the same case on every machine.

    case = mutated(seed_bytes, random.Random("7 documents 41"), others, words, views)

A *view* is a part of a file behind a checksum, a length or a compression: its content, and a function that makes the
file again around another content. So mutations reach what a checksum would hide. Ideas: AFL's havoc stage and its
dictionaries (Zalewski), and libFuzzer's structure-aware mutators.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

MOST_BYTES = 1 << 18  # of a case, unless its seed is longer
NUMBERS = (
    -1,
    0,
    1,
    2,
    7,
    127,
    128,
    255,
    256,
    32767,
    65535,
    65536,
    1 << 24,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
    1 << 32,
)
NUMBERS += (
    (1 << 53) + 1,
    (1 << 62) - 1,
    1 << 62,
    (1 << 63) - 1,
    1 << 63,
    (1 << 64) - 1,
    1 << 64,
    10**15,
    10**30,
    -(1 << 63),
)
INTEGER = re.compile(rb"\d+")
BYTES = (0, 1, 9, 10, 13, 32, 34, 39, 44, 58, 60, 91, 92, 123, 125, 127, 128, 192, 237, 239, 244, 255)
STRINGS = (
    "",
    " ",
    "\0",
    "\n",
    "a\nb",
    "..",
    "../x",
    "/",
    "/etc/passwd",
    "-",
    "--force",
    "*",
    "%s",
    "{0}",
    "{{ 7 * 7 }}",
    "$(touch x)",
    "`touch x`",
)
STRINGS += (
    "; touch x",
    "\x1b[2J",
    "\u202eabc",
    "\ud800",
    "\ufeff",
    "é" * 9,
    "\U0010ffff",
    "x" * 300,
    "x" * 5000,
    "nan",
    "NaN",
    "1e999",
    "xxh3:" + "0" * 32,
)
STRINGS += (
    "quarantine=/tmp/x",
    "rules.py:f",
    "(a+)+$",
    "(?:a{999}){999}",
    "[",
    "\\",
    "C:\\x",
    "CON",
    "http://127.0.0.1:9/x",
    "s3://x/y",
    "<|endoftext|>",
)
DEEP = "\u2620deep"  # replaced by nested brackets, which json.dumps cannot write
LONG = "x" * 200


class View(NamedTuple):
    """A part of a file: its content, whether that is JSON, and the file with another content in its place."""

    content: bytes
    is_json: bool
    rebuild: Callable[[bytes], bytes]


Views = Callable[[bytes], Iterator[View]]


def mutated(
    data: bytes, draw: random.Random, others: Sequence[bytes], words: Sequence[bytes], views: Sequence[Views]
) -> bytes:
    """`data` after one or more mutations, some of them in one of its views."""
    most = max(MOST_BYTES, len(data))
    for _ in range(min(1 + int(draw.expovariate(0.6)), 9)):
        choices = [view for find in views for view in _found(find, data)] if draw.random() < 0.75 else []
        view = draw.choice(choices) if choices else View(data, False, bytes)
        changed = _changed_json(view.content, draw, words) if view.is_json else None
        if changed is None:
            changed = _changed(view.content, draw, others, words)
        try:
            data = view.rebuild(changed)[:most]
        except Exception:  # the content does not fit any more: take it as it is
            data = changed[:most]
    return data


def _found(find: Views, data: bytes) -> list[View]:
    try:
        return [view for view in find(data) if len(view.content) <= 4 * MOST_BYTES]
    except Exception:  # a mutated file need not have this part
        return []


def _span(draw: random.Random, size: int) -> tuple[int, int]:
    start = draw.randrange(size + 1)
    return start, min(
        size, start + 1 + int(draw.expovariate(1 / max(1, min(size // 4, 1 + draw.choice((1, 4, 64, 1024))))))
    )


def _changed(data: bytes, draw: random.Random, others: Sequence[bytes], words: Sequence[bytes]) -> bytes:
    """One mutation of bytes."""
    start, stop = _span(draw, len(data))
    before, part, after = data[:start], data[start:stop], data[stop:]
    match draw.randrange(14):
        case 0 if part:
            return before + bytes([part[0] ^ 1 << draw.randrange(8)]) + part[1:] + after
        case 1:
            return before + bytes([draw.choice(BYTES)]) + data[start + 1 :]
        case 2:
            return before + draw.randbytes(len(part)) + after
        case 3:
            return before + after
        case 4:
            return before + part * draw.choice((2, 3, 9, 100, 5000)) + after
        case 5:  # a number in text
            matches = list(INTEGER.finditer(data))
            if matches:
                match = draw.choice(matches)
                number = int(match[0][:30]) + draw.choice((-1, 1)) if draw.random() < 0.3 else draw.choice(NUMBERS)
                return data[: match.start()] + str(number).encode() + data[match.end() :]
        case 6:  # a number in binary
            width, order = draw.choice((1, 2, 4, 8)), draw.choice(("little", "big"))
            if start + width <= len(data):
                old = int.from_bytes(data[start : start + width], order)
                new = draw.choice((*NUMBERS, old + 1, old - 1, old * 2, old // 2, old + 8)) % (1 << 8 * width)
                return before + new.to_bytes(width, order) + data[start + width :]
        case 7 if words:
            return before + draw.choice(words) + (after if draw.random() < 0.5 else part + after)
        case 8:
            return before + draw.choice(STRINGS).encode("utf-8", "surrogatepass") + after
        case 9:  # lines
            lines = data.splitlines(keepends=True)
            if len(lines) > 1:
                i, j = draw.randrange(len(lines)), draw.randrange(len(lines))
                lines[i] = draw.choice((b"", lines[j], lines[i] * 2, lines[i] + lines[j], lines[i].rstrip()))
                return b"".join(lines)
        case 10:
            other = draw.choice(others)
            begin, end = _span(draw, len(other))
            return before + other[begin:end] + after
        case 11:
            return before
        case 12:
            other = draw.choice(others)
            return before + other[draw.randrange(len(other) + 1) :]
        case 13 if draw.random() < 0.3:  # deep nesting
            opening = draw.choice((b"[", b"{", b"(", b"<div>", b'{"a":', b"((?:", b"{% if 1 %}", b"<<", *words[:4]))
            return before + opening * draw.choice((60, 300, 3000, 20000)) + after
    return before + bytes(len(part)) + after


def _changed_json(data: bytes, draw: random.Random, words: Sequence[bytes]) -> bytes | None:
    """One mutation of a JSON document; None where it is none."""
    try:
        tree = [json.loads(data)]
    except (ValueError, RecursionError):
        return None
    places: list[tuple[Any, Any]] = []
    stack: list[Any] = [tree]
    while stack and len(places) < 20_000:
        node = stack.pop()
        for key in node if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                stack.append(node[key])
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        node, key = draw.choice(places)
        other, other_key = draw.choice(places)
        try:
            _change_place(node, key, other[other_key], draw, words)
        except (KeyError, IndexError, ValueError, RecursionError):
            continue  # removed by the change before, or contains itself since then
    try:
        text = json.dumps(tree[0], ensure_ascii=draw.random() < 0.5, separators=(",", ":")) if tree else ""
    except (ValueError, RecursionError):  # it contains itself
        return None
    if DEEP in text or json.dumps(DEEP)[1:-1] in text:
        depth, (left, right) = draw.choice((90, 300, 1100, 30_000)), draw.choice((("[", "]"), ('{"a":', "}")))
        for name in (f'"{DEEP}"', json.dumps(DEEP)):
            text = text.replace(name, f"{left * depth}0{right * depth}", 1)
    return text.encode("utf-8", "surrogatepass")


def _change_place(node: Any, key: Any, other: Any, draw: random.Random, words: Sequence[bytes]) -> None:
    value = node[key]
    match draw.randrange(12):
        case 0:
            node[key] = draw.choice((None, True, False, [], {}, 0.5, float("inf"), float("nan"), 1e308, -0.0))
        case 1:
            node[key] = draw.choice(NUMBERS)
        case 2:
            node[key] = draw.choice(STRINGS)
        case 3:
            del node[key]
        case 4:
            node[key] = json.loads(json.dumps(other))
        case 5:
            node[key] = draw.choice(([value], {"a": value}, [value, value], str(value), [value] * 300))
        case 6 if isinstance(node, dict):
            node[draw.choice((*STRINGS, *(word.decode("latin-1") for word in words)))] = node.pop(key)
        case 7 if isinstance(value, str) and value:
            start, stop = _span(draw, len(value))
            node[key] = value[:start] + draw.choice((*STRINGS, value[start:stop] * 50, value)) + value[stop:]
        case 8 if type(value) in (int, float):
            node[key] = draw.choice((value + 1, value - 1, -value, value * 2, value * 1000, value / 2, str(value)))
        case 9 if isinstance(value, list):
            node[key] = draw.choice((value[::-1], value * 2, value[:1], value[1:], [*value, other], value * 40))
        case 10 if words:
            node[key] = draw.choice(words).decode("latin-1")
        case _:
            node[key] = DEEP if draw.random() < 0.3 else draw.choice((LONG, "0", -1, [[]], {"": None}))
