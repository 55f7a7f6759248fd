"""Add tokens to a byte-level BPE tokenizer whose model goes on to be trained: new merges from a domain's text, or whole words from a list.

Old ids keep their meaning, new ones follow the last. New merges rank behind all old ones, and an old merge never takes a new token: so a piece is first
encoded as it always was, and what `learn` counts is exactly what the merged tokenizer will meet: pairs of neighbours among the old tokens of
each distinct piece of the text, most frequent pair first, ties by lower ids, as in training (Sennrich et al., arXiv:1508.07909). The words of a list become
added tokens, found in a text where no letter or digit stands beside them; the space before one stays a token of its own.

A text may be encoded in other ids than before, of which there are fewer; what the old ids mean to the model does not change.

Memory grows with the number of distinct pieces, time with the merges' occurrences in them; pieces of over `MAX_PIECE` bytes are no words and are left out.

    llmkit vocab extend tok/ domain.jsonl.zst --add 1k -o tok2/
"""

from __future__ import annotations

import heapq
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import orjson

from llmkit.errors import LlmkitError, UsageError
from llmkit.io.record import Lineage
from llmkit.shards.tokenizer_info import TokenizerInfo, parse_tokenizer
from llmkit.tokens.pretokenize import byte_alphabet, pattern_of
from llmkit.tokens.text_encoder import load
from llmkit.tokens.vocabulary import MAX_SIZE, reserved

MAX_PIECE = 256
MAX_WORD = 256  # characters of a word in a list
Pair = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Extended:
    """The tokenizer's files, its size, the tokens added, and for each new id the old ids that it stands for (none for reserved ones)."""

    files: dict[str, str]
    size: int
    added: int
    pieces: list[list[int]]


def check_extendable(info: TokenizerInfo, name: str) -> dict[str, Any]:
    """The content of tokenizer.json; LlmkitError where it is not byte-level BPE."""
    load(info)  # the library checks its parts
    content: dict[str, Any] = orjson.loads(info.files["tokenizer.json"])
    model = content["model"]
    cutter = content.get("pre_tokenizer") or {}
    parts = cutter.get("pretokenizers", [cutter]) if isinstance(cutter, dict) else []
    kinds = {part.get("type") for part in parts if isinstance(part, dict)}
    if model.get("type", "BPE") != "BPE" or "ByteLevel" not in kinds or model.get("continuing_subword_prefix"):
        kind = model.get("type", "BPE") + ("" if "ByteLevel" in kinds else " that is not byte-level")
        raise LlmkitError(f"{name}: its model is {kind}", "only byte-level BPE tokenizers can be extended")
    return content


def learn(info: TokenizerInfo, texts: Iterable[str], add: int, min_frequency: int = 2) -> list[Pair]:
    """At most `add` new merges, in order, as pairs of ids; the id of the i-th is `info.vocab_size + i`. LlmkitError where there is no text."""
    tokenizer = load(info)
    counts = _counted(tokenizer, texts, pattern_of(orjson.loads(info.files["tokenizer.json"]).get("pre_tokenizer")))
    if not counts:
        raise LlmkitError("no text to learn from", f"the input is empty, or has no words of up to {MAX_PIECE} bytes")
    model, strings = tokenizer.model, {i: token for token, i in tokenizer.get_vocab(with_added_tokens=True).items()}
    known = set(strings.values())
    words: list[list[int]] = []
    weights: list[int] = []
    for piece, count in counts.items():
        ids = [token.id for token in model.tokenize(piece)]
        if len(ids) > 1:
            words.append(ids)
            weights.append(count)
    return _merges(words, weights, add, min_frequency, strings, known, info.vocab_size)


def _counted(tokenizer: Any, texts: Iterable[str], pattern: str | None) -> dict[str, int]:
    """How often each piece of up to MAX_PIECE bytes occurs, a character a byte; by compiled kernels where the pattern is one of ours."""
    if pattern is None or tokenizer.normalizer:
        counts: Counter[str] = Counter()
        for text in texts:
            normal = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text
            pieces = tokenizer.pre_tokenizer.pre_tokenize_str(normal)
            counts.update(piece for piece, _ in pieces if len(piece) <= MAX_PIECE)
        return counts
    from llmkit.tokens.trainer import Counts

    table = Counts()
    for text in texts:
        table.add_texts([text.encode()], pattern)
    pool, ends, times = table.words()
    content, stops = pool.tobytes().decode("latin-1").translate(dict(enumerate(byte_alphabet()))), ends.tolist()
    found = zip([0, *stops], stops, times.tolist(), strict=False)
    return {content[start:stop]: count for start, stop, count in found if stop - start <= MAX_PIECE}


def _merges(
    words: list[list[int]],
    weights: list[int],
    add: int,
    least: int,
    strings: dict[int, str],
    known: set[str],
    first: int,
) -> list[Pair]:
    """Byte-pair encoding on `words`, which are changed in place. A pair whose text is a token already is left alone."""
    totals: Counter[Pair] = Counter()
    where: defaultdict[Pair, set[int]] = defaultdict(set)
    for i, (word, weight) in enumerate(zip(words, weights, strict=True)):
        for pair in pairwise(word):
            totals[pair] += weight
            where[pair].add(i)
    heap = [(-count, pair) for pair, count in totals.items()]
    heapq.heapify(heap)
    made: list[Pair] = []
    while heap and len(made) < add:
        count, pair = heapq.heappop(heap)
        if -count != totals[pair] or -count < least:  # an entry that was overtaken
            continue
        text = strings[pair[0]] + strings[pair[1]]
        if text in known:
            continue
        new = first + len(made)
        made.append(pair)
        strings[new] = text
        known.add(text)
        changed = set()
        for i in where.pop(pair):
            word, weight = words[i], weights[i]
            for old in pairwise(word):
                totals[old] -= weight
                changed.add(old)
            words[i] = word = _replaced(word, pair, new)
            for now in pairwise(word):
                totals[now] += weight
                where[now].add(i)
                changed.add(now)
        for other in changed:
            if totals[other] >= least:
                heapq.heappush(heap, (-totals[other], other))
    return made


