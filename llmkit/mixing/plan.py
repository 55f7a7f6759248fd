"""A mix plan: a small TOML file that determines a training order, which mixing/order.py follows.

    version = 2
    seed = 7
    tokenizer = "xxh3:..."
    shuffle = "global"
    weight_map = [[1, 1], [2, 3]]    # with --weight-map only: [first count, copies in a pass]
    cut_last = true                  # with --cut-last only, and then version = 3
    sequence_length = 2048           # with best-fit packing only
    [[source]]
    path = "../web"                  # relative to the plan's directory
    digest = "xxh3:..."
    tokens = [600000, 20000]         # budget in each stage
    held_out = [17, 801]             # numbers of the held-out documents

Held-out documents are listed one by one, so that following a plan need not read all tokens to find them.
"""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from llmkit.errors import LlmkitError
from llmkit.io.record import parse_record, slot_of
from llmkit.options import from_toml, toml_value

PLAN_NAME = "plan.toml"
PLAN_VERSION = 2
CUT_VERSION = 3  # of plans with cut_last, which an earlier llmkit would not follow
MAX_SEQUENCE_LENGTH = 1 << 24  # for packing
MAX_COPIES = 1000  # of a document in one pass
# Keys of `train --recipe` in a stages file, at its top and in each stage: the same file may describe a mix and
# its training.
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
HINT = "make a plan with: llmkit mix --plan"


@dataclass(frozen=True, slots=True)
class PlannedSource:
    """One source of a plan: its path, the digest of its content, its token budget in each stage, its held-out
    documents.
    """

    path: str
    digest: str
    tokens: tuple[int, ...]
    held_out: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that determines an order.

    `tokenizer` is the digest of the shards' tokenizer ("" for documents); `sequence_length` is set for best-fit
    packing only. With `cut_last` the documents at the ends of budgets are cut, which are then met exactly.
    """

    sources: tuple[PlannedSource, ...]
    seed: int
    tokenizer: str = ""
    shuffle: str = "global"
    sequence_length: int | None = None
    weight_map: tuple[tuple[int, int], ...] = ()
    cut_last: bool = False


def format_plan(plan: Plan, lineage: dict[str, Any] | None = None) -> str:
    """The plan as TOML. Its lineage is stored under `llmkit`."""
    lines = [
        "# llmkit mix --plan: llmkit train follows it",
        f"version = {CUT_VERSION if plan.cut_last else PLAN_VERSION}",
        f"seed = {plan.seed}",
        f"tokenizer = {toml_value(plan.tokenizer)}",
        f"shuffle = {toml_value(plan.shuffle)}",
    ]
    if plan.sequence_length:
        lines.append(f"sequence_length = {plan.sequence_length}")
    if plan.weight_map:
        lines.append(f"weight_map = {list(map(list, plan.weight_map))}")
    if plan.cut_last:
        lines.append("cut_last = true")
    if lineage:
        text = json.dumps(lineage, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        lines.append(f"llmkit = {toml_value(text)}")
    for source in plan.sources:
        lines += [
            "",
            "[[source]]",
            f"path = {toml_value(source.path)}",
            f"digest = {toml_value(source.digest)}",
            f"tokens = {list(source.tokens)}",
        ]
        if source.held_out:
            lines.append(f"held_out = {list(source.held_out)}")
    return "\n".join(lines) + "\n"


def read_plan(path: Path) -> Plan:
    """Read a plan from a TOML file. Raises LlmkitError where it is not a valid plan."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LlmkitError(f"{path}: {error.strerror}", "check the path and its permissions") from error
    except (ValueError, RecursionError) as error:
        raise LlmkitError(f"{path}: invalid TOML ({error})", HINT) from error
    cut_last = content.get("cut_last", False)
    if content.get("version") != (CUT_VERSION if cut_last else PLAN_VERSION):
        hint = "run mix again: version 1 was written by an earlier llmkit" if content.get("version") == 1 else HINT
        raise LlmkitError(f"{path}: not a mix plan of version {PLAN_VERSION}", hint)
    rows = content.get("source")
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise LlmkitError(f"{path}: no [[source]] in the plan", HINT)
    for number, row in enumerate(rows, 1):
        row.setdefault("held_out", [])
        invalid = [key for key in ("path", "digest") if not isinstance(row.get(key), str)]
        invalid += [key for key in ("tokens", "held_out") if not _is_counts(row.get(key))]
        if not invalid and (len(row["tokens"]) != len(rows[0]["tokens"]) or not row["tokens"]):
            invalid = ["tokens"]
        if invalid:
            raise LlmkitError(f"{path}: source {number}: field {invalid[0]!r} is missing or invalid", HINT)
    length, ranges = content.get("sequence_length"), content.get("weight_map", [])
    fields = {
        "seed": type(content.get("seed")) is int and 0 <= content["seed"] < 1 << 128,
        "tokenizer": isinstance(content.get("tokenizer"), str),
        "shuffle": content.get("shuffle") in SHUFFLES,
        "sequence_length": length is None or (type(length) is int and 0 < length <= MAX_SEQUENCE_LENGTH),
        "cut_last": isinstance(cut_last, bool),
        "weight_map": isinstance(ranges, list) and all(map(_is_range, ranges)),
    }
    for name, valid in fields.items():
        if not valid:
            raise LlmkitError(f"{path}: field {name!r} is missing or invalid", HINT)
    sources = tuple(
        PlannedSource(from_toml(row["path"]), row["digest"], tuple(row["tokens"]), tuple(row["held_out"]))
        for row in rows
    )
    return Plan(
        sources, content["seed"], content["tokenizer"], content["shuffle"], length, tuple(map(tuple, ranges)), cut_last
    )


