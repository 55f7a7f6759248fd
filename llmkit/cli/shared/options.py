"""The options that every command shares, and `@command`, which adds them to a function.

A command is a function whose first parameter is a `Run`; the others are its own arguments and options, individually or
as classes of options (`llmkit.options`). `@command` marks it, `build` turns it into a Typer command. The value of an
option comes from the flag, or else from the environment (LLMKIT_<COMMAND>_<OPTION>), or else from the TOML file of
--config, or else it is the default. --print-config shows the result.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from copy import copy
from dataclasses import dataclass, is_dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

from llmkit.cli.shared.configuration import environment_prefix, load_config, present_spelling
from llmkit.cli.shared.invocation import Run
from llmkit.cli.shared.messages import Progress
from llmkit.errors import LlmkitError, UsageError, suggestion
from llmkit.io.record import recorded
from llmkit.memory import set_budget
from llmkit.options import (
    COMMON,
    Recorded,
    count_option,
    former_names,
    from_values,
    marks_of,
    neutral_names,
    option_fields,
    parse_count,
    toml_value,
)

__all__ = [
    "COMMON",
    "InputPaths",
    "ModelPath",
    "Progress",
    "Run",
    "build",
    "click_command",
    "command",
    "count_option",
    "parse_count",
    "toml_value",
]

InputPaths = Annotated[
    list[str] | None, typer.Argument(metavar="INPUT", help="Files, globs, directories or '-' (default: stdin)")
]
ModelPath = Annotated[str, typer.Argument(metavar="MODEL", help="Hugging Face model directory or run")]

GENERAL = "General"
DOCUMENTS = "Documents"
FEW_OPTIONS = 15  # a command with at most this many options of its own shows all of them in --help


def _flag(*names: str, help: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=GENERAL, **more)


def _reading(*names: str, help: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=DOCUMENTS, **more)


@dataclass(frozen=True)
class SharedOptions:
    """The options of every command."""

    output: Annotated[
        str | None,
        _flag(
            "--output", "-o", metavar="PATH", help="Output file or directory (default: stdout, if the command streams)"
        ),
        COMMON,
    ] = None
    force: Annotated[bool, _flag("--force", "-f", help="Replace an existing output"), COMMON] = False
    dry_run: Annotated[bool, _flag("--dry-run", "-n", help="Check everything, write nothing"), COMMON] = False
    quiet: Annotated[bool, _flag("--quiet", "-q", help="Print nothing on success"), COMMON] = False
    verbose: Annotated[bool, _flag("--verbose", "-v", help="Print more details")] = False
    jobs: Annotated[
        int, _flag("--jobs", "-j", min=1, help="Number of worker processes; does not affect the output"), COMMON
    ] = 1
    config: Annotated[
        str | None,
        _flag("--config", "-c", metavar="TOML", help="File of option values, at the top level or in a table [COMMAND]"),
        COMMON,
    ] = None
    seed: Annotated[int, _flag("--seed", min=0, help="Random seed"), COMMON] = 0
    json: Annotated[
        bool, _flag("--json", help="Print the summary, or the error, as one JSON line on stderr"), COMMON
    ] = False
    summary: Annotated[
        str | None, _flag("--summary", metavar="FILE", help="Also write the summary to this file, as JSON")
    ] = None
    memory: Annotated[
        int,
        count_option(
            "--memory",
            help="Most bytes for reading a part of a file (default: half of this machine's memory, at most 4G)",
            rich_help_panel=GENERAL,
        ),
    ] = 0
    print_config: Annotated[bool, _flag("--print-config", help="Print the resolved options as TOML and exit")] = False
    debug: Annotated[bool, _flag("--debug", help="Show the traceback of an error")] = False
    version: Annotated[bool, _flag("--version", "-V", help="Print the version and exit")] = False


@dataclass(frozen=True)
class ReadingOptions:
    """The options of a command that reads documents."""

    text_key: Annotated[str, _reading("--text-key", metavar="FIELD", help="Field with the text"), COMMON] = "text"
    id_key: Annotated[str, _reading("--id-key", metavar="FIELD", help="Field with the id")] = "id"
    on_bad_line: Annotated[
        str,
        _reading(
            "--on-bad-line", metavar="HOW", help="What to do with unreadable lines: stop, skip, or quarantine=FILE"
        ),
        COMMON,
        Recorded(lambda policy: str(policy).replace("quarantine", "skip").partition("=")[0]),
    ] = "stop"
    on_bad_file: Annotated[
        str | None,
        _reading(
            "--on-bad-file",
            metavar="HOW",
            help="What to do with unreadable or damaged files: stop (default), skip, or quarantine=FILE",
        ),
        COMMON,
    ] = None
    fail_on_bad_file: Annotated[
        bool, _reading("--fail-on-bad-file", help="Exit with 1 if files were skipped, once all outputs are written")
    ] = False
    max_line_bytes: Annotated[
        int, count_option("--max-line-bytes", help="Maximum length of a line, in bytes", rich_help_panel=DOCUMENTS)
    ] = 16 << 20
    files_from: Annotated[
        str | None,
        _reading("--files-from", metavar="FILE", help="Also read the inputs listed in this file, one per line"),
    ] = None


@dataclass(frozen=True)
class WritingOptions:
    """The options of a command that writes documents."""

    plain: Annotated[
        bool, _reading("--plain", help="Write plain JSON lines to stdout, without lineage (for jq)"), COMMON
    ] = False


SHARED = tuple(field.name for field in option_fields(SharedOptions))
# Shared options that do not affect the content of the output, and are therefore not recorded in its lineage.
NEUTRAL = {*SHARED, "files_from", "plain", "on_bad_file", "fail_on_bad_file"} - {"seed"}
# Neutral as long as all inputs can be read; recorded where it is used.
RECORDED_IF_USED = {"on_bad_file"}


def command(
    *, examples: tuple[str, ...] = (), neutral: tuple[str, ...] = (), reads: bool = False, writes: bool = False
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Mark a function as a subcommand.

    `examples` are shown in its help and run by the tests. `neutral` names options of the command that do not affect the
    content of the output, in addition to those marked NEUTRAL. `reads` adds the options of a document reader
    (`Run.reader`), `writes` those of a document writer (`Run.writer`).
    """

    def mark(function: Callable[..., None]) -> Callable[..., None]:
        marks = {"examples": examples, "neutral": set(neutral), "reads": reads, "writes": writes}
        function.llmkit = marks  # type: ignore[attr-defined]
        return function

    return mark


