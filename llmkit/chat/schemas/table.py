"""The tables of row schemas, and what their functions share.

Each schema is one function, registered under the fields that identify it. The first schema that matches a row converts
it. The help of `sft` and `dpo`, the error for a row that matches no schema, and the prompts that `generate` accepts are
derived from these tables:

    CONVERSATIONS   rows for fine-tuning: messages, or plain text
    PREFERENCES     rows with a preferred and another answer
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from llmkit.chat.messages import Messages, RowError, read_messages, turn

Function = TypeVar("Function")
Fields = Mapping[str, Any]

BESIDE = ("tools", "system")  # fields beside a conversation
ANSWERS = (("output_1", "output_2"), ("response_1", "response_2"), ("response1", "response2"))  # to one prompt
ALPACA = ("input", "context", "history", *BESIDE)


@dataclass(slots=True)
class Conversation:
    """One row for fine-tuning: `messages` for the chat template, or plain `text` whose loss starts at character
    `start`.
    """

    messages: Messages = field(default_factory=list)
    tools: list[dict[str, Any]] | None = None
    text: str | None = None
    start: int = 0
    unused: list[str] = field(default_factory=list)  # fields of the row that say nothing here


@dataclass(slots=True)
class Preference:
    """A prompt and two continuations, the first of which is preferred."""

    prompt: Messages
    chosen: Messages
    rejected: Messages
    tools: list[dict[str, Any]] | None = None
    unused: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Schema:
    """One form of row. It matches rows that have all of `fields` and meet `condition`, if there is one.

    `name` is what help calls such rows; a schema without a name only explains why its rows are refused.
    `optional` fields are read if present. `answer` names the field with the assistant's answer, which
    `generate` does not need; without it, the answer is the last message. Strings of a schema with `plain` may
    be plain text instead of messages. One with `several` makes a list of results of a row, which may be empty.
    """

    name: str
    fields: tuple[str, ...]
    convert: Callable[..., Any]
    optional: tuple[str, ...] = ()
    answer: str = ""
    plain: bool = False
    several: bool = False
    condition: Callable[[Fields], bool] | None = None

    def matches(self, fields: Fields) -> bool:
        return all(name in fields for name in self.fields) and (self.condition is None or self.condition(fields))

    def unused(self, fields: Fields) -> list[str]:
        """The names of fields that are not read."""
        return [name for name in fields if name not in self.fields and name not in self.optional]

    @property
    def question(self) -> tuple[str, ...]:
        """The fields that are needed for a prompt: all but the answer."""
        return tuple(name for name in self.fields if name != self.answer)


CONVERSATIONS: list[Schema] = []  # in the order in which they are tried
PREFERENCES: list[Schema] = []


def schema(table: list[Schema], name: str, *fields: str, **options: Any) -> Callable[[Function], Function]:
    """Decorator: add a schema whose rows the function converts."""

    def register(convert: Function) -> Function:
        table.append(Schema(name, fields, convert, **options))  # type: ignore[arg-type]
        return convert

    return register


def schema_names(table: Iterable[Schema]) -> str:
    """The schemas of a table as help lists them: `a, b or c`."""
    *names, last = dict.fromkeys(schema.name for schema in table if schema.name)
    return f"{', '.join(names)} or {last}"


def string(fields: Fields, name: str) -> str:
    """The text in a field."""
    value = fields[name]
    if not isinstance(value, str):
        raise RowError(f"field {name!r} is not a string")
    return value


def side(value: Any, name: str, role: str) -> Messages:
    """The messages in a field: a text is one of `role`, an object is one message."""
    if isinstance(value, str):
        return [turn(role, value)]
    if not isinstance(value, (list, Mapping)):
        raise RowError(f"field {name!r} is neither a text nor a list of messages")
    return read_messages([value] if isinstance(value, Mapping) else value, name)


def alpaca_prompt(fields: Fields) -> Messages:
    """`history`, then the instruction, a blank line and the input or context as the user's turn."""
    request = string(fields, "instruction")
    for name in ("input", "context"):
        if fields.get(name):
            request += "\n\n" + string(fields, name)
    return [*_history(fields), turn("user", request)]


def _history(fields: Fields) -> Messages:
    history = fields.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise RowError("field 'history' is not a list of pairs")
    if not all(isinstance(content, str) for pair in history for content in pair):
        raise RowError("field 'history' holds a turn that is not a string")
    return [turn(role, content) for pair in history for role, content in zip(("user", "assistant"), pair, strict=True)]


def common_length(a: str, b: str) -> int:
    """Length of the longest common prefix."""
    if b.startswith(a):
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
