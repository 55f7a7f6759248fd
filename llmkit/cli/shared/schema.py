"""Every command, option, type, default and exit code as one JSON object, for programs: `llmkit help --json`.

Built from the same table and options as --help and the completions.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

from llmkit import __version__
from llmkit.cli.shared.options import NEUTRAL, click_command, environment_prefix, neutral_options
from llmkit.cli.shared.table import COMMANDS, module_of
from llmkit.errors import ExitCode

TYPES = {int: "integer", float: "number", bool: "boolean", Path: "path", str: "string"}


def schema(names: Iterable[str]) -> dict[str, Any]:
    """The schema of these commands."""
    codes = [{"code": int(code), "name": code.name.lower(), "meaning": code.meaning} for code in ExitCode]
    return {"llmkit": __version__, "exit_codes": codes, "commands": [_command(name) for name in names]}


def _command(name: str) -> dict[str, Any]:
    function = import_module(module_of(name)).main
    command = click_command(function, name)
    neutral = NEUTRAL | neutral_options(function)
    group, summary = COMMANDS[name]
    options = [p for p in command.params if p.param_type_name == "option"]
    return {
        "name": name,
        "group": group,
        "summary": summary,
        "description": command.help,
        "examples": list(function.llmkit["examples"]),
        "arguments": [_parameter(p) for p in command.params if p.param_type_name == "argument"],
        "options": [_option(name, p, p.name in neutral) for p in options],
    }


def _parameter(parameter: Any) -> dict[str, Any]:
    kind = parameter.type_descriptor.annotation
    while inner := get_args(kind):
        kind = inner[0]
    return {
        "name": parameter.name.rstrip("_"),
        "type": "count" if parameter.metavar == "COUNT" else TYPES.get(kind, "string"),  # a count: 5000, 10k, 2.5M
        "metavar": parameter.metavar,
        "multiple": bool(parameter.multiple or parameter.nargs == -1),
        "required": bool(parameter.required),
        "default": _plain(parameter.default),
        "help": parameter.help,
    }


def _option(command: str, parameter: Any, neutral: bool) -> dict[str, Any]:
    bounds = {"minimum": parameter.min, "maximum": parameter.max}
    return {
        **_parameter(parameter),
        "flags": list(parameter.opts),
        "negative_flags": list(parameter.secondary_opts),
        "group": parameter.rich_help_panel or "Options",
        "common": bool(parameter.common),
        "decides_content": not neutral,
        "environment": f"{environment_prefix(command)}_{parameter.name.upper()}",
        **{name: value for name, value in bounds.items() if value is not None},
    }


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
