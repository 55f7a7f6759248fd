"""Rows for fine-tuning and alignment: every common schema (chat/schemas), converted to lists of messages.

    names = field_names(CONVERSATIONS, ["messages=data.chat"])
    for document, conversations in read_rows(reader, to_conversations, names): ...

A row that cannot be converted raises RowError, whose message names the field; nothing of it is used. `read_rows` adds
file and line, and stops, skips or quarantines the row as `ReadOptions.on_bad_line` demands.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from llmkit.chat import schemas as schemas  # registers them
from llmkit.chat.messages import ROLES, Messages, RowError, read_tools, turn
from llmkit.chat.schemas.table import (
    CONVERSATIONS,
    PREFERENCES,
    Conversation,
    Converted,
    Fields,
    Preference,
    Schema,
    listed,
    schema_names,
    string,
)
from llmkit.chat.schemas.trees import MESSAGE_FIELDS, FlatMessages, Sides, is_flat_message
from llmkit.errors import LlmkitError, UsageError, suggestion
from llmkit.io.documents import BadLine, Document, DocumentReader

__all__ = [
    "CONVERSATIONS",
    "PREFERENCES",
    "Conversation",
    "Converted",
    "Preference",
    "Refused",
    "listed",
    "read_outcomes",
    "read_rows",
    "schema_names",
    "to_conversation",
    "to_conversations",
    "to_preferences",
]
Row = TypeVar("Row")
NO_NAMES: Mapping[str, str] = {}
JSON_COLUMNS = ("messages", "conversations", "history", "instances")  # a string in these is JSON
MAYBE_JSON = ("prompt", "chosen", "rejected")  # a string in these is JSON if it holds messages, and otherwise text


@dataclass(frozen=True, slots=True)
class Refused:
    """A row that cannot be used: the lines that it comes from, each with the reason."""

    lines: list[BadLine]


def read_rows(
    reader: DocumentReader, convert: Callable[[Fields], Row], names: Mapping[str, str] = NO_NAMES
) -> Iterator[tuple[Document, Row]]:
    """Every row of `reader`, with its fields as converted by `convert`; `names` as `field_names` returns them. Rows
    for which that raises RowError are treated like bad lines.
    """
    for document, outcome in read_outcomes(reader, convert, names):
        if isinstance(outcome, Refused):
            reader.accept(outcome.lines)
        else:
            yield document, outcome


def read_outcomes(
    reader: DocumentReader, convert: Callable[[Fields], Row], names: Mapping[str, str] = NO_NAMES
) -> Iterator[tuple[Document, Row | Refused]]:
    """As `read_rows`, but rows that `convert` refuses are left to the caller.

    Messages of trees in rows of their own are held in memory, and become the rows of their trees at the end of their
    file, each with the document of its first line.
    """
    from llmkit.engine.isolation import bad_line

    for documents, fields in _joined(reader, names):
        outcome: Row | Refused
        try:
            outcome = convert(fields)
        except RowError as error:
            outcome = Refused([_bad(document, error) for document in documents])
        except LlmkitError:
            raise  # of the tokenizer or the options
        except Exception as error:
            outcome = Refused([bad_line(error, document.file, document.line, document.raw) for document in documents])
        yield documents[0], outcome


def _bad(document: Document, error: RowError) -> BadLine:
    return BadLine(document.file, document.line, str(error), document.raw)


def _joined(reader: DocumentReader, names: Mapping[str, str]) -> Iterator[tuple[list[Document], Fields]]:
    """The fields of each row, and the lines that they come from."""
    messages, file = FlatMessages(reader), ""
    for document in reader.documents():
        if document.file != file:
            yield from messages.trees()
            file = document.file
        try:
            fields = renamed(document.fields, names)
        except RowError as error:
            reader.accept([_bad(document, error)])
            continue
        if is_flat_message(fields):
            messages.add(document, fields)
        else:
            yield [document], fields
    yield from messages.trees()


def to_conversation(fields: Fields, template: bool = True) -> Conversation:
    """The conversation in a row of one; as `to_conversations`."""
    conversations = to_conversations(fields, template)
    if len(conversations) != 1:
        raise RowError(f"a row of {len(conversations)} conversations")
    return conversations[0]


def to_conversations(fields: Fields, template: bool = True) -> Converted[Conversation]:
    """The conversations in one row. With `template=False`, prompt and completion strings are plain text instead
    of turns. A field that is null is none, and one of messages as JSON in a text is those messages.
    """
    conversations: Converted[Conversation] = _converted(CONVERSATIONS, fields, template)
    tools = read_tools(fields)
    for conversation in conversations:
        if conversation.text is None:
            conversation.messages = _with_system(conversation.messages, fields)
            conversation.tools = tools
    return conversations


def to_preferences(fields: Fields) -> Converted[Preference]:
    """The preferences in one row, none if it is a tie. The two continuations of each differ, and neither is empty.
    Nulls and JSON as in `to_conversations`.
    """
    tools = read_tools(fields)

    def checked(sides: Sides) -> list[Preference]:
        prompt, chosen, rejected = sides
        if chosen == rejected:
            raise RowError("'chosen' and 'rejected' are equal")
        for name, answer in (("chosen", chosen), ("rejected", rejected)):
            if not any(message["role"] == "assistant" for message in answer):
                raise RowError(f"field {name!r}: no assistant message after the common prompt")
        return [Preference(_with_system(prompt, fields), chosen, rejected, tools)]

    return _converted(PREFERENCES, fields).each(checked)


def _converted(table: list[Schema], fields: Fields, *arguments: Any) -> Converted[Any]:
    """What the row holds by the first schema that matches it."""
    values = _as_values(fields)
    for schema in table:
        if schema.matches(values):
            return schema.converted(values, *arguments)
    if table is PREFERENCES and (other := next((s for s in CONVERSATIONS if s.name and s.matches(values)), None)):
        what = " and ".join(map(repr, other.fields))
        raise RowError(f"{what}: a row for fine-tuning, which is input for `llmkit sft`; dpo needs two answers")
    present = ", ".join(name if value is not None else f"{name} (null)" for name, value in fields.items())
    known = ", ".join(dict.fromkeys(schema.label for schema in table if schema.name))
    raise RowError(f"no schema fits; looked for {known} (fields: {present or 'none'}; --map NAME=FIELD renames fields)")


def field_names(table: list[Schema], options: list[str]) -> dict[str, str]:
    """`NAME=FIELD,...` as names of fields of the table's schemas -> fields of rows, with dots for nested ones."""
    read = (name for schema in table if schema.name for name in (*schema.fields, *schema.optional))
    known = dict.fromkeys((*read, *MESSAGE_FIELDS))
    names: dict[str, str] = {}
    for item in ",".join(options).split(",") if options else []:
        name, equals, path = (part.strip() for part in item.partition("="))
        if not (equals and name and all(path.split("."))):
            raise UsageError(f"--map {item!r}", "give NAME=FIELD, such as messages=chat or messages=data.chat")
        if name not in known:
            near = suggestion(name, known).partition("known: ")[0]
            listed = f"known: {', '.join(sorted(known))}"
            raise UsageError(f"--map {item!r}: no rows have a field {name!r}", f"{near} {listed}".strip())
        if name in names:
            raise UsageError(f"--map names {name!r} twice", "give one field for each name")
        names[name] = path
    return names


