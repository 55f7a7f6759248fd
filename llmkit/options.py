"""Options as dataclasses: each field carries its Typer annotation and further marks.

    @dataclass(frozen=True)
    class CheckpointOptions:
        keep: Annotated[int, typer.Option("--keep", min=0, help="Keep the last N checkpoints (0 = all)"), NEUTRAL] = 0

    @dataclass(frozen=True)
    class PretrainOptions:                                # the options of one command: groups of fields
        checkpoints: CheckpointOptions = CheckpointOptions()

`cli.shared.options` derives the flags of a command from such a class, and the same class configures the same work from
Python: `from_values(PretrainOptions, {"keep": 3})`. A command that takes only part of a group excludes fields:
`Annotated[OptimizerOptions, Without("betas")]`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from enum import Enum
from functools import cache
from keyword import iskeyword
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, TypeVar, cast, get_args, get_origin, get_type_hints

import typer
from typer.models import OptionInfo

from llmkit.errors import UsageError, suggestion

Options = TypeVar("Options")


class Mark(Enum):
    """Properties of an option besides its type."""

    NEUTRAL = (
        "does not affect the content of the output: not recorded in its lineage, and may change when a run is resumed"
    )
    COMMON = "shown by --help; the others are shown by --help-all only"


NEUTRAL, COMMON = Mark.NEUTRAL, Mark.COMMON


@dataclass(frozen=True, slots=True)
class Formerly:
    """A former flag of an option, still accepted, with a note: `Formerly("--min-lr")`."""

    flag: str

    @property
    def name(self) -> str:
        """The parameter name, as in lineage records: `from_` for --from, since `from` is a Python keyword."""
        name = self.flag.removeprefix("--").replace("-", "_")
        return f"{name}_" if iskeyword(name) else name


@dataclass(frozen=True, slots=True)
class Recorded:
    """How the value of an option enters a lineage record, where it has a path or says more than decides the content."""

    convert: Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class NamesCode:
    """Values of the option that name code which the command runs, or a file that may name some: those in which
    `pattern` is found.
    """

    pattern: str = ""


@dataclass(frozen=True, slots=True)
class NamesFiles:
    """An option whose metavar does not say that its values name files. `of`: the paths in a value."""

    of: Callable[[str], list[str]] = lambda value: [value]


class Without:
    """Excludes fields of a group: `Without("betas")`."""

    def __init__(self, *names: str) -> None:
        self.names = names


class Help:
    """Replaces the help of fields of a group for one command: `Help(batch_size="Preference pairs per step")`."""

    def __init__(self, **texts: str) -> None:
        self.texts = texts


@dataclass(frozen=True, slots=True)
class Field:
    """One option: its name, annotation and default, and a help text that replaces the annotation's (or "")."""

    name: str
    annotation: Any
    default: Any
    help: str = ""

    def marks(self) -> tuple[Any, ...]:
        """The Typer annotation and the marks."""
        return marks_of(self.annotation)


def marks_of(annotation: Any) -> tuple[Any, ...]:
    """The metadata of an `Annotated` type; empty for any other type."""
    return get_args(annotation)[1:] if get_origin(annotation) is Annotated else ()


@cache
def option_fields(kind: type) -> tuple[Field, ...]:
    """All options of a class, including those of its groups, in order. Names must be unique."""
    result = []
    for name, annotation, default in _own_fields(kind):
        group = _group(annotation)
        if group is None:
            result.append(Field(name, annotation, default))
            continue
        marks = marks_of(annotation)
        excluded = {name for mark in marks if isinstance(mark, Without) for name in mark.names}
        texts = {name: text for mark in marks if isinstance(mark, Help) for name, text in mark.texts.items()}
        for field in option_fields(group):
            if field.name not in excluded:
                result.append(
                    replace(field, default=getattr(default, field.name), help=texts.get(field.name, field.help))
                )
    assert len({field.name for field in result}) == len(result), f"{kind.__name__} has two options of the same name"
    return tuple(result)


def from_values(kind: type[Options], values: Mapping[str, Any]) -> Options:
    """An instance of a class of options with these values by option name; the others keep their defaults.

    Raises UsageError for an unknown name, with the nearest ones as a hint.
    """
    fields_by_name = {field.name: field for field in option_fields(cast(Any, kind))}
    former = former_names(kind)
    checked: dict[str, Any] = {}
    for name, value in values.items():
        field = fields_by_name.get(former.get(name, name))
        if field is None:
            raise UsageError(f"unknown option {name!r}", suggestion(name, fields_by_name))
        if field.name in checked:
            raise UsageError(f"{name} and {field.name} are one option", f"give {field.name} alone")
        checked[field.name] = checked_value(field, value)
    return _build(kind, None, checked)


def checked_value(field: Field, value: Any) -> Any:
    """The value as the option has it: a string is parsed as on the command line, other types must be the option's.

    Raises UsageError for a value of another type, or out of the option's bounds.
    """
    if value is None or value is field.default:
        return value
    annotation = get_args(field.annotation)[0] if get_origin(field.annotation) is Annotated else field.annotation
    kinds = [kind for kind in get_args(annotation) or (annotation,) if kind is not NoneType]
    multiple = annotation if get_origin(annotation) is list else next((k for k in kinds if get_origin(k) is list), None)
    if multiple:
        if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
            return list(value)
        raise UsageError(f"{field.name}={value!r} is not a list of strings", f"such as {field.name}=['PATH']")
    kind = kinds[0]
    info = next((mark for mark in field.marks() if isinstance(mark, OptionInfo)), None)
    try:
        if isinstance(value, str) and info and info.parser:
            value = info.parser(value)
        elif isinstance(value, str) and kind in (int, float, Path):
            value = kind(value)
        elif kind is str and isinstance(value, Path):
            value = str(value)
        elif kind is float and type(value) is int:
            value = float(value)
    except (ValueError, typer.BadParameter) as error:
        raise UsageError(
            f"{field.name}={value!r}: {getattr(error, 'message', error)}", "see llmkit COMMAND --help"
        ) from None
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UsageError(f"{field.name}={value!r} is not of type {kind.__name__}", "see llmkit COMMAND --help")
    low, high = (info.min, info.max) if info else (None, None)
    if (low is not None and value < low) or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"between {low} and {high}"
        raise UsageError(f"{field.name}={value!r} is out of range", f"{bounds}")
    return value


