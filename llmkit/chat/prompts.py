"""Prompts from rows, and rows from completions: what `generate` reads and writes.

| row | prompt |
|---|---|
| `{"messages"}`, `{"conversations"}`, `{"instruction", "input"?}` | the conversation up to its last question, in the model's chat template |
| `{"prompt"}` as a list of messages | likewise |
| `{"prompt"}` as a string | that text; with `chat=True` what a user says, in the template |
| `{"text"}` (any text field) | likewise |

What comes out is `{id?, prompt, completion, completions, ...}`: the prompt as text or messages, the first completion, all of them, and the row's
other fields. An answer that the row brought along (its `completion` or `output`, or the assistant's last message) becomes `reference`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from llmkit.chat.rows import Messages, RowError, to_conversation
from llmkit.chat.templates import render, tokenizer_of
from llmkit.errors import LlmkitError
from llmkit.model.decoder import Decoder
from llmkit.model.generate import generate
from llmkit.model.pretrained.checkpoint import LoadedModel
from llmkit.seeds import derive

ALPACA = ("instruction", "input", "system")
WRITTEN = ("prompt", "completion", "completions")


@dataclass(slots=True)
class Prompt:
    """One prompt: what was asked (text or messages), its tokens, and the row's other fields."""

    asked: str | Messages
    tokens: list[int]
    rest: dict[str, Any] = field(default_factory=dict)

    def row(self, completions: Sequence[str]) -> dict[str, Any]:
        """The row that `generate` writes."""
        named = {key: value for key, value in self.rest.items() if key == "id"}
        answer = {"prompt": self.asked, "completion": completions[0], "completions": list(completions)}
        return named | answer | {key: value for key, value in self.rest.items() if key != "id"}


def read_prompt(
    fields: Mapping[str, Any], files: Mapping[str, str], *, chat: bool = False, text_key: str = "text"
) -> Prompt:
    """The prompt in one row; RowError names the field that is missing or wrong."""
    asked: str | Messages
    tools, reference = None, None
    used: tuple[str, ...]
    if "messages" in fields or "conversations" in fields:
        conversation = to_conversation(fields)
        asked, tools, used = conversation.messages, conversation.tools, ("messages", "conversations", "tools")
        while asked and asked[-1]["role"] == "assistant":
            reference = asked.pop()["content"]
    elif "instruction" in fields:
        request = {key: fields[key] for key in ALPACA if key in fields}
        asked, reference = to_conversation(request | {"output": ""}).messages[:-1], fields.get("output")
        used = (*ALPACA, "output")
    elif "prompt" in fields:
        prompt = fields["prompt"]
        asked, used = prompt, ("prompt", "completion")
        if not isinstance(prompt, str):
            conversation = to_conversation({"messages": prompt, "tools": fields.get("tools")})
            asked, tools, used = conversation.messages, conversation.tools, (*used, "tools")
        reference = fields.get("completion")
        if reference is None:
            reference, used = fields.get("output"), (*used, "output")
    elif isinstance(fields.get(text_key), str):
        asked, used = fields[text_key], (text_key,)
    else:
        known = ", ".join(fields) or "none"
        raise RowError(f"no field 'messages', 'prompt', 'instruction' or {text_key!r} (fields: {known})")
    if chat and isinstance(asked, str):
        asked = [{"role": "user", "content": asked}]
    if isinstance(asked, list) and not asked:
        raise RowError("the conversation holds no question")
    rest = {key: value for key, value in fields.items() if key not in (*WRITTEN, *used)}
    if reference is not None:
        rest["reference"] = reference
    try:
        return Prompt(asked, encode(asked, files, tools), rest)
    except LlmkitError as error:  # a conversation that the template refuses
        raise RowError(f"{error.message} ({error.hint})") from error


