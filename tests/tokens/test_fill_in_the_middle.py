"""Fill-in-the-middle: documents are stored completely, in another order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.errors import UsageError
from llmkit.io.documents import Chunk, ReadOptions
from llmkit.shards.tokenizer_info import TokenizerInfo, parse_tokenizer
from llmkit.tokens.encoder import DocumentEncoder, EncodeOptions
from llmkit.tokens.fill_in_the_middle import (
    NAMES,
    FillInTheMiddle,
    Segment,
    assemble_segments,
    make_fill_in_the_middle,
)
from llmkit.tokens.text_encoder import load_tokenizer

Trained = Callable[[str], TokenizerInfo]
PREFIX, SUFFIX, MIDDLE = 1, 2, 3
ALL = FillInTheMiddle(1.0, 0.5, 7, (PREFIX, SUFFIX, MIDDLE))


def put_together(segments: list[Segment]) -> str:
    """The text of a stored document in either form, or of one that was not split."""
    if len(segments) == 1:
        return str(segments[0])
    if segments[:2] == [PREFIX, SUFFIX]:
        _, _, suffix, middle_token, prefix, middle = segments
    else:
        prefix_token, prefix, suffix_token, suffix, middle_token, middle = segments
        assert (prefix_token, suffix_token) == (PREFIX, SUFFIX)
    assert middle_token == MIDDLE
    return f"{prefix}{middle}{suffix}"


def with_tokens(info: TokenizerInfo, names: tuple[str, ...]) -> TokenizerInfo:
    """The tokenizer with these special tokens as its only ones for fill-in-the-middle."""
    content = orjson.loads(info.files["tokenizer.json"])
    content["added_tokens"] = [token for token in content["added_tokens"] if "fim" not in token["content"]]
    for i, name in enumerate(names):
        content["added_tokens"].append(content["added_tokens"][0] | {"id": info.vocab_size + i, "content": name})
    return parse_tokenizer(info.files | {"tokenizer.json": orjson.dumps(content).decode()}, "tok")


@given(text=st.text(), id=st.text(), seed=st.integers(0, 2**64))
def test_nothing_is_lost(text: str, id: str, seed: int) -> None:
    """Property: prefix, middle and suffix make up the text in both forms, and depend only on seed and id."""
    for spm_rate in (0.0, 0.5, 1.0):
        fim = replace(ALL, seed=seed, spm_rate=spm_rate)
        segments = fim.segments(text, id, "x")
        assert put_together(segments) == text and segments == fim.segments(text, id, "y")
        assert spm_rate == 0.5 or isinstance(segments[1], int) == bool(spm_rate)


def test_rates_and_places() -> None:
    """Property: shares are as requested, within four standard deviations; splits are uniform over the 11 positions
    of ten characters; a higher rate splits the documents of a lower one, and more."""
    n, text = 6000, "0123456789"
    cut: dict[float, dict[int, list[Segment]]] = {}
    for rate in (0.1, 0.5):
        made = {i: replace(ALL, rate=rate, spm_rate=0.3).segments(text, f"doc-{i}", "x") for i in range(n)}
        cut[rate] = {i: segments for i, segments in made.items() if len(segments) > 1}
        assert abs(len(cut[rate]) / n - rate) < 4 * (rate * (1 - rate) / n) ** 0.5
    assert cut[0.1].items() <= cut[0.5].items()
    spm = sum(segments[:2] == [PREFIX, SUFFIX] for segments in cut[0.5].values()) / len(cut[0.5])
    assert abs(spm - 0.3) < 4 * (0.3 * 0.7 / len(cut[0.5])) ** 0.5
    psm = [segments for segments in cut[0.5].values() if segments[1] != SUFFIX]
    places = np.bincount([p for s in psm for p in (len(str(s[1])), 10 - len(str(s[3])))], minlength=11)
    expected = 2 * len(psm) / 11
    assert (abs(places - expected) < 4 * expected**0.5).all()


def test_only_some_sources() -> None:
    """Behaviour: documents of other sources are not split."""
    fim = replace(ALL, sources=("code", "tests"))
    assert [len(fim.segments("abc", "1", source)) for source in ("code", "prose", "tests")] == [6, 1, 6]


@pytest.mark.parametrize("names", NAMES)
def test_tokens_of_known_tokenizers(names: tuple[str, ...], trained: Trained) -> None:
    """Parity with `tokenizers`: sentinel tokens are found by their common names, in any order, with the library's ids."""
    info = with_tokens(trained("gpt-2"), names[::-1])
    known = load_tokenizer(info).get_vocab(with_added_tokens=True)
    found = make_fill_in_the_middle(info, 0.5, 0.5, 0)
    assert found is not None and found.sentinels == tuple(known[name] for name in names)


