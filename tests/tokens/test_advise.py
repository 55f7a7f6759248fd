"""Sizes measured from one training, and the rule that picks one."""

from __future__ import annotations

import math

import pytest

from llmkit.errors import LlmkitError
from llmkit.shards.tokenizer_info import TokenizerInfo
from llmkit.tokens import advise, vocabulary
from llmkit.tokens.text_encoder import load_tokenizer

TEXTS = [
    "The quick brown fox jumps over the lazy dog, and the dog didn't mind: it'd seen 1234 foxes since 2019.\n",
    "def main():\n    for i in range(100):\n        print(f'{i:>8}')\n\n\n    return None\n",
    "Straße, naïve café, 東京都 and 日本語のテキスト; Привет, мир!\r\n",
] * 4


@pytest.mark.parametrize("name", ["gpt-2", "llama-bpe"])
def test_one_training_gives_every_smaller_one(name: str) -> None:
    """Parity: token counts at each size, derived from the largest vocabulary, equal those of a tokenizer
    trained at that size.
    """
    sizes = [320, 384, 448]
    largest = vocabulary.train(TEXTS, 512, name)
    held = advise.HeldOutText([*TEXTS[:3], "dogs and foxes, 日本 2019"], ["a", "a", "b", "b"])
    curve = advise.measure_sizes(largest, held, sizes)
    texts = held.texts
    for i, size in enumerate(sizes):
        made = vocabulary.train(TEXTS, size, name)
        library = load_tokenizer(TokenizerInfo("", size, 0, files=made.files))
        tokens = [len(library.encode(text).ids) for text in texts]
        assert curve.bytes_per_token[i] == pytest.approx(sum(len(t.encode()) for t in texts) / sum(tokens))
        assert curve.groups["a"][1][i] < curve.groups["a"][1][0] + 1e-9
    assert curve.bytes_per_token == sorted(curve.bytes_per_token)


@pytest.mark.parametrize(
    ("weights", "width", "published"), [(33e6, 512, 6_144), (302e6, 1024, 16_384), (2.87e9, 3200, 43_000)]
)
def test_the_rule_comes_near_the_published_sizes(weights: float, width: int, published: int) -> None:
    """Golden: on the compression curve of Tao et al. (arXiv:2407.13623, tokens per character) within 25 % of
    the paper's sizes.
    """

    def bytes_per_token(size: int) -> float:
        return 1 / (0.0064 * math.log(size) ** 2 - 0.1581 * math.log(size) + 1.2047)

    sizes = list(range(1024, 1 << 17, 64))
    curve = advise.CompressionCurve(sizes, [bytes_per_token(size) for size in sizes], [1.0] * len(sizes), {})
    found = advise.size_costs(
        curve, lambda size: int(weights) + size * width, lambda size: 6 * (int(weights) + size * width)
    )
    best = advise.recommend(found).size
    assert published / 1.25 < best < published * 1.25
    assert found[0].embedding_parameters == 1024 * width and found[0].share == pytest.approx(
        1024 * width / (weights + 1024 * width)
    )
    assert published / 1.4 < advise.power_law_size(int(weights), width) < published * 1.4


def test_held_out_documents() -> None:
    """Behaviour: about one document in twenty, the same in any order; no held-out document is an error."""
    held = advise.HeldOutText()
    texts = [f"text number {i}" for i in range(2000)]
    kept = [text for text in texts if held.take(text, "x")]
    again = advise.HeldOutText()
    assert sorted(kept) == sorted(text for text in texts[::-1] if again.take(text, "x")) and 60 < len(kept) < 140
    assert held.trained + held.bytes == sum(map(len, texts))
    with pytest.raises(LlmkitError, match="too few documents"):
        advise.measure_sizes(vocabulary.train(TEXTS, 320), advise.HeldOutText(), [320])


def test_sizes() -> None:
    """Behaviour: powers of two and 1.5 times those, all multiples of 64."""
    assert advise.candidate_sizes(6144) == [1024, 1536, 2048, 3072, 4096, 6144] and not advise.candidate_sizes(1000)
    assert advise.candidate_sizes(1 << 18)[-1] == 1 << 18 and all(
        size % 64 == 0 for size in advise.candidate_sizes(1 << 18)
    )
