"""Foreign tokenizers: what is slow, grows or panics becomes one line; the ids are those of the library."""

from __future__ import annotations

import json
import re
import resource
import time
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from llmkit.cli.main import run_command
from llmkit.errors import LlmkitError
from llmkit.shards.tokenizer_info import parse_tokenizer
from llmkit.tokens.pretokenize import byte_alphabet
from llmkit.tokens.text_encoder import TextEncoder
from llmkit.tokens.tokenizer_json import Encoded, is_plain, load

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
REPEAT = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}


def split(regex: str) -> dict[str, Any]:
    pattern = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [pattern, BYTES]}}


def nested(depth: int) -> dict[str, Any]:
    step: dict[str, Any] = BYTES
    for _ in range(depth):
        step = {"type": "Sequence", "pretokenizers": [step, BYTES]}
    return {"pre_tokenizer": step}


def tokenizer_json(**parts: Any) -> str:
    alphabet = [*byte_alphabet(), "aa"]
    vocabulary = {name: i for i, name in enumerate([*alphabet, "</s>"])}
    model = {"type": "BPE", "vocab": vocabulary, "merges": [["a", "a"]]}
    added = {"id": len(alphabet), "content": "</s>", "special": True, "normalized": False}
    added |= {"single_word": False, "lstrip": False, "rstrip": False}
    decoder = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    base = {"version": "1.0", "added_tokens": [added], "normalizer": None, "pre_tokenizer": BYTES, "decoder": decoder}
    return json.dumps(base | {"post_processor": None, "model": model} | parts)


HOSTILE = {
    "exponential pattern": (split(r"(a+)+$"), "fails to encode: .*retry-limit"),
    "polynomial pattern": (split(r"a*a*a*a*a*c"), "fails to encode|^$"),
    "invalid pattern": (split("("), "not readable: Oniguruma"),
    "doubled bytes": (nested(30), "too much memory|more than 1 s"),
    "too many steps": (nested(200), "steps, more than 64"),
    "growing text": ({"normalizer": {"type": "Sequence", "normalizers": [REPEAT] * 4}}, "too much|more than 1 s"),
    "malformed map": ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "not readable"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_tokenizers_end(name: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Behaviour: one error that names the model; no panic on stderr; at most 3 s and 100 MB in this process."""
    monkeypatch.setattr("llmkit.tokens.tokenizer_json.SECONDS", 1.0)
    monkeypatch.setattr("llmkit.tokens.tokenizer_json.MEMORY", 1 << 28)
    parts, message = HOSTILE[name]
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    error = ""
    try:
        load(tokenizer_json(**parts), "m/: tokenizer.json is not readable", "hint").encode("a" * 2000 + "é" * 20 + "!")
    except LlmkitError as raised:
        error = raised.message
    assert re.search(message, error)
    assert not error or (error.startswith("m/: ") and "\n" not in error)
    assert time.monotonic() - started < 3
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10
    assert "panicked" not in capfd.readouterr().err


def test_decoders_are_guarded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behaviour: four replacements by a thousand characters each do not make a text of a terabyte."""
    monkeypatch.setattr("llmkit.tokens.tokenizer_json.MEMORY", 1 << 28)
    text = tokenizer_json(decoder={"type": "Sequence", "decoders": [REPEAT] * 4})
    with pytest.raises(LlmkitError, match="too much"):
        load(text, "m/: tokenizer.json is not readable", "hint").decode([ord("a")] * 10)


@pytest.mark.parametrize("parts", [{}, split(r"\p{L}+|\s+|[^\p{L}\s]+"), {"normalizer": {"type": "Lowercase"}}])
def test_ids_are_those_of_the_library(parts: dict[str, Any]) -> None:
    """Parity: the tokenizers library, in this process and guarded: ids, offsets, texts, normal forms and words."""
    text = tokenizer_json(**parts)
    ours, theirs = load(text, "m", "hint"), Tokenizer.from_str(text)
    texts = ["", "Aaaa bé\n🙂 aaa", "a </s> b", "x" * 5000]
    for special in (False, True):
        ours.encode_special_tokens = theirs.encode_special_tokens = special
        for item in texts:
            one, other = ours.encode(item, add_special_tokens=False), theirs.encode(item, add_special_tokens=False)
            assert (one.ids, one.offsets) == (other.ids, other.offsets)
            assert ours.decode(one.ids, skip_special_tokens=special) == theirs.decode(
                one.ids, skip_special_tokens=special
            )
            assert ours.pre_tokenizer.pre_tokenize_str(item) == theirs.pre_tokenizer.pre_tokenize_str(item)
            if theirs.normalizer:
                assert ours.normalizer.normalize_str(item) == theirs.normalizer.normalize_str(item)
        batch = ours.encode_batch_fast(texts, add_special_tokens=False)
        assert [item.ids for item in batch] == [
            item.ids for item in theirs.encode_batch_fast(texts, add_special_tokens=False)
        ]
    assert ours.get_vocab() == theirs.get_vocab() and ours.token_to_id("aa") == 256


def test_only_unusual_tokenizers_are_guarded() -> None:
    """Behaviour: the process is for patterns and chains of steps that are not known to be harmless."""
    gpt2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    assert is_plain(tokenizer_json(), "") and is_plain(tokenizer_json(**split(gpt2)), "")
    assert not is_plain(tokenizer_json(**split(r"\p{L}+")), "") and not is_plain(tokenizer_json(**nested(1)), "")


WORDS = {"unk_token": "[UNK]", "continuing_subword_prefix": "##", "vocab": {"</s>": 0, "[UNK]": 1, "a": 2, "##a": 3}}
BERT = {
    "normalizer": {
        "type": "BertNormalizer",
        "clean_text": True,
        "handle_chinese_chars": True,
        "strip_accents": None,
        "lowercase": True,
    }
}
BERT |= {
    "pre_tokenizer": {"type": "BertPreTokenizer"},
    "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
}
SPACE = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
LLAMA = {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, SPACE]}}
METASPACE = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}
GROWING = {"type": "Replace", "pattern": {"String": "a"}, "content": "aaaa"}


