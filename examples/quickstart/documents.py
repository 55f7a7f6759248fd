"""Documents for pre-training: pages of documentation, source files, and prose, each a JSON object with id, text and source.

Pages look as `pydoc` prints them: the module, its docstring, then each heading with its docstring indented. Prose is the language reference
that comes with Python (`pydoc_data.topics`) and the descriptions of the installed packages. It is what it is: real, noisy, and with real
duplicates (code in two versions, the same notice in many files).
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from importlib import metadata
from textwrap import indent

from .definitions import Definition, Source, split

Document = dict[str, str]


def pages(definitions: Iterable[Definition], module_docs: dict[str, str]) -> Iterator[tuple[str, Document]]:
    """(split, document): one page of documentation a module, in the order in which modules come."""
    by_module: dict[str, list[Definition]] = {}
    for definition in definitions:
        by_module.setdefault(definition.module, []).append(definition)
    for module, items in by_module.items():
        parts = [module, *([module_docs[module]] if module in module_docs else [])]
        parts += [f"{item.heading}\n{indent(item.docstring, '    ')}" for item in items]
        yield items[0].split, {"id": f"docs/{module}", "text": "\n\n".join(parts), "source": "docs"}


def module_docstrings(sources: Iterable[Source]) -> dict[str, str]:
    """Docstring of every module that has one."""
    found = {source.module: ast.get_docstring(source.tree) for source in sources}
    return {module: text for module, text in found.items() if text}


def code(sources: Iterable[Source]) -> Iterator[tuple[str, Document]]:
    """(split, document): one source file a module."""
    from .definitions import family

    for source in sources:
        if source.text.strip():
            document = {"id": f"code/{source.module}", "text": source.text, "source": "code"}
            yield split(family(source.module)), document


def prose() -> Iterator[tuple[str, Document]]:
    """(split, document): the topics of the language reference, then the descriptions of the installed packages."""
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield split(f"topic {name}"), {"id": f"topic/{name}", "text": text.strip(), "source": "prose"}
    described: dict[str, str] = {}
    for distribution in metadata.distributions():
        name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"] or "").lower()
        text = (distribution.metadata.get_payload() or distribution.metadata.get("Description") or "").strip()
        if name and len(text) > 200:
            described[name] = text
    for name, text in sorted(described.items()):
        yield split(f"package {name}"), {"id": f"package/{name}", "text": text, "source": "prose"}
