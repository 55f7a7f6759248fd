"""Files that need far more memory than they have bytes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmkit.memory import LEAST, MemoryLimitError, budget, limited, set_budget

BUDGET = 64 << 20

OPEN = """
import sys
from llmkit.errors import LlmkitError
from llmkit.shards.reader import TokenStore
try:
    TokenStore.open([sys.argv[1]])
except LlmkitError as error:
    print(error.message, error.hint, sep="; ")
"""
READ = """
import sys
from llmkit.errors import LlmkitError
from llmkit.io.documents import DocumentReader, ReadOptions
from llmkit.memory import set_budget
path, budget = sys.argv[1], int(sys.argv[2])
set_budget(budget)
reader, rows = DocumentReader([path], ReadOptions(on_bad_line="skip")), 0
status = lambda key: next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(key))
import pyarrow.parquet
before = status("VmRSS")
try:
    for chunk in reader.chunks():
        rows += chunk.data.count(b"\\n")
    print(rows, "rows", (status("VmHWM") - before) >> 20)
except LlmkitError as error:
    print(rows, error.message, (status("VmHWM") - before) >> 20)
"""


def read(path: Path) -> tuple[str, int]:
    """What reading in a process of its own gave, and the memory that it took, in MiB."""
    done = subprocess.run([sys.executable, "-c", READ, path, str(BUDGET)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result, _, size = done.stdout.rpartition(" ")
    return result, int(size)


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is enforced on Linux")
@pytest.mark.parametrize("store_schema", [True, False])
def test_long_rows_that_are_stored_once(tmp_path: Path, store_schema: bool) -> None:
    """Behaviour: 150 rows of 1 MB in a file of 2 kB are all read, in the memory of a few."""
    path = tmp_path / "a.parquet"
    texts = pa.DictionaryArray.from_arrays(pa.array(np.zeros(150, np.int32)), pa.array(["x" * 1_000_000]))
    pq.write_table(pa.table({"text": texts}), path, compression="zstd", store_schema=store_schema)
    assert path.stat().st_size < 2000
    result, size = read(path)
    assert result == "150 rows" and size < (BUDGET >> 20) + 300


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is enforced on Linux")
def test_a_row_over_the_budget_is_an_error(tmp_path: Path) -> None:
    """Behaviour: the rows before one of 20 million numbers are read; that one is an error that names the file."""
    path = tmp_path / "a.parquet"
    numbers = pa.ListArray.from_arrays(pa.array([0, 1, 2, 20_000_000], pa.int32()), np.zeros(20_000_000, np.int8))
    pq.write_table(pa.table({"text": ["a", "b", "c"], "n": numbers}), path, compression="zstd")
    assert path.stat().st_size < 3000
    result, size = read(path)
    assert result == f"2 {path}: needs more than {BUDGET >> 20} MiB of memory" and size < (BUDGET >> 20) + 300


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is enforced on Linux")
def test_compressed_columns_of_a_shard(tmp_path: Path, small_tokenizer: dict[str, str]) -> None:
    """Behaviour: columns that somebody compressed 10,000 times are refused, not unpacked."""
    from llmkit.io.record import Lineage
    from llmkit.shards.tokenizer_info import parse_tokenizer
    from llmkit.shards.writer import ShardWriter

    path, packed = tmp_path / "a.arrow", tmp_path / "b.arrow"
    with ShardWriter(str(path), parse_tokenizer(small_tokenizer, "t"), Lineage("tokenize")) as writer:
        writer.write([1, 2, 0], "1", "s")
        writer.finish({}, [])
    stream = pa.ipc.open_stream(path.read_bytes())
    batch = stream.read_next_batch()
    tokens = pa.LargeListArray.from_arrays(
        pa.array([0, 350_000_000], pa.int64()), pa.array(np.zeros(350_000_000, np.uint16))
    )
    columns = [tokens if name == "tokens" else batch.column(name) for name in batch.schema.names]
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.OSFile(str(packed), "wb") as sink, pa.ipc.new_stream(sink, stream.schema, options=options) as out:
        out.write_batch(pa.record_batch(columns, schema=stream.schema))
    assert packed.stat().st_size < 200_000
    done = subprocess.run([sys.executable, "-c", OPEN, packed], capture_output=True, text=True)
    assert re.fullmatch(
        r".*b\.arrow: needs more than \d+ MiB of memory; the file was not written by llmkit\n", done.stdout
    ), done


def test_the_limit_ends_with_the_block() -> None:
    """Behaviour: an allocation over the limit is an error in the block only; an inner block has the outer limit."""
    if sys.platform == "linux":
        with pytest.raises(MemoryLimitError, match="f: needs more than 10 MiB"), limited("f", 10 << 20):
            bytearray(1 << 30)  # more than the process may hold for itself
        with limited("f", 200 << 20), limited("g", 10 << 20):
            bytearray(40 << 20)
    bytearray(400 << 20)
    try:
        set_budget(1)
        assert budget() == LEAST
        set_budget(1 << 40)
        assert budget() == 1 << 40
    finally:
        set_budget(0)
    assert 0 < budget() <= 4 << 30
