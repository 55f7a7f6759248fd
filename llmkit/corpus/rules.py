"""Chains by name: presets, single filters, overrides, and functions of one's own files.

A preset is TOML: `[[filter]]` tables in order, each with a `name` and thresholds. Built-in ones lie in `presets/`; a path names one's own.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import tomllib
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import orjson

from llmkit.corpus.chain import Chain
from llmkit.corpus.filters import FILTERS, Filter
from llmkit.corpus.words import splitter
from llmkit.errors import LlmkitError, UsageError, unknown_name

DEFAULT_PRESET = "gopher"

# What another tool does differently, by filter: for results that are to be compared with its.
COMPAT: dict[str, dict[str, dict[str, Any]]] = {
    "datatrove": {"gopher_repetition": {"separate_words": False}, "c4": {"whole_page": False}}
}


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


def load_chain(
    presets: Iterable[str],
    filters: Iterable[str],
    rules: Iterable[str],
    words: str,
    compat: str = "",
    first: Iterable[str] = (),
) -> Chain:
    """Chain of the filters `first`, the presets' filters in order, and the single `filters`, with `rules` set over them.

    A rule is "filter.threshold=value", or "file.py:function", which adds a filter. A filter that is needed twice gets names of its own,
    "regex@menus". Unknown names raise UsageError with the nearest known ones; so does a filter that comes twice with different thresholds.
    """
    specs: list[dict[str, Any]] = [{"name": name} for name in first]
    for preset in presets:
        specs += _parse_preset(preset)
    specs += [{"name": name} for name in filters]
    settings = [rule for rule in rules if not is_function(rule)]
    # Functions of one's own come last, however they were named: so the record need not hold their place.
    own = [spec["name"] for spec in specs if is_function(spec["name"])] + [rule for rule in rules if is_function(rule)]
    specs = [spec for spec in specs if not is_function(spec["name"])] + [{"name": base_name(rule)} for rule in own]
    files = {base_name(rule): rule.rpartition(":")[0] for rule in own}
    if compat and compat not in COMPAT:
        raise unknown_name("--compat", compat, list(COMPAT))
    for spec in specs:
        spec |= COMPAT[compat].get(_kind(spec["name"]), {}) if compat else {}
    given: dict[str, list[str]] = {}
    for rule in settings:
        _override(specs, rule, given, files)
    steps = tuple((spec["name"], _build(spec, files)) for spec in specs)
    for name, built in steps:
        if any(other != built for same, other in steps if same == name):
            raise UsageError(
                f"filter {name!r} comes twice with different thresholds",
                f"give each a name of its own: {name}@first, {name}@second",
            )
    return Chain(steps, splitter(words), tuple(files.items()))


def is_function(rule: str) -> bool:
    """Whether a rule names a function of one's own file: "./rules.py:shouting"."""
    path, colon, function = rule.rpartition(":")
    return bool(colon) and path.endswith(".py") and "=" not in path and function.isidentifier()


def base_name(function: str) -> str:
    """A function of one's own by the name of its file alone: "rules.py:shouting"."""
    return Path(function).name


def _kind(name: str) -> str:
    """The registered name of a filter: "regex" of "regex@menus"."""
    return name.partition("@")[0]


def _entry(name: str, files: dict[str, str]) -> Any:
    """The registered filter, or the function or class of a file, that `name` stands for."""
    return _own(files[name], name.rpartition(":")[2]) if name in files else FILTERS.get(_kind(name))


@cache
def _own(path: str, function: str) -> Any:
    """A function or class of one's own file."""
    hint = "a rule of one's own is FILE.py:FUNCTION"
    if not Path(path).is_file():
        raise LlmkitError(f"{path}: no such file", hint)
    spec = importlib.util.spec_from_file_location(f"llmkit_rules_{Path(path).stem}_{len(sys.modules)}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise LlmkitError(
            f"{path}: does not load ({type(error).__name__}: {error})", "the fault is in that file"
        ) from error
    if not callable(found := getattr(module, function, None)):
        raise LlmkitError(f"{path}: no function {function!r}", hint)
    return found


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


def _build(spec: dict[str, Any], files: dict[str, str]) -> Filter:
    """The filter that a table describes: its class with the thresholds checked against the types of its fields."""
    name = spec["name"]
    entry = _entry(name, files)
    settings = {key: value for key, value in spec.items() if key != "name"}
    known = thresholds(entry)
    for key, value in settings.items():
        if key not in known:
            raise unknown_name("rule", f"{name}.{key}", [f"{name}.{other}" for other in known])
        settings[key] = _typed(f"{name}.{key}", value, known[key], _kind_of(entry, key))
    built: Filter = entry(**settings) if isinstance(entry, type) else entry
    return built


def thresholds(entry: Any) -> dict[str, Any]:
    """Names and defaults of a registered filter's thresholds; none for a plain function."""
    return {f.name: f.default for f in dataclasses.fields(entry)} if dataclasses.is_dataclass(entry) else {}


