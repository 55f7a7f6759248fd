"""Set fields of a JSON object in its own bytes: whatever is not set keeps its spelling.

    splice(b'{"n": 1e400, "text": "a"}\\n', {"text": "b", "kept": True})
    # b'{"n": 1e400, "text": "b","kept":true}\\n'

A parser and a writer would change what they cannot hold: integers beyond 64 bits, 1.10, repeated keys, "\\u00e9",
nesting that orjson reads (1,024 levels) but does not write (254). The line must be valid JSON. Cost: one search for
a field that is appended; otherwise about as much as parsing the line and writing it again, since a string or container
is skipped by comparing it with what orjson would write, and only unusual spellings are scanned by regular expressions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from typing import Any

import orjson

_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_KEY = re.compile(rb"[\s,{]*+(" + _STRING + rb")\s*+:\s*+", re.DOTALL)
_SCALAR = re.compile(_STRING + rb"|[^\s,\]}]++", re.DOTALL)
_NESTING = re.compile(_STRING + rb"|([\[{])|([\]}])", re.DOTALL)
MAX_DIGITS = 4000  # Python converts no longer ones by default
_BIG_INTEGER = re.compile(rb"\d{19}")
_MAY_ROUND = re.compile(rb"[\d.]{17}|[eE]-\d{3}")
FLOAT_DIGITS = 17  # what identifies a float; programs print no more of one


def splice(line: bytes, changes: Mapping[str, Any], old: Mapping[str, Any] | None = None) -> bytes:
    """The line with fields set: every occurrence of a name gets the new value, new fields come last.

    `old` holds the fields as orjson parsed them from the line, if the caller has them. Raises TypeError for a value
    that JSON cannot hold.
    """
    encoded = {name: orjson.dumps(value) for name, value in changes.items()}
    quoted = {name: orjson.dumps(name) for name in encoded}
    parts: list[bytes] = []
    missing, end = dict(encoded), 0
    if any(name in old for name in encoded) if old is not None else _may_have(line, quoted.values()):
        for name, start, stop in _members(line, old):
            if name in encoded:
                parts += line[end:start], encoded[name]
                end = stop
                missing.pop(name, None)
    brace = line.rindex(b"}")
    parts.append(line[end:brace])
    if missing:
        first = not parts[0].strip(b" \t\r\n{")
        fields = b",".join(quoted[name] + b":" + value for name, value in missing.items())
        parts.append(fields if first else b"," + fields)
    return b"".join(parts) + line[brace:]


def _may_have(line: bytes, quoted: Iterable[bytes]) -> bool:
    """Whether a line may have one of some fields, whose names may be spelled with escapes."""
    return any(name in line for name in quoted) or b"\\u" in line


def raw_values(line: bytes, old: Mapping[str, Any] | None = None) -> dict[str, bytes]:
    """The fields of a line by name, each as its bytes in the line; of a repeated name, the last."""
    return {name: line[start:stop] for name, start, stop in _members(line, old)}


def parse_fields(line: bytes) -> dict[str, Any]:
    """The fields of a line that is a JSON object."""
    try:
        fields: dict[str, Any] = orjson.loads(line)
    except orjson.JSONDecodeError:  # a number that is infinite as a float
        fields = exact_fields(line)
    return fields


def exact_fields(line: bytes) -> dict[str, Any]:
    """The fields of a line with exact integers and numbers of any size; orjson turns integers beyond 64 bits into
    floats, and refuses what no float can hold. An integer of over 4,000 digits becomes a string of its digits.

    Raises ValueError for a line that is not JSON.
    """
    fields: dict[str, Any] = json.loads(line, parse_int=_integer, parse_constant=_refuse)
    return fields


def _integer(digits: str) -> int | str:
    return int(digits) if len(digits) < MAX_DIGITS else digits


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def exact_json(value: Any, *, sort_keys: bool = False) -> bytes:
    """A value from `exact_fields` as JSON; with sorted keys, equal values give equal bytes."""
    try:
        return orjson.dumps(value, option=orjson.OPT_SORT_KEYS if sort_keys else None)
    except TypeError:  # an integer beyond 64 bits, or nested too deeply for orjson
        return json.dumps(value, sort_keys=sort_keys, separators=(",", ":"), ensure_ascii=False).encode()


def may_hold_big_integer(line: bytes) -> bool:
    """Whether a line has digits enough for an integer beyond 64 bits."""
    return _BIG_INTEGER.search(line) is not None


def dotted(fields: Mapping[str, Any], path: str) -> Any:
    """The value at a path such as "metadata.lang", or of a field whose name contains the dot; None if it is missing."""
    if path in fields or "." not in path:
        return fields.get(path)
    value: Any = fields
    for name in path.split("."):
        if not isinstance(value, Mapping) or name not in value:
            return None
        value = value[name]
    return value


def has_big_number(fields: dict[str, Any]) -> bool:
    """Whether a number may be an integer that orjson turned into a float."""
    nested: list[dict[str, Any]] = [fields]
    while nested:
        for value in nested.pop().values():
            if type(value) is float and abs(value) >= 1 << 63:
                return True
            if type(value) is dict:
                nested.append(value)
    return False


def beyond_floats(line: bytes) -> Any:
    """A line with numbers that are infinite as floats, such as 1e400; None where it is not JSON."""
    try:
        return exact_fields(line)
    except (ValueError, RecursionError):
        return None


def rounded_field(line: bytes) -> str:
    """The first field with a number, not written as an integer, that a float does not hold; "" where there is none."""
    if _MAY_ROUND.search(line) is None:
        return ""
    rounded: list[str] = []

    def check(text: str) -> float:
        number, value = Decimal(text), float(text)
        if number != Decimal(value) and number != Decimal(repr(value)):
            digits = "".join(map(str, number.as_tuple().digits)).strip("0")
            if len(digits) > FLOAT_DIGITS or not value or number == number.to_integral_value():
                rounded.append(text)
        return value

    for name, raw in raw_values(line).items():
        if not raw.startswith(b'"') and _MAY_ROUND.search(raw):
            json.loads(raw, parse_float=check, parse_int=_integer)
            if rounded:
                return name
    return ""


def _members(line: bytes, old: Mapping[str, Any] | None) -> Iterator[tuple[str, int, int]]:
    """(name, start, end) of the value of every top-level field, in order."""
    old = parse_fields(line) if old is None else old
    position = line.index(b"{") + 1
    while key := _KEY.match(line, position):
        quoted, start = key[1], key.end()
        name: str = orjson.loads(quoted)
        position = _end_of_value(line, start, old.get(name))
        yield name, start, position


def _end_of_value(line: bytes, start: int, value: object) -> int:
    """The end of the value that starts at `start`, which is probably `value`."""
    if isinstance(value, (str, list, dict)):
        try:
            usual = orjson.dumps(value)
        except TypeError:  # nested too deeply
            usual = b"\0"
        if line.startswith(usual, start):  # no string or container is a part of another from its first byte on
            return start + len(usual)
    if line[start] not in b"[{":
        scalar = _SCALAR.match(line, start)
        assert scalar is not None
        return scalar.end()
    depth = 0
    for token in _NESTING.finditer(line, start):
        depth += (token[1] is not None) - (token[2] is not None)
        if depth == 0:
            return token.end()
    raise AssertionError("the line is valid JSON")
