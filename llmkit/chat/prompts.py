"""Prompts from rows, and rows from completions: what `generate` reads and writes.

| row | prompt |
|---|---|
| any chat schema of `chat.rows`, even without its answer | the conversation up to its last question, in the template |
| one with several conversations (trees, instances) | one for each of them |
| `{"prompt"}` as a list of messages | the same |
| `{"prompt"}`, `{"inputs"}` or `{"question"}` as a string | that text; with `chat=True` a message in the template |
| `{"text"}` (any text field) | the same |

An output row is `{id?, prompt, completion, completions, ...}`: the prompt as text or messages, the first
completion, all completions, and the row's other fields. An answer already in the row (its `completion` or
`output`, or the last assistant message) becomes `reference`. A row that has another `reference`, or a field that would
be replaced and is in none of these, is refused; the completions of an earlier run are replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from llmkit.chat.control_tokens import encode as encode_rendered
from llmkit.chat.control_tokens import hide
from llmkit.chat.messages import Messages, RowError
from llmkit.chat.rows import CONVERSATIONS, listed, to_conversation, to_conversations
from llmkit.chat.schemas.table import Schema
from llmkit.chat.templates import DamagedTemplateError, render, tokenizer_of
from llmkit.errors import LlmkitError
from llmkit.model.decoder import Decoder
from llmkit.model.generate import generate
from llmkit.model.pretrained.checkpoint import LoadedModel
from llmkit.seeds import derive

CHAT_SCHEMAS = [schema for schema in CONVERSATIONS if schema.name and not schema.plain]
TEXT_SCHEMAS = [schema for schema in CONVERSATIONS if schema.plain and schema.answer]
# Input fields that never pass through: those that an output row has itself, and whole conversations.
REPLACED = ("prompt", "completion", "completions", "messages", "conversations")
# Text or messages, their tools, and the answer in the row.
Question = tuple[str | Messages, list[dict[str, Any]] | None, Any]


@dataclass(slots=True)
class Prompt:
    """One prompt: its content (text or messages), its token ids, and the row's other fields."""

    content: str | Messages
    tokens: list[int]
    other_fields: dict[str, Any] = field(default_factory=dict)

    def row(self, completions: Sequence[str]) -> dict[str, Any]:
        """The row that `generate` writes."""
        id_field = {key: value for key, value in self.other_fields.items() if key == "id"}
        result = {"prompt": self.content, "completion": completions[0], "completions": list(completions)}
        return id_field | result | {key: value for key, value in self.other_fields.items() if key != "id"}


def read_prompts(
    fields: Mapping[str, Any],
    files: Mapping[str, str],
    *,
    chat: bool = False,
    text_key: str = "text",
    control_tokens: bool = False,
) -> list[Prompt]:
    """The prompts in one row; RowError names the field that is missing or malformed."""
    questions: list[Question]
    used: tuple[str, ...]
    fitting = [
        s for s in CHAT_SCHEMAS if all(fields.get(name) is not None for name in s.question) and s.accepts(fields)
    ]
    if schema := next((s for s in fitting if not s.answer or s.answer in fields), next(iter(fitting), None)):
        questions, used = _questions(fields, schema), (*schema.fields, *schema.optional)
    elif pair := next((s for s in TEXT_SCHEMAS if s.question[0] in fields), None):
        (asked,), used = pair.question, pair.fields
        content, tools = fields[asked], None
        if not isinstance(content, str):
            conversation = to_conversation({"messages": content, "tools": fields.get("tools")})
            content, tools, used = conversation.messages, conversation.tools, (*used, "tools")
        reference = fields.get(pair.answer)
        if reference is None:
            reference, used = fields.get("output"), (*used, "output")
        questions = [(content, tools, reference)]
    elif isinstance(fields.get(text_key), str):
        questions, used = [(fields[text_key], None, None)], (text_key,)
    else:
        names = dict.fromkeys(repr(s.question[0]) for s in (*CHAT_SCHEMAS, *TEXT_SCHEMAS))
        present = ", ".join(fields) or "none"
        raise RowError(f"no field {', '.join(names)} or {text_key!r} (fields: {present})")
    return [_prompt(question, fields, files, used, chat, control_tokens) for question in questions]


def _prompt(
    question: Question,
    fields: Mapping[str, Any],
    files: Mapping[str, str],
    used: tuple[str, ...],
    chat: bool,
    control_tokens: bool,
) -> Prompt:
    """The prompt of one question of a row, with the fields of the row that are not `used`."""
    content, tools, reference = question
    if chat and isinstance(content, str):
        content = [{"role": "user", "content": content}]
    if isinstance(content, list) and not content:
        raise RowError("the conversation holds no question")
    other_fields = {key: value for key, value in fields.items() if key not in (*REPLACED, *used)}
    generated = fields.get("completions")
    if isinstance(generated, list) and generated[:1] == [fields.get("completion")]:  # by an earlier run
        used = (*used, "completion", "completions")
        reference = fields.get("reference") or reference
    if reference is not None:
        _check_kept(fields, "reference", [reference])
        other_fields["reference"] = reference
    turns = [turn.get("content") for turn in content] if isinstance(content, list) else []
    for name in REPLACED:
        if name not in used:
            _check_kept(fields, name, [content, *turns, reference])
    try:
        return Prompt(content, encode(content, files, tools, control_tokens), other_fields)
    except (DamagedTemplateError, RowError):
        raise
    except LlmkitError as error:  # a conversation that the template refuses
        raise RowError(f"{error.message} ({error.hint})") from error


