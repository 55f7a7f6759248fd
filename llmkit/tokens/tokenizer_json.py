"""The `tokenizers` library's tokenizers, loaded and used in one place.

    tokenizer = load(text, "model/: tokenizer.json")     # text of a tokenizer.json
    tokenizer.encode("Hello", add_special_tokens=False).ids

A tokenizer.json is foreign: its regular expressions may take exponential time, its steps may double a text each, and
the library panics on some of its contents. What consists of well-known steps whose product of growth is bounded, and a
model whose time per character is, runs in this process. Anything else runs in a process of its own, which is killed
when a text takes too much time or memory (engine.guarded); that costs about 0.1 ms per text. So do texts of more than
LONG characters, since no signal is handled while the library runs. Either way the library's errors and panics become
LlmkitError.
"""

from __future__ import annotations

import atexit
import faulthandler
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from math import prod
from typing import Any, cast

import orjson

from llmkit.errors import LlmkitError
from llmkit.tokens.pretokenize import PATTERNS

SECONDS = 10.0  # per text, and per million characters
MEMORY = 1 << 30  # bytes, beyond 16 times the size of tokenizer.json
MAX_RESULT = 1 << 24  # tokens or characters that are made of a text, and of each million characters
MAX_STEPS = 64  # of all normalisers, pre-tokenizers, decoders and post-processors
REPEATED = 8  # patterns and replacements
LONG = 1 << 20  # characters or tokens
MAX_GROWTH = 4  # of all replacements together
MAX_PREPENDED = 16  # characters, before each part of a text between added tokens
# Characters. At a position of a text WordPiece tries each end of the word, and Unigram each piece that starts there:
# at most 6 and 5 s per million characters. Published tokenizers have words of 100, and pieces of 16 or a few more.
MAX_WORD, MAX_PIECE = 100, 64
HINT = "leave the text out, or use another tokenizer"
# Steps in linear time, whose result is a few times as long as their input.
PLAIN = frozenset(
    "BPEDecoder BertNormalizer BertPreTokenizer BertProcessing ByteFallback ByteLevel CTC CharDelimiterSplit Digits "
    "Fuse Lowercase Metaspace NFC NFD NFKC NFKD Nmt Prepend Punctuation Replace RobertaProcessing Sequence Split Strip "
    "StripAccents TemplateProcessing UnicodeScripts Whitespace WhitespaceSplit WordPiece".split()
)
PARTS = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}
GPT4 = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
REGEXES = {pattern.regex for pattern in PATTERNS.values()} | {GPT2, GPT4}


@dataclass(frozen=True, slots=True)
class Encoded:
    """The encoding of a text: ids, and the characters [start, stop) of each."""

    ids: list[int]
    offsets: list[tuple[int, int]]


