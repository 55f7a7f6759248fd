"""What a run reads: its token stream, rows and held-out data, the model it starts from, and the length of sequences
that all of them allow.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llmkit.errors import LlmkitError, UsageError
from llmkit.io.atomic import atomic_file
from llmkit.io.inputs import STDIN, open_raw
from llmkit.io.record import Input, base_name
from llmkit.io.run_layout import resolve_model
from llmkit.lineage.formats import digest_path, read_lineage
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

ROWS = "stdin.jsonl"  # the name of a kept stream of rows


def open_stream(data: str, session: Session, dry_run: bool = False) -> OrderedTokens | TokenStore:
    """The training data in its order; a stream on stdin is kept in the run directory first, so that a resumed run
    finds it.
    """
    if data != STDIN or dry_run:
        return OrderedTokens.open(data)
    stream = OrderedTokens.open(str(_keep_stdin(session, "stdin.arrow")))
    for item in stream.inputs:
        item.name = STDIN
    return stream


def source_groups(stream: OrderedTokens | TokenStore) -> SourceGroups:
    """The groups by which losses on a stream are reported."""
    return document_groups(np.diff(stream.offsets), *stream.origins())


def open_rows(request: Request, session: Session, rows: list[str] | None, stdin: bool) -> DocumentReader:
    """Reader of rows; with `stdin` they come from there, and are kept in the run directory for every process and a
    resumed run.
    """
    if stdin and not request.dry_run:
        kept = str(_keep_stdin(session, ROWS))
        rows = [kept if path == STDIN else path for path in rows or [STDIN]]
    return request.reader(rows)


def row_inputs(reader: DocumentReader) -> list[Input]:
    """What was read, for the lineage; kept stdin by its own name."""
    for item in reader.inputs:
        if item.name == ROWS:
            item.name = STDIN
    return reader.inputs


def _keep_stdin(session: Session, name: str) -> Path:
    """A file of the run that holds what came on stdin; read once, by the main process."""
    kept = session.directory.path / "data" / name
    if session.processes.is_main and not (kept.exists() and session.options.checkpoints.resume):
        if sys.stdin is None or sys.stdin.isatty():
            raise UsageError("no input: stdin is a terminal", "name the data, or pipe it in")
        kept.parent.mkdir(exist_ok=True)
        with atomic_file(kept, force=True) as sink:
            shutil.copyfileobj(open_raw(STDIN), sink, 1 << 20)
            if not sink.tell():
                raise LlmkitError("standard input is empty", "name the data, or pipe it in")
    session.kept = (kept.parent.name,)
    session.processes.barrier()
    return kept


def packed_length(data: str, packed: int | None, wanted: int | None, document_mask: bool) -> int | None:
    """Tokens per sequence: what the data was packed for, if it was, else what is wanted. UsageError where these
    differ.
    """
    if packed and wanted not in (None, packed):
        raise UsageError(
            f"--sequence-length {wanted:,}, but {data} is packed for sequences of {packed:,}",
            f"leave the option out, or mix again with --sequence-length {wanted}",
        )
    if packed and not document_mask:
        raise UsageError(
            f"{data} is packed: --no-document-mask would let documents see the padding", "mix with --pack concat"
        )
    return packed or wanted


def context_length(info: LoadedModel, sequence_length: int | None) -> int:
    """Tokens per sequence: as wanted, at most the model's context length, which is the default."""
    largest = info.config.max_position_embeddings
    if sequence_length is not None and sequence_length > largest:
        raise UsageError(
            f"--sequence-length {sequence_length:,} is beyond the model's context of {largest:,}", f"at most {largest}"
        )
    return sequence_length or largest


def held_out_source(heldout: list[str] | None, digest: str, length: int, document_mask: bool) -> HeldOutSource | None:
    """Source of the held-out loss over token shards, None where none are named. Domains are those named, else the
    documents' sources.
    """
    paths = held_out_paths(heldout)
    if not paths:
        return None
    codes, names = [], {PADDING_SOURCE: 0}
    for path, name in paths.items():
        store = TokenStore.open(path)
        refuse_other_tokenizer(path, store.tokenizer.digest, digest)
        packed_length(path, store.sequence_length, None, document_mask)
        own_codes, sources, _ = store.origins()
        table = [
            names.setdefault(name if name and source != PADDING_SOURCE else source, len(names)) for source in sources
        ]
        codes.append(np.array(table, np.int32)[own_codes])
    store = TokenStore.open(list(paths))
    groups = document_groups(np.diff(store.offsets), np.concatenate(codes), list(names), None)
    return HeldOutSource(
        store, length, document_mask=document_mask, vocabulary=store.tokenizer.vocab_size, groups=groups
    )


def refuse_other_tokenizer(path: str, digest: str, expected: str) -> None:
    """LlmkitError where the shards at `path` were not made with the model's tokenizer."""
    if digest != expected:
        raise LlmkitError(
            f"{path}: made with another tokenizer than the model's", "tokenize the documents again with the model's own"
        )


def refuse_short_stream(data: str, tokens: int, length: int) -> None:
    """UsageError where the data does not fill one sequence."""
    if length > tokens:
        raise UsageError(
            f"sequences of {length:,} tokens, but {data} holds {tokens:,}", "give a shorter --sequence-length"
        )


def model_input(path: str, directory: Path | None = None) -> Input:
    """The model that a run starts from, by the name it was given; `directory` where that name stands for a checkpoint
    in it.
    """
    place = directory or resolve_model(path)
    return Input("input", base_name(path), digest_path(place), read_lineage(place))
