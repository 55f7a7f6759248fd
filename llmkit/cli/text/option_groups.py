"""Dataclasses of options as parameters of a command.

A field of such a dataclass is an option: its type is `Annotated[..., typer.Option(...)]`. A field whose type is another
dataclass stands for the options of that one.

    @command()
    @flatten_options
    def main(run: Run, *, options: DedupOptions) -> None: ...
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from functools import wraps
from typing import Any, get_type_hints


def flatten_options(function: Callable[..., None]) -> Callable[..., None]:
    """A function with the options of its dataclass parameters in their place; called, it builds the dataclasses."""
    hints = get_type_hints(function, include_extras=True)
    groups = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name in groups:
            parameters += option_parameters(groups[parameter.name])
        else:
            parameters.append(parameter.replace(annotation=hints[parameter.name]))

    @wraps(function)
    def call(*arguments: Any, **values: Any) -> None:
        built = {name: from_values(group, values) for name, group in groups.items()}
        options = {parameter.name for group in groups.values() for parameter in option_parameters(group)}
        function(*arguments, **{name: value for name, value in values.items() if name not in options}, **built)

    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return call


def option_parameters(group: Any) -> Iterator[inspect.Parameter]:
    """One keyword parameter per option of a dataclass, in order."""
    hints = get_type_hints(group, include_extras=True)
    for item in fields(group):
        if is_dataclass(hints[item.name]):
            yield from option_parameters(hints[item.name])
        else:
            kind = inspect.Parameter.KEYWORD_ONLY
            yield inspect.Parameter(item.name, kind, default=item.default, annotation=hints[item.name])


def from_values(group: Any, values: dict[str, Any]) -> Any:
    """A dataclass of options filled with the values of parameters."""
    hints = get_type_hints(group)
    nested = {item.name: hints[item.name] for item in fields(group) if is_dataclass(hints[item.name])}
    return group(
        **{
            item.name: from_values(nested[item.name], values) if item.name in nested else values[item.name]
            for item in fields(group)
        }
    )


def marked_options(group: Any, mark: object) -> tuple[str, ...]:
    """Names of the options of a dataclass with `mark` among the metadata of their type."""
    return tuple(parameter.name for parameter in option_parameters(group) if mark in parameter.annotation.__metadata__)
