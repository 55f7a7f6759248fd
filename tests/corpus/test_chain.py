"""Presets, overrides, plug-in filters, and the work on one chunk."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import orjson
import pytest

from llmkit.corpus import chain_loader
from llmkit.corpus.chain import filter_chunk
from llmkit.corpus.chain_loader import as_rules, builtin_presets, describe_chain, load_chain, preset_text
from llmkit.corpus.filters import FILTERS, Check
from llmkit.corpus.page import Page
from llmkit.errors import LlmkitError, UsageError
from llmkit.io.documents import Chunk, ReadOptions

LINE = "This is a sentence that the authors have written to be read with care."


ORDER = {
    "c4": ["c4"],
    "code": ["code"],
    "dolma": ["dolma_c4", "dolma"],
    "fineweb": ["gopher_repetition", "gopher_quality", "c4", "fineweb"],
    "gopher": ["gopher_repetition", "gopher_quality"],
    "refinedweb": ["gopher_repetition", "gopher_quality", "refinedweb"],
    "txt360": ["txt360", "gopher_repetition", "gopher_quality"],
}
# Thresholds that a preset sets to other values than the filter's defaults.
OTHERWISE = {
    "fineweb": {"c4": {"require_end_mark"}},
    "dolma": {"dolma_c4": {"drop_curly_bracket", "drop_lorem_ipsum", "drop_javascript", "min_words_per_line"}},
}


def test_builtin_presets() -> None:
    """Behaviour: the presets and the order of their filters (FineWeb's is that of its published pipeline)."""
    order = {name: [step for step, _ in load_chain([name], [], [], "unicode").steps] for name in builtin_presets()}
    assert order == ORDER


@pytest.mark.parametrize("name", list(ORDER))
def test_presets_spell_out_every_threshold(name: str) -> None:
    """Property: the TOML sets every threshold, to the filter's default except for those that define the preset."""
    chain = dict(load_chain([name], [], [], "unicode").steps)
    for table in tomllib.loads(preset_text(name))["filter"]:
        kind = table.pop("name")
        expected = chain_loader.thresholds(FILTERS.get(kind))
        assert set(table) == set(expected)
        differing = {key for key in expected if expected[key] != getattr(chain[kind], key)}
        assert differing == OTHERWISE.get(name, {}).get(kind, set())


def test_printed_preset_gives_the_same_chain(tmp_path: Path) -> None:
    """Property: the output of --print-preset gives the same chain, and so do the names and rules for the lineage."""
    chain = load_chain(
        ["fineweb"],
        [],
        ["gopher_quality.stop_words=a,an", "fineweb.list_ratio=off", "c4.min_num_sentences=3"],
        "unicode",
    )
    (tmp_path / "my.toml").write_text(describe_chain(chain))
    assert load_chain([str(tmp_path / "my.toml")], [], [], "unicode") == chain
    names, changed = as_rules(chain)
    assert load_chain([], names, changed, "unicode") == chain
    assert "c4.require_end_mark=false" in changed and "fineweb.list_ratio=off" in changed


def test_rules_override_thresholds() -> None:
    """Behaviour: --rule sets one threshold, typed as its default; "off" switches it off."""
    chain = load_chain(
        ["gopher"],
        ["c4"],
        ["gopher_quality.max_symbol_word_ratio=0.2", "gopher_quality.min_doc_words=off", "c4.remove_citations=false"],
        "whitespace",
    )
    steps = dict(chain.steps)
    assert steps["gopher_quality"].max_symbol_word_ratio == 0.2
    assert steps["gopher_quality"].min_doc_words is None
    assert steps["c4"].remove_citations is False


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        ((["gofer"], [], []), "unknown preset 'gofer'", "gopher"),
        (([], ["gopher_qualty"], []), "unknown filter 'gopher_qualty'", "gopher_quality"),
        ((["gopher"], [], ["gopher_quality.min_doc_word=2"]), "unknown rule", "gopher_quality.min_doc_words"),
        ((["gopher"], [], ["gopher_qualty.min_doc_words=2"]), "unknown filter", "gopher_quality"),
        ((["gopher"], [], ["c4.min_num_sentences=2"]), "not in this chain", "gopher_quality"),
        ((["gopher"], [], ["gopher_quality.min_doc_words"]), "FILTER.THRESHOLD=VALUE", "gopher_quality"),
        ((["gopher"], [], ["gopher_quality.min_doc_words=many"]), "'many' is not a number", "off"),
        ((["gopher"], [], ["gopher_quality.min_doc_words=nan"]), "'nan' is not a number", "off"),
        ((["c4"], [], ["c4.remove_citations=maybe"]), "not true or false", ""),
    ],
)
def test_wrong_names_and_values(arguments: tuple[list[str], list[str], list[str]], message: str, hint: str) -> None:
    """Behaviour: a usage error that names the mistake and the closest known names."""
    with pytest.raises(UsageError) as caught:
        load_chain(*arguments, "unicode")
    assert message in caught.value.message and hint in caught.value.hint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such preset file"),
        ("[[filter]", "invalid TOML"),
        ("", "[[filter]] tables"),
        ("threshold = 1\n[[filter]]\nname = 'c4'\n", "'threshold'"),
        ("[[filter]]\nmin_doc_words = 1\n", "filter 1 has no name"),
        ("[[filter]]\nname = 'c4'\nmin_num_sentences = '7 or so'\n", "not a number"),
        ("[[filter]]\nname = 'c4'\n[[filter]]\nname = 'c4'\nmin_num_sentences = 3\n", "twice"),
    ],
)
def test_bad_preset_files(tmp_path: Path, content: str | None, message: str) -> None:
    """Behaviour: the error names the file and the problem."""
    path = tmp_path / "my.toml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(LlmkitError) as caught:
        load_chain([str(path)], [], [], "unicode")
    assert message in caught.value.message


