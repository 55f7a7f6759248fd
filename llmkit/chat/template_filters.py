"""The filters of chat templates: jinja2's, each of which pays for its work.

    sandbox.filters = ChatFilters(sandbox).table()

Left out are those of jinja2 whose cost has no simple bound (pprint, striptags, urlize, wordwrap, xmlattr) and `random`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import Any

from jinja2 import TemplateRuntimeError
from jinja2.filters import escape, make_attrgetter, sync_do_slice

from llmkit.chat.meter import SIZED

MAX_INDENT = 100  # columns


class ChatFilters:
    """The filters of a `Sandbox`. Every public method but `table` is one, under its name."""

    def __init__(self, sandbox: Any) -> None:
        self._sandbox, self._jinja = sandbox, sandbox.filters

    def table(self) -> dict[str, Callable[..., Any]]:
        """Filters by name, with those that `Counting` inserts, whose names no template can write."""
        sandbox, table = self._sandbox, {}
        for price, names in (
            (None, "attr count d default filesizeformat first items last length"),
            (sandbox.counted, "list map reject rejectattr select selectattr"),
            (self._compared_often, "abs dictsort groupby max min reverse sort unique"),
            (sandbox.paid_text, "capitalize float int lower title truncate upper wordcount"),
        ):
            for name in names.split():
                table[name] = _priced(self._jinja[name], price) if price else self._jinja[name]
        table |= {name: getattr(self, name) for name in dir(self) if name[0] != "_" and name != "table"}
        table |= {"e": self.escape, "safe": sandbox.paid_text, "string": sandbox.text}
        table |= {"+": sandbox.made, "~": self._concatenate, "{{": sandbox.text, "[:]": sandbox.made}
        table |= {"{%for": sandbox.counted, "{%macro": sandbox.spend}
        return table | {"?in": self._sought, "in?": self._searched, "==": sandbox.compared}

    # ---- what a template may write

    def batch(self, value: Iterable[Any], linecount: int, fill_with: Any = None) -> Any:
        self._sandbox.spend(abs(linecount))  # which are filled
        return self._jinja["batch"](self._sandbox.counted(value), linecount, fill_with)

    def center(self, value: Any, width: int = 80) -> str:
        self._sandbox.spend(int(width) // 4)
        return self._sandbox.paid_text(value).center(width)

    def escape(self, value: Any) -> str:
        return str(escape(self._sandbox.paid_text(value)))

    def format(self, value: Any, *args: Any, **kwargs: Any) -> str:
        self._sandbox.check_format(self._sandbox.text(value), [args, kwargs])
        return str(self._jinja["format"](value, *args, **kwargs))

    def indent(self, value: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        text, columns = self._sandbox.text(value), width if isinstance(width, int) else len(width)
        self._sandbox.spend(len(text) * (2 + min(columns, MAX_INDENT) // 4))
        if columns > MAX_INDENT:
            raise TemplateRuntimeError(f"an indent above {MAX_INDENT}")
        return str(self._jinja["indent"](text, width, first, blank))

    def join(self, value: Any, d: Any = "", attribute: Any = None) -> str:
        return self._sandbox.join(self._attributes(value, attribute), self._sandbox.text(d))

    def replace(self, value: Any, old: Any, new: Any, count: int | None = None) -> str:
        text = self._sandbox.text
        arguments = (text(old), text(new), -1 if count is None else count)
        return str(self._sandbox.call_method(text(value).replace, arguments, {}))

    def round(self, value: Any, precision: int = 0, method: str = "common") -> Any:
        if abs(precision) > MAX_INDENT:
            raise TemplateRuntimeError(f"a precision above {MAX_INDENT}")
        return self._jinja["round"](value, precision, method)

    def slice(self, value: Iterable[Any], slices: int, fill_with: Any = None) -> Any:
        self._sandbox.spend(8 * abs(slices))
        counted: Any = self._sandbox.counted(value)
        return sync_do_slice(counted, slices, fill_with)

    def sum(self, value: Any, attribute: Any = None, start: Any = 0) -> Any:
        for item in self._attributes(self._sandbox.counted(value), attribute):
            start = self._sandbox.made(start + item)
        return start

    def tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: Sequence[str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """JSON without jinja2's HTML escapes, as in transformers."""
        before = self._sandbox.left
        depth = self._sandbox.measure(value)
        columns = indent if isinstance(indent, int) else len(indent or "")
        if columns > MAX_INDENT or (separators is not None and sum(map(len, separators)) > MAX_INDENT):
            raise TemplateRuntimeError(f"an indent or separator above {MAX_INDENT}")
        width = 1 + depth * columns // 4 + (0 if separators is None else MAX_INDENT // 4)
        self._sandbox.spend((before - self._sandbox.left) * width)
        pair: Any = separators
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=pair, sort_keys=sort_keys)

    def trim(self, value: Any, chars: Any = None) -> str:
        text = value if type(value) is str else self._sandbox.text(value)
        self._sandbox.spend(1 + len(text) // 4)
        return text.strip(chars)

    def urlencode(self, value: Any) -> str:
        before = self._sandbox.left
        self._sandbox.compared(value)
        self._sandbox.spend(128 * (1 + before - self._sandbox.left))  # a character takes up to twelve
        return str(self._jinja["urlencode"](value))

    # ---- what Counting inserts, and prices

    def _attributes(self, value: Any, attribute: Any) -> Any:
        return value if attribute is None else map(make_attrgetter(self._sandbox, attribute), value)

    def _compared_often(self, value: Any) -> Any:
        before = self._sandbox.left
        value = self._sandbox.compared(value)
        self._sandbox.spend(16 * (before - self._sandbox.left))
        return value

    def _concatenate(self, parts: list[Any]) -> str:
        texts = [part if type(part) is str else self._sandbox.text(part) for part in parts]
        self._sandbox.spend(1 + sum(map(len, texts)) // 4)
        return "".join(texts)

    def _sought(self, value: Any) -> Any:
        """A value that is searched in another."""
        if type(value) in SIZED and type(value) is not str:
            raise TemplateRuntimeError("chat templates search for texts and numbers only")
        return value

    def _searched(self, value: Any) -> Any:
        """A value in which another is searched."""
        if type(value) in (str, list, tuple):
            self._sandbox.spend(len(value) // 32 if type(value) is str else len(value))
        return value


def _priced(function: Callable[..., Any], price: Callable[[Any], Any]) -> Callable[..., Any]:
    """A filter of jinja2 whose value is paid for first."""
    position = int(hasattr(function, "jinja_pass_arg"))

    @wraps(function)
    def paid(*args: Any, **kwargs: Any) -> Any:
        return function(*args[:position], price(args[position]), *args[position + 1 :], **kwargs)

    return paid
