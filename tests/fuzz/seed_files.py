"""Makes the small files that mutations start from, mostly with llmkit's own writers: `python tests/fuzz/seed_files.py`.

They are kept in corpus/TARGET/, beside the findings (found-*, bomb-*), and what a case is read together with in beside/. Other
versions of the libraries may write other bytes, so that the files, not this script, are what the tests use.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import shutil
import struct
import sys
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1]), str(HERE.parent / "corpus")]

from archive_records import arc, chunked, warc
from readers import BESIDE, CORPUS

from llmkit.io.record import Input, Lineage

LINES = b"".join(
    json.dumps(row, ensure_ascii=False).encode() + b"\n"
    for row in (
        {"id": "a", "text": "The quick brown fox.", "url": "http://e.org/1", "metadata": {"a": 1, "b": [1.5, None]}},
        {"text": "Zweite Zeile\n漢字 \u202e", "source": "web", "n": -0.0, "flag": True},
        {"id": 18446744073709551617, "text": "", "big": 123456789012345678901234567890, "e": 1e300},
    )
)
TEMPLATE = (
    "{%- for m in messages %}{{- '<|im_start|>' + m['role'] + '\n' + (m['content'] or '') }}"
    "{%- for c in m.get('tool_calls') or [] %}{{- c['function'] | tojson }}{%- endfor %}{{- '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


def save(target: str, name: str, data: bytes | str) -> Path:
    path = CORPUS / target / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def record(command: str, options: dict[str, Any], *inputs: Input) -> dict[str, Any]:
    """A complete record."""
    return Lineage(command, options, [*inputs], {"documents": 3}, "xxh3:" + "1" * 32).to_dict()


def lineage() -> Lineage:
    """One with inputs of every kind: an original, a pipe, a part, an index with its runs, a file of an option."""
    run = record(
        "dedup",
        {"method": "exact"},
        Input("input", "old.jsonl", "xxh3:" + "7" * 32),
        Input("index", "seen.duckdb", "", None, "", []),
    )
    first = record("extract", {"engine": "plain"}, Input("input", "crawl.warc.gz", "xxh3:" + "2" * 32))
    piped = record("filter", {"preset": ["fineweb"], "rule": ["length.minimum=5"]}, Input("input", "-", "", first))
    inputs = [
        Input("input", "-", "xxh3:" + "3" * 32, piped), Input("input", "part-00000.arrow", "xxh3:" + "4" * 32, first, "mix/heldout/part-00000.arrow"),
        Input("index", "seen.duckdb", "xxh3:" + "5" * 32, None, "", [run]), Input("rule url.domains=*", "list.txt", "xxh3:" + "6" * 32),
    ]  # fmt: skip
    return Lineage("dedup", {"method": "minhash", "threshold": 0.8, "keep": "longest"}, inputs)


def documents() -> None:
    from llmkit.io.document_writer import DocumentWriter

    save("documents", "lines.jsonl", LINES)
    save("documents", "carriage.jsonl", b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n")[:-2])
    for suffix in ("jsonl.zst", "jsonl.gz", "parquet"):
        rows = LINES if suffix != "parquet" else LINES.splitlines(keepends=True)[0] * 3
        for target in ("compression", "lineage") if suffix != "parquet" else ("parquet", "lineage"):
            path = CORPUS / target / f"written.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            with DocumentWriter(str(path), lineage(), force=True) as writer:
                writer.write(rows)
                writer.finish({"documents": 3, "kept": 3}, [])
    save("compression", "lines.jsonl.xz", lzma.compress(LINES) + lzma.compress(LINES) + bytes(4))
    save("compression", "lines.jsonl.bz2", bz2.compress(LINES) + bz2.compress(LINES))
    save("compression", "members.jsonl.gz", gzip.compress(LINES, mtime=0) * 2)


def parquet() -> None:
    import datetime
    from decimal import Decimal

    import pyarrow as pa
    import pyarrow.parquet as pq

    now = datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC)
    table = pa.table(
        {
            "id": pa.array(["a", "b"]), "text": pa.array([b"binary", "téxt".encode()]), "when": pa.array([now, None]),
            "list": pa.array([[1, 2], None]), "map": pa.array([[("k", 1.5)], []], pa.map_(pa.string(), pa.float64())),
            "struct": pa.array([{"x": None, "y": [b"\xff"]}, None]), "decimal": pa.array([Decimal("1.50"), None]),
            "dictionary": pa.array(["u", "u"]).dictionary_encode(), "time": pa.array([datetime.time(1), None]), "nan": [float("nan"), 1e308],
        }
    )  # fmt: skip
    for name, options in {
        "plain": {"compression": "none", "write_statistics": False}, "checked": {"write_page_checksum": True, "compression": "zstd"},
        "v2": {"data_page_version": "2.0", "compression": "gzip", "use_dictionary": False},
    }.items():  # fmt: skip
        sink = BytesIO()
        pq.write_table(table, sink, store_schema=name != "v2", **options)
        save("parquet", f"{name}.parquet", sink.getvalue())


def archives() -> None:
    page = b"<html><head><title>T</title></head><body><p>Words of a page, enough of them.</p></body></html>"
    body = gzip.compress(page, mtime=0)
    records = [
        warc(0, page),
        warc(1, body, "Content-Encoding: gzip"),
        warc(2, chunked(page), "Transfer-Encoding: chunked"),
        warc(3, page, end="\n"),
    ]
    info = b"WARC/1.0\r\nWARC-Type: warcinfo\r\nContent-Length: 0\r\n\r\n\r\n\r\n"
    segment = warc(4, page[:40]).replace(b"WARC-Type: response", b"WARC-Type: response\r\nWARC-Segment-Number: 1")
    rest = b"WARC/1.0\r\nWARC-Type: continuation\r\nWARC-Segment-Origin-ID: <urn:uuid:4>\r\nWARC-Segment-Number: 2\r\nWARC-Record-ID: <urn:uuid:5>\r\n"
    rest += b"Content-Length: %d\r\n\r\n%s\r\n\r\n" % (len(page) - 40, page[40:])
    save("warc", "plain.warc", b"".join([info, *records, segment, rest]))
    save("warc", "members.warc.gz", b"".join(gzip.compress(r, mtime=0) for r in [info, *records, segment, rest]))
    wet = b"WARC/1.0\r\nWARC-Type: conversion\r\nWARC-Target-URI: http://e.org/\r\nWARC-Date: 2026-01-01T00:00:00Z\r\nContent-Type: text/plain\r\nContent-Length: 5\r\n\r\nhello\r\n\r\n"
    save("warc", "text.warc.wet", wet)
    import zstandard

    frames = [zstandard.compress(r) for r in records]
    save("warc", "frames.warc.zst", b"".join(frames))
    save("warc", "stream.warc.xz", lzma.compress(records[0]))
    save("warc", "stream.warc.bz2", bz2.compress(records[0]))
    head = b"filedesc://a.arc 0.0.0.0 20200101000000 text/plain 76\n1 0 InternetArchive\nURL IP-address Archive-date Content-type Archive-length\n\n"
    arcs = [
        arc(0, page),
        arc(1, body, "Content-Encoding: gzip\r\n"),
        arc(2, chunked(page), "Transfer-Encoding: chunked\r\n"),
    ]
    save("arc", "plain.arc", b"".join([head, *arcs]))
    save("arc", "members.arc.gz", b"".join(gzip.compress(r, mtime=0) for r in [head, *arcs]))


def pages() -> None:
    html = """<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>A title</title><meta name="robots" content="noai">
