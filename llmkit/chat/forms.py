"""The form in which a template takes messages: content as text or in parts, arguments as objects or JSON.

Templates differ in it, and do not say it, so each is tried on a small conversation.

    form = find_form(show)                       # show(messages, tools) renders a conversation
    messages = form.adapt(messages)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmkit.errors import LlmkitError

Message = Mapping[str, Any]
Show = Callable[[Sequence[Message], Sequence[Mapping[str, Any]] | None], str]

REASONING = ("reasoning_content", "reasoning", "thinking")  # names that templates have for it
NAME, ARGUMENT, VALUE = "function_to_call", "argument_name", "argument value"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": NAME,
            "description": "a function",
            "parameters": {
                "type": "object",
                "properties": {ARGUMENT: {"type": "string", "description": "an argument"}},
                "required": [ARGUMENT],
            },
        },
    }
]
# Some templates demand an id of nine letters and digits.
CALL = {"id": "call00001", "type": "function", "function": {"name": NAME, "arguments": {ARGUMENT: VALUE}}}
CALLING: Message = {"role": "assistant", "content": "", "tool_calls": [CALL]}
CALLING_TWICE: Message = {"role": "assistant", "content": "", "tool_calls": [CALL, CALL | {"id": "call00002"}]}
QUESTION: Message = {"role": "user", "content": "a question"}


class CostlyTemplateError(LlmkitError):
    """A template that does too much work, or what no template may do: it is not tried again with other messages."""


@dataclass(frozen=True, slots=True)
class Form:
    """`parts`: content is a list of parts; `json_arguments`: arguments of calls are JSON in a string; `null_content`:
    the content of a call without text is null; `calls`: calls are shown at all.
    """

    parts: bool = False
    json_arguments: bool = False
    null_content: bool = False
    calls: bool = True

    def adapt(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """The messages as the template takes them."""
        return [self._adapted(dict(message)) for message in messages]

    def _adapted(self, message: dict[str, Any]) -> dict[str, Any]:
        reasoning = next((message[name] for name in REASONING if message.get(name)), None)
        if reasoning is not None:
            message = dict.fromkeys(REASONING, reasoning) | message
        if message.get("tool_calls"):
            if self.json_arguments:
                message["tool_calls"] = [_with_json(call) for call in message["tool_calls"]]
            if self.null_content and not message.get("content"):
                message["content"] = None
        if self.parts and isinstance(message.get("content"), str):
            message["content"] = [{"type": "text", "text": message["content"]}]
        return message


def find_form(show: Show) -> Form:
    """The form that a template takes; the usual one if it shows no conversation."""

    def shows(messages: Sequence[Message], form: Form, sought: Sequence[str], tools: Any = None) -> bool:
        try:
            text = show(form.adapt(messages), tools)
        except CostlyTemplateError:
            raise
        except LlmkitError:
            return False
        return all(part in text for part in sought)

    parts = not shows([QUESTION], Form(), ["a question"]) and shows([QUESTION], Form(parts=True), ["a question"])
    for null in (False, True):
        for as_json in (False, True):
            form = Form(parts, as_json, null)
            if shows([QUESTION, CALLING], form, [NAME, VALUE], TOOLS):
                return form
    return Form(parts, calls=False)


def _with_json(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, Mapping) or isinstance(function.get("arguments"), str):
        return dict(call)
    arguments = json.dumps(function.get("arguments"), ensure_ascii=False)
    return dict(call) | {"function": dict(function) | {"arguments": arguments}}
