"""Chat templates: messages to text, and which characters of that text the assistant has to learn.

Templates are Jinja, as in every Hugging Face tokenizer directory. They come with models, so they run in jinja2's immutable sandbox with what
transformers gives them: trim_blocks, lstrip_blocks, loop controls, `tojson`, `raise_exception`, `strftime_now` and the `generation` tag.

Most templates do not mark what the assistant says, so the spans are found by rendering again with a sentinel in place of one assistant
message: what stands before and after the sentinel also stands before and after the real content. That holds for any template, whatever it
trims or wraps. A span reaches from the end of the generation prompt to the end of the stop token; a template that puts no stop token behind the
assistant's content is refused, since a model trained on it would never stop.

    text = render(messages, files, add_generation_prompt=True)           # prompt for `generate`
    row = encode_chat(messages, files)                                    # token ids and loss weights for `sft`

`files` are the text files of a tokenizer directory by name. Cost: three renderings an assistant turn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any

import numpy as np

from llmkit.chat.rows import common_length
from llmkit.errors import LlmkitError
from llmkit.model.pretrained.checkpoint import load_tokenizer

CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + (message['content'] or '') }}
{%- for call in message.get('tool_calls') or [] %}
{{- '\\n<tool_call>\\n' + (call['function'] | tojson) + '\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
# Role markers are plain text and the end of a turn is the end of text, so this works with every tokenizer.
TULU = """\
{%- for message in messages %}
{%- if message['role'] == 'assistant' %}
{{- '<|assistant|>\\n' + (message['content'] or '') + eos_token + ('' if loop.last else '\\n') }}
{%- else %}
{{- '<|' + message['role'] + '|>\\n' + (message['content'] or '') + '\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|assistant|>\\n' }}
{%- endif %}
"""
# Templates may print today's date. What a model is trained on must not depend on the day, so training renders on this one.
TRAINING_DATE = datetime(2024, 7, 26)

Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Span:
    """Characters [start, stop) of a text on which the loss counts with `weight`."""

    start: int
    stop: int
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """`tokens` int32 [n]; `weights` float32 [n]: how much the loss of predicting token i from those before it counts."""

    tokens: np.ndarray
    weights: np.ndarray

    @property
    def trained(self) -> int:
        """Tokens that the loss counts; the first one of a row is never predicted."""
        return int(np.count_nonzero(self.weights[1:]))


def chat_template(files: Mapping[str, str], tools: bool = False) -> str | None:
    """The template of a tokenizer directory: chat_template.jinja, else tokenizer_config.json; None where it has none."""
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"]
    template = _tokenizer_config(files).get("chat_template")
    if isinstance(template, list):  # several by name
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        template = (named.get("tool_use") if tools else None) or named.get("default")
    return template if isinstance(template, str) else None


def default_template(files: Mapping[str, str]) -> tuple[str, str]:
    """(name, template) for a tokenizer without one: ChatML where its tokens are in the vocabulary, else Tulu's."""
    known = special_contents(files)
    if {"<|im_start|>", "<|im_end|>"} <= set(known):
        return "ChatML", CHATML
    return "Tulu", TULU


def with_template(files: Mapping[str, str], template: str) -> dict[str, str]:
    """`files` with another chat template; `save_model` puts it into tokenizer_config.json too, where older readers look."""
    return dict(files) | {"chat_template.jinja": template}


def render(
    messages: Sequence[Message],
    files: Mapping[str, str],
    add_generation_prompt: bool,
    tools: Sequence[Mapping[str, Any]] | None = None,
    now: datetime | None = None,
) -> str:
    """The text of a conversation; with `add_generation_prompt` it ends where the assistant's answer begins.

    `now` is the date for templates that print one, today where it is None. Raises LlmkitError where the directory has no template or
    the template refuses these messages.
    """
    template = chat_template(files, bool(tools))
    if template is None:
        raise LlmkitError("the model has no chat template", "fine-tune it with `llmkit sft`, or give plain prompts")
    try:
        return _compile(template).render(
            messages=[dict(m) for m in messages],
            tools=list(tools) if tools else None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            strftime_now=lambda form: (now or datetime.now()).strftime(form),
            **special_tokens(files),
        )
    except Exception as error:  # a template is a program: anything may go wrong in it
        raise LlmkitError(f"the chat template fails: {error}", "check the roles and fields of the messages") from error


def special_tokens(files: Mapping[str, str]) -> dict[str, str]:
    """Named special tokens of the tokenizer, such as {"eos_token": "<|endoftext|>"}."""
    return dict(_special_tokens(files.get("special_tokens_map.json", ""), files.get("tokenizer_config.json", "")))


def special_contents(files: Mapping[str, str]) -> dict[str, int]:
    """Text and id of every token that is never split or merged: added special tokens and the end-of-text token."""
    return dict(_special_contents(files.get("tokenizer.json", ""), special_tokens(files).get("eos_token", "")))


