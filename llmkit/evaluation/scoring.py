"""Log-probabilities of continuations, batched by length, for tasks and perplexity.

A request is (tokens, n): how probable are the last n tokens, each given all tokens before it? Requests are
sorted longest first and batched up to a budget of padded tokens. Padding is on the right, where causal
attention does not see it. The output layer runs on the scored positions only, in slices, so that memory does
not grow with vocabulary times context.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from llmkit.errors import LlmkitError
from llmkit.model.decoder import Decoder

BATCH_TOKENS = 8192  # padded tokens in one forward pass
LOGIT_ROWS = 1024  # scored positions per slice of logits


@dataclass(frozen=True, slots=True)
class Score:
    """Sum of the log-probabilities of the scored tokens in nats, and whether each was the most probable one."""

    logprob: float
    greedy: bool


@torch.inference_mode()
def score(
    model: Decoder,
    requests: Sequence[tuple[Sequence[int], int]],
    batch_tokens: int = BATCH_TOKENS,
    advance: Callable[[int], None] | None = None,
) -> list[Score]:
    """One `Score` per request, in order. Tokens beyond the context are cut on the left; `advance` is called
    with numbers of finished requests.

    Each request needs at least one token before the n scored ones, and n may be at most the context.
    """
    device = next(model.parameters()).device
    limit = model.config.context
    results: list[Score | None] = [None] * len(requests)
    for batch in _batches(requests, limit, batch_tokens):
        rows = [(list(requests[i][0])[-(limit + 1) :], requests[i][1]) for i in batch]
        width = max(len(tokens) for tokens, _ in rows) - 1
        inputs = torch.tensor([tokens[:-1] + [0] * (width - len(tokens) + 1) for tokens, _ in rows], device=device)
        starts = torch.arange(width, device=device)
        ends = torch.tensor([[len(tokens) - 1] for tokens, _ in rows], device=device)
        hidden_BTD = model.hidden(inputs, positions=torch.where(starts < ends, starts, 0) if model.by_length else None)
        positions = [(row, len(tokens) - 1 - n + k) for row, (tokens, n) in enumerate(rows) for k in range(n)]
        targets = torch.tensor([token for tokens, n in rows for token in tokens[len(tokens) - n :]], device=device)
        logprobs, hits = _target_scores(model, hidden_BTD, positions, targets)
        start = 0
        for i, (_, n) in zip(batch, rows, strict=True):
            results[i] = Score(float(logprobs[start : start + n].sum()), bool(hits[start : start + n].all()))
            start += n
        if advance:
            advance(len(batch))
    return [result for result in results if result is not None]


def _batches(requests: Sequence[tuple[Sequence[int], int]], limit: int, budget: int) -> Iterator[list[int]]:
    """Indices of the requests, longest first, in batches whose number of rows times longest row is within the
    budget.
    """
    order = sorted(range(len(requests)), key=lambda i: (-len(requests[i][0]), i))
    batch: list[int] = []
    for i in order:
        tokens, n = requests[i]
        assert 0 < n < len(tokens) and n <= limit, (
            "a request needs a token before the scored ones, which must fit in the context"
        )
        longest = min(len(requests[batch[0]][0]) if batch else len(tokens), limit + 1)
        if batch and (len(batch) + 1) * longest > budget:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _target_scores(
    model: Decoder, hidden_BTD: torch.Tensor, positions: list[tuple[int, int]], targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability (float64) of each target at its position, and whether it is the argmax; both
    [len(positions)].
    """
    index = torch.tensor(positions, device=hidden_BTD.device)
    logprobs, hits = [], []
    for index_part, target_part in zip(index.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True):
        logits_NV = model.logits(hidden_BTD[index_part[:, 0], index_part[:, 1]]).float()
        if not bool(torch.isfinite(logits_NV).all()):
            raise LlmkitError("the model's logits are not finite", "its training diverged, or its weights are damaged")
        logprobs.append(F.log_softmax(logits_NV, -1).gather(1, target_part[:, None])[:, 0].double().cpu())
        hits.append((logits_NV.argmax(-1) == target_part).cpu())
    return torch.cat(logprobs), torch.cat(hits)
