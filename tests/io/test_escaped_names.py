"""Names of files are bytes: escaped reversibly in records, TOML and shell scripts, and read from lists as they are."""

from __future__ import annotations

import os
import subprocess
import tomllib
from pathlib import Path

import orjson
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.io.inputs import read_list
from llmkit.io.names import escape_name, escape_names, one_line, shell_name, unescape_name
from llmkit.io.record import base_name
from llmkit.options import from_toml, toml_value

names = st.one_of(
    st.binary(min_size=1, max_size=12),
    st.text(alphabet="\\x5ce9a é'\n", min_size=1, max_size=12).map(lambda text: text.encode()),
).filter(lambda name: not {0, ord("/")} & {*name})


@given(names)
@settings(max_examples=300, deadline=None)
def test_escapes_are_reversible(name: bytes) -> None:
    """Property: a record, a TOML file and a shell script hold any name, and give its bytes back."""
    text = os.fsdecode(name)
    escaped = escape_name(text)
    assert os.fsencode(unescape_name(escaped)) == name and orjson.loads(orjson.dumps(escaped)) == escaped
    assert "/" not in unescape_name(escaped) and unescape_name(escape_name(escaped)) == escaped
    assert os.fsencode(from_toml(tomllib.loads(f"a = {toml_value([text])}")["a"])[0]) == name
    assert one_line(text).isprintable() and escape_names({text: [text]}).keys() == escape_names({text: 0}).keys()


def test_shell_words_are_the_bytes() -> None:
    """Behaviour: bash prints the bytes of the name, and does not run what is in it."""
    for name in (
        b"caf\xe9 \n.jsonl",
        b"it's\\xe9\xff\\",
        "é".encode(),
        b"\\x\xe9a",
        b"$(touch x)\xff`touch x`",
        b"a b",
    ):
        word = shell_name(escape_name(os.fsdecode(name)))
        assert subprocess.run(["bash", "-c", b"printf %s " + os.fsencode(word)], capture_output=True).stdout == name


def test_names_in_utf8_stay() -> None:
    """Behaviour: what is UTF-8 is recorded as before; only what looks like an escape is told from one."""
    for name in ("web.jsonl", "café \n\\x41\\n.jsonl", "日本\\", "-"):
        assert base_name(name) == name
    assert escape_name("a\\xe9") == "a\\x5cxe9" and base_name(os.fsdecode(b"dir/caf\xe9")) == "caf\\xe9"


def test_lists_of_files_hold_bytes(tmp_path: Path) -> None:
    """Behaviour: a list has a name per line, or with zero bytes any name; U+2028 and U+0085 end no name."""
    path = tmp_path / "list"
    for content, expected in (
        ("é\u2028\x85.jsonl\r\n\n b\n".encode() + b"caf\xe9", ["é\u2028\x85.jsonl".encode(), b" b", b"caf\xe9"]),
        (b"a\nb\r\0caf\xe9\0\0", [b"a\nb\r", b"caf\xe9"]),
    ):
        path.write_bytes(content)
        assert [os.fsencode(name) for name in read_list(str(path))] == expected
