"""The four patterns of tokens/pretokenize.py over UTF-8, compiled: find where each piece of a text ends.

    ends = np.empty(len(data), np.int64)
    n = cut(data, 0, len(data), LLAMA, classes(LLAMA), ends)
    # pieces are data[0:ends[0]], data[ends[0]:ends[1]], ..., data[ends[n - 2]:ends[n - 1]]

A regular expression takes the first alternative that matches; here each alternative is a branch on the classes
of the next one or two characters. The classes (letters, numbers, spaces) come from the `tokenizers` library
itself (`classes`), since its Unicode version differs from Python's.

Cost: linear; tests/bench/tokenize_speed.md. The table takes 1.1 MB. Building it is slow, so it is cached beside
the compiled kernels.
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

LETTER, NUMBER, SPACE, DIGIT = 1, 2, 4, 8  # \p{L}, \p{N}, \s; what the pre-tokenizer Digits isolates
WORDLIKE = LETTER | NUMBER | SPACE
LLAMA, QWEN, GPT2, SMOLLM = range(4)
KINDS = {"llama-bpe": LLAMA, "qwen2": QWEN, "gpt-2": GPT2, "smollm": SMOLLM}

ASSIGNED = (
    (0, 0xD800),
    (0xE000, 0x40000),
    (0xE0000, 0xE1000),
)  # planes 4 to 13 are unassigned; 15 and 16 are private use, in no class
LONG_S = 0x17F  # the only non-ASCII character that (?i:'s|'t|'re|'ve|'m|'ll|'d) matches


@cache
def classes(how: int) -> Bytes:
    """Class bits by code point, uint8[0x110000], as in the installed `tokenizers`. DIGIT is set only for
    SMOLLM, without other bits.
    """
    table = _all_classes()
    return np.where(table & DIGIT, np.uint8(DIGIT), table) if how == SMOLLM else table & np.uint8(WORDLIKE)


@cache
def _all_classes() -> Bytes:
    import tokenizers

    settings: Any = numba.config
    path = Path(settings.CACHE_DIR) / f"characters-{tokenizers.__version__}.npy"
    try:
        table = np.load(path)
        if table.shape == (0x110000,) and table.dtype == np.uint8:
            return np.ascontiguousarray(table)
    except (OSError, ValueError, EOFError):
        pass
    table = _library_classes()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.npy")
        np.save(temporary, table)
        temporary.replace(path)
    except OSError:  # a full or read-only disk: built again next time
        pass
    return table


def _library_classes() -> Bytes:
    """The classes of all characters, by splitting a text that holds each of them."""
    from tokenizers import Regex, pre_tokenizers

    table = np.zeros(0x110000, np.uint8)
    codes = np.concatenate([np.arange(start, stop) for start, stop in ASSIGNED])
    text = "".join(map(chr, codes.tolist()))
    for bit, regex in ((LETTER, r"\p{L}+"), (NUMBER, r"\p{N}+"), (SPACE, r"\s+")):
        inside = np.ones(len(codes), np.bool_)
        for _, (start, stop) in pre_tokenizers.Split(Regex(regex), "removed").pre_tokenize_str(text):
            inside[start:stop] = False
        table[codes[inside]] |= bit
    # Between two letters, only a digit becomes a piece of its own.
    spaced = "a".join(["", *map(chr, codes.tolist()), ""])
    for piece, _ in pre_tokenizers.Digits(individual_digits=True).pre_tokenize_str(spaced):
        if len(piece) == 1 and piece != "a":
            table[ord(piece)] |= DIGIT
    return table


@inner
def class_at(data, i, table):  # type: ignore[no-untyped-def]
    """(class bits, length in bytes) of the character at byte `i`."""
    if data[i] < 0x80:
        return table[data[i]], 1
    code, width = decode(data, i)
    return table[code], width


@inner
def past_letters(data, i, stop, table):  # type: ignore[no-untyped-def]
    """First byte from `i` on that does not begin a letter."""
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
    """First byte from `i` on that begins a letter, number, space or isolated digit."""
    while i < stop:
        kind, width = class_at(data, i, table)
        if kind:
            break
        i += width
    return i


@kernel
def past_numbers(data, i, stop, table, limit):  # type: ignore[no-untyped-def]
    """End of the numbers that begin at byte `i`, at most `limit` of them."""
    while i < stop and limit > 0:
        kind, width = class_at(data, i, table)
        if not kind & NUMBER:
            break
        i += width
        limit -= 1
    return i


@kernel
def contraction(data, i, stop, fold):  # type: ignore[no-untyped-def]
    """Length of one of 's 't 're 've 'm 'll 'd at the apostrophe `i`, or 0. `fold`: ignore case."""
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
    """(end of the spaces at byte `i`, start of the last of them, end of the last newline among them or 0)."""
    last, newline = i, 0
    while i < stop:
        kind, width = class_at(data, i, table)
        if not kind & SPACE:
            break
        last = i
        i += width
        if data[last] == 0x0A or data[last] == 0x0D:
            newline = i
    return i, last, newline


@kernel
def cut(data, start, stop, how, table, ends):  # type: ignore[no-untyped-def]
    """Write the end of each piece of the text data[start:stop] to `ends` (int64, up to one per byte). Returns
    their number.
    """
    modern = how in (LLAMA, QWEN)
    digits = 3 if how == LLAMA else 1 if how == QWEN else stop
    n = 0
    i = start
    while i < stop:
        kind, width = class_at(data, i, table)
        if kind == DIGIT:
            i += width
        elif kind & LETTER:
            i = past_letters(data, i + width, stop, table)
        elif kind & NUMBER:
            i = past_numbers(data, i, stop, table, digits)
        else:
            short = contraction(data, i, stop, modern) if data[i] == 0x27 else 0
            following = i + width
            after = np.uint8(SPACE)  # class of the next character; the end of a text counts as a space
            if following < stop:
                after, _ = class_at(data, following, table)
            newline = data[i] == 0x0A or data[i] == 0x0D
            if short:
                i += short
            elif after & LETTER and (data[i] == 0x20 or (modern and not newline)):
                i = past_letters(data, following, stop, table)
            elif not modern and data[i] == 0x20 and after & NUMBER:
                i = past_numbers(data, following, stop, table, digits)
            elif not kind & WORDLIKE or (data[i] == 0x20 and not after):
                i = past_others(data, following, stop, table)
                if modern:
                    while i < stop and (data[i] == 0x0A or data[i] == 0x0D):
                        i += 1
            else:
                i, last, last_newline = past_spaces(data, i, stop, table)
                if modern and last_newline:
                    i = last_newline
                elif i < stop and last > (ends[n - 1] if n else start):
                    after, _ = class_at(data, i, table)
                    if after != DIGIT:  # the last space joins the next piece, unless that is an isolated digit
                        i = last
        ends[n] = i
        n += 1
    return n
