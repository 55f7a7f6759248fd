"""The facts about a tokenizer that token shards record: its digest, the size of its vocabulary, its special ids.

    read_tokenizer("tok/")  ->  TokenizerInfo(digest="xxh3:...", vocab_size=8192, eos_id=0, ...)

Reads a tokenizer directory, a model directory or run, or a tokenizer.json; shards/reader.py reads shards that
carry their tokenizer too. Two tokenizers are the same if they give the same ids: the digest covers the model,
added tokens, normalizer and pre-tokenizer of tokenizer.json in a canonical form, and neither its layout nor the
chat template. Cost: one parse of tokenizer.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import xxhash
from numpy.typing import NDArray

from llmkit.errors import LlmkitError, UsageError, suggestion
from llmkit.io.record import slot_of
from llmkit.io.run_layout import final_model, member, regular
from llmkit.shards.foreign_vocabulary import name_format

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
MAX_FILE_BYTES = 256 << 20
MAX_ID = 1 << 25  # a file of MAX_FILE_BYTES cannot hold as many tokens
MODELS = ("BPE", "Unigram", "WordPiece", "WordLevel")

# Tokens that end a turn rather than a text. Chat models name them as their eos_token, but documents end with
# END_OF_TEXT.
END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|end_of_turn|>")
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|end▁of▁sentence|>", "<｜end▁of▁sentence｜>")


@dataclass(frozen=True, slots=True)
class TokenizerInfo:
    """A tokenizer: digest, ids (`vocab_size` is the largest plus one), its files by name (empty where unknown), and the
    path for messages.
    """

    digest: str
    vocab_size: int
    eos_id: int
    bos_id: int | None = None
    pad_id: int | None = None
    files: dict[str, str] = field(default_factory=dict, compare=False, repr=False)
    name: str = field(default="", compare=False, repr=False)

    def header(self) -> dict[str, Any]:
        """The record of the tokenizer in every shard."""
        return {
            "digest": self.digest,
            "vocab_size": self.vocab_size,
            "eos_id": self.eos_id,
            "bos_id": self.bos_id,
            "pad_id": self.pad_id,
        }

    @classmethod
    def from_header(cls, header: Any, files: dict[str, str], name: str) -> TokenizerInfo:
        """The tokenizer of a shard's record; LlmkitError where it is malformed. `name` is for messages."""
        try:
            digest, sizes = header["digest"], [header["vocab_size"], header["eos_id"]]
            optional = [header.get("bos_id"), header.get("pad_id")]
            if not isinstance(digest, str) or not all(isinstance(n, int) and n >= 0 for n in sizes):
                raise TypeError
            if not all(n is None or isinstance(n, int) for n in optional) or not 0 < sizes[0] <= 1 << 32:
                raise TypeError
        except (KeyError, TypeError, AttributeError):
            raise LlmkitError(f"{name}: malformed tokenizer record", "the file was not written by llmkit") from None
        return cls(digest, sizes[0], sizes[1], optional[0], optional[1], files, name)


def read_tokenizer(path: str | Path, eos: str | None = None) -> TokenizerInfo:
    """The tokenizer at `path`: a directory with tokenizer.json, a run (that of its final model), or the file itself.
    `eos` names its end-of-text token, instead of what it names itself.

    LlmkitError where there is none, or a malformed one.
    """
    path = Path(path)
    if not path.exists():
        raise LlmkitError(
            f"{path}: no such tokenizer",
            "name a directory or a tokenizer.json (nothing is fetched from a hub); llmkit vocab trains one",
        )
    named = None if (path / "tokenizer.json").is_file() else name_format(path)
    if named:
        raise LlmkitError(f"{path}: {named[0]}, not a tokenizer.json", f"convert it: {named[1]}")
    if path.is_file():
        return parse_tokenizer(with_eos({"tokenizer.json": _read(path)}, eos), str(path), eos)
    directory = path if (path / "tokenizer.json").is_file() else final_model(path)
    if not (directory / "tokenizer.json").is_file():
        raise LlmkitError(f"{path}: no tokenizer.json in this directory", "name a tokenizer or model directory")
    files = {name: _read(file) for name in TOKENIZER_FILES if (file := member(directory, name)).is_file()}
    return parse_tokenizer(with_eos(files, eos), str(path), eos)


