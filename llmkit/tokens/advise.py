"""Which size a vocabulary should have: what each size makes of held-out text, what that costs a model, and a rule that picks one.

One training at the largest size gives all smaller ones, since merges are nested: a vocabulary of V tokens is the first V, and a token of the large one
falls into the smaller one's tokens along its merges. So the held-out text is encoded once, and each token counts for as many as it
would be in each smaller vocabulary (`pieces`).

The rule. A larger vocabulary makes fewer tokens of the same text and each of them dearer: the training FLOPs a byte are 6·(N + V·d) / (bytes a token), N being
the weights outside of the embeddings, d the width, attention left out, as Tao et al. count (NeurIPS 2024, arXiv:2407.13623, approach 2); their minimum
depends on the corpus and its languages through the bytes a token. The minimum is flat, and the sizes with the lowest loss that the paper found by training
lie below it, since rows of rare tokens learn little. So the smallest size is taken whose cost is within `NEAR` of the least: with the paper's own English curve
that gives 6k, 18k and 35k for 33M, 302M and 2.87B weights, where the paper has 6k and 16k by training and 43k by its law (tests/tokens/test_advise.py). Inference costs a third of it. Beside it
stands the paper's power law, V·d = 3.1M · (N / 33M)^0.835, which knows nothing of the corpus. A merge that occurs less often than `MIN_FREQUENCY` times says
more of the sample than of the language, so sizes beyond such merges are not judged.

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
from llmkit.tokens.fertility import words
from llmkit.tokens.text_encoder import TextEncoder
from llmkit.tokens.vocabulary import BYTES, RESERVED, SPECIAL, Vocabulary

NEAR = 0.02
MIN_FREQUENCY = 10
HELD_OUT = 20  # one document in so many is kept from training, to be measured
HELD_OUT_BYTES = 8 << 20
FIXED = BYTES + len(SPECIAL) + RESERVED  # tokens that are no merges
GROUPS = 50


def sizes_up_to(largest: int) -> list[int]:
    """1,024, 1,536, 2,048, 3,072, ... up to `largest`."""
    return sorted(base << k for base in (1024, 1536) for k in range(20) if base << k <= largest)


@dataclass(slots=True)
class HeldOut:
    """Documents kept from training, and how much text there is of each kind."""

    texts: list[str] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    bytes: int = 0
    trained: int = 0  # bytes of the others

    def keeps(self, text: str, group: str) -> bool:
        """Whether this document is one of them; decided by its text. The first `HELD_OUT_BYTES` are kept."""
        data = text.encode()
        if xxhash.xxh3_64_intdigest(data) % HELD_OUT or self.bytes + len(data) > HELD_OUT_BYTES:
            self.trained += len(data)
            return False
        self.texts.append(text)
        self.groups.append(group)
        self.bytes += len(data)
        return True


@dataclass(slots=True)
class Curve:
    """Bytes a token at each size, and tokens a word by group (bytes of the group, fertility at each size)."""

    sizes: list[int]
    bytes_per_token: list[float]
    fertility: list[float]
    groups: dict[str, tuple[int, list[float]]]


def pieces(made: Vocabulary, sizes: Sequence[int]) -> NDArray[np.int32]:
    """[sizes, ids]: how many tokens each token of the vocabulary is in each smaller one."""
    model = orjson.loads(made.files["tokenizer.json"])["model"]
    ids = model["vocab"]
    found = np.ones((len(sizes), made.size), np.int32)
    limits = np.array(sizes) - FIXED
    for rank, merge in enumerate(model["merges"]):
        a, b = merge.split(" ") if isinstance(merge, str) else merge
        beyond = limits <= rank
        found[beyond, ids[a + b]] = found[beyond, ids[a]] + found[beyond, ids[b]]
    return found


def measure(made: Vocabulary, held: HeldOut, sizes: Sequence[int]) -> Curve:
    """What each of `sizes` makes of the held-out text. LlmkitError where there is none."""
    from llmkit.shards.tokenizer_info import TokenizerInfo

    if not held.texts:
        raise LlmkitError(
            "too few documents to keep any aside", f"one in {HELD_OUT} is measured: give a hundred or more"
        )
    encoder, table = TextEncoder(TokenizerInfo("", made.size, 0, files=made.files)), pieces(made, sizes)
    totals: dict[str, NDArray[np.int64]] = {}
    for text, group in zip(held.texts, held.groups, strict=True):
        ids, _ = encoder([text])
        row = np.concatenate(([len(text.encode()), len(words(text))], table[:, ids].sum(1, dtype=np.int64)))
        for name in {"", group}:
            totals[name] = totals.get(name, 0) + row
    every = totals.pop("")
    if not every[0]:
        raise LlmkitError("the documents kept aside are empty", "give more text")
    largest = sorted(totals.items(), key=lambda item: (-int(item[1][0]), item[0]))[:GROUPS]
    groups = {name: (int(row[0]), (row[2:] / max(1, row[1])).tolist()) for name, row in largest}
    return Curve(
        list(sizes), (every[0] / every[2:]).tolist(), (every[2:] / max(1, every[1])).tolist(), groups if totals else {}
    )


@dataclass(frozen=True, slots=True)
class Cost:
    """A size for one model: what it makes of text, weights in the embeddings and their share of all, FLOPs a byte in training and in use."""

    size: int
    bytes_per_token: float
    fertility: float
    embedding_parameters: int
    share: float
    training_flops_per_byte: float
    inference_flops_per_byte: float


def costs(curve: Curve, parameters: Callable[[int], int], flops: Callable[[int], int]) -> list[Cost]:
    """What each size costs a model with so many `parameters` and training `flops` a token at a size (attention left out)."""
    other = 2 * parameters(1) - parameters(2)  # they grow in a straight line
    found = []
    for size, ratio, fertility in zip(curve.sizes, curve.bytes_per_token, curve.fertility, strict=True):
        total, training = parameters(size), flops(size) / ratio
        found.append(Cost(size, ratio, fertility, total - other, (total - other) / total, training, training / 3))
    return found


def choose(found: Sequence[Cost]) -> Cost:
    """The smallest size whose training cost is within `NEAR` of the least."""
    least = min(cost.training_flops_per_byte for cost in found)
    return next(cost for cost in found if cost.training_flops_per_byte <= (1 + NEAR) * least)


def power_law(weights: int, width: int) -> int:
    """Tao et al.'s vocabulary for a model with so many `weights` outside of the embeddings: English, compute-optimal data."""
    return int(3_145_728 * (weights / 33e6) ** 0.8354 / width)
