"""Values of options from elsewhere than flags: the environment, the file of --config, and former spellings.

An option that was renamed is taken by its former name with a note. Both names at once are a usage error.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llmkit.errors import LlmkitError, UsageError, suggestion
from llmkit.options import from_toml


def environment_prefix(name: str) -> str:
    """The prefix of a subcommand's environment variables."""
    return f"LLMKIT_{name.upper().replace(' ', '_')}"


def _section(name: str) -> str:
    """The name of a subcommand's table in a --config file: filter, filter-train."""
    return name.replace(" ", "-")


def present_spelling(command: Any, name: str, arguments: list[str], renamed: dict[str, str]) -> list[str]:
    """The arguments with former flags replaced; the environment is changed likewise. `renamed` maps names of options.

    Raises UsageError where an option is given by both names.
    """
    flags = {_flag_of(old): _flag_of(new) for old, new in renamed.items()}
    takes_value = {
        flag for parameter in command.params if not getattr(parameter, "is_flag", True) for flag in parameter.opts
    }.union(flags)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    result, seen = [], []
    for before, argument in zip(["", *arguments], arguments[:end], strict=False):
        flag, equals, value = argument.partition("=")
        if before not in takes_value:  # else it is the value of the option before it
            seen.append(flag)
            argument = flags.get(flag, flag) + equals + value
        result.append(argument)
    _note(name, ((old, new) for old, new in flags.items() if old in seen), seen)
    for old, new in flags.items():
        before, now = (_variable(name, flag) for flag in (old, new))
        if os.environ.get(before):
            _note(name, [(before, now)], [variable for variable in (now,) if os.environ.get(variable)])
            os.environ[now] = os.environ.pop(before)
    return result + arguments[end:]


def _flag_of(name: str) -> str:
    return "--" + name.rstrip("_").replace("_", "-")


def _variable(command: str, flag: str) -> str:
    return f"{environment_prefix(command)}_{flag[2:].upper().replace('-', '_')}"


def _note(command: str, pairs: Iterable[tuple[str, str]], given: Iterable[str]) -> None:
    """Note each (former, present) name. Raises UsageError where the present one was given too."""
    for old, new in sorted(pairs):
        if new in given:
            raise UsageError(f"{old} and {new} are one option", f"give {new} alone, which is its present name")
        print(f"llmkit {command}: {old} is now called {new}", file=sys.stderr)


def load_config(context: Any, path: str | None, name: str, renamed: dict[str, str]) -> str | None:
    """Make the values of a TOML file the defaults: those of its top level, overridden by those of its table [NAME]."""
    if path is None:
        return None
    import tomllib

    from llmkit.cli.shared.table import COMMANDS

    try:
        content = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise LlmkitError(f"{path}: cannot read the configuration ({error.strerror})", "see --config") from error
    except (ValueError, RecursionError) as error:
        raise LlmkitError(f"{path}: invalid TOML ({error})", "--print-config shows the format") from error
    sections = set(map(_section, COMMANDS))
    top = {key: value for key, value in content.items() if not (isinstance(value, dict) and key in sections)}
    parameters = {parameter.name: parameter for parameter in context.command.params}
    defaults: dict[str, Any] = {}
    section = content.get(_section(name))  # `filter` is both a table and an option of `llmkit filter`
    for table in (top, section if isinstance(section, dict) else {}):
        given: dict[str, str] = {}
        for key, value in table.items():
            option = key.replace("-", "_")
            former = next((old for old in (option, f"{option}_") if old in renamed), None)
            option = renamed[former] if former else option if option in parameters else f"{option}_"  # `from_`
            if option not in parameters:
                raise UsageError(
                    f"{path}: unknown option {key!r} for llmkit {name}",
                    suggestion(key, {name.rstrip("_") for name in parameters}),
                )
            if option in given:
                raise UsageError(f"{path}: {given[option]} and {key} are one option", f"keep {option.rstrip('_')}")
            if former:
                _note(name, [(f"{path}: {key}", option.rstrip("_").replace("_", "-"))], ())
            given[option] = key
            defaults[option] = from_toml(_checked(path, key, value, parameters[option]))
    context.default_map = defaults
    return path


def _checked(path: str, key: str, value: Any, parameter: Any) -> Any:
    """The value of a key. Raises UsageError for a kind of value that the option cannot have."""
    is_flag, multiple = getattr(parameter, "is_flag", False), getattr(parameter, "multiple", False)
    if isinstance(value, dict) or (isinstance(value, bool) and not is_flag):
        kind = "a table" if isinstance(value, dict) else str(value).lower()
        raise UsageError(f"{path}: {key} is {kind}", "--print-config shows the format")
    if multiple and not isinstance(value, list):
        return [value]
    if isinstance(value, list) and not multiple:
        raise UsageError(f"{path}: {key} is a list, and the option takes one value", "--print-config shows the format")
    return value
