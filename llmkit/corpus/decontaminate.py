"""Evaluation items in training text: an index of their word n-grams, and which items a document holds.

1. Words: letters and digits, lower case, without diacritics; all else separates. Digits stay (of any script, as 0-9): two problems of
   arithmetic may differ in nothing else. Scripts that write no spaces give one word a character.
2. An item is a row of JSONL. Each string in it, and each list of strings, is a *part* (question, answer, choices, the content of a
   message) and is judged by itself, so that a question alone is found, and so is a solution alone. `<<48/2=24>>`, the calculator's notes
   in GSM8K, is left out: texts made from its solutions have none.
3. An n-gram weighs 1/(parts that hold it), and nothing where these are more than 32: what many items share (instructions, stock
   phrases) says little about any of them. Parts whose weights sum to less than 1 are such boilerplate, and never match.
4. A part is found where a window of twice its length holds n-grams of at least `min_share` of its weight, and at least as many
   different ones as `min_words` words in a row have. Shorter parts never match: a run of so few words is met anywhere.

Naive matching (any common 13-gram) flags boilerplate, 88 of 114 hits in marin-community/marin#6852. Memory: about 55 bytes an n-gram of the
items, made once and shared by processes that fork afterwards; for a document at most some 15 times its bytes. Cost: one pass over the bytes and
one look-up a word (tests/bench/decontamination.md).

    index = load_index(("gsm8k.jsonl.zst",))
    found = index.find(document, 0.4)  # .matches: set, item, start, end, share; .share: the highest of all
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from llmkit.errors import LlmkitError, UsageError
from llmkit.io.documents import DocumentReader, ReadOptions, parse
from llmkit.io.inputs import DOCUMENT_SUFFIXES, STDIN
from llmkit.kernels import kernel
from llmkit.kernels.utf8 import Bytes, decode

COMMON = 32  # n-grams of more parts than this are boilerplate; bounds the work for a hit, too
BLOCK = 1 << 18  # words of a document that are matched at a time
DEPTH = 32  # of nested JSON in an item
CALCULATOR = re.compile(r"<<[^<>\n]{0,200}>>")

Hashes = NDArray[np.uint64]
Places = NDArray[np.int32]

# ---- words

SEPARATOR, MARK, ALONE = np.uint32(0), np.uint32(1), np.uint32(1 << 31)
UNSPACED = ((0xE00, 0xF00), (0x1000, 0x10A0), (0x1780, 0x1800), (0x3040, 0x3100), (0x3400, 0x4DC0), (0x4E00, 0xA000), (0xF900, 0xFB00), (0x20000, 0x33480))  # fmt: skip
START = np.uint64(0xCBF29CE484222325)
STEP = np.uint64(0x9E3779B97F4A7C15)
MIX = np.uint64(0xD6E8FEB86659FD93)
HALF = np.uint64(32)


@cache
def folding() -> NDArray[np.uint32]:
    """uint32 [0x110000]: the letter or digit that a character counts as; 0 separates words, MARK is passed over, from ALONE on a word by itself."""
    table = np.zeros(0x110000, np.uint32)
    table[0xAC00:0xD7A4] = np.arange(0xAC00, 0xD7A4)  # Hangul syllables stay whole
    for code in chain(range(0x3400), range(0xA000, 0xAC00), range(0xD7A4, 0xD800), range(0xF900, 0x20000)):
        character = chr(code)
        category = unicodedata.category(character)
        if category == "Mn":
            table[code] = MARK
        elif category == "Nd":
            table[code] = ord("0") + unicodedata.decimal(character)
        elif character.isalnum() or category == "Mc":
            plain = unicodedata.normalize("NFD", character.lower())
            bare = [letter for letter in plain if unicodedata.category(letter) != "Mn"]
            table[code] = ord(bare[0]) if len(bare) == 1 else code
    for start, stop in UNSPACED:
        codes = np.arange(start, stop, dtype=np.uint32)
        found = table[start:stop]
        letters = (found > MARK) | np.fromiter(map(str.isalnum, map(chr, range(start, stop))), np.bool_, stop - start)
        letters &= (found < ord("0")) | (found > ord("9"))
        found[letters] = codes[letters] | ALONE
    return table


@kernel
def split(data, fold, hashes, starts, ends):  # type: ignore[no-untyped-def]
    """Words of a text in valid UTF-8: their hashes, and the bytes where they start and end. Returns how many, at most half the bytes + 1."""
    count = i = 0
    while i < len(data):
        begin, after, h = i, i, START
        code = SEPARATOR
        while i < len(data):
            character, width = decode(data, i)
            code, after = fold[character], i + width
            if code == SEPARATOR or code >= ALONE:
                break
            i = after
            if code != MARK:
                h = (h ^ np.uint64(code)) * STEP
        if h != START:
            hashes[count] = (h ^ h >> HALF) * MIX
            starts[count] = begin
            ends[count] = i
            count += 1
        if i < len(data) and code >= ALONE:
            h = (START ^ np.uint64(code)) * STEP
            hashes[count] = (h ^ h >> HALF) * MIX
            starts[count] = i
            ends[count] = after
            count += 1
        i = after
    return count


@njit(cache=True, nogil=True)
def ngrams(hashes, n):  # type: ignore[no-untyped-def]
    """Key of the `n` words from each on, uint64 [words - n + 1], never 0: a polynomial of their hashes, rolled along."""
    keys = np.empty(max(0, len(hashes) - n + 1), np.uint64)
    power = np.uint64(1)
    for _ in range(n):
        power *= STEP
    key = np.uint64(0)
    for i in range(len(hashes)):
        key = key * STEP + hashes[i]
        if i >= n:
            key -= hashes[i - n] * power
        if i >= n - 1:
            keys[i - n + 1] = max(key, np.uint64(1))
    return keys


@kernel
def insert(keys, slots, numbers):  # type: ignore[no-untyped-def]
    """Fill an open-addressing table of a power of two: slot -> key (0: free) and its number."""
    mask = np.uint64(len(slots) - 1)
    for number in range(len(keys)):
        slot = (keys[number] ^ keys[number] >> HALF) & mask
        while slots[slot] != 0:
            slot = (slot + np.uint64(1)) & mask
        slots[slot] = keys[number]
        numbers[slot] = number


@kernel
def look_up(keys, slots, numbers, found, places):  # type: ignore[no-untyped-def]
    """The keys that the table has: their numbers, and where they stand. Returns how many."""
    mask = np.uint64(len(slots) - 1)
    count = 0
    for i in range(len(keys)):
        slot = (keys[i] ^ keys[i] >> HALF) & mask
        while slots[slot] != 0:
            if slots[slot] == keys[i]:
                found[count] = numbers[slot]
                places[count] = i
                count += 1
                break
            slot = (slot + np.uint64(1)) & mask
    return count


@njit(cache=True, nogil=True)
def worth_a_look(data, fold, n, slots, numbers, floor, reach):  # type: ignore[no-untyped-def]
    """Whether `floor` n-grams of the table are met within `reach` words: all that most documents need to be asked."""
    most = len(data) // 2 + 1
    hashes, starts, ends = np.empty(most, np.uint64), np.empty(most, np.int32), np.empty(most, np.int32)
    words = split(data, fold, hashes, starts, ends)
    hits = look_up(ngrams(hashes[:words], n), slots, numbers, starts, ends)
    for i in range(floor - 1, hits):  # noqa: SIM110 - numba compiles no any()
        if ends[i] - ends[i - floor + 1] <= reach:
            return True
    return False


@njit(cache=True, nogil=True)
def windows(parts, words, offsets, weights, totals, lengths, floor, min_share, first, last, share):  # type: ignore[no-untyped-def]
    """Slide a window of twice a part's length over its hits (sorted by part, then word), adding up the weight of different n-grams.

    Each run of windows that reach `min_share` gives a row: first and last hit, highest share. Returns the number of rows, and the
    highest share of all. An n-gram is known by its `offsets` in the part.
    """
    rows = 0
    highest = 0.0
    seen = np.zeros(lengths.max() + 1, np.int32)
    hits = len(parts)
    left = 0
    while left < hits:
        part = parts[left]
        stop = left
        while stop < hits and parts[stop] == part:
            stop += 1
        kinds, weight, width, open_row = 0, 0.0, 2 * lengths[part], -1
        for right in range(left, stop):
            while words[right] - words[left] > width:
                seen[offsets[left]] -= 1
                if seen[offsets[left]] == 0:
                    kinds -= 1
                    weight -= weights[left]
                left += 1
            seen[offsets[right]] += 1
            if seen[offsets[right]] == 1:
                kinds += 1
                weight += weights[right]
            if kinds < floor:
                continue
            now = min(1.0, weight / totals[part])
            highest = max(highest, now)
            if now + 1e-9 >= min_share:
                if open_row < 0 or left > last[open_row]:
                    open_row = rows
                    first[rows] = left
                    share[rows] = now
                    rows += 1
                last[open_row] = right
                share[open_row] = max(share[open_row], now)
        while left < stop:
            seen[offsets[left]] = 0
            left += 1
    return rows, highest


# Unsigned arithmetic wraps, as it is meant to; uncompiled kernels would warn of it.
_quiet = partial(np.errstate, over="ignore") if not hasattr(split, "py_func") else nullcontext


def as_bytes(text: str) -> Bytes:
    """UTF-8 of a text, uint8."""
    return np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8)


def words_of(data: Bytes) -> tuple[Hashes, Places, Places]:
    """Words of UTF-8: their hashes, and the bytes where each starts and ends, [words] each. Linear."""
    most = len(data) // 2 + 1
    hashes, starts, ends = np.empty(most, np.uint64), np.empty(most, np.int32), np.empty(most, np.int32)
    with _quiet():
        count = split(data, folding(), hashes, starts, ends)
    return hashes[:count], starts[:count], ends[:count]


# ---- items


class Item(NamedTuple):
    """An evaluation item: the set's name, its own, and its parts, each a list of texts that belong together."""

    set: str
    name: str
    parts: list[list[str]]


