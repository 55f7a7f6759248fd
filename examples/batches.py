"""Digests of the first training batches of mixes: `python batches.py mix/ plan/`. Exit code 1 if they differ."""

from __future__ import annotations

import sys

import xxhash

from llmkit.mixing.order import OrderedTokens
from llmkit.training.data import StreamSource

BATCHES, BATCH_SIZE, LENGTH = 1000, 4, 256


def digest(path: str) -> str:
    """xxh3-128 of the inputs, targets and weights of the first batches."""
    stream = OrderedTokens.open(path)
    source = StreamSource(stream, LENGTH, BATCH_SIZE, BATCHES * BATCH_SIZE * LENGTH)
    state = xxhash.xxh3_128()
    for step in range(BATCHES):
        batch = source.batch(step, 0, BATCH_SIZE)
        for tensor in (batch.input_ids, batch.targets, batch.weights):
            state.update(tensor.numpy().tobytes())
    return state.hexdigest()


if __name__ == "__main__":
    digests = [digest(path) for path in sys.argv[1:]]
    for path, value in zip(sys.argv[1:], digests, strict=True):
        print(f"{value}  the first {BATCHES:,} batches of {path}")
    sys.exit(len(set(digests)) > 1)