def test_what_cannot_be(trained: Trained) -> None:
    """Behaviour: missing tokens, invalid rates and sources without a rate are errors; a rate of 0 gives no
    transformation.
    """
    without = with_tokens(trained("gpt-2"), ())
    with pytest.raises(UsageError, match="no fill-in-the-middle tokens"):
        make_fill_in_the_middle(without, 0.5, 0.5, 0)
    for rate, spm_rate in ((1.5, 0.5), (-0.1, 0.5), (float("nan"), 0.5), (0.5, 2.0)):
        with pytest.raises(UsageError, match=r"--fim-(spm-)?rate"):
            make_fill_in_the_middle(without, rate, spm_rate, 0)
    with pytest.raises(UsageError, match="--fim-source without"):
        make_fill_in_the_middle(without, 0.0, 0.5, 0, ["code"])
    assert make_fill_in_the_middle(without, 0.0, 0.5, 0) is None


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.text(min_size=1).filter(lambda text: not text.isspace()), min_size=1, max_size=4))
def test_ids_decode_to_the_document(texts: list[str], trained: Trained) -> None:
    """Property: the ids between the sentinels decode to the pieces of the text; first and last tokens are right."""
    info = replace(with_tokens(trained("llama-bpe"), NAMES[1]), bos_id=5)
    fim = make_fill_in_the_middle(info, 1.0, 0.5, 3)
    assert fim is not None
    data = b"".join(orjson.dumps({"text": text}) + b"\n" for text in texts)
    made = DocumentEncoder(info, ReadOptions(), EncodeOptions(bos=True, fim=fim))(Chunk("a.jsonl", 1, data))
    library = load_tokenizer(info)
    assert len(made.ids) == len(texts)
    for text, (tokens, _, _) in zip(texts, made.documents(), strict=True):
        assert tokens[0] == 5 and tokens[-1] == info.eos_id
        first, second, third = (int(np.flatnonzero(tokens == id)[0]) for id in fim.sentinels)
        decoded = [
            library.decode(tokens[a + 1 : b].tolist(), skip_special_tokens=False)
            for a, b in ((first, second), (second, third), (third, len(tokens) - 1))
        ]
        assert first == 1
        # SPM: prefix and middle are one behind the last sentinel, and there is nothing behind the first.
        assert decoded[0] + decoded[2] + decoded[1] == text


def test_assemble() -> None:
    """Behaviour: single tokens keep their positions, also with empty texts or none."""
    lengths = {"": 0, "ab": 2, "c": 1}

    def encode(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        return np.array([ord(c) for text in texts for c in text], np.uint16), np.array(
            [lengths[t] for t in texts], np.int64
        )

    flat, counts = assemble_segments([[1, "ab", 2, "", 3, "c", 0], [0], ["", 9, 9], ["c"]], encode)
    assert (flat.tolist(), counts.tolist()) == ([1, 97, 98, 2, 3, 99, 0, 0, 9, 9, 99], [7, 1, 2, 1])
    assert flat.dtype == np.uint16
    assert [array.tolist() for array in assemble_segments([], encode)] == [[], []]