<link rel="license" href="https://creativecommons.org/licenses/by/4.0/"><script type="application/ld+json">{"@type": "Article",
"articleBody": "Body of the article in JSON-LD."}</script></head><body><nav><a href="/">Home</a></nav><main><h1>Heading</h1>
<p>A first paragraph with <b>bold</b>, H<sub>2</sub>O and m<sup>2</sup>; it is long enough to count as text.</p>
<ul><li>One<li>Two <ul><li>Inner</ul></ul><dl><dt>Term<dd>Definition</dl><table><tr><th>a<th>b<tr><td>1<td></table>
<pre>code  here</pre><math><mfrac><mn>1</mn><mi>x</mi></mfrac><annotation encoding="application/x-tex">\\frac{1}{x}</annotation></math>
<blockquote>Quoted &amp; &#x263a;</blockquote></main><footer>Footer</footer></body></html>"""
    save("html", "page.html", html)
    save(
        "html",
        "latin.html",
        "<html><meta charset=iso-8859-1><p>Straße und Café, ein Absatz mit Wörtern.</p>".encode("latin-1"),
    )
    save("html", "wide.html", "<html><p>Ein Absatz in UTF-16, 漢字.</p>".encode("utf-16"))
    save("html", "fragment.html", "<p>A fragment</p><p>of <i>two</i> paragraphs.")
    content = b"BT /F1 12 Tf 20 100 Td (Hello from a page of text) Tj ET"
    packed = zlib.compress(content)
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>", b"<</Type/Pages/Kids[3 0 R 6 0 R]/Count 2>>",
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 200 200]/Contents 4 0 R/Resources<</Font<</F1 5 0 R>>>>>>",
        b"<</Length %d>>stream\n%s\nendstream" % (len(content), content), b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 200 200]/Contents 7 0 R/Resources<</Font<</F1 5 0 R>>>>>>",
        b"<</Length %d/Filter/FlateDecode>>stream\n%s\nendstream" % (len(packed), packed), b"<</Title(A title)>>",
    ]  # fmt: skip
    data, offsets = b"%PDF-1.5\n", []
    for number, body in enumerate(objects, 1):
        offsets.append(len(data))
        data += b"%d 0 obj%s\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    end = b"xref\n0 %d\n0000000000 65535 f \n%strailer<</Size %d/Root 1 0 R/Info 8 0 R>>\nstartxref\n%d\n%%%%EOF\n"
    save("pdf", "two_pages.pdf", data + end % (len(objects) + 1, table, len(objects) + 1, len(data)))
    save("plain_text", "text.txt", "Plain text, with some lines\n\nand <b>no</b> page. Grüße.\n")
    save("plain_text", "wide.txt", "Text in UTF-16\n".encode("utf-16"))
    save("plain_text", "readme.md", "# Heading\n\n<p>Markdown that mentions a tag</p>\n")
    save("plain_text", "rows.jsonl", b'{"html": "<p>A row with a page in it</p>"}\n')