def option_classes(function: Callable[..., None]) -> dict[str, type]:
    """The parameters of a command that are classes of options."""
    hints = get_type_hints(function, include_extras=True)
    names = list(inspect.signature(function).parameters)[1:]
    return {name: hints[name] for name in names if isinstance(hints[name], type) and is_dataclass(hints[name])}


def renamed_options(function: Callable[..., None]) -> dict[str, str]:
    """Former name -> current name of the renamed options of a command."""
    return {old: new for kind in option_classes(function).values() for old, new in former_names(kind).items()}


def neutral_options(function: Callable[..., None]) -> set[str]:
    """The options of a command, apart from the shared ones, that do not affect the content of its output."""
    own: set[str] = function.llmkit["neutral"]  # type: ignore[attr-defined]
    return own.union(*map(neutral_names, option_classes(function).values()))


def signature(function: Callable[..., None]) -> dict[str, inspect.Parameter]:
    """The parameters of a command, without the `Run`: classes of options expanded to fields, shared options added."""
    marks = function.llmkit  # type: ignore[attr-defined]
    hints = get_type_hints(function, include_extras=True)
    classes = option_classes(function)
    parameters: dict[str, inspect.Parameter] = {}
    for parameter in list(inspect.signature(function).parameters.values())[1:]:
        if parameter.name in classes:
            parameters |= {
                field.name: _parameter(field.name, _with_help(field.annotation, field.help), field.default)
                for field in option_fields(classes[parameter.name])
            }
        else:
            parameters[parameter.name] = parameter.replace(
                annotation=hints[parameter.name], kind=parameter.KEYWORD_ONLY
            )
    reading, writing = (ReadingOptions,) * marks["reads"], (WritingOptions,) * marks["writes"]
    for kind in (*reading, *writing, SharedOptions):
        for field in option_fields(kind):
            parameters.setdefault(field.name, _parameter(field.name, field.annotation, field.default))
    return parameters


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _with_help(annotation: Any, text: str) -> Any:
    """The annotation with its help text replaced, unless `text` is empty."""
    if not text:
        return annotation
    kind, *marks = get_args(annotation)
    for i, mark in enumerate(marks):
        if hasattr(mark, "help"):
            marks[i] = copy(mark)
            marks[i].help = text
    return Annotated[(kind, *marks)]


def build(function: Callable[..., None], name: str) -> Callable[[list[str]], None]:
    """A callable that parses the arguments of subcommand `name` and runs it. Raises UsageError for usage errors."""
    command = click_command(function, name)
    renamed = renamed_options(function)

    def call(arguments: list[str]) -> None:
        # Not command.main: it would turn a broken pipe and Ctrl-C into exit code 1.
        options = arguments[: arguments.index("--")] if "--" in arguments else arguments
        command.shows_all = "--help-all" in options
        if command.shows_all:
            arguments = ["--help"]
        try:
            with command.make_context(f"llmkit {name}", present_spelling(command, name, arguments, renamed)) as context:
                command.invoke(context)
        except typer.Exit:
            return
        except Exception as error:
            converted = _as_usage_error(error)
            if converted is error:
                raise  # with its cause, for --debug
            raise converted from None

    return call


def _as_usage_error(error: Exception) -> Exception:
    """Convert an error of the parser to a UsageError; return any other error unchanged."""
    if isinstance(error, LlmkitError) or not hasattr(error, "format_message"):
        return error
    possible = getattr(error, "possibilities", None)
    unknown_option = getattr(error, "option_name", "")
    hint = suggestion(unknown_option, possible) if possible else "see --help"
    return UsageError(error.format_message().rstrip("."), hint)


