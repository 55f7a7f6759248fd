"""Rows for fine-tuning and alignment: every common schema, converted to lists of messages.

Each schema is one function, registered under the fields that identify it. The first schema that matches a row
converts it. The help of `sft` and `dpo`, the error for a row that matches no schema, and the prompts that
`generate` accepts are all derived from these two tables:

    CONVERSATIONS   rows for fine-tuning: messages, or plain text
    PREFERENCES     rows with a chosen and a rejected answer

A row that cannot be converted raises RowError, whose message names the field. `read_rows` adds file and line,
and stops, skips or quarantines the row as `ReadOptions.on_bad_line` demands.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from llmkit.chat.messages import Messages, RowError, read_messages, read_tools, turn
from llmkit.errors import LlmkitError

if TYPE_CHECKING:
    from llmkit.io.documents import Document, DocumentReader

Row = TypeVar("Row")
Fields = Mapping[str, Any]

BESIDE = ("tools", "system")  # fields beside a conversation
ALPACA = ("input", "context", "history", *BESIDE)
HH_TURN = re.compile(r"\n\n(Human|Assistant):")


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
    be plain text instead of messages.
    """

    name: str
    fields: tuple[str, ...]
    convert: Callable[..., Any]
    optional: tuple[str, ...] = ()
    answer: str = ""
    plain: bool = False
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


def _schema(table: list[Schema], name: str, *fields: str, **options: Any) -> Callable[[Row], Row]:
    """Decorator: add a schema whose rows the function converts."""

    def register(convert: Row) -> Row:
        table.append(Schema(name, fields, convert, **options))  # type: ignore[arg-type]
        return convert

    return register


def schema_names(table: Iterable[Schema]) -> str:
    """The schemas of a table as help lists them: `a, b or c`."""
    *names, last = [schema.name for schema in table if schema.name]
    return f"{', '.join(names)} or {last}"


def read_rows(reader: DocumentReader, convert: Callable[[Fields], Row]) -> Iterator[tuple[Document, Row]]:
    """Every row of `reader`, with its fields as converted by `convert`. Rows for which that raises RowError are
    treated like bad lines.
    """
    from llmkit.engine.isolation import bad_line
    from llmkit.io.documents import BadLine

    for document in reader.documents():
        try:
            yield document, convert(document.fields)
        except RowError as error:
            reader.accept([BadLine(document.file, document.line, str(error), document.raw)])
        except LlmkitError:
            raise  # of the tokenizer or the options
        except Exception as error:
            reader.accept([bad_line(error, document.file, document.line, document.raw)])


def to_conversation(fields: Fields, template: bool = True) -> Conversation:
    """The conversation in one row. With `template=False`, prompt and completion strings are plain text instead
    of turns. A field that is null is none.
    """
    present = ", ".join(name if value is not None else f"{name} (null)" for name, value in fields.items())
    fields = _without_nulls(fields)
    tools = read_tools(fields)
    for schema in CONVERSATIONS:
        if schema.matches(fields):
            conversation: Conversation = schema.convert(fields, template)
            if conversation.text is None:
                conversation.messages = _with_system(conversation.messages, fields)
                conversation.tools = tools
            conversation.unused = schema.unused(fields)
            return conversation
    known = ", ".join(" and ".join(map(repr, schema.fields)) for schema in CONVERSATIONS if schema.name)
    raise RowError(f"no schema fits; looked for {known} (fields: {present or 'none'})")


def to_preference(fields: Fields) -> Preference:
    """The preference in one row. The two continuations differ, and neither is empty. A field that is null is none."""
    fields = _without_nulls(fields)
    for name in ("chosen", "rejected"):
        if name not in fields:
            raise RowError(f"no field {name!r} (fields: {', '.join(fields) or 'none'})")
    if isinstance(fields["chosen"], str) != isinstance(fields["rejected"], str):
        raise RowError("'chosen' and 'rejected' are not both strings or both lists of messages")
    for schema in PREFERENCES:
        if schema.matches(fields):
            prompt, chosen, rejected = schema.convert(fields)
            break
    else:
        raise RowError("field 'prompt' is neither a string nor a list of messages")
    if chosen == rejected:
        raise RowError("'chosen' and 'rejected' are equal")
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if not any(message["role"] == "assistant" for message in side):
            raise RowError(f"field {name!r}: no assistant message after the common prompt")
    return Preference(_with_system(prompt, fields), chosen, rejected, read_tools(fields), schema.unused(fields))


def _without_nulls(fields: Fields) -> Fields:
    return {name: value for name, value in fields.items() if value is not None}