def _override(specs: list[dict[str, Any]], rule: str, given: dict[str, list[str]], files: dict[str, str]) -> None:
    """Set one threshold. Values of a list of files add up in `given`, any other later one replaces an earlier one."""
    target, equals, value = rule.partition("=")
    name, dot, key = target.strip().rpartition(".")
    name = base_name(name) if is_function(name) else name
    if not (equals and dot and key):
        raise UsageError(
            f"--rule {rule!r} is not of the form FILTER.THRESHOLD=VALUE", "for example gopher_quality.min_doc_words=20"
        )
    used = [spec for spec in specs if spec["name"] == name]
    if not used:
        in_chain = sorted({spec["name"] for spec in specs})
        if _kind(name) in FILTERS.names():
            raise UsageError(f"--rule {rule!r}: filter {name!r} is not in this chain", "it has: " + ", ".join(in_chain))
        raise unknown_name("filter", name, in_chain)
    for spec in used:
        entry = _entry(spec["name"], files)
        several = key in file_settings(entry) and isinstance(thresholds(entry)[key], tuple)
        spec[key] = given.setdefault(target.strip(), []) + [value] if several else value
    given.setdefault(target.strip(), []).append(value)


def _kind_of(entry: Any, key: str) -> str:
    """The annotation of a threshold, as text: "int | None"."""
    return next(str(f.type) for f in dataclasses.fields(entry) if f.name == key)


def _typed(name: str, value: Any, default: Any, annotation: str) -> Any:
    """`value` (from TOML, or text from --rule) as the kind that default and annotation show; "off" is None. UsageError where it cannot be.

    A text is taken as it stands, quotes and outer spaces too; a list may be JSON, so that its items can hold commas.
    """
    if isinstance(default, str):
        return str(value)
    optional = "None" in annotation
    value = value.strip() if isinstance(value, str) else value
    if value == "off" and optional:
        return None
    if isinstance(default, tuple) and isinstance(value, str) and value.startswith("["):
        with suppress(orjson.JSONDecodeError):
            value = orjson.loads(value)
    kind = "a number"
    if isinstance(default, bool):
        choices = {"true": True, "false": False, "on": True, "off": False, True: True, False: False}
        if isinstance(value, bool | str) and value in choices:
            return choices[value]
        kind = "true or false"
    elif isinstance(default, tuple):
        items = [item.strip() for item in value.split(",") if item.strip()] if isinstance(value, str) else value
        if isinstance(items, list) and all(isinstance(item, str) for item in items):
            return tuple(filter(None, items))
        kind = "a list of words"
    elif not isinstance(value, bool):
        try:
            number = float(value)
            whole = number == int(number)
            if "int" not in annotation or "float" in annotation:
                return int(number) if isinstance(default, int) and whole else number
            if whole and abs(number) < 2**31:
                return int(number)
            kind = "a whole number"
        except (TypeError, ValueError, OverflowError):
            pass
    raise UsageError(f"{name}: {value!r} is not {kind}", '"off" switches the rule off' if optional else "")


def file_settings(entry: Any) -> list[str]:
    """Names of a registered filter's settings that name a file, or several."""
    return (
        [f.name for f in dataclasses.fields(entry) if f.metadata.get("file")] if dataclasses.is_dataclass(entry) else []
    )


def files_of(chain: Chain) -> list[tuple[str, str]]:
    """(rule, path) for each file that the chain reads; the rule has a `*` where the path stands: "url.domains=*", "*:shouting"."""
    found = []
    for name, path in chain.functions:
        found.append((f"*:{name.rpartition(':')[2]}", path))
    for name, check in chain.steps:
        for key in file_settings(type(check)):
            value = getattr(check, key)
            found += [(f"{name}.{key}=*", path) for path in ((value,) if isinstance(value, str) else value) if path]
    return found


def describe_chain(chain: Chain) -> str:
    """The chain as preset TOML, every threshold spelled out."""
    blocks = []
    for name, check in chain.steps:
        rows = [f"name = {_toml(name)}"]
        rows += [f"{key} = {_toml(getattr(check, key))}" for key in thresholds(type(check))]
        blocks.append("\n".join(["[[filter]]", *rows]))
    return "\n\n".join(blocks) + "\n"


def spell_out(chain: Chain) -> tuple[list[str], list[str]]:
    """The chain as names of single filters and the rules that differ from the defaults: what stands for it in a lineage, files apart."""
    rules: dict[str, None] = {}
    for name, check in chain.steps:
        for key, default in thresholds(type(check)).items():
            if key in file_settings(type(check)):
                continue
            if (value := getattr(check, key)) != default:
                rules[f"{name}.{key}={_written(value)}"] = None
    return [name for name, _ in chain.steps if not is_function(name)], list(rules)


def _written(value: Any) -> str:
    """A value as --rule takes it."""
    if isinstance(value, str):
        return value
    if isinstance(value, tuple):
        plain = all(item == item.strip() and item and "," not in item and item[0] != "[" for item in value)
        return ",".join(value) if plain else orjson.dumps(value).decode()
    return "off" if value is None else _toml(value)


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int | float) else orjson.dumps("off" if value is None else value).decode()
