"""Vocabularies of other libraries: recognised by name, converted to tokenizer.json; the choice of the end of text."""

from __future__ import annotations

import base64
import json
import subprocess
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from llmkit.errors import LlmkitError, UsageError
from llmkit.shards.tokenizer_info import parse_tokenizer, read_tokenizer
from llmkit.tokens.convert_vocabulary import convert, special_ids
from llmkit.tokens.pretokenize import byte_alphabet

Command = Callable[..., subprocess.CompletedProcess[bytes]]
TOKENS = [bytes([byte]) for byte in range(256)] + [
    b"ab",
    b"bc",
    b"abc",
    b"aab",
    b" a",
    b"aa",
    b"aaa",
    b"\xc3\xa9",
    b"bcab",
]
RANKS = {token: rank for rank, token in enumerate(TOKENS)}


def merge(word: bytes) -> list[int]:
    """The published algorithm of tiktoken: the adjacent pair of the lowest rank is merged, the leftmost first."""
    if word in RANKS:
        return [RANKS[word]]
    parts = [bytes([byte]) for byte in word]
    while True:
        ranks = [RANKS.get(a + b, 1 << 30) for a, b in zip(parts, parts[1:], strict=False)]
        if not ranks or min(ranks) == 1 << 30:
            return [RANKS[part] for part in parts]
        at = ranks.index(min(ranks))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("vocabularies")
    lines = [base64.b64encode(token) + f" {rank}\n".encode() for token, rank in RANKS.items()]
    (directory / "x.tiktoken").write_bytes(b"".join(lines))
    config = {"pattern": r"\p{L}+|[^\p{L}]+", "default_num_special_tokens": 3, "default_vocab_size": 3 + len(TOKENS)}
    rows = [{"rank": rank, "token_bytes": base64.b64encode(token).decode()} for token, rank in RANKS.items()]
    special = [{"rank": i, "token_str": name} for i, name in enumerate(("<unk>", "<s>", "</s>"))]
    content = {"config": config, "vocab": rows + rows[:1], "special_tokens": special}
    (directory / "tekken.json").write_text(json.dumps(content))
    (directory / "gpt2").mkdir()
    alphabet = byte_alphabet()
    vocabulary = {character: byte for byte, character in enumerate(alphabet)} | {"ab": 256, "<|endoftext|>": 257}
    (directory / "gpt2" / "vocab.json").write_text(json.dumps(vocabulary))
    (directory / "gpt2" / "merges.txt").write_text("#version: 0.2\na b\n")
    (directory / "m.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02\n\x06\n\x01a")
    return directory


@given(st.text("ab c1é", max_size=20))
@settings(max_examples=100, deadline=None)
def test_ranks_encode_as_tiktoken_does(place: Path, text: str) -> None:
    """Parity with tiktoken's algorithm: a converted vocabulary gives its ids (3 more in tekken, for special tokens)."""
    import re

    words = re.findall(r"[a-zé]+|[^a-zé]+", text)
    tekken = _tokenizers(place)[1]
    assert tekken.encode(text).ids == [id + 3 for word in words for id in merge(word.encode())]
    word = "".join(words).replace(" ", "").replace("1", "")
    assert _tokenizers(place)[0].encode(word).ids == (merge(word.encode()) if word else [])


_LOADED: dict[Path, tuple[Tokenizer, Tokenizer]] = {}


def _tokenizers(place: Path) -> tuple[Tokenizer, Tokenizer]:
    if place not in _LOADED:
        ranks = convert(place / "x.tiktoken", "llama-bpe", ["<|endoftext|>=300", "<a>"])
        assert parse_tokenizer({"tokenizer.json": ranks}, "x").eos_id == 300
        tekken = convert(place / "tekken.json", None, [])
        assert parse_tokenizer({"tokenizer.json": tekken}, "x").eos_id == 2
        _LOADED[place] = Tokenizer.from_str(ranks), Tokenizer.from_str(tekken)
        assert _LOADED[place][0].token_to_id("<a>") == 301
    return _LOADED[place]


