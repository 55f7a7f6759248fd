"""Evaluation items in training text: an index of their word n-grams, and a search for items in a document.

1. Words are runs of letters and digits, in lower case and without diacritics; everything else separates words.
   Digits (of any script, as 0-9) are kept, since two arithmetic problems may differ in nothing else. In scripts
   without spaces, each character is a word.
2. An item is a row of JSONL. Each string in it, and each list of strings, is a *part* (question, answer, choices, the
   content of a message) and is matched by itself, so that a question alone is found, and so is a solution alone.
   `<<48/2=24>>`, the calculator annotations of GSM8K, are ignored, since texts derived from its solutions lack them.
3. The weight of an n-gram is 1/(number of parts that contain it), or 0 if more than 32 parts do: text that many
   items share (instructions, stock phrases) is weak evidence for any of them. Parts whose weights sum to less
   than 1 are boilerplate and never match.
4. A part matches where a window of twice its length contains n-grams with at least `min_share` of its weight,
   and at least as many distinct ones as there are in `min_words` consecutive words. Shorter parts never match,
   since so few words occur in a row anywhere.

Naive matching (any common 13-gram) flags boilerplate: 88 of 114 hits in marin-community/marin#6852. Memory:
about 55 bytes per n-gram of the items, allocated once and shared by processes that are forked afterwards; for a
document at most about 15 times its bytes. Cost: one pass over the bytes and one look-up per word
(tests/bench/decontamination.md).

    index = load_index(("gsm8k.jsonl.zst",))
    result = index.find(document, 0.4)  # .matches: set, item, start, end, share; .share: the highest share
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmkit.corpus.kernels.item_ngrams import (
    Hashes,
    Positions,
    as_bytes,
    folding,
    has_enough_hits,
    insert,
    look_up,
    ngrams,
    windows,
    words_of,
    wrapping_arithmetic,
)
from llmkit.errors import LlmkitError, UsageError
from llmkit.io.documents import DocumentReader, ReadOptions, parse
from llmkit.io.inputs import DOCUMENT_SUFFIXES, STDIN

COMMON = 32  # n-grams in more parts than this are boilerplate; this also bounds the work per hit
BLOCK = 1 << 18  # words of a document that are matched at once
DEPTH = 32  # maximum nesting of JSON in an item
CALCULATOR = re.compile(r"<<[^<>\n]{0,200}>>")


# ---- items


class Item(NamedTuple):
    """An evaluation item: name of the set, name of the item, and its parts, each a list of related texts."""

    set: str
    name: str
    parts: list[list[str]]


def read_items(path: str, fields: tuple[str, ...], name: str) -> Iterator[Item]:
    """Items of a JSONL file, named by their `id` or line; only `fields` are read, or all if there are none.

    Raises LlmkitError with file and line for bad rows.
    """
    reader = DocumentReader([path], ReadOptions(text_key=None))
    for chunk in reader.chunks():
        rows, bad = parse(chunk, reader.options)
        for bad_line in bad:
            raise LlmkitError(
                f"{bad_line.file}:{bad_line.line}: {bad_line.reason}", "items are one JSON object per line"
            )
        for row in rows:
            selected = {key: value for key, value in row.fields.items() if (key in fields if fields else key != "id")}
            if fields and not selected:
                names = ", ".join(map(repr, row.fields))
                raise LlmkitError(f"{row.where}: none of the fields {', '.join(fields)}", f"it has {names}")
            label = row.fields.get("id")
            yield Item(name, str(label) if isinstance(label, str | int) else str(row.line), list(parts_of(selected)))


def parts_of(value: Any, depth: int = 0) -> Iterator[list[str]]:
    """Every string in a JSON value as a part, and every list with strings as one part."""
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
    """Name of a file without its directory and suffixes."""
    base = Path(path).name
    return next((base[: -len(end)] for end in sorted(DOCUMENT_SUFFIXES, key=len)[::-1] if base.endswith(end)), base)


# ---- the index


class Match(NamedTuple):
    """An item in a document: set and item, its characters [start, end), and the matched share of a part's weight."""

    set: str
    item: str
    start: int
    end: int
    share: float


