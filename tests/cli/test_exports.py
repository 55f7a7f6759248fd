"""Exports of token shards keep what their format can hold, and refuse or name the rest."""

from __future__ import annotations

import json
import struct
import subprocess
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import numpy as np
import orjson
import pytest

from llmkit.errors import LlmkitError
from llmkit.shards.formats import nanogpt
from llmkit.shards.reader import TokenStore
from llmkit.shards.token_block import TokenBlock
from llmkit.shards.tokenizer_info import TokenizerInfo
from llmkit.tokens.convert import end_documents

Command = Callable[..., subprocess.CompletedProcess[bytes]]
LENGTH = 64


@pytest.fixture
def place(tmp_path: Path, small_tokenizer: dict[str, str], llmkit: Command) -> Path:
    """tok/, s/ (40 documents, some longer than LENGTH), whole/ (a mix, in which they repeat), packed/, cut/."""
    (tmp_path / "tok").mkdir()
    for name, text in small_tokenizer.items():
        (tmp_path / "tok" / name).write_text(text)
    rows = [
        orjson.dumps({"id": f"d{i}", "text": f"{i} the quick brown fox " * (1 + i % 20)}) + b"\n" for i in range(40)
    ]
    (tmp_path / "d.jsonl").write_bytes(b"".join(rows))
    for words in (
        ("tokenize", "d.jsonl", "-t", "tok", "-o", "s"),
        ("mix", "s:x2", "-o", "whole"),
        ("mix", "s", "--pack", "best-fit", "--sequence-length", str(LENGTH), "-o", "packed"),
        ("mix", "s", "--tokens", "700", "--cut-last", "-o", "cut"),
    ):
        assert llmkit(*words, "-q", cwd=tmp_path).returncode == 0
    return tmp_path


def documents(path: Path) -> list[list[int]]:
    store = TokenStore.open(str(path))
    return [store.document(i).tolist() for i in range(store.documents)]


def megatron_documents(prefix: Path) -> list[list[int]]:
    """Another reader, from the layout that Megatron-LM's indexed_dataset.py describes."""
    index, data = (prefix.with_suffix(end).read_bytes() for end in (".idx", ".bin"))
    sequences, bounds = struct.unpack_from("<QQ", index, 18)
    lengths = struct.unpack_from(f"<{sequences}i", index, 34)
    offsets = struct.unpack_from(f"<{sequences}q", index, 34 + 4 * sequences)
    firsts = struct.unpack_from(f"<{bounds}q", index, 34 + 12 * sequences)
    rows = [list(struct.unpack_from(f"<{n}H", data, start)) for n, start in zip(lengths, offsets, strict=True)]
    return [[*chain(*rows[a:b])] for a, b in zip(firsts, firsts[1:], strict=False)]


def test_whole_documents_come_back(place: Path, llmkit: Command) -> None:
    """Parity with nanoGPT's memmap and with Megatron's layout: exported documents are the shards'; imported again they
    are the same; what the formats do not hold is named.
    """
    expected = documents(place / "whole")
    for form, name in (("nanogpt", "x.bin"), ("megatron", "y.idx")):
        done = llmkit("tokenize", "whole", "--to", form, "-o", name, "--json", cwd=place)
        assert orjson.loads(done.stderr.splitlines()[-1])["not_held"] == ["ids", "sources", "epochs"]
        assert llmkit("tokenize", name, "--from", form, "-t", "tok", "-o", form, "-q", cwd=place).returncode == 0
        assert documents(place / form) == expected
    flat = np.memmap(place / "x.bin", np.uint16, "r").tolist()
    assert flat == [*chain(*expected)] and megatron_documents(place / "y.idx") == expected
    done = llmkit("tokenize", "d.jsonl", "-t", "tok", "--to", "nanogpt", "-o", "z.bin", cwd=place)
    assert b"; not kept: ids, sources" in done.stderr
    assert np.fromfile(place / "z.bin", np.uint16).tolist() == [*chain(*documents(place / "s"))]


