"""Text generation: greedy, or sampled with temperature and top-p, with a key-value cache.

    tokens = generate(model, [[5, 17, 3]], max_new_tokens=64, temperature=0.8, top_p=0.95, seeds=[1], stop_ids=[0])[0]

Each prompt has its own random generator and seed, so a completion depends on its prompt and seed but not on the
rest of the batch (except for rounding: matrix products of different shapes may differ in the last bit). Prompts
are left-padded to the same length; finished rows leave the batch. Cost: one forward pass over the prompts, then
one per token, which reads all weights once for the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llmkit.errors import LlmkitError
from llmkit.model.decoder import Decoder
from llmkit.model.kv_cache import KeyValueCache

PADDING = -1  # document id of padding: only padding attends to it


@torch.inference_mode()
def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seeds: Sequence[int] = (),
    stop_ids: Sequence[int] = (),
    ended: Callable[[list[int]], bool] | None = None,
) -> list[list[int]]:
    """New tokens for each prompt, without the stop token; fewer than max_new_tokens only if it stopped or the
    context was full.

    `temperature` 0 is greedy decoding; otherwise `seeds` has one seed per prompt. A row ends at any of
    `stop_ids`, or when `ended` is true for its new tokens. Raises LlmkitError for a prompt that is empty or
    fills the context.
    """
    limit = model.config.context
    for number, prompt in enumerate(prompts):
        if not 0 < len(prompt) < limit:
            raise LlmkitError(
                f"prompt {number + 1} has {len(prompt):,} tokens, the context is {limit:,}",
                "a prompt needs at least 1 token and must leave room for an answer",
            )
    assert temperature == 0 or len(seeds) == len(prompts), "sampling needs one seed per prompt"
    results: list[list[int]] = [[] for _ in prompts]
    if not prompts or max_new_tokens < 1:
        return results
    device = next(model.parameters()).device
    generators = [torch.Generator().manual_seed(seed & (1 << 63) - 1) for seed in seeds] if temperature else []
    stops = set(stop_ids)

    rows = list(range(len(prompts)))  # the prompt of each row in the batch
    ids_BT, positions_BT, documents_BT = _padded(prompts, device)
    cache = KeyValueCache(model.config.num_hidden_layers, min(limit, ids_BT.shape[1] + max_new_tokens))
    ropes = {model.config.family.rope(model.config, layer) for layer in range(model.config.num_hidden_layers)}
    while rows:
        hidden_BTD = model.hidden(ids_BT, document_ids=documents_BT, positions=positions_BT, cache=cache)
        logits_BV = model.logits(hidden_BTD[:, -1]).float()
        if not logits_BV.isfinite().all():
            raise LlmkitError(
                "the model's logits are not finite",
                "its training diverged, or its values exceed the range of the type: try --dtype fp32",
            )
        if temperature == 0:
            chosen_B = logits_BV.argmax(-1)
        else:
            draws_B = torch.stack([torch.rand((), generator=generators[row], dtype=torch.float64) for row in rows])
            chosen_B = sample(logits_BV, temperature, top_p, draws_B.to(device))
        unfinished = []  # rows of the batch
        for i, (row, token) in enumerate(zip(rows, chosen_B.tolist(), strict=True)):
            if token in stops:
                continue
            results[row].append(token)
            full = len(results[row]) >= max_new_tokens or len(prompts[row]) + len(results[row]) >= limit
            if not full and not (ended and ended(results[row])):
                unfinished.append(i)
        lengths = [len(prompts[rows[i]]) + len(results[rows[i]]) for i in unfinished]
        if any(rope and rope.changes_at(length) for rope in ropes for length in lengths):  # of cached keys too
            rows = [rows[i] for i in unfinished]
            ids_BT, positions_BT, documents_BT = _padded([[*prompts[row], *results[row]] for row in rows], device)
            cache = KeyValueCache(model.config.num_hidden_layers, min(limit, ids_BT.shape[1] + max_new_tokens))
            continue
        remaining = torch.tensor(unfinished, dtype=torch.int64, device=device)
        if len(unfinished) < len(rows):
            cache.keep_rows(remaining)
            rows = [rows[i] for i in unfinished]
        ids_BT = chosen_B[remaining, None]
        positions_BT = positions_BT[remaining, -1:] + 1
        documents_BT = None if documents_BT is None else torch.zeros_like(ids_BT)
    return results


def _padded(sequences: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    """Ids, positions and, if there is padding, document ids, all [B, T], of sequences that end together."""
    width = max(map(len, sequences))
    padding_B1 = torch.tensor([[width - len(sequence)] for sequence in sequences], device=device)
    ids_BT = torch.tensor([[0] * (width - len(sequence)) + list(sequence) for sequence in sequences], device=device)
    index = torch.arange(width, device=device)
    documents_BT = torch.where(index < padding_B1, PADDING, 0) if padding_B1.any() else None
    return ids_BT, (index - padding_B1).clamp(min=0), documents_BT


def sample(logits_BV: Tensor, temperature: float, top_p: float, draws_B: Tensor) -> Tensor:
    """Token ids [B]: the inverse of the cumulative distribution at `draws_B` in [0, 1), most probable tokens first.

    Restricted to the smallest set of most probable tokens whose probabilities reach `top_p` (nucleus sampling,
    arXiv:1904.09751).
    """
    sorted_BV, order_BV = logits_BV.double().div(temperature).sort(stable=True, dim=-1, descending=True)
    probabilities_BV = sorted_BV.softmax(-1)
    cumulative_BV = probabilities_BV.cumsum(-1)
    nucleus_BV = cumulative_BV - probabilities_BV < top_p  # always includes the first token
    mass_BV = torch.where(nucleus_BV, probabilities_BV, 0.0).cumsum(-1)
    rank_B = torch.searchsorted(mass_BV, draws_B[:, None] * mass_BV[:, -1:], right=True)
    last_B = nucleus_BV.sum(-1, keepdim=True) - 1
    return order_BV.gather(-1, torch.minimum(rank_B, last_B))[:, 0]