class SearchResult(NamedTuple):
    """Matches in order of position, and the highest share of any part, whether it matches or not."""

    matches: list[Match]
    share: float


@dataclass(frozen=True, slots=True, eq=False)
class ItemIndex:
    """n-grams of the items. P parts, G n-grams, H (n-gram, part) pairs sorted by n-gram."""

    n: int
    floor: int  # minimum number of distinct n-grams in a match
    items: list[tuple[str, str]]  # set and name
    part_item: Positions  # [P]
    part_length: Positions  # [P], words
    part_total: NDArray[np.float64]  # [P], sum of the weights
    slots: Hashes  # table of keys, a power of two
    numbers: Positions  # n-gram in each slot
    bounds: NDArray[np.int64]  # [G + 1], the range of each n-gram's pairs
    pair_part: Positions  # [H]
    pair_offset: Positions  # [H], the word of the part at which the n-gram starts
    reach: int  # widest window, words

    def find(self, text: str, min_share: float | None) -> SearchResult:
        """Items in a text; with a `min_share` of None, only the highest share."""
        data = as_bytes(text)
        with wrapping_arithmetic():
            if not has_enough_hits(data, folding(), self.n, self.slots, self.numbers, self.floor, self.reach):
                return SearchResult([], 0.0)
            hashes, starts, ends = words_of(data)
            numbers, positions = np.empty(len(hashes), np.int32), np.empty(len(hashes), np.int32)
            count = look_up(ngrams(hashes, self.n), self.slots, self.numbers, numbers, positions)
        numbers, positions = numbers[:count], positions[:count]
        matches: list[Match] = []
        highest = 0.0
        for start in range(0, len(hashes), BLOCK):  # bounds memory for texts that consist of the items' words
            begin, end = np.searchsorted(positions, (start, start + BLOCK + self.reach))
            block_matches, share = self._match(numbers[begin:end], positions[begin:end], starts, ends, min_share or 2.0)
            matches += block_matches
            highest = max(highest, share)
        if matches and not text.isascii():  # bytes to characters
            characters_before = np.concatenate(([0], np.cumsum(data & 0xC0 != 0x80)))
            matches = [
                match._replace(start=int(characters_before[match.start]), end=int(characters_before[match.end]))
                for match in matches
            ]
        return SearchResult(merge(matches), highest)

    def _match(
        self, numbers: Positions, positions: Positions, starts: Positions, ends: Positions, min_share: float
    ) -> tuple[list[Match], float]:
        """Matches among n-grams at the words `positions`, and the highest share; word i is [starts[i], ends[i])."""
        lengths = self.bounds[numbers + 1] - self.bounds[numbers]
        total = int(lengths.sum())
        pairs = np.repeat(self.bounds[numbers] - np.cumsum(lengths) + lengths, lengths) + np.arange(total)
        pair_positions = np.repeat(positions, lengths)
        order = np.lexsort((pair_positions, self.pair_part[pairs]))
        pairs, pair_positions = pairs[order], pair_positions[order]
        parts, offsets = self.pair_part[pairs], self.pair_offset[pairs]
        weights = 1.0 / np.repeat(lengths, lengths)[order]
        first, last, shares = np.empty(total, np.int32), np.empty(total, np.int32), np.empty(total)
        rows, highest = windows(
            parts,
            pair_positions,
            offsets,
            weights,
            self.part_total,
            self.part_length,
            self.floor,
            min_share,
            first,
            last,
            shares,
        )
        matches = []
        for row in range(rows):
            left, right, part = first[row], last[row], parts[first[row]]
            # The match includes what the n-grams miss at the ends of the item: a changed word and up to n around it.
            before = min(int(offsets[left]), 2 * self.n)
            after = min(int(self.part_length[part] - offsets[right]), 3 * self.n) - 1
            start, end = (
                starts[max(0, pair_positions[left] - before)],
                ends[min(len(ends) - 1, pair_positions[right] + after)],
            )
            set_, item = self.items[self.part_item[part]]
            matches.append(Match(set_, item, int(start), int(end), float(shares[row])))
        return matches, highest