def values_of(options: Any) -> dict[str, Any]:
    """Option name -> value, for all options."""
    result: dict[str, Any] = {}
    for name, annotation, _ in _own_fields(type(options)):
        value = getattr(options, name)
        if _group(annotation) is None:
            result[name] = value
        else:
            result |= values_of(value)
    return {field.name: result[field.name] for field in option_fields(cast(Any, type(options)))}


def neutral_names(kind: type) -> set[str]:
    """Names of the options that do not affect the content of the output."""
    return {field.name for field in option_fields(kind) if NEUTRAL in field.marks()}


def former_names(kind: type) -> dict[str, str]:
    """Former name -> current name of the renamed options."""
    return {
        mark.name: field.name for field in option_fields(kind) for mark in field.marks() if isinstance(mark, Formerly)
    }


def _own_fields(kind: type) -> Iterator[tuple[str, Any, Any]]:
    """(name, annotation, default) of each field of a dataclass."""
    hints = get_type_hints(kind, include_extras=True)
    for field in fields(kind):  # type: ignore[arg-type]
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        yield field.name, hints[field.name], default


def _group(annotation: Any) -> type | None:
    """The dataclass of a group field; None for a plain option."""
    kind = get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation
    return kind if isinstance(kind, type) and is_dataclass(kind) else None


def _build(kind: Any, base: Any, values: Mapping[str, Any]) -> Any:
    """An instance of `kind` with these values; the others are those of `base`, or the defaults if it is None."""
    arguments: dict[str, Any] = {}
    for name, annotation, default in _own_fields(kind):
        group, current = _group(annotation), default if base is None else getattr(base, name)
        if group is not None:
            arguments[name] = _build(group, current, values)
        elif name in values:
            arguments[name] = values[name]
        else:
            arguments[name] = current
    return kind(**arguments)


SUFFIXES = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}


def parse_count(text: Any) -> int:
    """Parse a count with an optional suffix k, M, B or T (or kB, MB, GB, TB): `10M` is 10,000,000, `1.5k` is 1,500."""
    if type(text) is int:
        return text
    text = str(text)  # a number with a fraction or an exponent, from a configuration file
    if text[-1:] == "B" and text[-2:-1] in (*"kKMGT",):
        text = text[:-1]
    number, suffix = (text[:-1], text[-1]) if text and text[-1] in SUFFIXES else (text, "")
    try:
        from decimal import Decimal  # late: 5 ms of every start

        # Exact: 2.3 * 1000 is not an integer in binary floating point.
        value = Decimal(number.replace("_", "")) * SUFFIXES[suffix]
        if value < 0 or value != int(value):
            raise ValueError
    except (ValueError, ArithmeticError):
        raise typer.BadParameter(f"{text!r} is not a count such as 5000, 10k, 2.5M or 1B") from None
    return int(value)


def parse_share(text: Any) -> float:
    """Parse a fraction below 1, or a number of tokens such as 5000 or 50k."""
    try:
        value = float(text)
    except (ValueError, TypeError):
        value = float(parse_count(text))
    if not 0 <= value < float("inf"):
        raise typer.BadParameter(f"{text!r} is neither a fraction nor a number of tokens")
    return value


def count_option(*names: str, help: str, **settings: Any) -> Any:
    """A `typer.Option` whose value is a count with an optional suffix (`parse_count`)."""
    return typer.Option(*names, help=help, parser=parse_count, metavar="COUNT", **settings)


def toml_value(value: Any) -> str:
    r"""A string, number, boolean or list of these in TOML syntax.

    A byte that is not UTF-8, as in the name of a file, becomes `\u0000` and two hex digits: no argument holds a zero
    byte, so that `from_toml` can tell.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    if isinstance(value, float):
        return repr(value) if "e" not in repr(value) or "." in repr(value) else repr(value).replace("e", ".0e")
    if isinstance(value, int):
        return str(value)
    text = re.sub("[\udc80-\udcff]", lambda byte: f"\0{ord(byte[0]) - 0xDC00:02x}", str(value))
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def from_toml(value: Any) -> Any:
    """The value that `toml_value` stored, from that which TOML holds."""
    if isinstance(value, list):
        return [from_toml(item) for item in value]
    if not isinstance(value, str):
        return value
    return re.sub("\0([89a-f][0-9a-f])", lambda digits: chr(0xDC00 + int(digits[1], 16)), value)


def check_positive(**values: float | None) -> None:
    """Raise UsageError for any value that is not above 0 and finite; None is allowed."""
    for name, value in values.items():
        if value is not None and not 0 < value < math.inf:
            wrong = "finite" if value == math.inf else "above 0"
            raise UsageError(f"--{name.replace('_', '-')} {value} is not {wrong}", "see --help")
