"""Train a text classifier that fastText can read: words and hashed n-grams of words, averaged, into a softmax.

    model = train(texts, targets, ("good", "bad"), Training())     # targets: index of each text's class
    with atomic_file("model.bin") as sink:
        model.write(sink)                                           # a standard .bin; llmkit.corpus.fasttext reads it, so does the library

What a document is: its first 1,048,576 characters as they are, neither lower-cased nor split but at whitespace. Plain stochastic gradient
descent, one document at a time, in an order shuffled for each epoch, at a rate that falls linearly to zero; one thread, so that equal input
and seed give equal bytes. Every word has a row of its own, the 2,000,000 most frequent ones at most; n-grams share a quarter as many rows
as the texts have words (a power of two, between 1,024 and 2,097,152). Few documents need many passes: epochs are 20,000 steps by default,
between 5 and 50. On 400 film reviews 20 epochs at rate 0.5 learnt nothing, neither here nor with the library; 50 at 1.0 did.

Memory: the texts, 8 bytes a word (with word_ngrams=2), and 4 * dim bytes a row. Cost: words times epochs times dim, more where the rows do not
fit the caches. Source: Joulin et al., "Bag of Tricks for Efficient Text Classification" (2017).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

from llmkit.corpus.fasttext import LONGEST, SOFTMAX, SUPERVISED, Dense, Model, Settings, make_lookup
from llmkit.corpus.kernels.fasttext import END, LABEL
from llmkit.errors import LlmkitError
from llmkit.seeds import derive

MAX_WORDS = 2_000_000
MIN_BUCKET, MAX_BUCKET = 1 << 10, 1 << 21
BLOCK = 1 << 16  # rows that are drawn at once

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Training:
    """How to train: dimensions, longest n-gram of words, passes over the texts (0: by their number), first learning rate."""

    dim: int = 64
    word_ngrams: int = 2
    epochs: int = 0
    rate: float = 1.0
    seed: int = 0

    def passes(self, documents: int) -> int:
        """Epochs over so many documents."""
        return self.epochs or min(50, max(5, -(-20_000 // documents)))


def train(
    texts: Sequence[str],
    targets: Sequence[int],
    labels: tuple[str, ...],
    how: Training,
    advance: Callable[[int], None] = lambda documents: None,
) -> Model:
    """A classifier of `texts` into `labels`; `targets[i]` is the index of the label of text i. `advance` is told of documents done."""
    documents = [np.frombuffer(text[:LONGEST].encode("utf-8", "replace"), np.uint8) for text in texts]
    words, counts = _vocabulary(documents)
    epochs, bucket = how.passes(len(texts)), 0
    if how.word_ngrams > 1:
        bucket = min(MAX_BUCKET, max(MIN_BUCKET, 1 << (int(counts.sum()) // 4).bit_length()))
    settings = Settings(how.dim, 5, epochs, 1, 5, how.word_ngrams, SOFTMAX, SUPERVISED, bucket, 0, 0, 100, 1e-4)
    entries = words + [(LABEL + label).encode() for label in labels]
    ends = np.cumsum([len(entry) for entry in entries])
    starts = np.concatenate([[0], ends[:-1]])
    blob = np.frombuffer(b"".join(entries), np.uint8)
    lookup = make_lookup(blob, starts, ends, len(words), settings, np.empty((0, 2), np.int32), -1)
    random = np.random.RandomState(
        derive(how.seed, "classifier") % 2**32
    )  # its streams never change with numpy's version
    weights = np.empty((len(words) + bucket, how.dim), np.float32)
    for start in range(0, len(weights), BLOCK):
        block = weights[start : start + BLOCK]
        block[:] = random.uniform(-1 / how.dim, 1 / how.dim, block.shape)
    output = np.zeros((len(labels), how.dim), np.float32)
    nothing = np.empty(0, np.int32)
    counts = np.concatenate([counts, np.bincount(targets, minlength=len(labels))])
    model = Model(
        settings, lookup, counts, labels, Dense(weights), output, np.ones(len(labels), np.float32), nothing, nothing
    )

    found = [model.features(text[:LONGEST]) for text in texts]
    offsets = np.concatenate([[0], np.cumsum([len(rows) for rows in found])])
    rows, wanted = np.concatenate(found), np.asarray(targets, np.int64)
    for epoch in range(epochs):
        order = random.permutation(len(texts))
        rates = how.rate * (1 - (epoch + np.arange(len(texts)) / len(texts)) / epochs)
        descend(order, rates, rows, offsets, wanted, weights, output)
        advance(len(texts))
    if not np.isfinite(output).all():
        raise LlmkitError("training diverged", f"lower the rate, which is {how.rate:g}")
    return model


def _vocabulary(documents: Sequence[NDArray[np.uint8]]) -> tuple[list[bytes], NDArray[np.int64]]:
    """Words and their counts, the most frequent first; `</s>` before all, once a document."""
    found: Counter[bytes] = Counter()
    for data in documents:
        found.update(data.tobytes().replace(b"\0", b" ").split())
    end = END.encode()
    chosen = [(-count, word) for word, count in found.items() if word != end and not word.startswith(LABEL.encode())]
    chosen = [(-len(documents), end)] + sorted(chosen)[: MAX_WORDS - 1]
    return [word for _, word in chosen], np.array([-count for count, _ in chosen], np.int64)


@njit(cache=True, nogil=True)
def descend(order, rates, rows, offsets, targets, weights, output):  # type: ignore[no-untyped-def]
    """One epoch. rows[offsets[d] : offsets[d + 1]] are the features of document d; weights and output change in place."""
    classes, dim = output.shape
    hidden, gradient = np.empty(dim, np.float32), np.empty(dim, np.float32)
    scores = np.empty(classes, np.float32)
    for i in range(len(order)):
        document = order[i]
        first, last = offsets[document], offsets[document + 1]
        share = np.float32(1 / (last - first))
        for k in range(dim):
            hidden[k] = gradient[k] = 0
        for j in range(first, last):
            row = weights[rows[j]]
            for k in range(dim):
                hidden[k] += row[k]
        highest = np.float32(-np.inf)
        for c in range(classes):
            scores[c] = 0
            for k in range(dim):
                scores[c] += hidden[k] * share * output[c, k]
            highest = max(highest, scores[c])
        total = np.float32(0)
        for c in range(classes):
            scores[c] = np.exp(scores[c] - highest)
            total += scores[c]
        for c in range(classes):
            step = np.float32(rates[i]) * ((1 if c == targets[document] else 0) - scores[c] / total)
            for k in range(dim):
                gradient[k] += step * output[c, k]
                output[c, k] += step * hidden[k] * share
        for k in range(dim):
            gradient[k] *= share
        for j in range(first, last):
            row = weights[rows[j]]
            for k in range(dim):
                row[k] += gradient[k]


# ---- how good it is


def cross_validate(
    texts: Sequence[str],
    targets: Sequence[int],
    labels: tuple[str, ...],
    how: Training,
    folds: int,
    advance: Callable[[int], None] = lambda documents: None,
) -> Numbers:
    """Probabilities [texts, labels] of each text by a model that was trained without its fold, words of the vocabulary included."""
    part = stratify(targets, folds, how.seed)
    found = np.zeros((len(texts), len(labels)))
    for fold in range(folds):
        rest = np.flatnonzero(part != fold).tolist()
        model = train([texts[i] for i in rest], [targets[i] for i in rest], labels, how, advance)
        for i in np.flatnonzero(part == fold).tolist():
            found[i] = model.probabilities(texts[i][:LONGEST])
    return found


def stratify(targets: Sequence[int], folds: int, seed: int) -> NDArray[np.int64]:
    """Fold of each text: every class shuffled and dealt out in turn, so that folds differ by one text of a class at most."""
    random = np.random.RandomState(derive(seed, "folds") % 2**32)
    kinds, part, dealt = np.asarray(targets), np.empty(len(targets), np.int64), 0
    for kind in np.unique(kinds):
        members = random.permutation(np.flatnonzero(kinds == kind))
        part[members] = (np.arange(len(members)) + dealt) % folds
        dealt += len(members)
    return part


def wilson(right: int, of: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share by Wilson's score (1927)."""
    share, spread = right / of, z * z / of
    middle = share + spread / 2
    half = z * math.sqrt(share * (1 - share) / of + spread / of / 4)
    return max(0.0, (middle - half) / (1 + spread)), min(1.0, (middle + half) / (1 + spread))


def auc(scores: Numbers, positive: NDArray[np.bool_]) -> float:
    """Probability that a positive text scores above a negative one, ties counted half."""
    good, bad = scores[positive], np.sort(scores[~positive])
    below, up_to = np.searchsorted(bad, good, "left"), np.searchsorted(bad, good, "right")
    return float((below + up_to).sum() / (2 * len(good) * len(bad)))


def agreement(found: Numbers, targets: Sequence[int]) -> dict[str, object]:
    """How probabilities agree with the labels: share, its 95 % interval, and for two labels the area under the ROC curve."""
    wanted = np.asarray(targets)
    right = int((found.argmax(1) == wanted).sum())
    result: dict[str, object] = {"agreement": right / len(wanted), "interval": wilson(right, len(wanted))}
    return result | ({"auc": auc(found[:, 0], wanted == 0)} if found.shape[1] == 2 else {})