def pieces(longest: int) -> dict[str, Any]:
    vocabulary = [["</s>", 0.0], ["<unk>", 0.0], *(["a" * n, -float(n)] for n in range(1, longest + 1))]
    return {"model": {"type": "Unigram", "unk_id": 1, "vocab": vocabulary}}


def word_piece(longest: int) -> dict[str, Any]:
    return {"model": {"type": "WordPiece", "max_input_chars_per_word": longest} | WORDS}


@pytest.mark.parametrize(
    ("parts", "plain"),
    [
        (BERT | word_piece(100), True),
        (BERT | word_piece(1000), False),
        (pieces(16) | {"normalizer": {"type": "NFKC"}, "pre_tokenizer": METASPACE}, True),
        (pieces(999) | {"pre_tokenizer": None}, False),
        (LLAMA | {"pre_tokenizer": None}, True),
        ({"normalizer": {"type": "Sequence", "normalizers": [GROWING]}}, True),
        ({"normalizer": {"type": "Sequence", "normalizers": [GROWING] * 2}}, False),
        ({"decoder": {"type": "Sequence", "decoders": [GROWING] * 2}}, False),
        ({"normalizer": {"type": "Prepend", "prepend": "a" * 17}}, False),
        ({"model": {key: value for key, value in word_piece(1000)["model"].items() if key != "type"}}, False),
    ],
)
def test_time_and_growth_in_this_process_are_bounded(parts: dict[str, Any], plain: bool) -> None:
    """Behaviour: the tokenizers of BERT, XLM-R and Llama need no process; what multiplies its text or its time does."""
    assert is_plain(tokenizer_json(**parts), "") is plain


def test_long_texts_are_guarded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parity: a long text has the ids of the library, from a process that can be stopped."""
    monkeypatch.setattr("llmkit.tokens.tokenizer_json.LONG", 100)
    tokenizer = load(tokenizer_json(), "m", "hint")
    texts = ["aab" * 30, "aab" * 40]
    batch = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    library = Tokenizer.from_str(tokenizer_json())
    assert [item.ids for item in batch] == [library.encode(text, add_special_tokens=False).ids for text in texts]
    assert isinstance(batch[1], Encoded) and not isinstance(tokenizer.encode(texts[0]), Encoded)


def test_a_guarded_tokenizer_goes_on_after_a_failure() -> None:
    """Behaviour: only the text that it cannot encode fails."""
    tokenizer = load(tokenizer_json(**split(r"(a+)+$")), "m/: tokenizer.json is not readable", "hint")
    with pytest.raises(LlmkitError, match="m/: the tokenizer fails to encode"):
        tokenizer.encode("a" * 3000 + "!")
    assert tokenizer.encode("aab", add_special_tokens=False).ids == [256, ord("b")]


@pytest.mark.parametrize("compiled", [True, False])
def test_mixed_merges_are_refused(compiled: bool) -> None:
    """Behaviour: merges are all texts or all pairs, as in the library, whether or not kernels are compiled."""
    content = json.loads(tokenizer_json(**split("")))
    content |= {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}}
    content["model"]["merges"] = [["a", "a"], "a b"]
    content["model"]["vocab"] |= {"ab": 258}
    info = parse_tokenizer({"tokenizer.json": json.dumps(content)}, "tok/")
    with pytest.raises(LlmkitError, match="tok/: tokenizer.json does not load"):
        TextEncoder(info, compiled=compiled)(["aab"])


def test_commands_report_hostile_tokenizers(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Behaviour: a text that the pattern fails at is a bad line; the others are tokenized, with the same bytes for any -j."""
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok" / "tokenizer.json").write_text(tokenizer_json(**split(r"(a+)+$")))
    texts = ["hi", "a" * 3000 + "!", "aa", "b"]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    arguments = [str(tmp_path / "d.jsonl"), "-t", str(tmp_path / "tok")]
    assert run_command("tokenize", [*arguments, "-o", str(tmp_path / "s0")]) == 1
    error = capfd.readouterr().err
    assert "d.jsonl:2: " in error and "tok: the tokenizer fails to encode" in error and "panicked" not in error
    for jobs in ("1", "2"):
        skip = ["--on-bad-line", "skip", "-j", jobs, "-o", str(tmp_path / f"s{jobs}")]
        assert run_command("tokenize", [*arguments, *skip]) == 0
    assert "panicked" not in capfd.readouterr().err
    one, two = (sorted((tmp_path / name).glob("*.arrow")) for name in ("s1", "s2"))
    assert [file.read_bytes() for file in one] == [file.read_bytes() for file in two] != []
