"""The options that every command shares, and `@command`, which adds them to a function.

A command is a function whose first parameter is a `Run`; the rest are its own arguments and options. `@command` marks it, `build` makes a
Typer command of it. A value comes from the flag, else from LLMKIT_<COMMAND>_<OPTION>, else from the TOML file of --config, else it is the
default; --print-config shows the result.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Collection
from decimal import Decimal, InvalidOperation
from functools import partial
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

from llmkit.cli.shared.invocation import Progress, Run
from llmkit.errors import LlmkitError, UsageError, suggestion

__all__ = [
    "InputPaths",
    "ModelPath",
    "Progress",
    "Run",
    "build",
    "click_command",
    "command",
    "count_option",
    "parse_count",
    "parse_share",
    "toml_value",
]

InputPaths = Annotated[
    list[str] | None, typer.Argument(metavar="INPUT", help="Files, globs, directories or '-'; nothing is stdin")
]
ModelPath = Annotated[str, typer.Argument(metavar="MODEL", help="Hugging Face model directory, or a run")]

SUFFIXES = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}


def parse_count(text: Any) -> int:
    """A count with an optional suffix k, M, B or T: `10M` is 10,000,000, `1.5k` is 1,500; of bytes also kB, MB, GB, TB."""
    if isinstance(text, int):
        return text
    if text[-1:] == "B" and text[-2:-1] in (*"kKMGT",):
        text = text[:-1]
    number, suffix = (text[:-1], text[-1]) if text and text[-1] in SUFFIXES else (text, "")
    try:
        value = Decimal(number.replace("_", "")) * SUFFIXES[suffix]  # 2.3k is no whole number in binary
        if value < 0 or value != int(value):
            raise ValueError
    except (ValueError, OverflowError, InvalidOperation):
        raise typer.BadParameter(f"{text!r} is not a count such as 5000, 10k, 2.5M or 1B") from None
    return int(value)


def parse_share(text: Any) -> float:
    """A share below 1, or a count of tokens such as 5000 or 50k."""
    try:
        value = float(text)
    except ValueError:
        value = float(parse_count(text))
    if not 0 <= value < float("inf"):
        raise typer.BadParameter(f"{text!r} is no share or count of tokens")
    return value


def count_option(*names: str, help: str, **more: Any) -> Any:
    """A `typer.Option` whose value is a count with suffix (`parse_count`)."""
    return typer.Option(*names, help=help, parser=parse_count, metavar="COUNT", **more)


GENERAL = "General"
DOCUMENTS = "Documents"

SHARED: dict[str, tuple[Any, Any]] = {
    "output": (Annotated[str | None, typer.Option("--output", "-o", metavar="PATH", help="Output; stdout where the command streams")], None),
    "force": (Annotated[bool, typer.Option("--force", "-f", help="Replace an existing output")], False),
    "dry_run": (Annotated[bool, typer.Option("--dry-run", "-n", help="Check everything, write nothing")], False),
    "quiet": (Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing on success")], False),
    "verbose": (Annotated[bool, typer.Option("--verbose", "-v", help="Say more")], False),
    "jobs": (Annotated[int, typer.Option("--jobs", "-j", min=1, help="Worker processes; the output does not depend on it")], 1),
    "config": (Annotated[str | None, typer.Option("--config", "-c", metavar="TOML", help="File with option values, at the top or in [COMMAND]")], None),
    "seed": (Annotated[int, typer.Option("--seed", min=0, help="Seed of everything random")], 0),
    "json": (Annotated[bool, typer.Option("--json", help="Print the summary as one JSON line on stderr")], False),
    "summary": (Annotated[str | None, typer.Option("--summary", metavar="FILE", help="Write the summary as JSON")], None),
    "print_config": (Annotated[bool, typer.Option("--print-config", help="Print the resolved options as TOML and stop")], False),
    "debug": (Annotated[bool, typer.Option("--debug", help="Show tracebacks")], False),
    "version": (Annotated[bool, typer.Option("--version", "-V", help="Print the version")], False),
}  # fmt: skip

READING: dict[str, tuple[Any, Any]] = {
    "text_key": (Annotated[str, typer.Option("--text-key", metavar="FIELD", help="Field that holds the text")], "text"),
    "id_key": (Annotated[str, typer.Option("--id-key", metavar="FIELD", help="Field that holds the id")], "id"),
    "on_bad_line": (Annotated[str, typer.Option("--on-bad-line", metavar="HOW", help="stop, skip, or quarantine=FILE")], "stop"),
    "max_line_bytes": (Annotated[int, count_option("--max-line-bytes", help="Longest line that is read")], 16 << 20),
    "files_from": (Annotated[str | None, typer.Option("--files-from", metavar="FILE", help="Read the names of inputs from a file")], None),
}  # fmt: skip
WRITING: dict[str, tuple[Any, Any]] = {
    "plain": (Annotated[bool, typer.Option("--plain", help="Plain JSON lines on stdout (for jq), without lineage")], False),
}  # fmt: skip

# Shared options that do not decide the content of the output, and therefore stay out of its lineage.
NEUTRAL = {*SHARED, "files_from", "plain"} - {"seed"}


def command(
    *, examples: tuple[str, ...] = (), neutral: tuple[str, ...] = (), reads: bool = False, writes: bool = False
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Mark a function as a subcommand.

    `examples` stand in its help and are run by the tests; `neutral` names own options that do not decide the content of the output;
    `reads` adds the options of a document reader (`Run.reader`), `writes` those of a document writer (`Run.writer`).
    """

    def mark(function: Callable[..., None]) -> Callable[..., None]:
        function.llmkit = {"examples": examples, "neutral": set(neutral), "reads": reads, "writes": writes}  # type: ignore[attr-defined]
        return function

    return mark


