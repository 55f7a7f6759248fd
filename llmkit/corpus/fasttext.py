"""fastText classifiers: read supervised `.bin` and quantised `.ftz` files, and predict the same as the fastText
library.

    model = load("lid.176.ftz")
    model.predict("Der Hund schläft.", k=2)      # [("de", 0.99...), ("en", 0.00...)]: labels without `__label__`

A text is UTF-8 bytes split at ASCII whitespace and NUL; line ends are spaces, and `</s>` follows the last word.
Its features are rows of the input matrix: known words, character n-grams of `<word>`, and word n-grams; the
last two are FNV-1a hashes into a fixed number of rows. hidden[dim] is the mean of those rows, in float32 and in
the library's order. The scores are output[labels, dim] @ hidden, followed by a softmax, a sigmoid per label
(one-vs-all and negative sampling, with the library's table of 512 steps), or the Huffman tree of the labels'
counts. As in the library, 1e-5 is added to each probability, and a word `</s>` in the text ends it.

Nothing in a file is executed, and every length is checked against the size of the file before anything is
allocated. Dense matrices stay in the file, memory-mapped. Memory for a text: some 40 times its bytes. Speed
compared with the library: tests/bench/language.md.

Format: magic 793712314, version 12 (11: no character n-grams); 12 int32 and one double of hyperparameters;
dictionary; input and output matrix. Source: Joulin et al., "Bag of Tricks for Efficient Text Classification"
(2017) and "FastText.zip" (2016); the file layout is that of the library.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from os import PathLike
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmkit.corpus.kernels.fasttext import (
    END,
    END_HASH,
    LABEL,
    average_codes,
    average_rows,
    entries,
    features,
    find,
    index,
    index_pairs,
    products,
    tree_scores,
)
from llmkit.errors import LlmkitError

MAGIC, VERSION = 793712314, 12
HIERARCHICAL, NEGATIVE, SOFTMAX, ONE_VS_ALL = 1, 2, 3, 4
SUPERVISED = 3
LONGEST = 1 << 20  # characters of a text that the filters and the trainer read
MAX_DIM, MAX_NGRAM = 1 << 16, 32  # more than that is an attack rather than a model
MAX_BUCKET = 1 << 28  # of a pruned model, whose file contains fewer rows than that
MAX_OUTPUT = 1 << 28  # numbers in a quantised output matrix, which is unpacked
MAX_COUNT = 10**15
CODES = 256  # centroids of a product quantiser
HINT = "the file is damaged or not a fastText model"

Rows = NDArray[np.int32]
Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


class Hyperparameters(NamedTuple):
    """The training hyperparameters in a model file, in the order of the file."""

    dim: int
    window: int
    epochs: int
    min_count: int
    negatives: int
    word_ngrams: int
    loss: int
    kind: int
    bucket: int
    min_n: int
    max_n: int
    rate_updates: int
    threshold: float


HYPERPARAMETERS = struct.Struct("<12id")


class Lookup(NamedTuple):
    """The dictionary in the form that the kernel `features` reads.

    Entries (words, then labels) are blob[starts:ends] with 32-bit `hashes`; `table` finds them by hash, with
    open addressing and -1 in free slots. `keys` and `values` do the same for the n-gram rows that are left
    after pruning, and `kept_bits` marks their buckets (all three empty: not pruned). `end` is the row of
    `</s>`, or -1. bucket = 0: no n-grams.
    """

    blob: Bytes
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    hashes: NDArray[np.uint32]
    table: Rows
    kept_bits: Bytes
    keys: Rows
    values: Rows
    words: int
    end: int
    min_n: int
    max_n: int
    word_ngrams: int
    bucket: int


class Dense(NamedTuple):
    """A matrix of float32 [rows, dim]."""

    values: Floats

    def average(self, rows: Rows) -> Floats:
        """Mean of some rows, [dim]."""
        return average_rows(rows, self.values)  # type: ignore[no-any-return]


class Quantised(NamedTuple):
    """A product-quantised matrix.

    codes [rows, parts], centroids [parts, 256, part] (the last part padded), norms [rows] (empty: all 1).
    """

    codes: Bytes
    centroids: Floats
    norms: Floats
    dim: int

    def average(self, rows: Rows) -> Floats:
        """Mean of some rows, [dim]."""
        return average_codes(rows, *self)  # type: ignore[no-any-return]

    def unpack(self) -> tuple[Floats, Floats]:
        """The whole matrix as float32 [rows, dim], and the scale of each row, [rows]."""
        parts = np.arange(self.codes.shape[1])
        values = self.centroids[parts, self.codes].reshape(len(self.codes), -1)[:, : self.dim]
        return np.ascontiguousarray(values), self.norms if len(self.norms) else np.ones(len(values), np.float32)


@dataclass(frozen=True)
class Model:
    """A classifier: `labels` in the order of the output matrix, without `__label__`; `counts` of dictionary entries."""

    hyperparameters: Hyperparameters
    lookup: Lookup
    counts: NDArray[np.int64]
    labels: tuple[str, ...]
    input: Dense | Quantised
    output: Floats
    scale: Floats  # of each row of the output matrix, applied after its product as in the library
    left: Rows  # children of the inner nodes of the Huffman tree; empty for the other losses
    right: Rows
    path: str = ""

    def features(self, text: str) -> Rows:
        """Rows of the input matrix for a text, in the library's order, with repetitions."""
        data = np.frombuffer(text.encode("utf-8", "replace"), np.uint8)
        return features(data, *self.lookup)  # type: ignore[no-any-return]

    def probabilities(self, text: str) -> Floats:
        """Probability of each label plus 1e-5; all zero for a text without features."""
        rows = self.features(text)
        if not len(rows):
            return np.zeros(len(self.labels), np.float32)
        hidden = self.input.average(rows)
        if self.hyperparameters.loss == HIERARCHICAL:
            return np.exp(self._finite(tree_scores(hidden, self.output, self.scale, self.left, self.right)))
        scores = self._finite(products(hidden, self.output, self.scale))
        if self.hyperparameters.loss == SOFTMAX:
            scores = np.exp(scores - scores.max())
            scores /= scores.sum()
        else:
            steps = np.clip((scores + 8) * np.float32(32), 0, 512).astype(np.int32)
            scores = np.where(scores < -8, np.float32(0), np.where(scores > 8, np.float32(1), SIGMOID[steps]))
        return np.asarray(scores + np.float32(1e-5))

    def _finite(self, scores: Floats) -> Floats:
        if not np.isfinite(scores).all():
            raise LlmkitError(f"{self.path or 'the model'}: its weights are not finite", HINT)
        return scores

    def predict(self, text: str, k: int = 1, threshold: float = 0.0) -> list[tuple[str, float]]:
        """The `k` most probable labels with their probabilities, best first, without those below `threshold`.

        The list is empty for a text without features. Of equally probable labels the later one comes first, as
        in the library for k = 1.
        """
        probabilities = self.probabilities(text)
        if not probabilities.any():
            return []
        negated = -probabilities[::-1]
        order = [int(negated.argmin())] if k == 1 else np.argsort(negated, kind="stable")[:k].tolist()
        order = [len(probabilities) - 1 - i for i in order]
        return [
            (self.labels[i], float(probabilities[i])) for i in order if probabilities[i] >= np.float32(threshold + 1e-5)
        ]

    def write(self, sink: BinaryIO) -> None:
        """Write the model as a `.bin` file of version 12. Only for dense, unpruned models."""
        assert isinstance(self.input, Dense) and not len(self.lookup.keys)
        sink.write(struct.pack("<ii", MAGIC, VERSION) + HYPERPARAMETERS.pack(*self.hyperparameters))
        words, size = self.lookup.words, len(self.counts)
        sink.write(struct.pack("<3i2q", size, words, size - words, int(self.counts.sum()), -1))
        blob, starts, ends = self.lookup.blob, self.lookup.starts, self.lookup.ends
        for i in range(size):
            sink.write(blob[starts[i] : ends[i]].tobytes() + struct.pack("<xqb", int(self.counts[i]), i >= words))
        for matrix in (self.input.values, self.output):
            sink.write(struct.pack("<?2q", False, *matrix.shape))
            sink.write(np.ascontiguousarray(matrix, "<f4").data)


