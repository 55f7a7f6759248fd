"""Counting pieces and learning merges, compared with the `tokenizers` trainer, a naive one, and a published reference."""

from __future__ import annotations

import io
import json
import random
import tarfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from llmkit.errors import LlmkitError
from llmkit.io.documents import Chunk, ReadOptions
from llmkit.tokens import trainer
from llmkit.tokens.pretokenize import PATTERNS, byte_alphabet, find_pattern, pre_tokenizer
from llmkit.tokens.trainer import ALPHABET, PieceCounts

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
Merges = list[tuple[str, str]]


def stored(name: str) -> bytes:
    with open(SHARED / name, "rb") as raw:
        return zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True).read()


def counted(texts: Iterable[str], name: str) -> PieceCounts:
    counts = PieceCounts()
    counts.add_texts([text.encode() for text in texts], name)
    return counts


def ours(counts: PieceCounts, wanted: int, least: int) -> Merges:
    tokens, merges = list(ALPHABET), []
    for a, b in counts.merges(wanted, least)[0].tolist():
        merges.append((tokens[a], tokens[b]))
        tokens.append(tokens[a] + tokens[b])
    return merges


def librarys(texts: Iterable[str], name: str, wanted: int, least: int) -> Merges:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer(find_pattern(name))
    learner = trainers.BpeTrainer(
        vocab_size=256 + wanted,
        min_frequency=least,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, learner)
    return [(a, b) for a, b in json.loads(tokenizer.to_str())["model"]["merges"]]


def plain(words: Counter[str], wanted: int, before: Callable[[tuple[str, str]], Any]) -> Iterator[tuple[str, str]]:
    """Naive BPE (Sennrich et al.); among equally frequent pairs the first by the key `before`."""
    parts = {word: list(word) for word in words}
    times: Counter[tuple[str, str]] = Counter()
    where = defaultdict(set)
    for word, count in words.items():
        for pair in zip(word, word[1:], strict=False):
            times[pair] += count
            where[pair].add(word)
    for _ in range(wanted):
        most = max(times.values())
        best = min((pair for pair, count in times.items() if count == most), key=before)
        yield best
        for word in where.pop(best):
            old, new, i = parts[word], [], 0
            while i < len(old):
                step = 2 if tuple(old[i : i + 2]) == best else 1
                new.append("".join(old[i : i + step]))
                i += step
            for sign, some in ((-1, old), (1, new)):
                for pair in zip(some, some[1:], strict=False):
                    times[pair] += sign * words[word]
                    if sign > 0:
                        where[pair].add(word)
            parts[word] = new


def test_merges_equal_the_librarys_on_random_texts() -> None:
    """Parity with the `tokenizers` trainer on texts full of ties, runs and overlaps, at many sizes and minimum
    frequencies.
    """
    for seed in range(120):
        draw = random.Random(seed)
        letters = draw.choice(["ab ", "aab", "abc", "a", "abcd  \n", "aé ", "xy12 '", "\U0001f642日a"])
        texts = ["".join(draw.choices(letters, k=draw.randrange(1, 300))) for _ in range(draw.randrange(1, 30))]
        name, least = draw.choice(list(PATTERNS)), draw.choice([0, 1, 1, 2, 3, 10])
        wanted = draw.choice([0, 1, 5, 50, 300, 2000])
        assert ours(counted(texts, name), wanted, least) == librarys(texts, name, wanted, least), (seed, name, least)


@pytest.mark.parametrize(
    ("source", "name", "wanted", "least"),
    [
        ("tinyshakespeare", "llama-bpe", 6000, 2),
        ("wikitext2_valid", "qwen2", 3000, 20),
        ("tinystories_Niklas6", "gpt-2", 20_000, 1),
        ("ungoliant_garbage", "smollm", 8000, 2),
    ],
)
def test_merges_equal_the_librarys_on_real_texts(source: str, name: str, wanted: int, least: int) -> None:
    """Parity with the `tokenizers` trainer."""
    text = stored(f"text/{source}.txt.zst").decode(errors="replace")
    texts = [text[start : start + 4000] for start in range(0, len(text), 4000)]
    expected = librarys(texts, name, wanted, least)
    assert len(expected) > 1500
    assert ours(counted(texts, name), wanted, least) == expected


