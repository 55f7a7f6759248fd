r"""Names of files as text. On Unix a name is bytes; Python holds those that are not UTF-8 as lone surrogates (PEP 383),
which neither JSON nor UTF-8 can store.

    escape_name(os.fsdecode(b"caf\xe9.jsonl"))     # caf\xe9.jsonl, for records, counts and messages
    unescape_name(r"caf\xe9.jsonl")                # the name again

A name in UTF-8 is its own escaped form, unless it spells out such an escape: then its backslash is written \x5c, so
that escaping is reversible.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LOW = 0xDC00  # a byte is held as this plus its value
_BYTE = re.compile("[\udc80-\udcff]")
_ESCAPE = re.compile(r"\\x(5c|[89a-f][0-9a-f])")  # never a slash or a zero byte: a name stays one component


def escape_name(name: str) -> str:
    r"""The name with each byte that is not UTF-8 as `\xNN`."""
    if name.isascii() and "\\" not in name:
        return name
    return _as_escapes(_ESCAPE.sub(r"\\x5cx\1", name))


def unescape_name(text: str) -> str:
    """The name that `escape_name` made `text` from."""
    return _ESCAPE.sub(lambda match: "\\" if match[1] == "5c" else _byte(match[1]), text) if "\\x" in text else text


def escape_names(value: Any) -> Any:
    """A JSON value in which each string that is not UTF-8 is escaped as a name."""
    if isinstance(value, dict):
        return {escape_names(key): escape_names(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [escape_names(item) for item in value]
    return escape_name(value) if isinstance(value, str) and not is_utf8(value) else value


def one_line(text: str) -> str:
    r"""The text with escapes for what does not print, such as line breaks, and `\xNN` for bytes that are not UTF-8."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in _as_escapes(text))


def printable(text: str) -> str:
    """The text with escapes for control characters, line breaks excepted: a name must not steer the terminal."""
    return text if text.isprintable() else "\n".join(map(one_line, text.split("\n")))


def is_utf8(text: str) -> bool:
    """Whether all of a name or argument is UTF-8."""
    return not _BYTE.search(text)


def shell_name(text: str) -> str:
    """An escaped name as a word for bash."""
    return shell_word(unescape_name(text))


def shell_word(text: str) -> str:
    """Any text as a word for bash; bytes that are not UTF-8, and what does not print, as escapes."""
    if text.isprintable():
        return shlex.quote(text)
    return "$'" + "".join(c if c.isprintable() and c not in "\\'" else _shell_escapes(c) for c in text) + "'"


def _shell_escapes(character: str) -> str:
    data = character.encode("utf-8", "surrogateescape" if _BYTE.match(character) else "replace")
    return "".join(f"\\x{byte:02x}" for byte in data)


@contextmanager
def utf8_path(path: str | Path) -> Iterator[str]:
    """The path of a file for a library that opens only names in UTF-8 (safetensors); valid in the block."""
    if is_utf8(str(path)):
        yield str(path)
        return
    with open(path, "rb") as file:
        yield f"/proc/self/fd/{file.fileno()}"


def _as_escapes(text: str) -> str:
    return _BYTE.sub(lambda byte: f"\\x{ord(byte[0]) - LOW:02x}", text)


def _byte(digits: str) -> str:
    return chr(LOW + int(digits, 16))
