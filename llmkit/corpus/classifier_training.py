"""Train a text classifier in fastText's format: averaged embeddings of words and hashed word n-grams, then a softmax.

    model = train(texts, targets, ("good", "bad"), ClassifierOptions())  # targets: index of each text's class
    with atomic_file("model.bin") as sink:
        model.write(sink)  # a standard .bin, readable by llmkit.corpus.fasttext and by the fastText library

A document is its first 1,048,576 characters, not lower-cased and split at whitespace only. Training is plain
stochastic gradient descent, one document at a time, in an order shuffled for each epoch, with a learning rate
that falls linearly to zero. It uses one thread, so that equal input and seed give equal bytes. Every word has a
row of its own, up to the 2,000,000 most frequent ones; n-grams share a quarter as many rows as the texts have
words (a power of two, between 1,024 and 2,097,152). Few documents need many epochs: the default is the number
that makes 20,000 steps, but between 5 and 50. On 400 film reviews, 20 epochs at rate 0.5 learnt nothing,
neither here nor with the library; 50 epochs at rate 1.0 did.

Memory: the texts, 8 bytes per word (with word_ngrams=2), and 4 * dim bytes per row. Cost: words times epochs
times dim, more where the rows do not fit the caches. Source: Joulin et al., "Bag of Tricks for Efficient Text
Classification" (2017).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

from llmkit.corpus.fasttext import LONGEST, SOFTMAX, SUPERVISED, Dense, Hyperparameters, Model, make_lookup
from llmkit.corpus.kernels.fasttext import END, LABEL
from llmkit.errors import LlmkitError
from llmkit.seeds import derive

MAX_WORDS = 2_000_000
MIN_BUCKET, MAX_BUCKET = 1 << 10, 1 << 21
BLOCK = 1 << 16  # rows initialised at once

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class ClassifierOptions:
    """Training options: dimensions, longest word n-gram, epochs (0: by the number of texts), initial learning rate."""

    dim: int = 64
    word_ngrams: int = 2
    epochs: int = 0
    rate: float = 1.0
    seed: int = 0

    def epochs_for(self, documents: int) -> int:
        """Number of epochs for this many documents."""
        return self.epochs or min(50, max(5, -(-20_000 // documents)))


def train(
    texts: Sequence[str],
    targets: Sequence[int],
    labels: tuple[str, ...],
    options: ClassifierOptions,
    advance: Callable[[int], None] = lambda documents: None,
) -> Model:
    """A classifier of `texts` into `labels`; `targets[i]` is the index of the label of text i.

    `advance` is called with the number of documents completed since the last call. Raises LlmkitError if
    training diverges.
    """
    documents = [np.frombuffer(text[:LONGEST].encode("utf-8", "replace"), np.uint8) for text in texts]
    words, counts = _vocabulary(documents)
    epochs, buckets = options.epochs_for(len(texts)), 0
    if options.word_ngrams > 1:
        buckets = min(MAX_BUCKET, max(MIN_BUCKET, 1 << (int(counts.sum()) // 4).bit_length()))
    settings = Hyperparameters(
        options.dim, 5, epochs, 1, 5, options.word_ngrams, SOFTMAX, SUPERVISED, buckets, 0, 0, 100, 1e-4
    )
    entries = words + [(LABEL + label).encode() for label in labels]
    ends = np.cumsum([len(entry) for entry in entries])
    starts = np.concatenate([[0], ends[:-1]])
    blob = np.frombuffer(b"".join(entries), np.uint8)
    lookup = make_lookup(blob, starts, ends, len(words), settings, np.empty((0, 2), np.int32), -1)
    # The streams of RandomState do not change between versions of numpy.
    random = np.random.RandomState(derive(options.seed, "classifier") % 2**32)
    weights = np.empty((len(words) + buckets, options.dim), np.float32)
    for start in range(0, len(weights), BLOCK):
        block = weights[start : start + BLOCK]
        block[:] = random.uniform(-1 / options.dim, 1 / options.dim, block.shape)
    output = np.zeros((len(labels), options.dim), np.float32)
    empty = np.empty(0, np.int32)
    counts = np.concatenate([counts, np.bincount(targets, minlength=len(labels))])
    model = Model(
        settings, lookup, counts, labels, Dense(weights), output, np.ones(len(labels), np.float32), empty, empty
    )

    features = [model.features(text[:LONGEST]) for text in texts]
    offsets = np.concatenate([[0], np.cumsum([len(rows) for rows in features])])
    rows, target_array = np.concatenate(features), np.asarray(targets, np.int64)
    for epoch in range(epochs):
        order = random.permutation(len(texts))
        rates = options.rate * (1 - (epoch + np.arange(len(texts)) / len(texts)) / epochs)
        descend(order, rates, rows, offsets, target_array, weights, output)
        advance(len(texts))
    if not np.isfinite(output).all():
        raise LlmkitError("training diverged", f"lower the learning rate, which is {options.rate:g}")
    return model


def _vocabulary(documents: Sequence[NDArray[np.uint8]]) -> tuple[list[bytes], NDArray[np.int64]]:
    """Words and their counts, the most frequent first; `</s>`, once per document, precedes all of them."""
    word_counts: Counter[bytes] = Counter()
    for data in documents:
        word_counts.update(data.tobytes().replace(b"\0", b" ").split())
    end = END.encode()
    chosen = [
        (-count, word) for word, count in word_counts.items() if word != end and not word.startswith(LABEL.encode())
    ]
    chosen = [(-len(documents), end)] + sorted(chosen)[: MAX_WORDS - 1]
    return [word for _, word in chosen], np.array([-count for count, _ in chosen], np.int64)


@njit(cache=True, nogil=True)
def descend(order, rates, rows, offsets, targets, weights, output):  # type: ignore[no-untyped-def]
    """One epoch, which updates `weights` and `output` in place.

    rows[offsets[d] : offsets[d + 1]] are the features of document d.
    """
    classes, dim = output.shape
    hidden, gradient = np.empty(dim, np.float32), np.empty(dim, np.float32)
    scores = np.empty(classes, np.float32)
    for i in range(len(order)):
        document = order[i]
        start, stop = offsets[document], offsets[document + 1]
        scale = np.float32(1 / (stop - start))
        for k in range(dim):
            hidden[k] = gradient[k] = 0
        for j in range(start, stop):
            row = weights[rows[j]]
            for k in range(dim):
                hidden[k] += row[k]
        highest = np.float32(-np.inf)
        for c in range(classes):
            scores[c] = 0
            for k in range(dim):
                scores[c] += hidden[k] * scale * output[c, k]
            highest = max(highest, scores[c])
        total = np.float32(0)
        for c in range(classes):
            scores[c] = np.exp(scores[c] - highest)
            total += scores[c]
        for c in range(classes):
            step = np.float32(rates[i]) * ((1 if c == targets[document] else 0) - scores[c] / total)
            for k in range(dim):
                gradient[k] += step * output[c, k]
                output[c, k] += step * hidden[k] * scale
        for k in range(dim):
            gradient[k] *= scale
        for j in range(start, stop):
            row = weights[rows[j]]
            for k in range(dim):
                row[k] += gradient[k]


# ---- evaluation


def cross_validate(
    texts: Sequence[str],
    targets: Sequence[int],
    labels: tuple[str, ...],
    options: ClassifierOptions,
    folds: int,
    advance: Callable[[int], None] = lambda documents: None,
) -> Numbers:
    """Probabilities [texts, labels] for each text by a model trained without the text's fold, vocabulary included."""
    fold_of = stratify(targets, folds, options.seed)
    probabilities = np.zeros((len(texts), len(labels)))
    for fold in range(folds):
        training_set = np.flatnonzero(fold_of != fold).tolist()
        model = train([texts[i] for i in training_set], [targets[i] for i in training_set], labels, options, advance)
        for i in np.flatnonzero(fold_of == fold).tolist():
            probabilities[i] = model.probabilities(texts[i][:LONGEST])
    return probabilities