def read_items(path: str, fields: tuple[str, ...], name: str) -> Iterator[Item]:
    """Items of a JSONL file, named by their `id` or line. `fields`: the only ones to read. LlmkitError with file and line for bad rows."""
    reader = DocumentReader([path], ReadOptions(text_key=None))
    for piece in reader.chunks():
        rows, bad = parse(piece, reader.options)
        for wrong in bad:
            raise LlmkitError(f"{wrong.file}:{wrong.line}: {wrong.reason}", "items are one JSON object a line")
        for row in rows:
            chosen = {key: value for key, value in row.fields.items() if (key in fields if fields else key != "id")}
            if fields and not chosen:
                names = ", ".join(map(repr, row.fields))
                raise LlmkitError(f"{row.where}: none of the fields {', '.join(fields)}", f"it has {names}")
            label = row.fields.get("id")
            yield Item(name, str(label) if isinstance(label, str | int) else str(row.line), list(parts_of(chosen)))


def parts_of(value: Any, depth: int = 0) -> Iterator[list[str]]:
    """Every string in a JSON value, and every list with strings as one part."""
    if isinstance(value, str):
        yield [CALCULATOR.sub(" ", value)]
    elif isinstance(value, list) and depth < DEPTH:
        if texts := [CALCULATOR.sub(" ", text) for text in value if isinstance(text, str)]:
            yield texts
        for inner in value:
            if not isinstance(inner, str):
                yield from parts_of(inner, depth + 1)
    elif isinstance(value, dict) and depth < DEPTH:
        for inner in value.values():
            yield from parts_of(inner, depth + 1)


