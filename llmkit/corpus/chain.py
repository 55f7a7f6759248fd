"""Filters in a row: presets, overrides, and the work on one chunk of documents.

A preset is TOML: `[[filter]]` tables in order, each with a `name` and thresholds. Built-in ones lie in `presets/`; a path names one's own.

    chain = load_chain(["fineweb"], [], ["gopher_quality.max_symbol_word_ratio=0.2"], "unicode")
    verdict = chain.judge(text)                       # .text (perhaps edited), .drop (None: kept), .filter
    result = filter_chunk(chunk, ReadOptions(), chain)  # in a worker

A document stops at the first filter that drops it, a filter at its first failing rule: that is the reason. Cost: the sum of the filters,
about 1 MB of text a second and core for `fineweb`.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import orjson

from llmkit.corpus.filters import FILTERS, Drop, Filter
from llmkit.corpus.page import Page
from llmkit.corpus.words import SPLITTERS, Splitter
from llmkit.errors import LlmkitError, UsageError, unknown_name
from llmkit.io.documents import BadLine, Chunk, Document, ReadOptions, parse

DEFAULT_PRESET = "gopher"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the chain says of one text: the text as edited by filters, and who dropped it why (`drop` is None for a kept one)."""

    text: str
    drop: Drop | None = None
    filter: str = ""


@dataclass(frozen=True)
class Chain:
    """Named filters in order, with the kind of words that they count."""

    steps: tuple[tuple[str, Filter], ...]
    splitter: Splitter

    def judge(self, text: str, where: str = "text") -> Verdict:
        """Run the filters on `text`. LlmkitError naming `where` and the filter if one of them raises."""
        page = Page(text, self.splitter)
        for name, check in self.steps:
            try:
                drop = check(page)
            except Exception as error:
                raise LlmkitError(
                    f"{where}: filter {name!r} raised {type(error).__name__}: {error}", "the fault is in that filter"
                ) from error
            if drop is not None:
                return Verdict(page.text, drop, name)
        return Verdict(page.text)


@dataclass(slots=True)
class Filtered:
    """A chunk's outcome: lines to keep and to reject, bad lines for the reader, and counts by (filter, reason)."""

    kept: bytes
    rejects: bytes
    bad: list[BadLine]
    documents: int = 0
    edited: int = 0
    characters: int = 0
    characters_kept: int = 0
    dropped: Counter[tuple[str, str]] = field(default_factory=Counter)


def filter_chunk(chunk: Chunk, options: ReadOptions, chain: Chain) -> Filtered:
    """Judge every document of a chunk. Pure. Kept lines have their own bytes unless a filter edited the text.

    Rejected lines are the documents as they came in, with `filter`, `reason` and `value` added.
    """
    documents, bad = parse(chunk, options)
    result = Filtered(b"", b"", bad, len(documents))
    kept: list[bytes] = []
    rejects: list[bytes] = []
    for document in documents:
        text = document.text
        verdict = chain.judge(text, document.where)
        result.characters += len(text)
        if verdict.drop is not None:
            result.dropped[verdict.filter, verdict.drop.reason] += 1
            rejects.append(_reject(document, verdict.filter, verdict.drop))
            continue
        if verdict.text != text:
            document.change_text(verdict.text)
            result.edited += 1
        result.characters_kept += len(verdict.text)
        kept.append(document.encode())
    result.kept, result.rejects = b"".join(kept), b"".join(rejects)
    return result


def _reject(document: Document, name: str, drop: Drop) -> bytes:
    row = document.fields | {"filter": name, "reason": drop.reason, "value": drop.value}
    return orjson.dumps(row) + b"\n"


# ---- presets


def builtin_presets() -> list[str]:
    """Names of the presets in the package."""
    return sorted(item.name[: -len(".toml")] for item in _directory().iterdir() if item.name.endswith(".toml"))


def preset_text(name: str) -> str:
    """TOML of a built-in preset, or of the file that `name` is the path of. Raises UsageError (unknown name), LlmkitError (unreadable)."""
    if is_path(name):
        try:
            return Path(name).read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise LlmkitError(
                f"{name}: no such preset file", "built-in ones: " + ", ".join(builtin_presets())
            ) from error
        except (OSError, UnicodeDecodeError) as error:
            raise LlmkitError(
                f"{name}: cannot read the preset ({error})", "a preset is a TOML file in UTF-8"
            ) from error
    if name not in builtin_presets():
        raise unknown_name("preset", name, builtin_presets())
    return _directory().joinpath(f"{name}.toml").read_text(encoding="utf-8")


def is_path(preset: str) -> bool:
    """Whether a preset is given by path: it ends in .toml or has a directory part."""
    return preset.endswith(".toml") or "/" in preset


def _directory() -> Traversable:
    return resources.files("llmkit.corpus").joinpath("presets")


