"""Hostile chat templates: they end soon, in little memory, with one line; honest ones are rendered as by jinja2."""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import Callable

import pytest
from chat_fixtures import LLAMA3, QWEN3
from chat_fixtures import TULU as OLD_TULU

from llmkit.chat.templates import CHATML, TULU, DamagedTemplateError, render
from llmkit.errors import LlmkitError

MESSAGES = [{"role": "user", "content": "hello there"}, {"role": "assistant", "content": "it is\nsunny"}]
# Forty doublings of a text or of nested containers: 2^40 elements without a copy.
DOUBLED = "{% set n = namespace(s='ab', a=['x'], b=['x'], t=('x',), u=('x',)) %}{% for i in range(40) %}"
LISTS = DOUBLED + "{% set n.a = [n.a, n.a] %}{% set n.b = [n.b, n.b] %}{% endfor %}"
TUPLES = DOUBLED + "{% set n.t = (n.t, n.t) %}{% set n.u = (n.u, n.u) %}{% endfor %}"
LONG = "{% set s = 'ab' * 500000 %}{% for i in range(99999) %}"
HOSTILE = {
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "filtered loops": "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
    "recursive loop": "{% for x in range(999) recursive %}{{ loop(range(999)) if loop.depth < 9 }}{% endfor %}",
    "loop over a text": "{% for c in 'x' * 99999 %}{% for d in 'x' * 99999 %}{% endfor %}{% endfor %}",
    "lazy filters": "{% for i in range(99999) %}{% for j in range(99999) | map('string') %}{% endfor %}{% endfor %}",
    "lists": "{% for i in range(99999) %}{% set x = range(99999) | list %}{% endfor %}",
    "macros": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "blocks": "{% block b %}{{ self.b() }}{{ self.b() }}{% endblock %}",
    "repeated text": "{{ 'A' * 10 ** 9 }}",
    "repeated list": "{{ [0] * 10 ** 9 }}",
    "sums": DOUBLED + "{% set n.s = n.s + n.s %}{% endfor %}{{ n.s }}",
    "concatenations": DOUBLED + "{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
    "blocks of text": DOUBLED + "{% set x %}{{ n.s }}{{ n.s }}{% endset %}{% set n.s = x %}{% endfor %}{{ n.s }}",
    "join": "{% set x = 'a' * 99999 %}{{ ([x] * 99999) | join(x) }}",
    "join method": "{% set x = 'a' * 99999 %}{{ x.join([x] * 99999) }}",
    "replace": "{% set x = 'a' * 99999 %}{{ x | replace('a', x) }}",
    "replace method": "{% set x = 'a' * 99999 %}{{ x.replace('', x) }}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "percent of an argument": "{{ '%*d' % (1000000000, 1) }}",
    "percent in a test": "{{ '%1000000000d' is odd }}",
    "format": "{{ '{:>1000000000}'.format(1) }}",
    "format of an argument": "{{ '{:>{}}'.format(1, 1000000000) }}",
    "format often": "{% set x = 'A' * 99999 %}{{ ('{0}' * 9999).format(x) }}",
    "format filter": "{{ '%1000000000d' | format(1) }}",
    "center": "{{ 'a' | center(10 ** 9) }}",
    "ljust": "{{ 'a'.ljust(1000000000) }}",
    "zfill": "{{ 'a'.zfill(1000000000) }}",
    "tabs": "{{ '\t'.expandtabs(1000000000) }}",
    "bytes": "{{ (5).to_bytes(1000000000, 'big') }}",
    "translate": "{{ ('a' * 99999).translate({97: 'b' * 99999}) }}",
    "indent": "{{ ('\n' * 99999) | indent(99999) }}",
    "tojson": "{{ [[1]] | tojson(indent=10 ** 9) }}",
    "separators": "{{ ([1] * 9999) | tojson(separators=['a' * 999999, 'b']) }}",
    "batch": "{{ [1] | batch(10 ** 9, 'x') | list }}",
    "lorem ipsum": "{{ lipsum(n=10 ** 7) }}",
    "date": "{{ strftime_now('%c' * 999999) }}",
    "powers": "{{ 10 ** 10 ** 10 }}{{ (10 ** 18) ** (10 ** 18) }}",
    "rounding": "{{ 1 | round(-10 ** 8, 'ceil') }}",
    "division": "{% set x = ('f' * 999999) | int(base=16) %}{{ x // (x // 3) }}",
    "output of lists": LISTS + "{{ n.a }}",
    "lists as JSON": LISTS + "{{ n.a | tojson }}",
    "equal lists": LISTS + "{{ n.a == n.b }}",
    "test of lists": LISTS + "{{ [n.a] | select('eq', n.b) | list | length }}",
    "list in a list": LISTS + "{{ n.a in [n.b] }}",
    "index of a list": LISTS + "{{ [n.a].index(n.b) }}",
    "sorted lists": LISTS + "{{ [n.a, n.b] | sort | length }}",
    "changed lists": LISTS + "{% for x in [1, 2] %}{{ loop.changed(n.a if loop.first else n.b) }}{% endfor %}",
    "formatted list": LISTS + "{{ '%s' % [n.a] }}",
    "message of a list": LISTS + "{{ raise_exception(n.a) }}",
    "key": TUPLES + "{{ {n.t: 1} }}",
    "item": TUPLES + "{{ {}[n.t] }}",
    "get": TUPLES + "{{ {}.get(n.t) }}",
    "unique": TUPLES + "{{ [n.t] | unique | list | length }}",
    "difference": TUPLES + "{{ {'a': n.t}.items() - {'a': n.u}.items() }}",
    "namespaces": DOUBLED + "{% set n.a = namespace(a=n.a, b=n.a) %}{% endfor %}{{ n.a }}",
    "slices": LONG + "{% set x = s[1:] %}{% endfor %}",
    "search": LONG + "{% set x = 'zz' in s %}{% endfor %}",
    "count": LONG + "{% set x = s.count('b') %}{% endfor %}",
    "equal texts": "{% set t = 'ab' * 500000 %}" + LONG + "{% set x = s == t %}{% endfor %}",
    "splits": LONG + "{% set x = s.split('a') %}{% endfor %}",
    "groups": LONG + "{% set x = [s, s, s] | groupby('nope', default=s) %}{% endfor %}",
    "batches": "{{ [1] | batch(10 ** 9, 'x') | list }}",
    "parts": "{{ 'ab' | slice(10 ** 9) | list }}",
    "escapes in URLs": LONG + "{% set x = s | urlencode %}{% endfor %}",
    "constants": "{{ 'x' | center(9999) }}" * 2000,
    "size": "{{ a }}" * 50_000,
    "nesting": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
}  # fmt: skip


