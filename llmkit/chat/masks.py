"""Loss masks of conversations: which characters of the rendered text the assistant has to learn.

Most templates do not mark the assistant's part, so its spans are found by rendering again with a sentinel in
place of one assistant message: the text before and after the sentinel also surrounds the real content. That
works for any template, whatever it trims or wraps. A span reaches from the end of the generation prompt to the
end of the stop token. A template without a stop token after the assistant's content is refused, because a model
trained on it would never stop.

    row = encode_chat(messages, files)                                    # token ids and loss weights for `sft`

`files` are the text files of a tokenizer directory by name. Cost: three renderings per assistant turn.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any

import numpy as np

from llmkit.chat.control_tokens import encode, hide
from llmkit.chat.rows import common_length
from llmkit.chat.templates import (
    Message,
    render,
    special_contents,
    special_contents_of,
    special_tokens,
)
from llmkit.errors import LlmkitError

# Templates may print today's date. Training data must not depend on the day, so it is rendered with this date.
TRAINING_DATE = datetime(2024, 7, 26)


@dataclass(frozen=True, slots=True)
class Span:
    """Characters [start, stop) of a text that are trained on, with loss weight `weight`."""

    start: int
    stop: int
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """`tokens` int32 [n]; `weights` float32 [n], the weight of the loss of predicting token i from those before
    it.
    """

    tokens: np.ndarray
    weights: np.ndarray

    @property
    def trained(self) -> int:
        """Number of tokens with a loss; the first one of a row is never predicted."""
        return int(np.count_nonzero(self.weights[1:]))


def assistant_spans(
    messages: Sequence[Message], files: Mapping[str, str], tools: Sequence[Mapping[str, Any]] | None = None
) -> tuple[str, list[Span]]:
    """Text of the conversation and the spans of its assistant turns: content, tool calls, stop token.

    A message may set its own `weight` (a number) or `train` (true or false); a turn with weight 0 is left out.
    """

    def text_of(messages: Sequence[Message], prompt: bool = False) -> str:
        return render([_template_fields(m) for m in messages], files, prompt, tools, TRAINING_DATE)

    text = text_of(messages)
    spans = []
    for i, message in enumerate(messages):
        weight = _weight(message)
        if message.get("role") != "assistant" or weight == 0:
            continue
        sentinel = _sentinel(text)
        bare: Message = {"role": "assistant", "content": sentinel}
        try:
            skeleton = text_of([*messages[:i], bare, *messages[i + 1 :]])
        except LlmkitError:  # some templates require the tool call before a tool's answer
            skeleton = text_of([*messages[:i], {**message, "content": sentinel}, *messages[i + 1 :]])
        if skeleton.count(sentinel) != 1:
            raise LlmkitError(
                f"the chat template shows the assistant's content {skeleton.count(sentinel)} times",
                "the assistant's part of the text cannot be located; use another template",
            )
        before, _, after = skeleton.partition(sentinel)
        start = common_length(before, text)
        content_stop = max(start, len(text) - common_length(after[::-1], text[::-1]))
        start = _prompt_end(messages[:i], text, text_of, start)
        spans.append(Span(start, _stop_token_end(text, content_stop, files), weight))
    return text, spans


def encode_spans(text: str, spans: Sequence[Span], files: Mapping[str, str], marker: str = "") -> EncodedRow:
    """Tokens of `text`, which may hold markers of `control_tokens.hide`, and their weights.

    The text is encoded in one piece, so that its tokens are those of inference on it. A token belongs to the
    span in which it starts. One that starts before a span and extends into it is never generated after that
    prompt, and gets no weight.
    """
    encoded = encode(text, files, marker)
    weights = np.zeros(len(encoded.ids), dtype=np.float32)
    for span in spans:
        weights[(encoded.starts >= span.start) & (encoded.starts < span.stop)] = span.weight
    return EncodedRow(np.asarray(encoded.ids, dtype=np.int32), weights)


def encode_chat(
    messages: Sequence[Message], files: Mapping[str, str], tools: Sequence[Mapping[str, Any]] | None = None
) -> EncodedRow:
    """Token ids of a conversation, with weights on the assistant's content and stop tokens."""
    (messages, tools), marker = hide((messages, tools), files)
    return encode_spans(*assistant_spans(messages, files, tools), files, marker)


def check_template(files: Mapping[str, str]) -> list[str]:
    """The stop tokens of the chat template, from a conversation of two turns. Raises LlmkitError if an
    assistant turn has no stop token.
    """
    text, spans = assistant_spans(
        [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}], files
    )
    return [name for span in spans for name in special_contents(files) if text[: span.stop].endswith(name)]


def stop_token_ids(files: Mapping[str, str]) -> list[int]:
    """Ids that end the assistant's turn or the text: those of the chat template first, then end of text."""
    ids = special_contents(files)
    try:
        names = check_template(files)
    except LlmkitError:  # no template, or one that is unusable for training
        names = []
    names.append(special_tokens(files).get("eos_token", ""))
    return list(dict.fromkeys(ids[name] for name in names if name in ids))


def _template_fields(message: Message) -> dict[str, Any]:
    """The fields of a message that the template may see."""
    return {key: value for key, value in message.items() if key not in ("weight", "train")}


def _weight(message: Message) -> float:
    if message.get("train") is False:
        return 0.0
    weight = message.get("weight")
    return 1.0 if weight is None else float(weight)


def _sentinel(text: str) -> str:
    number = 0
    while (sentinel := f"SENTINEL{number}LENITNES") in text:
        number += 1
    return sentinel


def _prompt_end(before: Sequence[Message], text: str, text_of: Any, start: int) -> int:
    """Where the generation prompt of this turn ends. What the template adds after it (an empty thinking block),
    the model has to generate.
    """
    try:
        prompt, bare = text_of(before, True), text_of(before)
    except LlmkitError:  # a template may reject a conversation that has not begun
        return start
    fits = prompt != bare and len(prompt) <= start and text.startswith(prompt)
    return len(prompt) if fits else start


def _stop_token_end(text: str, content_stop: int, files: Mapping[str, str]) -> int:
    pattern, longest = _stop_pattern(files.get("tokenizer.json", ""), special_tokens(files).get("eos_token", ""))
    for match in pattern.finditer(text, max(0, content_stop - longest)):
        if match.end() <= content_stop:
            continue
        if not text[content_stop : match.start()].strip():
            return match.end()
        break
    raise LlmkitError(
        "the chat template puts no stop token after the assistant's content",
        "end the turn in the template with a special token of the tokenizer, or the model will never stop",
    )


@lru_cache(maxsize=8)
def _stop_pattern(tokenizer_json: str, eos: str) -> tuple[re.Pattern[str], int]:
    contents = sorted(special_contents_of(tokenizer_json, eos), key=len, reverse=True)
    if not contents:
        raise LlmkitError("the tokenizer has no special tokens", "a chat model needs one that ends a turn")
    return re.compile("|".join(map(re.escape, contents))), len(contents[0])