def test_filter_chunk_keeps_bytes_and_explains_rejects() -> None:
    """Behaviour: unedited documents keep their bytes, edited ones change only their text, rejects get a reason."""
    good = "\n".join([LINE] * 5)
    lines = [
        orjson.dumps({"text": good, "n": 1}).replace(b'"n":1', b'"n" : 1.0'),  # spacing that re-encoding would lose
        orjson.dumps({"id": "b", "text": good + "\nmenu", "url": "u"}),
        orjson.dumps({"id": "c", "text": "menu\nmenu", "extra": [1]}),
        b"{broken",
        orjson.dumps({"id": "d", "text": good + "\nsome { here."}),
    ]
    result = filter_chunk(Chunk("f", 1, b"\n".join(lines)), ReadOptions(), load_chain(["c4"], [], [], "unicode"))
    kept = result.kept.splitlines()
    assert kept[0] == lines[0]
    assert orjson.loads(kept[1]) == {"id": "b", "text": good, "url": "u"}
    rejects = [orjson.loads(line) for line in result.rejects.splitlines()]
    assert rejects[0] == {
        "id": "c",
        "text": "menu\nmenu",
        "extra": [1],
        "filter": "c4",
        "reason": "too_few_sentences",
        "value": 0,
    }
    assert (rejects[1]["id"], rejects[1]["reason"], rejects[1]["value"]) == ("d", "curly_bracket", 1)
    assert [bad.line for bad in result.bad] == [4]
    assert (result.documents, result.edited) == (4, 1)
    assert result.dropped == {("c4", "too_few_sentences"): 1, ("c4", "curly_bracket"): 1}


def test_later_filters_see_the_edited_text() -> None:
    """Behaviour: FineWeb's rules see the text as edited by C4."""
    text = "\n".join([LINE + f" Number {i} of many." for i in range(5)] + ["Use cookies " + "x" * 60] * 3)
    assert load_chain([], ["fineweb"], [], "unicode").judge(text).drop == Check(
        "char_dup_ratio", pytest.approx(150 / 591, abs=0.1)
    )
    assert load_chain([], ["c4", "fineweb"], [], "unicode").judge(text).drop is None


def test_plugin_filters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behaviour: a dataclass or a function registers under a name; if it raises, the error names it and the document."""

    @dataclass(frozen=True)
    class Shouting:
        max_upper: float | None = 0.5

        def __call__(self, page: Page) -> Iterator[Check]:
            share = sum(map(str.isupper, page.text)) / len(page.text)
            yield Check("shouting", share, self.max_upper is not None and share > self.max_upper)

    monkeypatch.setitem(FILTERS._entries, "shouting", Shouting)
    monkeypatch.setitem(FILTERS._entries, "never", lambda page: False)
    monkeypatch.setitem(FILTERS._entries, "long", lambda page: Check("long", len(page.text), len(page.text) > 3))
    assert load_chain([], ["shouting"], [], "unicode").judge("ABCd").drop == Check("shouting", 0.75)
    assert load_chain([], ["shouting"], ["shouting.max_upper=0.8"], "unicode").judge("ABCd").drop is None
    assert load_chain([], ["never"], [], "unicode").judge("x").drop == Check("never")
    assert [load_chain([], ["long"], [], "unicode").judge(text).drop for text in ("abc", "abcd")] == [
        None,
        Check("long", 4),
    ]
    with pytest.raises(LlmkitError, match=r"docs.jsonl:7: filter 'shouting' raised ZeroDivisionError"):
        load_chain([], ["shouting"], [], "unicode").judge("", "docs.jsonl:7")