def encode(
    asked: str | Sequence[Mapping[str, Any]], files: Mapping[str, str], tools: Sequence[Mapping[str, Any]] | None = None
) -> list[int]:
    """Token ids of a prompt. Text gets the special tokens that the tokenizer puts in front; a conversation those of its template."""
    text = asked if isinstance(asked, str) else render(asked, files, True, tools)
    return list(tokenizer_of(files).encode(text, add_special_tokens=isinstance(asked, str)).ids)


def decode(tokens: Sequence[int], prompt: Sequence[int], files: Mapping[str, str]) -> str:
    """Text of `tokens` as it stands behind `prompt`, without special tokens."""
    codec = tokenizer_of(files)
    # Some decoders drop a space at the start of a text, so what comes behind the prompt is cut from the whole.
    tail = list(prompt[-8:])
    before, whole = codec.decode(tail), codec.decode(tail + list(tokens))
    return str(whole[len(before) :] if whole.startswith(before) else codec.decode(list(tokens)))


def fit(prompt: Prompt, info: LoadedModel, where: str, keep: int | None = None) -> None:
    """Make the prompt one that `generate` takes: at least one token, and fewer than the context.

    With `keep` a longer one is cut at the front, so that `keep` tokens fit behind it if that leaves any; else LlmkitError names `where`.
    """
    limit = info.config.max_position_embeddings
    if not prompt.tokens:
        first = info.config.bos_token_id if info.config.bos_token_id is not None else next(iter(info.stop_ids), None)
        if first is None:
            raise LlmkitError(f"{where}: empty prompt, and the model has no token to start a text", "give a prompt")
        prompt.tokens = [first]
    if len(prompt.tokens) >= limit:
        if keep is None:
            raise LlmkitError(
                f"{where}: prompt of {len(prompt.tokens):,} tokens, the context is {limit:,}",
                "shorten it, or keep its end with --truncate-prompt",
            )
        prompt.tokens = prompt.tokens[-max(1, limit - keep) :]


def complete(
    model: Decoder,
    info: LoadedModel,
    prompts: Iterable[Prompt],
    *,
    samples: int,
    batch_size: int,
    seed: int,
    stops: Sequence[str] = (),
    **sampling: Any,
) -> Iterator[tuple[Prompt, list[str], int]]:
    """(prompt, its completions, number of new tokens) in order; `batch_size` completions are made at once.

    `sampling` goes to `llmkit.model.generate`: max_new_tokens, temperature, top_p. A completion's seed depends on `seed`, the number of its
    prompt and its own number alone.
    """
    files = info.tokenizer_files
    ended = stop_test(stops, files)
    jobs = (
        (prompt, derive(seed, "generate", number, sample))
        for number, prompt in enumerate(prompts)
        for sample in range(samples)
    )
    texts: list[str] = []
    count = 0
    while batch := list(islice(jobs, batch_size)):
        found = generate(
            model,
            [prompt.tokens for prompt, _ in batch],
            seeds=[seed for _, seed in batch],
            stop_ids=info.stop_ids,
            ended=ended,
            **sampling,
        )
        for (prompt, _), tokens in zip(batch, found, strict=True):
            texts.append(cut(decode(tokens, prompt.tokens, files), stops))
            count += len(tokens)
            if len(texts) == samples:
                yield prompt, texts, count
                texts, count = [], 0


def cut(text: str, stops: Sequence[str]) -> str:
    """`text` up to the first of the stop strings in it."""
    places = [place for place in (text.find(stop) for stop in stops) if place >= 0]
    return text[: min(places)] if places else text


def stop_test(stops: Sequence[str], files: Mapping[str, str]) -> Callable[[list[int]], bool] | None:
    """A function that says of new tokens whether a stop string is complete at their end; None where there are no stop strings."""
    if not stops:
        return None
    codec = tokenizer_of(files)
    reach = max(len(stop.encode()) for stop in stops) + 4  # a token holds at least a byte

    def complete(tokens: list[int]) -> bool:
        text = codec.decode(tokens[-reach:])
        return any(stop in text for stop in stops)

    return complete
