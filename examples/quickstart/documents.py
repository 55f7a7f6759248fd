"""Documents for pre-training: documentation entries, source files and prose, each with id, text and source.

An entry is a name with its parameters, followed by its indented docstring. Prose is the language reference included
in Python (`pydoc_data.topics`), and the descriptions and licences of the installed packages. The text is real, noisy,
and has real duplicates: the same licence in many packages, the same function documented for two platforms.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from importlib import metadata
from textwrap import indent

from .definitions import TRAIN, Definition, Source, family, split

Document = dict[str, str]


def entries(definitions: Iterable[Definition], module_docs: dict[str, str]) -> Iterator[tuple[str, Document]]:
    """(split, document): the docstring of every module, then an entry for every definition.

    The documents are short on purpose: a docstring then follows the name that it explains, and nothing else.
    """
    for module, text in module_docs.items():
        yield (
            split(family(module)),
            {"id": f"docs/{module}", "text": f"{module}\n{indent(text, '    ')}", "source": "docs"},
        )
    seen: dict[str, int] = {}
    for item in definitions:
        name = f"{item.module}.{item.name}"
        seen[name] = number = seen.get(name, 0) + 1  # overloads and branches define a name twice
        key = f"docs/{name}" + (f"#{number}" if number > 1 else "")
        text = f"{item.module}.{item.heading}\n{indent(item.docstring, '    ')}"
        yield item.split, {"id": key, "text": text, "source": "docs"}


def module_docstrings(sources: Iterable[Source]) -> dict[str, str]:
    """Module -> docstring, for modules that have one."""
    docstrings = {source.module: ast.get_docstring(source.tree) for source in sources}
    return {module: text for module, text in docstrings.items() if text}


def code(sources: Iterable[Source]) -> Iterator[tuple[str, Document]]:
    """(split, document): the source file of each module."""
    for source in sources:
        if source.text.strip():
            document = {"id": f"code/{source.module}", "text": source.text, "source": "code"}
            yield split(family(source.module)), document


def prose() -> Iterator[tuple[str, Document]]:
    """(split, document): the topics of the language reference, then descriptions and licences of the installed packages."""
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield split(f"topic {name}"), {"id": f"topic/{name}", "text": text.strip(), "source": "prose"}
    texts: dict[str, tuple[str, str]] = {}
    for distribution in metadata.distributions():
        name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"] or "").lower()
        text = str(distribution.metadata.get_payload() or distribution.metadata.get("Description") or "").strip()
        texts[f"package/{name}"] = split(f"package {name}"), text
        for file in distribution.files or ():
            if ".dist-info" in file.parts[0] and re.match(r"(LICEN[CS]E|COPYING|NOTICE)", file.name, re.IGNORECASE):
                try:
                    text = file.read_text(encoding="utf-8").strip()
                except (OSError, UnicodeDecodeError):
                    continue  # listed, but missing or not text
                texts[f"licence/{name}/{'/'.join(file.parts[1:])}"] = TRAIN, text
    for key, (part, text) in sorted(texts.items()):
        if len(text) > 200:
            yield part, {"id": key, "text": text, "source": "prose"}
