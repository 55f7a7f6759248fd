"""fastText classifiers: read supervised `.bin` and quantised `.ftz` files, and say of a text what the library says.

    model = load("lid.176.ftz")
    model.predict("Der Hund schläft.", k=2)      # [("de", 0.99...), ("en", 0.00...)]: labels without `__label__`

A text is bytes of UTF-8 cut at ASCII whitespace and NUL; line ends are spaces, and behind the last word comes `</s>`. Its features are rows of
the input matrix: known words, character n-grams of `<word>`, n-grams of words; the last two by FNV-1a hashes into a fixed number of rows.
hidden[dim] is the mean of those rows, in float32 and in the library's order; the scores are output[labels, dim] @ hidden, through softmax,
a sigmoid for each label (one-vs-all and negative sampling, by the library's table of 512 steps), or the Huffman tree of the labels' counts.
As in the library 1e-5 is added to each probability, and a word `</s>` in the text ends it.

Nothing in a file is executed, and every length is compared with the size of the file before anything is allocated. Dense matrices stay in the
file, mapped. Speed beside the library's: tests/bench/language.md;
memory for a text of some 40 times its bytes.
Format: magic 793712314, version 12 (11: no character n-grams); 12 int32 and one double of settings; dictionary; input, output matrix.
Source: Joulin et al., "Bag of Tricks for Efficient Text Classification" (2017) and "FastText.zip" (2016); the layout is the library's own.
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
LONGEST = 1 << 20  # characters of a text that the filters and the trainer look at
MAX_DIM, MAX_NGRAM = 1 << 16, 32  # more is no model but an attack
MAX_BUCKET = 1 << 28  # of a pruned model, whose file does not hold as many rows
MAX_OUTPUT = 1 << 28  # numbers in a quantised output matrix, which is unpacked
MAX_COUNT = 10**15
CODES = 256  # centroids of a product quantiser
HINT = "the file is damaged, or no model of fastText"

Rows = NDArray[np.int32]
Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


class Settings(NamedTuple):
    """What a model file says of its training, in the order of the file."""

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


SETTINGS = struct.Struct("<12id")


class Lookup(NamedTuple):
    """The dictionary as `features` reads it.

    Entries (words, then labels) are blob[starts:ends] with 32-bit `hashes`; `table` holds them by hash, open addressing, -1 where free. So do
    `keys` and `values` the n-gram rows that pruning left (both empty: not pruned). `end` is the row of `</s>`, or -1. bucket = 0: no n-grams.
    """

    blob: Bytes
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    hashes: NDArray[np.uint32]
    table: Rows
    left: Bytes
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
    """A product-quantised matrix: codes [rows, parts], centroids [parts, 256, part] (the last part padded), norms [rows] (empty: all 1)."""

    codes: Bytes
    centroids: Floats
    norms: Floats
    dim: int

    def average(self, rows: Rows) -> Floats:
        """Mean of some rows, [dim]."""
        return average_codes(rows, *self)  # type: ignore[no-any-return]

    def unpack(self) -> tuple[Floats, Floats]:
        """The whole matrix as float32 [rows, dim] and what to multiply each row by, [rows]."""
        parts = np.arange(self.codes.shape[1])
        values = self.centroids[parts, self.codes].reshape(len(self.codes), -1)[:, : self.dim]
        return np.ascontiguousarray(values), self.norms if len(self.norms) else np.ones(len(values), np.float32)


@dataclass(frozen=True)
class Model:
    """A classifier: `labels` in the order of the output matrix, without `__label__`; `counts` of all entries of the dictionary."""

    settings: Settings
    lookup: Lookup
    counts: NDArray[np.int64]
    labels: tuple[str, ...]
    input: Dense | Quantised
    output: Floats
    scale: Floats  # of each row of the output matrix, applied behind its product as the library does
    left: Rows  # Huffman tree, of the inner nodes; empty for the other losses
    right: Rows
    path: str = ""

    def features(self, text: str) -> Rows:
        """Rows of the input matrix that a text stands for, in the library's order, repeated as they occur."""
        data = np.frombuffer(text.encode("utf-8", "replace"), np.uint8)
        return features(data, *self.lookup)  # type: ignore[no-any-return]

    def probabilities(self, text: str) -> Floats:
        """Probability of each label plus 1e-5; all zero for a text without features."""
        rows = self.features(text)
        if not len(rows):
            return np.zeros(len(self.labels), np.float32)
        hidden = self.input.average(rows)
        if self.settings.loss == HIERARCHICAL:
            return np.exp(self._finite(tree_scores(hidden, self.output, self.scale, self.left, self.right)))
        scores = self._finite(products(hidden, self.output, self.scale))
        if self.settings.loss == SOFTMAX:
            scores = np.exp(scores - scores.max())
            scores /= scores.sum()
        else:
            steps = np.clip((scores + 8) * np.float32(32), 0, 512).astype(np.int32)
            scores = np.where(scores < -8, np.float32(0), np.where(scores > 8, np.float32(1), SIGMOID[steps]))
        return np.asarray(scores + np.float32(1e-5))

    def _finite(self, scores: Floats) -> Floats:
        if not np.isfinite(scores).all():
            raise LlmkitError(f"{self.path or 'the model'}: its weights are no finite numbers", HINT)
        return scores

    def predict(self, text: str, k: int = 1, threshold: float = 0.0) -> list[tuple[str, float]]:
        """The `k` most probable labels with their probabilities, best first, those below `threshold` left out; none for a text without features.

        Of equal ones the later label comes first, as in the library for k = 1.
        """
        found = self.probabilities(text)
        if not found.any():
            return []
        backwards = -found[::-1]
        order = [int(backwards.argmin())] if k == 1 else np.argsort(backwards, kind="stable")[:k].tolist()
        order = [len(found) - 1 - i for i in order]
        return [(self.labels[i], float(found[i])) for i in order if found[i] >= np.float32(threshold + 1e-5)]

    def write(self, sink: BinaryIO) -> None:
        """The model as a `.bin` file of version 12. Of dense, unpruned models alone."""
        assert isinstance(self.input, Dense) and not len(self.lookup.keys)
        sink.write(struct.pack("<ii", MAGIC, VERSION) + SETTINGS.pack(*self.settings))
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


