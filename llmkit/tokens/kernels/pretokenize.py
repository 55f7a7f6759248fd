"""The four patterns of tokens/pretokenize.py over UTF-8, compiled: where each piece of a text ends.

    ends = np.empty(len(data), np.int64)
    n = cut(data, 0, len(data), LLAMA, classes(LLAMA), ends)        # pieces are data[0:ends[0]], data[ends[0]:ends[1]], ... data[:ends[n - 1]]

A regular expression takes the first of its alternatives that matches; here each is a branch on the classes of the next one or two characters. Which
characters are letters, numbers and spaces is asked of the `tokenizers` library itself (`classes`): its Unicode tables are not of the version of Python's.

Cost: linear; tests/bench/tokenize_speed.md. The table is 1.1 MB; asking takes a while, so that it is kept beside the compiled kernels.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import numba
import numpy as np

from llmkit.kernels import inner, kernel, swar
from llmkit.kernels.utf8 import Bytes, decode

LETTER, NUMBER, SPACE, DIGIT = 1, 2, 4, 8  # \p{L}, \p{N}, \s; what the pre-tokenizer Digits puts alone
WORDLIKE = LETTER | NUMBER | SPACE
LLAMA, QWEN, GPT2, SMOLLM = range(4)
KINDS = {"llama-bpe": LLAMA, "qwen2": QWEN, "gpt-2": GPT2, "smollm": SMOLLM}

ASSIGNED = (
    (0, 0xD800),
    (0xE000, 0x40000),
    (0xE0000, 0xE1000),
)  # planes 4 to 13 hold no characters; 15 and 16 private ones, of no class
LONG_S = 0x17F  # the one character outside ASCII that (?i:'s|'t|'re|'ve|'m|'ll|'d) takes for a letter of its own


@cache
def classes(how: int) -> Bytes:
    """uint8[0x110000]: bits by code point, as the installed `tokenizers` has them. DIGIT stands for SMOLLM alone, and then alone."""
    table = _all_classes()
    return np.where(table & DIGIT, np.uint8(DIGIT), table) if how == SMOLLM else table & np.uint8(WORDLIKE)


@cache
def _all_classes() -> Bytes:
    import tokenizers

    settings: Any = numba.config
    place = Path(settings.CACHE_DIR) / f"characters-{tokenizers.__version__}.npy"
    try:
        table = np.load(place)
        if table.shape == (0x110000,) and table.dtype == np.uint8:
            return np.ascontiguousarray(table)
    except (OSError, ValueError, EOFError):
        pass
    table = _asked()
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        mine = place.with_suffix(f".{os.getpid()}.npy")
        np.save(mine, table)
        mine.replace(place)
    except OSError:  # a full disk, or none that can be written to: asked again next time
        pass
    return table


def _asked() -> Bytes:
    from tokenizers import Regex, pre_tokenizers

    table = np.zeros(0x110000, np.uint8)
    codes = np.concatenate([np.arange(start, stop) for start, stop in ASSIGNED])
    text = "".join(map(chr, codes.tolist()))
    for bit, regex in ((LETTER, r"\p{L}+"), (NUMBER, r"\p{N}+"), (SPACE, r"\s+")):
        inside = np.ones(len(codes), np.bool_)
        for _, (start, stop) in pre_tokenizers.Split(Regex(regex), "removed").pre_tokenize_str(text):
            inside[start:stop] = False
        table[codes[inside]] |= bit
    # A digit stands alone between two others, which go together.
    spaced = "a".join(["", *map(chr, codes.tolist()), ""])
    for piece, _ in pre_tokenizers.Digits(individual_digits=True).pre_tokenize_str(spaced):
        if len(piece) == 1 and piece != "a":
            table[ord(piece)] |= DIGIT
    return table


@inner
def class_at(data, i, table):  # type: ignore[no-untyped-def]
    """(classes, bytes) of the character at byte `i`."""
    if data[i] < 0x80:
        return table[data[i]], 1
    code, width = decode(data, i)
    return table[code], width


@inner
def past_letters(data, i, stop, table):  # type: ignore[no-untyped-def]
    """First byte at or behind `i` that begins no letter."""
    while i < stop:
        letters, _ = swar.letters_and_digits(swar.load(data, i))
        n = swar.first(~letters & swar.HIGH)
        i += n
        if n == 8:
            continue
        if i >= stop or data[i] < 0x80:
            break
        code, width = decode(data, i)
        if not table[code] & LETTER:
            break
        i += width
    return min(i, stop)


@kernel
def past_others(data, i, stop, table):  # type: ignore[no-untyped-def]
    """First byte at or behind `i` that begins a letter, number, space or lone digit."""
    while i < stop:
        what, width = class_at(data, i, table)
        if what:
            break
        i += width
    return i


@kernel
def past_numbers(data, i, stop, table, most):  # type: ignore[no-untyped-def]
    """Behind the numbers at byte `i`, `most` of them at most."""
    while i < stop and most > 0:
        what, width = class_at(data, i, table)
        if not what & NUMBER:
            break
        i += width
        most -= 1
    return i


@kernel
def contraction(data, i, stop, fold):  # type: ignore[no-untyped-def]
    """Length of one of 's 't 're 've 'm 'll 'd at the apostrophe `i`; 0 if there is none. `fold`: in either case."""
    if i + 1 >= stop:
        return 0
    a = data[i + 1]
    if fold:
        if a == 0xC5 and i + 2 < stop and data[i + 2] == 0xBF:  # LONG_S
            return 3
        if 0x41 <= a <= 0x5A:
            a |= 0x20
    if a == 0x73 or a == 0x74 or a == 0x6D or a == 0x64:
        return 2
    if i + 2 < stop and (a == 0x72 or a == 0x76 or a == 0x6C):
        b = data[i + 2]
        if fold and 0x41 <= b <= 0x5A:
            b |= 0x20
        if (b == 0x65 and a != 0x6C) or (b == 0x6C and a == 0x6C):
            return 3
    return 0


