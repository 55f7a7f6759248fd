"""Merge several models of one architecture into one, streamed: averages, SLERP, task arithmetic, TIES, DARE.

Checkpoints of one run, or models fine-tuned from the same start, are close together in weight space, and a
point between them is often slightly better than each (model soups, arXiv:2203.05482; LAWA, arXiv:2306.03241).
`llmkit eval` tells whether it is. The methods are in `merging.methods`; selection of models by held-out loss is
in `merging.greedy_soup`.

    merge = resolve_merge("ties", 2, density=[0.2])
    write_average([load_info("a"), load_info("b")], merge, Path("out"), base=load_info("base"))

Computed in float32 from any mixture of types, and stored in the first model's type. Cost: every model is read
once (TIES and SLERP: twice, the second time from the file cache if a tensor fits there), in blocks, so memory
is a few MB whatever the size of the models; TIES holds the magnitudes of one tensor of one model. Nothing here
loads torch, except for quantised models.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from llmkit.merging.methods import Merge, merged_blocks
from llmkit.merging.streams import ModelSet
from llmkit.model.pretrained.directory import WEIGHTS, LoadedModel, save_description
from llmkit.model.pretrained.header import encode_header, file_order
from llmkit.model.pretrained.streamed import from_float32

CONFIG_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
FLUSH = 16 << 20  # bytes

Digests = Mapping[Path, str]


def write_average(
    models: Sequence[LoadedModel],
    merge: Merge,
    directory: Path,
    record: Callable[[Digests | None], str] | None = None,
    advance: Callable[[int], None] | None = None,
    base: LoadedModel | None = None,
) -> None:
    """Write the merged model into `directory`, which exists; making it atomic is up to the caller.

    Configuration, tokenizer and type of the weights are the first model's. `record` returns the lineage for the
    digests of the models' files. It is also called with None before they are known, to reserve space of the
    same length. `advance` is called with each tensor's number of weights.
    """
    with (
        ModelSet(models, base, digesting=record is not None) as opened,
        open(directory / WEIGHTS, "wb", buffering=0) as sink,
    ):

        def header(digests: Digests | None) -> bytes:
            return encode_header(opened.layout, {"format": "pt"} | ({"llmkit": record(digests)} if record else {}))

        placeholder = header(None)
        flushed = sink.write(placeholder)
        for name in file_order(opened.layout):
            for block in merged_blocks(opened, name, merge):
                data = from_float32(block, opened.layout[name].dtype).view(np.uint8).data
                while len(data):
                    data = data[sink.write(data) :]
            if sink.tell() - flushed > FLUSH:  # start writeback now, instead of all of it at the end
                os.posix_fadvise(sink.fileno(), flushed, sink.tell() - flushed, os.POSIX_FADV_DONTNEED)
                flushed = sink.tell()
            if advance:
                advance(opened.layout[name].count)
        if record:
            final = header(opened.digests())
            assert len(final) == len(placeholder)
            sink.seek(0)
            sink.write(final)
        dtype = CONFIG_DTYPES[opened.layout[models[0].config.family.embedding].dtype]
    first = models[0]
    save_description(directory, first.config.to_hf(dtype), first.tokenizer_files, first.stop_ids, first.generation)
