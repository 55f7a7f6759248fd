"""Encoding documents and decoding them."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.errors import LlmkitError
from llmkit.io.documents import Chunk, ReadOptions
from llmkit.shards.token_block import TokenBlock
from llmkit.shards.tokenizer_info import TokenizerInfo, parse_tokenizer
from llmkit.tokens.encoder import DocumentEncoder, EncodeOptions, decode_documents, source_name
from llmkit.tokens.pretokenize import PATTERNS
from llmkit.tokens.text_encoder import load_tokenizer

Trained = Callable[[str], TokenizerInfo]


def encode(info: TokenizerInfo, *rows: dict[str, object], **options: object) -> TokenBlock:
    data = b"".join(orjson.dumps(row) + b"\n" for row in rows)
    return DocumentEncoder(info, ReadOptions(), EncodeOptions(**options))(Chunk("crawl/web.jsonl.zst", 1, data))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", PATTERNS)
def test_ids_equal_those_of_the_library(name: str, trained: Trained) -> None:
    """Parity with `tokenizers`: each document's ids, then the end of text."""
    from tokenizers import Tokenizer

    info = trained(name)
    texts = ["Hello  world 123\n", "日本 e\u0301 🙂", "x" * 5000, "don't\r\n\r\n  stop"]
    library = Tokenizer.from_str(info.files["tokenizer.json"])
    made = encode(info, *({"text": text} for text in texts))
    assert made.tokens.dtype == np.uint16
    assert [tokens.tolist() for tokens, _, _ in made.documents()] == [[*library.encode(t).ids, 0] for t in texts]
    assert made.sizes == [len(t.encode()) for t in texts]


@pytest.mark.parametrize("name", PATTERNS)
@settings(max_examples=100, deadline=None)
@given(text=st.text(min_size=1))
def test_text_comes_back(name: str, trained: Trained, text: str) -> None:
    """Property: encoding loses nothing."""
    info = trained(name)
    if text.isspace():
        return
    made = encode(info, {"text": text})
    assert decode_documents(load_tokenizer(info), [made.tokens], info.eos_id) == [text]


def test_special_tokens_in_a_text_are_text(trained: Trained) -> None:
    """Behaviour: no document can end itself or speak as the assistant, unless --allow-special."""
    info = trained("llama-bpe")
    row = {"text": "a<|endoftext|>b<|im_start|>c<|reserved_3|>"}
    plain = encode(info, row).tokens.tolist()
    assert plain[-1] == 0 and min(plain[:-1]) >= 16
    assert decode_documents(load_tokenizer(info), [np.array(plain)], 0) == [row["text"]]
    special = encode(info, row, allow_special=True).tokens.tolist()
    assert [i for i in special if i < 16] == [0, 1, 14, 0]