def tokenizers() -> dict[str, str]:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("o", "x"), ("1", "2")]
    names = [*special, *alphabet, *("".join(pair) for pair in merges)]
    byte_level = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges))
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    byte_level.add_special_tokens(special)
    unigram = Tokenizer(
        models.Unigram(
            [("<unk>", 0.0), ("</s>", 0.0), ("▁the", -2.0), ("▁", -3.0), ("t", -4.0), ("fox", -4.0)], 0, False
        )
    )
    unigram.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(" ", "▁"), normalizers.Prepend("▁")]
    )
    unigram.pre_tokenizer, unigram.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    words = Tokenizer(models.WordPiece({"[UNK]": 0, "the": 1, "##s": 2, "</s>": 3}, unk_token="[UNK]"))
    words.normalizer, words.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    level = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "</s>": 2}, unk_token="<unk>"))
    pattern = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    level.pre_tokenizer = pre_tokenizers.Split(__import__("tokenizers").Regex(pattern), "isolated")
    for name, tokenizer in {
        "byte_level": byte_level,
        "unigram": unigram,
        "wordpiece": words,
        "word_level": level,
    }.items():
        save(
            "tokenizer",
            f"{name}.json",
            json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, separators=(",", ":")),
        )
    config = {
        "eos_token": "<|endoftext|>",
        "bos_token": {"content": "<|im_start|>"},
        "chat_template": [{"name": "default", "template": TEMPLATE}],
    }
    from llmkit.tokens.vocabulary import tokenizer_config

    content = json.loads(
        tokenizer_config(record("vocab", {"size": 264}, Input("input", "docs.jsonl", "xxh3:" + "7" * 32)))
    )
    save("tokenizer_config", "config.json", json.dumps(config))
    save("lineage_of_a_tokenizer", "config.json", json.dumps(content | {"chat_template": TEMPLATE}))
    files = {"tokenizer.json": (CORPUS / "tokenizer" / "byte_level.json").read_text(encoding="utf-8")}
    files |= {"tokenizer_config.json": json.dumps(config), "chat_template.jinja": TEMPLATE}
    for name, text in files.items():
        path = BESIDE / "tokenizer" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return files


