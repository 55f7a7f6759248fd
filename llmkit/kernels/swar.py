"""SIMD within a register: kernels that look for a few bytes among many process eight bytes at a time.

A word of eight bytes is a `uint64` with the first byte lowest. A mask has the highest bit set in each byte that
it selects. Functions that numba cannot express (an unaligned load, counting bits) have a pure Python twin for
when JIT compilation is disabled.

The branch-free comparisons are from Warren, Hacker's Delight, chapter 6.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from llmkit.kernels import kernel

assert sys.byteorder == "little", "kernels read eight bytes as one little-endian number"

ONES = np.uint64(0x0101010101010101)
HIGH = np.uint64(0x8080808080808080)
LOW = np.uint64(0x7F7F7F7F7F7F7F7F)
ONE = np.uint64(1)
NEWLINES = np.uint64(0x0A * 0x0101010101010101)
_CASE = np.uint64(0x20 * 0x0101010101010101)
_FROM_A, _PAST_Z = (np.uint64(n * 0x0101010101010101) for n in (0x80 - 0x61, 0x7F - 0x7A))
_FROM_MARK = np.uint64((0x80 - 0x21) * 0x0101010101010101)
_FROM_0, _PAST_9 = (np.uint64(n * 0x0101010101010101) for n in (0x80 - 0x30, 0x7F - 0x39))


_emitted: Any = intrinsic  # emits LLVM instructions


@_emitted
def _load(_, data, position):  # type: ignore[no-untyped-def]
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        address = builder.add(builder.ptrtoint(array.data, ir.IntType(64)), arguments[1])
        return builder.load(builder.inttoptr(address, ir.IntType(64).as_pointer()), align=1)

    return types.uint64(data, types.int64), generate


@_emitted
def _store(_, data, position, word):  # type: ignore[no-untyped-def]
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        address = builder.add(builder.ptrtoint(array.data, ir.IntType(64)), arguments[1])
        builder.store(arguments[2], builder.inttoptr(address, ir.IntType(64).as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(data, types.int64, types.uint64), generate


@_emitted
def _trailing_zeros(_, word):  # type: ignore[no-untyped-def]
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 0))

    return types.int64(types.uint64), generate


@_emitted
def _bits(_, word):  # type: ignore[no-untyped-def]
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.int64(types.uint64), generate


@_emitted
def _prefetch(_, data, position):  # type: ignore[no-untyped-def]
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        number, pointer = ir.IntType(32), ir.IntType(8).as_pointer()
        function = builder.module.declare_intrinsic(
            "llvm.prefetch", [pointer], ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
        )
        address = builder.bitcast(builder.gep(array.data, [arguments[1]]), pointer)
        builder.call(function, [address, number(0), number(3), number(1)])
        return context.get_dummy_value()

    return types.void(data, types.int64), generate


def prefetch(data: Any, i: Any) -> None:
    """Prefetch data[i] into the cache."""


def load(data: Any, i: Any) -> Any:
    """data[i:i+8] as one number; bytes past the end of the array read as zero."""
    return np.uint64(int.from_bytes(bytes(data[i : i + 8]), "little"))


def store(data: Any, i: Any, word: Any) -> None:
    """data[i:i+8] = word; the range must be inside the array."""
    data[i : i + 8] = np.frombuffer(int(word).to_bytes(8, "little"), np.uint8)


def first(mask: Any) -> Any:
    """Index, 0 to 7, of the first byte that a mask selects; 8 if there is none."""
    return ((int(mask) & -int(mask)).bit_length() + 63) % 64 // 8 if mask else 8


def count(mask: Any) -> Any:
    """Number of bytes that a mask selects."""
    return int(mask).bit_count()


@overload(load)
def _compiled_load(data, i):  # type: ignore[no-untyped-def]
    def load(data, i):  # type: ignore[no-untyped-def]
        if i + 8 <= len(data):
            return _load(data, i)
        word = np.uint64(0)
        for k in range(len(data) - i):
            word |= np.uint64(data[i + k]) << np.uint64(8 * k)
        return word

    return load


@overload(prefetch)
def _compiled_prefetch(data, i):  # type: ignore[no-untyped-def]
    return lambda data, i: _prefetch(data, i)


@overload(store)
def _compiled_store(data, i, word):  # type: ignore[no-untyped-def]
    def store(data, i, word):  # type: ignore[no-untyped-def]
        if i < 0 or i + 8 > len(data):
            raise IndexError("store outside the array")
        _store(data, i, word)

    return store


@overload(first)
def _compiled_first(mask):  # type: ignore[no-untyped-def]
    return lambda mask: _trailing_zeros(mask) >> 3


@overload(count)
def _compiled_count(mask):  # type: ignore[no-untyped-def]
    return lambda mask: _bits(mask)


@kernel
def below(k):  # type: ignore[no-untyped-def]
    """All bits of the first `k` bytes, k from 0 to 7."""
    return (ONE << np.uint64(8 * k)) - ONE


@kernel
def equal(word, wanted):  # type: ignore[no-untyped-def]
    """Mask of the bytes that are equal in two words."""
    other = word ^ wanted
    return ~(((other & LOW) + LOW) | other) & HIGH


@kernel
def letters_and_digits(word):  # type: ignore[no-untyped-def]
    """Masks of ASCII letters and of ASCII digits."""
    low = word & LOW
    folded = low | _CASE
    letters = (folded + _FROM_A) & ~(folded + _PAST_Z) & ~word & HIGH
    return letters, (low + _FROM_0) & ~(low + _PAST_9) & ~word & HIGH


@kernel
def continuations(word):  # type: ignore[no-untyped-def]
    """Mask of the continuation bytes 10xxxxxx."""
    return word & ~(word << ONE) & HIGH


@kernel
def visible(word):  # type: ignore[no-untyped-def]
    """Mask of the ASCII characters other than spaces and controls."""
    low = word & LOW
    return (low + _FROM_MARK) & ~(low + ONES) & ~word & HIGH


@kernel
def find(data, start, stop, wanted):  # type: ignore[no-untyped-def]
    """Index in data[start:stop] of the first byte equal to the one that `wanted` repeats eight times; `stop` if
    there is none.
    """
    i = start
    while i < stop:
        mask = equal(load(data, i), wanted)
        if mask:
            return min(i + first(mask), stop)
        i += 8
    return stop


@kernel
def length(data, start, stop):  # type: ignore[no-untyped-def]
    """Number of characters in data[start:stop], which holds whole UTF-8 characters."""
    characters = stop - start
    i = start
    while i + 8 <= stop:
        characters -= count(continuations(load(data, i)))
        i += 8
    if i < stop:
        characters -= count(continuations(load(data, i) & below(stop - i)))
    return characters


@kernel
def copy(data, start, stop, out, position):  # type: ignore[no-untyped-def]
    """out[position:] = data[start:stop]. Up to eight bytes after that are overwritten, and must be inside the array."""
    for i in range(start, stop, 8):
        store(out, position, load(data, i))
        position += 8
