"""Add tokens to a byte-level BPE tokenizer before its model is trained further: new merges from text, or words
from a list.

Old ids keep their meaning, and new ones follow the last. New merges rank after all old ones, and no old merge
involves a new token. A piece is therefore encoded by the old merges first, and `learn_merges` counts exactly
what the extended tokenizer will see: pairs of neighbours among the old tokens of each distinct piece, the most
frequent pair first, ties by lower ids, as in training (Sennrich et al., arXiv:1508.07909). The words of a list
become added tokens, matched in a text where no letter or digit is next to them; the space before a word stays a
token of its own.

A text may be encoded with other, fewer ids than before; the meaning of the old ids to the model does not change.

Memory grows with the number of distinct pieces, time with the occurrences of merges in them. Pieces of over
`MAX_PIECE` bytes are not words and are ignored.

    llmkit vocab extend tok/ domain.jsonl.zst --add 1k -o tok2/
"""

from __future__ import annotations

import heapq
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import orjson

from llmkit.errors import LlmkitError, UsageError
from llmkit.io.record import Lineage
from llmkit.shards.tokenizer_info import TokenizerInfo, parse_tokenizer, tokenizer_json
from llmkit.tokens.pretokenize import byte_alphabet, pattern_name
from llmkit.tokens.text_encoder import load_tokenizer
from llmkit.tokens.tokenizer_json import load
from llmkit.tokens.vocabulary import MAX_SIZE, reserved_token

MAX_PIECE = 256
MAX_WORD = 256  # characters of a word in a list
Pair = tuple[int, int]


@dataclass(frozen=True, slots=True)
class ExtendedTokenizer:
    """The tokenizer's files, its size, the number of tokens added, and for each new id the old ids that it replaces.

    Reserved tokens replace none.
    """

    files: dict[str, str]
    size: int
    added: int
    pieces: list[list[int]]


def check_extendable(info: TokenizerInfo, name: str) -> dict[str, Any]:
    """The content of tokenizer.json. Raises LlmkitError where it is not byte-level BPE."""
    load_tokenizer(info)  # validates the file
    content: dict[str, Any] = orjson.loads(info.files["tokenizer.json"])
    model = content["model"]
    splitter = content.get("pre_tokenizer") or {}
    parts = splitter.get("pretokenizers", [splitter]) if isinstance(splitter, dict) else []
    kinds = {part.get("type") for part in parts if isinstance(part, dict)}
    if model.get("type", "BPE") != "BPE" or "ByteLevel" not in kinds or model.get("continuing_subword_prefix"):
        kind = model.get("type", "BPE") + ("" if "ByteLevel" in kinds else " that is not byte-level")
        raise LlmkitError(f"{name}: its model is {kind}", "only byte-level BPE tokenizers can be extended")
    return content


def learn_merges(info: TokenizerInfo, texts: Iterable[str], add: int, min_frequency: int = 2) -> list[Pair]:
    """Learn up to `add` new merges, in order, as pairs of ids; the i-th gets the id `info.vocab_size + i`.

    Raises LlmkitError where there is no text.
    """
    tokenizer = load_tokenizer(info)
    counts = _count_pieces(
        tokenizer, texts, pattern_name(orjson.loads(info.files["tokenizer.json"]).get("pre_tokenizer"))
    )
    if not counts:
        raise LlmkitError("no text to learn from", f"the input is empty, or has no words of up to {MAX_PIECE} bytes")
    model, strings = tokenizer.model, {i: token for token, i in tokenizer.get_vocab(with_added_tokens=True).items()}
    token_texts = set(strings.values())
    words: list[list[int]] = []
    weights: list[int] = []
    for piece, count in counts.items():
        ids = [token.id for token in model.tokenize(piece)]
        if len(ids) > 1:
            words.append(ids)
            weights.append(count)
    return _merge_words(words, weights, add, min_frequency, strings, token_texts, info.vocab_size)


def _count_pieces(tokenizer: Any, texts: Iterable[str], pattern: str | None) -> dict[str, int]:
    """Frequency of each piece of up to MAX_PIECE bytes, one character per byte. Compiled where the pattern is
    one of ours.
    """
    if pattern is None or tokenizer.normalizer:
        counts: Counter[str] = Counter()
        for text in texts:
            normal = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text
            pieces = tokenizer.pre_tokenizer.pre_tokenize_str(normal)
            counts.update(piece for piece, _ in pieces if len(piece) <= MAX_PIECE)
        return counts
    from llmkit.tokens.trainer import PieceCounts

    table = PieceCounts()
    for text in texts:
        table.add_texts([text.encode()], pattern)
    pool, ends, times = table.pieces()
    content, stops = pool.tobytes().decode("latin-1").translate(dict(enumerate(byte_alphabet()))), ends.tolist()
    spans = zip([0, *stops], stops, times.tolist(), strict=False)
    return {content[start:stop]: count for start, stop, count in spans if stop - start <= MAX_PIECE}


