"""Perplexity of documents: nats a token, and bits a byte, which compares models of different tokenizers.

Each document starts anew behind the end-of-text token, and every one of its tokens is predicted once. One that is longer than the context goes
through in windows that step by `stride` tokens: a token then has at least context - stride tokens before it. Memory is bounded by a buffer of
windows, whatever the number and length of documents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from llmkit.errors import LlmkitError
from llmkit.evaluation.scoring import score
from llmkit.model.decoder import Decoder

BUFFER = 512  # windows sorted and batched together


@dataclass(slots=True)
class Perplexity:
    """Sums over documents; the figures are derived from them."""

    nats: float = 0.0
    tokens: int = 0
    bytes: int = 0
    documents: int = 0

    def figures(self) -> dict[str, Any]:
        """What is reported. `bits_per_byte` is -Σ log2 p over UTF-8 bytes."""
        if not self.tokens:
            raise LlmkitError("no text to score", "every document is empty")
        mean = self.nats / self.tokens
        return {
            "nats_per_token": mean,
            "bits_per_byte": self.nats / math.log(2) / self.bytes,
            "perplexity": math.exp(min(mean, 700.0)),
            "tokens": self.tokens,
            "bytes": self.bytes,
            "documents": self.documents,
        }


def windows(tokens: list[int], prefix: int, context: int, stride: int) -> Iterator[tuple[list[int], int]]:
    """(tokens, n) requests that predict every token of a document once; `prefix` stands before its first."""
    row = [prefix, *tokens]
    done = 1  # row[:done] needs no prediction (any more)
    while done < len(row):
        stop = min(len(row), context + 1 if done == 1 else done + stride)
        yield row[max(0, stop - context - 1) : stop], stop - done
        done = stop


def perplexity(
    model: Decoder,
    encode: Callable[[str], list[int]],
    texts: Iterable[str],
    prefix: int,
    stride: int | None = None,
    advance: Callable[[int], None] | None = None,
) -> Perplexity:
    """Score texts; `encode` gives their ids, `prefix` is the id that stands before each, `stride` defaults to half the context."""
    context = model.config.max_position_embeddings
    step = min(stride or max(1, context // 2), context)
    total = Perplexity()
    held: list[tuple[list[int], int]] = []

    def flush() -> None:
        # fsum: the sum depends on the documents alone, not on how they fell into batches.
        total.nats += math.fsum(-result.logprob for result in score(model, held))
        held.clear()

    for text in texts:
        tokens = encode(text)
        if not tokens:
            continue
        total.documents += 1
        total.tokens += len(tokens)
        total.bytes += len(text.encode())
        for window in windows(tokens, prefix, context, step):
            held.append(window)
            if len(held) >= BUFFER:
                flush()
        if advance:
            advance(1)
    flush()
    return total
