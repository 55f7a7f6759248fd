"""Finds broken documents in a step: noise, or one token or phrase repeated over and over.

Text that is merely new to the model is neither.

The loss alone cannot distinguish random bytes from a language the model has never seen: both are worse than a
uniform guess. But any text has order. So pairs of neighbouring characters, and pairs of neighbouring tokens,
are counted: text in any language repeats more of them than a random permutation of the same characters does
(tests/bench/noise.md: 4 of 4,240 pieces in 532 languages are taken for noise, and 51 of 3,200 pieces of
random bytes for text). A document without such order that also costs the model far more than its neighbours
is noise. Repetition shows in how few distinct tokens a document has.

    find_broken_documents(documents, usual_losses, decode)     # for the documents of one step

Cost: a few milliseconds per document; called for spikes only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmkit.seeds import derive

MIN_SYMBOLS = 128  # tokens or characters needed for a judgement
MAX_TOKENS = 512  # tokens of a document that are examined
PERMUTATIONS = 20
ORDERED = 2.5  # standard deviations beyond a random order
OUTLYING = 4.0  # robust standard deviations of a document's loss above those of its neighbours
REPETITION_RATIO = 32  # tokens per distinct token; the most repetitive of those languages has nine
SPREAD = 1.4826
MIN_SPREAD = 0.25  # nats


@dataclass(frozen=True, slots=True)
class StepDocument:
    """A document in a step: its name, all its tokens [n], and the losses of those in the step, float32 [m]
    (NaN: not predicted)."""

    name: str
    tokens: NDArray[Any]
    losses: NDArray[np.float32]

    @property
    def loss(self) -> float:
        """Mean over the predicted tokens; NaN without any."""
        predicted = self.losses[~np.isnan(self.losses)]
        return float(predicted.mean()) if len(predicted) else float("nan")


def find_broken_documents(
    documents: Sequence[StepDocument], usual_losses: Sequence[float], decode: Callable[[list[int]], str] | None
) -> list[tuple[StepDocument, str]]:
    """The broken ones of `documents`, each with the reason.

    `usual_losses` are the losses of the documents of a good step.
    """
    finite = [loss for loss in usual_losses if np.isfinite(loss)] or [d.loss for d in documents if np.isfinite(d.loss)]
    if not finite:
        return []
    middle = median(finite)
    spread = max(SPREAD * median(abs(loss - middle) for loss in finite), MIN_SPREAD)
    broken = []
    for document in documents:
        tokens = document.tokens[:MAX_TOKENS].astype(np.int64)
        if len(tokens) < MIN_SYMBOLS:
            continue
        start = tokens[: MAX_TOKENS // 2]
        if len(np.unique(start)) * REPETITION_RATIO <= len(start):
            broken.append((document, "repetition"))
        elif document.loss > middle + OUTLYING * spread and not has_order(tokens, decode):
            broken.append((document, "noise"))
    return broken


def has_order(tokens: NDArray[np.int64], decode: Callable[[list[int]], str] | None) -> bool:
    """Whether the tokens [n], and the characters they decode to if there are enough of them, follow each
    other as in a text."""
    if order_score(tokens) < ORDERED:
        return False
    if decode is None:
        return True
    characters = np.frombuffer(decode(tokens.tolist()).encode("utf-32-le", "replace"), dtype="<u4")
    return len(characters) < MIN_SYMBOLS or order_score(characters.astype(np.int64)) >= ORDERED


def order_score(symbols: NDArray[np.int64]) -> float:
    """How many standard deviations fewer distinct neighbouring pairs `symbols` [n] have than random
    permutations of them."""
    codes = np.unique(symbols, return_inverse=True)[1].astype(np.int64)
    base = int(codes.max(initial=0)) + 1
    generator = np.random.default_rng(derive(len(codes), "order"))

    def distinct_pairs(row: NDArray[np.int64]) -> int:
        return len(np.unique(row[:-1] * base + row[1:]))

    permuted = [distinct_pairs(generator.permutation(codes)) for _ in range(PERMUTATIONS)]
    return float((np.mean(permuted) - distinct_pairs(codes)) / max(float(np.std(permuted)), 0.5))