def _merge_words(
    words: list[list[int]],
    weights: list[int],
    add: int,
    least: int,
    strings: dict[int, str],
    token_texts: set[str],
    first: int,
) -> list[Pair]:
    """Byte-pair encoding on `words`, which are modified in place. A pair whose text is already a token is skipped."""
    totals: Counter[Pair] = Counter()
    where: defaultdict[Pair, set[int]] = defaultdict(set)
    for i, (word, weight) in enumerate(zip(words, weights, strict=True)):
        for pair in pairwise(word):
            totals[pair] += weight
            where[pair].add(i)
    heap = [(-count, pair) for pair, count in totals.items()]
    heapq.heapify(heap)
    merges: list[Pair] = []
    while heap and len(merges) < add:
        count, pair = heapq.heappop(heap)
        if -count != totals[pair] or -count < least:  # a stale entry
            continue
        text = strings[pair[0]] + strings[pair[1]]
        if text in token_texts:
            continue
        new = first + len(merges)
        merges.append(pair)
        strings[new] = text
        token_texts.add(text)
        changed = set()
        for i in where.pop(pair):
            word, weight = words[i], weights[i]
            for old in pairwise(word):
                totals[old] -= weight
                changed.add(old)
            words[i] = word = _replace_pair(word, pair, new)
            for current in pairwise(word):
                totals[current] += weight
                where[current].add(i)
                changed.add(current)
        for other in changed:
            if totals[other] >= least:
                heapq.heappush(heap, (-totals[other], other))
    return merges


def _replace_pair(word: list[int], pair: Pair, new: int) -> list[int]:
    result, i = [], 0
    while i < len(word):
        if i + 1 < len(word) and (word[i], word[i + 1]) == pair:
            result.append(new)
            i += 2
        else:
            result.append(word[i])
            i += 1
    return result


def with_merges(info: TokenizerInfo, name: str, merges: Sequence[Pair], multiple: int) -> ExtendedTokenizer:
    """The tokenizer extended by the merges of `learn_merges`."""
    content = check_extendable(info, name)
    strings = {i: token for token, i in load_tokenizer(info).get_vocab(with_added_tokens=True).items()}
    pieces = {i: [i] for i in strings}
    model_merges = content["model"]["merges"]
    as_text = bool(model_merges) and isinstance(model_merges[0], str)
    for new, (a, b) in enumerate(merges, info.vocab_size):
        strings[new], pieces[new] = strings[a] + strings[b], pieces[a] + pieces[b]
        content["model"]["vocab"][strings[new]] = new
        model_merges.append(f"{strings[a]} {strings[b]}" if as_text else [strings[a], strings[b]])
    return _finish(info, name, content, [pieces[info.vocab_size + i] for i in range(len(merges))], multiple)


def with_words(info: TokenizerInfo, name: str, words: Sequence[str], multiple: int) -> ExtendedTokenizer:
    """The tokenizer with new words as added tokens; words that are already tokens are skipped.

    Raises LlmkitError where a word would not decode to itself.
    """
    content = check_extendable(info, name)
    library = load_tokenizer(info)
    vocabulary, distinct = library.get_vocab(with_added_tokens=True), dict.fromkeys(words)
    chosen = [word for word in distinct if word not in vocabulary]
    content["added_tokens"] = list(content.get("added_tokens") or [])
    for i, word in enumerate(chosen, info.vocab_size):
        content["added_tokens"].append(_added_token(i, word, special=False))
    pieces = [list(library.encode(word, add_special_tokens=False).ids) for word in chosen]
    made = _finish(info, name, content, pieces, multiple)
    after = load_tokenizer(TokenizerInfo("", made.size, 0, files=made.files))
    for i, word in enumerate(chosen, info.vocab_size):
        if after.encode(word, add_special_tokens=False).ids != [i] or after.decode([i]) != word:
            raise LlmkitError(
                f"{word!r} does not decode to itself: a byte-level tokenizer garbles some added words outside ASCII",
                "leave it out, or learn it from text that contains it, with --add",
            )
    return made