def click_command(function: Callable[..., None], name: str) -> Any:
    """Typer's command object for a marked function."""
    parameters = signature(function)
    marks = function.llmkit  # type: ignore[attr-defined]
    classes = option_classes(function)
    neutral = NEUTRAL | neutral_options(function)
    own_names = inspect.signature(function).parameters

    def invoke(context: typer.Context, **values: Any) -> None:
        if values["print_config"]:
            print(_as_toml(context), end="")
            return
        arguments = {key: value for key, value in values.items() if key in own_names and key not in classes}
        for parameter, options in classes.items():
            fields = {field.name: values[field.name] for field in option_fields(options)}
            arguments[parameter] = from_values(options, fields)
        kinds = {parameter.name: parameter.param_type_name for parameter in context.command.params}
        decisive = {key: v for key, v in values.items() if kinds.get(key) == "option" and key not in neutral}
        paths = {key: value for key, value in decisive.items() if isinstance(value, Path)}
        marks = {key: marks_of(parameter.annotation) for key, parameter in parameters.items()}
        record = {key: recorded(value, marks[key]) for key, value in decisive.items() if value is not None}
        set_budget(values["memory"])
        run = Run(name, values, record, paths)
        run.config = partial(_as_toml, context)
        with run._stack, run.shows_warnings():
            function(run, **arguments)
        run.check_bad_files()

    context = inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    invoke.__signature__ = inspect.Signature([context, *parameters.values()])  # type: ignore[attr-defined]
    invoke.__annotations__ = {"context": typer.Context} | {p.name: p.annotation for p in parameters.values()}
    examples = "".join(f"\n  {line}" for line in marks["examples"])
    invoke.__doc__ = inspect.getdoc(function)
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command(
        name,
        epilog=("\b\nExamples:" + examples) if examples else None,
        context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": environment_prefix(name)},
    )(invoke)
    built: Any = typer.main.get_command(app)
    for parameter in built.params:
        parameter.show_envvar = False  # explained once at the end of the help, not in every line
        parameter.common = parameter.name not in parameters or COMMON in marks_of(parameters[parameter.name].annotation)
        if parameter.name == "config":
            parameter.is_eager = True
            parameter.callback = lambda context, _, value: load_config(context, value, name, renamed_options(function))
        if parameter.metavar is None and not getattr(parameter, "is_flag", False):
            parameter.metavar = (
                METAVARS.get(_scalar(parameters[parameter.name].annotation), "TEXT")
                if parameter.name in parameters
                else None
            )
    built.format_options = lambda context, formatter: _format_options(built, context, formatter)
    return built


METAVARS = {int: "N", float: "X", Path: "PATH"}


def _scalar(annotation: Any) -> Any:
    """The plain type inside Annotated, Optional and list."""
    while arguments := get_args(annotation):
        annotation = arguments[0]
    return annotation


def _format_options(command: Any, context: Any, formatter: Any) -> None:
    """Write the arguments, then the options by group: the command's own first, the shared ones last.

    Within a group the common options come first. --help leaves the others out, --help-all shows them.
    """
    show_all = getattr(command, "shows_all", False)
    options = [p for p in command.get_params(context) if p.param_type_name == "option"]
    own = [p for p in options if getattr(p, "rich_help_panel", None) not in (GENERAL, DOCUMENTS) and p.name != "help"]
    show_all_own = len(own) <= FEW_OPTIONS
    groups: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
    hidden = 0
    for parameter in sorted(
        command.get_params(context), key=lambda p: (p.name == "help", not getattr(p, "common", True))
    ):
        record = parameter.get_help_record(context)
        if record is None:
            continue
        if parameter.param_type_name == "argument":
            name = record[0].partition(" <")[0]  # without Typer's name of the type
            groups["Arguments"].append((name, record[1]))
            continue
        if parameter.name == "help":
            record = (record[0], "Show this help and exit")
        elif not (show_all or getattr(parameter, "common", True) or (show_all_own and parameter in own)):
            hidden += 1
            continue
        panel = getattr(parameter, "rich_help_panel", None)
        groups.setdefault(panel or (GENERAL if parameter.name == "help" else "Options"), []).append(record)
    last = [title for title in (DOCUMENTS, GENERAL) if title in groups]
    for title in [title for title in groups if groups[title] and title not in last] + last:
        with formatter.section(title):
            formatter.write_dl(groups[title])
    formatter.write_paragraph()
    if hidden:
        formatter.write_text(f"--help-all shows {hidden} more options.")
    name = context.info_name.removeprefix("llmkit ")
    formatter.write_text(
        f"Options can also be set in the environment, as {environment_prefix(name)}_OPTION, or in the --config file."
    )


def _as_toml(context: Any, without: Collection[str] = ()) -> str:
    """The resolved options, except those named, as TOML for --config; a comment gives the origin of each."""
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