def with_eos(files: dict[str, str], eos: str | None, lineage: dict[str, Any] | None = None) -> dict[str, str]:
    """The files of a tokenizer in which `eos` is the end-of-text token (None: as it is), with a lineage record.

    UsageError where the tokenizer has no such token.
    """
    if eos is None and lineage is None:
        return files
    config = _object(files.get("tokenizer_config.json", "{}"), "tokenizer_config.json")
    if eos is not None:
        content = _object(files.get("tokenizer.json", ""), "tokenizer.json")
        names = {token.get("content") for token in content.get("added_tokens") or [] if isinstance(token, dict)}
        if eos not in names and eos not in (content.get("model") or {}).get("vocab", {}):
            raise UsageError(f"--eos {eos!r} is not a token of the tokenizer", suggestion(eos, filter(None, names)))
        config["eos_token"] = eos
    config |= {"llmkit": lineage} if lineage else {}
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    return files | {"tokenizer_config.json": text}


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise LlmkitError(
                f"{path}: over {MAX_FILE_BYTES >> 20} MiB, too large for a tokenizer file", "check the path"
            )
        return path.read_bytes().decode()
    except OSError as error:
        raise LlmkitError(f"{path}: {error.strerror}", "check the path and its permissions") from error
    except UnicodeDecodeError as error:
        raise LlmkitError(f"{path}: invalid UTF-8 (byte {error.start})", "the file is damaged") from error


def tokenizer_json(files: Mapping[str, str], name: str | Path) -> str:
    """The text of tokenizer.json; LlmkitError if the directory `name` has none."""
    if "tokenizer.json" not in files:
        hint = "copy it into the directory, or make it: see `llmkit vocab convert --help`"
        raise LlmkitError(f"{name}: no tokenizer.json", hint)
    return files["tokenizer.json"]


def parse_tokenizer(files: dict[str, str], name: str, eos: str | None = None) -> TokenizerInfo:
    """The tokenizer in `files` (name -> text).

    LlmkitError where it is malformed or has no end-of-text token, which is `eos` if given. `name` is for messages.
    """
    content = _object(tokenizer_json(files, name), f"{name}: tokenizer.json")
    model = content.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    added = content.get("added_tokens") or []
    malformed = LlmkitError(f"{name}: tokenizer.json is malformed", "it was not written by the tokenizers library")
    if not isinstance(model, dict) or not isinstance(vocabulary, (dict, list)) or not isinstance(added, list):
        raise malformed
    if model.get("type", "BPE") not in MODELS:
        raise LlmkitError(f"{name}: unknown tokenizer model {model['type']!r}", "known: " + ", ".join(MODELS))
    if isinstance(vocabulary, dict):
        ids = dict(vocabulary)
    elif all(isinstance(entry, list) and entry and isinstance(entry[0], str) for entry in vocabulary):
        ids = {entry[0]: i for i, entry in enumerate(vocabulary)}
    else:
        raise malformed
    for token in added:
        if not isinstance(token, dict) or not isinstance(token.get("content"), str):
            raise malformed
        if type(token.get("id")) is not int:
            raise malformed
    if not ids or not all(type(i) is int and 0 <= i < MAX_ID for i in ids.values()):
        raise malformed
    ids |= added_ids(content)
    config = _object(files.get("tokenizer_config.json", "{}"), f"{name}: tokenizer_config.json")
    special = _object(files.get("special_tokens_map.json", "{}"), f"{name}: special_tokens_map.json")

    def named(role: str) -> str | None:
        value = config.get(role) or special.get(role)
        text = value.get("content") if isinstance(value, dict) else value
        return text if isinstance(text, str) and text in ids else None

    ends = [eos] if eos in ids else []
    ends += [token for token in (named("eos_token"),) if token and token not in END_OF_TURN]
    ends += [token for token in END_OF_TEXT if token in ids]
    ends += [token for token in (named("eos_token"),) if token]
    if not ends:
        raise LlmkitError(
            f"{name}: the tokenizer has no end-of-text token",
            f"tokenize --eos NAME, or set eos_token in its tokenizer_config.json{_special_names(added)}",
        )
    bos, pad = named("bos_token"), named("pad_token")
    return TokenizerInfo(
        _identity(content, name),
        max(ids.values()) + 1,
        ids[ends[0]],
        ids[bos] if bos else None,
        ids[pad] if pad else None,
        files,
        name,
    )