def assistant_spans(
    messages: Sequence[Message], files: Mapping[str, str], tools: Sequence[Mapping[str, Any]] | None = None
) -> tuple[str, list[Span]]:
    """Text of the conversation and the spans of its assistant turns: content, tool calls, stop token.

    A message's own `weight` (a number) or `train` (true or false) is honoured; weight 0 leaves the turn out.
    """

    def text_of(some: Sequence[Message], prompt: bool = False) -> str:
        return render([_shown(m) for m in some], files, prompt, tools, TRAINING_DATE)

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
        except LlmkitError:  # some templates want the tool call before a tool's answer
            skeleton = text_of([*messages[:i], {**message, "content": sentinel}, *messages[i + 1 :]])
        if skeleton.count(sentinel) != 1:
            raise LlmkitError(
                f"the chat template shows the assistant's content {skeleton.count(sentinel)} times",
                "what the assistant says cannot be told from the rest; use another template",
            )
        before, _, after = skeleton.partition(sentinel)
        start = common_length(before, text)
        content_stop = max(start, len(text) - common_length(after[::-1], text[::-1]))
        start = _prompt_end(messages[:i], text, text_of, start)
        spans.append(Span(start, _stop_token_end(text, content_stop, files), weight))
    return text, spans


def encode_spans(text: str, spans: Sequence[Span], files: Mapping[str, str]) -> EncodedRow:
    """Tokens of `text` and their weights.

    The text is encoded as a whole, so that tokens are those of inference on it; a token belongs to the span in which it starts. One that
    starts before a span and reaches into it is never generated after that prompt, and is left out.
    """
    encoding = tokenizer_of(files).encode(text, add_special_tokens=False)
    starts = np.fromiter((start for start, _ in encoding.offsets), dtype=np.int64, count=len(encoding.ids))
    weights = np.zeros(len(encoding.ids), dtype=np.float32)
    for span in spans:
        weights[(starts >= span.start) & (starts < span.stop)] = span.weight
    return EncodedRow(np.asarray(encoding.ids, dtype=np.int32), weights)


def encode_chat(
    messages: Sequence[Message], files: Mapping[str, str], tools: Sequence[Mapping[str, Any]] | None = None
) -> EncodedRow:
    """Token ids of a conversation, with weights on what the assistant says and on its stop token."""
    return encode_spans(*assistant_spans(messages, files, tools), files)


def check_template(files: Mapping[str, str]) -> list[str]:
    """The stop tokens of the chat template, from a conversation of two turns. Raises LlmkitError where it marks no end of the assistant's turn."""
    text, spans = assistant_spans(
        [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}], files
    )
    return [name for span in spans for name in special_contents(files) if text[: span.stop].endswith(name)]


def stop_token_ids(files: Mapping[str, str]) -> list[int]:
    """Ids that end the assistant's turn or the text: those of the chat template first, then end of text."""
    known = special_contents(files)
    try:
        names = check_template(files)
    except LlmkitError:  # no template, or one that cannot be trained on
        names = []
    names.append(special_tokens(files).get("eos_token", ""))
    return list(dict.fromkeys(known[name] for name in names if name in known))


def tokenizer_of(files: Mapping[str, str]) -> Any:
    """The `tokenizers.Tokenizer` of a tokenizer directory's files."""
    return _tokenizer(files["tokenizer.json"])


# ---- inside


def _shown(message: Message) -> dict[str, Any]:
    """What the template may see of a message."""
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
    """Where the generation prompt of this turn ends: what the template adds behind it (an empty thinking block), the model has to write."""
    try:
        prompt, bare = text_of(before, True), text_of(before)
    except LlmkitError:  # a template may refuse a conversation that has not begun
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
    contents = sorted(_special_contents(tokenizer_json, eos), key=len, reverse=True)
    if not contents:
        raise LlmkitError("the tokenizer has no special tokens", "a chat model needs one that ends a turn")
    return re.compile("|".join(map(re.escape, contents))), len(contents[0])


def _tokenizer_config(files: Mapping[str, str]) -> dict[str, Any]:
    return dict(_parse_json(files.get("tokenizer_config.json", "")))


@lru_cache(maxsize=16)
def _parse_json(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise LlmkitError(f"a file of the tokenizer is not JSON: {error}", "the directory is damaged") from error
    return value if isinstance(value, dict) else {}


@lru_cache(maxsize=16)
def _special_tokens(special_map: str, config: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for source in (special_map, config):
        for key, value in _parse_json(source).items():
            content = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(content, str):
                found[key] = content
    return found


@lru_cache(maxsize=8)
def _special_contents(tokenizer_json: str, eos: str) -> dict[str, int]:
    _tokenizer(tokenizer_json)  # which knows better than we whether the file is sound
    added = _parse_json(tokenizer_json).get("added_tokens") or []
    return {item["content"]: item["id"] for item in added if item.get("special") or item.get("content") == eos}


@lru_cache(maxsize=4)
def _tokenizer(tokenizer_json: str) -> Any:
    return load_tokenizer({"tokenizer.json": tokenizer_json}, "the model")


@lru_cache(maxsize=16)
def _compile(template: str) -> Any:
    """The compiled template, in the environment that transformers gives it."""
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}...{% endgeneration %}` marks the assistant's part; the mark itself renders as nothing."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)  # jinja's own escapes HTML

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(template)
