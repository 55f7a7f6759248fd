"""Continuations of prompts: greedy, or sampled by temperature and top-p, with a cache of keys and values.

    tokens = generate(model, [[5, 17, 3]], max_new_tokens=64, temperature=0.8, top_p=0.95, seeds=[1], stop_ids=[0])[0]

Each prompt draws from a generator of its own, seeded with its own seed, so a completion depends on its prompt and seed and not on what else is in
the batch (beyond rounding: a matrix product of another shape may differ in the last bit). Prompts are padded on the left to one length; rows
that have ended leave the batch. Cost: one pass over the prompts, then one pass a token that reads all weights once for the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llmkit.errors import LlmkitError
from llmkit.model.decoder import Decoder
from llmkit.model.kv_cache import KeyValueCache

PADDING = -1  # document id of padding, which nothing attends to but itself


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
    """New tokens of each prompt, without the stop token; fewer than max_new_tokens only where it stopped or the context was full.

    `temperature` 0 is greedy; otherwise `seeds` holds one seed a prompt. A row ends at any of `stop_ids`, or after a token for which `ended`
    of its new tokens is true. Raises LlmkitError for a prompt that is empty or leaves no room in the context.
    """
    limit = model.config.max_position_embeddings
    for number, prompt in enumerate(prompts):
        if not 0 < len(prompt) < limit:
            raise LlmkitError(
                f"prompt {number + 1} has {len(prompt):,} tokens, the context is {limit:,}",
                "a prompt needs 1 token, and room for an answer",
            )
    assert temperature == 0 or len(seeds) == len(prompts), "sampling needs one seed a prompt"
    results: list[list[int]] = [[] for _ in prompts]
    if not prompts or max_new_tokens < 1:
        return results
    device = next(model.parameters()).device
    generators = [torch.Generator().manual_seed(seed & (1 << 63) - 1) for seed in seeds] if temperature else []
    stops = set(stop_ids)

    width = max(map(len, prompts))
    padding = torch.tensor([width - len(prompt) for prompt in prompts], device=device)
    ids_BT = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    positions_BT = (torch.arange(width, device=device) - padding[:, None]).clamp(min=0)
    padded = bool(padding.any())
    documents_BT = torch.where(torch.arange(width, device=device) < padding[:, None], PADDING, 0) if padded else None
    cache = KeyValueCache(model.config.num_hidden_layers, min(limit, width + max_new_tokens))
    rows = list(range(len(prompts)))  # of the results, by row of the batch
    while rows:
        hidden_BTD = model.hidden(ids_BT, document_ids=documents_BT, positions=positions_BT, cache=cache)
        logits_BV = model.logits(hidden_BTD[:, -1]).float()
        if not logits_BV.isfinite().all():
            raise LlmkitError(
                "the model's logits are not finite",
                "its training diverged, or its type is too narrow for it: --dtype fp32",
            )
        if temperature == 0:
            chosen_B = logits_BV.argmax(-1)
        else:
            draws_B = torch.stack([torch.rand((), generator=generators[row], dtype=torch.float64) for row in rows])
            chosen_B = sample(logits_BV, temperature, top_p, draws_B.to(device))
        going = []
        for place, (row, token) in enumerate(zip(rows, chosen_B.tolist(), strict=True)):
            if token in stops:
                continue
            results[row].append(token)
            full = len(results[row]) >= max_new_tokens or len(prompts[row]) + len(results[row]) >= limit
            if not full and not (ended and ended(results[row])):
                going.append(place)
        kept = torch.tensor(going, dtype=torch.int64, device=device)
        if len(going) < len(rows):
            cache.keep_rows(kept)
            rows = [rows[place] for place in going]
        ids_BT = chosen_B[kept, None]
        positions_BT = positions_BT[kept, -1:] + 1
        documents_BT = torch.zeros_like(ids_BT) if padded else None
    return results


def sample(logits_BV: Tensor, temperature: float, top_p: float, draws_B: Tensor) -> Tensor:
    """Token ids [B]: the inverse distribution function at `draws_B` in [0, 1), most probable tokens first.

    Only the fewest most probable tokens whose probabilities reach `top_p` take part (arXiv:1904.09751).
    """
    sorted_BV, order_BV = logits_BV.double().div(temperature).sort(stable=True, dim=-1, descending=True)
    probabilities_BV = sorted_BV.softmax(-1)
    cumulative_BV = probabilities_BV.cumsum(-1)
    kept_BV = cumulative_BV - probabilities_BV < top_p  # the first one always
    mass_BV = torch.where(kept_BV, probabilities_BV, 0.0).cumsum(-1)
    place_B = torch.searchsorted(mass_BV, draws_B[:, None] * mass_BV[:, -1:], right=True)
    last_B = kept_BV.sum(-1, keepdim=True) - 1
    return order_BV.gather(-1, torch.minimum(place_B, last_B))[:, 0]
