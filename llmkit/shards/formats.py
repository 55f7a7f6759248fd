"""The formats of other trainers for token ids: one row of FOREIGN_FORMATS per format.

A format is one module with two names, imported when it is used:

    read(data_set, info, source) -> Iterator[TokenBlock]    # documents of one data set Writer(output, info,
    force=False)                       # a context manager with `write(block)` and `finish(counts, inputs)`

None of them holds sources, ids, the tokenizer or a lineage record. Read again, a document's source is the name
of its file and its id the xxh3-128 of its tokens. Documents without the end-of-text id get it, those without
any other id are dropped, and both are counted: files that begin each document with that id, as
modded-nanogpt's, are read correctly.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True, slots=True)
class ForeignFormat:
    """A format: its name on the command line, its files, and the module that reads and writes it."""

    name: str
    files: str  # for help texts
    suffixes: tuple[str, ...]  # of the files of one data set; with several, the last is that of the index
    module: str

    def load(self) -> Any:
        """The module of the format."""
        return import_module(self.module)

    def data_sets(self, paths: Iterable[str]) -> list[str]:
        """The data sets that files belong to: each file is one, or those of one prefix are."""
        return list(paths) if len(self.suffixes) == 1 else list(dict.fromkeys(map(prefix_of, paths)))

    def paths(self, data_set: str) -> list[str]:
        """The files of a data set."""
        return [data_set] if len(self.suffixes) == 1 else [data_set + suffix for suffix in self.suffixes]


FOREIGN_FORMATS = {
    row.name: row
    for row in (
        ForeignFormat("nanogpt", "FILE.bin, ids alone", (".bin",), "llmkit.shards.nanogpt"),
        ForeignFormat("megatron", "PREFIX.bin and PREFIX.idx", (".bin", ".idx"), "llmkit.shards.megatron"),
    )
}


def prefix_of(path: str) -> str:
    """The common prefix of a data set's files: `path` without .bin or .idx."""
    return path.removesuffix(".bin").removesuffix(".idx")