def with_template(template: str) -> dict[str, str]:
    return {"chat_template.jinja": template, "tokenizer_config.json": '{"bos_token": "<s>", "eos_token": "</s>"}'}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_end(name: str) -> None:
    """Behaviour: an error of one line that names the file, within 2 s of CPU time and 100 MB, in any thread."""
    errors: list[LlmkitError] = []

    def run() -> None:
        with pytest.raises(LlmkitError) as caught:
            render(MESSAGES, with_template(HOSTILE[name]), False)
        errors.append(caught.value)

    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert time.process_time() - started < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10
    assert errors[0].message.startswith("chat_template.jinja") and "\n" not in errors[0].message
    assert len(errors[0].message) < 500


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ ''['__class__'] }}",
        "{{ '' | attr('__class__') }}",
        "{{ ['x'] | map(attribute='__class__') | list }}",
        "{{ '{0.__class__.__mro__}'.format(1) }}",
        "{{ ('{0.__class__.__mro__}' | attr('format'))(1) }}",
        "{{ ('{0.__class__.__base__}' | attr('format_map'))({'0': 1}) }}",
        "{{ ['{0.__class__}'] | map(attribute='format') | map('string') | first }}",
        "{% set f = '{a.__call__.__globals__}' | attr('format') %}{{ f(a=raise_exception) }}",
        "{{ ('{a.__init__.__globals__}' | attr('format'))(a=cycler('x')) }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.environ }}",
        "{{ joiner.mro() }}",
        "{{ dict.fromkeys([1]) }}",
        "{{ self._TemplateReference__context.environment }}",
        "{{ ([1] | map('string')).gi_frame.f_globals }}",
        "{{ raise_exception.__self__.globals }}",
        "{{ strftime_now.__globals__ }}",
        "{{ messages.append(1) }}{{ messages.clear() }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}{{ os }}",
    ],
)
def test_python_is_out_of_reach(template: str) -> None:
    """Behaviour: a template sees no type, module, frame or environment; fails with jinja2 3.1.5 where `attr` is used."""
    messages = [dict(message) for message in MESSAGES]
    try:
        text = render(messages, with_template(template), False)
    except LlmkitError:
        text = ""
    assert not any(word in text for word in ("class", "module", "frame", "environ", "object at", "PATH", "root"))
    assert messages == MESSAGES


