"""New merges and new words in a trained tokenizer."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from llmkit.errors import LlmkitError
from llmkit.io.record import Lineage
from llmkit.shards.tokenizer_info import TokenizerInfo, parse_tokenizer
from llmkit.tokens import extend, vocabulary
from llmkit.tokens.pretokenize import PATTERNS
from llmkit.tokens.text_encoder import load

Trained = Callable[[str], TokenizerInfo]
DOMAIN = [
    "Die Würde des Menschen ist unantastbar. Die Menschenwürde zu achten ist Verpflichtung aller staatlichen Gewalt.\n",
    "Acetylsalicylsäure hemmt die Cyclooxygenase; die Dosis beträgt 500 mg. die die die\r\n",
    "<|endoftext|> ist hier Text, 東京都庁 und 東京都民\n",
] * 3


def plain_merges(
    words: Counter[tuple[int, ...]], strings: dict[int, str], add: int, first: int
) -> tuple[list, Counter]:
    """Byte-pair encoding continued, everything counted anew after each merge; the merges, and the words that are left."""
    merges: list[tuple[int, int]] = []
    while len(merges) < add:
        pairs: Counter[tuple[int, int]] = Counter()
        for word, count in words.items():
            for pair in zip(word, word[1:], strict=False):
                pairs[pair] += count
        known = set(strings.values())
        open_ = [p for p in pairs if pairs[p] >= 2 and strings[p[0]] + strings[p[1]] not in known]
        if not open_:
            break
        best = min(open_, key=lambda p: (-pairs[p], p))
        new = first + len(merges)
        strings[new] = strings[best[0]] + strings[best[1]]
        merges.append(best)
        merged: Counter[tuple[int, ...]] = Counter()
        for word, count in words.items():
            found, i = [], 0
            while i < len(word):
                step = 2 if word[i : i + 2] == best else 1
                found.append(new if step == 2 else word[i])
                i += step
            merged[tuple(found)] += count
        words = merged
    return merges, words


@pytest.mark.parametrize("name", PATTERNS)
def test_merges_go_on_where_training_ended(name: str, trained: Trained) -> None:
    """Parity with a plain trainer that starts from the old tokenizer's pieces, and of the written tokenizer with its result."""
    info = trained(name)
    old = load(info)
    pieces: Counter[tuple[int, ...]] = Counter()
    for text in DOMAIN:
        for piece, _ in old.pre_tokenizer.pre_tokenize_str(text):
            pieces[tuple(token.id for token in old.model.tokenize(piece))] += 1
    strings = {i: token for token, i in old.get_vocab().items()}
    wanted, left = plain_merges(pieces, strings, 60, info.vocab_size)
    found = extend.learn(info, DOMAIN, 60)
    assert found == wanted and len(found) == 60
    made = extend.with_merges(info, name, found, 64)
    assert (made.size, made.added, len(made.pieces)) == (448, 60, 64)
    new = load(TokenizerInfo("", made.size, 0, files=made.files))
    ids = [new.encode(text, add_special_tokens=False).ids for text in DOMAIN]
    assert sum(map(len, ids)) == sum(len(word) * count for word, count in left.items())
    assert [new.decode(found, skip_special_tokens=False) for found in ids] == DOMAIN
    assert all(new.id_to_token(i) == old.id_to_token(i) for i in range(384))
    for i, parts in enumerate(made.pieces[:60], 384):
        assert "".join(old.id_to_token(part) for part in parts) == new.id_to_token(i) and max(parts) < 384
    assert made.pieces[60:] == [[]] * 4 and new.id_to_token(447) == vocabulary.reserved(vocabulary.RESERVED + 3)


def test_texts_of_any_order_and_number(trained: Trained) -> None:
    """Property: the order of the texts does not matter; too few give fewer merges; none is an error."""
    info = trained("qwen2")
    assert extend.learn(info, DOMAIN, 40) == extend.learn(info, DOMAIN[::-1], 40)
    assert len(extend.learn(info, ["xyzzy xyzzy"], 40)) == 4
    assert extend.learn(info, ["a" * 100_000 + " b"], 40) == []
    with pytest.raises(LlmkitError, match="no text"):
        extend.learn(info, ["", ""], 40)


