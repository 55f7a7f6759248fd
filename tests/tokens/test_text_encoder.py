"""The compiled way from text to ids gives those of the `tokenizers` library, whatever the text and the tokenizer."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from llmkit.errors import LlmkitError
from llmkit.shards.tokenizer_info import TokenizerInfo, parse_tokenizer
from llmkit.tokens import bytelevel
from llmkit.tokens.bytelevel import ByteLevel
from llmkit.tokens.kernels.pretokenize import KINDS, LETTER, NUMBER, SPACE, classes, cut
from llmkit.tokens.pretokenize import PATTERNS, byte_alphabet, pattern_of, pre_tokenizer
from llmkit.tokens.text_encoder import TextEncoder, load

Trained = Callable[[str], TokenizerInfo]
# What the four patterns tell apart, and what is easily taken for something else.
CHARACTERS = "  \n\r\t\n ab'sStTrReEvVmMlLdD\u017f1234\u0663\u00bd\u00b2.,!-\u2014\u00e9\u0436\u65e5\u672c\u0301\u200b\u200d\U0001f642\U0001f469\x85\u3000\xa0\u2028\x0b\x1c_\u2163\u212a\u05d0\u0627\ufeff\x00"


def strings(count: int, seed: int) -> list[str]:
    """Random texts: of those characters, and of all planes."""
    draw = random.Random(seed)
    found = []
    for i in range(count):
        if i % 2:
            found.append("".join(draw.choices(CHARACTERS, k=draw.randrange(1, 40))))
        else:
            tops = draw.choices((0x80, 0x250, 0x3000, 0x20000, 0x110000), k=draw.randrange(1, 20))
            codes = [draw.randrange(top) for top in tops]
            found.append("".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000))
    return found


LONG = [
    "a" * 3000,
    "ab" * 999 + "\u00e9" * 700,
    " " * 5000,
    "\n \n" * 900,
    "1" * 2000,
    "\u65e5" * 1500,
    "x" * 128 + " " + "x" * 129,
    "",
]


@pytest.mark.parametrize("name", PATTERNS)
def test_pieces_equal_those_of_the_library(name: str) -> None:
    """Parity with the pre-tokenizers of `tokenizers`: characters of many scripts beside others, and random texts."""
    library, table = pre_tokenizer(PATTERNS[name]), classes(KINDS[name])
    around = ["".join(f"'{chr(c)}a {chr(c)}1  {chr(c)}" for c in range(start, start + 512) if not 0xD800 <= c < 0xE000)
              for start in [*range(0, 0x3200, 512), 0xFE00, 0x1D400, 0x1F000, 0xE0000]]  # fmt: skip
    for text in [*around, *strings(1000, 1), *LONG]:
        data = np.frombuffer(text.encode(), np.uint8)
        ends = np.empty(len(data), np.int64)
        found = ends[: cut(data, 0, len(data), KINDS[name], table, ends)].tolist()
        wanted = [len(text[:stop].encode()) for _, (_, stop) in library.pre_tokenize_str(text)]
        assert found == wanted, text


def test_classes_are_those_of_unicode() -> None:
    """Behaviour: letters, numbers and spaces where every version of Unicode has them."""
    table = classes(KINDS["gpt-2"])
    for characters, kind in (
        ("aZ\u00e9\u0436\u65e5\u05d0", LETTER),
        ("09\u00b2\u0663\u2163", NUMBER),
        (" \t\n\x85\u3000\u2028", SPACE),
        ("-_\u200b\u0301", 0),
    ):
        assert {int(table[ord(character)]) for character in characters} == {kind}


@pytest.mark.parametrize("name", PATTERNS)
def test_ids_equal_those_of_the_library(name: str, trained: Trained) -> None:
    """Parity with `tokenizers`, in a table that is full again and again."""
    info = trained(name)
    encoder, library = TextEncoder(info, compiled=True), load(info)
    encoder(["warm"])
    fast = encoder._fast
    assert fast is not None
    fast._renew(64 if name != "llama-bpe" else 4096)  # a small one grows
    texts = [*strings(1500, 2), *LONG]
    wanted = [library.encode(text, add_special_tokens=False).ids for text in texts]
    for _ in range(2):
        ids, lengths = encoder(texts)
        assert ids.dtype == np.uint16
        assert [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])] == wanted
    assert len(fast._table) > 4 * 64


def test_a_table_that_may_not_grow_starts_anew(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behaviour: memory is bounded, and ids stay the same."""
    monkeypatch.setattr(bytelevel, "SLOTS", (256, 256))
    info = trained("qwen2")
    fast = ByteLevel.of(json.loads(info.files["tokenizer.json"]))
    assert fast is not None
    texts = strings(3000, 3)
    ids, _ = fast.encode([text.encode() for text in texts])
    assert len(fast._table) == 4 * 256
    assert ids.tolist() == [id for text in texts for id in load(info).encode(text, add_special_tokens=False).ids]