@kernel
def past_spaces(data, i, stop, table):  # type: ignore[no-untyped-def]
    """(behind the spaces at byte `i`, where the last of them begins, behind the last newline among them or 0)."""
    last, newline = i, 0
    while i < stop:
        what, width = class_at(data, i, table)
        if not what & SPACE:
            break
        last = i
        i += width
        if data[last] == 0x0A or data[last] == 0x0D:
            newline = i
    return i, last, newline


@kernel
def cut(data, start, stop, how, table, ends):  # type: ignore[no-untyped-def]
    """Write the end of each piece of data[start:stop], a whole text, into `ends` (int64, as many as bytes suffice); returns how many."""
    modern = how in (LLAMA, QWEN)
    digits = 3 if how == LLAMA else 1 if how == QWEN else stop
    n = 0
    i = start
    while i < stop:
        what, width = class_at(data, i, table)
        if what == DIGIT:
            i += width
        elif what & LETTER:
            i = past_letters(data, i + width, stop, table)
        elif what & NUMBER:
            i = past_numbers(data, i, stop, table, digits)
        else:
            short = contraction(data, i, stop, modern) if data[i] == 0x27 else 0
            behind = i + width
            after = np.uint8(SPACE)  # of the next character; the end of a text is like a space
            if behind < stop:
                after, _ = class_at(data, behind, table)
            newline = data[i] == 0x0A or data[i] == 0x0D
            if short:
                i += short
            elif after & LETTER and (data[i] == 0x20 or (modern and not newline)):
                i = past_letters(data, behind, stop, table)
            elif not modern and data[i] == 0x20 and after & NUMBER:
                i = past_numbers(data, behind, stop, table, digits)
            elif not what & WORDLIKE or (data[i] == 0x20 and not after):
                i = past_others(data, behind, stop, table)
                if modern:
                    while i < stop and (data[i] == 0x0A or data[i] == 0x0D):
                        i += 1
            else:
                i, last, newest = past_spaces(data, i, stop, table)
                if modern and newest:
                    i = newest
                elif i < stop and last > (ends[n - 1] if n else start):
                    after, _ = class_at(data, i, table)
                    if after != DIGIT:  # the last space stays with what comes; a lone digit is a text of its own
                        i = last
        ends[n] = i
        n += 1
    return n
