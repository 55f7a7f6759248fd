"""Reference implementations of the compiled kernels in plain Python, one document at a time."""

from __future__ import annotations

import re
from collections import Counter

from llmkit.corpus.words import TERMINALS, Splitter

CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]", re.ASCII)
POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")


def repeated(items: list[str]) -> tuple[int, int]:
    """Number of `items` that occurred earlier in the list, and their total length in characters."""
    seen: set[str] = set()
    count = characters = 0
    for item in items:
        count += item in seen
        characters += len(item) if item in seen else 0
        seen.add(item)
    return count, characters


def top_ngram_characters(words: list[str], n: int) -> int:
    """Characters in all copies of the most common n-gram (words joined by a space; of equally common ones the first).

    0 for texts of fewer than n words.
    """
    counts = Counter(" ".join(words[i : i + n]) for i in range(len(words) - n + 1))
    if not counts:
        return 0
    ngram, count = counts.most_common(1)[0]
    return len(ngram) * count


def duplicate_ngram_characters(words: list[str], n: int, separator: str) -> int:
    """Characters (without separators) in n-grams that occurred before, left to right, continuing after each repeat."""
    seen: set[str] = set()
    characters = i = 0
    while i <= len(words) - n:
        ngram = separator.join(words[i : i + n])
        if ngram in seen:
            characters += sum(map(len, words[i : i + n]))
            i += n
        else:
            seen.add(ngram)
            i += 1
    return characters


def repetition(text: str, words: list[str], separate: bool = True) -> dict[str, float]:
    """The statistics of the Gopher repetition rules, by name."""
    found = {}
    for unit, items in (("para", re.split(r"\n{2,}", text.strip())), ("line", re.split(r"\n+", text))):
        count, characters = repeated(items)
        found[f"dup_{unit}_frac"] = count / len(items)
        found[f"dup_{unit}_char_frac"] = characters / len(text)
    for n in (2, 3, 4):
        found[f"top_{n}_gram"] = top_ngram_characters(words, n) / len(text)
    for n in range(5, 11):
        separator = "\0" if separate else ""
        found[f"duplicated_{n}_n_grams"] = duplicate_ngram_characters(words, n, separator) / len(text)
    return found


def line_quality(text: str) -> dict[str, float]:
    """Shares of lines with a bullet and with an ellipsis."""
    lines = text.splitlines()
    bullets = sum(line.lstrip().startswith(("•", "-")) for line in lines)
    ellipses = sum(line.rstrip().endswith(("...", "…")) for line in lines)
    return {
        "bullet_lines_ratio": bullets / max(1, len(lines)),
        "ellipsis_lines_ratio": ellipses / max(1, len(lines)),
    }


def fineweb(text: str, words: list[str]) -> dict[str, float]:
    """The statistics of FineWeb's own rules; none for a blank text."""
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines:
        return {}
    newlines = text.count("\n")
    return {
        "line_punct_ratio": sum(line[-1] in TERMINALS for line in lines) / len(lines),
        "short_line_ratio": sum(len(line) <= 30 for line in lines) / len(lines),
        "char_dup_ratio": repeated(lines)[1] / (len(text) - newlines),
        "list_ratio": newlines / max(1, len(words)),
    }


def c4(text: str, splitter: Splitter, end_mark: bool, whole_page: bool) -> tuple[str, str]:
    """(reason, text) of the C4 rules."""
    if whole_page and "lorem ipsum" in text.lower():
        return "lorem_ipsum", ""
    if whole_page and "{" in text:
        return "curly_bracket", ""
    sentences = 0
    kept: list[str] = []
    for line in text.splitlines():
        line = line.strip()
        words = line.split()
        if max(map(len, words), default=0) > 1000:
            continue
        line = CITATION.sub("", line)
        if end_mark and (not line.endswith((".", "?", "!", '"', "'")) or line.endswith("...")):
            continue
        if len(words) < 3:
            continue
        lowered = line.lower()
        if "lorem ipsum" in lowered:
            return "lorem_ipsum", ""
        if "javascript" in lowered:
            continue
        if "{" in line:
            return "curly_bracket", ""
        if any(notice in lowered for notice in POLICY):
            continue
        sentences += splitter.sentences(line)
        kept.append(line)
    return ("too_few_sentences", "") if sentences < 5 else ("", "\n".join(kept).strip())