def changed(info: TokenizerInfo, change: Callable[[dict[str, Any]], None]) -> TokenizerInfo:
    content = json.loads(info.files["tokenizer.json"])
    change(content)
    return parse_tokenizer(info.files | {"tokenizer.json": json.dumps(content)}, "changed")


def added(content: dict[str, Any], name: str, **more: Any) -> None:
    id = max(content["model"]["vocab"].values()) + 1 + len(content["added_tokens"])
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    content["added_tokens"].append({"id": id, "content": name, **flags, **more})


CHANGES: dict[str, Callable[[dict[str, Any]], None]] = {
    "plain": lambda content: None,
    "NFC": lambda content: content.update(normalizer={"type": "NFC"}),
    "lower case": lambda content: content.update(normalizer={"type": "Lowercase"}),
    "an added token": lambda content: added(content, "<tool>", normalized=False),
    "an added token to be normalised": lambda content: (content.update(normalizer={"type": "NFC"}), added(content, "e\u0301x")),
    "many added tokens": lambda content: [added(content, chr(0x4E00 + i) + "a") for i in range(201)] and None,
    "prefix space": lambda content: content["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
    "dropout 0": lambda content: content["model"].update(dropout=0.0),
    "dropout": lambda content: content["model"].update(dropout=0.5),
    "ids beyond 2^23": lambda content: content["model"].update(vocab={name: id + (id > 50 and 1 << 23) for name, id in content["model"]["vocab"].items()}),
    "an id of two names": lambda content: content["model"]["vocab"].update(t=content["model"]["vocab"]["h"]),
    "merges as texts": lambda content: content["model"].update(merges=[" ".join(pair) for pair in content["model"]["merges"]]),
    "other words": lambda content: content["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\w+|\s+|[^\s\w]+"),
    "whole words": lambda content: content["model"].update(ignore_merges=not content["model"].get("ignore_merges")),
}  # fmt: skip


@pytest.mark.parametrize("allow_special", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_other_tokenizers(change: str, allow_special: bool, trained: Trained) -> None:
    """Parity with `tokenizers`: normalisers, added tokens, special tokens in a text, options; compiled where that is the same, else not."""
    info = changed(trained("qwen2"), CHANGES[change])
    library = load(info, allow_special=allow_special)
    texts = [
        "a<tool>b <tool",
        "Caf\u00e9 cafe\u0301x",
        "e\u0301x",
        "\u00e9x",
        "<|im_start|>A<|endoftext|>",
        "plain ASCII",
        "\u1100\u1161",
        *strings(100, 4),
    ]
    encoder = TextEncoder(info, allow_special=allow_special, compiled=True)
    ids, lengths = encoder(texts)
    assert [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])] == [
        library.encode(t, add_special_tokens=False).ids for t in texts
    ]
    assert (encoder._fast is None) == (
        change
        in (
            "lower case",
            "prefix space",
            "other words",
            "dropout",
            "ids beyond 2^23",
            "an id of two names",
            "many added tokens",
        )
    )


