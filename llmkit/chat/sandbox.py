"""A sandbox for chat templates: Jinja in which all work is counted.

    sandbox = Sandbox()
    template = sandbox.load(text)
    sandbox.render(template, {"messages": messages, ...})

Templates are programs that come with models. jinja2's sandbox keeps them from Python's internals, but neither from
endless loops nor from strings of a gigabyte. Here every operation is paid for in units, and before it is carried out
where its result may be larger than its operands. A template that needs more than UNITS and DATA_FACTOR times the size
of the conversation is stopped. The count depends on template and conversation alone, so it is the same on every
machine and in every thread, and needs neither a process nor a timer.

| operation | units |
|---|---|
| iteration of a loop, call of a macro | the number of nodes in its body (of the whole template in recursive loops) |
| text that is made | one per four characters |
| text that is searched or compared | one per 32 characters |
| comparing, hashing, sorting or printing containers | one per element, at any depth |
| numbers | none, but integers end at LARGE |

Methods are those in METHODS and filters those in `_filters`; published templates use no others. `safe` and `escape`
give plain strings. Fields of messages are read without jinja2's detour through exceptions, which saves what counting
costs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import wraps
from types import BuiltinMethodType, NoneType
from typing import Any

from jinja2 import TemplateError, TemplateRuntimeError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import escape, make_attrgetter
from jinja2.runtime import LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from llmkit.chat.counting import PRICES, Counting, size_of, weight_of

UNITS = 1_000_000
DATA_FACTOR = 32  # a template may make about as many copies of the conversation
MAX_TEMPLATE = 1 << 18  # characters; published ones have at most 30,000
LARGE = 1 << 64
MAX_INDENT = 100  # columns

SCALARS = frozenset((str, int, float, bool, NoneType))
NUMBERS = frozenset((int, float, bool))
VIEWS: tuple[type, ...] = (type({}.keys()), type({}.values()), type({}.items()))
SIZED = frozenset((str, list, tuple, dict, range, *VIEWS))
METHODS: dict[type, frozenset[str]] = {
    str: frozenset(
        "capitalize casefold center count endswith find format index isalnum isalpha isascii isdecimal isdigit islower "
        "isnumeric isspace istitle isupper join ljust lower lstrip partition removeprefix removesuffix replace rfind "
        "rindex rjust rpartition rsplit rstrip split splitlines startswith strip swapcase title upper zfill".split()
    ),
    dict: frozenset(("copy", "get", "items", "keys", "values")),
    list: frozenset(("copy", "count", "index")),
    tuple: frozenset(("count", "index")),
}
DICT_ATTRIBUTES = frozenset(dir(dict))
# What is read without asking jinja2, which takes a microsecond. `format` is wrapped.
FIELDS = {kind: names - {"format"} for kind, names in METHODS.items()} | {
    LoopContext: frozenset("depth depth0 first index index0 last length nextitem previtem revindex revindex0".split())
}
# Fields whose width is above 9,999, or given by an argument.
WIDE_FIELD = re.compile(r"\d{5}|%[^%a-zA-Z]*\*|\{[^{}]*\{")


class Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's part; the tag itself renders as nothing."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(["name:endgeneration"], drop_needle=True), lineno=line)


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of transformers, with all work counted. Use one per thread."""

    intercepted_binops = frozenset(("*", "/", "//", "%", "**", "-"))  # "+" and "~" are replaced by filters

    def __init__(self) -> None:
        # Constants are not folded when a template is compiled, as that would not be counted when it runs.
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols], optimized=False, cache_size=0
        )
        self._left = 0
        self._data: Any = None
        self._nodes = 0
        self.filters = self._filters()
        self.tests |= {name: self._test(name) for name in COMPARISONS if name in self.tests}
        self.tests |= {name: self._numeric_test(name) for name in ("odd", "even", "divisibleby")}
        self.tests |= {name: self._text_test(name) for name in ("lower", "upper")}
        self.globals["raise_exception"] = self._raise_exception
        del self.globals["lipsum"]  # random

    # ---- loading and rendering

    def load(self, text: str) -> Any:
        """The compiled template. Raises TemplateError."""
        if len(text) > MAX_TEMPLATE:
            raise TemplateSyntaxError(f"more than {MAX_TEMPLATE:,} characters", 1)
        self._left, self._data = UNITS, None  # what is constant is evaluated
        tree = self.parse(text)
        if modifier := next(tree.find_all((nodes.EvalContextModifier, nodes.ScopedEvalContextModifier)), None):
            raise TemplateSyntaxError("chat templates have no autoescape", modifier.lineno)
        self._nodes = weight_of(tree)
        return self.from_string(Counting().visit(tree))

    def render(self, template: Any, variables: Mapping[str, Any]) -> str:
        """The text that a template of `load` makes. It may raise any Exception."""
        self._left, self._data = UNITS, variables
        return str(template.render(variables))

    def spend(self, units: int) -> None:
        """Pay for work. Raises TemplateRuntimeError where more is done than a template may."""
        self._left -= units
        if self._left < 0:
            self._overdraw()

    def _overdraw(self) -> None:
        if self._data is not None:
            data, self._data = self._data, None
            self._left += DATA_FACTOR * size_of(data)
        if self._left < 0:
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
            self._left -= weight * (1 + len(items))  # type: ignore[arg-type]
            if self._left < 0:
                self._overdraw()
            return items
        return self._counting(items, weight)

    def _counting(self, items: Iterable[Any], weight: int) -> Iterator[Any]:
        for item in items:
            self.spend(weight)
            yield item

    def concat(self, pieces: Iterable[str]) -> str:  # type: ignore[override]
        """The pieces of an output, joined."""
        pieces = list(pieces)
        self.spend(len(pieces) + sum(map(len, pieces)) // 4)
        return "".join(pieces)

    # ---- attributes, items, calls, operators

    def getattr(self, obj: Any, attribute: str) -> Any:
        kind = type(obj)
        if kind is dict and attribute not in DICT_ATTRIBUTES:  # jinja2 would raise and catch an AttributeError
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        if kind is Namespace and attribute in obj._Namespace__attrs:
            return obj._Namespace__attrs[attribute]
        if attribute in FIELDS.get(kind, ()):
            return getattr(obj, attribute)
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if type(argument) in SCALARS:
            try:
                return obj[argument]
            except (TypeError, LookupError):
                if type(argument) is not str or not hasattr(obj, argument):
                    return self.undefined(obj=obj, name=argument)
        else:
            self.measure(argument)  # its hash
        return super().getitem(obj, argument)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if type(obj) in SIZED:
            return attr in METHODS.get(type(obj), ())
        builtin = isinstance(obj, type) or type(value) is BuiltinMethodType
        return not builtin and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Any:
        wrapped = super().wrap_str_format(value)
        if wrapped is None or value.__name__ == "format_map":
            return None  # is_safe_attribute refuses the latter

        def formatted(*args: Any, **kwargs: Any) -> str:
            self._check_format(value.__self__, [args, kwargs])
            return str(wrapped(*args, **kwargs))

        return formatted

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        kind = type(__obj)
        if kind is BuiltinMethodType:
            kwargs.pop("_loop_vars", None)
            kwargs.pop("_block_vars", None)
            return __self._call_method(__obj, args, kwargs)
        __self.spend(8)
        if kind is LoopContext and args:
            args = (__self.counted(args[0], __self._nodes), *args[1:])
        elif kind is not Macro:
            __self.measure(*args)
        return super().call(__context, __obj, *args, **kwargs)

    def _call_method(self, method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a method of a string or container."""
        value, name = method.__self__, method.__name__
        if name not in METHODS.get(type(value), ()):
            raise TemplateRuntimeError(f"chat templates have no {name}")
        if type(value) is not str:
            if name in ("count", "index"):
                self.measure(value)
            elif name == "copy":
                self.spend(len(value))
            self.measure(*args)
            return method(*args, **kwargs)
        if name == "join" and args:
            return self._join(args[0], value, convert=False)
        if name in PRICES:
            self.spend(PRICES[name](value, *args, **kwargs) // 4)
        for arg in args:
            if type(arg) not in SCALARS:
                self.measure(arg)
        result = method(*args, **kwargs)
        self._left -= 1 + len(value) // 32 + (len(result) // 4 if type(result) is str else 0)
        if self._left < 0:
            self._overdraw()
        return result

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if type(left) in NUMBERS and type(right) in NUMBERS:
            if abs(left) > LARGE or abs(right) > (64 if operator == "**" else LARGE):
                raise TemplateRuntimeError("a number is too large")
        elif operator == "%" and isinstance(left, str):
            self._check_format(left, [right])
        elif operator == "*" and int in (type(left), type(right)):
            items, times = (right, left) if type(left) is int else (left, right)
            self.spend((len(items) if type(items) in SIZED else 1) * max(times, 1))
        else:
            self.measure(left, right)
        return self.binop_table[operator](left, right)

    def _check_format(self, form: str, arguments: list[Any]) -> None:
        """Pay for a formatted string, in which each field may show all arguments."""
        if WIDE_FIELD.search(form.replace("{{", "")):
            raise TemplateRuntimeError("a format has a field wider than 9,999 characters")
        before = self._left
        self.measure(*arguments)
        self.spend((before - self._left + 2_500) * (form.count("%") + form.count("{")) + len(form) // 4)

    def _raise_exception(self, message: Any = "") -> None:
        raise TemplateError(self.text(message))

    # ---- filters

    def text(self, value: Any) -> str:
        """`str(value)`, which is paid for by who makes use of it if it is a string already."""
        if type(value) is str:
            return value
        self.measure(value)
        return str(value)

    def _filters(self) -> dict[str, Callable[..., Any]]:
        """The filters of chat templates, and those that `Counting` inserts, whose names no template can write."""
        old = self.filters
        kept = {name: old[name] for name in ("attr", "count", "d", "default", "first", "items", "last", "length")}
        for name in ("map", "reject", "rejectattr", "select", "selectattr", "list"):
            kept[name] = _priced(old[name], self.counted)
        for name in ("abs", "dictsort", "groupby", "max", "min", "sort", "unique", "reverse"):
            kept[name] = _priced(old[name], self._compared_often)
        for name in "capitalize float int lower title truncate upper wordcount".split():
            kept[name] = _priced(old[name], self._paid_text)

        def center(value: Any, width: int = 80) -> str:
            self.spend(int(width) // 4)
            return self._paid_text(value).center(width)

        def escaped(value: Any) -> str:
            return str(escape(self._paid_text(value)))

        def formatted(value: Any, *args: Any, **kwargs: Any) -> str:
            self._check_format(self.text(value), [args, kwargs])
            return str(old["format"](value, *args, **kwargs))

        def indent(value: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
            text, columns = self.text(value), width if isinstance(width, int) else len(width)
            self.spend(len(text) * (2 + min(columns, MAX_INDENT) // 4))
            if columns > MAX_INDENT:
                raise TemplateRuntimeError(f"an indent above {MAX_INDENT}")
            return str(old["indent"](text, width, first, blank))

        def join(value: Any, d: Any = "", attribute: Any = None) -> str:
            parts = value if attribute is None else map(make_attrgetter(self, attribute), value)
            return self._join(parts, self.text(d))

        def replace(value: Any, old: Any, new: Any, count: int | None = None) -> str:
            method = self.text(value).replace
            return str(self._call_method(method, (self.text(old), self.text(new), -1 if count is None else count), {}))

        def rounded(value: Any, precision: int = 0, method: str = "common") -> Any:
            if abs(precision) > MAX_INDENT:
                raise TemplateRuntimeError(f"a precision above {MAX_INDENT}")
            return old["round"](value, precision, method)

        def total(value: Any, attribute: Any = None, start: Any = 0) -> Any:
            items = self.counted(value) if attribute is None else map(make_attrgetter(self, attribute), value)
            for item in items:
                start = self._made(start + item)
            return start

        kept |= {"center": center, "e": escaped, "escape": escaped, "format": formatted, "indent": indent, "join": join}
        kept |= {"replace": replace, "round": rounded, "safe": self._paid_text, "string": self.text, "sum": total}
        kept |= {"tojson": self._tojson, "trim": self._trim}
        kept |= {"+": self._made, "~": self._concatenate, "{{": self.text}
        kept |= {"{%for": self.counted, "{%macro": self.spend, "[:]": self._made}
        return kept | {"?in": self._sought, "in?": self._searched, "==": self._compared}

    def _paid_text(self, value: Any) -> str:
        text = self.text(value)
        self.spend(1 + len(text))  # as capitals and entities may be longer, and words take more memory
        return text

    def _trim(self, value: Any, chars: Any = None) -> str:
        text = value if type(value) is str else self.text(value)
        self._left -= 1 + len(text) // 4
        if self._left < 0:
            self._overdraw()
        return text.strip(chars)

    def _compared(self, value: Any) -> Any:
        """A value that is compared or hashed."""
        if type(value) not in SCALARS:
            if type(value) not in SIZED and isinstance(value, Iterator):
                value = list(self._counting(value, 8))
            self.measure(value)
        elif type(value) is str:
            self.spend(len(value) // 32)
        return value

    def _compared_often(self, value: Any) -> Any:
        before = self._left
        value = self._compared(value)
        self.spend(16 * (before - self._left))
        return value

    def _sought(self, value: Any) -> Any:
        """A value that is searched in another."""
        if type(value) in SIZED and type(value) is not str:
            raise TemplateRuntimeError("chat templates search for texts and numbers only")
        return value

    def _searched(self, value: Any) -> Any:
        """A value in which another is searched."""
        if type(value) in (str, list, tuple):
            self.spend(len(value) // 32 if type(value) is str else len(value))
        return value

    def _made(self, value: Any) -> Any:
        """A text or list that was made of others."""
        if type(value) in SIZED:
            self._left -= 1 + (len(value) // 4 if type(value) is str else len(value))
            if self._left < 0:
                self._overdraw()
        return value

    def _concatenate(self, parts: list[Any]) -> str:
        texts = [part if type(part) is str else self.text(part) for part in parts]
        self.spend(1 + sum(map(len, texts)) // 4)
        return "".join(texts)

    def _join(self, parts: Iterable[Any], separator: str, convert: bool = True) -> str:
        parts = list(self.counted(parts, 2))
        if convert:
            parts = [part if type(part) is str else self.text(part) for part in parts]
        self.spend((sum(len(part) for part in parts if type(part) is str) + len(separator) * len(parts)) // 4)
        return separator.join(parts)

    def _tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        """JSON without jinja2's HTML escapes, as in transformers."""
        before = self._left
        depth = self.measure(value)
        columns = indent if isinstance(indent, int) else len(indent or "")
        if columns > MAX_INDENT or (separators is not None and sum(map(len, separators)) > MAX_INDENT):
            raise TemplateRuntimeError(f"an indent or separator above {MAX_INDENT}")
        self.spend((before - self._left) * (1 + depth * columns // 4 + (0 if separators is None else MAX_INDENT // 4)))
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    # ---- tests

    def _test(self, name: str) -> Callable[..., bool]:
        function: Any = self.tests[name]
        return lambda value, other: function(self._compared(value), self._compared(other))

    def _text_test(self, name: str) -> Callable[..., bool]:
        function: Any = self.tests[name]
        return lambda value: function(self._paid_text(value))

    def _numeric_test(self, name: str) -> Callable[..., bool]:
        def test(value: Any, number: Any = 2) -> bool:
            remainder = self.call_binop(None, "%", value, number) if {type(value), type(number)} <= NUMBERS else None
            if remainder is None:
                raise TemplateRuntimeError(f"the test {name!r} is for numbers")
            return bool(remainder) if name == "odd" else not remainder

        return test


COMPARISONS = "== eq equalto != ne > gt greaterthan ge >= < lt lessthan <= le in".split()


def _priced(function: Callable[..., Any], price: Callable[[Any], Any]) -> Callable[..., Any]:
    """A filter of jinja2 whose value is paid for first."""
    position = int(hasattr(function, "jinja_pass_arg"))

    @wraps(function)
    def paid(*args: Any, **kwargs: Any) -> Any:
        return function(*args[:position], price(args[position]), *args[position + 1 :], **kwargs)

    return paid