class LoadedTokenizer:
    """A `tokenizers.Tokenizer` without truncation, padding and dropout, whose methods raise LlmkitError only."""

    def __init__(self, text: str, name: str, hint: str, allow_special: bool | None) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self._name = name.rpartition(": ")[0]
        self._guard = None if is_plain(text, name) else _Guard(text)
        self._guard_of_long = self._guard or _Guard(text)
        with _named(name, hint):
            if self._guard:
                self._guard.ask([("load", (), {})])
            self._library = _load(text)
        if allow_special is not None:
            self.encode_special_tokens = not allow_special

    def __getattr__(self, name: str) -> Any:
        if name == "_library":  # which did not load
            raise AttributeError(name)
        return getattr(self._library, name)

    @property
    def encode_special_tokens(self) -> bool:
        """Whether names of special tokens in a text are ordinary text."""
        return bool(self._library.encode_special_tokens)

    @encode_special_tokens.setter
    def encode_special_tokens(self, value: bool) -> None:
        self._library.encode_special_tokens = value
        self._guard_of_long.special = value

    @property
    def normalizer(self) -> Any:
        """The library's normaliser; guarded where the tokenizer is."""
        return self if self._guard and self._library.normalizer else self._library.normalizer

    @property
    def pre_tokenizer(self) -> Any:
        """The library's pre-tokenizer; guarded where the tokenizer is."""
        return self if self._guard and self._library.pre_tokenizer else self._library.pre_tokenizer

    def encode(self, text: str, *args: Any, **options: Any) -> Any:
        return self._run("encode", [text], *args, **options)[0]

    def encode_batch_fast(self, texts: Sequence[str], **options: Any) -> Any:
        if self._guard_of(texts):
            return self._run("encode", texts, **options)
        with self._errors():
            return self._library.encode_batch_fast(texts, **options)

    def decode(self, ids: Sequence[int], *args: Any, **options: Any) -> str:
        return str(self._run("decode", [ids], *args, **options)[0])

    def decode_batch(self, sequences: Sequence[Sequence[int]], *args: Any, **options: Any) -> list[str]:
        return self._run("decode", sequences, *args, **options)

    def normalize_str(self, text: str) -> str:
        return str(self._run("normalize_str", [text])[0])

    def pre_tokenize_str(self, text: str) -> Any:
        return self._run("pre_tokenize_str", [text])[0]

    def _run(self, method: str, items: Sequence[Any], *args: Any, **options: Any) -> list[Any]:
        with self._errors():
            if guard := self._guard_of(items):
                return guard.ask([(method, (item, *args), options) for item in items])
            function = getattr(self._library, method)
            return [function(item, *args, **options) for item in items]

    def _guard_of(self, items: Sequence[Any]) -> _Guard | None:
        return self._guard_of_long if self._guard or any(len(item) > LONG for item in items) else None

    def _errors(self) -> Any:
        where = f"{self._name}: " if self._name else ""
        return _named(f"{where}the tokenizer fails to encode", HINT)


def load(text: str, name: str, hint: str, allow_special: bool | None = None) -> LoadedTokenizer:
    """The tokenizer of a tokenizer.json. `name` says in errors what does not load; `allow_special`: whether names of
    special tokens in a text become those (None: as the file says). Raises LlmkitError.
    """
    return LoadedTokenizer(text, name, hint, allow_special)


def is_plain(text: str, name: str) -> bool:
    """Whether a tokenizer.json consists of well-known steps. LlmkitError where it has too many."""
    count, plain = _examine(text)
    if count > MAX_STEPS:
        raise LlmkitError(f"{name}: it has {count:,} steps, more than {MAX_STEPS}", "it is not a usable tokenizer")
    return plain


@lru_cache(maxsize=4)
def _examine(text: str) -> tuple[int, bool]:
    """The number of steps in a tokenizer.json, and whether all are well-known."""
    try:
        content = orjson.loads(text)
        parts = {part: list(_steps(content.get(part), inner)) for part, inner in PARTS.items()}
        count = sum(map(len, parts.values())) + len(list(_steps(content.get("post_processor"), "processors")))
        return count, all(map(_are_plain, parts.values())) and _has_short_words(content["model"])
    except (LookupError, TypeError, AttributeError, ValueError):
        return 0, False  # the library reports how it is damaged


def _steps(step: Any, inner: str) -> Iterator[dict[str, Any]]:
    """A step and those in it, at any depth, up to a few more than are allowed."""
    rest = [step] if step else []
    for _ in range(MAX_STEPS + 2):
        if not rest:
            return
        yield (step := rest.pop())
        rest += step.get(inner) or []


def _are_plain(steps: list[dict[str, Any]]) -> bool:
    counts = Counter(step["type"] for step in steps)
    several = {"Replace", "Split", "Sequence"}
    return (
        PLAIN.issuperset(counts)
        and all(count <= (REPEATED if kind in several else 1) for kind, count in counts.items())
        and all(_is_plain_pattern(step) for step in steps if step["type"] in ("Replace", "Split"))
        and prod(map(_growth, steps)) <= MAX_GROWTH
        and all(len(step.get("prepend", "")) <= MAX_PREPENDED for step in steps)
    )


def _is_plain_pattern(step: dict[str, Any]) -> bool:
    pattern = step["pattern"]
    if "Regex" in pattern:
        return step["type"] == "Split" and pattern["Regex"] in REGEXES
    return bool(pattern["String"])