def _is_range(value: Any) -> bool:
    return _is_counts(value) and len(value) == 2 and 1 <= value[1] <= MAX_COPIES


def _is_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 62 for item in value)


def locate_source(plan: Path, source: PlannedSource) -> Path:
    """Path of a source: relative to the plan's directory, else next to the plan under its base name."""
    candidates = [plan.parent / source.path, plan.parent / Path(source.path).name]
    for candidate in candidates:
        if candidate.is_file() or candidate.is_dir():  # not a device, which could be read without end
            return candidate
    raise LlmkitError(
        f"{plan}: its source {source.path} does not exist", f"looked for {candidates[0]} and {candidates[1]}"
    )


def read_record(path: str) -> Any:
    """The lineage record in a plan, valid or not; None where there is none. Raises UnreadableRecordError."""
    return slot_of(Path(path).read_bytes(), tomllib.loads, path)


def verify(path: Path) -> None:
    """Raise LlmkitError unless the plan in a file or directory is as it was written, and its sources are there."""
    path = path / PLAN_NAME if path.is_dir() else path
    plan, record = read_plan(path), parse_record(read_record(str(path)), str(path))
    if path.read_bytes() != format_plan(plan, record).encode(errors="surrogatepass"):
        raise LlmkitError(f"{path}: not as llmkit mix wrote it", "the file is damaged, or was edited")
    for source in plan.sources:
        locate_source(path, source)


def plan_digest(path: str | Path) -> str | None:
    """Digest of the plan in a file or directory; None where it does not hold a valid plan."""
    file = Path(path) / PLAN_NAME if Path(path).is_dir() else Path(path)
    try:
        return digest_plan(read_plan(file))
    except LlmkitError:
        return None


def digest_plan(plan: Plan) -> str:
    """Digest of what determines a plan's order; the paths of its shards do not count."""
    fields = [plan.seed, plan.tokenizer, plan.shuffle, plan.sequence_length]
    fields += [plan.weight_map] if plan.weight_map else []
    fields += ["cut_last"] if plan.cut_last else []
    fields += [[source.digest, source.tokens, source.held_out] for source in plan.sources]
    return "xxh3:" + xxhash.xxh3_128_hexdigest(json.dumps(fields).encode())
