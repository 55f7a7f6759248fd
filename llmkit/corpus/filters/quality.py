"""Quality by a classifier: keep documents that look like the good ones it was trained on.

The model is any fastText classifier: one of `llmkit filter train`, or a published one such as DCLM's (labels `hq` and `cc`). The first 1,048,576
characters of the text are judged as they are, neither lower-cased nor split but at whitespace. A kept document gets the field `quality`, the
probability of the positive label, and where the model has more than two labels also `quality_label`, the most probable one.

    llmkit filter train good.jsonl bad.jsonl -o model.bin
    llmkit filter docs.jsonl --filter quality --rule quality.model=model.bin --rule quality.min_score=0.3

How far such a score agrees with people: tests/bench/quality_classifier.md.
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

POSITIVE = ("hq", "good", "high", "positive")  # one of these is the positive label where none is named


@FILTERS.register("quality")
@dataclass(frozen=True, slots=True)
class Quality:
    """Drop documents to which the classifier `model` gives the positive `label` (empty: hq, good, high or positive) with too low a probability."""

    model: str = field(default="", metadata={"file": True})
    label: str = ""
    min_score: float | None = 0.5

    def __call__(self, page: Page) -> Iterator[Check]:
        model, positive = _model(self.model, self.label)
        found = model.probabilities(page.text[:LONGEST])
        score = round(min(float(found[positive]), 1.0), 4)
        page.note(quality=score)
        if len(found) > 2:
            page.note(quality_label=model.labels[int(np.argmax(found))])
        yield Check("quality", score, below(score, self.min_score))


@cache
def _model(path: str, label: str) -> tuple[Model, int]:
    """The model and the index of its positive label. UsageError where there is none, or more than one could be meant."""
    if not path:
        raise UsageError(
            "quality needs a model", "llmkit filter train makes one; name it with --rule quality.model=PATH"
        )
    model = load(path)
    if label:
        if label not in model.labels:
            raise unknown_name("label", label, model.labels)
        return model, model.labels.index(label)
    known = [name for name in POSITIVE if name in model.labels]
    if len(known) != 1:
        raise UsageError(
            f"{path}: which label is the positive one?",
            f"set quality.label to one of its labels: {', '.join(model.labels[:30])}",
        )
    return model, model.labels.index(known[0])
