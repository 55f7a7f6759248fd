"""Encode texts with any Hugging Face tokenizer.json, by the fastest path that gives the ids of the `tokenizers`
library.

    encoder = TextEncoder(load_tokenizer_info("tok/"))
    ids, lengths = encoder(["Hello", "world"])          # uint16 or uint32 [tokens], int64 [texts]

Byte-level BPE with one of the four patterns runs compiled (bytelevel.py). Everything else goes through the
library, as do texts that contain an added token to be matched, and the first megabytes on a machine without
compiled kernels: encoding them takes less time than compiling. Names of special tokens in a text are ordinary
text, unless `allow_special`; so are those of the end-of-text, beginning-of-text and padding tokens, however
tokenizer.json declares them. A model's dropout is disabled.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from llmkit.errors import LlmkitError
from llmkit.shards.tokenizer_info import TokenizerInfo, added_ids
from llmkit.tokens.tokenizer_json import LoadedTokenizer, load

NEVER = -1  # library quota of a tokenizer that is never compiled
MAX_PREFIXES = 200  # prefixes of added tokens; searching for more takes longer than the library does in total
CANNOT_ENCODE = "the tokenizer fails to encode", "its tokenizer.json is incomplete"
DOES_NOT_LOAD = "tokenizer.json does not load", "check it with the tokenizers library"
UNCOMPILED = 1 << 22  # characters that the library encodes before anything is compiled
UNREACHABLE = "\U0010ffff"  # a noncharacter, which no text contains; in front of names that models must not find


class TextEncoder:
    """Encodes texts. Use one per process: it caches the pieces it has seen. `reference` is created on demand."""

    def __init__(self, tokenizer: TokenizerInfo, *, allow_special: bool = False, compiled: bool | None = None) -> None:
        """`compiled`: compile at once (True), never (False), or when it pays off. LlmkitError where
        tokenizer.json does not load.
        """
        if "tokenizer.json" not in tokenizer.files:
            raise LlmkitError("the shards do not carry their tokenizer", "name its directory with -t")
        self._special = allow_special
        self.dtype: type[np.unsignedinteger[Any]] = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
        text = tokenizer.files["tokenizer.json"] if allow_special else _without_special_names(tokenizer)
        self._info = replace(tokenizer, files={"tokenizer.json": text})
        self.content: dict[str, Any] = orjson.loads(text)
        self._reference: Any = None
        self._fast: Any = None
        self._library_quota = {None: UNCOMPILED, True: 0, False: NEVER}[compiled]
        normaliser = self.content.get("normalizer")
        self._normalizes = normaliser is not None
        if self._normalizes and normaliser != {"type": "NFC"}:
            self._library_quota = NEVER
        # Added tokens that are matched in a text, by their first two characters, which gives few prefixes to
        # search for.
        self._added_tokens: dict[str, list[str]] = defaultdict(list)
        for token in self.content.get("added_tokens") or []:
            if allow_special or not token.get("special"):
                for name in {token["content"], self.normalize(token["content"])}:
                    self._added_tokens[name[:2]].append(name)
        if len(self._added_tokens) > MAX_PREFIXES:
            self._library_quota = NEVER

    @property
    def reference(self) -> Any:
        """The `tokenizers` library's tokenizer."""
        if self._reference is None:
            self._reference = load_tokenizer(self._info, allow_special=self._special)
        return self._reference

    def __call__(self, texts: Sequence[str], end: int = -1) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Ids of all texts, flat, each followed by the id `end` (-1: none); and the number of ids of each text."""
        if not self._ready(texts):
            return self._by_library(texts, end)
        normal = [self.normalize(text) for text in texts]
        for_library = (
            [i for i in range(len(texts)) if self._has_added(texts[i]) or self._has_added(normal[i])]
            if self._added_tokens
            else []
        )
        encoded = [text.encode() for text in normal]
        for i in for_library:
            encoded[i] = b""
        ids, lengths = self._fast.encode(encoded, end)
        ids = ids.astype(self.dtype)
        if for_library:
            pieces = np.split(ids, np.cumsum(lengths)[:-1])
            for i in for_library:
                pieces[i], lengths[i : i + 1] = self._by_library([texts[i]], end)
            ids = np.concatenate(pieces)
        return ids, lengths

    def _by_library(self, texts: Sequence[str], end: int) -> tuple[NDArray[Any], NDArray[np.int64]]:
        with library_errors(*CANNOT_ENCODE):
            suffix = [end] if end >= 0 else []
            encoded = [item.ids + suffix for item in self.reference.encode_batch_fast(texts, add_special_tokens=False)]
        lengths = np.array([len(ids) for ids in encoded], np.int64)
        return np.fromiter(chain.from_iterable(encoded), self.dtype, int(lengths.sum())), lengths

    def _ready(self, texts: Sequence[str]) -> bool:
        """Whether to use the compiled path for these texts. Compiles it when it is due."""
        if self._fast is None and self._library_quota != NEVER:
            from llmkit.kernels import cold

            if self._library_quota and cold("encode.encode"):
                self._library_quota = max(0, self._library_quota - sum(map(len, texts)))
                return False
            from llmkit.tokens.bytelevel import ByteLevelEncoder

            self._fast = ByteLevelEncoder.from_json(self.content)
            if self._fast is not None:  # load all but the vocabulary: what the library rejects is rejected everywhere
                model = self.content["model"] | {"vocab": {}, "merges": []}
                text = orjson.dumps(self.content | {"model": model}).decode()
                load_tokenizer(replace(self._info, files={"tokenizer.json": text}))
            else:
                self._library_quota = NEVER
        return self._fast is not None

    def normalize(self, text: str) -> str:
        """The text after the tokenizer's normaliser; NFC does not change ASCII."""
        if not self._normalizes or text.isascii():
            return text
        return str(self.reference.normalizer.normalize_str(text))

    def _has_added(self, text: str) -> bool:
        """Whether a text contains an added token."""
        return any(
            prefix in text and any(name in text for name in names) for prefix, names in self._added_tokens.items()
        )


