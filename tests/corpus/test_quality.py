"""Training a classifier, and the filter `quality` that applies it."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmkit.corpus.chain_loader import load_chain
from llmkit.corpus.classifier_training import ClassifierOptions, auc, cross_validate, stratify, train, wilson
from llmkit.corpus.fasttext import Model, load
from llmkit.errors import LlmkitError, UsageError

QUICK = ClassifierOptions(dim=12, epochs=20)
TOPICS = {
    "good": "theorem proof energy river history language measured because therefore",
    "bad": "buy cheap click here now free casino offer subscribe",
    "ugly": "lorem ipsum dolor sit amet consectetur adipiscing elit sed",
}


def corpus(labels: tuple[str, ...] = ("good", "bad"), count: int = 60, seed: int = 0) -> tuple[list[str], list[int]]:
    """Texts with half of their words from their label's topic, and half common to all."""
    random_ = random.Random(seed)
    texts, targets = [], []
    for i in range(count):
        own = TOPICS[labels[i % len(labels)]].split()
        words = [random_.choice(own if random_.random() < 0.5 else ["the", "and", "of", "a"]) for _ in range(30)]
        texts.append(" ".join(words))
        targets.append(i % len(labels))
    return texts, targets


def stored(model: Model, path: Path) -> Path:
    with open(path, "wb") as sink:
        model.write(sink)
    return path


@pytest.fixture(scope="module")
def good_bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a model with two labels."""
    return stored(train(*corpus(), ("good", "bad"), QUICK), tmp_path_factory.mktemp("model") / "model.bin")


@pytest.mark.parametrize("labels", [("good", "bad"), ("good", "bad", "ugly")])
def test_learns_and_reads_back(tmp_path: Path, labels: tuple[str, ...]) -> None:
    """Behaviour: unseen texts get their labels; the model in memory and the one in the file agree."""
    model = train(*corpus(labels), labels, QUICK)
    read = load(stored(model, tmp_path / "model.bin"))
    assert read.labels == labels
    texts, targets = corpus(labels, seed=1)
    for text, target in zip(texts, targets, strict=True):
        assert model.predict(text, 3) == read.predict(text, 3)
        assert read.predict(text)[0][0] == labels[target]


def test_equal_seeds_give_equal_bytes() -> None:
    """Property: the bytes of a model depend only on its texts and seed."""
    made = []
    for seed in (1, 1, 2):
        sink = io.BytesIO()
        train(*corpus(), ("good", "bad"), ClassifierOptions(dim=8, epochs=2, seed=seed)).write(sink)
        made.append(sink.getvalue())
    assert made[0] == made[1] != made[2]


def test_the_library_reads_what_we_train(good_bad: Path) -> None:
    """Parity with fasttext 0.9.2: it loads the file and gives the same probabilities."""
    reference = pytest.importorskip("fasttext", reason="fasttext-predict is not installed").load_model(str(good_bad))
    ours = load(good_bad)
    for text in [*corpus(seed=3)[0], "", "unknown words alone", "good __label__good </s> free"]:
        theirs = {
            name.removeprefix("__label__"): score for score, name in reference.f.predict(text + "\n", 2, 0.0, "strict")
        }
        assert dict(ours.predict(text, 2)) == pytest.approx(theirs, abs=1e-6)


def test_odd_texts_train() -> None:
    """Behaviour: empty texts, labels and `</s>` inside a text, a single word, and words of a megabyte are accepted."""
    texts = ["", "\0", "__label__good x </s> y", "one", "w" * 2_000_000, "é 日本 🙂"]
    model = train(texts, [0, 1, 0, 1, 0, 1], ("good", "bad"), ClassifierOptions(dim=4, epochs=2))
    words = model.lookup.words
    assert words == len({"</s>", "x", "y", "one", "w", "é", "日本", "🙂"})
    assert np.isfinite(model.input.average(model.features("x one"))).all()


def test_divergence_is_reported() -> None:
    """Behaviour: diverged training raises an error instead of writing non-finite weights."""
    with pytest.raises(LlmkitError, match="diverged"):
        train(["a", "b", "a b"], [0, 1, 0], ("good", "bad"), ClassifierOptions(dim=4, epochs=50, rate=1e20))


def test_cross_validation_uses_unseen_texts() -> None:
    """Property: out-of-fold agreement is that of a coin for random labels, and perfect for labels that texts reveal."""
    texts, targets = corpus(count=120)
    found = cross_validate(texts, targets, ("good", "bad"), QUICK, 4)
    assert (found.argmax(1) == targets).mean() > 0.95
    lots = random.Random(5).choices([0, 1], k=120)
    unique = [f"{text} w{i} v{i} u{i}" for i, text in enumerate(texts)]  # recognisable in training
    guessed = cross_validate(unique, lots, ("good", "bad"), QUICK, 4)
    assert 0.3 < (guessed.argmax(1) == lots).mean() < 0.7


def test_folds_are_even() -> None:
    """Property: each fold has its share of each class, to within one text."""
    part = stratify([0] * 33 + [1] * 20, 7, seed=3)
    for kind, size in ((slice(0, 33), 33), (slice(33, 53), 20)):
        shares = np.bincount(part[kind], minlength=7)
        assert shares.min() >= size // 7 and shares.max() <= -(-size // 7)
    assert np.ptp(np.bincount(part)) <= 1


def test_statistics() -> None:
    """Parity with published figures: Wilson's interval for 8 of 10; the area under the curve by counting pairs."""
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 10)[0] == 0 and wilson(10, 10)[1] == 1
    scores, positive = np.array([0.9, 0.8, 0.8, 0.3]), np.array([True, True, False, False])
    assert auc(scores, positive) == (1 + 1 + 1 + 0.5) / 4


