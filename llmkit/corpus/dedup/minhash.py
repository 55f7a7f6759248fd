"""Near duplicates: documents that share most of their word 5-grams, by MinHash and locality-sensitive hashing.

1. A text is normalised (`normalise.comparable`), and each run of 5 words, or characters, becomes a shingle of 32 bits.
   Shorter texts have no shingles; they are duplicates only of texts with the same words (after the same normalisation).
2. Each of 112 random hash functions is applied to the shingles and its minimum kept: functions of 32 bits, or with
   `bits=61` of 61, modulo the prime 2⁶¹-1 over wider shingles (kernels/minhash.py). Both follow the curve below
   (tests/bench/minhash_recall.md).
3. The minima are divided into 14 bands of 8 rows. Documents equal in a band are candidates: with Jaccard similarity s,
   this happens with probability 1-(1-s⁸)¹⁴: 0.77 at 0.75, 0.92 at 0.8, 1 for equal sets.
4. A candidate is a duplicate if the true Jaccard similarity of the shingle sets reaches `threshold` (0.75, which
   FineWeb targets with these bands). Unverified, a third of such candidates are below 0.8 and a tenth below 0.7. With
   `verify=False` every candidate is a duplicate.

What is a near copy? Numbers and operators are part of the shingles, and count as much as words: another number changes
the 5 shingles around it. A page with one number edited is therefore a near copy; a table, a log or a list of exercises
with other numbers is not, nor is a function with other operators. Case, the diacritics of Latin, Greek and Cyrillic
letters, whitespace and the marks of prose outside numbers do not count, since copies often differ in them. FineWeb's
and datatrove's choice, `loose`, makes all numbers equal and drops all marks; what it removes beyond ours is measured in
tests/bench/dedup_numbers.md.

Cost: compiled; figures for both widths are in tests/bench/minhash_recall.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from llmkit.corpus.dedup.kernels.minhash import functions, sketch
from llmkit.corpus.dedup.normalise import DEFAULT, name_of, parts_of
from llmkit.errors import UsageError
from llmkit.io.documents import Document

MAX_FUNCTIONS = 112  # if the shape is chosen by the threshold
RECALL = 0.77  # of pairs whose similarity is the threshold
UNITS = ("words", "characters")


def bands_for(threshold: float) -> tuple[int, int]:
    """(bands, rows) for a similarity threshold: FineWeb's 14 x 8 at 0.75.

    The most rows with at most 112 functions that still find 77 % of the pairs right at the threshold.
    """
    shapes = ((MAX_FUNCTIONS // rows, rows) for rows in range(MAX_FUNCTIONS, 0, -1))
    return next(shape for shape in shapes if 1 - (1 - threshold ** shape[1]) ** shape[0] >= RECALL or shape[1] == 1)


class Sketches(NamedTuple):
    """The sketches of n documents.

    `same`: hash of the words, uint64 [n]. `keys`: band keys, uint64 [n, bands]. `signatures`: uint64 [n, functions].
    `shingles`: those of all documents, uint32. `sizes`: shingles per document, int64 [n].
    """

    same: NDArray[np.uint64]
    keys: NDArray[np.uint64]
    signatures: NDArray[np.uint64]
    shingles: NDArray[np.uint32]
    sizes: NDArray[np.int64]


@dataclass(frozen=True)
class MinHash:
    """Parameters: shingles of `ngram` units, `bands` x `rows` hash functions drawn from `seed`.

    Raises UsageError for values out of range, and for unknown names.
    """

    threshold: float = 0.75
    verify: bool = True
    ngram: int = 5
    bands: int = 14
    rows: int = 8
    seed: int = 0
    bits: int = 32  # width of the hash functions: 32 or 61
    unit: str = "words"  # of shingles: words or characters
    normalise: str = DEFAULT  # whitespace never counts between words

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise UsageError(f"--shingle {self.unit}", "one of: " + ", ".join(UNITS))
        parts = parts_of(self.normalise) | ({"whitespace"} if self.unit == "words" else set())
        object.__setattr__(self, "normalise", name_of(parts))
        if not 0 < self.threshold <= 1:
            raise UsageError(f"threshold {self.threshold} is not a similarity", "use a number above 0, at most 1")
        for name in ("ngram", "bands", "rows"):
            if not 1 <= getattr(self, name) <= 512:
                raise UsageError(f"{name} {getattr(self, name)} is out of range", "use a number from 1 to 512")
        if self.bits not in (32, 61):
            raise UsageError(f"bits {self.bits}: no such hash functions", "one of: 32, 61")

    @property
    def rule(self) -> str:
        """The rule by which documents are removed, as options of the command."""
        verified = f"--threshold {self.threshold}" if self.verify else "--no-verify"
        return f"--method minhash --normalise {self.normalise} --shingle {self.unit} --ngram {self.ngram} {verified}"

    def sketches(self, documents: list[Document]) -> Sketches:
        """Compute the sketches of documents."""
        coefficients = functions(self.seed, self.bands * self.rows, self.bits)
        shape = self.ngram, coefficients, self.bands, self.bits, self.normalise, self.unit == "characters"
        sketched = [sketch(document.text, *shape) for document in documents]
        same = [
            xxhash.xxh3_64_intdigest(result.normalised.tobytes() or document.text.encode())
            for result, document in zip(sketched, documents, strict=True)
        ]
        keys = np.zeros((len(sketched), self.bands), np.uint64)
        signatures = np.zeros((len(sketched), self.bands * self.rows), np.uint64)
        for i, result in enumerate(sketched):
            if len(result.keys):
                keys[i], signatures[i] = result.keys, result.signature
        shingles = [result.shingles for result in sketched]
        sizes = np.fromiter(map(len, shingles), np.int64, len(shingles))
        return Sketches(
            np.array(same, np.uint64), keys, signatures, np.concatenate([np.empty(0, np.uint32), *shingles]), sizes
        )