def set_name(path: str) -> str:
    """Name of a file without directory and suffixes."""
    base = Path(path).name
    return next((base[: -len(end)] for end in sorted(DOCUMENT_SUFFIXES, key=len)[::-1] if base.endswith(end)), base)


# ---- the index


class Match(NamedTuple):
    """An item in a document: set and item, the characters [start, end) it takes, and the share of a part's weight that was found."""

    set: str
    item: str
    start: int
    end: int
    share: float


class Found(NamedTuple):
    """Matches in order of their place, and the highest share of any part, matched or not."""

    matches: list[Match]
    share: float


@dataclass(frozen=True, slots=True, eq=False)
class Index:
    """n-grams of the items. P parts, G n-grams, H (n-gram, part) pairs sorted by n-gram."""

    n: int
    floor: int  # different n-grams that a match must have
    items: list[tuple[str, str]]  # set and name
    part_item: Places  # [P]
    part_length: Places  # [P], words
    part_total: NDArray[np.float64]  # [P], sum of its weights
    slots: Hashes  # table of keys, a power of two
    numbers: Places  # n-gram in each slot
    bounds: NDArray[np.int64]  # [G + 1], its pairs
    pair_part: Places  # [H]
    pair_offset: Places  # [H], the word of the part that the n-gram starts at
    reach: int  # widest window, words

    def find(self, text: str, min_share: float | None) -> Found:
        """Items in a text; None: only the highest share."""
        data = as_bytes(text)
        with _quiet():
            if not worth_a_look(data, folding(), self.n, self.slots, self.numbers, self.floor, self.reach):
                return Found([], 0.0)
            hashes, starts, ends = words_of(data)
            numbers, places = np.empty(len(hashes), np.int32), np.empty(len(hashes), np.int32)
            count = look_up(ngrams(hashes, self.n), self.slots, self.numbers, numbers, places)
        numbers, places = numbers[:count], places[:count]
        matches: list[Match] = []
        highest = 0.0
        for start in range(0, len(hashes), BLOCK):  # bounds the memory for texts made of the items' own words
            begin, end = np.searchsorted(places, (start, start + BLOCK + self.reach))
            found, share = self._match(numbers[begin:end], places[begin:end], starts, ends, min_share or 2.0)
            matches += found
            highest = max(highest, share)
        if matches and not text.isascii():  # bytes to characters
            upto = np.concatenate(([0], np.cumsum(data & 0xC0 != 0x80)))
            matches = [match._replace(start=int(upto[match.start]), end=int(upto[match.end])) for match in matches]
        return Found(merge(matches), highest)

    def _match(
        self, numbers: Places, places: Places, starts: Places, ends: Places, min_share: float
    ) -> tuple[list[Match], float]:
        """Matches among n-grams that stand at `places` (words; these stand from `starts` to `ends`), and the highest share."""
        lengths = self.bounds[numbers + 1] - self.bounds[numbers]
        total = int(lengths.sum())
        pairs = np.repeat(self.bounds[numbers] - np.cumsum(lengths) + lengths, lengths) + np.arange(total)
        at = np.repeat(places, lengths)
        order = np.lexsort((at, self.pair_part[pairs]))
        pairs, at = pairs[order], at[order]
        parts, offsets = self.pair_part[pairs], self.pair_offset[pairs]
        weights = 1.0 / np.repeat(lengths, lengths)[order]
        first, last, shares = np.empty(total, np.int32), np.empty(total, np.int32), np.empty(total)
        rows, highest = windows(
            parts, at, offsets, weights, self.part_total, self.part_length, self.floor, min_share, first, last, shares
        )
        matches = []
        for row in range(rows):
            left, right, part = first[row], last[row], parts[first[row]]
            # What the n-grams miss at the ends of the item, a changed word and up to n around it, belongs to it as well.
            before = min(int(offsets[left]), 2 * self.n)
            after = min(int(self.part_length[part] - offsets[right]), 3 * self.n) - 1
            start, end = starts[max(0, at[left] - before)], ends[min(len(ends) - 1, at[right] + after)]
            set_, item = self.items[self.part_item[part]]
            matches.append(Match(set_, item, int(start), int(end), float(shares[row])))
        return matches, highest