def _check_kept(fields: Mapping[str, Any], name: str, kept: list[Any]) -> None:
    """RowError for a field that is replaced by another value, unless its own is among those that are kept."""
    if fields.get(name) is not None and fields[name] not in kept:
        raise RowError(f"the field {name!r} already exists (rename it: generate writes a field of that name)")


def _questions(fields: Mapping[str, Any], schema: Schema) -> list[Question]:
    """The conversations of a row, each without its answer."""
    asked = {name: fields[name] for name in (*schema.question, *schema.optional) if name in fields}
    if schema.answer:  # an empty one completes the schema, and is removed again below
        asked[schema.answer] = ""
    conversations = to_conversations(asked)
    if not conversations:
        raise RowError(f"no question with an answer; left out: {listed(conversations.left_out)}")
    questions: list[Question] = []
    for conversation in conversations:
        messages, reference = conversation.messages, None
        while messages and messages[-1]["role"] == "assistant":
            reference = messages.pop()["content"]
        if schema.several:  # what the paths of a tree share is marked as trained
            messages = [{key: value for key, value in message.items() if key != "train"} for message in messages]
        questions.append((messages, conversation.tools, fields.get(schema.answer) if schema.answer else reference))
    return questions


def encode(
    content: str | Sequence[Mapping[str, Any]],
    files: Mapping[str, str],
    tools: Sequence[Mapping[str, Any]] | None = None,
    control_tokens: bool = False,
) -> list[int]:
    """Token ids of a prompt: text, or a conversation in its template, after the tokenizer's own beginning.

    Control tokens are those of the template; with `control_tokens`, also those that a text names.
    """
    if isinstance(content, str) and control_tokens:
        return encode_rendered(content, files).ids
    (content, tools), marker = hide((content, tools), files)
    text = content if isinstance(content, str) else render(content, files, True, tools)
    return encode_rendered(text, files, marker).ids


def decode(tokens: Sequence[int], prompt: Sequence[int], files: Mapping[str, str]) -> str:
    """Text of `tokens` as a continuation of `prompt`, without special tokens."""
    codec = tokenizer_of(files)
    # Some decoders drop a space at the start of a text, so decode with the end of the prompt, then cut that off.
    tail = list(prompt[-8:])
    before, both = codec.decode(tail), codec.decode(tail + list(tokens))
    return str(both[len(before) :] if both.startswith(before) else codec.decode(list(tokens)))


def fit_context(prompt: Prompt, info: LoadedModel, where: str, reserve: int | None = None) -> None:
    """Change the prompt to one that `generate` accepts: at least one token, and fewer than the context.

    With `reserve`, a longer one is cut at the front, to leave room for `reserve` new tokens if possible.
    Otherwise LlmkitError names `where`.
    """
    limit = info.config.context
    if not prompt.tokens:
        first = info.config.bos_token_id if info.config.bos_token_id is not None else next(iter(info.stop_ids), None)
        if first is None:
            raise LlmkitError(
                f"{where}: empty prompt, and the model has no token that starts a text", "use a prompt with some text"
            )
        prompt.tokens = [first]
    if len(prompt.tokens) >= limit:
        if reserve is None:
            raise LlmkitError(
                f"{where}: prompt of {len(prompt.tokens):,} tokens, the context is {limit:,}",
                "shorten it, or keep its end with --truncate-prompt",
            )
        prompt.tokens = prompt.tokens[-max(1, limit - reserve) :]


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
    """(prompt, its completions, number of new tokens) in order; `batch_size` completions are generated at once.

    `sampling` is passed to `llmkit.model.generate`: max_new_tokens, temperature, top_p. A completion's seed
    depends only on `seed`, the number of its prompt, and its number among the completions of that prompt.
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
        completions = generate(
            model,
            [prompt.tokens for prompt, _ in batch],
            seeds=[seed for _, seed in batch],
            stop_ids=info.stop_ids,
            ended=ended,
            **sampling,
        )
        for (prompt, _), tokens in zip(batch, completions, strict=True):
            texts.append(cut_at_stop(decode(tokens, prompt.tokens, files), stops))
            count += len(tokens)
            if len(texts) == samples:
                yield prompt, texts, count
                texts, count = [], 0


def cut_at_stop(text: str, stops: Sequence[str]) -> str:
    """`text` up to the first occurrence of a stop string."""
    positions = [position for position in (text.find(stop) for stop in stops) if position >= 0]
    return text[: min(positions)] if positions else text


def stop_test(stops: Sequence[str], files: Mapping[str, str]) -> Callable[[list[int]], bool] | None:
    """A function that tells whether new tokens end with a complete stop string; None without stop strings."""
    if not stops:
        return None
    codec = tokenizer_of(files)
    reach = max(len(stop.encode()) for stop in stops) + 4  # a token has at least one byte

    def complete(tokens: list[int]) -> bool:
        text = codec.decode(tokens[-reach:])
        return any(stop in text for stop in stops)

    return complete
