"""Questions about documented functions: fine-tuning rows, preference pairs, and a multiple-choice task with a baseline.

Every question shows the heading of a definition and asks what it does; the answer is the first sentence of its
docstring. Wrong answers are first sentences of other definitions of about the same length, so that the length gives
no hint. Rows and pairs come from training modules only. A task item is excluded if a training module has the same
answer, or the same name with nearly the same answer.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from .definitions import TRAIN, Definition, first_sentence

SHORTEST, LONGEST = 20, 160  # characters of an answer
END_OF_TEXT = "<|endoftext|>"  # of the tokenizer trained by `llmkit vocab`
SPREAD = 1.3  # maximum ratio of lengths between the choices of an item


@dataclass(frozen=True)
class Question:
    """A definition and what it does."""

    split: str
    heading: str  # `Thread.join(timeout=None)`
    name: str  # `Thread.join`
    answer: str


def question_text(q: Question) -> str:
    """The text of a question. It spells out the name: to a small model, `addHandler` and ` handler` are unrelated."""
    return f"What does `{q.heading}` ({' '.join(words(q.name))}) do?"


def questions(definitions: Iterable[Definition]) -> list[Question]:
    """A question for every definition with a usable first sentence, without repetitions.

    Held-out definitions must be public and have known parameters; for training, others are as good.
    """
    result: dict[tuple[str, str], Question] = {}
    for definition in definitions:
        answer = first_sentence(definition.docstring)
        usable = len(definition.heading) <= 100
        if definition.split != TRAIN:
            usable &= definition.public and bool(definition.signature)
        if usable and SHORTEST <= len(answer) <= LONGEST and len(answer.split()) >= 4:
            question = Question(definition.split, definition.heading, definition.name, answer)
            result.setdefault((question.name, question.answer), question)
    return list(result.values())


def held_out(asked: Sequence[Question], split: str) -> list[Question]:
    """The questions of a held-out split whose answers are not in a training module; names and answers are unique."""
    known = {_plain(q.answer) for q in asked if q.split == TRAIN}
    same_name: dict[str, list[set[str]]] = defaultdict(list)
    for q in asked:
        if q.split == TRAIN:
            same_name[_last(q.name)].append(set(words(q.answer)))
    kept: list[Question] = []
    seen: set[str] = set()
    for q in asked:
        if q.split != split or _plain(q.answer) in known | seen or q.name in seen:
            continue
        answer_words = set(words(q.answer))
        if any(len(answer_words & other) > 0.6 * len(answer_words | other) for other in same_name[_last(q.name)]):
            continue
        seen |= {_plain(q.answer), q.name}
        kept.append(q)
    return kept


def answer_rows(asked: Iterable[Question]) -> Iterator[dict[str, object]]:
    """Chat rows `{"messages": [...]}` of the training modules."""
    for q in asked:
        if q.split == TRAIN:
            yield {"messages": [_message("user", question_text(q)), _message("assistant", q.answer)]}


def bare_rows(asked: Iterable[Question]) -> Iterator[dict[str, object]]:
    """The same answers without a question, as `{"text"}` rows.

    lm-eval's PMI compares with the probability of a choice directly after the end-of-text token. Without such training
    rows, this probability would be meaningless.
    """
    for q in asked:
        if q.split == TRAIN:
            yield {"text": f"{END_OF_TEXT}{q.answer}"}


def preference_pairs(asked: Sequence[Question], repeats: int, seed: int) -> Iterator[dict[str, object]]:
    """Rows `{prompt, chosen, rejected}` of the training modules: the right answer against one of another definition."""
    rng = random.Random(seed)
    training = [q for q in asked if q.split == TRAIN]
    answers = Answers(q.answer for q in training)
    for _ in range(repeats):
        for q in rng.sample(training, len(training)):
            for rejected in answers.wrong(q.answer, 1, rng):
                yield {
                    "prompt": [_message("user", question_text(q))],
                    "chosen": [_message("assistant", q.answer)],
                    "rejected": [_message("assistant", rejected)],
                }


def choice_items(asked: Sequence[Question], split: str, seed: int) -> Iterator[dict[str, object]]:
    """Items `{question, name, choices, gold}` of a held-out split: four answers from its modules, one of them right."""
    rng = random.Random(seed)
    kept = held_out(asked, split)
    answers = Answers(q.answer for q in kept)
    for q in kept:
        wrong = answers.wrong(q.answer, 3, rng)
        if len(wrong) < 3:
            continue
        choices = [q.answer, *wrong]
        rng.shuffle(choices)
        yield {
            "question": question_text(q),
            "name": q.name,
            "choices": choices,
            "gold": choices.index(q.answer),
        }


def word_rule(items: Iterable[dict[str, object]]) -> tuple[float, float]:
    """Accuracy and standard error of a baseline rule: take the choice that shares most words with the name.

    Ties share the credit, which gives the expected accuracy of guessing among them.
    """
    scores = []
    for item in items:
        name = {_stem(word) for word in words(str(item["name"]))}
        choices: list[str] = item["choices"]  # type: ignore[assignment]
        shared = [len(name & {_stem(word) for word in words(choice)}) for choice in choices]
        best = [i for i, count in enumerate(shared) if count == max(shared)]
        scores.append((item["gold"] in best) / len(best))
    mean = sum(scores) / len(scores)
    variance = sum((score - mean) ** 2 for score in scores) / max(len(scores) - 1, 1)
    return mean, (variance / len(scores)) ** 0.5


def words(text: str) -> list[str]:
    """Lower-case words of a name or a sentence: split at underscores, dots and capitals (`addHandler` -> add, handler)."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", text)]


def _stem(word: str) -> str:
    """`returns`, `returned`, `returning` -> `return`; good enough to compare a name with a sentence."""
    for ending in ("ing", "ed", "es", "s"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word[: -len(ending)]
    return word


class Answers:
    """Sentences by length, for drawing wrong answers."""

    def __init__(self, answers: Iterable[str]) -> None:
        self._by_length: dict[int, list[str]] = defaultdict(list)
        for answer in sorted(set(answers)):  # sorted, since sets are unordered
            self._by_length[len(answer)].append(answer)

    def wrong(self, right: str, count: int, rng: random.Random) -> list[str]:
        """Up to `count` different sentences; their lengths and that of `right` are within a factor SPREAD.

        The window of lengths is placed at random around the length of `right`, and the other lengths are drawn
        uniformly from it, so that the right answer is the shortest or the longest as often as any other.
        """
        low = len(right) / SPREAD ** rng.random()
        lengths = [n for n in self._by_length if low <= n <= low * SPREAD]
        chosen: list[str] = []
        for _ in range(count):
            free = [n for n in lengths if set(self._by_length[n]) - {right, *chosen}]
            if not free:
                break
            wanted = low * SPREAD ** rng.random()
            nearest = min(free, key=lambda n: (abs(n - wanted), n))
            chosen.append(rng.choice([text for text in self._by_length[nearest] if text not in (right, *chosen)]))
        return chosen


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _plain(text: str) -> str:
    return " ".join(words(text))


def _last(name: str) -> str:
    return name.rpartition(".")[2]
