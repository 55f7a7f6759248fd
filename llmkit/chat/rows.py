"""Rows for fine-tuning and alignment: every common schema (chat/schemas), converted to lists of messages.

    for document, conversations in read_rows(reader, to_conversations): ...

A row that cannot be converted raises RowError, whose message names the field. `read_rows` adds file and line,
and stops, skips or quarantines the row as `ReadOptions.on_bad_line` demands.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from llmkit.chat import schemas as schemas  # registers them
from llmkit.chat.messages import Messages, RowError, read_tools, turn
from llmkit.chat.schemas.table import (
    CONVERSATIONS,
    PREFERENCES,
    Conversation,
    Fields,
    Preference,
    Schema,
    schema_names,
    string,
)
from llmkit.chat.schemas.trees import MESSAGE, joined
from llmkit.errors import LlmkitError, UsageError, suggestion
from llmkit.io.splice import dotted

if TYPE_CHECKING:
    from llmkit.io.documents import Document, DocumentReader

__all__ = [
    "CONVERSATIONS",
    "PREFERENCES",
    "Conversation",
    "Preference",
    "read_rows",
    "schema_names",
    "to_conversation",
    "to_conversations",
    "to_preferences",
]
Row = TypeVar("Row")


def read_rows(reader: DocumentReader, convert: Callable[[Fields], Row]) -> Iterator[tuple[Document, Row]]:
    """Every row of `reader`, with its fields as converted by `convert`. Rows for which that raises RowError are
    treated like bad lines.

    Messages of trees in rows of their own are gathered, in memory, and follow as trees at the end.
    """
    from llmkit.engine.isolation import bad_line
    from llmkit.io.documents import BadLine

    def refuse(document: Document, reason: str) -> None:
        reader.accept([BadLine(document.file, document.line, reason, document.raw)])

    def converted(document: Document, fields: Fields) -> Iterator[tuple[Document, Row]]:
        try:
            row = convert(fields)
        except RowError as error:
            refuse(document, str(error))
        except LlmkitError:
            raise  # of the tokenizer or the options
        except Exception as error:
            reader.accept([bad_line(error, document.file, document.line, document.raw)])
        else:
            yield document, row

    trees: dict[Any, dict[str, Document]] = {}
    for document in reader.documents():
        fields = document.fields
        if not _is_message(fields):
            yield from converted(document, fields)
        elif fields["message_id"] in (tree := trees.setdefault(_tree_of(fields), {})):
            refuse(document, f"field 'message_id': {fields['message_id']!r:.60} stands in an earlier row")
        else:
            tree[fields["message_id"]] = document
    for tree in trees.values():
        root, others = joined([document.fields for document in tree.values()])
        for message in others:
            refuse(tree[message["message_id"]], f"field 'parent_id': no row has {message.get('parent_id')!r:.60}")
        if root is not None:
            yield from converted(tree[root["message_id"]], {"prompt": root})


def _is_message(fields: Fields) -> bool:
    """Whether a row is one message of a tree."""
    return all(name in fields for name in MESSAGE) and isinstance(fields["message_id"], str)


def _tree_of(fields: Fields) -> Any:
    tree = fields.get("message_tree_id")
    return tree if isinstance(tree, str) else ""


def to_conversation(fields: Fields, template: bool = True) -> Conversation:
    """The conversation in a row of one; as `to_conversations`."""
    first, *others = to_conversations(fields, template)
    if others:
        raise RowError("a row of several conversations")
    return first


def to_conversations(fields: Fields, template: bool = True) -> list[Conversation]:
    """The conversations in one row. With `template=False`, prompt and completion strings are plain text instead
    of turns. A field that is null is none, and one of messages as JSON in a text is those messages.
    """
    present = ", ".join(name if value is not None else f"{name} (null)" for name, value in fields.items())
    fields = _as_values(fields)
    tools = read_tools(fields)
    for schema in CONVERSATIONS:
        if schema.matches(fields):
            found = schema.convert(fields, template)
            conversations: list[Conversation] = found if schema.several else [found]
            for conversation in conversations:
                if conversation.text is None:
                    conversation.messages = _with_system(conversation.messages, fields)
                    conversation.tools = tools
            if not conversations:
                raise RowError("no answer to learn")
            conversations[0].unused = schema.unused(fields)
            return conversations
    known = ", ".join(" and ".join(map(repr, schema.fields)) for schema in CONVERSATIONS if schema.name)
    raise RowError(f"no schema fits; looked for {known} (fields: {present or 'none'})")


def to_preferences(fields: Fields) -> list[Preference]:
    """The preferences in one row, none if it is a tie. The two continuations of each differ, and neither is empty.
    Nulls and JSON as in `to_conversations`.
    """
    fields = _as_values(fields)
    sides = [fields[name] for name in ("chosen", "rejected") if name in fields]
    if len(sides) == 2 and isinstance(sides[0], str) != isinstance(sides[1], str):
        raise RowError("'chosen' and 'rejected' are not both strings or both lists of messages")
    for schema in PREFERENCES:
        if schema.matches(fields):
            found = schema.convert(fields)
            pairs = found if schema.several else [found]
            break
    else:
        for name in ("chosen", "rejected"):
            if name not in fields:
                raise RowError(f"no field {name!r} (fields: {', '.join(fields) or 'none'})")
        raise RowError("field 'prompt' is neither a string nor a list of messages")
    preferences = []
    for prompt, chosen, rejected in pairs:
        if chosen == rejected:
            raise RowError("'chosen' and 'rejected' are equal")
        for name, answer in (("chosen", chosen), ("rejected", rejected)):
            if not any(message["role"] == "assistant" for message in answer):
                raise RowError(f"field {name!r}: no assistant message after the common prompt")
        preferences.append(Preference(_with_system(prompt, fields), chosen, rejected, read_tools(fields)))
    for preference in preferences[:1]:
        preference.unused = schema.unused(fields)
    return preferences


def field_names(table: list[Schema], options: list[str]) -> dict[str, str]:
    """`NAME=FIELD,...` as names of fields of the table's schemas -> fields of rows, with dots for nested ones."""
    known = dict.fromkeys(name for schema in table for name in (*schema.fields, *schema.optional))
    names: dict[str, str] = {}
    for item in ",".join(options).split(",") if options else []:
        name, equals, path = item.partition("=")
        if not (equals and name and path):
            raise UsageError(f"--map {item!r}", "give NAME=FIELD, such as messages=chat")
        if name not in known:
            raise UsageError(f"--map {item!r}: no rows have a field {name!r}", suggestion(name, known))
        if name in names:
            raise UsageError(f"--map names {name!r} twice", "give one field for each name")
        names[name] = path
    return names


def renamed(fields: Fields, names: Mapping[str, str]) -> Fields:
    """The fields with those that `names` maps under their names here. Raises RowError where one is missing."""
    if not names:
        return fields
    taken: dict[str, Any] = {}
    for name, path in names.items():
        value = dotted(fields, path)
        if value is None and path not in fields:
            raise RowError(f"no field {path!r} for {name!r} (fields: {', '.join(fields) or 'none'})")
        taken[name] = fields.get(path, value)
    sources = {path.partition(".")[0] for path in names.values()} | set(names.values())
    return {name: value for name, value in fields.items() if name not in sources} | taken


def _as_values(fields: Fields) -> Fields:
    """The fields that are not null; texts that hold messages as JSON, as in columns of one type, as those messages."""
    return {name: _from_json(value) for name, value in fields.items() if value is not None}


def _from_json(value: Any) -> Any:
    if not isinstance(value, str) or not value.startswith(("[{", "{")):
        return value
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError):
        return value
    items = parsed if isinstance(parsed, list) else [parsed]
    return parsed if all(isinstance(item, dict) and ("role" in item or "from" in item) for item in items) else value


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
