"""Word segmentation, and the figures of a fertility report."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import orjson
import pytest

from llmkit.errors import LlmkitError
from llmkit.io.documents import Chunk, ReadOptions
from llmkit.shards.tokenizer_info import TokenizerInfo, parse_tokenizer
from llmkit.tokens import fertility
from llmkit.tokens.text_encoder import load_tokenizer

Trained = Callable[[str], TokenizerInfo]
ROWS = [
    {"text": "The quick brown fox doesn't jump over 1234 dogs, naïve  as it seems.\n", "language": "en"},
    {"text": "Straße und Flüsse — grüner als gedacht, e\u0301tage.", "language": "de"},
    {"text": "人人生而自由，在尊严和权利上一律平等。 สวัสดีครับ", "language": "zh", "source": "asia"},
    {"text": "def main():\n\treturn {x: [i, j] for i, j in y}  # ()[]{}\n", "source": "code"},
    {"text": "   \n", "language": ["en"]},
]


def chunk(rows: list[dict[str, Any]]) -> Chunk:
    return Chunk("web.jsonl.zst", 1, b"".join(orjson.dumps(row) + b"\n" for row in rows))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Don't stop -- now_then, O’Neil!", ["Don't", " stop", " now", "then", " O’Neil"]),
        ("e\u0301tat naïve x2 3.14", ["e\u0301tat", " naïve", " x2", " 3", "14"]),
        ("नमस्ते दुनिया", ["नमस्ते", " दुनिया"]),
        ("안녕 세상", ["안녕", " 세상"]),
        ("東京 へ行く", ["東", "京", " へ", "行", "く"]),
        ("นี้ก็ดี 12", ["นี้", "ก็", "ดี", " 12"]),
        ("𠀀𠀁 𝒳𝒴 👩‍👧", ["𠀀", "𠀁", " 𝒳𝒴"]),
        ("'quoted' -", ["quoted'"]),
        ("[\\]^-", []),
    ],
)
def test_words(text: str, words: list[str]) -> None:
    """Behaviour: runs of letters, digits and marks; single characters in scripts without spaces."""
    assert fertility.split_words(text) == words


def test_long_texts_are_counted_alike() -> None:
    """Property: the words of a text of over a million characters are those of its parts."""
    text = "Ein Haus, 家が一軒. "
    assert fertility.count_words(text * 80_000) == {w: n * 80_000 for w, n in fertility.count_words(text).items()} | {
        "Ein": 1, " Ein": 79_999,
    }  # fmt: skip


def unigram() -> TokenizerInfo:
    """A tokenizer of another kind: Unigram with SentencePiece's space marker and a normaliser."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator([row["text"] for row in ROWS] * 3, trainer)
    return parse_tokenizer({"tokenizer.json": tokenizer.to_str()}, "unigram")


@pytest.mark.parametrize("kind", ["llama-bpe", "smollm", "unigram"])
def test_figures_are_what_they_say(kind: str, trained: Trained) -> None:
    """Parity with the definitions, computed naively through the `tokenizers` library."""
    info = unigram() if kind == "unigram" else trained(kind)
    library = load_tokenizer(info)
    measured = fertility.FertilityMeter([info], ReadOptions(), ("language", "source"))(chunk(ROWS))
    assert measured.documents == 5
    for key, rows in {
        fertility.ALL: ROWS,
        ("language", "en"): ROWS[:1],
        ("language", fertility.MISSING): ROWS[3:],
        ("source", "web"): [*ROWS[:2], ROWS[4]],
        ("source", "code"): ROWS[3:4],
    }.items():
        ids = [i for row in rows for i in library.encode(row["text"], add_special_tokens=False).ids]
        words = [word for row in rows for word in fertility.split_words(str(row["text"]))]
        single = sum(len(library.encode(word, add_special_tokens=False).ids) == 1 for word in words)
        size = sum(len(str(row["text"]).encode()) for row in rows)
        figures = measured.groups[key].figures([info.vocab_size])
        made = figures["tokenizers"][0]
        assert (figures["documents"], figures["bytes"], figures["words"]) == (len(rows), size, len(words))
        assert made["tokens"] == len(ids) and made["unused"] == info.vocab_size - len(set(ids))
        assert made["fertility"] == len(ids) / len(words) and made["bytes_per_token"] == size / len(ids)
        assert made["single_token_words"] == single / len(words)
    assert measured.groups[fertility.ALL].by_tokenizer[0].single > 3


def test_chunks_add_up(trained: Trained) -> None:
    """Property: merging the counts of chunks equals measuring them together."""
    meter = fertility.FertilityMeter([trained("gpt-2"), trained("qwen2")], ReadOptions(), ("language",))
    whole, parts = {}, {}
    fertility.merge_groups(whole, meter(chunk(ROWS)).groups)
    for row in ROWS:
        fertility.merge_groups(parts, meter(chunk([row])).groups)
    assert {k: t.figures([384, 384]) for k, t in whole.items()} == {k: t.figures([384, 384]) for k, t in parts.items()}


def test_groups_are_bounded() -> None:
    """Behaviour: a field with a distinct value in every document is refused."""
    made = [fertility.TokenizerCounts(used=np.zeros(8, np.uint8))]
    with pytest.raises(LlmkitError, match="field 'id' has 1,001 values"):
        fertility.merge_groups({}, {("id", str(i)): fertility.GroupCounts(1, 1, 1, made) for i in range(1001)})


def test_baseline_and_warning() -> None:
    """Behaviour: the baseline is English or the named group; groups over 1.5 times its fertility are listed,
    the highest first.
    """

    def tally(words: int, tokens: int) -> fertility.GroupCounts:
        return fertility.GroupCounts(1, 1, words, [fertility.TokenizerCounts(tokens)])

    total = {
        fertility.ALL: tally(99, 200), ("language", "EN"): tally(10, 12), ("language", "th"): tally(10, 19), ("source", "x"): tally(0, 5),
        ("language", "fi"): tally(10, 17), ("source", "code"): tally(10, 40),
    }  # fmt: skip
    base = fertility.find_baseline(total, None)
    assert base == ("language", "EN")
    assert [key[1] for key, _ in fertility.high_fertility(total, base, 0)] == ["code", "all", "th"]
    assert fertility.find_baseline(total, "fi") == ("language", "fi") and fertility.find_baseline(total, "x") is None


def test_every_script(shared_data: Any, trained: Trained) -> None:
    """Behaviour on real text of every script in UDHR: figures are finite, and tokens have at least one byte."""
    from llmkit.io.documents import DocumentReader

    rows: dict[str, dict[str, Any]] = {}
    for document in DocumentReader([str(shared_data / "lang" / "udhr_xml_text.jsonl.zst")]).documents():
        rows.setdefault(document.fields["script"], {"text": document.text[:4000], "script": document.fields["script"]})
    measured = fertility.FertilityMeter([trained("llama-bpe")], ReadOptions(), ("script",))(chunk(list(rows.values())))
    assert len(measured.groups) == len(rows) + 1 > 40
    for tally in measured.groups.values():
        made = tally.figures([384])["tokenizers"][0]
        assert made["bytes_per_token"] >= 1 and made["fertility"] > 0.5 and tally.words > 20
    assert json.dumps(measured.groups["script", "Thai"].figures([384]))