def token_files(files: dict[str, str]) -> None:
    import numpy as np

    from llmkit.shards.formats import FOREIGN_FORMATS
    from llmkit.shards.token_block import TokenBlock
    from llmkit.shards.tokenizer_info import parse_tokenizer
    from llmkit.shards.writer import ShardWriter

    info = parse_tokenizer(files, "tokenizer")
    for target, name, options in (
        ("shards", "plain.arrow", {}), ("shards", "mixed.arrow", {"epochs": True, "sequence_length": 8, "stages": [4, 9]}),
        ("shards", "counted.arrow", {"duplicates": True}), ("lineage", "shards.arrow", {}),
    ):  # fmt: skip
        path = CORPUS / target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with ShardWriter(str(path), info, lineage(), force=True, **options) as writer:
            for i, tokens in enumerate(([5, 6, 7, 0], [8, 0], [100, 263, 0])):
                writer.write(np.array(tokens, np.uint16), str(i), "web", numeric=i == 1)
            writer.finish({"documents": 3}, [])
    block = TokenBlock(np.array([5, 6, 0, 7, 0, 8, 9, 0]), np.array([3, 2, 3]), ["a", "b", "c"], ["s"] * 3)
    for kind, name in (("nanogpt", "ids.bin"), ("megatron", "pair.idx")):
        path = CORPUS / kind / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with FOREIGN_FORMATS.get(kind).writer(str(path), info, force=True) as writer:
            writer.write(block)
            writer.finish({}, [])
    (CORPUS / "megatron" / "pair.bin").rename(BESIDE / "pair.bin")
    header = struct.pack("<iii", 20240520, 1, 8).ljust(1024, b"\0")
    save("nanogpt", "with_header.bin", header + np.array([5, 6, 0, 7, 0, 8, 9, 0], "<u2").tobytes())


def runs() -> None:
    """The trace of a run that read mixed documents."""
    from types import SimpleNamespace

    import numpy as np

    from llmkit.shards.reader import TokenStore
    from llmkit.training.trace import write_trace

    run = BESIDE / "run"
    shutil.rmtree(run, ignore_errors=True)
    (run / "checkpoints").mkdir(parents=True)
    shutil.copy(CORPUS / "shards" / "mixed.arrow", run / "data.arrow")
    store = TokenStore.open(str(run / "data.arrow"))
    order = SimpleNamespace(
        source=np.array([0, -1, 0, 0]), document=np.array([2, 0, 0, 1]), epoch=np.array([0, 0, 0, 1]), start=None
    )
    stream = SimpleNamespace(order=order, stores=[store], offsets=np.array([0, 3, 4, 8, 10], np.int64))
    write_trace(run, stream, [(0, 0, 1, 4), (2, 8, 2, 4)], 24)
    (run / "events.jsonl").write_text('{"skipped": [2], "cause": "noise"}\n')
    (run / "metrics.jsonl").write_text('{"step": 3}\n')
    (run / "checkpoints").rmdir()
    save("trace", "trace.json", (run / "trace" / "trace.json").read_bytes())
    save("trace_table", "offsets.npy", (run / "trace" / "offsets.npy").read_bytes())