class _File:
    """A file's bytes with a position; whatever is taken was first found to be there."""

    def __init__(self, path: str) -> None:
        try:
            with open(path, "rb") as file:
                self.data = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        except OSError as error:
            raise LlmkitError(f"{path}: cannot read the model ({error.strerror})", "check the path") from error
        except ValueError as error:  # an empty file cannot be mapped
            raise LlmkitError(f"{path}: not a fastText model (the file is empty)", HINT) from error
        self.path = path
        self.at = 0

    def need(self, sound: bool, wrong: str) -> None:
        if not sound:
            raise LlmkitError(f"{self.path}: not a readable fastText model ({wrong})", HINT)

    def array(self, kind: Any, count: int, what: str) -> NDArray[Any]:
        size = np.dtype(kind).itemsize
        self.need(0 <= count <= (len(self.data) - self.at) // size, f"{what} reach beyond the end of the file")
        found = np.frombuffer(self.data.data, kind, count, self.at)
        self.at += count * size
        return found

    def numbers(self, form: str, what: str) -> tuple[Any, ...]:
        return struct.unpack(form, self.array(np.uint8, struct.calcsize(form), what).tobytes())


def load(path: str | PathLike[str]) -> Model:
    """The supervised model in a `.bin` or `.ftz` file. LlmkitError saying what is wrong where it is none."""
    file = _File(str(path))
    magic, version = file.numbers("<ii", "its first bytes") if len(file.data) >= 8 else (0, 0)
    file.need(magic == MAGIC, "it does not begin as one")
    file.need(version in (11, VERSION), f"version {version}; 11 and 12 are known")
    settings = Settings(*file.numbers(SETTINGS.format, "the settings"))
    if version == 11:  # supervised models had no character n-grams then
        settings = settings._replace(max_n=0)
    if settings.kind in (1, 2):
        kind = ("cbow", "skipgram")[settings.kind - 1]
        raise LlmkitError(f"{path}: word vectors ({kind}), not a classifier", "a supervised model is needed")
    file.need(settings.kind == SUPERVISED, f"unknown kind of model {settings.kind}")
    file.need(HIERARCHICAL <= settings.loss <= ONE_VS_ALL, f"unknown loss {settings.loss}")
    file.need(0 < settings.dim <= MAX_DIM, f"{settings.dim} dimensions")
    file.need(max(settings[5], settings.min_n, settings.max_n) <= MAX_NGRAM, "n-grams of absurd length")
    file.need(settings.bucket >= 0, f"{settings.bucket} rows for n-grams")

    lookup, counts, labels, pruned = _dictionary(file, settings)
    (quantised,) = file.numbers("<?", "the input matrix")
    file.need(quantised or pruned < 0, "pruned, but not quantised: of a library before 2017")
    matrix = _quantised(file, settings.dim) if quantised else _dense(file, settings.dim)
    if isinstance(matrix, Quantised) and matrix.codes.shape[0] * settings.dim <= 1 << 24:
        values, norms = matrix.unpack()
        matrix = Dense(values * norms[:, None])
    rows = len(matrix[0])
    left = int(lookup.values.max(initial=-1)) + 1 if pruned >= 0 else lookup.bucket
    file.need(rows >= lookup.words + left, f"{rows} rows of the input matrix are too few")
    (quantised_output,) = file.numbers("<?", "the output matrix")
    if quantised and quantised_output:
        packed = _quantised(file, settings.dim)
        file.need(packed.codes.shape[0] * settings.dim <= MAX_OUTPUT, "an output matrix of absurd size")
        output, scale = packed.unpack()
    else:
        output = _dense(file, settings.dim).values.copy()
        scale = np.ones(len(output), np.float32)
    file.need(len(output) == len(labels), f"{len(output)} rows of the output matrix for {len(labels)} labels")
    tree = _huffman(counts[lookup.words :]) if settings.loss == HIERARCHICAL else np.empty((2, 0), np.int32)
    return Model(settings, lookup, counts, labels, matrix, output, scale, tree[0], tree[1], str(path))


def _dictionary(file: _File, settings: Settings) -> tuple[Lookup, NDArray[np.int64], tuple[str, ...], int]:
    """Lookup, counts of all entries, labels, and how many n-gram rows are left (-1: not pruned)."""
    size, words, n_labels, _, pruned = file.numbers("<3i2q", "the dictionary")
    file.need(min(words, n_labels) >= 0 and words + n_labels == size, f"{words} words and {n_labels} labels of {size}")
    file.need(n_labels > 0, "no labels")
    file.need(size <= (len(file.data) - file.at) // 10, "the dictionary reaches beyond the end of the file")
    starts, ends, counts, kinds, stop = entries(file.data, file.at, size)
    file.need(stop >= 0, "the dictionary reaches beyond the end of the file")
    file.need(not kinds[:words].any() and bool((kinds[words:] == 1).all()), "words and labels out of order")
    file.need(bool((counts >= 0).all() and (counts < MAX_COUNT).all()), "counts below zero or absurd")
    start, file.at = file.at, stop
    pairs = file.array("<i4", 2 * max(0, pruned), "the rows that pruning left").reshape(-1, 2).astype(np.int32)
    file.need(not len(pairs) or pairs.min() >= 0, "rows below zero")
    file.need(pruned < 1 or pairs[:, 0].max() < settings.bucket <= MAX_BUCKET, "n-grams beyond the rows for them")
    blob = file.data[start:stop]
    labels = tuple(
        blob[starts[i] - start : ends[i] - start].tobytes().decode("utf-8", "replace").removeprefix(LABEL)
        for i in range(words, size)
    )
    lookup = make_lookup(blob, starts - start, ends - start, words, settings, pairs, pruned)
    return lookup, counts, labels, pruned


def make_lookup(
    blob: Bytes,
    starts: NDArray[np.int64],
    ends: NDArray[np.int64],
    words: int,
    settings: Settings,
    pairs: Rows,
    pruned: int,
) -> Lookup:
    """Tables of the entries blob[starts:ends], of which the first `words` are words, and of the (n-gram, row) `pairs`."""
    hashes, table = index(blob, starts, ends, _room(len(starts)))
    keys, values = np.empty(0, np.int32), np.empty(0, np.int32)
    left = np.zeros(0, np.uint8)
    if pruned > 0:
        keys, values = index_pairs(pairs, _room(len(pairs)))
        left = np.zeros(settings.bucket // 8 + 1, np.uint8)
        np.bitwise_or.at(left, pairs[:, 0] >> 3, np.uint8(1) << (pairs[:, 0] & 7).astype(np.uint8))
    end = find(np.frombuffer(END.encode(), np.uint8), END_HASH, blob, starts, ends, hashes, table)
    return Lookup(
        blob, starts, ends, hashes, table, left, keys, values, words, end if end < words else -1,
        settings.min_n, settings.max_n, settings.word_ngrams,
        settings.bucket if pruned and (settings.max_n > 0 or settings.word_ngrams > 1) else 0,
    )  # fmt: skip


def _room(entries: int) -> int:
    """Slots of a table: a power of two, at least twice the entries."""
    return 1 << (2 * entries + 1).bit_length()


def _huffman(counts: NDArray[np.int64]) -> Rows:
    """[2, labels - 1]: left and right child of each inner node of the labels' Huffman tree, the root last. Nodes below len(counts) are labels."""
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


def _dense(file: _File, dim: int) -> Dense:
    rows, columns = file.numbers("<2q", "a matrix")
    file.need(columns == dim and rows > 0, f"a matrix of {rows} by {columns} numbers, for {dim} dimensions")
    return Dense(file.array("<f4", rows * columns, "the numbers of a matrix").reshape(rows, columns))


def _quantised(file: _File, dim: int) -> Quantised:
    with_norms, rows, columns, size = file.numbers("<?2qi", "a matrix")
    file.need(columns == dim and rows > 0, f"a matrix of {rows} by {columns} numbers, for {dim} dimensions")
    codes = file.array(np.uint8, size, "the codes of a matrix")
    centroids = _centroids(file, dim)
    file.need(size == rows * len(centroids), f"{size} codes for {rows} rows of {len(centroids)}")
    norms = np.empty(0, np.float32)
    if with_norms:
        norm_codes = file.array(np.uint8, rows, "the norms of a matrix")
        norms = _centroids(file, 1)[0, norm_codes, 0]
    return Quantised(codes.reshape(rows, -1), centroids, norms, dim)


def _centroids(file: _File, dim: int) -> Floats:
    """Centroids of a product quantiser, [parts, 256, part]; a shorter last part is padded with zeros."""
    found, parts, part, last = file.numbers("<4i", "a quantiser")
    sound = found == dim and part > 0 and parts == -(-dim // part) and last == dim - part * (parts - 1)
    file.need(sound, f"a quantiser of {found} dimensions in {parts} parts of {part}, the last of {last}")
    flat = file.array("<f4", dim * CODES, "the centroids of a quantiser")
    full = (parts - 1) * CODES * part
    centroids = np.zeros((parts, CODES, part), np.float32)
    centroids[:-1] = flat[:full].reshape(parts - 1, CODES, part)
    centroids[-1, :, :last] = flat[full:].reshape(CODES, last)
    return centroids
