"""Inputs of a run: token stream, rows, held-out data and initial model, and the sequence length they allow."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llmkit.errors import LlmkitError, UsageError
from llmkit.io.atomic import atomic_file
from llmkit.io.inputs import STDIN, open_raw
from llmkit.io.record import Input
from llmkit.io.run_layout import member, resolve_model
from llmkit.lineage.formats import describe_input
from llmkit.mixing.order import OrderedTokens
from llmkit.model.pretrained.checkpoint import LoadedModel
from llmkit.shards.reader import TokenStore
from llmkit.shards.shard import PADDING_SOURCE
from llmkit.training.data import HeldOutSource
from llmkit.training.options import held_out_paths
from llmkit.training.session import Session
from llmkit.training.source_groups import SourceGroups, document_groups

if TYPE_CHECKING:
    from llmkit.io.documents import DocumentReader
    from llmkit.training.runner import Request

ROWS = "stdin.jsonl"  # name of the stored copy of rows from stdin


def open_stream(data: str, session: Session, dry_run: bool = False) -> OrderedTokens | TokenStore:
    """The training data in order. A stream on stdin is first copied to the run directory, for a resumed run.

    LlmkitError where a shard is damaged: each process reads all of them before the first step (0.2 s per GB in memory).
    """
    from_stdin = data == STDIN and not dry_run
    stream = OrderedTokens.open(str(_store_stdin(session, "stdin.arrow")) if from_stdin else data)
    if not dry_run:
        stream.verify()
    if from_stdin:
        for item in stream.inputs:
            item.name = STDIN
    return stream


def source_groups(stream: OrderedTokens | TokenStore) -> SourceGroups:
    """The groups by which the loss on a stream is reported."""
    return document_groups(np.diff(stream.offsets), *stream.origins())


def open_rows(request: Request, session: Session, rows: list[str] | None, stdin: bool) -> DocumentReader:
    """A reader of rows. With `stdin` they are first copied from there to the run directory, for every process and for
    a resumed run.
    """
    if stdin and not request.dry_run:
        copy = str(_store_stdin(session, ROWS))
        rows = [copy if path == STDIN else path for path in rows or [STDIN]]
    return request.reader(rows)


def row_inputs(reader: DocumentReader) -> list[Input]:
    """The inputs that were read, for the lineage; a stored copy of stdin is recorded as stdin."""
    for item in reader.inputs:
        if item.name == ROWS:
            item.name = STDIN
    return reader.inputs


def _store_stdin(session: Session, name: str) -> Path:
    """Copy stdin to a file of the run, once, on the main process; returns its path."""
    path = member(session.directory.path / "data", name)
    if session.processes.is_main and not (path.exists() and session.options.checkpoints.resume):
        if sys.stdin is None or sys.stdin.isatty():
            raise UsageError("no input: stdin is a terminal", "name the data, or pipe it in")
        path.parent.mkdir(exist_ok=True)
        with atomic_file(path, force=True, follow=False) as sink:
            shutil.copyfileobj(open_raw(STDIN), sink, 1 << 20)
            if not sink.tell():
                raise LlmkitError("stdin is empty", "name the data, or pipe it in")
    session.stored = (path.parent.name,)
    session.processes.barrier()
    return path


def packed_length(data: str, packed: int | None, requested: int | None, document_mask: bool) -> int | None:
    """Tokens per sequence: the length that the data was packed for, if any, or else the requested one.

    Raises UsageError if these differ.
    """
    if packed and requested not in (None, packed):
        raise UsageError(
            f"--sequence-length {requested:,}, but {data} is packed for sequences of {packed:,} tokens",
            f"omit the option, or mix again with --sequence-length {requested}",
        )
    if packed and not document_mask:
        raise UsageError(
            f"{data} is packed: --no-document-mask would let documents attend to the padding", "mix with --pack concat"
        )
    return packed or requested


def context_length(info: LoadedModel, sequence_length: int | None) -> int:
    """Tokens per sequence: `sequence_length`, at most the model's context, or by default max_position_embeddings."""
    largest = info.config.context
    if sequence_length is not None and sequence_length > largest:
        raise UsageError(
            f"--sequence-length {sequence_length:,} exceeds the model's context of {largest:,} tokens",
            f"the maximum is {largest}",
        )
    return sequence_length or info.config.max_position_embeddings


def held_out_source(heldout: list[str] | None, digest: str, length: int, document_mask: bool) -> HeldOutSource | None:
    """The source of the held-out loss over token shards; None if no shards are named.

    The loss is reported by the named domains, or else by the documents' sources.
    """
    paths = held_out_paths(heldout)
    if not paths:
        return None
    codes, names = [], {PADDING_SOURCE: 0}
    for path, name in paths.items():
        store = TokenStore.open(path)
        check_tokenizer(path, store.tokenizer.digest, digest)
        packed_length(path, store.sequence_length, None, document_mask)
        own_codes, sources, _ = store.origins()
        table = [
            names.setdefault(name if name and source != PADDING_SOURCE else source, len(names)) for source in sources
        ]
        codes.append(np.array(table, np.int32)[own_codes])
    store = TokenStore.open(list(paths))
    store.verify()
    groups = document_groups(np.diff(store.offsets), np.concatenate(codes), list(names), None)
    return HeldOutSource(
        store, length, document_mask=document_mask, vocabulary=store.tokenizer.vocab_size, groups=groups
    )


def check_tokenizer(path: str, digest: str, expected: str) -> None:
    """Raise LlmkitError unless the shards at `path` were made with the model's tokenizer."""
    if digest != expected:
        raise LlmkitError(
            f"{path}: not made with the model's tokenizer", "tokenize the documents again, with the model's tokenizer"
        )


def check_stream_length(data: str, tokens: int, length: int) -> None:
    """Raise UsageError if the data does not fill a sequence."""
    if length > tokens:
        raise UsageError(
            f"sequences of {length:,} tokens, but {data} has only {tokens:,}", "give a shorter --sequence-length"
        )


def model_input(path: str, directory: Path | None = None) -> Input:
    """The lineage input of the initial model, under the name it was given; `directory` is the checkpoint, if known."""
    checkpoint = directory or resolve_model(path)
    return describe_input(checkpoint, name=path)