def with_control_tokens(files: Mapping[str, str], name: str, tokens: Sequence[str]) -> ExtendedTokenizer:
    """A tokenizer of any kind in which these are special tokens. Those that it lacks follow the last id, without
    padding; the others keep their ids. The pieces of a new one are the ids that spelled its name before.

    Raises LlmkitError where the tokenizer is damaged, or numbers its tokens with gaps.
    """
    text = tokenizer_json(files, name)
    before = load(text, f"{name}: tokenizer.json is not readable", "the file is damaged or too new")
    ids = before.get_vocab(with_added_tokens=True)
    content, first = orjson.loads(text), max(ids.values(), default=-1) + 1
    new = [token for token in dict.fromkeys(tokens) if token not in ids]
    ids |= {token: first + i for i, token in enumerate(new)}
    added = {token["content"]: token for token in content.get("added_tokens") or []}
    for token in dict.fromkeys(tokens):
        added[token] = added.get(token, _added_token(ids[token], token, special=True)) | {"special": True}
    content["added_tokens"] = list(added.values())
    changed = dict(files) | {"tokenizer.json": orjson.dumps(content, option=orjson.OPT_INDENT_2).decode() + "\n"}
    after = load(changed["tokenizer.json"], f"{name}: tokenizer.json", "its control tokens cannot be added")
    if after.get_vocab(with_added_tokens=True) != ids:
        raise LlmkitError(
            f"{name}: its tokens do not keep their ids", "its tokenizer.json is irregular: convert it again"
        )
    config = orjson.loads(files.get("tokenizer_config.json", "{}"))
    if isinstance(listed := config.get("added_tokens_decoder"), dict):  # what transformers 4 wrote, and 5 prefers
        listed |= {str(ids[t]): {k: v for k, v in added[t].items() if k != "id"} for t in tokens}
        changed["tokenizer_config.json"] = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    before.encode_special_tokens = True
    pieces = [list(before.encode(token, add_special_tokens=False).ids) for token in new]
    return ExtendedTokenizer(changed, first + len(new), len(new), pieces)


def read_words(text: str, name: str) -> list[str]:
    """The words of a list, one per line. Raises LlmkitError, naming the line, for a word that cannot be a token."""
    words = []
    for number, line in enumerate(text.removeprefix("\ufeff").splitlines(), 1):
        word = line.strip()
        if len(word) > MAX_WORD or not word.isprintable():
            raise LlmkitError(
                f"{name}:{number}: not a word: {word[:40]!r}", f"one per line, up to {MAX_WORD} characters"
            )
        words += [word] if word else []
    if not words:
        raise LlmkitError(f"{name}: no words", "list one per line")
    return words


def tokenizer_files(made: ExtendedTokenizer, info: TokenizerInfo, lineage: Lineage) -> dict[str, str]:
    """The files of the tokenizer's directory. Sets the digest of `lineage` and stores it in tokenizer_config.json."""
    config = orjson.loads(info.files.get("tokenizer_config.json", "{}"))
    if "eos_token" not in config:
        names = load_tokenizer(info).id_to_token
        config |= {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": names(info.eos_id)}
    lineage.digest = parse_tokenizer(made.files, "the new tokenizer").digest
    config["llmkit"] = lineage.to_dict()
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    return made.files | {"tokenizer_config.json": text}


def _added_token(i: int, text: str, special: bool) -> dict[str, Any]:
    sides = {"lstrip": False, "rstrip": False, "normalized": False}
    return {"id": i, "content": text, "single_word": not special, "special": special} | sides


def _finish(
    info: TokenizerInfo, name: str, content: dict[str, Any], pieces: list[list[int]], multiple: int
) -> ExtendedTokenizer:
    """Pad with reserved tokens to a multiple, and check that every old token keeps its id."""
    if multiple < 1:
        raise UsageError(f"a multiple of {multiple}", "use 1 for any size")
    used = info.vocab_size + len(pieces)
    size = -(-used // multiple) * multiple
    if size > MAX_SIZE:
        raise UsageError(f"a vocabulary of {size:,} tokens", f"the largest is {MAX_SIZE:,}")
    before = load_tokenizer(info).get_vocab(with_added_tokens=True)
    added = content["added_tokens"] = list(content.get("added_tokens") or [])
    names = (reserved_token(i) for i in range(MAX_SIZE) if reserved_token(i) not in before)
    added += [_added_token(i, next(names), special=True) for i in range(used, size)]
    # The library renumbers added tokens that the model does not know, from the size of the model's vocabulary,
    # which has grown.
    content["model"]["vocab"] |= {token["content"]: token["id"] for token in added}
    files = info.files | {"tokenizer.json": orjson.dumps(content, option=orjson.OPT_INDENT_2).decode() + "\n"}
    after = load_tokenizer(TokenizerInfo("", size, 0, files=files)).get_vocab(with_added_tokens=True)
    moved = [token for token, i in before.items() if after.get(token) != i]
    if moved or max(after.values()) + 1 != size:
        raise LlmkitError(
            f"{name}: its tokens do not keep their ids ({moved[:1] or 'size'})", "its tokenizer.json is irregular"
        )
    return ExtendedTokenizer(files, size, len(pieces), pieces + [[] for _ in range(size - used)])
