"""The tokens that end an assistant's turn in a chat template, found by rendering small conversations.

    stops = stops_of(files)
    match = stops.find(text, start, content_stop, is_call=False, is_last=True)

What ends a turn stands behind it both where it is the last message and where others follow: `<|im_end|>`; for Cohere
`<|END_RESPONSE|><|END_OF_TURN_TOKEN|>`, of which the last one stops; for Phi 3 `<|end|>`, without the end of text that
follows the last turn. gpt-oss has another token after the last turn than after earlier ones, and a turn of GLM ends
with the header of the next one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any

from llmkit.chat.forms import CALLING, CALLING_TWICE, QUESTION, TOOLS, VALUE, Message
from llmkit.chat.schemas.table import common_length
from llmkit.chat.templates import form_of, render, special_contents
from llmkit.errors import LlmkitError

# Templates may print today's date. Training data must not depend on the day, so it is rendered with this date.
TRAINING_DATE = datetime(2024, 7, 26)
ANSWER = "an answer of the assistant"
NO_STOP = "the chat template puts no stop token after the assistant's content"
NO_STOP_HINT = "end the turn in the template with a special token of the tokenizer, or the model will never stop"
FOLLOWERS: tuple[Message, ...] = (
    {"role": "user", "content": "another question"},
    {"role": "tool", "content": "a result", "name": "function_to_call", "tool_call_id": "call00001"},
    {"role": "system", "content": "an instruction"},
    {"role": "assistant", "content": "another answer"},
)


@dataclass(frozen=True, slots=True)
class Stops:
    """Stop tokens of answers that are the last message, of earlier ones, and of tool calls ("" where none are shown).

    `headers`: turns end with the header of the next one, any of these.
    """

    last: str
    earlier: str
    calls: str = ""
    headers: tuple[str, ...] = ()

    def closing(self, last: Message) -> str:
        """What has to be added to a conversation that ends with this message, so that it ends with a stop token."""
        if not self.headers or last.get("role") != "assistant":
            return ""
        return self.calls if last.get("tool_calls") else self.last

    def find(self, text: str, start: int, content_stop: int, *, is_call: bool, is_last: bool) -> re.Match[str] | None:
        """The stop token of a turn that begins at `start`, with content up to `content_stop`."""
        if is_call and not self.headers:
            if not self.calls:
                raise LlmkitError("the chat template puts no stop token after tool calls", NO_STOP_HINT)
            return _pattern((self.calls,)).search(text, start)
        names = self.headers or ((self.last,) if is_last else (self.earlier,))
        return _pattern(names).search(text, content_stop)


def stops_of(files: Mapping[str, str], tools: bool = False) -> Stops:
    """The stop tokens of the chat template, or of that for conversations with `tools`. Raises LlmkitError if it rejects
    a question with its answer, does not show the answer once, or has no stop token.
    """
    return _stops(tuple(sorted(files.items())), tools)


@lru_cache(maxsize=16)
def _stops(items: tuple[tuple[str, str], ...], tools: bool) -> Stops:
    files = dict(items)
    described = TOOLS if tools else None
    names = tuple(sorted(filter(None, special_contents(files)), key=len, reverse=True))
    if not names:
        raise LlmkitError("the tokenizer has no special tokens", "a chat model needs one that ends a turn")
    special = _pattern(names)

    def behind(sought: str, messages: Sequence[Message], tools: Any = described) -> str:
        text = render(messages, files, False, tools, TRAINING_DATE)
        if text.count(sought) != 1:
            raise LlmkitError(
                f"the chat template shows the assistant's content {text.count(sought)} times",
                "the assistant's part of the text cannot be located; use another template",
            )
        return text.partition(sought)[2]

    def behind_or_none(sought: str, messages: Sequence[Message], tools: Any = described) -> str:
        try:
            return behind(sought, messages, tools)
        except LlmkitError:  # not every role can follow
            return ""

    answer: Message = {"role": "assistant", "content": ANSWER}
    alone = behind(ANSWER, [QUESTION, answer])
    followed = [behind_or_none(ANSWER, [QUESTION, answer, follower]) for follower in FOLLOWERS]
    shared = alone[: common_length(alone, followed[0])]
    end = _first_run(special, shared)
    last = end or _first_run(special, alone)
    first = special.search(followed[0])
    ending = special.split(alone if last else followed[0], maxsplit=1)[0]
    if (not last and first is None) or ending.strip():
        raise LlmkitError(NO_STOP, NO_STOP_HINT)
    headers: tuple[str, ...] = ()
    if not last:
        found = [special.search(text) for text in followed]
        headers = tuple(dict.fromkeys(match[0] for match in found if match))
        last = headers[0]
    earlier = end or (first[0] if first else last)

    calls = ""
    if form_of(files, tools).calls:
        called = behind_or_none(VALUE, [QUESTION, CALLING], TOOLS)
        resumed = behind_or_none(VALUE, [QUESTION, CALLING, FOLLOWERS[1], FOLLOWERS[3]], TOOLS)
        common = common_length(called, resumed)
        if headers:
            match = special.search(resumed, common)
            calls = match[0] if match else ""
            headers = tuple(dict.fromkeys(filter(None, (*headers, calls))))
        else:
            tokens = special.findall(called[:common]) or special.findall(called)
            calls = tokens[-1] if tokens else ""
            # A template may forget what ends a single call, and end each with the same token.
            if calls and _count_behind(calls, [QUESTION, CALLING_TWICE], files) > 1:
                calls = ""
    return Stops(last, earlier, calls, headers)


def _count_behind(token: str, messages: Sequence[Message], files: Mapping[str, str]) -> int:
    """How often a token stands behind the first call."""
    try:
        return render(messages, files, False, TOOLS, TRAINING_DATE).partition(VALUE)[2].count(token)
    except LlmkitError:  # only one call at a time
        return 0


def _first_run(special: re.Pattern[str], text: str) -> str:
    """The last of the special tokens that stand together where the first one is; "" if there is none."""
    match = special.search(text)
    while match and (following := special.match(text, match.end())):
        match = following
    return match[0] if match else ""


@lru_cache(maxsize=32)
def _pattern(names: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, names)))