def vocabularies() -> None:
    import base64

    encoded = [base64.b64encode(bytes([i])).decode() for i in range(256)] + [
        base64.b64encode(t).decode() for t in (b"th", b"the", b" the")
    ]
    save("vocabulary", "ranks.tiktoken", "".join(f"{token} {i}\n" for i, token in enumerate(encoded)))
    rows = [{"rank": i, "token_bytes": token} for i, token in enumerate(encoded)]
    config = {
        "pattern": r"\p{L}+|\s+|.",
        "num_vocab_tokens": 262,
        "default_vocab_size": 262,
        "default_num_special_tokens": 3,
        "version": "v3",
    }
    special = [
        {"rank": 0, "token_str": "<unk>", "is_control": True},
        {"rank": 1, "token_str": "<|endoftext|>", "is_control": True},
    ]
    save(
        "vocabulary",
        "tekken.json",
        json.dumps({"config": config, "vocab": rows, "special_tokens": special}, separators=(",", ":")),
    )

    def piece(text: bytes, score: float, kind: int) -> bytes:
        body = b"\n" + bytes([len(text)]) + text + b"\x15" + struct.pack("<f", score) + b"\x18" + bytes([kind])
        return b"\n" + bytes([len(body)]) + body

    save(
        "vocabulary",
        "pieces.model",
        b"".join(piece(t, -1.0, k) for t, k in ((b"<unk>", 2), (b"<s>", 3), (b"</s>", 3), ("▁the".encode(), 1))),
    )


def models(files: dict[str, str]) -> None:
    import torch

    from llmkit.model.config import ModelConfig
    from llmkit.model.decoder import Decoder
    from llmkit.model.pretrained.checkpoint import save_model
    from llmkit.model.pretrained.safetensors import layout_of, write_safetensors
    from llmkit.training.checkpoint.trainer_state import TrainerState

    directory = BESIDE / "model"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    config = ModelConfig(32, 8, 8, 1, 2, 1, 4, max_position_embeddings=16, eos_token_id=0)
    decoder = Decoder(config)
    decoder.initialize(0)
    made = Lineage("train", {"model": "tiny", "tokens": 100}, lineage().inputs, {"steps": 5}, None)
    save_model(directory, decoder.state_dict(), config, {}, made.to_json())
    (directory / "state").mkdir()
    tensors = {"exp_avg.a": torch.zeros(2, 3), "step": torch.ones(1)}
    write_safetensors(directory / "state" / "optimizer.safetensors", layout_of(tensors), tensors.__getitem__, {})
    state = TrainerState("train", {"lr": 0.001, "schedule": "wsd"}, ["xxh3:" + "8" * 32], 5, 100, 0.001, 4, 16, {}, {})
    (directory / "state" / "trainer.json").write_bytes(state.to_json())
    digests = {"config.json": "xxh3:" + "0" * 32}
    (directory / "state" / "digests.json").write_text(json.dumps(digests, indent=1))
    weights, described = (directory / "model.safetensors").read_bytes(), (directory / "config.json").read_bytes()
    save("safetensors", "model.safetensors", weights)
    save("lineage_of_a_model", "model.safetensors", weights)
    save("model_config", "config.json", described)
    content = json.loads(described)
    rope = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,
    }
    save("model_config", "rope.json", json.dumps(content | {"rope_scaling": rope}))
    scheme = {
        "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 4},
        "targets": ["Linear"],
    }
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": scheme},
    }
    save("model_config", "quantized.json", json.dumps(content | {"quantization_config": quantization}))
    save("trainer_state", "trainer.json", state.to_json())
    save("optimizer_state", "optimizer.safetensors", (directory / "state" / "optimizer.safetensors").read_bytes())