# ---- the filter


def judge(text: str, *rules: str) -> Any:
    return load_chain([], ["quality"], list(rules), "unicode").judge(text)


def test_filter_keeps_by_score(good_bad: Path) -> None:
    """Behaviour: the positive label's probability decides and is added; `good` is found by name, others are set."""
    good, bad = corpus(seed=2)[0][:2]
    model = f"quality.model={good_bad}"
    kept = judge(good, model)
    assert kept.drop is None and kept.notes == {"quality": kept.notes["quality"]} and kept.notes["quality"] > 0.5
    dropped = judge(bad, model).drop
    assert dropped.reason == "quality" and dropped.value < 0.5
    assert judge(bad, model, "quality.label=bad").drop is None
    assert judge(bad, model, "quality.min_score=off").drop is None


def test_filter_adds_the_most_probable_label(tmp_path: Path) -> None:
    """Behaviour: with more than two labels the most probable one is added, too."""
    labels = ("good", "bad", "ugly")
    path = stored(train(*corpus(labels), labels, QUICK), tmp_path / "three.bin")
    text = corpus(labels, seed=4)[0][2]
    notes = judge(text, f"quality.model={path}", "quality.min_score=off").notes
    assert notes["quality_label"] == "ugly" and notes["quality"] < 0.5


def test_filter_needs_a_model_and_a_label(tmp_path: Path, good_bad: Path) -> None:
    """Behaviour: no model, no obvious positive label, and an unknown label are usage errors that list the choices."""
    with pytest.raises(UsageError, match="needs a model"):
        judge("x")
    with pytest.raises(UsageError, match="unknown label 'godo'"):
        judge("x", f"quality.model={good_bad}", "quality.label=godo")
    path = stored(train(*corpus(("bad", "ugly")), ("bad", "ugly"), QUICK), tmp_path / "other.bin")
    with pytest.raises(UsageError, match="positive") as caught:
        judge("x", f"quality.model={path}")
    assert "bad, ugly" in caught.value.hint
