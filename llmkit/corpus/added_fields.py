"""The fields that stages add to documents; none replaces a field of the user's own.

    check_added(document, ("cluster", "duplicates"), "dedup")   # LlmkitError if one of them is the user's own

A field may have the form that llmkit itself writes, since its output may be its input again: an earlier `cluster` is
then replaced, and `duplicates` add up. A null is no value: in Parquet, documents without a field have one. Fields that
a filter of the user's own sets (`Page.note`) are not listed here: it may set any.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

from llmkit.errors import LlmkitError

if TYPE_CHECKING:
    from llmkit.io.documents import Document

Fields = Mapping[str, Any]

MAX_COUNT = 1 << 31  # documents that one may stand for
DUPLICATE = ("reason", "duplicate_of", "similarity")  # fields of a duplicate
REJECTED = ("filter", "reason", "value")  # fields of a document that a filter dropped
CUT = ("reason", "rule")  # fields of a document of which nothing is left


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_count(fields: Fields) -> bool:
    return type(fields["duplicates"]) is int and 0 < fields["duplicates"] < MAX_COUNT


def _is_cluster(fields: Fields) -> bool:
    return isinstance(fields["cluster"], str) and re.fullmatch("[0-9a-f]{16}", fields["cluster"]) is not None


def _is_duplicate(fields: Fields) -> bool:
    return all(isinstance(fields.get(name), str) for name in DUPLICATE[:2]) and "similarity" in fields


def _is_rule(fields: Fields) -> bool:
    return isinstance(fields.get("rule"), str) and fields["rule"].startswith("--method ")


def _is_rejected(fields: Fields) -> bool:
    return all(isinstance(fields.get(name), str) for name in REJECTED[:2]) and "value" in fields


def _is_reason(fields: Fields) -> bool:
    by_rule = isinstance(fields["reason"], str) and _is_rule(fields)
    return by_rule or _is_rejected(fields) or _is_duplicate(fields)


def _is_annotation(fields: Fields) -> bool:
    return isinstance(fields["filter"], dict) and "dropped_by" in fields["filter"]


def _is_contamination(fields: Fields) -> bool:
    items = fields["contamination"]
    return isinstance(items, list) and all(isinstance(item, dict) and {"set", "item"} <= item.keys() for item in items)


def _is_pii(fields: Fields) -> bool:
    counts = fields["pii"]
    return isinstance(counts, dict) and all(type(n) is int or n is None for n in counts.values())


# Field -> whether it has the form that llmkit writes, given the fields of a document that has it.
ADDED: dict[str, Callable[[Fields], bool]] = {
    "cluster": _is_cluster,
    "duplicates": _is_count,
    "duplicate_of": _is_duplicate,
    "similarity": _is_duplicate,
    "reason": _is_reason,
    "rule": _is_rule,
    "filter": lambda fields: _is_annotation(fields) or _is_rejected(fields),
    "value": _is_rejected,
    "language": lambda fields: isinstance(fields["language"], str),  # also what a page declares
    "language_score": lambda fields: _is_number(fields["language_score"]) and isinstance(fields.get("language"), str),
    "quality": lambda fields: _is_number(fields["quality"]) and 0 <= fields["quality"] <= 1,
    "quality_label": lambda fields: isinstance(fields["quality_label"], str) and _is_number(fields.get("quality")),
    "pii": _is_pii,
    "contamination": _is_contamination,
}
IN_EVERY_DOCUMENT = ("filter",)  # never null in our own Parquet files


def check_added(document: Document, names: Collection[str], writer: str) -> None:
    """Raise LlmkitError if `writer`, a command or option, would replace one of these fields of the user's own."""
    fields = document.fields
    if fields.keys().isdisjoint(names):  # as of nearly all documents
        return
    for name in names:
        if name not in fields or name not in ADDED or (fields[name] is None and name not in IN_EVERY_DOCUMENT):
            continue
        if not ADDED[name](fields):
            raise LlmkitError(
                f"{document}: the field {name!r} already exists", f"rename it: {writer} writes a field of that name"
            )