def classifiers() -> None:
    header = struct.pack("<ii", 793712314, 12)

    def quantised(rows: int, dim: int) -> bytes:
        centroids = struct.pack("<4i", dim, 2, 2, 2) + struct.pack(
            f"<{dim * 256}f", *(0.01 * (i % 99) for i in range(dim * 256))
        )
        return struct.pack("<?2qi", False, rows, dim, rows * 2) + bytes(i % 256 for i in range(rows * 2)) + centroids

    def model(loss: int, bucket: int, word_ngrams: int, max_n: int, packed: bool = False) -> bytes:
        words, labels = [b"</s>", b"the", b"fox"], [b"__label__en", b"__label__de"]
        entries = b"".join(word + struct.pack("<xqb", 5, 0) for word in words) + b"".join(
            label + struct.pack("<xqb", 3, 1) for label in labels
        )
        hyper = struct.pack("<12id", 4, 5, 5, 1, 5, word_ngrams, loss, 3, bucket, 2 if max_n else 0, max_n, 100, 1e-4)
        rows = 3 + bucket
        values = struct.pack(f"<{4 * rows}f", *(0.01 * i for i in range(4 * rows)))
        output = struct.pack("<8f", *(0.1 * i for i in range(8)))
        if packed:  # one n-gram is left after pruning
            start = header + hyper + struct.pack("<3i2q", 5, 3, 2, 21, 1) + entries + struct.pack("<2i", 7, 0)
            return start + b"\1" + quantised(4, 4) + struct.pack("<?2q", False, 2, 4) + output
        return (
            header
            + hyper
            + struct.pack("<3i2q", 5, 3, 2, 21, -1)
            + entries
            + struct.pack("<?2q", False, rows, 4)
            + values
            + struct.pack("<?2q", False, 2, 4)
            + output
        )

    for name, arguments in {
        "softmax": (3, 20, 2, 3),
        "hierarchical": (1, 0, 1, 0),
        "one_vs_all": (4, 20, 1, 3),
        "negative": (2, 20, 2, 0),
        "pruned": (3, 20, 2, 3, True),
    }.items():
        save("fasttext", f"{name}.bin", model(*arguments))


