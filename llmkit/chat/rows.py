"""Rows for fine-tuning and alignment: every schema in common use, turned into lists of messages.

| schema | becomes |
|---|---|
| `{"messages": [{"role", "content"}], "tools"?}` | itself |
| `{"conversations": [{"from": human, gpt, system, function_call or observation, "value"}]}` (ShareGPT) | messages |
| `{"instruction", "input"?, "output", "system"?}` (Alpaca) | user (instruction, blank line, input), assistant |
| `{"prompt", "completion"}` as strings | user, assistant; with `template=False` plain text, loss on the completion |
| `{"prompt", "completion"}` as message lists | their concatenation, loss on the completion only |
| `{"text"}` | plain text, loss on all of it |
| `{"prompt"?, "chosen", "rejected"}` as strings or message lists | a preference; without `prompt` the longest common prefix is the prompt |
| `{"chosen", "rejected"}` with turns as `\\n\\nHuman:` and `\\n\\nAssistant:` in one string (hh-rlhf) | a preference over messages |
| `{"instruction", "input"?, "chosen", "rejected"}` | a preference |

A row that fits none raises RowError, whose message names the field; `read_rows` turns it into file and line, to stop, skip or quarantine as
`ReadOptions.on_bad_line` says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from llmkit.io.documents import BadLine, Document, DocumentReader

Row = TypeVar("Row")
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
}
HH_TURN = re.compile(r"\n\n(Human|Assistant):")


class RowError(ValueError):
    """A row that fits no schema; the message names the field."""


@dataclass(slots=True)
class Conversation:
    """One row for fine-tuning: `messages` for the chat template, or plain `text` whose loss starts at character `start`."""

    messages: Messages = field(default_factory=list)
    tools: list[dict[str, Any]] | None = None
    text: str | None = None
    start: int = 0


@dataclass(slots=True)
class Preference:
    """A prompt, and two continuations of which the first is better."""

    prompt: Messages
    chosen: Messages
    rejected: Messages
    tools: list[dict[str, Any]] | None = None


def read_rows(reader: DocumentReader, convert: Callable[[Mapping[str, Any]], Row]) -> Iterator[tuple[Document, Row]]:
    """Every row of `reader` with what `convert` makes of its fields; rows that `convert` refuses are dealt with like bad lines."""
    for document in reader.documents():
        try:
            yield document, convert(document.fields)
        except RowError as error:
            reader.accept([BadLine(document.file, document.line, str(error), document.raw)])


def to_conversation(fields: Mapping[str, Any], template: bool = True) -> Conversation:
    """The conversation in one row. `template=False`: prompt and completion strings are plain text instead of turns."""
    tools = _tools(fields)
    if "messages" in fields:
        return Conversation(_messages(fields["messages"], "messages"), tools)
    if "conversations" in fields:
        return Conversation(_messages(fields["conversations"], "conversations"), tools)
    if "label" in fields and "completion" in fields:
        raise RowError("field 'label': an unpaired preference row, which fine-tuning has no use for")
    if "chosen" in fields and "rejected" in fields:
        raise RowError("fields 'chosen' and 'rejected': a preference row; `llmkit dpo` takes these")
    if "prompt" in fields and "completion" in fields:
        prompt, completion = fields["prompt"], fields["completion"]
        if isinstance(prompt, str) and isinstance(completion, str):
            if not template:
                return Conversation(text=prompt + completion, start=len(prompt))
            return Conversation([_turn("user", prompt), _turn("assistant", completion)], tools)
        before = [message | {"train": False} for message in _side(prompt, "prompt", "user")]
        return Conversation(before + _side(completion, "completion", "assistant"), tools)
    if "instruction" in fields and "output" in fields:
        return Conversation([*_alpaca(fields), _turn("assistant", _string(fields, "output"))], tools)
    if "text" in fields:
        return Conversation(text=_string(fields, "text"))
    raise RowError(
        "no schema fits; looked for 'messages', 'conversations', 'prompt' and 'completion', 'instruction' and 'output', 'text'"
        f" (fields: {', '.join(fields) or 'none'})"
    )


def to_preference(fields: Mapping[str, Any]) -> Preference:
    """The preference in one row. The two continuations differ, and neither is empty."""
    for name in ("chosen", "rejected"):
        if name not in fields:
            raise RowError(f"no field {name!r} (fields: {', '.join(fields) or 'none'})")
    chosen, rejected = fields["chosen"], fields["rejected"]
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise RowError("'chosen' and 'rejected' are not both strings or both lists of messages")
    if isinstance(chosen, str):
        prompt, better, worse = _from_strings(fields, chosen, rejected)
    else:
        prompt, better, worse = _from_messages(fields, _messages(chosen, "chosen"), _messages(rejected, "rejected"))
    if better == worse:
        raise RowError("'chosen' and 'rejected' are equal")
    for name, side in (("chosen", better), ("rejected", worse)):
        if not any(message["role"] == "assistant" for message in side):
            raise RowError(f"field {name!r}: nothing that the assistant says after the common prompt")
    return Preference(prompt, better, worse, _tools(fields))


def common_length(a: str, b: str) -> int:
    """Length of the longest common prefix."""
    if b.startswith(a):
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


# ---- inside


def _from_strings(fields: Mapping[str, Any], chosen: str, rejected: str) -> tuple[Messages, Messages, Messages]:
    prompt = fields.get("prompt")
    if chosen.lstrip().startswith("Human:") and HH_TURN.search("\n\n" + chosen.lstrip()):
        return _from_messages({}, _hh_turns(chosen, "chosen"), _hh_turns(rejected, "rejected"))
    if isinstance(prompt, list):
        before = _messages(prompt, "prompt")
    elif isinstance(prompt, str):
        before = _hh_turns(prompt, "prompt") if prompt.lstrip().startswith("Human:") else [_turn("user", prompt)]
        if before[-1] == _turn("assistant", ""):  # hh prompts end in "Assistant:"
            before.pop()
    elif "instruction" in fields:
        before = _alpaca(fields)
    elif prompt is None:
        common = chosen[: common_length(chosen, rejected)]
        common = common[: max(common.rfind(" "), common.rfind("\n")) + 1]  # whole words
        if not common.strip():
            raise RowError("no field 'prompt', and 'chosen' and 'rejected' have no common beginning")
        before = [_turn("user", common.rstrip())]
        chosen, rejected = chosen[len(common) :], rejected[len(common) :]
    else:
        raise RowError("field 'prompt' is neither a string nor a list of messages")
    return before, [_turn("assistant", chosen)], [_turn("assistant", rejected)]


def _from_messages(
    fields: Mapping[str, Any], chosen: Messages, rejected: Messages
) -> tuple[Messages, Messages, Messages]:
    """Sides that begin with the assistant continue `prompt`; others hold the prompt themselves, as their longest common prefix."""
    prompt = fields.get("prompt")
    if prompt is not None and chosen[0]["role"] == rejected[0]["role"] == "assistant":
        return _side(prompt, "prompt", "user"), chosen, rejected
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
        _turn("user" if who == "Human" else "assistant", content.strip())
        for who, content in zip(pieces[1::2], pieces[2::2], strict=True)
    ]
    if not turns:
        raise RowError(f"field {name!r}: no 'Human:' or 'Assistant:' turn")
    return turns


def _alpaca(fields: Mapping[str, Any]) -> Messages:
    system, extra = fields.get("system"), fields.get("input")
    request = _string(fields, "instruction")
    if isinstance(extra, str) and extra:
        request += "\n\n" + extra
    return ([_turn("system", system)] if isinstance(system, str) and system else []) + [_turn("user", request)]


def _side(value: Any, name: str, role: str) -> Messages:
    return [_turn(role, value)] if isinstance(value, str) else _messages(value, name)


def _turn(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def _string(fields: Mapping[str, Any], name: str) -> str:
    value = fields[name]
    if not isinstance(value, str):
        raise RowError(f"field {name!r} is not a string")
    return value


def _tools(fields: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    tools = fields.get("tools")
    if isinstance(tools, str) and tools:  # datasets that keep one column type hold them as JSON
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise RowError(f"field 'tools' is not JSON ({error})") from error
    if not tools:
        return None
    if not isinstance(tools, list):
        raise RowError("field 'tools' is not a list")
    return tools


def _messages(value: Any, name: str) -> Messages:
    if not isinstance(value, list) or not value:
        raise RowError(f"field {name!r} is not a list of messages")
    return [_message(item, f"{name}[{i}]") for i, item in enumerate(value)]


def _message(item: Any, where: str) -> dict[str, Any]:
    """One message with `role` and `content` (text); tool calls, names and weights stay."""
    if not isinstance(item, dict):
        raise RowError(f"{where} is not an object")
    role = item.get("role", item.get("from"))
    if not isinstance(role, str):
        raise RowError(f"{where} has no role")
    rest = {key: v for key, v in item.items() if key not in ("role", "from", "content", "value") and v is not None}
    content = item.get("content", item.get("value"))
    if isinstance(content, list):  # parts, as in multimodal data
        content = "".join(_part(part, where) for part in content)
    if content is None and rest.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise RowError(f"{where} has no text content")
    if "from" in item and role == "function_call":
        rest, content = _function_call(content, rest)
    weight = rest.get("weight")
    if weight is not None and (
        isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight <= 1e6
    ):
        raise RowError(f"{where}: weight {weight!r} is not a number from 0 to a million")
    return {"role": ROLES.get(role, role), "content": content} | rest


def _part(part: Any, where: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise RowError(f"{where} holds a content part that is not text")


def _function_call(content: str, rest: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """ShareGPT writes a call as JSON text; where it is not, the text is what the assistant says."""
    try:
        call = json.loads(content)
        function = {"name": call["name"], "arguments": call.get("arguments", {})}
    except (ValueError, TypeError, KeyError, AttributeError):
        return rest, content
    return rest | {"tool_calls": [{"type": "function", "function": function}]}, ""
