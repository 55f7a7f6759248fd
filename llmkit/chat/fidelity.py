"""What a chat template does not show of a conversation: whole messages, reasoning, tool calls, the tools' schemas.

    lost = lost_fields(messages, text, tools, form, show)     # ["tool_calls of message 2"]

A template gives no sign of it, and what it leaves out is not learnt.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from llmkit.chat.forms import NAME, REASONING, VALUE, Form, Message
from llmkit.errors import LlmkitError

EARLIER = "reasoning of earlier turns (--train-on turns shows it)"  # many templates drop it by design
NAMED = "control tokens that plain text spells, or an answer at its end (they stay text: remove them from the rows)"
HARMLESS = (EARLIER, NAMED)  # reported, and trained without --lossy
LONG = 16  # characters that are not in a text by chance
Show = Callable[[Sequence[Message]], str]


def lost_fields(
    messages: Sequence[Message], text: str, tools: Sequence[Mapping[str, Any]] | None, form: Form, show: Show
) -> list[str]:
    """The fields that the rendered `text` of a conversation lacks, with the numbers of their messages; EARLIER for
    reasoning that the template shows only in the last turn. `show` renders messages with the same tools.
    """
    lost = []
    schemas = [tool.get("function", tool) for tool in tools or [] if isinstance(tool, Mapping)]
    names = [schema.get("name") for schema in schemas if isinstance(schema, Mapping)]
    if any(isinstance(name, str) and name not in text for name in names):
        lost.append("tools")
    for i, message in enumerate(messages):
        lost += [
            field if field == EARLIER else f"{field} of message {i + 1}"
            for field in _lost_of(messages, i, message, text, form, show)
        ]
    return list(dict.fromkeys(lost))


def _lost_of(messages: Sequence[Message], i: int, message: Message, text: str, form: Form, show: Show) -> Iterator[str]:
    def shows(change: dict[str, Any], *sought: str) -> bool:
        """Whether the template shows another value of a field; one that it rejects matters to it."""
        try:
            changed = show([*messages[:i], dict(message) | change, *messages[i + 1 :]])
        except LlmkitError:
            return True
        return all(part in changed for part in sought)

    content = str(message.get("content") or "").strip()
    is_surely_shown = not content or (len(content) >= LONG and content in text)
    if not is_surely_shown and not shows({"content": VALUE}, VALUE):
        yield "content"
    for name in REASONING:
        reasoning = message.get(name)
        if message.get("role") == "assistant" and isinstance(reasoning, str) and reasoning.strip() not in text:
            yield EARLIER if _shown_when_last(messages[: i + 1], reasoning, show) else name
    if calls := message.get("tool_calls"):
        fields = [call.get("function", call) for call in calls]
        sought = [part for function in fields for part in (str(function.get("name", "")), *_leaves(function))]
        if not form.calls or not (
            all(_is_in(part, text) for part in sought)
            or shows({"tool_calls": [_call(call, n) for n, call in enumerate(calls)]}, *map(_name, range(len(calls))))
        ):
            yield "tool_calls"


def _shown_when_last(messages: Sequence[Message], reasoning: str, show: Show) -> bool:
    try:
        return reasoning.strip() in show(messages)
    except LlmkitError:
        return False


def _name(number: int) -> str:
    return f"{NAME}_{number}"


def _call(call: Mapping[str, Any], number: int) -> dict[str, Any]:
    changed = {"name": _name(number)}
    return dict(call) | ({"function": dict(call["function"]) | changed} if "function" in call else changed)


def _leaves(function: Mapping[str, Any]) -> Iterator[str]:
    """The texts and numbers in the arguments of a call."""
    rest = [function.get("arguments")]
    while rest:
        value = rest.pop()
        if isinstance(value, Mapping):
            rest += [*value.keys(), *value.values()]
        elif isinstance(value, list):
            rest += value
        elif isinstance(value, (str, int, float)) and not isinstance(value, bool):
            yield str(value)


def _is_in(part: str, text: str) -> bool:
    part = part.strip()
    return part in text or any(json.dumps(part, ensure_ascii=ascii)[1:-1] in text for ascii in (False, True))
