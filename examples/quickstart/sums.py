"""A skill that a model of two million parameters can learn: adding two-digit numbers.

Of the 8,100 sums of 10..99, 250 are held out for testing and 200 for choosing settings; they are never trained on, in
either order of the two numbers. The answer shows its working, first the ones and then the tens, and ends in the sum:
`What is 37 + 45?` -> `7+5=12, 3+4+1=8: 82`. Each step then involves single digits only. Without the working, a model
of this size keeps guessing.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator

from .definitions import DEVELOPMENT, TEST, TRAIN

HELD_OUT = {TEST: 250, DEVELOPMENT: 200}


def sums(seed: int) -> dict[str, list[tuple[int, int]]]:
    """The pairs of each split, in random order; a pair and its mirror image are in the same split."""
    rng = random.Random(seed)
    pairs = [(a, b) for a in range(10, 100) for b in range(a, 100)]
    rng.shuffle(pairs)
    splits: dict[str, list[tuple[int, int]]] = {}
    for name, count in HELD_OUT.items():
        splits[name], pairs = [rng.choice([(a, b), (b, a)]) for a, b in pairs[:count]], pairs[count:]
    splits[TRAIN] = sorted({pair for a, b in pairs for pair in ((a, b), (b, a))})
    rng.shuffle(splits[TRAIN])
    return splits


def sum_rows(pairs: Iterable[tuple[int, int]]) -> Iterator[dict[str, object]]:
    """Chat rows `{"messages": [...]}`."""
    for a, b in pairs:
        question = {"role": "user", "content": f"What is {a} + {b}?"}
        yield {"messages": [question, {"role": "assistant", "content": working(a, b)}]}


def working(a: int, b: int) -> str:
    """The worked answer: `7+5=12, 3+4+1=8: 82`."""
    ones, tens = a % 10 + b % 10, a // 10 + b // 10
    carried = f"{a // 10}+{b // 10}+1={tens + 1}" if ones > 9 else f"{a // 10}+{b // 10}={tens}"
    return f"{a % 10}+{b % 10}={ones}, {carried}: {a + b}"


def sum_items(pairs: Iterable[tuple[int, int]]) -> Iterator[dict[str, str]]:
    """Items `{question, answer}` of the task."""
    for a, b in pairs:
        yield {"question": f"What is {a} + {b}?", "answer": str(a + b)}
