"""The model that sft and dpo start from, with its chat template: its own, one of chat/builtin, or that of a file.

    chat = open_chat_model(request, "base/", "chatml", sequence_length=None)
    model = chat.create(lora=None, seed=0)

A named template comes with its control tokens. Those that the tokenizer lacks are added to it, and rows to the model
where it has no unused ones (model/resize.py). A new row starts as the mean of the rows of the tokens that spelled its
name, so that `<|im_start|>` and `<|im_end|>` differ from the first step on and lie where the model's other rows do;
one without pieces starts as the mean of all rows. The end of a turn becomes the tokenizer's `eos_token`, as in
published chat models and TRL's clone_chat_template: programs that read no generation_config.json stop there. The former
one stays among the stop tokens of generation_config.json, and `tokenize` still ends documents with it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from llmkit.chat import builtin, masks, templates
from llmkit.errors import UsageError
from llmkit.io.record import base_name
from llmkit.lineage.formats import describe_input
from llmkit.model.decoder import Decoder
from llmkit.model.lora.config import LoraConfig, token_tables
from llmkit.model.pretrained.adapter import load_for_adapting
from llmkit.model.pretrained.checkpoint import LoadedModel, load_info, load_model
from llmkit.model.resize import NewTokens, load_resized
from llmkit.shards.tokenizer_info import tokenizer_json, with_eos
from llmkit.tokens.extend import with_control_tokens
from llmkit.training.inputs import context_length
from llmkit.training.runner import Request


@dataclass(frozen=True, slots=True)
class ChatModel:
    """`info` describes the model at `path`, but its configuration has rows for the `new` tokens. `files` are those of
    the tokenizer with the template, and a sequence has `length` tokens.
    """

    path: str
    info: LoadedModel
    files: dict[str, str]
    length: int
    new: NewTokens

    @property
    def stop_ids(self) -> list[int]:
        """The stop ids of the trained model, end of turn first."""
        return list(dict.fromkeys([*masks.stop_token_ids(self.files), *self.info.stop_ids, *self._former_end()]))

    def _former_end(self) -> list[int]:
        old = self.info.tokenizer_files
        name = templates.special_tokens(old).get("eos_token", "")
        return [i for token, i in templates.special_contents(old).items() if token == name]

    def adapted(self, lora: LoraConfig) -> LoraConfig:
        """The adapters, with the rows of new tokens, which are trained with them."""
        return replace(lora, tokens=token_tables(self.info.config, self.new.ids))

    def create(self, lora: LoraConfig | None, seed: int) -> Decoder:
        """The decoder that training starts from, in float32."""
        if lora:
            return load_for_adapting(self.path, lora, seed, self.new)
        return load_resized(self.path, self.new) if self.new.pieces else load_model(self.path, torch.float32)[0]


def open_chat_model(request: Request, model: str, template: str | None, sequence_length: int | None) -> ChatModel:
    """The model directory or run, and what `template` makes of it; a file is added to the inputs of the request.

    Raises UsageError for a template that is neither known nor a file, and LlmkitError for an unreadable model.
    """
    info = load_info(model)
    if info.adapter is not None:
        request.note(f"{model} holds adapters, which are merged into their model first")
    files, new = dict(info.tokenizer_files), NewTokens(0)
    tokenizer_json(files, model)
    if template in builtin.names():
        files, new = _with_builtin(request, info, builtin.find(str(template)))
        info = replace(info, config=new.config(info.config))
    elif template is not None:
        files = templates.with_template(files, _read(request, Path(template)))
    elif templates.chat_template(files) is None:
        default = templates.default_template(files)
        files = templates.with_template(files, default.text)
        request.note(f"the model has no chat template: using {default.name}, and storing it with the model")
    return ChatModel(model, info, files, context_length(info, sequence_length), new)


def _read(request: Request, file: Path) -> str:
    """The text of a template in a file, which is recorded as an input."""
    if not file.is_file():
        known = ", ".join(builtin.names())
        raise UsageError(f"--chat-template {str(file)!r} is neither a file nor a known template", f"known: {known}")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"--chat-template {file}: invalid UTF-8 (byte {error.start})", "give a Jinja template"
        ) from None
    request.record.options["chat_template"] = base_name(file)
    request.record.inputs.append(describe_input(file, "chat_template"))
    request.values["chat_template"] = str(file.absolute())
    return text


def _with_builtin(request: Request, info: LoadedModel, template: builtin.Builtin) -> tuple[dict[str, str], NewTokens]:
    """The tokenizer files with a template and its tokens, and the tokens for which the model needs rows."""
    made, rows = with_control_tokens(info.tokenizer_files, str(info.path), template.tokens), info.config.vocab_size
    files = with_end_of_turn(made.files, template.stop) if template.stop else made.files
    files = templates.with_template(files, template.text)
    ids, first = templates.special_contents(files), made.size - made.added
    if max((ids[token] for token in template.tokens), default=0) < min(first, rows):
        return files, NewTokens(first)  # the model knows them all
    new = NewTokens.of(rows, first, made.pieces)
    names = ", ".join(token for token in template.tokens if ids[token] >= new.first)
    size = new.config(info.config).vocab_size
    where = f"the model grows from {rows:,} to {size:,} rows" if size > rows else "they take unused rows of the model"
    request.note(f"tokens added for {template.name}: {names}; {where}")
    return files, new


def with_end_of_turn(files: dict[str, str], stop: str) -> dict[str, str]:
    """Tokenizer files in which this token is the `eos_token`."""
    files = with_eos(files, stop)
    named = json.loads(files.get("special_tokens_map.json", "{}"))
    if "eos_token" in named:  # which some readers prefer
        text = json.dumps(named | {"eos_token": stop}, indent=2, ensure_ascii=False) + "\n"
        files = files | {"special_tokens_map.json": text}
    return files
