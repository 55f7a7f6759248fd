"""How well does a trained classifier agree with people about what good web text is? Prints a dated table.

    python tests/bench/quality_classifier.py [--shared ../shared/data] [--seeds 5] > tests/bench/quality_classifier.md

246 web pages that people labelled good or bad. Each judge sees the same ten stratified folds, for several seeds, and labels the pages of a fold
after training on the other nine: `llmkit filter train` with its defaults, the fastText library with the same settings, and scikit-learn's
HashingVectorizer with SGDClassifier. Beside them the heuristic presets, which are not trained (kept = good), and the more frequent label.
Makes its own environment with the pinned peers under .cache/ on first use (about 400 MB) and runs itself there.
"""

from __future__ import annotations

import argparse
import math
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from peers import SHARED, call, inside, rows_of

REQUIREMENTS = [
    "fasttext-wheel==0.9.2",
    "scikit-learn==1.9.1",
    "numba==0.68.1",
    "numpy==2.4.6",
    "orjson",
    "zstandard",
    "xxhash",
]
FOLDS = 10
LABELS = ("good", "bad")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, default=SHARED)
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    inside("quality-1", REQUIREMENTS)
    report(arguments.shared, arguments.seeds)


# A judge learns from texts and targets (0 good, 1 bad) and scores other texts; the higher, the better.
Judge = Callable[[list[str], list[int], list[str], int], list[float]]


def ours(texts: list[str], targets: list[int], others: list[str], seed: int) -> list[float]:
    from llmkit.corpus.classifier_training import ClassifierOptions, train

    model = train(texts, targets, LABELS, ClassifierOptions(seed=seed))
    return [float(model.probabilities(text)[0]) for text in others]


def library(texts: list[str], targets: list[int], others: list[str], seed: int) -> list[float]:
    import fasttext

    from llmkit.corpus.classifier_training import ClassifierOptions

    how = ClassifierOptions()
    words = sum(len(text.split()) for text in texts)
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        for text, target in zip(texts, targets, strict=True):
            file.write(f"__label__{LABELS[target]} {' '.join(text.split())}\n")
        file.flush()
        model = fasttext.train_supervised(
            file.name, dim=how.dim, wordNgrams=how.word_ngrams, epoch=how.epochs_for(len(texts)), lr=how.rate,
            bucket=1 << (words // 4).bit_length(), thread=1, seed=seed, verbose=0,
        )  # fmt: skip
    lines = [" ".join(text.split()) + "\n" for text in others]
    return [{name: score for score, name in model.f.predict(line, 2, 0.0, "strict")}["__label__good"] for line in lines]


def linear(texts: list[str], targets: list[int], others: list[str], seed: int) -> list[float]:
    from sklearn.feature_extraction.text import HashingVectorizer
    from sklearn.linear_model import SGDClassifier

    hashed = HashingVectorizer(ngram_range=(1, 2), n_features=1 << 18)
    model = SGDClassifier(loss="log_loss", random_state=seed).fit(hashed.transform(texts), targets)
    return [float(score) for score in model.predict_proba(hashed.transform(others))[:, 0]]


JUDGES: dict[str, Judge] = {
    "llmkit filter train, defaults": ours,
    "fastText library, same settings": library,
    "scikit-learn, hashed 1- and 2-grams, logistic SGD": linear,
}


def report(shared: Path, seeds: int) -> None:
    from importlib.metadata import version

    import numpy as np

    from llmkit import __version__
    from llmkit.corpus.chain_loader import load_chain
    from llmkit.corpus.classifier_training import auc, stratify, wilson

    rows = rows_of(shared / "text" / "dclm_majority_data.jsonl.zst")
    texts = [row["text"] for row in rows]
    targets = [0 if row["label"] else 1 for row in rows]
    good = np.asarray(targets) == 0
    count = len(rows)

    right: dict[str, np.ndarray] = {}  # by judge: how often of the seeds each page got its label
    areas: dict[str, list[float]] = {}
    spread: dict[str, list[float]] = {}
    seconds: dict[str, float] = {}
    for name, judge in JUDGES.items():
        right[name], areas[name], spread[name] = np.zeros(count), [], []
        start = time.process_time()
        for seed in range(seeds):
            part, scores = stratify(targets, FOLDS, seed), np.zeros(count)
            for fold in range(FOLDS):
                rest, held = np.flatnonzero(part != fold).tolist(), np.flatnonzero(part == fold).tolist()
                scores[held] = judge(
                    [texts[i] for i in rest], [targets[i] for i in rest], [texts[i] for i in held], seed
                )
            correct = (scores > 0.5) == good
            right[name] += correct / seeds
            areas[name].append(auc(scores, good))
            spread[name].append(float(correct.mean()))
        seconds[name] = (time.process_time() - start) / seeds / FOLDS
    for preset in ("gopher", "c4", "fineweb"):
        chain = load_chain([preset], [], [], "unicode")
        right[f"preset {preset}"] = ((np.array([chain.judge(text).drop is None for text in texts])) == good).astype(
            float
        )
    right["the more frequent label"] = (good == (good.mean() >= 0.5)).astype(float)

    print(f"# Quality classifier beside people\n\n{time.strftime('%Y-%m-%d')}, llmkit {__version__}, ", end="")
    print(", ".join(f"{name} {version(name)}" for name in ("fasttext-wheel", "scikit-learn", "numba", "numpy")), end="")
    print(f", Python {platform.python_version()}; `{call()}`\n")
    print(
        f"{count} pages, {good.sum()} good and {(~good).sum()} bad; {FOLDS} folds, {seeds} seeds (of the folds and of training)."
    )
    print(
        "Agreement is the mean of the seeds; its 95 % interval is that of 246 pages (Wilson), however many the seeds. The difference"
    )
    print("from filter train is paired by page, its 95 % interval from 10,000 bootstrap samples of the pages.\n")
    print(
        "| judge | agreement | 95 % interval | least and most of the seeds | area under ROC | filter train less this | CPU s a training |"
    )
    print("|---|---|---|---|---|---|---|")
    first = next(iter(JUDGES))
    random = np.random.RandomState(0)
    samples = random.randint(0, count, (10_000, count))
    for name, values in right.items():
        low, high = wilson(round(values.sum()), count)
        cells = [name, f"{values.mean():.1%}", f"{low:.1%} to {high:.1%}"]
        cells += (
            [f"{min(spread[name]):.1%}, {max(spread[name]):.1%}", f"{np.mean(areas[name]):.3f}"]
            if name in spread
            else ["", ""]
        )
        difference = (right[first] - values)[samples].mean(1)
        edges = np.quantile(difference, [0.025, 0.975])
        cells.append(
            "" if name == first else f"{(right[first] - values).mean():+.1%} ({edges[0]:+.1%} to {edges[1]:+.1%})"
        )
        cells.append(f"{seconds[name]:.1f}" if name in seconds else "")
        print("| " + " | ".join(cells) + " |")
    half = 100 * 1.96 * math.sqrt(0.25 / count)
    print(f"\nWith {count} pages an interval is some {2 * half:.0f} points wide: what lies inside it is no finding.")


if __name__ == "__main__":
    main()