def _without_special_names(info: TokenizerInfo) -> str:
    """The tokenizer.json in which special names in texts are text: the tokens that `info` names are special, and models
    that look words or pieces up in their vocabulary do not find special ones there. For encoding only.
    """
    text = info.files["tokenizer.json"]
    try:
        content = orjson.loads(text)
        ids, model = added_ids(content), content["model"]
        added = content.get("added_tokens") or []
        roles = {info.eos_id, info.bos_id, info.pad_id}
        plain = [token for token in added if not token.get("special") and ids.get(token["content"]) in roles]
        for token in plain:
            token["special"] = True
        vocabulary, is_list = model["vocab"], isinstance(model["vocab"], list)
        hidden = {token["content"] for token in added if token.get("special")}
        if is_list:
            hidden &= {entry[0] for i, entry in enumerate(vocabulary) if i != model.get("unk_id")}
            model["vocab"] = [[UNREACHABLE * (name in hidden) + name, score] for name, score in vocabulary]
        elif model.get("type", "BPE") != "BPE":  # whose merges do not form such a name
            hidden &= vocabulary.keys() - {model.get("unk_token")}
            model["vocab"] = {UNREACHABLE * (name in hidden) + name: id for name, id in vocabulary.items()}
        else:
            hidden = set()
        content["added_tokens"] = [token for token in added if token["content"] not in hidden]
    except (LookupError, TypeError, AttributeError, ValueError):
        return text  # `load_tokenizer` reports how it is damaged
    return orjson.dumps(content).decode() if plain or hidden else text


def load_tokenizer(info: TokenizerInfo, *, allow_special: bool = False) -> LoadedTokenizer:
    """The `tokenizers` library's tokenizer for `info`. Raises LlmkitError where its tokenizer.json is missing
    or does not load.
    """
    if "tokenizer.json" not in info.files:
        raise LlmkitError("the shards do not carry their tokenizer", "name its directory with -t")
    message, hint = DOES_NOT_LOAD
    return load(info.files["tokenizer.json"], f"{info.name}: {message}" if info.name else message, hint, allow_special)


@contextmanager
def library_errors(message: str, hint: str) -> Iterator[None]:
    """Turn what the library raises into LlmkitError: bare Exceptions, and panics, which derive from BaseException."""
    try:
        yield
    except (LlmkitError, KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        reason = str(error).splitlines()[0] if str(error) else "no message"
        raise LlmkitError(f"{message}: {reason}", hint) from None
