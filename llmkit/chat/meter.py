"""What a chat template has spent: every operation is paid for in units (see sandbox.py)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import NoneType
from typing import Any

from jinja2 import TemplateRuntimeError
from jinja2.utils import Namespace

from llmkit.chat.counting import size_of

UNITS = 1_000_000
DATA_FACTOR = 32  # a template may make about as many copies of the conversation

SCALARS = frozenset((str, int, float, bool, NoneType))
NUMBERS = frozenset((int, float, bool))
VIEWS: tuple[type, ...] = (type({}.keys()), type({}.values()), type({}.items()))
SIZED = frozenset((str, list, tuple, dict, range, *VIEWS))


class Meter:
    """Units that are left for rendering `data`: UNITS, and DATA_FACTOR times its size, which is found when needed."""

    left = 0
    _data: Any = None

    def start(self, data: Any = None) -> None:
        """Start anew."""
        self.left, self._data = UNITS, data

    def spend(self, units: int) -> None:
        """Pay for work. Raises TemplateRuntimeError where more is done than a template may."""
        self.left -= units
        if self.left < 0:
            self.overdraw()

    def overdraw(self) -> None:
        """Refuse to go on, or allow what the size of the data allows."""
        if self._data is not None:
            data, self._data = self._data, None
            self.left += DATA_FACTOR * size_of(data)
        if self.left < 0:
            raise TemplateRuntimeError("it does too much work for a chat template, or makes too much text")

    def measure(self, *values: Any) -> int:
        """Pay for an operation that visits all elements of `values`, at any depth. Returns the depth."""
        level, depth = list(values), 0
        while level:
            depth += 1
            below: list[Any] = []
            units = len(level)
            for item in level:
                kind = type(item)
                if kind is str:
                    units += len(item) // 4
                elif kind in SIZED and kind is not range:
                    self.spend(2 * len(item))
                    below += item
                    below += item.values() if kind is dict else ()
                elif kind is Namespace:
                    below.append(item._Namespace__attrs)
            self.spend(units)
            level = below
        return depth

    def counted(self, items: Iterable[Any], weight: int = 8) -> Iterable[Any]:
        """`items`, each of which costs `weight`."""
        if type(items) in SIZED:
            self.left -= weight * (1 + len(items))  # type: ignore[arg-type]
            if self.left < 0:
                self.overdraw()
            return items
        return self.counting(items, weight)

    def counting(self, items: Iterable[Any], weight: int) -> Iterator[Any]:
        """`counted`, one by one."""
        for item in items:
            self.spend(weight)
            yield item

    def text(self, value: Any) -> str:
        """`str(value)`, which is paid for by who makes use of it if it is a string already."""
        if type(value) is str:
            return value
        self.measure(value)
        return str(value)

    def paid_text(self, value: Any) -> str:
        """`str(value)`, paid for in any case."""
        text = self.text(value)
        self.spend(1 + len(text))  # as capitals and entities may be longer, and words take more memory
        return text

    def compared(self, value: Any) -> Any:
        """A value that is compared or hashed."""
        if type(value) not in SCALARS:
            if type(value) not in SIZED and isinstance(value, Iterator):
                value = list(self.counting(value, 8))
            self.measure(value)
        elif type(value) is str:
            self.spend(len(value) // 32)
        return value

    def made(self, value: Any) -> Any:
        """A text or list that was made of others."""
        if type(value) in SIZED:
            self.left -= 1 + (len(value) // 4 if type(value) is str else len(value))
            if self.left < 0:
                self.overdraw()
        return value

    def join(self, parts: Iterable[Any], separator: str, convert: bool = True) -> str:
        """The parts in one text, as texts if `convert`."""
        parts = list(self.counted(parts, 2))
        if convert:
            parts = [part if type(part) is str else self.text(part) for part in parts]
        self.spend((sum(len(part) for part in parts if type(part) is str) + len(separator) * len(parts)) // 4)
        return separator.join(parts)