SIGMOID = (1 / (1 + np.exp(8 - np.arange(513) / 32.0))).astype(np.float32)


# ---- reading


class _ModelFile:
    """A file's bytes with a read position; every read checks first that the file is long enough."""

    def __init__(self, path: str) -> None:
        try:
            with open(path, "rb") as file:
                self.data = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        except OSError as error:
            raise LlmkitError(f"{path}: cannot read the model ({error.strerror})", "check the path") from error
        except ValueError as error:  # an empty file cannot be mapped
            raise LlmkitError(f"{path}: not a fastText model (the file is empty)", HINT) from error
        self.path = path
        self.position = 0

    def require(self, valid: bool, problem: str) -> None:
        if not valid:
            raise LlmkitError(f"{self.path}: not a readable fastText model ({problem})", HINT)

    def array(self, kind: Any, count: int, what: str) -> NDArray[Any]:
        size = np.dtype(kind).itemsize
        self.require(0 <= count <= (len(self.data) - self.position) // size, f"{what} reach beyond the end of the file")
        values = np.frombuffer(self.data.data, kind, count, self.position)
        self.position += count * size
        return values

    def numbers(self, form: str, what: str) -> tuple[Any, ...]:
        return struct.unpack(form, self.array(np.uint8, struct.calcsize(form), what).tobytes())


def load(path: str | PathLike[str]) -> Model:
    """The supervised model in a `.bin` or `.ftz` file. Raises LlmkitError with the reason if the file is invalid."""
    file = _ModelFile(str(path))
    magic, version = file.numbers("<ii", "its first bytes") if len(file.data) >= 8 else (0, 0)
    file.require(magic == MAGIC, "it does not begin like one")
    file.require(version in (11, VERSION), f"version {version}; versions 11 and 12 are supported")
    hyperparameters = Hyperparameters(*file.numbers(HYPERPARAMETERS.format, "the hyperparameters"))
    if version == 11:  # supervised models had no character n-grams then
        hyperparameters = hyperparameters._replace(max_n=0)
    if hyperparameters.kind in (1, 2):
        kind = ("cbow", "skipgram")[hyperparameters.kind - 1]
        raise LlmkitError(f"{path}: word vectors ({kind}), not a classifier", "a supervised model is needed")
    file.require(hyperparameters.kind == SUPERVISED, f"unknown model kind {hyperparameters.kind}")
    file.require(HIERARCHICAL <= hyperparameters.loss <= ONE_VS_ALL, f"unknown loss {hyperparameters.loss}")
    file.require(0 < hyperparameters.dim <= MAX_DIM, f"{hyperparameters.dim} dimensions")
    file.require(
        max(hyperparameters[5], hyperparameters.min_n, hyperparameters.max_n) <= MAX_NGRAM, "implausibly long n-grams"
    )
    file.require(hyperparameters.bucket >= 0, f"{hyperparameters.bucket} rows for n-grams")

    lookup, counts, labels, pruned = _dictionary(file, hyperparameters)
    (quantised,) = file.numbers("<?", "the input matrix")
    file.require(quantised or pruned < 0, "pruned but not quantised: from a library version before 2017")
    matrix = _quantised(file, hyperparameters.dim) if quantised else _dense(file, hyperparameters.dim)
    if isinstance(matrix, Quantised) and matrix.codes.shape[0] * hyperparameters.dim <= 1 << 24:
        values, norms = matrix.unpack()
        matrix = Dense(values * norms[:, None])
    rows = len(matrix[0])
    ngram_rows = int(lookup.values.max(initial=-1)) + 1 if pruned >= 0 else lookup.bucket
    file.require(rows >= lookup.words + ngram_rows, f"{rows} rows of the input matrix are too few")
    (quantised_output,) = file.numbers("<?", "the output matrix")
    if quantised and quantised_output:
        packed = _quantised(file, hyperparameters.dim)
        file.require(packed.codes.shape[0] * hyperparameters.dim <= MAX_OUTPUT, "an implausibly large output matrix")
        output, scale = packed.unpack()
    else:
        output = _dense(file, hyperparameters.dim).values.copy()
        scale = np.ones(len(output), np.float32)
    file.require(len(output) == len(labels), f"{len(output)} rows of the output matrix for {len(labels)} labels")
    tree = _huffman(counts[lookup.words :]) if hyperparameters.loss == HIERARCHICAL else np.empty((2, 0), np.int32)
    return Model(hyperparameters, lookup, counts, labels, matrix, output, scale, tree[0], tree[1], str(path))


def _dictionary(
    file: _ModelFile, hyperparameters: Hyperparameters
) -> tuple[Lookup, NDArray[np.int64], tuple[str, ...], int]:
    """Lookup, counts of all entries, labels, and number of n-gram rows left after pruning (-1: not pruned)."""
    size, words, n_labels, _, pruned = file.numbers("<3i2q", "the dictionary")
    file.require(
        min(words, n_labels) >= 0 and words + n_labels == size, f"{words} words and {n_labels} labels of {size}"
    )
    file.require(n_labels > 0, "no labels")
    file.require(size <= (len(file.data) - file.position) // 10, "the dictionary reaches beyond the end of the file")
    starts, ends, counts, kinds, stop = entries(file.data, file.position, size)
    file.require(stop >= 0, "the dictionary reaches beyond the end of the file")
    file.require(not kinds[:words].any() and bool((kinds[words:] == 1).all()), "words and labels out of order")
    file.require(bool((counts >= 0).all() and (counts < MAX_COUNT).all()), "negative or implausible counts")
    start, file.position = file.position, stop
    pairs = file.array("<i4", 2 * max(0, pruned), "the rows left after pruning").reshape(-1, 2).astype(np.int32)
    file.require(not len(pairs) or pairs.min() >= 0, "negative rows")
    file.require(
        pruned < 1 or pairs[:, 0].max() < hyperparameters.bucket <= MAX_BUCKET, "n-grams beyond the rows for them"
    )
    blob = file.data[start:stop]
    labels = tuple(
        blob[starts[i] - start : ends[i] - start].tobytes().decode("utf-8", "replace").removeprefix(LABEL)
        for i in range(words, size)
    )
    lookup = make_lookup(blob, starts - start, ends - start, words, hyperparameters, pairs, pruned)
    return lookup, counts, labels, pruned


def make_lookup(
    blob: Bytes,
    starts: NDArray[np.int64],
    ends: NDArray[np.int64],
    words: int,
    hyperparameters: Hyperparameters,
    pairs: Rows,
    pruned: int,
) -> Lookup:
    """Tables of the entries blob[starts:ends], the first `words` of which are words, and of (n-gram, row) `pairs`."""
    hashes, table = index(blob, starts, ends, _table_size(len(starts)))
    keys, values = np.empty(0, np.int32), np.empty(0, np.int32)
    kept_bits = np.zeros(0, np.uint8)
    if pruned > 0:
        keys, values = index_pairs(pairs, _table_size(len(pairs)))
        kept_bits = np.zeros(hyperparameters.bucket // 8 + 1, np.uint8)
        np.bitwise_or.at(kept_bits, pairs[:, 0] >> 3, np.uint8(1) << (pairs[:, 0] & 7).astype(np.uint8))
    end = find(np.frombuffer(END.encode(), np.uint8), END_HASH, blob, starts, ends, hashes, table)
    return Lookup(
        blob, starts, ends, hashes, table, kept_bits, keys, values, words, end if end < words else -1,
        hyperparameters.min_n, hyperparameters.max_n, hyperparameters.word_ngrams,
        hyperparameters.bucket if pruned and (hyperparameters.max_n > 0 or hyperparameters.word_ngrams > 1) else 0,
    )  # fmt: skip


def _table_size(entry_count: int) -> int:
    """Number of slots in a table: a power of two, at least twice the entries."""
    return 1 << (2 * entry_count + 1).bit_length()


def _huffman(counts: NDArray[np.int64]) -> Rows:
    """[2, labels - 1]: left and right child of each inner node of the labels' Huffman tree, the root last.

    Nodes below len(counts) are labels.
    """
    weights, children = counts.tolist(), []
    leaf, node = len(weights) - 1, len(weights)
    for _ in range(len(weights) - 1):
        pair = []
        for _ in range(2):
            if leaf >= 0 and weights[leaf] < (weights[node] if node < len(weights) else MAX_COUNT):
                pair.append(leaf)
                leaf -= 1
            else:
                pair.append(node)
                node += 1
        children.append(pair)
        weights.append(weights[pair[0]] + weights[pair[1]])
    return np.array(children, np.int32).reshape(-1, 2).T.copy()


def _dense(file: _ModelFile, dim: int) -> Dense:
    rows, columns = file.numbers("<2q", "a matrix")
    file.require(columns == dim and rows > 0, f"a matrix of {rows} by {columns} numbers, for {dim} dimensions")
    return Dense(file.array("<f4", rows * columns, "the numbers of a matrix").reshape(rows, columns))


def _quantised(file: _ModelFile, dim: int) -> Quantised:
    with_norms, rows, columns, size = file.numbers("<?2qi", "a matrix")
    file.require(columns == dim and rows > 0, f"a matrix of {rows} by {columns} numbers, for {dim} dimensions")
    codes = file.array(np.uint8, size, "the codes of a matrix")
    centroids = _centroids(file, dim)
    file.require(size == rows * len(centroids), f"{size} codes for {rows} rows of {len(centroids)}")
    norms = np.empty(0, np.float32)
    if with_norms:
        norm_codes = file.array(np.uint8, rows, "the norms of a matrix")
        norms = _centroids(file, 1)[0, norm_codes, 0]
    return Quantised(codes.reshape(rows, -1), centroids, norms, dim)


def _centroids(file: _ModelFile, dim: int) -> Floats:
    """Centroids of a product quantiser, [parts, 256, part]; a shorter last part is padded with zeros."""
    quantizer_dim, parts, part, last = file.numbers("<4i", "a quantiser")
    valid = quantizer_dim == dim and 0 < part <= dim and parts == -(-dim // part) and last == dim - part * (parts - 1)
    file.require(valid, f"a quantiser of {quantizer_dim} dimensions in {parts} parts of {part}, the last of {last}")
    flat = file.array("<f4", dim * CODES, "the centroids of a quantiser")
    full = (parts - 1) * CODES * part
    centroids = np.zeros((parts, CODES, part), np.float32)
    centroids[:-1] = flat[:full].reshape(parts - 1, CODES, part)
    centroids[-1, :, :last] = flat[full:].reshape(CODES, last)
    return centroids
