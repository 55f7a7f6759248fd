"""The span of characters that holds one piece of personal data."""

from __future__ import annotations

from typing import NamedTuple


class PiiSpan(NamedTuple):
    """text[start:end] is personal data or a secret of this kind."""

    kind: str
    start: int
    end: int
