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

from llmkit.shards.tokenizer_info import TokenizerInfo
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
    losses = counter(texts, texts, ids, lengths, 1) if counter else None
    assert (losses.documents if losses else 0) == lossy
    assert losses is None or (losses.pieces >= lossy and bool(losses.example) == bool(lossy))
    assert losses is None or losses.blank >= sum(back in ("", UNKNOWN) for back in decoded)


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
    assert b"warning: word changes texts" in done.stderr and b"upper case" in done.stderr
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