def common_length(a: str, b: str) -> int:
    """Length of the longest common prefix."""
    if b.startswith(a):
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


# ---- schemas for fine-tuning


@_schema(CONVERSATIONS, "messages", "messages", optional=BESIDE)
def _from_messages(fields: Fields, template: bool) -> Conversation:
    """`{"messages": [{"role", "content"}], "tools"?}`"""
    return Conversation(read_messages(fields["messages"], "messages"))


@_schema(CONVERSATIONS, "ShareGPT conversations", "conversations", optional=BESIDE)
def _from_sharegpt(fields: Fields, template: bool) -> Conversation:
    """`{"conversations": [{"from", "value"}]}`, from human, gpt, system, function_call or observation."""
    return Conversation(read_messages(fields["conversations"], "conversations"))


@_schema(CONVERSATIONS, "", "completion", "label")
def _refuse_unpaired(fields: Fields, template: bool) -> Conversation:
    raise RowError("field 'label': an unpaired preference row, which cannot be used for fine-tuning")


@_schema(CONVERSATIONS, "", "chosen", "rejected")
def _refuse_preference(fields: Fields, template: bool) -> Conversation:
    raise RowError("fields 'chosen' and 'rejected': a preference row, which is input for `llmkit dpo`")


@_schema(
    CONVERSATIONS,
    "prompts with completions",
    "prompt",
    "completion",
    optional=BESIDE,
    answer="completion",
    plain=True,
)
def _from_prompt(fields: Fields, template: bool) -> Conversation:
    """`{"prompt", "completion"}`: strings become a user and an assistant turn, or with `template=False` plain
    text with the loss on the completion. Message lists are joined, with the loss on the completion only.
    """
    prompt, completion = fields["prompt"], fields["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        if not template:
            return Conversation(text=prompt + completion, start=len(prompt))
        return Conversation([turn("user", prompt), turn("assistant", completion)])
    before = [message | {"train": False} for message in _side(prompt, "prompt", "user")]
    return Conversation(before + _side(completion, "completion", "assistant"))


@_schema(CONVERSATIONS, "Alpaca instructions", "instruction", "output", optional=ALPACA, answer="output")
def _from_alpaca(fields: Fields, template: bool) -> Conversation:
    """`{"instruction", "input"?, "output", "system"?, "history"?}`: the instruction, a blank line and the input are the
    user's turn; `history` holds pairs of earlier turns.
    """
    return Conversation([*_alpaca_prompt(fields), turn("assistant", _string(fields, "output"))])


@_schema(CONVERSATIONS, "Dolly instructions", "instruction", "response", optional=ALPACA, answer="response")
def _from_dolly(fields: Fields, template: bool) -> Conversation:
    """The same with `context` for the input and `response` for the output."""
    return Conversation([*_alpaca_prompt(fields), turn("assistant", _string(fields, "response"))])


@_schema(CONVERSATIONS, "plain text", "text", plain=True)
def _from_text(fields: Fields, template: bool) -> Conversation:
    """`{"text"}`: the loss is on all of it."""
    return Conversation(text=_string(fields, "text"))


# ---- schemas of preferences: to (prompt, chosen, rejected), for rows with two strings or two lists of messages


def _strings(fields: Fields) -> bool:
    return isinstance(fields["chosen"], str)


def _holds_hh_turns(fields: Fields) -> bool:
    if not _strings(fields):
        return False
    chosen = fields["chosen"].lstrip()
    return chosen.startswith("Human:") and HH_TURN.search("\n\n" + chosen) is not None


@_schema(PREFERENCES, "turns in one string (hh-rlhf)", "chosen", "rejected", optional=BESIDE, condition=_holds_hh_turns)
def _from_hh_turns(fields: Fields) -> tuple[Messages, Messages, Messages]:
    """Whole conversations whose turns start with `\\n\\nHuman:` and `\\n\\nAssistant:`."""
    chosen, rejected = (_hh_turns(fields[name], name) for name in ("chosen", "rejected"))
    return _split_prompt(chosen, rejected)


@_schema(
    PREFERENCES,
    "lists of messages",
    "chosen",
    "rejected",
    optional=("prompt", *BESIDE),
    condition=lambda fields: not _strings(fields),
)
def _from_message_lists(fields: Fields) -> tuple[Messages, Messages, Messages]:
    """Sides that begin with the assistant continue `prompt`; others include the prompt, as their longest common
    prefix.
    """
    chosen, rejected = (read_messages(fields[name], name) for name in ("chosen", "rejected"))
    prompt = fields.get("prompt")
    if prompt is not None and chosen[0]["role"] == rejected[0]["role"] == "assistant":
        return _side(prompt, "prompt", "user"), chosen, rejected
    return _split_prompt(chosen, rejected)


@_schema(
    PREFERENCES,
    "strings with a prompt",
    "prompt",
    "chosen",
    "rejected",
    optional=BESIDE,
    condition=lambda fields: isinstance(fields["prompt"], (str, list)),
)
def _from_prompt_and_strings(fields: Fields) -> tuple[Messages, Messages, Messages]:
    """The prompt is a string, a string of hh-rlhf turns, or a list of messages."""
    prompt = fields["prompt"]
    if isinstance(prompt, list):
        return read_messages(prompt, "prompt"), *_answers(fields)
    before = _hh_turns(prompt, "prompt") if prompt.lstrip().startswith("Human:") else [turn("user", prompt)]
    if before[-1] == turn("assistant", ""):  # hh-rlhf prompts end in "Assistant:"
        before.pop()
    return before, *_answers(fields)


@_schema(PREFERENCES, "strings with an Alpaca instruction", "instruction", "chosen", "rejected", optional=ALPACA)
def _from_instruction_and_strings(fields: Fields) -> tuple[Messages, Messages, Messages]:
    """`{"instruction", "input"?, "chosen", "rejected"}`"""
    return _alpaca_prompt(fields), *_answers(fields)


@_schema(
    PREFERENCES,
    "strings with a common beginning",
    "chosen",
    "rejected",
    optional=BESIDE,
    condition=lambda fields: fields.get("prompt") is None,
)
def _from_common_beginning(fields: Fields) -> tuple[Messages, Messages, Messages]:
    """Without `prompt`, the longest common prefix in whole words is the prompt."""
    chosen, rejected = fields["chosen"], fields["rejected"]
    common = chosen[: common_length(chosen, rejected)]
    common = common[: max(common.rfind(" "), common.rfind("\n")) + 1]  # whole words
    if not common.strip():
        raise RowError("no field 'prompt', and 'chosen' and 'rejected' have no common beginning")
    prompt = [turn("user", common.rstrip())]
    return prompt, [turn("assistant", chosen[len(common) :])], [turn("assistant", rejected[len(common) :])]


# ---- parts of rows


def _answers(fields: Fields) -> tuple[Messages, Messages]:
    return [turn("assistant", fields["chosen"])], [turn("assistant", fields["rejected"])]


def _split_prompt(chosen: Messages, rejected: Messages) -> tuple[Messages, Messages, Messages]:
    """The longest common prefix of two conversations, and the rest of each."""
    common = 0
    while common < min(len(chosen), len(rejected)) and chosen[common] == rejected[common]:
        common += 1
    if common == 0:
        raise RowError("no field 'prompt', and 'chosen' and 'rejected' have no common first message")
    return chosen[:common], chosen[common:], rejected[common:]


def _hh_turns(text: str, name: str) -> Messages:
    pieces = HH_TURN.split("\n\n" + text.lstrip())
    if pieces[0].strip():
        raise RowError(f"field {name!r}: text before the first 'Human:'")
    turns = [
        turn("user" if speaker == "Human" else "assistant", content.strip())
        for speaker, content in zip(pieces[1::2], pieces[2::2], strict=True)
    ]
    if not turns:
        raise RowError(f"field {name!r}: no 'Human:' or 'Assistant:' turn")
    return turns


def _alpaca_prompt(fields: Fields) -> Messages:
    request = _string(fields, "instruction")
    for name in ("input", "context"):
        if fields.get(name):
            request += "\n\n" + _string(fields, name)
    return [*_history(fields), turn("user", request)]


def _history(fields: Fields) -> Messages:
    history = fields.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise RowError("field 'history' is not a list of pairs")
    if not all(isinstance(content, str) for pair in history for content in pair):
        raise RowError("field 'history' holds a turn that is not a string")
    return [turn(role, content) for pair in history for role, content in zip(("user", "assistant"), pair, strict=True)]


def _with_system(messages: Messages, fields: Fields) -> Messages:
    """The messages after the system prompt that stands beside them in the row."""
    if not fields.get("system"):
        return messages
    first = turn("system", _string(fields, "system"))
    if not messages or messages[0]["role"] != "system":
        return [first, *messages]
    if messages[0]["content"] == first["content"]:
        return messages
    raise RowError("field 'system' differs from the conversation's own system message")


def _side(value: Any, name: str, role: str) -> Messages:
    return [turn(role, value)] if isinstance(value, str) else read_messages(value, name)


def _string(fields: Fields, name: str) -> str:
    value = fields[name]
    if not isinstance(value, str):
        raise RowError(f"field {name!r} is not a string")
    return value