def _special_names(added: list[dict[str, Any]]) -> str:
    names = [str(token["content"]) for token in added if token.get("special")][:8]
    return f" (its special tokens: {' '.join(names)})" if names else ""


def read_record(path: str) -> Any:
    """The lineage record in a tokenizer_config.json, valid or not; None where there is none.

    Raises UnreadableRecordError.
    """
    return slot_of(regular(Path(path)).read_bytes(), json.loads, path)


def added_ids(content: dict[str, Any]) -> dict[str, int]:
    """The ids of added tokens in a tokenizer.json, as the library assigns them.

    Tokens in the model's vocabulary keep its id; others are numbered after it, whatever id the file gives them.
    """
    vocabulary = content["model"]["vocab"]
    model_ids = vocabulary if isinstance(vocabulary, dict) else {entry[0]: i for i, entry in enumerate(vocabulary)}
    ids: dict[str, int] = {}
    next_id = len(vocabulary)
    for name in (token["content"] for token in content.get("added_tokens") or []):
        if name and name not in ids:
            ids[name] = model_ids.get(name, next_id)
            next_id += name not in model_ids
    return ids


def token_bytes(files: Mapping[str, str]) -> NDArray[np.int64] | None:
    """Bytes of text for each id of a byte-level tokenizer, 0 for added tokens, int64 [ids]; None for other tokenizers.

    Byte-level vocabularies write each byte as one character (GPT-2), so the length of a token in bytes is that
    of its name.
    """
    try:
        content = _object(files.get("tokenizer.json", "{}"), "tokenizer.json")
        kinds = [content.get(part) or {} for part in ("pre_tokenizer", "decoder")]
        kinds += [inner for kind in kinds for inner in kind.get("pretokenizers") or kind.get("decoders") or []]
        vocabulary = content["model"]["vocab"]
        if not any(kind.get("type") == "ByteLevel" for kind in kinds) or not isinstance(vocabulary, dict):
            return None
        added = added_ids(content)
        lengths = np.zeros(max([*vocabulary.values(), *added.values()]) + 1, np.int64)
        lengths[list(vocabulary.values())] = [len(token) for token in vocabulary]
    except (LlmkitError, AttributeError, KeyError, TypeError, ValueError):
        return None  # a malformed tokenizer is refused where it is loaded
    lengths[list(added.values())] = 0
    return lengths


def _object(text: str, name: str) -> dict[str, Any]:
    try:
        content = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise LlmkitError(f"{name} is not valid JSON ({error})", "the file is damaged") from None
    if not isinstance(content, dict):
        raise LlmkitError(f"{name} is not a JSON object", "the file is damaged")
    return content


def _identity(content: dict[str, Any], name: str) -> str:
    """xxh3-128 of the parts that decide the ids.

    Merges are "a b" or ["a", "b"], depending on the version of the library.
    """
    model = dict(content["model"])
    merges = model.get("merges")
    if isinstance(merges, list):
        model["merges"] = [
            " ".join(m) if isinstance(m, list) and all(isinstance(p, str) for p in m) else m for m in merges
        ]
    parts = {"model": model} | {key: content.get(key) for key in ("added_tokens", "normalizer", "pre_tokenizer")}
    try:
        text = orjson.dumps(parts, option=orjson.OPT_SORT_KEYS)
    except TypeError as error:  # orjson reads deeper nesting than it writes
        raise LlmkitError(
            f"{name}: tokenizer.json is nested too deeply", "it was not written by the tokenizers library"
        ) from error
    return "xxh3:" + xxhash.xxh3_128_hexdigest(text)