def _growth(step: dict[str, Any]) -> float:
    """How many times as long a replacement makes a text, at most."""
    if step["type"] != "Replace":
        return 1
    return max(1, len(step["content"]) / len(step["pattern"]["String"]))


def _has_short_words(model: dict[str, Any]) -> bool:
    kind = model.get("type") or ("BPE" if "merges" in model else "")  # as the library guesses it
    if kind == "Unigram":
        return max(len(piece[0]) for piece in model["vocab"]) <= MAX_PIECE
    if kind == "WordPiece":
        return (model.get("max_input_chars_per_word") or 0) <= MAX_WORD
    # With a prefix of subwords, the library panics on some merges.
    return kind == "WordLevel" or (kind == "BPE" and not model.get("continuing_subword_prefix"))


def _load(text: str) -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(text)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None):  # the same text must always give the same ids
        tokenizer.model.dropout = None
    return tokenizer


@contextmanager
def _named(message: str, hint: str) -> Iterator[None]:
    """Turn what the library raises into LlmkitError: bare Exceptions, and panics, which derive from BaseException."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError, LlmkitError):
        raise
    except _Stopped as error:
        raise LlmkitError(f"{message}: {error}", hint) from None
    except BaseException as error:
        raise LlmkitError(f"{message}: {_reason(error)}", hint) from None


def _reason(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else "no message"


class _Stopped(Exception):
    """What a guarded tokenizer reports."""


class _Guard:
    """A tokenizer in a process of its own, which starts with the first request and again after each failure."""

    def __init__(self, text: str) -> None:
        self.special: bool | None = None
        self._text = text
        self._requests: list[Any] = []
        self._results: dict[tuple[int, int], Any] = {}  # by process and size of the texts

    def ask(self, calls: Sequence[tuple[str, tuple[Any, ...], dict[str, Any]]]) -> list[Any]:
        """Results of (method, arguments, options), in order. Raises _Stopped for the first that fails."""
        from llmkit.engine.guarded import Failure, guarded_map

        longest = max((len(args[0]) for _, args, _ in calls if args), default=0)
        size = (longest >> 20 | len(self._text) >> 24).bit_length()
        seconds = SECONDS * (1 << size)
        key = os.getpid(), size  # a forked worker needs a process of its own
        if key not in self._results:
            work, memory = partial(_answer, self._text), MEMORY + 16 * len(self._text)
            self._results[key] = answers = cast(
                Any, guarded_map(work, self._batches(), seconds=seconds, memory=memory << size)
            )
            atexit.register(answers.close)  # while the interpreter is intact
        self._requests = [(self.special, *call) for call in calls]
        results: list[Any] = []
        while len(results) < len(calls):
            results += next(self._results[key])
        for result in results:
            if isinstance(result, Failure):
                late = result.reason == "time limit"
                raise _Stopped(f"stopped, as it takes {f'more than {seconds:.0f} s' if late else 'too much memory'}")
            if isinstance(result, _Stopped):
                raise result
        return results

    def _batches(self) -> Iterator[list[Any]]:
        """What was asked, and nothing while the answers are awaited."""
        while True:
            batch, self._requests = self._requests, []
            yield batch


_answering: Any = None  # in the process of a guard: its tokenizer


def _answer(text: str, request: tuple[bool | None, str, tuple[Any, ...], dict[str, Any]]) -> Any:
    """Runs in the process of a guard."""
    global _answering
    special, method, args, options = request
    try:
        if _answering is None:
            faulthandler.disable()
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # where the library prints panics
            _answering = _load(text)
        if special is not None:
            _answering.encode_special_tokens = special
        if method == "load":
            return True  # guarded_map drops None
        part = {"normalize_str": "normalizer", "pre_tokenize_str": "pre_tokenizer"}.get(method)
        result = getattr(getattr(_answering, part) if part else _answering, method)(*args, **options)
        if len(result) > MAX_RESULT + len(args[0]) * MAX_RESULT // (1 << 20):
            return _Stopped("stopped, as it makes too much of a text")
        return Encoded(result.ids, result.offsets) if method == "encode" else result
    except MemoryError:
        raise
    except BaseException as error:
        return _Stopped(_reason(error))