def renamed(fields: Fields, names: Mapping[str, str]) -> Fields:
    """The fields with those that `names` maps under their names here, in place of any of these names. An object keeps
    what else it holds. Raises RowError where a field is missing.
    """
    taken = {name: _taken(fields, path, name) for name, path in names.items()}
    rest = fields
    for path in names.values():
        rest = _without(rest, [path] if path in fields else path.split("."))
    return {name: value for name, value in rest.items() if name not in taken} | taken


def _taken(fields: Fields, path: str, name: str) -> Any:
    """The value at a path, or of a field whose own name is the path."""
    if path in fields:
        return fields[path]
    value: Any = fields
    for part in path.split("."):
        if not isinstance(value, Mapping) or part not in value:
            beside = f" (fields: {', '.join(value) or 'none'})" if isinstance(value, Mapping) else ""
            raise RowError(f"no field {path!r} for {name!r}{beside}")
        value = value[part]
    return value


def _without(fields: Fields, path: list[str]) -> Fields:
    """The fields without that at a path, and without the objects around it that hold nothing else."""
    name, *inner = path
    value = fields.get(name)
    left = _without(value, inner) if inner and isinstance(value, Mapping) else {}
    return {key: left if key == name else value for key, value in fields.items() if key != name or left}


def _as_values(fields: Fields) -> Fields:
    """The fields that are not null, with those that hold JSON in a text parsed, as in columns of one type."""
    values = {name: value for name, value in fields.items() if value is not None}
    for name in JSON_COLUMNS:
        if isinstance(values.get(name), str):
            try:
                values[name] = json.loads(values[name])
            except (ValueError, RecursionError) as error:
                raise RowError(f"field {name!r} is a text, but not JSON ({error})") from error
    for name in MAYBE_JSON:
        if isinstance(text := values.get(name), str):
            values[name] = _messages_in(text)
    return values


def _messages_in(text: str) -> Any:
    """The message or messages that the text holds as JSON, or else the text."""
    if text.lstrip()[:1] not in ("[", "{"):
        return text
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        return text
    items = parsed if isinstance(parsed, list) else [parsed]
    return parsed if items and all(map(_is_message, items)) else text


def _is_message(item: Any) -> bool:
    if not isinstance(item, dict) or not {"content", "value", "text", "tool_calls"} & set(item):
        return False
    role = item.get("role") or item.get("from")
    return isinstance(role, str) and role in ROLES


def _with_system(messages: Messages, fields: Fields) -> Messages:
    """The messages after the system prompt that stands beside them in the row."""
    if not fields.get("system"):
        return messages
    first = turn("system", string(fields, "system"))
    if not messages or messages[0]["role"] != "system":
        return [first, *messages]
    if messages[0]["content"] == first["content"]:
        return messages
    raise RowError("field 'system' differs from the conversation's own system message")
