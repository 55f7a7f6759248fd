"""Hugging Face model directories except their weights: config.json, generation_config.json, tokenizer files. No torch.

Directories are untrusted: pickles are never read, code that a directory names is never run, sizes are bounded.
Written directories open unchanged in transformers, vLLM, lm-eval and mergekit. Weights are read and written by
checkpoint.py, and streamed as numbers by streamed.py.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from llmkit.errors import LlmkitError
from llmkit.io.run_layout import ADAPTER_CONFIG, STATE, member, resolve_model
from llmkit.model.config import ModelConfig, read_json
from llmkit.model.family import model_names
from llmkit.model.lora.config import ADAPTER_WEIGHTS, LoraConfig, read_config
from llmkit.model.pretrained.content import weights_digest
from llmkit.model.pretrained.header import SIZES, read_header, read_metadata
from llmkit.shards.tokenizer_info import tokenizer_json
from llmkit.tokens.tokenizer_json import LoadedTokenizer, load

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
GENERATION = "generation_config.json"
BASE_DIGEST = "llmkit.base"  # in the metadata of adapters: digest of the weights of their model
BASE_PATH = f"{STATE}/base.json"  # in the directory of adapters: where their model was
MAX_PARENTS = 4  # RUN/checkpoints/STEP, and what the run is in
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")
MAX_TOKENIZER_BYTES = 256 << 20
CHUNK = 1 << 20  # bytes that are compared at once


@dataclass(slots=True)
class LoadedModel:
    """The content of a model directory except its weights."""

    path: Path
    config: ModelConfig
    tokenizer_files: dict[str, str] = field(default_factory=dict)
    stop_ids: list[int] = field(default_factory=list)  # ids that end generation
    quantization: dict[str, Any] | None = None
    generation: dict[str, Any] = field(default_factory=dict)  # the content of generation_config.json
    adapter: Adapter | None = None  # of a directory of adapters: the rest is that of the merged model


@dataclass(slots=True)
class Adapter:
    """The adapters of a directory, and the model to which they belong."""

    config: LoraConfig
    base: LoadedModel


def load_info(path: str | Path, base: str | Path | None = None, any_base: bool = False) -> LoadedModel:
    """Configuration, tokenizer and stop ids of a model directory, run or directory of adapters, without its weights.

    `base` is the model of the adapters; by default it is found by what the directory says (`_find_base`). Adapters that
    hold no digest of their model, as those of PEFT, are refused unless `any_base`: a record names what was read.
    """
    directory = resolve_model(path)
    if is_adapter(directory):
        return _load_adapter_info(directory, base, any_base)
    content = read_json(member(directory, "config.json"))
    config = ModelConfig.from_hf(content, str(directory / "config.json"))
    quantization = content.get("quantization_config")
    if config.tie_word_embeddings and quantization is None and _has_own_head(directory, config):
        config = replace(config, tie_word_embeddings=False)  # as transformers takes it
    generation: dict[str, Any] = {}
    if (file := member(directory, GENERATION)).is_file():
        generation = read_json(file)
    stop_ids = token_ids(generation.get("eos_token_id", config.eos_token_id), f"{file}: eos_token_id")
    return LoadedModel(directory, config, read_tokenizer_files(directory), stop_ids, quantization, generation)


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds adapters instead of a model."""
    return (directory / ADAPTER_CONFIG).is_file() and not any((directory / name).is_file() for name in (WEIGHTS, INDEX))


def _load_adapter_info(directory: Path, base: str | Path | None, any_base: bool) -> LoadedModel:
    config = read_config(directory)
    if not (weights := member(directory, ADAPTER_WEIGHTS)).is_file():
        weight_files(directory)  # names the pickles, if there are any
    digest = read_metadata(str(weights)).get(BASE_DIGEST)
    config = replace(config, base_digest=digest if isinstance(digest, str) else "")
    if not config.base_digest and not any_base:
        raise LlmkitError(
            f"{directory} holds adapters, but not the digest of the model to which they belong",
            "merge them into it: llmkit average ADAPTER --merge-adapter -o MODEL",
        )
    model = _find_base(directory, config, base)
    generation, stop_ids = model.generation, model.stop_ids
    if (file := member(directory, GENERATION)).is_file():
        generation = read_json(file)
        stop_ids = token_ids(generation.get("eos_token_id", model.config.eos_token_id), f"{file}: eos_token_id")
    files = read_tokenizer_files(directory) or model.tokenizer_files
    adapted = config.adapted(model.config, str(directory / ADAPTER_CONFIG))
    return LoadedModel(directory, adapted, files, stop_ids, None, generation, Adapter(config, model))