def test_other_models() -> None:
    """Parity with `tokenizers`: Unigram, WordPiece, BPE over characters with byte fallback go through the library."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    bytes_of = {f"<0x{byte:02X}>": 2 + byte for byte in range(256)}
    made = {
        "Unigram": models.Unigram([("</s>", 0.0), ("<unk>", 0.0), ("a", -1.0), ("ab", -1.5), ("b", -2.0)], 1, False),
        "WordPiece": models.WordPiece({"</s>": 0, "[UNK]": 1, "a": 2, "##b": 3}, unk_token="[UNK]"),
        "BPE": models.BPE({"</s>": 0, "a": 1, **bytes_of, "b": 300, "ab": 301}, [("a", "b")], byte_fallback=True),
    }
    texts = ["ab abba", "\u00e9 a", "b"]
    for name, model in made.items():
        library = Tokenizer(model)
        library.pre_tokenizer = pre_tokenizers.Whitespace()
        info = parse_tokenizer(
            {"tokenizer.json": library.to_str(), "tokenizer_config.json": '{"eos_token": "</s>"}'}, name
        )
        ids, lengths = TextEncoder(info, compiled=True)(texts)
        wanted = [library.encode(text, add_special_tokens=False).ids for text in texts]
        assert [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])] == wanted and sum(map(len, wanted)), (
            name
        )


@pytest.mark.parametrize("part", ["decoder", "post_processor", "truncation", "model", "version"])
def test_what_the_library_refuses_is_refused(part: str, trained: Trained) -> None:
    """Behaviour: a damaged tokenizer.json is an error on a machine where the kernels are compiled as on one where they are not."""
    wrong = {"model": {"ignore_merges": "yes"}}.get(part, {"type": "Nope"})
    info = changed(
        trained("qwen2"), lambda content: content.update({part: content["model"] | wrong if part == "model" else wrong})
    )
    for compiled in (True, False):
        with pytest.raises(LlmkitError, match="does not load"):
            TextEncoder(info, compiled=compiled)(["a"])


def test_patterns_are_known_by_their_description() -> None:
    """Parity with `tokenizers`: what it writes for each pattern is recognised, what differs is not; bytes are named as there."""
    from tokenizers import pre_tokenizers

    for name, chosen in PATTERNS.items():
        assert pattern_of(json.loads(pre_tokenizer(chosen).__getstate__())) == name
    for other in (
        None,
        {},
        [],
        {"type": "Sequence"},
        {"type": "ByteLevel", "add_prefix_space": True},
        {"type": "Whitespace"},
    ):
        assert pattern_of(other) is None
    assert sorted(byte_alphabet()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert "".join(
        text
        for text, _ in pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(
            "\x00 \x7f\u00ad"
        )
    ) == "".join(byte_alphabet()[byte] for byte in "\x00 \x7f\u00ad".encode())


def test_the_first_megabytes_do_not_wait_for_a_compiler(trained: Trained, tmp_path: Any) -> None:
    """Behaviour: where nothing is compiled the library encodes; the same ids come uncompiled (`NUMBA_DISABLE_JIT`)."""
    info = trained("llama-bpe")
    (tmp_path / "tokenizer.json").write_text(info.files["tokenizer.json"])
    program = (
        "import sys, json; from llmkit.shards.reader import load_tokenizer_info; from llmkit.tokens.text_encoder import TextEncoder\n"
        "e = TextEncoder(load_tokenizer_info(sys.argv[1]))\n"
        "ids = e(['The quick brown fox, 123 caf\u00e9s', 'x' * 300])[0].tolist(); print(json.dumps([ids, e._fast is None]))"
    )
    answers = []
    for extra in ({}, {"NUMBA_DISABLE_JIT": "1"}):
        environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "cache"), "PYTHONWARNINGS": "ignore"} | extra
        run = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path)], env=environment, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        answers.append(json.loads(run.stdout))
    assert answers[0][0] == answers[1][0] and [waits for _, waits in answers] == [True, False]
