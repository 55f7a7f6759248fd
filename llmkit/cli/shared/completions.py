"""Static shell completion scripts, generated from the same table and options as the help pages.

    python -m llmkit.cli.shared.completions completions/

writes llmkit.bash, _llmkit (zsh) and llmkit.fish to that directory. Static scripts complete instantly, whereas
calling llmkit for each completion would cost its start-up time.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from llmkit.cli.shared.options import click_command
from llmkit.cli.shared.table import COMMANDS, module_of, subcommands


class Flag(NamedTuple):
    """An option: its names (`-o`, `--output`), its help, and whether it takes a value."""

    names: list[str]
    help: str
    takes_value: bool


def flags(name: str) -> list[Flag]:
    """Every option of a subcommand."""
    command: Any = click_command(import_module(module_of(name)).main, name)
    result = []
    for parameter in command.params:
        if parameter.param_type_name == "option":
            names = [*parameter.opts, *parameter.secondary_opts]
            result.append(Flag(names, _one_line(parameter.help), not parameter.is_flag))
    return [*result, Flag(["-h", "--help"], "Show this help and exit", False)]


def _one_line(text: str | None) -> str:
    return (text or "").split(". ")[0].rstrip(".")


def _first_words(table: dict[str, list[Flag]]) -> list[str]:
    return [name for name in table if " " not in name]


def _longest_first(table: dict[str, list[Flag]]) -> list[tuple[str, list[Flag]]]:
    """Commands with more words first, so that `filter train` is matched before `filter`."""
    return sorted(table.items(), key=lambda item: -item[0].count(" "))


def bash(table: dict[str, list[Flag]]) -> str:
    """The script for bash: completes subcommands, options and files."""
    cases = []
    for name, options in _longest_first(table):
        words = " ".join(word for option in options for word in option.names)
        second_words = f" more='{' '.join(subcommands(name))}'" if subcommands(name) else ""
        cases.append(f"        '{name} '*) words='{words}'{second_words} ;;")
    return "\n".join(
        [
            "# bash completion for llmkit. Source it, or put it where bash-completion looks for scripts.",
            "_llmkit() {",
            "    local current=${COMP_WORDS[COMP_CWORD]} words='' more=''",
            "    COMPREPLY=()",
            "    if [ \"$COMP_CWORD\" -eq 1 ]; then",
            f"        COMPREPLY=($(compgen -W '{' '.join(_first_words(table))} --help --version' -- \"$current\"))",
            "        return",
            "    fi",
            '    case "${COMP_WORDS[*]:1:COMP_CWORD-1} " in',
            *cases,
            "    esac",
            '    case "$current" in',
            '        -*) COMPREPLY=($(compgen -W "$words" -- "$current")) ;;',
            "        *) [ \"$COMP_CWORD\" -eq 2 ] || more=''",
            '           COMPREPLY=($(compgen -W "$more" -- "$current"; compgen -f -- "$current"; true)) ;;',
            "    esac",
            "}",
            "complete -o filenames -F _llmkit llmkit",
            "",
        ]
    )  # fmt: skip


def zsh(table: dict[str, list[Flag]]) -> str:
    """The script for zsh, with descriptions."""

    def quoted(text: str) -> str:
        return (
            text.replace("\\", "\\\\").replace("'", "'\\''").replace("[", "\\[").replace("]", "\\]").replace(":", "\\:")
        )

    pairs = "|".join(f"'{name}'" for name in table if " " in name)
    lines = ["#compdef llmkit", "", "_llmkit() {", "  if (( CURRENT == 2 )); then", "    local -a commands=("]
    lines += [f"      '{name}:{quoted(COMMANDS[name][1])}'" for name in _first_words(table)]
    lines += [
        "    )",
        "    _describe command commands",
        "    return",
        "  fi",
        "  local command=$words[2]",
        "  shift words",
        "  (( CURRENT-- ))",
        f'  if (( CURRENT > 2 )) && [[ "$words[1] $words[2]" == ({pairs}) ]]; then',
        '    command="$words[1] $words[2]"',
        "    shift words",
        "    (( CURRENT-- ))",
        "  fi",
    ]
    lines += ["  case $command in"]
    for name, options in table.items():
        lines.append(f"    '{name}') _arguments -s -S \\")
        for option in options:
            for word in option.names:
                value = ":value:_files" if option.takes_value else ""
                lines.append(f"      '*{word}[{quoted(option.help)}]{value}' \\")
        if subcommands(name):
            words = " ".join(subcommands(name))
            lines.append(f"      '1:command or file:{{compadd {words}; _files}}' \\")
        lines.append("      '*:file:_files' ;;")
    return "\n".join([*lines, "  esac", "}", "", '_llmkit "$@"', ""])


def fish(table: dict[str, list[Flag]]) -> str:
    """The script for fish, with descriptions."""

    def quoted(text: str) -> str:
        return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"

    lines = ["# fish completion for llmkit"]
    for name in table:
        parent, _, word = name.rpartition(" ")
        condition = f"'{_fish_condition(parent)}'" if parent else "__fish_use_subcommand"
        lines.append(f"complete -c llmkit -f -n {condition} -a {word} -d {quoted(COMMANDS[name][1])}")
    for name, options in table.items():
        for option in options:
            words = " ".join(f"-l {word[2:]}" if word.startswith("--") else f"-s {word[1:]}" for word in option.names)
            value = " -r" if option.takes_value else ""
            lines.append(f"complete -c llmkit -n '{_fish_condition(name)}' {words}{value} -d {quoted(option.help)}")
    return "\n".join([*lines, ""])


def _fish_condition(name: str) -> str:
    """A fish condition: the words before the cursor name this command, not a longer one."""
    words = [f"__fish_seen_subcommand_from {word}" for word in name.split()]
    parents = [parent for parent in COMMANDS if f"{parent} {name}" in COMMANDS]  # `filter`, for `train`
    excluded = subcommands(name) + parents
    return "; and ".join(words + ([f"not __fish_seen_subcommand_from {' '.join(excluded)}"] if excluded else []))


def scripts() -> dict[str, str]:
    """File name -> content of each completion script."""
    table = {name: flags(name) for name in COMMANDS}
    return {"llmkit.bash": bash(table), "_llmkit": zsh(table), "llmkit.fish": fish(table)}


if __name__ == "__main__":
    directory = Path(sys.argv[1] if len(sys.argv) > 1 else "completions")
    for name, text in scripts().items():
        (directory / name).write_text(text, encoding="utf-8")
