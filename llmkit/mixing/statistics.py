"""What came out of a mix: tokens, shares and epochs of its sources, of its stages, and what packing cuts and pads. All as rows of a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmkit.errors import LlmkitError
from llmkit.mixing.order import Order
from llmkit.mixing.packing import cut_share, packed
from llmkit.mixing.stages import Stage

Row = dict[str, Any]
Numbers = NDArray[np.int64]


def by_stage(order: Order, paths: Sequence[str], stages: Sequence[Stage]) -> list[Row]:
    """A row for each source of each stage. LlmkitError where a stage came to nothing."""
    rows: list[Row] = []
    for stage, first, end in zip(stages, [0, *order.ends], order.ends, strict=False):
        got = np.bincount(order.source[first:end], order.size[first:end], len(paths)).astype(np.int64).tolist()
        if not sum(got):
            what = stage.name or "the mix"
            raise LlmkitError(f"{what} is empty: what it asks for is less than one document", "ask for more tokens")
        rows += [
            {"stage": stage.name, "source": paths[i], "tokens": got[i], "share": got[i] / sum(got)} for i in stage.specs
        ]
    return rows


def by_source(
    order: Order, paths: Sequence[str], lengths: Sequence[Numbers], copies: Sequence[Numbers | None]
) -> list[Row]:
    """A row for each source: what it holds (once each document that may be used), and what was taken of it."""
    rows: list[Row] = []
    for i, (path, sizes, many) in enumerate(zip(paths, lengths, copies, strict=True)):
        has = int((sizes if many is None else sizes * (many > 0)).sum())
        mine = order.source == i
        tokens = int(order.size[mine].sum())
        rows.append(
            {
                "source": path,
                "start_tokens": has,
                "multiplier": tokens / max(has, 1),
                "tokens": tokens,
                "share": tokens / int(order.size.sum()),
                "epochs": int(np.max(order.epoch[mine], initial=-1)) + 1,
            }
        )
    return rows


def by_packing(order: Order, length: int, made: Order | None) -> list[Row]:
    """A row for each way of packing into sequences of `length`: share of documents that it cuts, and share of positions that are padding.

    `made` is the order packed by best fit, where that was done already.
    """
    row, _, size, _ = packed(order.size, order.ends, length) if made is None else (made.source, None, made.size, None)
    longer = float((order.size > length).sum() / (order.size > 0).sum())
    return [
        {"packing": "concat", "cut": cut_share(order.size, length), "padding": 0.0},
        {"packing": "best-fit", "cut": longer, "padding": float(size[row < 0].sum() / size.sum())},
    ]
