"""Names to objects: built-in entries by decorator, third-party ones by entry point.

    FILTERS = Registry("filter", entry_points="llmkit.filters")

    @FILTERS.register("gopher_quality")
    class GopherQuality: ...

An installed package extends a registry with an entry point of that group. It is imported only when its name is
requested, so a broken or slow plug-in costs nothing to those who do not use it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from llmkit.errors import LlmkitError, unknown_name

T = TypeVar("T")


class Registry:
    """A table of named objects of one kind."""

    def __init__(self, kind: str, entry_points: str | None = None) -> None:
        self.kind = kind
        self.group = entry_points
        self._entries: dict[str, Any] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that registers an object as `name`, which must be free."""

        def add(entry: T) -> T:
            assert name not in self._entries, f"{self.kind} {name!r} registered twice"
            self._entries[name] = entry
            return entry

        return add

    def names(self) -> list[str]:
        """Every name, including those of third parties, which are not imported."""
        return sorted({*self._entries, *self._third_party()})

    def get(self, name: str) -> Any:
        """The object registered as `name`; UsageError with the nearest names where there is none."""
        if name in self._entries:
            return self._entries[name]
        points = self._third_party()
        if name not in points:
            raise unknown_name(self.kind, name, self.names())
        try:
            self._entries[name] = points[name].load()
        except Exception as error:
            raise LlmkitError(
                f"{self.kind} {name!r} from {points[name].value} does not load: {error}",
                "the package that provides it is broken or incomplete",
            ) from error
        return self._entries[name]

    def _third_party(self) -> dict[str, Any]:
        if self.group is None:
            return {}
        from importlib.metadata import entry_points

        return {point.name: point for point in entry_points(group=self.group)}