def test_formats_are_named(place: Path, llmkit: Command) -> None:
    """Behaviour: each format is named with the command that converts it, which works; none is called damaged."""
    (place / "d.jsonl").write_text('{"text": "abc ab"}\n')
    for name, format, options in (
        ("x.tiktoken", "the ranks of a tiktoken vocabulary", ["--pattern", "llama-bpe", "--eos", "<|endoftext|>"]),
        ("tekken.json", "a tekken vocabulary", []),
        ("gpt2", "a vocabulary in vocab.json and merges.txt", ["--eos", "<|endoftext|>"]),
    ):
        done = llmkit("tokenize", "d.jsonl", "-t", name, "-o", "s", cwd=place)
        assert (
            done.returncode == 1
            and f"{name}: {format}, not a".encode() in done.stderr
            and b"vocab convert" in done.stderr
        )
        done = llmkit("vocab", "convert", name, *options, "-o", f"{name}-tok", cwd=place)
        assert done.returncode == 0, done.stderr
        done = llmkit("tokenize", "d.jsonl", "-t", f"{name}-tok", "-o", f"{name}-s", cwd=place)
        assert done.returncode == 0, done.stderr
    assert llmkit("vocab", "convert", "x.tiktoken", "-o", "n", cwd=place).returncode == 2  # no pattern
    for words in (("tokenize", "d.jsonl", "-t", "m.model"), ("vocab", "convert", "m.model")):
        done = llmkit(*words, "-o", "n", cwd=place)
        assert done.returncode == 1 and b"a SentencePiece model" in done.stderr and b"save_pretrained" in done.stderr
    with pytest.raises(UsageError, match="id 5 is taken"):
        convert(place / "x.tiktoken", "gpt-2", ["<a>=5"])
    (place / "y.tiktoken").write_bytes(b"YQ== 0\nnot a rank\n")
    with pytest.raises(LlmkitError, match=r"y\.tiktoken:2: not a token in base64"):
        convert(place / "y.tiktoken", "gpt-2", [])
    assert special_ids(["a", "b=9", "c", "b", "a=3", "d"], 3) == {"a": 3, "b": 9, "c": 10, "d": 4}


@pytest.mark.parametrize(
    "special", [["=259"], [""], ["<a>=300", "<a>=301"], ["<a>=300", "<b>=300"], ["<a>", "<a>=259"]]
)
def test_special_tokens_have_one_name_and_one_id(tmp_path: Path, special: list[str]) -> None:
    """Behaviour: no special token is dropped for another one, and none lacks a name."""
    (tmp_path / "x.tiktoken").write_bytes(_lines(BYTES))
    with pytest.raises(UsageError, match="^special token '"):
        convert(tmp_path / "x.tiktoken", "gpt-2", special)