def _ends(kind: str) -> TokenizerInfo:
    """A tokenizer in whose vocabulary is "</s>", with id 1: by `kind`, its model or how it is declared."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    words = {"[UNK]": 0, "</s>": 1, "a": 2, "b": 3}
    letters = {name: i for i, name in enumerate(["[UNK]", "</s>", *"ab</s> "])}
    model = {
        "Unigram": models.Unigram([(name, 0.0 if name == "</s>" else -5.0) for name in letters], 0, False),
        "WordLevel": models.WordLevel(words, unk_token="[UNK]"),
        "WordPiece": models.WordPiece(words, unk_token="[UNK]"),
        "unknown": models.WordLevel(words, unk_token="</s>"),
    }.get(kind, models.BPE(letters, [], unk_token="[UNK]"))
    library = Tokenizer(model)
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.add_tokens([AddedToken("</s>", special=kind in ("Unigram", "WordLevel", "WordPiece", "unknown"))])
    end = "a" if kind == "letter" else "</s>"
    return parse_tokenizer(
        {"tokenizer.json": library.to_str(), "tokenizer_config.json": orjson.dumps({"eos_token": end}).decode()}, "tok"
    )


@pytest.mark.parametrize("kind", ["not special", "Unigram", "WordLevel", "WordPiece", "unknown", "letter"])
def test_no_text_holds_the_end_of_text_id(kind: str) -> None:
    """Behaviour: the name of the end-of-text token is text with every model, also where it is not declared special.

    A token that texts form, or that stands for unknown characters, cannot be it: the document is named.
    """
    info = _ends(kind)
    rows = [{"text": "b </s> b</s>b"}, {"text": "b"}]
    if kind in ("unknown", "letter"):
        with pytest.raises(LlmkitError, match=r"web.jsonl.zst:2 .*the end-of-text token \(id [12]\)"):
            encode(info, {"text": "b"}, {"text": "b a c"}, {"text": "b"})
        assert encode(info, {"text": "b b"}).tokens.tolist()[-1] == info.eos_id
        return
    made = encode(info, *rows)
    assert [tokens.tolist().count(1) for tokens, _, _ in made.documents()] == [1, 1]
    assert (made.tokens != 1).sum() >= 3 and encode(info, *rows, allow_special=True).tokens.tolist().count(1) > 2
    decoded = load_tokenizer(info).decode(made.tokens.tolist(), skip_special_tokens=False)
    assert kind != "not special" or decoded == "b < / s > b < / s > b </s> b </s>"


def test_empty_documents_are_dropped(trained: Trained) -> None:
    """Behaviour: documents without text, or with white space only, are counted and dropped; a chunk of them
    gives no rows.
    """
    info = trained("gpt-2")
    made = encode(info, {"text": ""}, {"id": "kept", "text": "a"}, {"text": " \n\t"})
    assert (made.empty, made.ids, made.lengths.tolist()) == (2, ["kept"], [2])
    nothing = encode(info, {"text": ""})
    assert (len(nothing.tokens), nothing.ids, list(nothing.documents())) == (0, [], [])


def test_sources(trained: Trained) -> None:
    """Behaviour: the option, else the field (as JSON unless text), else the file name without its suffix."""
    info = trained("gpt-2")
    rows = [{"text": "a", "source": "wiki"}, {"text": "b"}, {"text": "c", "source": 7}]
    assert encode(info, *rows).sources == ["wiki", "web", "7"]
    assert encode(info, *rows, source="all").sources == ["all"] * 3
    assert source_name("<stdin>") == "stdin"
    assert source_name("a/b.c.parquet") == "b.c"
    assert source_name("x.jsonl.gz") == "x"


def test_other_kinds_of_tokenizer(tmp_path: object) -> None:
    """Parity with `tokenizers`: Unigram with byte fallback; WordPiece with normaliser, post-processor,
    truncation, padding.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    unigram = Tokenizer(
        models.Unigram(
            [("<unk>", 0.0), ("</s>", 0.0), ("▁a", -1.0), ("b", -2.0), *((f"<0x{i:02X}>", -9.0) for i in range(256))],
            0,
            True,
        )
    )
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.add_special_tokens(["</s>"])
    wordpiece = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    wordpiece.normalizer = normalizers.BertNormalizer()
    wordpiece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    wordpiece.train_from_iterator(
        ["hello there world"] * 3, trainers.WordPieceTrainer(vocab_size=60, special_tokens=["[UNK]", "[SEP]", "[CLS]"])
    )
    wordpiece.post_processor = processors.BertProcessing(("[SEP]", 1), ("[CLS]", 2))
    texts = ["a b ab", "Héllo WORLD there"]
    for library, end in ((unigram, "</s>"), (wordpiece, "[SEP]")):
        expected = [[*library.encode(t, add_special_tokens=False).ids, library.token_to_id(end)] for t in texts]
        library.enable_truncation(2)
        library.enable_padding(length=50)
        files = {"tokenizer.json": library.to_str(), "tokenizer_config.json": orjson.dumps({"eos_token": end}).decode()}
        info = parse_tokenizer(files, "tok")
        made = encode(info, *({"text": t} for t in texts))
        assert [tokens.tolist() for tokens, _, _ in made.documents()] == expected


def test_wide_vocabularies_take_four_bytes(trained: Trained) -> None:
    """Behaviour: ids are uint32 where the vocabulary is over 65,536."""
    from dataclasses import replace

    assert encode(replace(trained("gpt-2"), vocab_size=70_000), {"text": "a"}).tokens.dtype == np.uint32


def test_malformed_tokenizers_are_refused(trained: Trained) -> None:
    """Behaviour: a tokenizer.json that the library cannot load, or that is missing, is an error with a hint."""
    content = orjson.loads(trained("gpt-2").files["tokenizer.json"])
    content["model"]["merges"] = [["x", "not in the vocabulary"]]
    info = TokenizerInfo("", 384, 0, files={"tokenizer.json": orjson.dumps(content).decode()})
    with pytest.raises(LlmkitError, match="does not load"):
        load_tokenizer(info)
    with pytest.raises(LlmkitError, match="do not carry"):
        load_tokenizer(TokenizerInfo("", 384, 0))


@pytest.mark.parametrize("unit", ["word next, ", "a", " ", "\n", "日本", "=-"])
def test_time_is_linear_in_the_length_of_a_document(unit: str, trained: Trained) -> None:
    """Property: a document eight times as long takes about eight times as long (the limit of 20 allows for noise)."""
    library = load_tokenizer(trained("llama-bpe"))

    def seconds(length: int) -> float:
        text = (unit * length)[:length]
        best = 1e9
        for _ in range(3):
            start = time.process_time()
            library.encode_batch_fast([text], add_special_tokens=False)
            best = min(best, time.process_time() - start)
        return best

    assert seconds(240_000) < 20 * max(seconds(30_000), 1e-3)