def stratify(targets: Sequence[int], folds: int, seed: int) -> NDArray[np.int64]:
    """Fold of each text. Each class is shuffled and dealt out in turn: folds differ by at most one text per class."""
    random = np.random.RandomState(derive(seed, "folds") % 2**32)
    classes, folds_of, dealt = np.asarray(targets), np.empty(len(targets), np.int64), 0
    for label in np.unique(classes):
        members = random.permutation(np.flatnonzero(classes == label))
        folds_of[members] = (np.arange(len(members)) + dealt) % folds
        dealt += len(members)
    return folds_of


def wilson(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % confidence interval of a proportion by Wilson's score (1927)."""
    share, spread = successes / trials, z * z / trials
    middle = share + spread / 2
    half = z * math.sqrt(share * (1 - share) / trials + spread / trials / 4)
    return max(0.0, (middle - half) / (1 + spread)), min(1.0, (middle + half) / (1 + spread))


def auc(scores: Numbers, positive: NDArray[np.bool_]) -> float:
    """Probability that a positive text scores higher than a negative one, counting ties as half."""
    good, bad = scores[positive], np.sort(scores[~positive])
    below, up_to = np.searchsorted(bad, good, "left"), np.searchsorted(bad, good, "right")
    return float((below + up_to).sum() / (2 * len(good) * len(bad)))


def agreement(probabilities: Numbers, targets: Sequence[int]) -> dict[str, object]:
    """Agreement with the labels: share, its 95 % interval, and for two labels the area under the ROC curve."""
    expected = np.asarray(targets)
    correct = int((probabilities.argmax(1) == expected).sum())
    result: dict[str, object] = {"agreement": correct / len(expected), "interval": wilson(correct, len(expected))}
    return result | ({"auc": auc(probabilities[:, 0], expected == 0)} if probabilities.shape[1] == 2 else {})
