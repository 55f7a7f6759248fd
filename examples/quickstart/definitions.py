"""The documented classes and functions of Python's standard library.

`.py` files are parsed with `ast`, never imported. Modules written in C have no source, so they are imported and
inspected. A definition belongs to a family, the public module that it is part of (`_pydecimal` and `_decimal` belong
to `decimal`), and a family belongs to one split: 80 % of the families are for training, 10 % for choosing settings,
10 % for reporting. About 5 s for the 700 files of Python 3.11.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

TRAIN, DEVELOPMENT, TEST = "train", "development", "test"
SKIPPED = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "pydoc_data", "lib-dynload"}
# Parts of a module under other names: all of them must be in the same split.
SAME_FAMILY = (
    dict.fromkeys(("posix", "nt", "ntpath", "posixpath", "genericpath", "nturl2path"), "os")
    | dict.fromkeys(("md5", "sha1", "sha2", "sha256", "sha3", "sha512", "blake2"), "hashlib")
    | {"elementtree": "xml", "pyexpat": "xml", "curses_panel": "curses", "posixsubprocess": "subprocess"}
    | {"posixshmem": "multiprocessing", "strptime": "time", "lsprof": "profile", "cProfile": "profile"}
)
# An arbitrary seed, for which both held-out splits have many modules, none far larger than the others. Chosen before
# any model was trained.
SPLIT_SEED = 64


@dataclass(frozen=True)
class Source:
    """A module of the standard library written in Python."""

    module: str  # dotted name
    text: str
    tree: ast.Module


@dataclass(frozen=True)
class Definition:
    """A documented class or function."""

    module: str  # dotted name of its module
    name: str  # name inside the module: `Thread.join`
    signature: str  # `(timeout=None)`; empty for classes with unknown constructor
    docstring: str  # without indentation

    @property
    def family(self) -> str:
        return family(self.module)

    @property
    def split(self) -> str:
        return split(self.family)

    @property
    def public(self) -> bool:
        return not any(part.startswith("_") for part in self.name.split("."))

    @property
    def heading(self) -> str:
        """`Thread.join(timeout=None)`, as shown in documentation."""
        return self.name + self.signature


def family(module: str) -> str:
    """The public top-level module that `module` is part of: `_pydecimal` -> `decimal`, `xml.dom.minidom` -> `xml`."""
    top = module.partition(".")[0]
    if top.startswith("_"):
        top = top.lstrip("_").removeprefix("py").removesuffix("_abc") or top
    return SAME_FAMILY.get(top, top)


def split(name: str) -> str:
    """The split of a family, `train`, `development` or `test`: by a hash of its name, so the same on every machine."""
    bucket = int.from_bytes(hashlib.sha256(f"{SPLIT_SEED} {name}".encode()).digest()[:8], "big") % 10
    return TEST if bucket == 0 else DEVELOPMENT if bucket == 1 else TRAIN


def sources(root: Path | None = None) -> Iterator[Source]:
    """The modules under `root` (default: the standard library), sorted by path, without files that do not parse."""
    root = root or Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if SKIPPED.intersection(parts) or parts[0].startswith("config-"):
            continue
        names = [*parts[:-1], path.stem] if path.stem != "__init__" else list(parts[:-1])
        try:
            text = path.read_text(encoding="utf-8")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in other people's strings
                tree = ast.parse(text)
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue  # real source trees contain deliberately broken files
        if names:
            yield Source(".".join(names), text, tree)


def of_source(source: Source) -> Iterator[Definition]:
    """The documented definitions of a Python module, in the order of the file."""
    yield from _of_body(source.module, "", source.tree.body)


def _of_body(module: str, prefix: str, body: list[ast.stmt]) -> Iterator[Definition]:
    for node in body:
        if isinstance(node, (ast.If, ast.Try)):
            yield from _of_body(module, prefix, node.body)
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        docstring = ast.get_docstring(node)
        if isinstance(node, ast.ClassDef):
            signature = _constructor(node)
        else:
            signature = f"({_arguments(node.args, drop_first=bool(prefix))})"
        if docstring and docstring.strip():
            yield Definition(module, prefix + node.name, signature, docstring.strip())
        if isinstance(node, ast.ClassDef):
            yield from _of_body(module, f"{prefix}{node.name}.", node.body)


def _constructor(node: ast.ClassDef) -> str:
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            return f"({_arguments(item.args, drop_first=True)})"
    return ""


def _arguments(arguments: ast.arguments, drop_first: bool) -> str:
    """The parameters as written, without annotations, self and cls."""
    for item in ast.walk(arguments):
        if isinstance(item, ast.arg):
            item.annotation = None
    text = ast.unparse(arguments)
    return re.sub(r"^(self|cls)\b,?\s*(/,?\s*)?", "", text) if drop_first else text


def of_extensions() -> Iterator[Definition]:
    """The documented definitions of the standard library's C modules, which have to be imported for this."""
    # Not get_path("platstdlib"): in a virtual environment this is an empty directory of the environment.
    directory = Path(sysconfig.get_config_var("DESTSHARED") or "")
    names = {path.name.partition(".")[0] for path in directory.glob("*.so")} | set(sys.builtin_module_names)
    for name in sorted(names):
        if name.startswith(("_test", "_ctypes_test", "_xxtest", "xx", "_tkinter")) or name == "__main__":
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # deprecated modules
                module = importlib.import_module(name)
        except ImportError:
            continue  # built without its library
        yield from _of_module(name, module)


def _of_module(name: str, module: ModuleType) -> Iterator[Definition]:
    for key, value in sorted(vars(module).items()):
        if not (inspect.isbuiltin(value) or inspect.isclass(value)) or key.startswith("__"):
            continue
        if getattr(value, "__module__", name) not in (name, name.lstrip("_"), "builtins"):
            continue
        yield from _of_object(name, key, value)
        if inspect.isclass(value):
            for method, member in sorted(vars(value).items()):
                if callable(member) or inspect.ismethoddescriptor(member):
                    yield from _of_object(name, f"{key}.{method}", member)


def _of_object(module: str, name: str, value: object) -> Iterator[Definition]:
    docstring = getattr(value, "__doc__", None)
    if not isinstance(docstring, str) or not docstring.strip():
        return
    signature = getattr(value, "__text_signature__", None) or ""
    # C writes `($self, sequence, /)`: the dollar marks the bound argument.
    signature = re.sub(r"^\(\$\w+,?\s*(/,?\s*)?", "(", signature).replace(", /", "").replace("/, ", "").replace("/", "")
    signature = signature.replace("=<unrepresentable>", "=...")
    yield Definition(module, name, signature, inspect.cleandoc(docstring).strip())


def first_sentence(docstring: str) -> str:
    """The first sentence of a docstring, on one line; empty if it does not begin with prose."""
    paragraph = docstring.strip().split("\n\n")[0]
    text = " ".join(paragraph.split())
    if not text[:1].isalpha() or re.match(r"[\w.]+\s?\(.*?\)|[\w.]+\s*(->|--|=|:)|.* -> ", text):
        return ""  # a signature, a grammar rule, a doctest or markup
    for end in re.finditer(r"[.!?](?=\s+[A-Z(`'\"]|$)", text):
        if not re.search(r"\b(e\.g|i\.e|vs|etc|cf)$", text[: end.start()]):
            return text[: end.end()]
    return text.rstrip(" :;,-") + "."
