"""The formats of other trainers for token ids, one file each: the file `nanogpt.py` registers the `ForeignFormat` that
`tokenize` offers as `--from nanogpt` and `--to nanogpt`. Nothing else in the package needs to know.

    FOREIGN_FORMATS.get("nanogpt").read("corpus.bin", info)         # the documents, as blocks
    with FOREIGN_FORMATS.get("nanogpt").writer("corpus.bin", info, force=False) as writer:
        writer.write(block)
        writer.finish(counts, inputs)

None of them holds sources, ids, the tokenizer or a lineage record, nor the borders and the padding of a packed mix:
`tokenize` refuses to export packed shards and pieces of cut documents (tokens/convert.py).

Read again, a document's source is the name of its file and its id the xxh3-128 of its tokens. Documents without the
end-of-text id get it, those without any other id are dropped, and both are counted: files that begin each document
with that id, as modded-nanogpt's, are read correctly.

The help of `tokenize` lists every format, so these files import numpy and the rest of shards/ inside functions only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmkit.registry import Registry

if TYPE_CHECKING:
    from llmkit.shards.token_block import TokenBlock
    from llmkit.shards.tokenizer_info import TokenizerInfo

FOREIGN_FORMATS = Registry("token format", package=__name__)


@dataclass(frozen=True, slots=True)
class ForeignFormat:
    """A format. It is registered under the name of its file, which is its name on the command line.

    `flat` formats know documents only by the end-of-text id between them. `caveat(info)` is what the reader of
    files with this vocabulary must know, or "". `files` describes its files in help texts; `suffixes` are those of
    the files of one data set, of which the last is that of the index where there are several. `read(data_set, info,
    source)` yields the documents of one data set, all of the source `source` if it is given. `writer(output, info,
    force=...)` is a context manager with `write(block)` and `finish(counts, inputs)`.
    """

    files: str
    suffixes: tuple[str, ...]
    read: Callable[[str, TokenizerInfo, str | None], Iterator[TokenBlock]]
    writer: Callable[..., Any]
    flat: bool = False
    caveat: Callable[[TokenizerInfo], str] = lambda info: ""

    def data_sets(self, paths: Iterable[str]) -> list[str]:
        """The data sets that files belong to: each file is one, or those of one prefix are."""
        if len(self.suffixes) == 1:
            return list(paths)
        return list(dict.fromkeys(without_suffix(path, self.suffixes) for path in paths))

    def output_name(self, output: str) -> str:
        """The names of the files that are written for an output, for messages."""
        return " and ".join(self.paths(self.data_sets([output])[0]))

    def paths(self, data_set: str) -> list[str]:
        """The files of a data set."""
        return [data_set] if len(self.suffixes) == 1 else [data_set + suffix for suffix in self.suffixes]


def without_suffix(path: str, suffixes: Iterable[str]) -> str:
    """`path` without these suffixes, each removed once where it ends in it."""
    for suffix in suffixes:
        path = path.removesuffix(suffix)
    return path
