"""Loading a chain of filters from presets, names of single filters, overrides, and functions in the user's
Python files.

A preset is TOML: `[[filter]]` tables in order, each with a `name` and thresholds. Built-in presets are in
`presets/`; any other preset is given by its path.
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

# Settings that reproduce another tool's behaviour, by tool and filter, for results that are to be compared with
# that tool.
COMPAT: dict[str, dict[str, dict[str, Any]]] = {
    "datatrove": {"gopher_repetition": {"separate_words": False}, "c4": {"whole_page": False}}
}


def builtin_presets() -> list[str]:
    """Names of the presets in the package."""
    return sorted(item.name[: -len(".toml")] for item in _directory().iterdir() if item.name.endswith(".toml"))


def preset_text(name: str) -> str:
    """TOML of a built-in preset, or of the file at the path `name`.

    Raises UsageError for an unknown name, LlmkitError for an unreadable file.
    """
    if is_path(name):
        try:
            return Path(name).read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise LlmkitError(
                f"{name}: no such preset file", "built-in presets: " + ", ".join(builtin_presets())
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
    """Chain of the filters `first`, the filters of the presets in order, and the single `filters`, overridden
    by `rules`.

    A rule is "filter.threshold=value", or "file.py:function", which adds a filter. A filter that is needed
    twice gets a suffix: "regex@menus". Raises UsageError for unknown names, listing the closest known ones, and
    for a filter that occurs twice with different thresholds.
    """
    specs: list[dict[str, Any]] = [{"name": name} for name in first]
    for preset in presets:
        specs += _parse_preset(preset)
    specs += [{"name": name} for name in filters]
    overrides = [rule for rule in rules if not is_function(rule)]
    # Functions of the user come last, whichever option named them, so that lineage need not record their position.
    functions = [spec["name"] for spec in specs if is_function(spec["name"])] + [
        rule for rule in rules if is_function(rule)
    ]
    specs = [spec for spec in specs if not is_function(spec["name"])] + [
        {"name": base_name(rule)} for rule in functions
    ]
    files = {base_name(rule): rule.rpartition(":")[0] for rule in functions}
    if compat and compat not in COMPAT:
        raise unknown_name("--compat", compat, list(COMPAT))
    for spec in specs:
        spec |= COMPAT[compat].get(_registered_name(spec["name"]), {}) if compat else {}
    file_lists: dict[str, list[str]] = {}
    for rule in overrides:
        _override(specs, rule, file_lists, files)
    steps = tuple((spec["name"], _build(spec, files)) for spec in specs)
    for name, check in steps:
        if any(other_check != check for other_name, other_check in steps if other_name == name):
            raise UsageError(
                f"filter {name!r} occurs twice with different thresholds",
                f"give each its own name: {name}@first, {name}@second",
            )
    return Chain(steps, splitter(words), tuple(files.items()))


def is_function(rule: str) -> bool:
    """Whether a rule names a function in a Python file: "./rules.py:shouting"."""
    path, colon, function = rule.rpartition(":")
    return bool(colon) and path.endswith(".py") and "=" not in path and function.isidentifier()


def base_name(function: str) -> str:
    """A function of one's own by the name of its file alone: "rules.py:shouting"."""
    return Path(function).name


def _registered_name(name: str) -> str:
    """The registered name of a filter: "regex" of "regex@menus"."""
    return name.partition("@")[0]


def _entry(name: str, files: dict[str, str]) -> Any:
    """The registered filter, or the function or class from a Python file, that `name` refers to."""
    return (
        _load_function(files[name], name.rpartition(":")[2]) if name in files else FILTERS.get(_registered_name(name))
    )


@cache
def _load_function(path: str, function: str) -> Any:
    """A function or class from a Python file of the user's."""
    hint = "name a rule of your own as FILE.py:FUNCTION"
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
    if not callable(loaded := getattr(module, function, None)):
        raise LlmkitError(f"{path}: no function {function!r}", hint)
    return loaded


def _parse_preset(preset: str) -> list[dict[str, Any]]:
    try:
        content = tomllib.loads(preset_text(preset))
    except (ValueError, RecursionError) as error:
        raise LlmkitError(
            f"{preset}: invalid TOML ({error})", "llmkit filter --print-preset shows a valid one"
        ) from error
    tables = content.pop("filter", None)
    if not isinstance(tables, list) or not tables or content:
        extra_keys = f", found {', '.join(map(repr, content))}" if content else ""
        raise LlmkitError(
            f"{preset}: a preset holds [[filter]] tables and nothing else{extra_keys}",
            "llmkit filter --print-preset shows one",
        )
    for number, table in enumerate(tables, 1):
        if not isinstance(table, dict) or not isinstance(table.get("name"), str):
            raise LlmkitError(f"{preset}: filter {number} has no name", 'write name = "gopher_quality"')
    return tables


def _build(spec: dict[str, Any], files: dict[str, str]) -> Filter:
    """The filter described by a table; thresholds are checked against the types of the fields of its class."""
    name = spec["name"]
    entry = _entry(name, files)
    settings = {key: value for key, value in spec.items() if key != "name"}
    defaults = thresholds(entry)
    for key, value in settings.items():
        if key not in defaults:
            raise unknown_name("rule", f"{name}.{key}", [f"{name}.{other}" for other in defaults])
        settings[key] = _typed(f"{name}.{key}", value, defaults[key], _annotation(entry, key))
    built: Filter = entry(**settings) if isinstance(entry, type) else entry
    return built


