"""A mix plan: a small TOML that decides a training order, which mixing/order.py follows.

    version = 2
    seed = 7
    tokenizer = "xxh3:..."
    shuffle = "global"
    weight_map = [[1, 1], [2, 3]]    # only where documents come by their duplicates: from so many on, so often in a pass
    sequence_length = 2048           # only where documents are packed for it by best fit
    [[source]]
    path = "../web"                  # from the plan's own directory
    digest = "xxh3:..."
    tokens = [600000, 20000]         # of each stage
    held_out = [17, 801]             # numbers of the documents that are kept out

Held-out documents are named one by one, so that following a plan need not read the tokens to find them.
"""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from llmkit.errors import LlmkitError

PLAN_NAME = "plan.toml"
PLAN_VERSION = 2
LONGEST = 1 << 24  # sequence that is packed for
MOST_TIMES = 1000  # that a document comes in a pass
# What `train --recipe` reads of a file of stages, at its top and in each stage: the same file may say how a mix is made and how it is trained on.
RECIPE_KEYS = ("batch_size", "sequence_length", "betas", "weight_decay", "clip")
STAGE_KEYS = (
    "lr",
    "final_lr",
    "schedule",
    "warmup",
    "decay",
    "decay_shape",
    "horizon",
    "sequence_length",
    "rope_theta",
)
SHUFFLES = ("global", "block", "none")
HINT = "plans come from: llmkit mix --plan"


@dataclass(frozen=True, slots=True)
class PlannedSource:
    """One source of a plan: where it is, the digest of its content, how many tokens it gives to each stage, which documents it keeps out."""

    path: str
    digest: str
    tokens: tuple[int, ...]
    held_out: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """What decides an order; `tokenizer` is the digest of the shards' tokenizer ("" for documents), `sequence_length` that of best-fit packing."""

    sources: tuple[PlannedSource, ...]
    seed: int
    tokenizer: str = ""
    shuffle: str = "global"
    sequence_length: int | None = None
    weight_map: tuple[tuple[int, int], ...] = ()


def plan_text(plan: Plan, lineage: dict[str, Any] | None = None) -> str:
    """The plan as TOML, with its lineage under `llmkit`."""
    lines = [
        "# llmkit mix --plan: llmkit train follows it",
        f"version = {PLAN_VERSION}",
        f"seed = {plan.seed}",
        f"tokenizer = {_quoted(plan.tokenizer)}",
        f"shuffle = {_quoted(plan.shuffle)}",
    ]
    if plan.sequence_length:
        lines.append(f"sequence_length = {plan.sequence_length}")
    if plan.weight_map:
        lines.append(f"weight_map = {list(map(list, plan.weight_map))}")
    if lineage:
        text = json.dumps(lineage, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        lines.append(f"llmkit = {_quoted(text)}")
    for source in plan.sources:
        lines += [
            "",
            "[[source]]",
            f"path = {_quoted(source.path)}",
            f"digest = {_quoted(source.digest)}",
            f"tokens = {list(source.tokens)}",
        ]
        if source.held_out:
            lines.append(f"held_out = {list(source.held_out)}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def read_plan(path: Path) -> Plan:
    """The plan in a TOML file; LlmkitError where it is not one."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LlmkitError(f"{path}: {error.strerror}", "check the path and its permissions") from error
    except (ValueError, RecursionError) as error:
        raise LlmkitError(f"{path}: invalid TOML ({error})", HINT) from error
    if content.get("version") != PLAN_VERSION:
        hint = "run mix again: plans of version 1 are of an earlier llmkit" if content.get("version") == 1 else HINT
        raise LlmkitError(f"{path}: no mix plan of version {PLAN_VERSION}", hint)
    rows = content.get("source")
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise LlmkitError(f"{path}: no [[source]] in this plan", HINT)
    for number, row in enumerate(rows, 1):
        row.setdefault("held_out", [])
        wrong = [key for key in ("path", "digest") if not isinstance(row.get(key), str)]
        wrong += [key for key in ("tokens", "held_out") if not _counts(row.get(key))]
        if not wrong and (len(row["tokens"]) != len(rows[0]["tokens"]) or not row["tokens"]):
            wrong = ["tokens"]
        if wrong:
            raise LlmkitError(f"{path}: source {number}: field {wrong[0]!r} is missing or wrong", HINT)
    length, ranges = content.get("sequence_length"), content.get("weight_map", [])
    fields = {
        "seed": type(content.get("seed")) is int and 0 <= content["seed"] < 1 << 128,
        "tokenizer": isinstance(content.get("tokenizer"), str),
        "shuffle": content.get("shuffle") in SHUFFLES,
        "sequence_length": length is None or (type(length) is int and 0 < length <= LONGEST),
        "weight_map": isinstance(ranges, list) and all(map(_range, ranges)),
    }
    for name, valid in fields.items():
        if not valid:
            raise LlmkitError(f"{path}: field {name!r} is missing or wrong", HINT)
    sources = tuple(
        PlannedSource(row["path"], row["digest"], tuple(row["tokens"]), tuple(row["held_out"])) for row in rows
    )
    return Plan(sources, content["seed"], content["tokenizer"], content["shuffle"], length, tuple(map(tuple, ranges)))


def _range(value: Any) -> bool:
    return _counts(value) and len(value) == 2 and 1 <= value[1] <= MOST_TIMES


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 62 for item in value)


def located(plan: Path, source: PlannedSource) -> Path:
    """Where a source is now: at its path from the plan's directory, else beside the plan under its base name."""
    candidates = [plan.parent / source.path, plan.parent / Path(source.path).name]
    for candidate in candidates:
        if candidate.is_file() or candidate.is_dir():  # a device would be read without end
            return candidate
    raise LlmkitError(
        f"{plan}: its source {source.path} is not there", f"looked for {candidates[0]} and {candidates[1]}"
    )


def read_record(path: str) -> Any:
    """The lineage record in a plan, valid or not; None where there is none."""
    try:
        return tomllib.loads(Path(path).read_text()).get("llmkit")
    except (OSError, ValueError):
        return None


def plan_digest(path: str | Path) -> str | None:
    """Digest of the plan in a file or directory; None where it is no plan of ours."""
    place = Path(path) / PLAN_NAME if Path(path).is_dir() else Path(path)
    try:
        return digest_of(read_plan(place))
    except LlmkitError:
        return None


def digest_of(plan: Plan) -> str:
    """Digest of what decides the order of a plan, not of where its shards lie."""
    kept = [plan.seed, plan.tokenizer, plan.shuffle, plan.sequence_length]
    kept += [plan.weight_map] if plan.weight_map else []
    kept += [[source.digest, source.tokens, source.held_out] for source in plan.sources]
    return "xxh3:" + xxhash.xxh3_128_hexdigest(json.dumps(kept).encode())
