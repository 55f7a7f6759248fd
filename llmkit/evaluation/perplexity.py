"""Perplexity of documents: nats per token, and bits per byte, which are comparable between tokenizers.

Each document follows an end-of-text token, and each of its tokens is predicted once. A document longer than the
context is scored in windows that advance by `stride` tokens, so that each token has at least context - stride
tokens before it. Memory is bounded by a buffer of windows, whatever the number and length of documents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from llmkit.errors import LlmkitError
from llmkit.evaluation.scoring import score
from llmkit.model.decoder import Decoder

BUFFER = 512  # windows that are sorted and batched together


@dataclass(slots=True)
class Perplexity:
    """Sums over documents."""

    nats: float = 0.0
    tokens: int = 0
    bytes: int = 0
    documents: int = 0

    def figures(self) -> dict[str, Any]:
        """The reported numbers. `bits_per_byte` is -Σ log2 p / UTF-8 bytes."""
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
    """(tokens, n) requests that predict each token of a document once; `prefix` is the token before its first."""
    row = [prefix, *tokens]
    done = 1  # row[:done] is already predicted, or the prefix
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
    """Score texts. `encode` returns their ids, `prefix` is the id before each, `stride` defaults to half the
    context; `advance` counts texts.
    """
    context = model.config.max_position_embeddings
    step = min(stride or max(1, context // 2), context)
    total = Perplexity()
    pending: list[tuple[list[int], int]] = []

    def flush() -> None:
        # fsum: the sum depends only on the documents, not on how they were batched.
        total.nats += math.fsum(-result.logprob for result in score(model, pending))
        pending.clear()

    for text in texts:
        tokens = encode(text)
        if not tokens:
            continue
        total.documents += 1
        total.tokens += len(tokens)
        total.bytes += len(text.encode())
        for window in windows(tokens, prefix, context, step):
            pending.append(window)
            if len(pending) >= BUFFER:
                flush()
        if advance:
            advance(1)
    flush()
    return total
