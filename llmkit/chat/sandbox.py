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

Methods are those in METHODS and filters those in template_filters.py; published templates use no others. `safe` and
`escape` give plain strings. Fields of messages are read without jinja2's detour through exceptions, which saves what
counting costs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from types import BuiltinMethodType
from typing import Any

from jinja2 import TemplateError, TemplateRuntimeError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from llmkit.chat.counting import PRICES, Counting, weight_of
from llmkit.chat.meter import NUMBERS, SCALARS, SIZED, Meter
from llmkit.chat.template_filters import ChatFilters

MAX_TEMPLATE = 1 << 18  # characters; published ones have at most 30,000
LARGE = 1 << 64  # the largest integer

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


class Sandbox(Meter, ImmutableSandboxedEnvironment):
    """The environment of transformers, with all work counted. Use one per thread."""

    intercepted_binops = frozenset(("*", "/", "//", "%", "**", "-"))  # "+" and "~" are replaced by filters

    def __init__(self) -> None:
        # Constants are not folded when a template is compiled, as that would not be counted when it runs.
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols], optimized=False, cache_size=0
        )
        self._nodes = 0
        self.filters = ChatFilters(self).table()
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
        self.start()  # what is constant is evaluated
        tree = self.parse(text)
        if modifier := next(tree.find_all((nodes.EvalContextModifier, nodes.ScopedEvalContextModifier)), None):
            raise TemplateSyntaxError("chat templates have no autoescape", modifier.lineno)
        self._nodes = weight_of(tree)
        return self.from_string(Counting().visit(tree))

    def render(self, template: Any, variables: Mapping[str, Any]) -> str:
        """The text that a template of `load` makes. It may raise any Exception."""
        self.start(variables)
        return str(template.render(variables))

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
            self.check_format(value.__self__, [args, kwargs])
            return str(wrapped(*args, **kwargs))

        return formatted

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        kind = type(__obj)
        if kind is BuiltinMethodType:
            kwargs.pop("_loop_vars", None)
            kwargs.pop("_block_vars", None)
            return __self.call_method(__obj, args, kwargs)
        __self.spend(8)
        if kind is LoopContext and args:
            args = (__self.counted(args[0], __self._nodes), *args[1:])
        elif kind is not Macro:
            __self.measure(*args)
        return super().call(__context, __obj, *args, **kwargs)

    def call_method(self, method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
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
            return self.join(args[0], value, convert=False)
        if name in PRICES:
            self.spend(PRICES[name](value, *args, **kwargs) // 4)
        for arg in args:
            if type(arg) not in SCALARS:
                self.measure(arg)
        result = method(*args, **kwargs)
        self.left -= 1 + len(value) // 32 + (len(result) // 4 if type(result) is str else 0)
        if self.left < 0:
            self.overdraw()
        return result

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if type(left) in NUMBERS and type(right) in NUMBERS:
            if abs(left) > LARGE or abs(right) > (64 if operator == "**" else LARGE):
                raise TemplateRuntimeError("a number is too large")
        elif operator == "%" and isinstance(left, str):
            self.check_format(left, [right])
        elif operator == "*" and int in (type(left), type(right)):
            items, times = (right, left) if type(left) is int else (left, right)
            self.spend((len(items) if type(items) in SIZED else 1) * max(times, 1))
        else:
            self.measure(left, right)
        return self.binop_table[operator](left, right)

    def check_format(self, form: str, arguments: list[Any]) -> None:
        """Pay for a formatted string, in which each field may show all arguments."""
        if WIDE_FIELD.search(form.replace("{{", "")):
            raise TemplateRuntimeError("a format has a field wider than 9,999 characters")
        before = self.left
        self.measure(*arguments)
        self.spend((before - self.left + 2_500) * (form.count("%") + form.count("{")) + len(form) // 4)

    def _raise_exception(self, message: Any = "") -> None:
        raise TemplateError(self.text(message))

    # ---- filters

    # ---- tests

    def _test(self, name: str) -> Callable[..., bool]:
        function: Any = self.tests[name]
        return lambda value, other: function(self.compared(value), self.compared(other))

    def _text_test(self, name: str) -> Callable[..., bool]:
        function: Any = self.tests[name]
        return lambda value: function(self.paid_text(value))

    def _numeric_test(self, name: str) -> Callable[..., bool]:
        def test(value: Any, number: Any = 2) -> bool:
            remainder = self.call_binop(None, "%", value, number) if {type(value), type(number)} <= NUMBERS else None
            if remainder is None:
                raise TemplateRuntimeError(f"the test {name!r} is for numbers")
            return bool(remainder) if name == "odd" else not remainder

        return test


COMPARISONS = "== eq equalto != ne > gt greaterthan ge >= < lt lessthan <= le in".split()
