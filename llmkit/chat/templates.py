"""Chat templates: conversations to text.

Templates are Jinja, as in every Hugging Face tokenizer directory. They come with models, so they are untrusted
and run in a sandbox that counts their work (chat.sandbox), with the environment of transformers: trim_blocks,
lstrip_blocks, loop controls, `tojson`, `raise_exception`, `strftime_now` and the `generation` tag.

    text = render(messages, files, add_generation_prompt=True)           # prompt for `generate`

`files` are the text files of a tokenizer directory by name. Which part of the text is trained on is decided in
`chat.masks`.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from llmkit.chat.builtin import Builtin, find
from llmkit.chat.forms import TOOLS, CostlyTemplateError, Form, Message, find_form
from llmkit.errors import LlmkitError
from llmkit.model.pretrained.checkpoint import load_tokenizer

if TYPE_CHECKING:
    from llmkit.chat.sandbox import Sandbox


CHATML, TULU = find("chatml").text, find("tulu").text
MAX_REASON = 300  # characters of a template's message that are shown
MAX_DATE_FORMAT = 100  # characters


class DamagedTemplateError(LlmkitError):
    """A template that no conversation can be rendered with."""


def chat_template(files: Mapping[str, str], tools: bool = False) -> str | None:
    """The template of a tokenizer directory: chat_template.jinja, else the one in tokenizer_config.json; None
    if there is none.
    """
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"]
    template = _tokenizer_config(files).get("chat_template")
    if isinstance(template, list):  # several by name
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        template = (named.get("tool_use") if tools else None) or named.get("default")
    return template if isinstance(template, str) else None


def default_template(files: Mapping[str, str]) -> Builtin:
    """The template for a tokenizer without one: ChatML if its tokens are in the vocabulary, else Tulu."""
    chatml = find("chatml")
    return chatml if special_contents(files).keys() >= set(chatml.tokens) else find("tulu")


def with_template(files: Mapping[str, str], template: str) -> dict[str, str]:
    """`files` with another chat template. `save_model` also writes it to tokenizer_config.json, where older
    readers look.
    """
    return dict(files) | {"chat_template.jinja": template}


def render(
    messages: Sequence[Message],
    files: Mapping[str, str],
    add_generation_prompt: bool,
    tools: Sequence[Mapping[str, Any]] | None = None,
    now: datetime | None = None,
) -> str:
    """The text of a conversation; with `add_generation_prompt` it ends where the assistant's answer begins.

    `now` is the date for templates that print one; None is today. Raises DamagedTemplateError if the template is not
    Jinja, and another LlmkitError if the directory has none, or it rejects these messages or does too much work.
    """
    return _render(form_of(files, bool(tools)).adapt(messages), files, add_generation_prompt, tools, now)


def form_of(files: Mapping[str, str], tools: bool = False) -> Form:
    """The form in which the template takes messages; that of conversations with `tools` may be another template."""
    return _form(tuple(sorted(files.items())), tools)


@lru_cache(maxsize=16)
def _form(items: tuple[tuple[str, str], ...], tools: bool) -> Form:
    files = dict(items)

    def show(messages: Sequence[Message], described: Any) -> str:
        return _render(messages, files, False, described or (TOOLS if tools else None), datetime(2024, 7, 26))

    return find_form(show)


def _render(
    messages: Sequence[Message],
    files: Mapping[str, str],
    add_generation_prompt: bool,
    tools: Sequence[Mapping[str, Any]] | None,
    now: datetime | None,
) -> str:
    template = chat_template(files, bool(tools))
    if template is None:
        raise LlmkitError("the model has no chat template", "fine-tune it with `llmkit sft`, or use plain prompts")
    try:
        sandbox, compiled = _compile(template, threading.get_ident())
    except Exception as error:  # a template is a program and may raise anything
        raise DamagedTemplateError(_failure(error, files), "correct it, or use another template") from error

    def strftime_now(form: str) -> str:
        if len(form) > MAX_DATE_FORMAT:
            raise ValueError(f"a date format of more than {MAX_DATE_FORMAT} characters")
        return (now or datetime.now()).strftime(form)

    variables = {
        "messages": list(messages),
        "tools": list(tools) if tools else None,
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
        "strftime_now": strftime_now,
    }
    try:
        return sandbox.render(compiled, variables | special_tokens(files))
    except Exception as error:
        from jinja2 import TemplateRuntimeError, UndefinedError

        refused = (TemplateRuntimeError, OverflowError, RecursionError, MemoryError)
        is_refused = isinstance(error, refused) and not isinstance(error, UndefinedError)
        hint = "correct it, or use another template" if is_refused else "check the roles and fields of the messages"
        kind = CostlyTemplateError if is_refused else LlmkitError
        raise kind(_failure(error, files), hint) from error


def _failure(error: Exception, files: Mapping[str, str]) -> str:
    """How a template fails, and where."""
    file = "chat_template.jinja" if "chat_template.jinja" in files else "tokenizer_config.json"
    line, trace = getattr(error, "lineno", None), error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    reason = " ".join(str(getattr(error, "message", None) or error).split()) or type(error).__name__
    return f"{file}{f':{line}' if line else ''}: the chat template fails: {reason[:MAX_REASON]}"


def special_tokens(files: Mapping[str, str]) -> dict[str, str]:
    """Named special tokens of the tokenizer, such as {"eos_token": "<|endoftext|>"}."""
    return dict(_special_tokens(files.get("special_tokens_map.json", ""), files.get("tokenizer_config.json", "")))


def special_contents(files: Mapping[str, str]) -> dict[str, int]:
    """Text and id of every token that is never split or merged: added special tokens and the end-of-text token."""
    return dict(special_contents_of(files.get("tokenizer.json", ""), special_tokens(files).get("eos_token", "")))


def tokenizer_of(files: Mapping[str, str]) -> Any:
    """The `tokenizers.Tokenizer` of a tokenizer directory's files."""
    return _tokenizer(files.get("tokenizer.json", ""))


def _tokenizer_config(files: Mapping[str, str]) -> dict[str, Any]:
    return dict(_parse_json(files.get("tokenizer_config.json", "")))


@lru_cache(maxsize=16)
def _parse_json(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise LlmkitError(f"a tokenizer file is not JSON: {error}", "the directory is damaged") from error
    return value if isinstance(value, dict) else {}


@lru_cache(maxsize=16)
def _special_tokens(special_map: str, config: str) -> dict[str, str]:
    tokens: dict[str, str] = {}
    for source in (special_map, config):
        for key, value in _parse_json(source).items():
            content = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(content, str):
                tokens[key] = content
    return tokens


@lru_cache(maxsize=8)
def special_contents_of(tokenizer_json: str, eos: str) -> dict[str, int]:
    """`special_contents` from the text of tokenizer.json and the end-of-text token; cached, so do not change
    it.
    """
    id_of = _tokenizer(tokenizer_json).token_to_id  # which may be another one than the file says
    added = _parse_json(tokenizer_json).get("added_tokens") or []
    names = [item["content"] for item in added if item.get("special") or item.get("content") == eos]
    return {name: i for name in names if (i := id_of(name)) is not None}


@lru_cache(maxsize=4)
def _tokenizer(tokenizer_json: str) -> Any:
    return load_tokenizer({"tokenizer.json": tokenizer_json} if tokenizer_json else {}, "the model")


@lru_cache(maxsize=16)
def _compile(template: str, thread: int) -> tuple[Sandbox, Any]:
    """A sandbox of this thread, and the compiled template."""
    from llmkit.chat.sandbox import Sandbox

    sandbox = Sandbox()
    return sandbox, sandbox.load(template)