def chats() -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello", "weight": 0.5}]
    calls = [{"role": "user", "content": "weather?"}, {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}]},
             {"role": "tool", "content": "sun", "tool_call_id": "1"}, {"role": "assistant", "content": [{"type": "text", "text": "sun"}]}]  # fmt: skip
    rows: dict[str, Any] = {
        "messages": {"messages": turns, "id": 1}, "tools": {"messages": calls, "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
        "sharegpt": {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}], "system": "be kind"},
        "alpaca": {"instruction": "add", "input": "1 2", "output": "3"}, "prompt": {"prompt": "say", "completion": "said"},
        "text": {"text": "plain text"}, "chosen": {"prompt": "p", "chosen": "good", "rejected": "bad"},
        "lists": {"chosen": turns, "rejected": [turns[0], {"role": "assistant", "content": "no"}]},
        "hh": {"chosen": "\n\nHuman: hi\n\nAssistant: hello", "rejected": "\n\nHuman: hi\n\nAssistant: go"},
        "dialogue": {"prompt": turns[:1], "chosen": [turns[1]], "rejected": [{"role": "assistant", "content": "no"}]},
        "instruction": {"instruction": "i", "chosen": "a", "rejected": "b"}, "kto": {"prompt": "p", "completion": "c", "label": True},
    }  # fmt: skip
    answers = [
        {"message_id": str(rank), "parent_id": "q", "text": f"a{rank}", "role": "assistant", "rank": rank}
        for rank in (1, 0)
    ]
    question = {"message_id": "q", "text": "hi", "role": "prompter", "review_result": True, "deleted": False}
    rows |= {
        "tree": {"prompt": question | {"replies": answers}, "tree_state": "ready_for_export"},
        "instances": {"instruction": "add", "instances": [{"input": "1 2", "output": "3"}, {"output": "4"}]},
        "p3": {
            "inputs_pretokenized": "p",
            "targets_pretokenized": "t",
            "inputs": [1],
            "targets": [2],
            "is_correct": True,
        },
        "compared": {"instruction": "i", "output_1": "a", "output_2": "b", "preference": 1},
        "json": {
            "conversations": json.dumps(turns),
            "chosen": json.dumps(turns[1]),
            "rejected": '{"from": "gpt", "value": "no"}',
        },
    }
    for name, row in rows.items():
        save("rows", f"{name}.jsonl", json.dumps(row) + "\n")
    save("rows", "flat.jsonl", "".join(json.dumps(row) + "\n" for row in (question, *answers)))
    from llmkit.chat.templates import CHATML, TULU

    save("template", "tools.jinja", TEMPLATE)
    save("template", "chatml.jinja", CHATML)
    save("template", "tulu.jinja", TULU)
    namespace = "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% if loop.last %}{% break %}{% endif %}{% endfor %}{{ ns.n }}"
    save(
        "template",
        "namespace.jinja",
        namespace
        + "{% macro turn(m) %}{{ m.role | trim }}{% generation %}{{ m.content | default('', true) }}<|im_end|>{% endgeneration %}{% endmacro %}{% for m in messages %}{{ turn(m) }}{% endfor %}",
    )


def configurations() -> None:
    from importlib import resources

    from llmkit.mixing.plan import Plan, PlannedSource, format_plan

    save(
        "toml",
        "options.toml",
        'tokens = "2B"\nlr = 3e-4\nseed = 7\nbatch-size = 8\n[train]\nmodel = "tiny"\nresume = true\n',
    )
    save("toml", "recipe.toml", resources.files("llmkit.training.optim").joinpath("recipes", "olmo.toml").read_bytes())
    save("toml", "preset.toml", resources.files("llmkit.corpus").joinpath("presets", "c4.toml").read_bytes())
    stages = '[sources]\nweb = "web/"\nwiki = "wiki/"\n[[stage]]\nname = "first"\ntokens = "2M"\nmix = { web = 0.9, wiki = "x2" }\nlr = 1e-3\n[[stage]]\nmix = { wiki = 1000 }\n'
    save("toml", "stages.toml", stages)
    sources = (
        PlannedSource("../web", "xxh3:" + "1" * 32, (600, 20), (17, 801)),
        PlannedSource("plan.toml", "xxh3:" + "2" * 32, (5, 5)),
    )
    plan = format_plan(
        Plan(sources, 7, "xxh3:" + "3" * 32, "global", 64, ((1, 1), (2, 3)), True),
        record("mix", {"seed": 7}, *lineage().inputs),
    )
    save("toml", "plan.toml", plan)
    save("lineage_of_a_plan", "plan.toml", plan)


def indexes() -> None:
    import duckdb
    import zstandard

    from llmkit.corpus.dedup.exact import Exact
    from llmkit.corpus.dedup.index import Index, settings_of

    settings = settings_of(None, Exact(), full=False)
    for name, size in (("small_blocks", 16384), ("blocks", 262144)):
        path = CORPUS / "index" / f"{name}.duckdb"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        duckdb.connect(str(path), config={"default_block_size": str(size)}).close()
        with Index(str(path), settings) as index:
            index.begin()
            index._sql.execute("INSERT INTO runs VALUES (1, 'key', 3, 2)")
            index._sql.execute("INSERT INTO seen (run, id) VALUES (1, 'a'), (1, 'b')")
            index._sql.execute("COMMIT")
            index._empty = False
            index.add_record(1, record("dedup", {}, Input("input", "docs.jsonl", "xxh3:" + "9" * 32)))
        save("index", f"{name}.duckdb.zst", zstandard.compress(path.read_bytes(), 19))
        path.unlink()