def test_a_published_reference() -> None:
    """Parity with the merges published with Stanford's CS336, which break ties by the greater pair of byte strings.

    A plain trainer gives the reference with its rule and ours with the library's: the counts agree, and ties
    are all that differs.
    """
    with tarfile.open(fileobj=io.BytesIO(stored("text/cs336_bpe_reference.tar.zst"))) as files:
        content = {item.name: getattr(files.extractfile(item), "read", bytes)().decode() for item in files}
    text, lines = content["corpus.en"], content["train-bpe-reference-merges.txt"]
    reference = [tuple(line.split(" ")) for line in lines.splitlines()]
    words = Counter(piece for piece, _ in pre_tokenizer(find_pattern("gpt-2")).pre_tokenize_str(text))
    characters = {character: byte for byte, character in enumerate(byte_alphabet())}

    def greater(pair: tuple[str, str]) -> list[list[int]]:
        # Reversed order of byte strings; the end of a shorter one comes behind any byte.
        return [[255 - characters[character] for character in part] + [256] for part in pair]

    assert list(plain(words, len(reference), greater)) == reference
    ids = {character: i for i, character in enumerate(ALPHABET)}
    lower: Merges = []
    for pair in plain(words, len(reference), lambda pair: (ids[pair[0]], ids[pair[1]])):
        ids[pair[0] + pair[1]] = len(ids)
        lower.append(pair)
    assert ours(counted([text], "gpt-2"), len(reference), 1) == lower
    assert (len(reference), len({*lower} & {*reference})) == (243, 239)


def test_counts_are_those_of_the_pieces() -> None:
    """Property: every piece occurs once, with its count, while the table grows and when tables are added; words
    share prefixes.
    """
    draw = random.Random(5)
    words = [
        f"{'prefix' * draw.randrange(6)}{draw.choice(['', 'x', 'yy', 'zz'])}{chr(97 + i % 26)}" for i in range(3000)
    ]
    words += [
        f"w{draw.randrange(1 << 40):x}".translate(str.maketrans("0123456789", "ghijklmnop")) for _ in range(70_000)
    ]
    texts = [" ".join(draw.choices(words, k=50)) for _ in range(4000)] + ["", "a" * 100_000, "a" * 100_001]
    expected = Counter(f"{' ' if i else ''}{word}" for text in texts for i, word in enumerate(text.split(" ")) if word)
    whole, parts = counted(texts, "gpt-2"), PieceCounts()
    for start in range(0, len(texts), 1000):
        parts.add(counted(texts[start : start + 1000], "gpt-2").pieces())
    for counts in (whole, parts):
        pool, ends, times = counts.pieces()
        begins = np.concatenate([[0], ends[:-1]])
        found = [pool[a:b].tobytes().decode() for a, b in zip(begins, ends, strict=True)]
        assert len(set(found)) == len(found)
        assert dict(zip(found, times.tolist(), strict=True)) == expected


def test_sample_is_a_share_that_order_does_not_change() -> None:
    """Property: about the requested share, independent of order and of other documents, and different with
    another seed.
    """
    lines = [b'{"id": "d%d", "text": "t%d"}\n' % (i, i) for i in range(4000)]

    def taken(rows: list[bytes], seed: int) -> set[str]:
        work = trainer.PieceCounter("gpt-2", ReadOptions(), 0.25, seed)
        pool, ends, _ = work(Chunk("x", 1, b"".join(rows))).pieces or pytest.fail("no words")
        return {pool[a:b].tobytes().decode() for a, b in zip(np.concatenate([[0], ends[:-1]]), ends, strict=True)} - {
            "t"
        }

    first = taken(lines, 1)
    assert 850 < len(first) < 1150
    assert taken(lines[::-1], 1) == first == taken(lines[:2000], 1) | taken(lines[2000:], 1)
    assert len(first & taken(lines, 2)) < 350


def test_too_many_words_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behaviour: a clear error with a hint before positions could overflow."""
    monkeypatch.setattr(trainer, "MAX_BYTES", 20)
    with pytest.raises(LlmkitError, match="distinct words are too many") as caught:
        counted(["some words of more than twenty bytes"], "gpt-2").merges(10)
    assert "--sample" in str(caught.value.hint)