def signature(function: Callable[..., None]) -> dict[str, inspect.Parameter]:
    """The parameters of a command with the shared options added, the `Run` left out."""
    marks = function.llmkit  # type: ignore[attr-defined]
    hints = get_type_hints(function, include_extras=True)
    own = list(inspect.signature(function).parameters.values())[1:]
    parameters = {p.name: p.replace(annotation=hints[p.name], kind=p.KEYWORD_ONLY) for p in own}
    shared = (READING if marks["reads"] else {}) | (WRITING if marks["writes"] else {}) | SHARED
    for name, (annotation, default) in shared.items():
        if name not in parameters:
            parameters[name] = inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
            )
    return parameters


def build(function: Callable[..., None], name: str) -> Callable[[list[str]], None]:
    """A callable that parses the arguments of subcommand `name` and runs it; usage errors are raised as UsageError."""
    command = click_command(function, name)

    def call(arguments: list[str]) -> None:
        # Not command.main: it would turn a broken pipe and Ctrl-C into exit code 1.
        try:
            with command.make_context(f"llmkit {name}", arguments) as context:
                command.invoke(context)
        except typer.Exit:
            return
        except Exception as error:
            raise _as_usage_error(error) from None

    return call


def _as_usage_error(error: Exception) -> Exception:
    """The parser's own errors as ours; anything else as it is."""
    if isinstance(error, LlmkitError) or not hasattr(error, "format_message"):
        return error
    possible = getattr(error, "possibilities", None)
    wanted = getattr(error, "option_name", "")
    hint = suggestion(wanted, possible) if possible else "see --help"
    return UsageError(error.format_message().rstrip("."), hint)


def click_command(function: Callable[..., None], name: str) -> Any:
    """Typer's command object for a marked function."""
    parameters = signature(function)
    marks = function.llmkit  # type: ignore[attr-defined]

    def invoke(context: typer.Context, **values: Any) -> None:
        if values["print_config"]:
            print(_as_toml(context), end="")
            return
        own = {key: value for key, value in values.items() if key in inspect.signature(function).parameters}
        kinds = {parameter.name: parameter.param_type_name for parameter in context.command.params}
        decides = {
            key: v for key, v in values.items() if kinds.get(key) == "option" and key not in NEUTRAL | marks["neutral"]
        }
        paths = {key: value for key, value in decides.items() if isinstance(value, Path)}
        run = Run(name, values, {key: _recordable(value) for key, value in decides.items() if value is not None}, paths)
        run.config = partial(_as_toml, context)
        with run._stack:
            function(run, **own)

    context = inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    invoke.__signature__ = inspect.Signature([context, *parameters.values()])  # type: ignore[attr-defined]
    invoke.__annotations__ = {"context": typer.Context} | {p.name: p.annotation for p in parameters.values()}
    examples = "".join(f"\n\n  {line}" for line in marks["examples"])
    invoke.__doc__ = inspect.getdoc(function)
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command(
        name,
        epilog=("Examples:" + examples) if examples else None,
        context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": _environment(name)},
    )(invoke)
    built: Any = typer.main.get_command(app)
    for parameter in built.params:
        parameter.show_envvar = False  # said once, below, rather than in every line
        if parameter.name == "config":
            parameter.is_eager = True
            parameter.callback = lambda context, _, value: _load_config(context, value, name)
        if parameter.metavar is None and not getattr(parameter, "is_flag", False):
            parameter.metavar = (
                METAVARS.get(_scalar(parameters[parameter.name].annotation), "TEXT")
                if parameter.name in parameters
                else None
            )
    built.format_options = lambda context, formatter: _format_options(built, context, formatter)
    return built


