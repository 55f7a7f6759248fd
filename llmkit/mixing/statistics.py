"""Statistics of a resolved mix, as table rows: tokens, shares and epochs by source and by stage, and the effect
of packing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmkit.errors import LlmkitError
from llmkit.io.names import escape_name
from llmkit.mixing.order import Order
from llmkit.mixing.packing import cut_share, pack_sequences
from llmkit.mixing.request import MixRequest, Warn
from llmkit.mixing.stages import MixStage

Row = dict[str, Any]
Numbers = NDArray[np.int64]
TABLES = ("sources", "stages", "packing")  # counts that are tables; lineage records only the plain ones


def mix_counts(
    request: MixRequest,
    order: Order,
    lengths: Sequence[Numbers],
    copies: Sequence[Numbers | None],
    warn: Warn,
    packed: Order | None = None,
) -> dict[str, Any]:
    """The counts of a mix for its summary, those in `TABLES` as rows.

    `order` is not packed; `packed` is the same order after best-fit packing, where that was requested. Calls
    `warn` for each source from which a stage takes nothing, and for tokens and shares that are missed by over 1 %.
    """
    stages = stage_rows(order, request.paths, request.stages)
    sources = source_rows(order, request.paths, lengths, copies)
    packing = packing_rows(order, request.sequence_length, packed) if request.sequence_length else []
    _warn_missed(request, stages, warn)
    for row in stages:
        if not row["tokens"]:
            to = f" to {row['stage']}" if row["stage"] else ""
            warn(f"{row['source']} gives nothing{to}: its share is less than half a document")
    counts = {
        "documents": sum(map(len, lengths)),
        "taken": len(order.document),
        "tokens": int(order.size.sum()),
        "sources": sources,
    }
    return counts | ({"stages": stages} if len(request.stages) > 1 else {}) | ({"packing": packing} if packing else {})


def _warn_missed(request: MixRequest, stages: Sequence[Row], warn: Warn) -> None:
    """Warn of stages, or else sources, of over 1 % more or fewer tokens than they were to have, and of shares that miss
    the weights by over 1 %.
    """
    hint = ": documents stay whole" + ("" if request.documents else " without --cut-last")
    for stage in request.stages:
        rows = [row for row in stages if row["stage"] == stage.name]
        wanted = {request.paths[i]: spec.value for i, spec in stage.specs.items() if spec.kind == "tokens"}
        goals = [(escape_name(row["source"]), row["tokens"], wanted.get(row["source"])) for row in rows]
        if stage.tokens is not None:
            goals = [(stage.name or "the mix", sum(row["tokens"] for row in rows), stage.tokens)]
        for name, tokens, goal in goals:
            if goal and abs(tokens - goal) > goal / 100:
                warn(f"{name}: {tokens:,} tokens instead of {round(goal):,} ({tokens / goal - 1:+.1%}){hint}")
        weights = {request.paths[i]: spec.value for i, spec in stage.specs.items() if spec.kind == "weight"}
        taken = {row["source"]: row["tokens"] for row in rows if row["source"] in weights}
        total, all_weights = sum(taken.values()), sum(weights.values())
        shares = {path: (taken[path] / max(total, 1), weight / all_weights) for path, weight in weights.items()}
        if any(abs(share - wanted) > wanted / 100 for share, wanted in shares.values()):
            reached = (f"{escape_name(path)} {a:.2%} instead of {b:.2%}" for path, (a, b) in shares.items())
            warn(f"{stage.name or 'the mix'}: shares are {', '.join(reached)}{hint}")


def tokens_per_pass(lengths: Sequence[Numbers], copies: Sequence[Numbers | None]) -> list[int]:
    """Tokens of one pass over each source."""
    return [
        int((sizes if per_document is None else sizes * per_document).sum())
        for sizes, per_document in zip(lengths, copies, strict=True)
    ]


def lineage_counts(counts: dict[str, Any]) -> dict[str, Any]:
    """The counts that lineage records: all but the tables."""
    return {key: value for key, value in counts.items() if key not in TABLES}


def stage_rows(order: Order, paths: Sequence[str], stages: Sequence[MixStage]) -> list[Row]:
    """A row for each source of each stage. Raises LlmkitError where a stage is empty."""
    rows: list[Row] = []
    for stage, first, stop in zip(stages, [0, *order.ends], order.ends, strict=False):
        tokens = np.bincount(order.source[first:stop], order.size[first:stop], len(paths)).astype(np.int64).tolist()
        if not sum(tokens):
            name = stage.name or "the mix"
            raise LlmkitError(f"{name} is empty: the request is for less than one document", "ask for more tokens")
        rows += [
            {"stage": stage.name, "source": paths[i], "tokens": tokens[i], "share": tokens[i] / sum(tokens)}
            for i in stage.specs
        ]
    return rows


def source_rows(
    order: Order, paths: Sequence[str], lengths: Sequence[Numbers], copies: Sequence[Numbers | None]
) -> list[Row]:
    """A row for each source: the tokens of its usable documents, each counted once, and what the mix takes of them."""
    rows: list[Row] = []
    for i, (path, sizes, per_document) in enumerate(zip(paths, lengths, copies, strict=True)):
        start_tokens = int((sizes if per_document is None else sizes * (per_document > 0)).sum())
        selected = order.source == i
        tokens = int(order.size[selected].sum())
        rows.append(
            {
                "source": path,
                "start_tokens": start_tokens,
                "multiplier": tokens / max(start_tokens, 1),
                "tokens": tokens,
                "share": tokens / int(order.size.sum()),
                "epochs": int(np.max(order.epoch[selected], initial=-1)) + 1,
            }
        )
    return rows


def packing_rows(order: Order, length: int, packed: Order | None) -> list[Row]:
    """A row for each way of packing into sequences of `length`: the share of documents cut, and of positions
    that are padding.

    `packed` is the order after best-fit packing, where it is already computed.
    """
    row, _, size, _ = (
        pack_sequences(order.size, order.ends, length) if packed is None else (packed.source, None, packed.size, None)
    )
    too_long = float((order.size > length).sum() / (order.size > 0).sum())
    return [
        {"packing": "concat", "cut": cut_share(order.size, length), "padding": 0.0},
        {"packing": "best-fit", "cut": too_long, "padding": float(size[row < 0].sum() / size.sum())},
    ]
