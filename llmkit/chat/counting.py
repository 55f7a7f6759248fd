"""What pays for loops, sums, comparisons and texts of a chat template: filters that are inserted where it is parsed.

    tree = Counting().visit(sandbox.parse(text))

The names of the filters, which `chat.sandbox` defines, cannot be written in a template.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from jinja2 import nodes
from jinja2.visitor import NodeTransformer

SUMMANDS = 8
TEXTUAL = ("~", "trim", "tojson", "join", "replace", "string")  # filters that return text


def _padded(value: str, width: Any = 0, *args: Any) -> int:
    return operator.index(width)


def _pieces(value: str, sep: Any = None, maxsplit: Any = -1) -> int:
    """Characters that take as much memory as the pieces of a split text."""
    count = value.count(sep) if sep else len(value) // 2
    return len(value) + 20 * (min(count, maxsplit) if maxsplit >= 0 else count)


def _replaced(value: str, old: Any = "", new: Any = "", count: Any = -1) -> int:
    growth = len(new) - len(old)
    return growth * (value.count(old) if count < 0 else min(value.count(old), count)) if growth > 0 else 0


# Characters that a method may make in addition to those of its result.
PRICES: dict[str, Callable[..., int]] = dict.fromkeys(("center", "ljust", "rjust", "zfill"), _padded)
PRICES |= {"split": _pieces, "rsplit": _pieces, "replace": _replaced, "splitlines": lambda value, *args: 8 * len(value)}


def size_of(data: Any) -> int:
    """Units of a conversation: one per value, and one per four characters."""
    total, rest = 0, [data]
    while rest:
        item = rest.pop()
        total += 1 + len(item) // 4 if isinstance(item, str) else 1
        if isinstance(item, dict):
            rest += item.values()
        elif isinstance(item, (list, tuple)):
            rest += item
    return total


def weight_of(*trees: nodes.Node) -> int:
    """What running these nodes once costs."""
    total, rest = 0, list(trees)
    while rest:
        node = rest.pop()
        total += 1 + (len(node.value) // 32 if isinstance(node, nodes.Const) and isinstance(node.value, str) else 0)
        rest += node.iter_child_nodes()
    return total


def _adds_text(node: Any) -> bool:
    """Whether a sum has a string in it, so that it can only be a string."""
    while isinstance(node, nodes.Add):
        if isinstance(node.right, nodes.Const) and isinstance(node.right.value, str):
            return True
        node = node.left
    return isinstance(node, nodes.Const) and isinstance(node.value, str)


class Counting(NodeTransformer):
    """Inserts into a template what pays for its loops, calls, comparisons and texts."""

    def _filter(self, name: str, node: Any, *args: Any) -> nodes.Filter:
        constants = [nodes.Const(arg) for arg in args]
        return nodes.Filter(node, name, constants, [], None, None, lineno=getattr(node, "lineno", 1))

    def visit_For(self, node: Any) -> Any:
        weight = 1 + weight_of(*node.body, *([node.test] if node.test else []))
        self.generic_visit(node)
        node.iter = self._filter("{%for", node.iter, weight)
        return node

    def visit_Macro(self, node: Any) -> Any:
        weight = 1 + weight_of(*node.body)
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(self._filter("{%macro", nodes.Const(weight)), lineno=node.lineno))
        return node

    visit_CallBlock = visit_Block = visit_Macro

    def visit_Output(self, node: Any) -> Any:
        self.generic_visit(node)
        for i, child in enumerate(node.nodes):
            is_text = isinstance(child, nodes.Filter) and (child.name in TEXTUAL or _adds_text(child.node))
            if not is_text and not isinstance(child, nodes.TemplateData | nodes.Const):
                node.nodes[i] = self._filter("{{", child)
        return node

    def visit_Add(self, node: Any) -> Any:
        """A chain of sums is paid for as a whole, at most SUMMANDS at a time."""
        chain, first = [], node
        while isinstance(first, nodes.Add):
            chain.append(first)
            first = first.left
        result = self.visit(first)
        for number, add in enumerate(reversed(chain), 2):
            add.left, add.right = result, self.visit(add.right)
            result = self._filter("+", add) if number % SUMMANDS == 0 or add is node else add
        return result

    def visit_Concat(self, node: Any) -> Any:
        self.generic_visit(node)
        return self._filter("~", nodes.List(node.nodes, lineno=node.lineno))

    def visit_Getitem(self, node: Any) -> Any:
        self.generic_visit(node)
        return self._filter("[:]", node) if isinstance(node.arg, nodes.Slice) else node

    def visit_Pair(self, node: Any) -> Any:
        self.generic_visit(node)
        if not isinstance(node.key, nodes.Const):
            node.key = self._filter("==", node.key)
        return node

    def visit_Compare(self, node: Any) -> Any:
        """Comparing with a constant costs nothing, and what is sought in a container is a scalar."""
        self.generic_visit(node)
        operands = [node.expr, *(operand.expr for operand in node.ops)]
        paid = {}
        for i, operand in enumerate(node.ops):
            if operand.op in ("in", "notin"):
                paid[i] = "?in"
                paid[i + 1] = "in?"
            elif not any(isinstance(side, nodes.Const) for side in operands[i : i + 2]):
                paid |= {side: "==" for side in (i, i + 1) if side not in paid}
        for i, name in paid.items():
            if not isinstance(operands[i], nodes.Const):
                operands[i] = self._filter(name, operands[i])
        node.expr = operands[0]
        for operand, side in zip(node.ops, operands[1:], strict=True):
            operand.expr = side
        return node