def merge(matches: list[Match]) -> list[Match]:
    """Matches in order of their place; those of one item that overlap (copies side by side, the seam of two blocks) are one."""
    merged: list[Match] = []
    for match in sorted(matches):
        last = merged[-1] if merged else match
        if merged and match[:2] == last[:2] and match.start < last.end:
            merged[-1] = last._replace(share=max(last.share, match.share), end=max(last.end, match.end))
        else:
            merged.append(match)
    return sorted(merged, key=lambda match: (match.start, match))


def build_index(items: list[Item], n: int = 5, min_words: int = 8) -> Index:
    """Index of the items; `n` is at most `min_words`."""
    floor = min_words - n + 1
    keys: list[Hashes] = []
    offsets: list[Places] = []
    sizes, part_item, part_length = [], [], []
    for number, item in enumerate(items):
        for texts in item.parts:
            words = [words_of(as_bytes(text))[0] for text in texts] if sum(map(len, texts)) >= min_words else []
            with _quiet():
                made = [ngrams(hashes, n) for hashes in words]
            if (size := sum(map(len, made))) >= floor:
                before = np.cumsum([0, *map(len, words)])
                keys += made
                offsets += [
                    np.arange(at, at + len(some), dtype=np.int32) for at, some in zip(before, made, strict=False)
                ]
                sizes.append(size)
                part_item.append(number)
                part_length.append(int(before[-1]))
    names = [(item.set, item.name) for item in items]
    if not sizes:  # an index that finds nothing
        keys, offsets, sizes, part_item, part_length = [np.empty(0, np.uint64)], [np.empty(0, np.int32)], [0], [0], [0]
    key, offset = np.concatenate(keys), np.concatenate(offsets)
    part = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    order = np.lexsort((offset, part, key))
    key, offset, part = key[order], offset[order], part[order]
    first = np.ones(len(key), np.bool_)  # of the places that an n-gram has in a part
    first[1:] = (key[1:] != key[:-1]) | (part[1:] != part[:-1])
    key, offset, part = key[first], offset[first], part[first]
    unique_keys, counts = np.unique(key, return_counts=True)
    rare = np.repeat(counts <= COMMON, counts)
    unique_keys, counts = unique_keys[counts <= COMMON], counts[counts <= COMMON]
    offset, part = offset[rare], part[rare]
    totals = np.bincount(part, np.repeat(1.0 / counts, counts), len(sizes)).astype(np.float64)
    totals[(totals < 1) | (np.bincount(part, minlength=len(sizes)) < floor)] = np.inf
    slots = np.zeros(1 << int(2 * len(unique_keys) + 1).bit_length(), np.uint64)
    numbers = np.zeros(len(slots), np.int32)
    with _quiet():
        insert(unique_keys, slots, numbers)
    return Index(
        n, floor, names, np.array(part_item, np.int32), np.array(part_length, np.int32), totals, slots, numbers,
        np.concatenate(([0], np.cumsum(counts))), part, offset, 2 * max(part_length),
    )  # fmt: skip


@cache
def load_index(files: tuple[str, ...], fields: tuple[str, ...] = (), n: int = 5, min_words: int = 8) -> Index:
    """Index of the items of JSONL files, made once a process. LlmkitError naming the file that holds nothing to look for."""
    names = [set_name(path) for path in files]
    if len(set(names)) < len(names):
        names = [f"{Path(path).absolute().parent.name}/{name}" for path, name in zip(files, names, strict=True)]
    items: list[Item] = []
    for path, name in zip(files, names, strict=True):
        if path == STDIN:
            raise UsageError("evaluation items cannot come from stdin", "name a JSONL file")
        items += read_items(path, fields, name)
    index = build_index(items, n, min_words)
    found = {index.items[item][0] for item in index.part_item[np.isfinite(index.part_total)]}
    for path, name in zip(files, names, strict=True):
        if name not in found:
            message = f"{path}: no evaluation item with a text of {min_words} words or more that is its own"
            raise LlmkitError(message, "one JSON object a line, with question, answer, text or the like")
    return index