def _find_base(directory: Path, config: LoraConfig, given: str | Path | None) -> LoadedModel:
    """The base of adapters: `given`, or else the first model with the recorded digest of those that may be meant.

    These are the path in state/, which our runs hold, base_model_name_or_path as in PEFT, and a directory of that name
    beside the adapters or one of the directories around them. LlmkitError if there is none, or `given` is another.
    """
    candidates = [given] if given else [*_recorded_path(directory), config.base]
    if not given and config.base and not os.path.isabs(config.base) and ".." not in Path(config.base).parts:
        candidates += [parent / config.base for parent in directory.absolute().parents[:MAX_PARENTS]]
    hint = "name the model with --base of llmkit average, or put it beside the adapters"
    others, adapters = [], []
    for path in candidates:
        if not path or (not given and not _is_model(path)):
            continue
        if is_adapter(place := resolve_model(path)):  # which may name this one as its base in turn
            adapters += [] if place.samefile(directory) else [path]
            continue
        info = load_info(path)
        if not config.base_digest or _digest_of(tuple(weight_files(info.path))) == config.base_digest:
            return info
        others.append(path)
    if others:
        raise LlmkitError(f"{directory}: {others[0]} has other weights than the model that was adapted", hint)
    if adapters:
        raise LlmkitError(f"{adapters[0]}: the base of the adapters in {directory} holds adapters itself", hint)
    raise LlmkitError(f"{directory}: the adapted model {config.base!r:.200} is not here", hint)


def _recorded_path(directory: Path) -> list[str]:
    if not (file := member(directory, BASE_PATH)).is_file():
        return []
    path = read_json(file).get("path")
    return [path] if isinstance(path, str) and "\0" not in path else []


def _is_model(path: str | Path) -> bool:
    try:
        return resolve_model(path).is_dir()
    except (LlmkitError, OSError):
        return False


def _digest_of(files: tuple[Path, ...]) -> str:
    return _digest_unless_changed(tuple((file, file.stat().st_size, file.stat().st_mtime_ns) for file in files))


@cache
def _digest_unless_changed(files: tuple[tuple[Path, int, int], ...]) -> str:
    return weights_digest(file for file, *_ in files)


def token_ids(value: Any, name: str) -> list[int]:
    """One token id, several or none; LlmkitError for anything else, which is called `name`."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(item) is int and 0 <= item < 1 << 31 for item in ids):
        raise LlmkitError(f"{name} is {value!r:.60}", "it must be a token id or a list of them")
    return ids


def _has_own_head(directory: Path, config: ModelConfig) -> bool:
    """Whether the weights of a tied model hold an output layer that differs from the embedding."""
    if not any((directory / name).is_file() for name in (WEIGHTS, INDEX)):
        return False
    headers = {file: read_header(file) for file in weight_files(directory)}
    names = model_names((name for header in headers.values() for name in header), config)
    family = config.family
    found = {names[name]: (file, entry) for file, header in headers.items() for name, entry in header.items()}
    if family.head not in found or family.embedding not in found:
        return False
    (first, one), (second, other) = found[family.head], found[family.embedding]
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return True
    with open(first, "rb") as head, open(second, "rb") as embedding:
        head.seek(one.offset)
        embedding.seek(other.offset)
        left = one.count * SIZES[one.dtype]
        while left > 0:
            size = min(left, CHUNK)
            if head.read(size) != embedding.read(size):
                return True
            left -= size
    return False


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a directory, sharded or not, in name order."""
    if (weights := member(path, WEIGHTS)).is_file():
        return [weights]
    if (index := member(path, INDEX)).is_file():
        table = read_json(index).get("weight_map")
        values = list(table.values()) if isinstance(table, dict) else []
        names = sorted(set(values)) if all(isinstance(name, str) for name in values) else []
        if not names or any(Path(name).name != name or not name.isprintable() for name in names):
            raise LlmkitError(f"{index}: no usable weight_map", "the file is damaged")
        files = [member(path, name) for name in names]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            more = f" and {len(missing) - 1} more" if missing[1:] else ""
            raise LlmkitError(f"{path}: missing {missing[0]:.200}{more}", "the directory is incomplete")
        return files
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in path.glob(pattern))
    if pickles:
        raise LlmkitError(
            f"{path}: only pickled weights ({pickles[0]})", "pickles can run code; convert them to safetensors first"
        )
    raise LlmkitError(f"{path}: no {WEIGHTS}", "the directory is incomplete")


