"""Read stored token ids in blocks of documents, count them, and format them as JSON lines of ids or of texts.

Input: token shards, or the files of other trainers (shards/formats/). Memory: one block, about 2^20 tokens.

A document that does not end with the end-of-text id was cut by `mix`. Texts cannot mark such a piece, nor can the
trainers' formats, which cannot hold the borders and the padding of packed sequences either: these are refused.
`lossy` exports them all the same: padding is left out, and each piece becomes a document that ends with the
end-of-text id.

    llmkit tokenize corpus.idx --from megatron -t tok/ --decode -o texts.jsonl.zst
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import orjson

from llmkit.errors import LlmkitError
from llmkit.io.record import Input, base_name
from llmkit.lineage.formats import digest_path
from llmkit.shards.arrow import JSON_ID
from llmkit.shards.formats import FOREIGN_FORMATS
from llmkit.shards.reader import TokenStore
from llmkit.shards.token_block import BLOCK_TOKENS, NO_LOSSES, Losses, TokenBlock, check_file, check_ids
from llmkit.shards.tokenizer_info import TokenizerInfo
from llmkit.tokens.encoder import decode_documents
from llmkit.tokens.losses import mark_unknown, unknown_id
from llmkit.tokens.text_encoder import load_tokenizer

BLOCK_DOCUMENTS = 1 << 12
HINT_BYTES = "use one that is byte-level or has byte fallback; llmkit vocab trains one"


@dataclass(slots=True)
class TokenCounts:
    """Totals over blocks. `documents` includes `empty` ones, which are dropped; `bytes` are UTF-8 bytes, where known.

    `ended` counts documents that lacked the end-of-text id; `sources` maps each source to its [documents,
    tokens, bytes]; `losses` is what the texts lost, `replaced` which of their characters become white space.
    """

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    empty: int = 0
    ended: int = 0
    bad_lines: int = 0
    losses: Losses = NO_LOSSES
    replaced: Losses = NO_LOSSES
    sources: dict[str, list[int]] = field(default_factory=dict)

    def add(self, block: TokenBlock) -> int:
        """Add a block. Returns its number of documents."""
        sizes = block.sizes or [0] * len(block.ids)
        for source, length, size in zip(block.sources, block.lengths.tolist(), sizes, strict=True):
            row = self.sources.setdefault(source, [0, 0, 0])
            row[0] += 1
            row[1] += length
            row[2] += size
        self.documents += len(block.ids) + block.empty
        self.tokens += len(block.tokens)
        self.bytes += sum(sizes)
        self.empty += block.empty
        self.ended += block.ended
        self.bad_lines += len(block.bad)
        self.losses += block.losses
        self.replaced += block.replaced
        return len(block.ids) + block.empty

    def counts(self) -> dict[str, int]:
        """The counts for summary and lineage: documents, tokens, empty, and the others where not zero."""
        counts = {name: getattr(self, name) for name in ("documents", "tokens", "bytes", "empty", "ended", "bad_lines")}
        counts |= {"lossy_documents": self.losses.documents, "lost_pieces": self.losses.pieces}
        counts |= {"replaced_documents": self.replaced.documents, "replaced_characters": self.replaced.pieces}
        return {name: count for name, count in counts.items() if count or name in ("documents", "tokens", "empty")}

    def check_losses(self) -> list[str]:
        """Warnings of what the texts lost. LlmkitError if every one of them was lost entirely."""
        losses, replaced, documents = self.losses, self.replaced, self.documents - self.empty
        if documents and losses.blank == documents:
            raise LlmkitError("the tokenizer has no tokens for any of the texts", HINT_BYTES)
        facts = {
            f"has no tokens for {losses.pieces:,} pieces of text": losses,
            f"reads {replaced.pieces:,} characters of text as spaces": replaced,
        }
        return [
            f"the tokenizer {fact}, in {loss.documents:,} of {documents:,} documents: the first is {loss.example}"
            for fact, loss in facts.items()
            if loss.documents
        ]


def read_stored(
    kind: str,
    paths: list[str],
    info: TokenizerInfo | None,
    source: str | None = None,
    target: str = "shards",
    lossy: bool = False,
) -> tuple[TokenizerInfo, Iterable[TokenBlock], list[Input], list[str]]:
    """Read "shards" or the files of a foreign format. Returns their tokenizer, blocks, inputs for the lineage, and
    what of the shards `target` does not hold.

    `source` names the source of all documents. `info` is required unless `kind` is "shards". Raises LlmkitError
    where it is not the tokenizer of the shards, or where `target` cannot hold the documents (unless `lossy`).
    """
    if kind == "shards":
        store = TokenStore.open(paths)
        store.verify()
        cut = _count_cut(store)
        if not lossy:
            _check_whole(store, paths[0], target, cut)
        if info is not None and info.digest != store.tokenizer.digest:
            raise LlmkitError(
                f"{paths[0]}: made with another tokenizer", "leave -t out: the shards carry their tokenizer"
            )
        info = info or store.tokenizer
        blocks = _with_losses(_shard_blocks(store, source), info, target)
        return info, blocks, store.inputs, _not_held(store, target, cut)
    assert info is not None
    for path in paths:
        check_file(path)
    inputs = [Input("input", base_name(path), digest_path(path)) for path in paths]
    foreign = FOREIGN_FORMATS.get(kind)
    data_sets = foreign.data_sets(paths)
    blocks = (block for data_set in data_sets for block in foreign.read(data_set, info, source))
    return info, _with_losses(blocks, info, target), inputs, []


def _with_losses(blocks: Iterable[TokenBlock], info: TokenizerInfo, target: str) -> Iterator[TokenBlock]:
    """The blocks; if they are decoded, with their unknown tokens counted."""
    unknown = unknown_id(info) if target == "documents" else None
    return (mark_unknown(block, unknown) for block in blocks)


def _count_cut(store: TokenStore) -> int:
    """The documents that do not end with the end-of-text id, where others do: pieces of cut ones."""
    cut, whole, first, padding = 0, 0, 0, store.padding
    for tokens, ids, _ in store.batches():
        stops = store.offsets[first : first + len(ids) + 1] - store.offsets[first]
        pieces = np.diff(stops) > 0
        pieces[pieces] = tokens[stops[1:][pieces] - 1] != store.tokenizer.eos_id
        cut += int((pieces if padding is None else pieces & ~padding[first : first + len(ids)]).sum())
        whole += int((np.diff(stops) > 0).sum() - pieces.sum())
        first += len(ids)
    return cut if whole else 0


def _check_whole(store: TokenStore, name: str, target: str, cut: int) -> None:
    """LlmkitError where `target` cannot hold what `mix` made of the documents."""
    if store.sequence_length and target in FOREIGN_FORMATS.names():
        raise LlmkitError(
            f"{name}: packed into sequences of {store.sequence_length:,} tokens; {target} holds neither their borders "
            "nor their padding",
            "export the shards that were mixed, or mix with --pack concat; --lossy writes the documents alone",
        )
    if cut and target != "jsonl":
        raise LlmkitError(
            f"{name}: {cut:,} pieces of documents that mix cut, which would become documents",
            "use the shards that were mixed; --lossy writes each piece as a document",
        )


def _not_held(store: TokenStore, target: str, cut: int) -> list[str]:
    """What of the shards is not in files of the format `target`, for the summary."""
    foreign, epochs = target in FOREIGN_FORMATS.names(), store.origins()[2]
    facts = {
        "ids": foreign,
        "sources": foreign,
        "epochs": epochs is not None and bool(epochs.any()),
        "duplicate counts": store.duplicates is not None,
        "the ends of stages": len(store.stages) > 1,
        "the padding and borders of sequences": store.sequence_length is not None,
        f"the cuts of {cut:,} documents": cut > 0 and target != "jsonl",
    }
    return [fact for fact, lost in facts.items() if lost]


def end_documents(block: TokenBlock, info: TokenizerInfo, *, flat: bool, lossy: bool) -> TokenBlock:
    """The block for a foreign format: every document ends with the end-of-text id, which a piece of a cut one lacks.

    LlmkitError where a document of a `flat` format has that id inside as well, unless `lossy`: it would become two.
    """
    if not len(block.tokens):
        return block
    ends = np.cumsum(block.lengths)
    missing = np.flatnonzero((block.lengths == 0) | (block.tokens[np.maximum(ends, 1) - 1] != info.eos_id))
    if flat and not lossy:
        count = np.count_nonzero(block.tokens == info.eos_id)
        if count > len(ends) - len(missing):
            raise LlmkitError(
                f"the end-of-text id {info.eos_id} is inside a document, where the format would end it",
                "tokenize without --allow-special; --lossy writes it all the same",
            )
    if not len(missing):
        return block
    tokens = np.insert(block.tokens, ends[missing], info.eos_id)
    lengths = block.lengths.copy()
    lengths[missing] += 1
    return replace(block, tokens=tokens, lengths=lengths, ended=block.ended + len(missing))


def _shard_blocks(store: TokenStore, source: str | None) -> Iterator[TokenBlock]:
    """Documents in stored order, without the padding of packed ones."""
    first, names, json_marks = 0, store.sources, store.json_marks
    if source and json_marks is not None:
        json_marks = json_marks & np.uint8(JSON_ID)
    kept = np.ones(store.documents, np.bool_) if store.padding is None else ~store.padding
    while first < store.documents:
        limit = int(store.offsets[first]) + BLOCK_TOKENS
        stop = int(np.searchsorted(store.offsets, limit, side="right")) - 1
        stop = max(min(stop, first + BLOCK_DOCUMENTS), first + 1)
        tokens = store.span(int(store.offsets[first]), int(store.offsets[stop]))
        lengths, mask = np.diff(store.offsets[first : stop + 1]), kept[first:stop]
        yield TokenBlock(
            tokens if mask.all() else tokens[np.repeat(mask, lengths)],
            lengths[mask],
            [store.id(first + i) for i in np.flatnonzero(mask).tolist()],
            [source or names[code] for code in store.codes[first:stop][mask]],
            json_marks=None if json_marks is None else json_marks[first:stop][mask],
        )
        first = stop


def token_lines(block: TokenBlock) -> bytes:
    """One line {"id", "source", "tokens"} per document."""
    options = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE
    documents = zip(block.origins(), block.documents(), strict=True)
    rows = ({"id": id, "source": source, "tokens": tokens} for (id, source), (tokens, _, _) in documents)
    return b"".join(orjson.dumps(row, option=options) for row in rows)


def text_lines(info: TokenizerInfo) -> Callable[[TokenBlock], bytes]:
    """A function that formats blocks as lines {"id", "text", "source"}.

    It raises LlmkitError for an id outside the vocabulary, which the library would silently skip.
    """
    library = load_tokenizer(info)

    def lines(block: TokenBlock) -> bytes:
        check_ids(block.tokens, info, "the input")
        texts = decode_documents(library, (tokens for tokens, _, _ in block.documents()), info.eos_id)
        rows = zip(block.origins(), texts, strict=True)
        return b"".join(orjson.dumps({"id": id, "text": text, "source": name}) + b"\n" for (id, name), text in rows)

    return lines