def test_ids_stay_where_special_tokens_stand_outside_of_the_model() -> None:
    """Behaviour: the library numbers added tokens by the size of the model's vocabulary; here it has holes that would move them."""
    files = vocabulary.train(["ab ab ab"], 1024).files
    info = parse_tokenizer(files, "few")
    content = json.loads(files["tokenizer.json"])
    assert "<|reserved_12|>" not in content["model"]["vocab"] and info.vocab_size == 320
    made = extend.with_merges(info, "few", extend.learn(info, ["cd cd cd"], 3), 64)
    new, old = load(TokenizerInfo("", made.size, 0, files=made.files)), load(info)
    assert all(new.token_to_id(token) == i for token, i in old.get_vocab(with_added_tokens=True).items())
    assert new.encode(" cd").ids == [321] and made.size == 384


def test_words(trained: Trained) -> None:
    """Behaviour: whole words, not parts of others; those that are tokens already are passed over; text comes back."""
    info = trained("llama-bpe")
    made = extend.with_words(info, "tok", ["Quarz", "東京", "Quarz", "e"], 64)
    assert made.added == 2 and made.size == 448
    new = load(TokenizerInfo("", made.size, 0, files=made.files))
    text = "Quarz, Quarzglas and 東京"
    ids = new.encode(text).ids
    assert ids.count(384) == 1 and ids.count(385) == 1 and new.decode(ids) == text
    assert made.pieces[0] == load(info).encode("Quarz").ids
    with pytest.raises(LlmkitError, match="garbles"):
        extend.with_words(info, "tok", ["größer"], 64)


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "no words"), ("\n \n", "no words"), ("ok\n" + "x" * 300, "list:2"), ("a\x07b", "list:1")],
)
def test_bad_lists(text: str, message: str) -> None:
    """Behaviour: the line is named."""
    with pytest.raises(LlmkitError, match=message):
        extend.read_words(text, "list")


def test_other_kinds_are_refused() -> None:
    """Behaviour: only byte-level BPE has merges that can go on."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    word_level = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    metaspace = Tokenizer(models.BPE({"a": 0, "</s>": 1}, [], byte_fallback=True))
    metaspace.pre_tokenizer = pre_tokenizers.Metaspace()
    for tokenizer, kind in ((word_level, "WordLevel"), (metaspace, "BPE that is not byte-level")):
        info = parse_tokenizer({"tokenizer.json": tokenizer.to_str()}, "other")
        with pytest.raises(LlmkitError, match=kind):
            extend.check_extendable(info, "other")


def test_a_damaged_tokenizer_is_refused(trained: Trained) -> None:
    """Behaviour: what the library does not load is an error before anything of it is looked at."""
    content = json.loads(trained("gpt-2").files["tokenizer.json"])
    for key, value in (("pre_tokenizer", {"type": "Sequence", "pretokenizers": 3}), ("normalizer", [])):
        info = parse_tokenizer({"tokenizer.json": json.dumps(content | {key: value})}, "damaged")
        with pytest.raises(LlmkitError, match="does not load"):
            extend.check_extendable(info, "damaged")


def test_transformers_loads_it(trained: Trained, tmp_path: Path) -> None:
    """Parity: ids of transformers' AutoTokenizer and of `tokenizers`; the chat template and special tokens are the old ones."""
    from transformers import AutoTokenizer

    info = trained("llama-bpe")
    made = extend.with_merges(info, "tok", extend.learn(info, DOMAIN, 20), 64)
    for name, text in extend.described(made, info, Lineage("vocab extend")).items():
        (tmp_path / name).write_text(text)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    ours = load(TokenizerInfo("", made.size, 0, files=made.files), allow_special=True)
    for text in (*DOMAIN[:3], "<|im_start|>user"):
        assert theirs(text)["input_ids"] == ours.encode(text).ids
    assert (theirs.eos_token_id, len(theirs)) == (0, 448) and theirs.chat_template