def _environment(name: str) -> str:
    """How the environment variables of a subcommand begin."""
    return f"LLMKIT_{name.upper().replace(' ', '_')}"


def _section(name: str) -> str:
    """The table of a subcommand in a --config file: [filter], [filter train]."""
    return name.replace(" ", "-")


METAVARS = {int: "N", float: "X", Path: "PATH"}


def _scalar(annotation: Any) -> Any:
    """The plain type inside Annotated, Optional and list."""
    while arguments := get_args(annotation):
        annotation = arguments[0]
    return annotation


def _format_options(command: Any, context: Any, formatter: Any) -> None:
    """Arguments, then the options by group: the command's own first, the shared ones last."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for parameter in command.get_params(context):
        if record := parameter.get_help_record(context):
            is_argument = parameter.param_type_name == "argument"
            shared = (
                DOCUMENTS
                if parameter.name in READING or parameter.name in WRITING
                else GENERAL
                if parameter.name in SHARED
                else ""
            )
            panel = getattr(parameter, "rich_help_panel", None)
            title = (
                "Arguments"
                if is_argument
                else panel or shared or ("General" if parameter.name == "help" else "Options")
            )
            groups.setdefault(title, []).append(record)
    last = [title for title in (DOCUMENTS, GENERAL) if title in groups]
    for title in [title for title in groups if title not in last] + last:
        with formatter.section(title):
            formatter.write_dl(groups[title])
    formatter.write_paragraph()
    formatter.write_text(
        f"Each option may also stand in the environment as {_environment(context.info_name.removeprefix('llmkit '))}_OPTION, or in the --config file."
    )


def _recordable(value: Any) -> Any:
    from llmkit.io.record import base_name

    if isinstance(value, Path):
        return base_name(value)
    return [_recordable(item) for item in value] if isinstance(value, (list, tuple)) else value


def _load_config(context: Any, path: str | None, name: str) -> str | None:
    """Make the values of a TOML file the defaults: its top level, then its table [NAME]."""
    if path is None:
        return None
    import tomllib

    from llmkit.cli.shared.table import COMMANDS

    try:
        content = tomllib.loads(Path(path).read_text())
    except OSError as error:
        raise LlmkitError(f"{path}: cannot read the configuration ({error.strerror})", "see --config") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise LlmkitError(f"{path}: invalid TOML ({error})", "see --print-config for the form") from error
    sections = set(map(_section, COMMANDS))
    top = {key: value for key, value in content.items() if not (isinstance(value, dict) and key in sections)}
    known = {parameter.name for parameter in context.command.params}
    defaults = {}
    section = content.get(_section(name))  # `filter` is a section, and an option of `llmkit filter`
    for key, value in (top | (section if isinstance(section, dict) else {})).items():
        option = key.replace("-", "_")
        option = option if option in known else f"{option}_"  # `from` is a word of Python's
        if option not in known:
            raise UsageError(
                f"{path}: unknown option {key!r} for llmkit {name}",
                suggestion(key, {name.rstrip("_") for name in known}),
            )
        defaults[option] = value
    context.default_map = defaults
    return path


def _as_toml(context: Any, without: Collection[str] = ()) -> str:
    """The resolved options, but for some, as a TOML file that --config reads; where each came from stands in a comment."""
    lines = [f"# {context.info_name}, resolved"]
    skipped = {"config", "print_config", "help", "version", "debug", *without}
    for parameter in context.command.params:
        value = context.params.get(parameter.name)
        if parameter.name in skipped or parameter.param_type_name != "option":
            continue
        source = context.get_parameter_source(parameter.name)
        origin = source.name.lower() if source else "default"
        origin = {"default_map": "config file", "commandline": "command line"}.get(origin, origin)
        key = parameter.name.rstrip("_").replace("_", "-")
        lines.append(f"# {key} is not set" if value is None else f"{key} = {toml_value(value)}  # {origin}")
    return "\n".join(lines) + "\n"


def toml_value(value: Any) -> str:
    """A string, number, boolean or list of them as TOML writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    if isinstance(value, float):
        return repr(value) if "e" not in repr(value) or "." in repr(value) else repr(value).replace("e", ".0e")
    if isinstance(value, int):
        return str(value)
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
