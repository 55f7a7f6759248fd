"""A request to mix: which sources, in which stages and order, resolved from the command line or a stages file.

`ShardMix` and `DocumentMix` carry a request out. What they share is here: the kind of the sources, and their
token budgets.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmkit.errors import LlmkitError, UsageError
from llmkit.io.inputs import STDIN, expand, peek_stdin
from llmkit.mixing.specs import parse_spec
from llmkit.mixing.stages import MixStage, read_stages, single_stage, stage_budgets

PACKINGS = ("concat", "best-fit")
ARROW_FIRST_BYTE = b"\xff"  # neither JSON lines nor a compressed stream start with it

Warn = Callable[[str], object]


@dataclass(frozen=True, slots=True)
class MixRequest:
    """What to mix and in which order.

    `weight_map` holds (first count, copies) pairs, `holdout` the fraction of documents kept out of training.
    `sequence_length` is used by best-fit packing, and otherwise only for the packing statistics. With `cut_last` the
    documents at the ends of budgets are cut, which are then met exactly. `documents`: the sources are no token shards.
    """

    paths: list[str]
    stages: list[MixStage]
    seed: int
    shuffle: str = "global"
    packing: str = "concat"
    sequence_length: int | None = None
    weight_map: tuple[tuple[int, int], ...] = ()
    no_repeat: bool = False
    holdout: float = 0.0
    cut_last: bool = False
    documents: bool = False


def resolve_sources(
    sources: Sequence[str], stages_file: Path | None, tokens: int | None
) -> tuple[list[str], list[MixStage]]:
    """(paths, stages) of the sources named on the command line, or of a stages file. Nothing named means stdin.

    Raises UsageError where a spec or the file is invalid, or stdin is named twice.
    """
    if stages_file:
        paths, stages = read_stages(stages_file, sources)
    else:
        specs = [parse_spec(text) for text in sources or [STDIN]]
        paths, stages = [spec.path for spec in specs], single_stage(specs, tokens)
    if paths.count(STDIN) > 1:
        raise UsageError("stdin ('-') is named more than once", "it can be read only once")
    return paths, stages


def hold_tokens(paths: Sequence[str]) -> bool:
    """Whether the sources are token shards (True) or documents (False).

    Raises UsageError where some are one and some the other, LlmkitError where a source does not exist.
    """
    kinds = {path: _holds_tokens(path) for path in paths}
    if len(set(kinds.values())) > 1:
        shards, documents = (next(path for path, kind in kinds.items() if kind is wanted) for wanted in (True, False))
        raise UsageError(
            f"{shards} holds tokens, {documents} documents", "mix either, not both: tokenize the documents"
        )
    return all(kinds.values())


def _holds_tokens(path: str) -> bool:
    if path == STDIN:
        return peek_stdin() == ARROW_FIRST_BYTE
    if os.path.isdir(path):
        return any(name.endswith(".arrow") for name in os.listdir(path)) or not _holds_documents(path)
    if any(mark in path for mark in "*?[") and not os.path.exists(path):
        raise UsageError(f"{path}: a pattern is not one source", "name the directory, or each file")
    if not os.path.exists(path) and "://" not in path:
        raise LlmkitError(f"{path}: no such file or directory", "check the path")
    return path.endswith(".arrow")


def _holds_documents(path: str) -> bool:
    try:
        return bool(expand([path]))
    except LlmkitError:
        return False


def refuse_duplicate_sources(paths: Sequence[str], digests: Sequence[str]) -> None:
    """Raise UsageError where two sources have the same content: `epoch` would then miscount repetitions."""
    for i, digest in enumerate(digests):
        if digest in digests[:i]:
            first, second = paths[digests.index(digest)], paths[i]
            raise UsageError(f"{first} and {second} hold the same documents", "name them once, with one amount")


def token_budgets(request: MixRequest, available: Sequence[int], warn: Warn) -> list[tuple[int, ...]]:
    """Token budgets by source, one per stage. `available` are the tokens of one pass over each source.

    Calls `warn` for each source that is repeated without a multiplier; raises UsageError instead under `no_repeat`.
    """
    budgets = stage_budgets(request.stages, available, exact=request.cut_last)
    for i, (path, tokens, budget) in enumerate(zip(request.paths, available, map(sum, budgets), strict=True)):
        if budget > tokens and request.no_repeat:
            raise UsageError(
                f"{path} holds {tokens:,} tokens, but {budget:,} are requested",
                "ask for less of it, or drop --no-repeat",
            )
        if budget > tokens and any(i in stage.specs and stage.specs[i].kind != "times" for stage in request.stages):
            warn(f"{path} holds {tokens:,} tokens and gives {budget:,}: repeated, {budget / tokens:.2f} epochs")
    return budgets