def _replaced(word: list[int], pair: Pair, new: int) -> list[int]:
    found, i = [], 0
    while i < len(word):
        if i + 1 < len(word) and (word[i], word[i + 1]) == pair:
            found.append(new)
            i += 2
        else:
            found.append(word[i])
            i += 1
    return found


def with_merges(info: TokenizerInfo, name: str, merges: Sequence[Pair], multiple: int) -> Extended:
    """The tokenizer with new merges, as `learn` gives them."""
    content = check_extendable(info, name)
    strings = {i: token for token, i in load(info).get_vocab(with_added_tokens=True).items()}
    pieces = {i: [i] for i in strings}
    old = content["model"]["merges"]
    as_text = bool(old) and isinstance(old[0], str)
    for new, (a, b) in enumerate(merges, info.vocab_size):
        strings[new], pieces[new] = strings[a] + strings[b], pieces[a] + pieces[b]
        content["model"]["vocab"][strings[new]] = new
        old.append(f"{strings[a]} {strings[b]}" if as_text else [strings[a], strings[b]])
    return _finished(info, name, content, [pieces[info.vocab_size + i] for i in range(len(merges))], multiple)


def with_words(info: TokenizerInfo, name: str, words: Sequence[str], multiple: int) -> Extended:
    """The tokenizer with the words that are not its tokens yet as added tokens; LlmkitError where one would not come back from its id."""
    content = check_extendable(info, name)
    library = load(info)
    known, wanted = library.get_vocab(with_added_tokens=True), dict.fromkeys(words)
    chosen = [word for word in wanted if word not in known]
    content["added_tokens"] = list(content.get("added_tokens") or [])
    for i, word in enumerate(chosen, info.vocab_size):
        content["added_tokens"].append(_added(i, word, special=False))
    pieces = [list(library.encode(word, add_special_tokens=False).ids) for word in chosen]
    made = _finished(info, name, content, pieces, multiple)
    after = load(TokenizerInfo("", made.size, 0, files=made.files))
    for i, word in enumerate(chosen, info.vocab_size):
        if after.encode(word, add_special_tokens=False).ids != [i] or after.decode([i]) != word:
            raise LlmkitError(
                f"{word!r} does not come back as it was: a byte-level tokenizer garbles some added words beyond ASCII",
                "leave it out, or learn it from text that holds it, with --add",
            )
    return made


def read_words(text: str, name: str) -> list[str]:
    """The words of a list, one a line; LlmkitError names a line that holds none that can be a token."""
    words = []
    for number, line in enumerate(text.removeprefix("\ufeff").splitlines(), 1):
        word = line.strip()
        if len(word) > MAX_WORD or not word.isprintable():
            raise LlmkitError(f"{name}:{number}: no word: {word[:40]!r}", f"one a line, up to {MAX_WORD} characters")
        words += [word] if word else []
    if not words:
        raise LlmkitError(f"{name}: no words", "one a line")
    return words


def described(made: Extended, info: TokenizerInfo, lineage: Lineage) -> dict[str, str]:
    """The files of the tokenizer's directory, with the lineage (whose digest is set) in tokenizer_config.json."""
    config = orjson.loads(info.files.get("tokenizer_config.json", "{}"))
    if "eos_token" not in config:
        names = load(info).id_to_token
        config |= {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": names(info.eos_id)}
    lineage.digest = parse_tokenizer(made.files, "the new tokenizer").digest
    config["llmkit"] = lineage.to_dict()
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    return made.files | {"tokenizer_config.json": text}


def _added(i: int, text: str, special: bool) -> dict[str, Any]:
    sides = {"lstrip": False, "rstrip": False, "normalized": False}
    return {"id": i, "content": text, "single_word": not special, "special": special} | sides


def _finished(
    info: TokenizerInfo, name: str, content: dict[str, Any], pieces: list[list[int]], multiple: int
) -> Extended:
    """Filled up with reserved tokens to a multiple, and checked: every old token has its old id."""
    if multiple < 1:
        raise UsageError(f"a multiple of {multiple}", "give 1 for any size")
    taken = info.vocab_size + len(pieces)
    size = -(-taken // multiple) * multiple
    if size > MAX_SIZE:
        raise UsageError(f"a vocabulary of {size:,} tokens", f"the largest is {MAX_SIZE:,}")
    before = load(info).get_vocab(with_added_tokens=True)
    added = content["added_tokens"] = list(content.get("added_tokens") or [])
    names = (reserved(i) for i in range(MAX_SIZE) if reserved(i) not in before)
    added += [_added(i, next(names), special=True) for i in range(taken, size)]
    # The library numbers added tokens anew unless the model knows them, from the size of the model's vocabulary, which has grown.
    content["model"]["vocab"] |= {token["content"]: token["id"] for token in added}
    files = info.files | {"tokenizer.json": orjson.dumps(content, option=orjson.OPT_INDENT_2).decode() + "\n"}
    after = load(TokenizerInfo("", size, 0, files=files)).get_vocab(with_added_tokens=True)
    moved = [token for token, i in before.items() if after.get(token) != i]
    if moved or max(after.values()) + 1 != size:
        raise LlmkitError(
            f"{name}: its tokens do not keep their ids ({moved[:1] or 'size'})", "its tokenizer.json is irregular"
        )
    return Extended(files, size, len(pieces), pieces + [[] for _ in range(size - taken)])
