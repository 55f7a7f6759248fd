"""Chains with a single filter, and their decision about a text."""

from __future__ import annotations

from llmkit.corpus.chain import Chain
from llmkit.corpus.chain_loader import load_chain


def chain_of(name: str, **settings: object) -> Chain:
    return load_chain([], [name], [f"{name}.{key}={value}" for key, value in settings.items()], "unicode")


def reason_of(chain: Chain, text: str, fields: dict[str, object] | None = None) -> tuple[str, object]:
    """(reason, value) of the rule that drops a document; the reason is "" if it is kept."""
    drop = chain.judge(text, "document", fields).drop
    return ("", None) if drop is None else (drop.reason, drop.value)
