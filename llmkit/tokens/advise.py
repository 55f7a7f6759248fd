"""Recommend a vocabulary size: measure each size on held-out text, compute its cost to a model, and apply a rule.

One training at the largest size gives all smaller ones, since merges are nested: a vocabulary of V tokens is
the first V of the largest, and a token of the largest splits along its merges into tokens of a smaller one. The
held-out text is therefore encoded once, and each token counts as the number of tokens it would be in each
smaller vocabulary (`tokens_by_size`).

The rule. With a larger vocabulary a text has fewer tokens, and each costs more: training takes 6·(N + V·d) /
(bytes per token) FLOPs per byte, where N is the number of weights outside the embeddings and d the width,
attention ignored, as in Tao et al. (NeurIPS 2024, arXiv:2407.13623, approach 2). The minimum depends on the
corpus and its languages through the bytes per token. It is flat, and the sizes with the lowest loss that the
paper found by training are below it, since the rows of rare tokens learn little. The recommendation is
therefore the smallest size whose cost is within `TOLERANCE` of the minimum. On the paper's English curve that
gives 6k, 18k and 35k for 33M, 302M and 2.87B weights, where the paper has 6k and 16k by training and 43k by its
law (tests/tokens/test_advise.py). Inference costs a third of training. For comparison, `power_law_size` is the
paper's power law, V·d = 3.1M · (N / 33M)^0.835, which ignores the corpus. A merge that occurs fewer than
`MIN_FREQUENCY` times reflects the sample rather than the language, so sizes that need such merges are not
considered.

    llmkit vocab advise docs.jsonl.zst --model-size 125m
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import orjson
import xxhash
from numpy.typing import NDArray

from llmkit.errors import LlmkitError
from llmkit.tokens.fertility import split_words
from llmkit.tokens.text_encoder import TextEncoder
from llmkit.tokens.vocabulary import BYTES, RESERVED, SPECIAL, Vocabulary

TOLERANCE = 0.02
MIN_FREQUENCY = 10
HELD_OUT = 20  # one document in this many is held out of training, and measured
HELD_OUT_BYTES = 8 << 20
NON_MERGES = BYTES + len(SPECIAL) + RESERVED  # tokens that are not merges
MAX_GROUPS = 50


def candidate_sizes(largest: int) -> list[int]:
    """1,024, 1,536, 2,048, 3,072, ... up to `largest`."""
    return sorted(base << k for base in (1024, 1536) for k in range(20) if base << k <= largest)


@dataclass(slots=True)
class HeldOutText:
    """Held-out documents and their groups, and the bytes of text held out and trained on."""

    texts: list[str] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    bytes: int = 0
    trained: int = 0  # bytes of the documents trained on

    def take(self, text: str, group: str) -> bool:
        """Hold this document out, if a hash of its text selects it, up to `HELD_OUT_BYTES`. Returns whether it
        was held out.
        """
        data = text.encode()
        if xxhash.xxh3_64_intdigest(data) % HELD_OUT or self.bytes + len(data) > HELD_OUT_BYTES:
            self.trained += len(data)
            return False
        self.texts.append(text)
        self.groups.append(group)
        self.bytes += len(data)
        return True


@dataclass(slots=True)
class CompressionCurve:
    """Bytes per token and fertility (tokens per word) at each size; `groups` maps each to (bytes, fertility at
    each size).
    """

    sizes: list[int]
    bytes_per_token: list[float]
    fertility: list[float]
    groups: dict[str, tuple[int, list[float]]]


def tokens_by_size(vocabulary: Vocabulary, sizes: Sequence[int]) -> NDArray[np.int32]:
    """Number of tokens that each token of the vocabulary is in each smaller one, int32 [sizes, ids]."""
    model = orjson.loads(vocabulary.files["tokenizer.json"])["model"]
    ids = model["vocab"]
    counts = np.ones((len(sizes), vocabulary.size), np.int32)
    limits = np.array(sizes) - NON_MERGES
    for rank, merge in enumerate(model["merges"]):
        a, b = merge.split(" ") if isinstance(merge, str) else merge
        beyond = limits <= rank
        counts[beyond, ids[a + b]] = counts[beyond, ids[a]] + counts[beyond, ids[b]]
    return counts


def measure_sizes(vocabulary: Vocabulary, held_out: HeldOutText, sizes: Sequence[int]) -> CompressionCurve:
    """Measure each of `sizes` on the held-out text. Raises LlmkitError where there is none."""
    from llmkit.shards.tokenizer_info import TokenizerInfo

    if not held_out.texts:
        raise LlmkitError("too few documents to hold any out", f"one in {HELD_OUT} is held out: give a hundred or more")
    encoder = TextEncoder(TokenizerInfo("", vocabulary.size, 0, files=vocabulary.files))
    table = tokens_by_size(vocabulary, sizes)
    totals: dict[str, NDArray[np.int64]] = {}
    for text, group in zip(held_out.texts, held_out.groups, strict=True):
        ids, _ = encoder([text])
        row = np.concatenate(([len(text.encode()), len(split_words(text))], table[:, ids].sum(1, dtype=np.int64)))
        for name in {"", group}:
            totals[name] = totals.get(name, 0) + row
    overall = totals.pop("")
    if not overall[0]:
        raise LlmkitError("the held-out documents are empty", "give more text")
    largest = sorted(totals.items(), key=lambda item: (-int(item[1][0]), item[0]))[:MAX_GROUPS]
    groups = {name: (int(row[0]), (row[2:] / max(1, row[1])).tolist()) for name, row in largest}
    return CompressionCurve(
        list(sizes),
        (overall[0] / overall[2:]).tolist(),
        (overall[2:] / max(1, overall[1])).tolist(),
        groups if totals else {},
    )


@dataclass(frozen=True, slots=True)
class SizeCost:
    """Cost of a vocabulary size to one model: compression, embedding weights and their share of all, and FLOPs
    per byte.
    """

    size: int
    bytes_per_token: float
    fertility: float
    embedding_parameters: int
    share: float
    training_flops_per_byte: float
    inference_flops_per_byte: float


def size_costs(
    curve: CompressionCurve, parameters: Callable[[int], int], flops: Callable[[int], int]
) -> list[SizeCost]:
    """Cost of each size to a model, given its `parameters` and training `flops` per token at a size (attention
    ignored).
    """
    other = 2 * parameters(1) - parameters(2)  # the count is linear in the size
    costs = []
    for size, ratio, fertility in zip(curve.sizes, curve.bytes_per_token, curve.fertility, strict=True):
        total, training = parameters(size), flops(size) / ratio
        costs.append(SizeCost(size, ratio, fertility, total - other, (total - other) / total, training, training / 3))
    return costs


def recommend(costs: Sequence[SizeCost]) -> SizeCost:
    """The smallest size whose training cost is within `TOLERANCE` of the minimum."""
    least = min(cost.training_flops_per_byte for cost in costs)
    return next(cost for cost in costs if cost.training_flops_per_byte <= (1 + TOLERANCE) * least)


def power_law_size(weights: int, width: int) -> int:
    """Vocabulary size by the power law of Tao et al., for `weights` outside the embeddings, English,
    compute-optimal data.
    """
    return int(3_145_728 * (weights / 33e6) ** 0.8354 / width)
