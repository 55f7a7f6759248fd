"""Messages of rows: roles, text and tool calls, as templates expect them. What is malformed raises RowError."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from llmkit.errors import LlmkitError

Messages = list[dict[str, Any]]

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "system": "system",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
    "function": "tool",
    "developer": "developer",
    "prompter": "user",
    "ipython": "tool",
    "tool_response": "tool",
}


MIN_WEIGHT, MAX_WEIGHT = 1e-6, 1e6  # of a message's loss, where it is not 0


class RowError(LlmkitError, ValueError):
    """A row that matches no schema, or is malformed; the message names the field."""


def turn(role: str, content: str) -> dict[str, Any]:
    """A message of text."""
    return {"role": role, "content": content}


def read_tools(fields: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The schemas of a row's tools."""
    tools = fields.get("tools")
    if isinstance(tools, str) and tools:  # datasets with one type per column store them as JSON
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise RowError(f"field 'tools' is not JSON ({error})") from error
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError("field 'tools' is not a list of objects")
    return tools


def read_messages(value: Any, name: str) -> Messages:
    """The messages in the field `name`."""
    if not isinstance(value, list) or not value:
        raise RowError(f"field {name!r} is not a list of messages")
    return [_message(item, f"{name}[{i}]") for i, item in enumerate(value)]


def _message(item: Any, where: str) -> dict[str, Any]:
    """One message with `role` and `content` (text); tool calls, names and weights are kept."""
    if not isinstance(item, dict):
        raise RowError(f"{where} is not an object")
    item = {key: value for key, value in item.items() if value is not None}
    role = item.get("role", item.get("from"))
    if not isinstance(role, str):
        raise RowError(f"{where} has no role")
    if role not in ROLES:
        raise RowError(f"{where}: unknown role {role!r:.60} (known: {', '.join(ROLES)})")
    extra = {key: v for key, v in item.items() if key not in ("role", "from", "content", "value")}
    content = item.get("content", item.get("value"))
    if isinstance(content, list):  # parts, as in multimodal data
        content = "".join(_text_part(part, where) for part in content)
    if content is None and extra.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise RowError(f"{where} has no text content")
    if "from" in item and role == "function_call":
        extra, content = _function_call(content, extra)
    _check_loss(extra, where)
    if not isinstance(extra.get("reasoning_content", ""), str):
        raise RowError(f"{where}: reasoning_content is not a string")
    if "tool_calls" in extra:
        extra["tool_calls"] = _tool_calls(extra["tool_calls"], where)
    return {"role": ROLES[role], "content": content} | extra


def _check_loss(extra: Mapping[str, Any], where: str) -> None:
    """RowError for `weight` or `train` that would not mean what they say."""
    weight, train = extra.get("weight"), extra.get("train")
    if train is not None and not isinstance(train, bool):
        raise RowError(f"{where}: train {train!r:.60} is neither true nor false")
    if weight is None:
        return
    is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    if not is_number or not (weight == 0 or MIN_WEIGHT <= weight <= MAX_WEIGHT):
        raise RowError(f"{where}: weight {weight!s:.60} is neither 0 nor a number from a millionth to a million")


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Tool calls with their arguments as objects: OpenAI's are JSON in a string, which templates would quote again."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise RowError(f"{where}: tool_calls is not a list of objects")
    return [
        call | {"function": _with_arguments(call["function"], where)} if "function" in call else call for call in calls
    ]


def _with_arguments(function: Any, where: str) -> dict[str, Any]:
    if not isinstance(function, dict):
        raise RowError(f"{where}: the function of a tool call is not an object")
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        return function
    try:
        parsed = json.loads(arguments or "{}")
    except (ValueError, RecursionError) as error:
        raise RowError(f"{where}: the arguments of a tool call are not JSON ({error})") from error
    return function | {"arguments": parsed}


def _text_part(part: Any, where: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise RowError(f"{where} holds a content part that is not text")


def _function_call(content: str, extra: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """ShareGPT stores a call as JSON text; other text is kept as the assistant's content."""
    try:
        call = json.loads(content)
        function = {"name": call["name"], "arguments": call.get("arguments", {})}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return extra, content
    return extra | {"tool_calls": [{"type": "function", "function": function}]}, ""