def thresholds(entry: Any) -> dict[str, Any]:
    """Names and defaults of a registered filter's thresholds; empty for a plain function."""
    return {f.name: f.default for f in dataclasses.fields(entry)} if dataclasses.is_dataclass(entry) else {}


def _override(specs: list[dict[str, Any]], rule: str, file_lists: dict[str, list[str]], files: dict[str, str]) -> None:
    """Set one threshold. A later value replaces an earlier one, but lists of files accumulate in `file_lists`."""
    target, equals, value = rule.partition("=")
    name, dot, key = target.strip().rpartition(".")
    name = base_name(name) if is_function(name) else name
    if not (equals and dot and key):
        raise UsageError(
            f"--rule {rule!r} is not of the form FILTER.THRESHOLD=VALUE", "for example gopher_quality.min_doc_words=20"
        )
    matching = [spec for spec in specs if spec["name"] == name]
    if not matching:
        in_chain = sorted({spec["name"] for spec in specs})
        if _registered_name(name) in FILTERS.names():
            raise UsageError(
                f"--rule {rule!r}: filter {name!r} is not in this chain", "the chain has: " + ", ".join(in_chain)
            )
        raise unknown_name("filter", name, in_chain)
    for spec in matching:
        entry = _entry(spec["name"], files)
        accumulates = key in file_fields(entry) and isinstance(thresholds(entry)[key], tuple)
        spec[key] = file_lists.setdefault(target.strip(), []) + [value] if accumulates else value
    file_lists.setdefault(target.strip(), []).append(value)


def _annotation(entry: Any, key: str) -> str:
    """The annotation of a threshold, as text: "int | None"."""
    return next(str(f.type) for f in dataclasses.fields(entry) if f.name == key)


def _typed(name: str, value: Any, default: Any, annotation: str) -> Any:
    """`value` (from TOML, or text from --rule) converted to the type of the default and annotation; "off" is None.

    Strings are taken literally, including quotes and outer spaces; a list may be JSON, so that its items can
    contain commas. Raises UsageError for a value of another type.
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
    expected = "a number"
    if isinstance(default, bool):
        choices = {"true": True, "false": False, "on": True, "off": False, True: True, False: False}
        if isinstance(value, bool | str) and value in choices:
            return choices[value]
        expected = "true or false"
    elif isinstance(default, tuple):
        items = [item.strip() for item in value.split(",") if item.strip()] if isinstance(value, str) else value
        if isinstance(items, list) and all(isinstance(item, str) for item in items):
            return tuple(filter(None, items))
        expected = "a list of words"
    elif not isinstance(value, bool):
        try:
            number = float(value)
            is_whole = number == int(number)
            if "int" not in annotation or "float" in annotation:
                return int(number) if isinstance(default, int) and is_whole else number
            if is_whole and abs(number) < 2**31:
                return int(number)
            expected = "a whole number"
        except (TypeError, ValueError, OverflowError):
            pass
    raise UsageError(f"{name}: {value!r} is not {expected}", '"off" switches the rule off' if optional else "")


def file_fields(entry: Any) -> list[str]:
    """Names of a registered filter's fields that name one or more files."""
    return (
        [f.name for f in dataclasses.fields(entry) if f.metadata.get("file")] if dataclasses.is_dataclass(entry) else []
    )


def files_of_rule(rule: str) -> list[str]:
    """The file that the value of a rule names, if it is one that does: "url.domains=list.txt"."""
    target, _, value = rule.partition("=")
    name, _, key = target.strip().rpartition(".")
    with suppress(LlmkitError):
        return [value] if key in file_fields(FILTERS.get(_registered_name(name))) else []
    return []  # no filter has this name


def files_read(chain: Chain) -> list[tuple[str, str]]:
    """(rule, path) for each file that the chain reads; a `*` in the rule replaces the path: "url.domains=*"."""
    files = []
    for name, path in chain.functions:
        files.append((f"*:{name.rpartition(':')[2]}", path))
    for name, check in chain.steps:
        for key in file_fields(type(check)):
            value = getattr(check, key)
            files += [(f"{name}.{key}=*", path) for path in ((value,) if isinstance(value, str) else value) if path]
    return files


def describe_chain(chain: Chain) -> str:
    """The chain as preset TOML with every threshold."""
    blocks = []
    for name, check in chain.steps:
        rows = [f"name = {_toml(name)}"]
        rows += [f"{key} = {_toml(getattr(check, key))}" for key in thresholds(type(check))]
        blocks.append("\n".join(["[[filter]]", *rows]))
    return "\n\n".join(blocks) + "\n"


def as_rules(chain: Chain) -> tuple[list[str], list[str]]:
    """(names of single filters, rules that differ from the defaults): how lineage records a chain, apart from files."""
    rules: dict[str, None] = {}
    for name, check in chain.steps:
        for key, default in thresholds(type(check)).items():
            if key in file_fields(type(check)):
                continue
            if (value := getattr(check, key)) != default:
                rules[f"{name}.{key}={_rule_value(value)}"] = None
    return [name for name, _ in chain.steps if not is_function(name)], list(rules)


def _rule_value(value: Any) -> str:
    """A value in the syntax of --rule."""
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
