"""Quality by a classifier: keep documents that resemble the good ones it was trained on.

The model is any fastText classifier: one made by `llmkit filter train`, or a published one such as DCLM's
(labels `hq` and `cc`). It reads the first 1,048,576 characters of the text unchanged: not lower-cased, and
split at whitespace only. A kept document gets the field `quality`, the probability of the positive label; where
the model has more than two labels, it also gets `quality_label`, the most probable one.

    llmkit filter train good.jsonl bad.jsonl -o model.bin
    llmkit filter docs.jsonl --filter quality --rule quality.model=model.bin --rule quality.min_score=0.3

Agreement of such a score with human judgement: tests/bench/quality_classifier.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache

import numpy as np

from llmkit.corpus.fasttext import LONGEST, Model, load
from llmkit.corpus.filters import FILTERS, Check, below
from llmkit.corpus.page import Page
from llmkit.errors import UsageError, unknown_name

POSITIVE = ("hq", "good", "high", "positive")  # names of the positive label where quality.label is not set


@FILTERS.register("quality")
@dataclass(frozen=True, slots=True)
class Quality:
    """Drop documents for which `model` gives the positive `label` a probability below `min_score`.

    With an empty `label`, the positive label is the one called hq, good, high or positive.
    """

    model: str = field(default="", metadata={"file": True})
    label: str = ""
    min_score: float | None = 0.5

    def __call__(self, page: Page) -> Iterator[Check]:
        model, positive = _model(self.model, self.label)
        probabilities = model.probabilities(page.text[:LONGEST])
        score = round(min(float(probabilities[positive]), 1.0), 4)
        page.note(quality=score)
        if len(probabilities) > 2:
            page.note(quality_label=model.labels[int(np.argmax(probabilities))])
        yield Check("quality", score, below(score, self.min_score))


@cache
def _model(path: str, label: str) -> tuple[Model, int]:
    """The model and the index of its positive label. Raises UsageError for no candidate, or more than one."""
    if not path:
        raise UsageError(
            "quality needs a model", "train one with llmkit filter train, and name it with --rule quality.model=PATH"
        )
    model = load(path)
    if label:
        if label not in model.labels:
            raise unknown_name("label", label, model.labels)
        return model, model.labels.index(label)
    candidates = [name for name in POSITIVE if name in model.labels]
    if len(candidates) != 1:
        raise UsageError(
            f"{path}: which label is the positive one?",
            f"set quality.label to one of its labels: {', '.join(model.labels[:30])}",
        )
    return model, model.labels.index(candidates[0])