def former_findings() -> None:
    """Findings from before this folder that can be made: files that swelled, hung or panicked."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    import zstandard

    save("compression", "bomb-runs.jsonl.zst", zstandard.compress(b'{"text": "' + bytes(97 for _ in range(1 << 22))))
    save("compression", "bomb-runs.jsonl.bz2", bz2.compress(b'{"text": "' + b"a" * (1 << 21)))
    sink = BytesIO()
    pq.write_table(pa.table({"text": pa.array(["x" * (1 << 20)] * 400).dictionary_encode()}), sink, compression="zstd")
    save("parquet", "bomb-long_texts.parquet", sink.getvalue())
    stream = pa.ipc.open_stream((CORPUS / "shards" / "plain.arrow").read_bytes())
    sink, codes = BytesIO(), pa.array([0], pa.int32())
    tokens = pa.LargeListArray.from_arrays(pa.array([0, 1 << 20], pa.int64()), pa.array(np.zeros(1 << 20, np.uint16)))
    row = pa.record_batch(
        [tokens, pa.array(["a"]), pa.DictionaryArray.from_arrays(codes, pa.array(["s"]))], schema=stream.schema
    )
    with pa.ipc.new_stream(sink, stream.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_batch(row)
    save("shards", "bomb-packed.arrow", sink.getvalue())
    content = json.loads((CORPUS / "tokenizer" / "byte_level.json").read_text(encoding="utf-8"))
    step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    nested = {"type": "Sequence", "pretokenizers": [step] * 40}
    panic = {"type": "Split", "pattern": {"Regex": "(?:a{999}){999}"}, "behavior": "Isolated", "invert": False}
    slow = panic | {"pattern": {"Regex": "(a|aa|aaa)+$x"}}
    for name, steps in {"nested": nested, "panic": panic, "slow": slow}.items():
        save(
            "tokenizer",
            f"bomb-{name}.json",
            json.dumps(content | {"pre_tokenizer": steps}, ensure_ascii=False, separators=(",", ":")),
        )
    pruned = (CORPUS / "fasttext" / "pruned.bin").read_bytes()
    for part in (1 << 20, 1 << 28):  # one part of many numbers, of which the file holds four
        save(
            "fasttext",
            f"bomb-part_{part}.bin",
            pruned.replace(struct.pack("<4i", 4, 2, 2, 2), struct.pack("<4i", 4, 1, part, 4))
            .replace(struct.pack("<?2qi", False, 4, 4, 8), struct.pack("<?2qi", False, 4, 4, 4))
            .replace(
                bytes(range(8)) + struct.pack("<4i", 4, 1, part, 4), bytes(range(4)) + struct.pack("<4i", 4, 1, part, 4)
            ),
        )
    save(
        "template",
        "bomb-loops.jinja",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    )
    save("template", "bomb-product.jinja", "{{ 'A' * 10**9 }}")
    save("template", "bomb-power.jinja", "{{ 9**9**9 }}")
    save("template", "bomb-format.jinja", "{{ '%2000000000d' % 1 }}")
    save(
        "template",
        "bomb-doubled.jinja",
        "{% set ns = namespace(s='ab') %}{% for i in range(40) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    )


def main() -> None:
    CORPUS.mkdir(exist_ok=True)
    for path in [*CORPUS.glob("*/*")]:
        if not path.name.startswith("found-"):
            path.unlink()
    documents()
    parquet()
    archives()
    pages()
    files = tokenizers()
    token_files(files)
    runs()
    vocabularies()
    models(files)
    classifiers()
    chats()
    configurations()
    indexes()
    former_findings()


if __name__ == "__main__":
    main()
