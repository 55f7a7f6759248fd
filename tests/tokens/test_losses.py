"""What a tokenizer cannot hold or changes is counted and reported, never lost in silence."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from llmkit.shards.token_block import Losses
from llmkit.shards.tokenizer_info import TokenizerInfo
from llmkit.tokens.convert import TokenCounts
from llmkit.tokens.losses import changes, loss_counter, unknown_id
from llmkit.tokens.pretokenize import byte_alphabet
from llmkit.tokens.text_encoder import TextEncoder

Command = Callable[..., subprocess.CompletedProcess[bytes]]
END, UNKNOWN = "<|endoftext|>", "<unk>"
LETTERS = "abé日 "


def bpe(symbols: list[str], unknown: bool = False, bytes_: list[int] | None = None, **parts: Any) -> Tokenizer:
    """A BPE tokenizer with a token for each symbol, and for each of `bytes_` as a fallback."""
    fallback = [f"<0x{byte:02X}>" for byte in bytes_ or []]
    names = [END, *([UNKNOWN] if unknown else []), *symbols, *fallback]
    ids = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(ids, [], unk_token=UNKNOWN if unknown else None, byte_fallback=bytes_ is not None))
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.add_special_tokens([END])
    return tokenizer


def byte_level(missing: set[int] = frozenset(), unknown: bool = False, prefix: bool = False, **parts: Any) -> Tokenizer:  # type: ignore[assignment]
    symbols = [symbol for byte, symbol in enumerate(byte_alphabet()) if byte not in missing]
    words = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    return bpe(symbols, unknown, pre_tokenizer=words, decoder=decoders.ByteLevel(), **parts)


def info_of(tokenizer: Tokenizer) -> TokenizerInfo:
    return TokenizerInfo("x", tokenizer.get_vocab_size(), 0, files={"tokenizer.json": tokenizer.to_str()})


@settings(max_examples=150, deadline=None)
@given(
    st.sets(st.sampled_from(LETTERS), max_size=4),
    st.booleans(),
    st.sampled_from(["characters", "bytes", "fallback"]),
    st.lists(st.text(LETTERS, min_size=1, max_size=6), min_size=1, max_size=3),
)
def test_losses_are_those_of_decoding(lacking: set[str], unknown: bool, kind: str, texts: list[str]) -> None:
    """Parity with decoding: exactly the texts are counted that do not decode to themselves."""
    if kind == "bytes":
        tokenizer = byte_level({byte for letter in lacking - {" "} for byte in letter.encode()}, unknown)
    else:
        fallback = [byte for byte in range(256) if not (lacking & {"a"} and byte == 0x97)]  # of 日
        letters = [letter for letter in LETTERS if letter not in lacking - {" "}]
        tokenizer = bpe(letters, unknown, fallback if kind == "fallback" else None, decoder=decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()]))  # fmt: skip
    info = info_of(tokenizer)
    encoder = TextEncoder(info, compiled=False)
    ids, lengths = encoder(texts, 0)
    counter, decoded, start = loss_counter(encoder), [], 0
    for length in lengths.tolist():
        decoded.append(tokenizer.decode(ids[start : start + length - 1].tolist(), skip_special_tokens=False))
        start += length
    lossy = sum(text != back for text, back in zip(texts, decoded, strict=True))
    losses = counter(texts, texts, ids, lengths, 1)[0] if counter else None
    assert (losses.documents if losses else 0) == lossy
    assert losses is None or (losses.pieces >= lossy and bool(losses.example) == bool(lossy))
    assert losses is None or losses.blank >= sum(back in ("", UNKNOWN) for back in decoded)


SYMBOLS = [
    "a",
    "e",
    "\u0301",
    "\u00e9",
    "\u1112",
    "\u1161",
    "\u11ab",
    "\ud55c",
    "A",
    "\ufb01",
    "f",
    " ",
    "\n",
    "\u3000",
    "\u2581",
]
NORMALISERS = [None, "NFC", "NFKC", "NFD", "Lowercase", "Strip"]
WORDS = {
    "none": None,
    "Whitespace": pre_tokenizers.Whitespace(),
    "Metaspace": pre_tokenizers.Metaspace(),
    "ByteLevel": pre_tokenizers.ByteLevel(),
    "Sequence": pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Punctuation()]),
}


@settings(max_examples=300, deadline=None)
@given(
    st.sets(st.sampled_from([a + s + b for s in SYMBOLS for a in ("", "##") for b in ("", "</w>")] + ["ae", "aef"])),
    st.tuples(st.sampled_from(["", "##"]), st.sampled_from(["", "</w>"]), st.booleans()),
    st.sampled_from([*NORMALISERS, "Replace"]),
    st.sampled_from([*WORDS]),
    st.lists(st.text(SYMBOLS, max_size=6).map(lambda text: text.lstrip("▁") or "a"), min_size=1, max_size=4),
)
def test_dropped_symbols_are_counted(
    lacking: set[str], forms: tuple[str, str, bool], normaliser: str | None, words: str, texts: list[str]
) -> None:
    """Parity with `tokenizers`: exactly those texts are counted of which the BPE model gets a symbol that it drops."""
    bytes_ = [s for byte, s in enumerate(byte_alphabet()) if words == "ByteLevel" and byte < 0xE2]
    symbols = [a + s + b for s in {*SYMBOLS, *bytes_} for a in {"", forms[0]} for b in {"", forms[1]}]
    symbols += ["ae", "aef"] * forms[2]
    ids = {name: i for i, name in enumerate([END, *sorted({*symbols} - lacking)])}
    names = ("continuing_subword_prefix", "end_of_word_suffix")
    options: Any = {name: form for name, form in zip(names, forms[:2], strict=True) if form}
    tokenizer = Tokenizer(models.BPE(ids, [], ignore_merges=forms[2], **options))
    if normaliser == "Replace":
        tokenizer.normalizer = normalizers.Replace("ae", "A")
    elif normaliser:
        tokenizer.normalizer = getattr(normalizers, normaliser)()
    if WORDS[words] is not None:
        tokenizer.pre_tokenizer = WORDS[words]
    tokenizer.add_special_tokens([END])

    def loses(text: str) -> bool:
        text = tokenizer.normalizer.normalize_str(text) if normaliser else text
        parts = [part for part, _ in WORDS[words].pre_tokenize_str(text)] if WORDS[words] is not None else [text]
        if words in ("Metaspace", "ByteLevel") and parts and not (forms[2] and parts[0] in ids):  # the mark in front
            first = tokenizer.model.tokenize(parts[0])
            if len(parts[0]) - len(first) == 1 and not (first and first[0].value[0] == parts[0][0]):
                parts = parts[1:]
        parts = [part for part in parts if part and not (forms[2] and part in ids)]
        return any(len(tokenizer.model.tokenize(part)) < len(part) for part in parts)

    info = info_of(tokenizer)
    encoder = TextEncoder(info, compiled=False)
    counter = loss_counter(encoder)
    losses = counter(texts, texts, *encoder(texts, 0), 1)[0] if counter else None
    assert (losses.documents if losses else 0) == sum(map(loses, texts))
    assert losses is None or (losses.pieces >= losses.documents and bool(losses.example) == bool(losses.pieces))


def test_what_is_changed() -> None:
    """Behaviour: normalisers and decoders that change texts are named; those of byte-level and SentencePiece are not."""
    spaces = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    back = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    llama = bpe(["▁"], True, list(range(256)), normalizer=spaces, decoder=back)
    for tokenizer, named in (
        (byte_level(), []),
        (llama, []),
        (byte_level(normalizer=normalizers.NFC()), ["combining accents"]),
        (byte_level(normalizer=normalizers.Lowercase()), ["upper case"]),
        (byte_level(normalizer=normalizers.NFKC()), ["combining accents", "ligatures, superscripts and full-width characters"]),
        (byte_level(normalizer=normalizers.Strip()), ["white space"]),
        (byte_level(prefix=True), ["white space"]),
        (bpe(list("abc")), ["white space"]),
    ):  # fmt: skip
        assert changes(info_of(tokenizer)) == named
    stripping = byte_level()
    stripping.add_tokens([AddedToken("fox", lstrip=True, special=False)])
    assert changes(info_of(stripping)) == ["white space beside added tokens"]
    replacing = byte_level()
    replacing.normalizer = normalizers.Replace("fox", "cat")
    assert changes(info_of(replacing)) == ["what its normaliser replaces"]
    removing = byte_level()
    removing.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split("q", "removed"), removing.pre_tokenizer])
    assert changes(info_of(removing)) == ["what its pre-tokenizer removes"]
    assert unknown_id(info_of(llama)) is None and unknown_id(info_of(byte_level({13}, True))) == 1


def test_marks_of_white_space_are_counted() -> None:
    """Behaviour: U+2581 in a text, which decodes to a space, is counted with tokenizers that write spaces so."""
    unigram = Tokenizer(
        models.Unigram([("a", -1.0), ("\u2581", -1.0)] + [(f"<0x{i:02X}>", -9.0) for i in range(256)], None, True)
    )
    unigram.pre_tokenizer, unigram.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    llama = bpe(["\u2581"], True, list(range(256)), normalizer=normalizers.Replace(" ", "\u2581"))
    for tokenizer in (unigram, llama):
        encoder = TextEncoder(info_of(tokenizer), compiled=False)
        counter = loss_counter(encoder)
        assert counter
        texts = ["a a", "\u2581a\u2581"]
        lost, replaced = counter(texts, ["x", "y"], *encoder(texts, 0), 1)
        assert (lost.documents, replaced) == (0, Losses(1, 2, 0, "'\u2581' (U+2581) in 'y'"))
    totals = TokenCounts(documents=2, replaced=replaced)
    assert totals.check_losses() == [
        "the tokenizer reads 2 characters of text as spaces, in 1 of 2 documents: the first is '\u2581' (U+2581) in 'y'"
    ]
    assert totals.counts()["replaced_characters"] == 2
    assert loss_counter(TextEncoder(info_of(byte_level()), compiled=False)) is None


def test_losses_are_reported(tmp_path: Path, llmkit: Command) -> None:
    """Behaviour: one warning with counts and an example, counts in the summary and the record; a total loss is refused."""
    words = models.WordPiece({"[UNK]": 0, END: 1, "hello": 2, "##s": 3}, unk_token="[UNK]")
    wordpiece = Tokenizer(words)
    wordpiece.normalizer, wordpiece.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    for name, tokenizer in (("gap", byte_level({0x0D, 0xA9})), ("word", wordpiece)):
        (tmp_path / name).mkdir()
        tokenizer.save(str(tmp_path / name / "tokenizer.json"))
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))
    rows = [{"id": "a", "text": "Hello hellos"}, {"id": "b", "text": "hello caf\u00e9\r\n"}]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = llmkit("tokenize", "d.jsonl", "-t", "gap", "-o", "gap-s", "-j", "2", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr.count(b"warning") == 1
    assert b"no tokens for 2 pieces of text, in 1 of 2 documents: the first is '\xc3\xa9' in 'b'" in done.stderr
    done = llmkit("tokenize", "--decode", "gap-s", "--plain", cwd=tmp_path)
    assert b"changes texts" in done.stderr and b"characters that it has no tokens for" in done.stderr
    done = llmkit("tokenize", "d.jsonl", "-t", "word", "-o", "word-s", "--json", cwd=tmp_path)
    assert b"warning: word changes texts" in done.stderr and b"white space, upper case" in done.stderr
    summary = json.loads(done.stderr.splitlines()[-1])
    assert (summary["lossy_documents"], summary["lost_pieces"]) == (1, 1)
    done = llmkit("tokenize", "--decode", "word-s", "--plain", cwd=tmp_path)
    assert b"changes texts" in done.stderr and b"in 1 of 2 documents: the first is in 'b'" in done.stderr
    (tmp_path / "e.jsonl").write_text('{"text": "\u65e5\u672c"}\n')
    done = llmkit("tokenize", "e.jsonl", "-t", "word", "-o", "none", cwd=tmp_path)
    assert done.returncode == 1 and b"no tokens for any of the texts" in done.stderr and b"hint" in done.stderr
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("options", [["--to", "megatron"], ["--to", "nanogpt"]])
def test_files_of_exports_are_named(tmp_path: Path, llmkit: Command, options: list[str]) -> None:
    """Behaviour: the summary names the files that were written; lineage and commands for shards tell what they are."""
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "d.jsonl").write_text('{"text": "a"}\n')
    done = llmkit("tokenize", "d.jsonl", "-t", ".", *options, "-o", "corpus.bin", cwd=tmp_path)
    names = ["corpus.bin", *(["corpus.idx"] if "megatron" in options else [])]
    assert done.stderr.endswith(f"written to {' and '.join(names)}; not kept: ids, sources\n".encode())
    assert b": 1 document, 2 tokens" in done.stderr
    assert b"made from" in llmkit("lineage", "corpus.bin", cwd=tmp_path).stderr
    for command in (
        ["mix", "corpus.bin"],
        ["tokenize", "corpus.bin", "-t", "."],
        ["tokenize", "--decode", "corpus.bin"],
    ):
        assert b"--from FORMAT" in llmkit(*command, cwd=tmp_path).stderr


def test_text_and_pages_are_extracted_first(tmp_path: Path, llmkit: Command) -> None:
    """Behaviour: for a file that does not begin like JSON lines the hint is extract; for a damaged line as before."""
    byte_level().save(str(tmp_path / "tokenizer.json"))
    for name, content, hint in (
        ("a.txt", "Some text.\n", b"llmkit extract FILE"),
        ("a.html", "<p>Some text.\n", b"llmkit extract FILE"),
        ("a.jsonl", '{"text": \n', b"--on-bad-line skip"),
        ("b.jsonl", '{"text": "a"}\nnone\n', b"--on-bad-line skip"),
    ):
        (tmp_path / name).write_text(content)
        done = llmkit("tokenize", name, "-t", ".", "-o", "s", cwd=tmp_path)
        assert done.returncode == 1 and hint in done.stderr