def test_memory_of_merges_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behaviour: a small file whose merges would fill the memory is refused before they are made."""
    (tmp_path / "x.tiktoken").write_bytes(_lines([*BYTES, *((b"a" * n, 254 + n) for n in range(2, 1001))]))
    tracemalloc.start()
    with pytest.raises(LlmkitError, match="too many ways to merge its tokens"):
        convert(tmp_path / "x.tiktoken", "gpt-2", [])
    assert tracemalloc.get_traced_memory()[1] < 60 << 20
    tracemalloc.stop()


def test_end_of_text_is_chosen(tmp_path: Path, llmkit: Command) -> None:
    """Behaviour: DeepSeek's name is known; where none is, --eos names one, also against the tokenizer's own choice."""

    def write(*names: str) -> None:
        vocabulary = {character: byte for byte, character in enumerate(byte_alphabet())}
        tokenizer = json.loads(Tokenizer.from_str(convert_text(vocabulary, names)).to_str())
        (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))

    def convert_text(vocabulary: dict[str, int], names: tuple[str, ...]) -> str:
        (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
        (tmp_path / "merges.txt").write_text("")
        return convert(tmp_path / "vocab.json", None, names)

    write("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>")
    assert read_tokenizer(tmp_path).eos_id == 257
    write("<stop>", "<|im_end|>")
    with pytest.raises(LlmkitError, match="has no end-of-text token") as error:
        read_tokenizer(tmp_path)
    assert "--eos NAME" in error.value.hint and "<stop>" in error.value.hint
    assert read_tokenizer(tmp_path, "<|im_end|>").eos_id == 257
    with pytest.raises(UsageError, match="'<stpo>' is not a token"):
        read_tokenizer(tmp_path, "<stpo>")
    (tmp_path / "d.jsonl").write_text('{"text": "abc"}\n')
    done = llmkit("tokenize", "d.jsonl", "-t", "tokenizer.json", "--eos", "<stop>", "-o", "s", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = llmkit("tokenize", "s", "--to", "jsonl", "--plain", "-q", cwd=tmp_path).stdout
    assert json.loads(lines)["tokens"] == [97, 98, 99, 256]
    assert read_tokenizer(tmp_path / "s").eos_id == 256


BYTES = [(bytes([byte]), byte) for byte in range(256)]


def _lines(rows: list[tuple[bytes, object]]) -> bytes:
    return b"".join(base64.b64encode(token) + f" {rank}\n".encode() for token, rank in rows)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_lines([*BYTES, (b"ab", 256), (b"ab", 257)]), ":258: a token that is already at x.tiktoken:257"),
        (_lines([*BYTES, (b"ab", 97)]), ":257: id 97, which is already at x.tiktoken:98"),
        (_lines(BYTES) + b"Y*I= 256\n", ":257: invalid base64 "),
        (_lines(BYTES) + b"YWI=\n", ":257: not a token in base64 and its rank"),
        (_lines([*BYTES, (b"ab", "1e3")]), ":257: not a token in base64 and its rank"),
        (_lines([*BYTES, (b"ab", -1)]), ":257: -1 is not an id"),
        (_lines([*BYTES, (b"ab", 1 << 32)]), ":257: 4294967296 is not an id"),
        (_lines([*BYTES, (b"ab", "9" * 9999)]), ":257: 99999999999999999999 is not an id"),
        (_lines([*BYTES, (b"ab", 30_000_000)]), ": no token with id 256, and 29,999,743 other gaps"),
        (_lines([*BYTES, (b"ab", 257)]), r": no token with id 256(\n|$)"),
        (_lines([*BYTES, (b"a" * 5_000_000, 256)]), ":257: a token of 5,000,000 bytes"),
        (_lines(BYTES[:13] + [(token, rank - 1) for token, rank in BYTES[14:]]), r": no token for 1 of the 256 bytes \(0x0d\)"),
        (b"", ": empty file"),
    ],
)  # fmt: skip
def test_damaged_ranks(tmp_path: Path, content: bytes, message: str) -> None:
    """Behaviour: what no vocabulary can hold is refused at once, in one line with its place, and a hint."""
    (tmp_path / "x.tiktoken").write_bytes(content)
    with pytest.raises(LlmkitError, match=rf"^{tmp_path}/x\.tiktoken{message}") as error:
        convert(tmp_path / "x.tiktoken", "gpt-2", [])
    assert "\n" not in str(error.value) and error.value.hint


def test_gaps_may_be_special_tokens(tmp_path: Path) -> None:
    """Behaviour: a special token given with an id fills a gap, as in p50k_base; ids after the last one may be left out."""
    (tmp_path / "x.tiktoken").write_bytes(_lines([*BYTES, (b"ab", 257)]))
    text = convert(tmp_path / "x.tiktoken", "gpt-2", ["<|endoftext|>=256", "<a>=300"])
    assert parse_tokenizer({"tokenizer.json": text}, "x").eos_id == 256


@pytest.mark.parametrize(
    "damage",
    [
        "one rank",
        "one name",
        "high rank",
        "taken name",
        "pattern",
        "reserved",
        "repeated",
        "no rank",
        "rank",
        "base64",
        "config",
        "type",
    ],
)
def test_damaged_tekken(place: Path, tmp_path: Path, damage: str) -> None:
    """Behaviour: one line for each damage of a tekken file, never an error of another library."""
    content = json.loads((place / "tekken.json").read_text())
    rows, config = content["vocab"], content["config"]
    if damage == "pattern":
        config["pattern"] = "((["
    elif damage == "reserved":
        config["default_num_special_tokens"] = 10**12
    elif damage == "repeated":
        rows[5] = rows[4]
    elif damage == "no rank":
        del rows[5]["rank"]
    elif damage == "rank":
        rows[5]["rank"] = -7
    elif damage == "base64":
        rows[5]["token_bytes"] = "\u00e9"
    elif damage == "one rank":
        content["special_tokens"][2]["rank"] = 0
    elif damage == "one name":
        content["special_tokens"][2]["token_str"] = "<s>"
    elif damage == "high rank":
        content["special_tokens"][2]["rank"] = 3
    elif damage == "taken name":
        content["special_tokens"] = [{"rank": 1, "token_str": "<SPECIAL_0>"}]
    elif damage == "config":
        del content["config"]
    else:
        content["vocab"] = 5
    (tmp_path / "tekken.json").write_text(json.dumps(content))
    with pytest.raises(LlmkitError, match=r"tekken\.json: ") as error:
        convert(tmp_path / "tekken.json", None, [])
    assert "\n" not in str(error.value) and error.value.hint


@pytest.mark.parametrize(
    ("more", "merges", "message"),
    [
        (', "a": 256', "", r"vocab\.json: 'a': a token that is already at"),
        (', "ab": -1', "", r"vocab\.json: 'ab': -1 is not an id"),
        (', "ab": 1e99', "", r"vocab\.json: 'ab': 1e\+99 is not an id"),
        (', "ab": 256', "a b\nb c\n", r"merges\.txt:2: not a merge of two tokens"),
        (', "ab": 256', "a b c\n", r"merges\.txt:1: not a merge of two tokens"),
    ],
)
def test_damaged_merges(tmp_path: Path, more: str, merges: str, message: str) -> None:
    """Behaviour: the same for vocab.json and merges.txt."""
    vocabulary = {symbol: byte for byte, symbol in enumerate(byte_alphabet())}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary)[:-1] + more + "}")
    (tmp_path / "merges.txt").write_text(merges)
    with pytest.raises(LlmkitError, match=message):
        convert(tmp_path / "vocab.json", None, [])
