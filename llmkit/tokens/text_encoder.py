"""Texts to ids, with any Hugging Face tokenizer.json, by the fastest way that gives the ids of the `tokenizers` library.

    encoder = TextEncoder(load_tokenizer_info("tok/"))
    ids, lengths = encoder(["Hello", "world"])          # uint16 or uint32 [tokens], int64 [texts]

Byte-level BPE with one of the four patterns is compiled (bytelevel.py); everything else goes through the library, and so do texts that hold an added
token which has to be found in them, and the first megabytes on a machine where nothing is compiled yet: they are encoded sooner than compiled.
Names of special tokens in a text are text, unless `allow_special`; a model's dropout is off.
"""

from __future__ import annotations

import os
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
from llmkit.shards.tokenizer_info import TokenizerInfo

NEVER = -1
MARKS = 200  # beginnings of added tokens; looking for more takes longer than the library does for all
UNCOMPILED = 1 << 22  # characters for which the library is started rather than a compiler


class TextEncoder:
    """Encodes texts; one in a process, since it keeps the words that it met. `reference` is made when it is needed."""

    def __init__(self, tokenizer: TokenizerInfo, *, allow_special: bool = False, compiled: bool | None = None) -> None:
        """`compiled`: compile at once (True), never (False), or when it is worth it. LlmkitError where tokenizer.json does not load."""
        if "tokenizer.json" not in tokenizer.files:
            raise LlmkitError("the shards do not carry their tokenizer", "name its directory with -t")
        self._info, self._special = tokenizer, allow_special
        self.dtype: type[np.unsignedinteger[Any]] = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
        self._content: dict[str, Any] = orjson.loads(tokenizer.files["tokenizer.json"])
        self._reference: Any = None
        self._fast: Any = None
        self._patience = {None: UNCOMPILED, True: 0, False: NEVER}[compiled]
        normaliser = self._content.get("normalizer")
        self._normalised = normaliser is not None
        if self._normalised and normaliser != {"type": "NFC"}:
            self._patience = NEVER
        # Added tokens that are found in a text, by their first two characters: few beginnings to look for.
        self._marks: dict[str, list[str]] = defaultdict(list)
        for token in self._content.get("added_tokens") or []:
            if allow_special or not token.get("special"):
                for name in {token["content"], self._normal(token["content"])}:
                    self._marks[name[:2]].append(name)
        if len(self._marks) > MARKS:
            self._patience = NEVER

    @property
    def reference(self) -> Any:
        """The tokenizer of the `tokenizers` library."""
        if self._reference is None:
            self._reference = load(self._info, allow_special=self._special)
        return self._reference

    def __call__(self, texts: Sequence[str], end: int = -1) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Ids of all texts, flat, the id `end` behind each (-1: nothing), and how many each has."""
        if not self._ready(texts):
            return self._by_library(texts, end)
        normal = [self._normal(text) for text in texts]
        apart = (
            [i for i in range(len(texts)) if self._marked(texts[i]) or self._marked(normal[i])] if self._marks else []
        )
        whole = [text.encode() for text in normal]
        for i in apart:
            whole[i] = b""
        ids, lengths = self._fast.encode(whole, end)
        ids = ids.astype(self.dtype)
        if apart:
            pieces = np.split(ids, np.cumsum(lengths)[:-1])
            for i in apart:
                pieces[i], lengths[i : i + 1] = self._by_library([texts[i]], end)
            ids = np.concatenate(pieces)
        return ids, lengths

    def _by_library(self, texts: Sequence[str], end: int) -> tuple[NDArray[Any], NDArray[np.int64]]:
        with _failing("the tokenizer does not encode", "its tokenizer.json is incomplete"):
            behind = [end] if end >= 0 else []
            found = [item.ids + behind for item in self.reference.encode_batch_fast(texts, add_special_tokens=False)]
        lengths = np.array([len(ids) for ids in found], np.int64)
        return np.fromiter(chain.from_iterable(found), self.dtype, int(lengths.sum())), lengths

    def _ready(self, texts: Sequence[str]) -> bool:
        """Whether these texts go the fast way; compiles it where that is due."""
        if self._fast is None and self._patience != NEVER:
            from llmkit.kernels import cold

            if self._patience and cold("encode.encode"):
                self._patience = max(0, self._patience - sum(map(len, texts)))
                return False
            from llmkit.tokens.bytelevel import ByteLevel

            self._fast = ByteLevel.of(self._content)
            if self._fast is not None:  # all but the words: what the library refuses is refused on any machine
                model = self._content["model"] | {"vocab": {}, "merges": []}
                text = orjson.dumps(self._content | {"model": model}).decode()
                load(replace(self._info, files={"tokenizer.json": text}))
            else:
                self._patience = NEVER
        return self._fast is not None

    def _normal(self, text: str) -> str:
        """The text as the tokenizer's normaliser leaves it; that of NFC leaves ASCII alone."""
        if not self._normalised or text.isascii():
            return text
        return str(self.reference.normalizer.normalize_str(text))

    def _marked(self, text: str) -> bool:
        return any(start in text and any(name in text for name in names) for start, names in self._marks.items())


def load(info: TokenizerInfo, *, allow_special: bool = False) -> Any:
    """The library's tokenizer for `info`; LlmkitError where its tokenizer.json does not load, or is not there."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from tokenizers import Tokenizer

    if "tokenizer.json" not in info.files:
        raise LlmkitError("the shards do not carry their tokenizer", "name its directory with -t")
    with _failing("tokenizer.json does not load", "check it with the tokenizers library"):
        tokenizer = Tokenizer.from_str(info.files["tokenizer.json"])
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None):  # the same text has to give the same ids
        tokenizer.model.dropout = None
    tokenizer.encode_special_tokens = not allow_special
    return tokenizer


@contextmanager
def _failing(message: str, hint: str) -> Iterator[None]:
    """What the library raises as an LlmkitError: bare Exceptions, and panics, which are none."""
    try:
        yield
    except (LlmkitError, KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        reason = str(error).splitlines()[0] if str(error) else "no message"
        raise LlmkitError(f"{message}: {reason}", hint) from None
