"""Loss masks of conversations: which characters of the rendered text the assistant has to learn.

A span is what a sampler would emit: it begins where the generation prompt ends, and ends with the stop token. Where the
prompt is no beginning of the text, as in templates that drop earlier reasoning, the start is found by rendering again
with a sentinel in place of the assistant's message. Which tokens stop, `chat.stops` learns from the template. One
without any is refused, because a model trained on it would never stop.

    row = encode_chat(messages, files)                                    # token ids and loss weights for `sft`

`files` are the text files of a tokenizer directory by name. Cost: two or three renderings per assistant turn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from llmkit.chat.control_tokens import encode, hide
from llmkit.chat.fidelity import HARMLESS, lost_fields
from llmkit.chat.forms import Message
from llmkit.chat.schemas.table import common_length
from llmkit.chat.stops import NO_STOP, NO_STOP_HINT, TRAINING_DATE, stops_of
from llmkit.chat.templates import form_of, render, special_contents, special_tokens
from llmkit.errors import LlmkitError


@dataclass(frozen=True, slots=True)
class Span:
    """Characters [start, stop) of a text that are trained on, with loss weight `weight`."""

    start: int
    stop: int
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """`tokens` int32 [n]; `weights` float32 [n], the weight of the loss of predicting token i from those before
    it. `lost`: what the template did not show of the conversation.
    """

    tokens: np.ndarray
    weights: np.ndarray
    lost: tuple[str, ...] = ()

    @property
    def trained(self) -> int:
        """Number of tokens with a loss; the first one of a row is never predicted."""
        return int(np.count_nonzero(self.weights[1:]))


def assistant_spans(
    messages: Sequence[Message], files: Mapping[str, str], tools: Sequence[Mapping[str, Any]] | None = None
) -> tuple[str, list[Span]]:
    """Text of the conversation and the spans of its assistant turns: reasoning, content, tool calls, stop token.

    A message may set its own `weight` (a number) or `train` (true or false); a turn with weight 0 is left out. The stop
    token of an earlier turn is left out where the same answer would end otherwise, as gpt-oss has it. Where turns end
    with the header of the next one, that of the last is added.
    """
    text_of, form, stops = _renderer(files, tools), form_of(files, bool(tools)), stops_of(files, bool(tools))
    text = text_of(messages)
    whole = text + (stops.closing(messages[-1]) if messages else "")
    spans: list[Span] = []
    for i, message in enumerate(messages):
        weight = _weight(message)
        if message.get("role") != "assistant" or weight == 0:
            continue
        start, content_stop = _content(messages, i, text, text_of)
        is_last, is_call = i == len(messages) - 1, form.calls and bool(message.get("tool_calls"))
        match = stops.find(whole, start, content_stop, is_call=is_call, is_last=is_last)
        if match is None or (spans and start < spans[-1].stop):
            raise LlmkitError(NO_STOP, NO_STOP_HINT)
        is_learnt = is_last or stops.headers or match[0] in (stops.last, stops.calls)
        spans.append(Span(start, match.end() if is_learnt else match.start(), weight))
    return whole, spans


def _renderer(files: Mapping[str, str], tools: Sequence[Mapping[str, Any]] | None) -> Callable[..., str]:
    def text_of(messages: Sequence[Message], prompt: bool = False) -> str:
        return render([_template_fields(m) for m in messages], files, prompt, tools, TRAINING_DATE)

    return text_of


def _content(messages: Sequence[Message], i: int, text: str, text_of: Callable[..., str]) -> tuple[int, int]:
    """Where message i begins, and a place before its stop token: the end of its content, if it has one."""
    prompt_stop, has_header, space = _prompt_stop(messages[:i], text, text_of)
    fits = prompt_stop >= 0
    if fits and has_header and (messages[i].get("tool_calls") or not messages[i].get("content")):
        return prompt_stop, prompt_stop
    sentinel = _sentinel(text)
    bare: Message = {"role": "assistant", "content": sentinel}
    try:
        skeleton = text_of([*messages[:i], bare, *messages[i + 1 :]])
    except LlmkitError:  # some templates require the tool call before a tool's answer
        skeleton = text_of([*messages[:i], {**messages[i], "content": sentinel}, *messages[i + 1 :]])
    if skeleton.count(sentinel) != 1:
        raise LlmkitError(
            f"the chat template shows the assistant's content {skeleton.count(sentinel)} times",
            "the assistant's part of the text cannot be located; use another template",
        )
    before, _, after = skeleton.partition(sentinel)
    start = common_length(before, text)
    # White space behind a prompt without a header has to be generated too.
    if fits and (has_header or (prompt_stop < start and not text[prompt_stop:start].strip())):
        start = prompt_stop
    elif not fits and not has_header:
        start -= max(0, start - len(text[:start].rstrip()) - space)
    if messages[i].get("tool_calls"):
        return start, start
    return start, max(start, len(text) - common_length(after[::-1], text[::-1]))


def encode_spans(text: str, spans: Sequence[Span], files: Mapping[str, str], marker: str = "") -> EncodedRow:
    """Tokens of `text`, which may hold markers of `control_tokens.hide`, and their weights.

    The text is encoded in one piece, so that its tokens are those of inference on it, but no token lies across the
    start of a span: inference ends the prompt there. A token belongs to the span in which it starts.
    """
    encoded = encode(text, files, marker, [span.start for span in spans])
    weights = np.zeros(len(encoded.ids), dtype=np.float32)
    for span in spans:
        weights[(encoded.starts >= span.start) & (encoded.starts < span.stop)] = span.weight
    return EncodedRow(np.asarray(encoded.ids, dtype=np.int32), weights)


def encode_chat(
    messages: Sequence[Message],
    files: Mapping[str, str],
    tools: Sequence[Mapping[str, Any]] | None = None,
    lossy: bool = False,
) -> EncodedRow:
    """Token ids of a conversation, with weights on the assistant's content and stop tokens. What the template does not
    show raises LlmkitError, and with `lossy` stands in `lost`, as do earlier turns' reasoning in any case.
    """
    (messages, tools), marker = hide((messages, tools), files)
    text_of = _renderer(files, tools)
    lost = lost_fields(messages, text_of(messages), tools, form_of(files, bool(tools)), text_of)
    refused = [field for field in lost if field not in HARMLESS]
    if refused and not lossy:
        raise LlmkitError(f"the chat template does not show {', '.join(refused)}", "--lossy trains on the rest")
    row = encode_spans(*assistant_spans(messages, files, tools), files, marker)
    return replace(row, lost=tuple(dict.fromkeys(field.partition(" of message")[0] for field in lost)))


def check_template(files: Mapping[str, str]) -> list[str]:
    """The stop tokens of the chat template. Raises LlmkitError if an assistant turn has no stop token."""
    stops = stops_of(files)
    return list(dict.fromkeys(filter(None, (stops.last, stops.calls))))


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


def is_trained(message: Message) -> bool:
    """Whether the message's own `weight` and `train` allow training on it."""
    return _weight(message) != 0


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


def _prompt_stop(before: Sequence[Message], text: str, text_of: Callable[..., str]) -> tuple[int, bool, int]:
    """Where the generation prompt of this turn ends, -1 if the text does not begin with it; whether it has a header;
    the white space at its end. What the template adds behind it (an empty thinking block), the model has to generate.
    """
    try:
        prompt, bare = text_of(before, True), text_of(before)
    except LlmkitError:  # a template may reject a conversation that has not begun
        return -1, True, 0
    stop = len(prompt) if text.startswith(prompt) else -1
    return stop, prompt != bare, len(prompt) - len(prompt.rstrip())