def merge(matches: list[Match]) -> list[Match]:
    """Matches in order of position; overlapping ones of one item (adjacent copies, the seam of blocks) are joined."""
    merged: list[Match] = []
    for match in sorted(matches):
        last = merged[-1] if merged else match
        if merged and match[:2] == last[:2] and match.start < last.end:
            merged[-1] = last._replace(share=max(last.share, match.share), end=max(last.end, match.end))
        else:
            merged.append(match)
    return sorted(merged, key=lambda match: (match.start, match))


def build_index(items: list[Item], n: int = 5, min_words: int = 8) -> ItemIndex:
    """Index of the items by n-grams of `n` words; `n` is at most `min_words`."""
    floor = min_words - n + 1
    keys: list[Hashes] = []
    offsets: list[Positions] = []
    sizes, part_item, part_length = [], [], []
    for number, item in enumerate(items):
        for texts in item.parts:
            words = [words_of(as_bytes(text))[0] for text in texts] if sum(map(len, texts)) >= min_words else []
            with wrapping_arithmetic():
                part_keys = [ngrams(hashes, n) for hashes in words]
            if (size := sum(map(len, part_keys))) >= floor:
                before = np.cumsum([0, *map(len, words)])
                keys += part_keys
                offsets += [
                    np.arange(first_word, first_word + len(text_keys), dtype=np.int32)
                    for first_word, text_keys in zip(before, part_keys, strict=False)
                ]
                sizes.append(size)
                part_item.append(number)
                part_length.append(int(before[-1]))
    names = [(item.set, item.name) for item in items]
    if not sizes:  # an index without n-grams
        keys, offsets, sizes, part_item, part_length = [np.empty(0, np.uint64)], [np.empty(0, np.int32)], [0], [0], [0]
    key, offset = np.concatenate(keys), np.concatenate(offsets)
    part = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    order = np.lexsort((offset, part, key))
    key, offset, part = key[order], offset[order], part[order]
    first = np.ones(len(key), np.bool_)  # whether this is the first occurrence of an n-gram in a part
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
    with wrapping_arithmetic():
        insert(unique_keys, slots, numbers)
    return ItemIndex(
        n, floor, names, np.array(part_item, np.int32), np.array(part_length, np.int32), totals, slots, numbers,
        np.concatenate(([0], np.cumsum(counts))), part, offset, 2 * max(part_length),
    )  # fmt: skip


@cache
def load_index(files: tuple[str, ...], fields: tuple[str, ...] = (), n: int = 5, min_words: int = 8) -> ItemIndex:
    """Index of the items of JSONL files, built once per process. Raises LlmkitError for a file without usable items."""
    names = [set_name(path) for path in files]
    if len(set(names)) < len(names):
        names = [f"{Path(path).absolute().parent.name}/{name}" for path, name in zip(files, names, strict=True)]
    items: list[Item] = []
    for path, name in zip(files, names, strict=True):
        if path == STDIN:
            raise UsageError("evaluation items cannot come from stdin", "name a JSONL file")
        items += read_items(path, fields, name)
    index = build_index(items, n, min_words)
    indexed_sets = {index.items[item][0] for item in index.part_item[np.isfinite(index.part_total)]}
    for path, name in zip(files, names, strict=True):
        if name not in indexed_sets:
            message = f"{path}: no evaluation item with a distinctive text of {min_words} words or more"
            raise LlmkitError(message, "write one JSON object per line, with question, answer, text or the like")
    return index