def load_chain(presets: Iterable[str], filters: Iterable[str], rules: Iterable[str], words: str) -> Chain:
    """Chain of the presets' filters in order, then the single `filters`, with `rules` ("filter.threshold=value") set over them.

    Unknown names raise UsageError with the nearest known ones; so does a filter that comes twice with different thresholds.
    """
    specs: list[dict[str, Any]] = []
    for preset in presets:
        specs += _parse_preset(preset)
    specs += [{"name": name} for name in filters]
    for rule in rules:
        _override(specs, rule)
    steps = tuple((spec["name"], _build(spec)) for spec in specs)
    for name, built in steps:
        if any(other != built for same, other in steps if same == name):
            raise UsageError(
                f"filter {name!r} comes twice with different thresholds", "run the second in a pipe behind the first"
            )
    return Chain(steps, SPLITTERS.get(words))


def _parse_preset(preset: str) -> list[dict[str, Any]]:
    try:
        content = tomllib.loads(preset_text(preset))
    except tomllib.TOMLDecodeError as error:
        raise LlmkitError(
            f"{preset}: invalid TOML ({error})", "llmkit filter --print-preset shows a valid one"
        ) from error
    tables = content.pop("filter", None)
    if not isinstance(tables, list) or not tables or content:
        found = f", found {', '.join(map(repr, content))}" if content else ""
        raise LlmkitError(
            f"{preset}: a preset holds [[filter]] tables and nothing else{found}",
            "llmkit filter --print-preset shows one",
        )
    for number, table in enumerate(tables, 1):
        if not isinstance(table, dict) or not isinstance(table.get("name"), str):
            raise LlmkitError(f"{preset}: filter {number} has no name", 'write name = "gopher_quality"')
    return tables


def _build(spec: dict[str, Any]) -> Filter:
    """The filter that a table describes: its class with the thresholds checked against the types of its fields."""
    name = spec["name"]
    entry = FILTERS.get(name)
    settings = {key: value for key, value in spec.items() if key != "name"}
    known = thresholds(entry)
    for key, value in settings.items():
        if key not in known:
            raise unknown_name("rule", f"{name}.{key}", [f"{name}.{other}" for other in known])
        settings[key] = _typed(f"{name}.{key}", value, known[key])
    built: Filter = entry(**settings) if isinstance(entry, type) else entry
    return built


def thresholds(entry: Any) -> dict[str, Any]:
    """Names and defaults of a registered filter's thresholds; none for a plain function."""
    return {f.name: f.default for f in dataclasses.fields(entry)} if dataclasses.is_dataclass(entry) else {}


def _override(specs: list[dict[str, Any]], rule: str) -> None:
    target, equals, value = rule.partition("=")
    name, dot, key = target.strip().partition(".")
    if not (equals and dot and key):
        raise UsageError(
            f"--rule {rule!r} is not of the form FILTER.THRESHOLD=VALUE", "for example gopher_quality.min_doc_words=20"
        )
    used = [spec for spec in specs if spec["name"] == name]
    if not used:
        in_chain = sorted({spec["name"] for spec in specs})
        if name in FILTERS.names():
            raise UsageError(f"--rule {rule!r}: filter {name!r} is not in this chain", "it has: " + ", ".join(in_chain))
        raise unknown_name("filter", name, in_chain)
    for spec in used:
        spec[key] = value.strip()


def _typed(name: str, value: Any, default: Any) -> Any:
    """`value` (from TOML, or text from --rule) as the kind that the default shows; "off" is None. UsageError where it cannot be."""
    if value == "off" and not isinstance(default, bool | tuple):
        return None
    kind = "a number"
    if isinstance(default, bool):
        choices = {"true": True, "false": False, "on": True, "off": False, True: True, False: False}
        if isinstance(value, bool | str) and value in choices:
            return choices[value]
        kind = "true or false"
    elif isinstance(default, tuple):
        items = [item.strip() for item in value.split(",") if item.strip()] if isinstance(value, str) else value
        if isinstance(items, list) and all(isinstance(item, str) for item in items):
            return tuple(items)
        kind = "a list of words"
    elif isinstance(default, str):
        return str(value)
    elif not isinstance(value, bool):
        try:
            number = float(value)
            if number == number:
                return int(number) if isinstance(default, int) and number == int(number) else number
        except (TypeError, ValueError, OverflowError):
            pass
    raise UsageError(f"{name}: {value!r} is not {kind}", '"off" switches the rule off' if kind == "a number" else "")


def describe_chain(chain: Chain) -> str:
    """The chain as preset TOML, every threshold spelled out."""
    blocks = []
    for name, check in chain.steps:
        rows = [f"name = {_toml(name)}"]
        rows += [f"{key} = {_toml(getattr(check, key))}" for key in thresholds(type(check))]
        blocks.append("\n".join(["[[filter]]", *rows]))
    return "\n\n".join(blocks) + "\n"


def spell_out(chain: Chain) -> tuple[list[str], list[str]]:
    """The chain as names of single filters and the rules that differ from the defaults: what stands for a preset file in a lineage."""
    rules: dict[str, None] = {}
    for name, check in chain.steps:
        for key, default in thresholds(type(check)).items():
            if (value := getattr(check, key)) != default:
                shown = (
                    ",".join(value) if isinstance(value, tuple) else value if isinstance(value, str) else _toml(value)
                )
                rules[f"{name}.{key}={shown.strip(chr(34))}"] = None
    return [name for name, _ in chain.steps], list(rules)


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int | float) else orjson.dumps("off" if value is None else value).decode()