def read_tokenizer_files(path: Path) -> dict[str, str]:
    """Text of the tokenizer files in a directory by name; empty if it has none."""
    files = {}
    for name in TOKENIZER_FILES:
        file = member(path, name)
        if file.is_file():
            if file.stat().st_size > MAX_TOKENIZER_BYTES:
                raise LlmkitError(
                    f"{file}: larger than {MAX_TOKENIZER_BYTES >> 20} MiB", "this is not a tokenizer file"
                )
            try:
                files[name] = file.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise LlmkitError(f"{file}: invalid UTF-8", "the file is damaged") from error
            if name.endswith(".json") and name != "tokenizer.json":  # the tokenizers library validates that one
                _check_object(file, files[name])
    return files


def _check_object(file: Path, text: str) -> None:
    """LlmkitError if a file's text is not a JSON object."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LlmkitError(f"{file}: not JSON ({error})", "the file is damaged") from error
    if not isinstance(content, dict):
        raise LlmkitError(f"{file}: not a JSON object", "the file is damaged")


def load_tokenizer(files: Mapping[str, str], where: str | Path) -> LoadedTokenizer:
    """The tokenizer (of the `tokenizers` library) in a directory's files; LlmkitError if it is missing or damaged."""
    content = tokenizer_json(files, where)
    return load(content, f"{where}: tokenizer.json is not readable", "the file is damaged or too new")


def check_vocabulary(tokenizer: LoadedTokenizer, vocab_size: int, where: str | Path) -> None:
    """LlmkitError if the tokenizer has ids without an embedding in the model. Added tokens may lack one, as that for
    images in models of text does: it is an error only where a text has them."""
    size = max(tokenizer.get_vocab(with_added_tokens=False).values(), default=-1) + 1
    if size > vocab_size:
        raise LlmkitError(
            f"{where}: the tokenizer has ids up to {size - 1:,}, the model has only {vocab_size:,}",
            "they belong to different models",
        )


def save_description(
    directory: Path,
    config_json: dict[str, Any],
    tokenizer_files: Mapping[str, str],
    stop_ids: list[int] | None = None,
    generation: Mapping[str, Any] | None = None,
) -> None:
    """Write everything in a model directory except the weights; see `save_companions`."""
    write_json(directory / "config.json", config_json)
    save_companions(directory, config_json, tokenizer_files, stop_ids, generation)


def save_companions(
    directory: Path,
    config_json: dict[str, Any],
    tokenizer_files: Mapping[str, str],
    stop_ids: list[int] | None = None,
    generation: Mapping[str, Any] | None = None,
) -> None:
    """Write the tokenizer and generation_config.json of a model with this config.json.

    `generation` is the content of another generation_config.json, whose settings are kept.
    """
    vocabulary = config_json["vocab_size"]
    if "tokenizer.json" in tokenizer_files:
        check_vocabulary(load_tokenizer(tokenizer_files, directory), vocabulary, directory)
    eos = stop_ids or config_json.get("eos_token_id")
    own = {"eos_token_id": eos[0] if isinstance(eos, list) and len(eos) == 1 else eos}
    own |= {name: config_json.get(name) for name in ("bos_token_id", "pad_token_id")}
    settings = dict(generation or {}) | {name: value for name, value in own.items() if value is not None}
    write_json(directory / GENERATION, {name: value for name, value in settings.items() if _is_kept(value)})
    for name, text in with_template_in_both_places(tokenizer_files).items():
        (directory / name).write_text(text, encoding="utf-8")


def _is_kept(value: Any) -> bool:
    """Whether a setting is one, and JSON: Python reads NaN and Infinity too."""
    try:
        return value is not None and bool(json.dumps(value, allow_nan=False))
    except ValueError:
        return False


def with_template_in_both_places(files: Mapping[str, str]) -> dict[str, str]:
    """Tokenizer files with the chat template both in chat_template.jinja, which transformers 5 reads, and in
    tokenizer_config.json, for older readers, and without an auto_map: the code that it names is not here."""
    files = dict(files)
    if "tokenizer_config.json" in files:
        try:
            config = json.loads(files["tokenizer_config.json"])
        except ValueError as error:
            raise LlmkitError(
                f"tokenizer_config.json is not JSON ({error})", "the tokenizer directory is damaged"
            ) from error
        is_changed = config.pop("auto_map", None) is not None or "chat_template.jinja" in files
        if "chat_template.jinja" in files:
            config["chat_template"] = files["chat_template.jinja"]
        elif isinstance(config.get("chat_template"), str):
            files["chat_template.jinja"] = config["chat_template"]
        if is_changed:
            files["tokenizer_config.json"] = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    return files


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write indented JSON with sorted keys. Non-finite numbers are a bug of the caller."""
    assert all(not isinstance(value, float) or math.isfinite(value) for value in content.values())
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