def test_packed_and_cut_documents_are_refused(place: Path, llmkit: Command) -> None:
    """Behaviour: sequences, padding and pieces that a format cannot hold are refused in one line, and nothing is left;
    --lossy leaves out the padding and ends each piece.
    """
    eos = TokenStore.open(str(place / "s")).tokenizer.eos_id
    for shards, form, message in (
        (
            "packed",
            "nanogpt",
            b"packed into sequences of 64 tokens; nanogpt holds neither their borders nor their padding",
        ),
        ("packed", "megatron", b"packed into sequences of 64 tokens; megatron holds neither"),
        ("cut", "nanogpt", b"1 pieces of documents that mix cut"),
        ("cut", "megatron", b"1 pieces of documents that mix cut"),
    ):
        before = sorted(place.iterdir())
        done = llmkit("tokenize", shards, "--to", form, "-o", "x.bin", cwd=place)
        assert done.returncode == 1 and message in done.stderr and b"--lossy" in done.stderr, done.stderr
        assert sorted(place.iterdir()) == before
        done = llmkit("tokenize", shards, "--to", form, "-o", f"{shards}.bin", "--lossy", "-f", cwd=place)
        assert done.returncode == 0 and b"added the end-of-text token to" in done.stderr
        store, rows = TokenStore.open(str(place / shards)), documents(place / shards)
        padding = store.padding if store.padding is not None else np.zeros(len(rows), bool)
        kept = [row for row, pad in zip(rows, padding, strict=True) if not pad]
        ended = [row if row[-1] == eos else [*row, eos] for row in kept]
        assert (
            llmkit("tokenize", f"{shards}.bin", "--from", form, "-t", "tok", "-o", "r", "-f", cwd=place).returncode == 0
        )
        assert documents(place / "r") == ended
    done = llmkit("tokenize", "--decode", "packed", "-o", "t.jsonl", cwd=place)
    assert done.returncode == 1 and b"pieces of documents that mix cut, which would become documents" in done.stderr
    lines = llmkit("tokenize", "cut", "--to", "jsonl", "--plain", "-q", cwd=place).stdout.splitlines()
    assert [orjson.loads(line)["tokens"] for line in lines] == documents(place / "cut")  # a piece has no end: marked


def test_end_of_text_inside_a_document(place: Path, llmkit: Command) -> None:
    """Behaviour: a stream without other borders would make two documents of one; Megatron's index does not."""
    (place / "e.jsonl").write_bytes(orjson.dumps({"text": "a<|endoftext|>b"}) + b"\n")
    call = ("tokenize", "e.jsonl", "-t", "tok", "--allow-special", "-o")
    done = llmkit(*call, "e.bin", "--to", "nanogpt", cwd=place)
    assert done.returncode == 1 and b"inside a document" in done.stderr and not (place / "e.bin").exists()
    assert llmkit(*call, "e.bin", "--to", "megatron", cwd=place).returncode == 0
    block = TokenBlock(np.array([5, 0, 6], np.uint16), np.array([2, 1]), ["a", "b"], ["", ""])
    ended = end_documents(block, TokenizerInfo("", 10, 0), flat=True, lossy=False)
    assert (ended.tokens.tolist(), ended.lengths.tolist(), ended.ended) == ([5, 0, 6, 0], [2, 2], 1)
    with pytest.raises(LlmkitError, match="inside a document"):
        end_documents(
            TokenBlock(np.array([0, 6]), np.array([2]), ["a"], [""]), TokenizerInfo("", 10, 0), flat=True, lossy=False
        )
    assert "np.uint32" in nanogpt._caveat(TokenizerInfo("", 70_000, 0)) and not nanogpt._caveat(TokenizerInfo("", 9, 0))


def test_budgets_are_met_or_missed_with_a_warning(place: Path, llmkit: Command) -> None:
    """Behaviour: a miss of over 1 % is warned of, of the mix or of a source; --cut-last meets it, in shards as in a plan
    that train follows, names the piece in summary and record, and cuts nothing where documents fit.
    """
    done = llmkit("mix", "s", "--tokens", "1200", "-o", "m", cwd=place)
    tokens = TokenStore.open(str(place / "m")).tokens
    assert (f"{tokens:,} tokens instead of 1,200".encode() in done.stderr) == (abs(tokens - 1200) > 12)
    done = llmkit("mix", "s:0.03k", "-n", cwd=place)
    assert b"s: " in done.stderr and b"instead of 30" in done.stderr and b"without --cut-last" in done.stderr
    done = llmkit("mix", "d.jsonl:0.03k", "-n", cwd=place)
    assert b"instead of 30" in done.stderr and b"--cut-last" not in done.stderr
    assert llmkit("mix", "d.jsonl", "--tokens", "100", "--cut-last", "-n", cwd=place).returncode == 2
    call = ("mix", "s", "--tokens", "1201", "--cut-last")
    summary = json.loads(llmkit(*call, "-o", "c", "--json", cwd=place).stderr.splitlines()[-1])
    assert summary["tokens"] == 1201 and len(summary["cut"]) == 1
    assert llmkit(*call, "--plan", "-o", "p.toml", "-q", cwd=place).returncode == 0
    from llmkit.lineage.formats import read_lineage
    from llmkit.mixing.order import OrderedTokens

    record, plan, store = (
        read_lineage(place / "c"),
        OrderedTokens.open(str(place / "p.toml")),
        TokenStore.open(str(place / "c")),
    )
    assert record and record["options"]["cut_last"] and record["counts"]["cut"] == summary["cut"]
    assert plan.tokens == store.tokens == 1201 and plan.span(0, 1201).tolist() == store.span(0, 1201).tolist()
    last = [i for i in range(store.documents) if store.document(i)[-1] != store.tokenizer.eos_id]
    assert len(last) == 1 and summary["cut"][0].startswith(f"{store.id(last[0])}: tokens 0 to ")
    assert "cut_last = true" in (place / "p.toml").read_text() and "version = 3" in (place / "p.toml").read_text()
    done = llmkit("mix", "s", "--cut-last", "-o", "w", "--json", cwd=place)
    assert json.loads(done.stderr.splitlines()[-1])["cut"] == []