HONEST = {"ChatML": CHATML, "Tulu": TULU, "old Tulu": OLD_TULU, "Llama 3": LLAMA3, "Qwen3": QWEN3} | {
    f"expression {i}": "{{ " + expression + " }}"
    for i, expression in enumerate(
        """messages | length + 1
        1 + 2 * 3 - 4 // 2 % 3 + 7 / 2 + 2 ** 3
        'a' + 'b' ~ 1 ~ none ~ [1, 'x'] ~ {'a': 1.5}
        'a' + 1
        1 + 'a'
        [1] + [2] + messages[0:1]
        undefined + 'a'
        'a' + undefined
        messages[0].content + messages[0]['role'] + messages[-1].missing | string
        messages[0].items() | list
        messages[0].get('x', 'y'), messages[0].keys() | list, messages[5] is defined
        'hello' in messages[0].content and 'role' in messages[0] and 'x' not in ['a', messages[0].role]
        'user' == messages[0].role == 'user', messages[0] == messages[0], 1 < 2 <= 3 > 0
        messages | map(attribute='role') | join(', ')
        messages | selectattr('role', 'equalto', 'user') | list | tojson
        messages | rejectattr('role', 'in', ['user']) | map(attribute='content') | first
        ' a b '.strip().split() | last, 'a-b-c'.split('-', 1), 'abc'.replace('b', 'xyz').upper().center(9)
        '%s is %05.1f%%' % ('x', 2.5), '%s' | format('y'), '{} {a!r:>6} {{'.format(1, a='z')
        'a\\nb\\n\\nc' | indent(2) | replace('b', 'B', 1) | title
        {'b': 1, 'a': [1, 'é<']} | tojson(indent=2, sort_keys=true)
        {'b': 1, 'a': 2} | dictsort, {'b': 1} | items | list, [3, 1, 2] | sort(reverse=true), 'abc' | reverse
        [1, 2, 3] | sum, [[1], [2]] | sum(start=[]), [1, 1, 2] | unique | list, [1, 2] | max, 'abc' | list
        3.14159 | round(2), '12' | int, 'ff' | int(base=16), -3 | abs, 'x y z' | wordcount, 'a b c d' | truncate(5, true)
        3 is odd, 4 is even, 9 is divisibleby 3, 'a' is lower, 'x' is string, messages is iterable, {} is mapping
        '<&' | e
        'b<' | safe
        messages | groupby('role') | map(attribute='grouper') | join, (messages | groupby('x', default='z')) | length
        [1, 2, 3] | batch(2, 'x') | list, [1, 2, 3] | batch(2) | list, [1, 2, 3, 4, 5] | slice(2, 'x') | list, 'abc' | slice(2) | list
        'a b/é😀' | urlencode, {'a': 'b c', 'd': 1} | urlencode, 12345 | filesizeformat, '99' | filesizeformat(true)
        none | default('x', true), missing | default('y'), 5 is in [5], 2 is gt 1
        namespace(a=1).a, cycler(1, 2).next(), range(5)[1:] | list, dict(a=1), [1, 2, 3][::-1], 'abc'[1:]
        1 / 0
        messages[0].content.nope
        'abc'.nope()
        raise_exception('only\\n one')""".splitlines()
    )
}


@pytest.mark.parametrize("name", HONEST)
def test_honest_templates_are_rendered_as_by_jinja2(name: str) -> None:
    """Parity: jinja2's own sandbox, set up as in transformers: the same text, or an error with the same message."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    def outcome(function: Callable[[], str]) -> str:
        try:
            return function()
        except Exception as error:
            return " ".join(str(error).rpartition("fails: ")[2].split())

    for prompt in (False, True):
        variables = {"messages": MESSAGES, "tools": None, "documents": None, "add_generation_prompt": prompt}
        theirs = outcome(
            lambda variables=variables: _compile_jinja_template(HONEST[name]).render(
                **variables, bos_token="<s>", eos_token="</s>"
            )
        )
        assert outcome(lambda prompt=prompt: render(MESSAGES, with_template(HONEST[name]), prompt)) == theirs


def test_the_limit_grows_with_the_conversation() -> None:
    """Behaviour: a long conversation is not refused, and a template that repeats it a thousand times is."""
    messages = [{"role": "user", "content": "x" * 1_000_000}, {"role": "assistant", "content": "y"}] * 10
    assert len(render(messages, with_template(CHATML), True)) > 10_000_000
    with pytest.raises(LlmkitError, match="too much work"):
        render(messages, with_template("{% for i in range(1000) %}{{ messages[0].content }}{% endfor %}"), True)
    many = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}] * 20_000
    assert render(many, with_template(QWEN3), True).count("<|im_end|>") == 40_000


def test_template_that_does_not_parse_is_told_apart() -> None:
    """Behaviour: no conversation can be rendered with it, so that it is no matter of a row; file and line are named."""
    with pytest.raises(DamagedTemplateError, match=r"chat_template.jinja:2: .*unexpected '}'"):
        render(MESSAGES, with_template("\n{{ } }}"), False)
    config = {"tokenizer_config.json": '{"chat_template": "{% broken"}'}
    with pytest.raises(DamagedTemplateError, match=r"^tokenizer_config.json:1: "):
        render(MESSAGES, config, False)
