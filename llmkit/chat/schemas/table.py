"""The tables of row schemas, and what their functions share.

Each schema is one function, registered under the fields that identify it. The first schema that matches a row converts
it. The help of `sft` and `dpo`, the error for a row that matches no schema, and the prompts that `generate` accepts are
derived from these tables:

    CONVERSATIONS   rows for fine-tuning: messages, or plain text
    PREFERENCES     rows with a preferred and another answer
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from llmkit.chat.messages import Messages, RowError, read_messages, turn

Function = TypeVar("Function")
Item = TypeVar("Item")
Other = TypeVar("Other")
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


@dataclass(slots=True)
class Preference:
    """A prompt and two continuations, the first of which is preferred."""

    prompt: Messages
    chosen: Messages
    rejected: Messages
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Valid parts of a row that are not used, such as a tie or a lower-ranked answer, and how many."""

    what: str
    count: int = 1


@dataclass(frozen=True, slots=True)
class Unused:
    """A nested field of a row that nothing reads."""

    field: str


class Converted(list[Item]):
    """What one row holds, with the names of its fields that are not used, and the parts that are left out."""

    def __init__(self, items: Iterable[Item] = (), unused: Iterable[str] = (), left_out: Iterable[str] = ()) -> None:
        super().__init__(items)
        self.unused = list(unused)
        self.left_out = Counter(left_out)

    def each(self, function: Callable[[Item], Iterable[Other]]) -> Converted[Other]:
        """The results of `function` for each item."""
        result = Converted((made for item in self for made in function(item)), self.unused)
        result.left_out = self.left_out
        return result


@dataclass(frozen=True, slots=True)
class Schema:
    """One form of row. It matches rows that have all of `fields` and meet `condition`, if there is one.

    `name` is what help calls such rows; a schema without a name only explains why its rows are refused.
    `optional` fields are read if present. `answer` names the field with the assistant's answer, which
    `generate` does not need; without it, the answer is the last message. Strings of a schema with `plain` may
    be plain text instead of messages. The function of one with `several` yields any number
    of results, and LeftOut and Unused for what it does not take.
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
        return all(name in fields for name in self.fields) and self.accepts(fields)

    def accepts(self, fields: Fields) -> bool:
        """Whether the fields meet the condition, if there is one."""
        return self.condition is None or self.condition(fields)

    @property
    def label(self) -> str:
        """The fields as errors list them; one whose kind decides is not enough by its name."""
        return " and ".join(map(repr, self.fields)) + (
            f" ({self.name})" if self.condition and not self.fields[1:] else ""
        )

    def converted(self, fields: Fields, *arguments: Any) -> Converted[Any]:
        """What the row holds."""
        unused = [name for name in fields if name not in self.fields and name not in self.optional]
        result: Converted[Any] = Converted([], unused)
        made = self.convert(fields, *arguments)
        for item in made if self.several else [made]:
            if isinstance(item, LeftOut):
                result.left_out[item.what] += item.count
            elif isinstance(item, Unused):
                result.unused.append(item.field)
            else:
                result.append(item)
        return result

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


def listed(left_out: Counter[str]) -> str:
    """What was left out, the commonest first: `85 ties, 3 wrong choices`."""
    return ", ".join(f"{count:,} {what}" for what, count in left_out.most_common())


def string(fields: Fields, name: str, where: str = "") -> str:
    """The text in a field; `where` is the path of the object that holds it, such as "instances[0]."."""
    value = fields[name]
    if not isinstance(value, str):
        raise RowError(f"field {where + name!r} is not a string")
    return value


def side(value: Any, name: str, role: str) -> Messages:
    """The messages in a field: a text is one of `role`, an object is one message."""
    if isinstance(value, str):
        return [turn(role, value)]
    if not isinstance(value, (list, Mapping)):
        raise RowError(f"field {name!r} is neither a text nor a list of messages")
    return read_messages([value] if isinstance(value, Mapping) else value, name)


def alpaca_prompt(fields: Fields, where: str = "") -> Messages:
    """`history`, then the instruction, a blank line and the input or context as the user's turn."""
    request = string(fields, "instruction")
    for name in ("input", "context"):
        if fields.get(name):
            request += "\n\n" + string(fields, name, where)
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
