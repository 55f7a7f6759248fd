"""The cache of encoded rows: equal runs with and without it, resumption, damage, several runs at once."""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import threading
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import Any

import orjson
import pytest

from llmkit.alignment import row_cache
from llmkit.alignment.row_cache import RowCache
from llmkit.chat.encode import EncodedDataset, RowEncoding, pair_encoding, row_encoding
from llmkit.errors import LlmkitError
from llmkit.io.documents import DocumentReader, ReadOptions
from llmkit.training.distributed.processes import start

Call = Callable[..., Any]
CHUNK = 4


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_cache, "CHUNK_ROWS", CHUNK)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Rows of every kind: unused fields, a part that the template does not show, refused rows, bad lines, a row too long,
    parts that are left out, and at the end trees in rows of their own."""
    turns = [{"role": "user", "content": "what is"}, {"role": "assistant", "content": "it is"}]
    lines: list[bytes] = [
        orjson.dumps({"prompt": f"what {i}", "completion": "it is " * (i + 1)} | ({"source": i} if i % 3 else {}))
        for i in range(12)
    ]
    lines[1] = orjson.dumps({"messages": [*turns, *turns[:1], turns[1] | {"reasoning_content": "hidden thought"}]})
    lines[2:2] = [b"{bad", b'{"prompt": "a"}', b'{"prompt": "a", "completion": "\xff"}']
    lines[9:9] = [orjson.dumps({"question": "\u00e9"}), b"[]", b""]
    flat = [
        ("q", None, "prompter", None),
        ("a", "q", "assistant", 0),
        ("b", "q", "assistant", 1),
        ("c", "x", "prompter", 0),
    ]
    lines += [
        orjson.dumps({"message_id": name, "parent_id": parent, "role": role, "text": f"it is {name}", "rank": rank})
        for name, parent, role, rank in flat
    ]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return tmp_path / "rows.jsonl"


def content(encoded: EncodedDataset) -> Any:
    tokens = [(row.tokens.tolist(), row.weights.tolist(), row.lost) for row in encoded.rows]
    return tokens, encoded.counts, encoded.unused, encoded.left_out, encoded.lost


def read(path: Path, encoding: RowEncoding, cache: RowCache | None, how: str = "skip") -> Any:
    """What comes of the rows, the counts of the reader, its inputs, and its quarantine."""
    options = ReadOptions(text_key=None, on_bad_line=how)
    with DocumentReader([str(path)], options) as reader:
        encoded = encoding.dataset(cache.read(reader, encoding)) if cache else encoding.read(reader)
        outcome = content(encoded), reader.counts(), [(item.name, item.digest) for item in reader.inputs]
    kept = Path(how.partition("=")[2]).read_bytes() if "=" in how else b""
    return outcome, kept


def new_cache(path: Path, warnings: list[str] | None = None) -> RowCache:
    return RowCache(path / "cache", start(), [].append if warnings is None else warnings.append)


def chunks(path: Path) -> list[Path]:
    return sorted((path / "cache").rglob("*.safetensors"))


@pytest.mark.parametrize("too_long", ["drop", "truncate", "truncate-turns", "error"])
def test_cold_and_warm_are_as_without(
    tmp_path: Path, rows: Path, templates: dict[str, dict[str, str]], too_long: str
) -> None:
    """Property: rows, counts, what is not used, left out or lost, inputs and quarantine are those without a cache; a warm cache
    encodes nothing, at any length."""
    how = f"quarantine={tmp_path}/bad.jsonl.zst"
    for length in (30, 40):
        encoding = row_encoding(templates["chatml"], length, too_long=too_long, lossy=True)
        plain = read(rows, encoding, None, how)
        cold, warm = new_cache(tmp_path), new_cache(tmp_path)
        assert read(rows, encoding, cold, how) == plain and read(rows, encoding, warm, how) == plain
        assert warm.counts == {"read": 4}
        is_new = length == 30 or too_long == "error"  # rows that are too long are refused, and stored as such
        assert cold.counts == ({"encoded": 4} if is_new else {"read": 4})
        (_, _, unused, left_out, lost), counts, _ = plain[0]
        assert counts["bad_lines"] >= 6 and unused and left_out and (lost or length == 30)


def test_a_warm_cache_never_encodes(
    tmp_path: Path, rows: Path, templates: dict[str, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Property: neither the template nor the tokenizer is called; other files, templates, options and content are other keys."""
    encoding = row_encoding(templates["chatml"], 30, lossy=True)
    expected = read(rows, encoding, new_cache(tmp_path))
    others = [
        row_encoding(templates["llama3"], 30, lossy=True),
        row_encoding(templates["chatml"], 30),
        row_encoding(templates["chatml"], 30, lossy=True, train_on="last"),
        row_encoding(templates["chatml"], 30, lossy=True, template=False),
        row_encoding(templates["chatml"], 30, lossy=True, names={"prompt": "question"}),
        pair_encoding(templates["chatml"], 30, lossy=True),
    ]
    for other in others:
        cache = new_cache(tmp_path)
        read(rows, other, cache)
        assert cache.counts["encoded"] and not cache.counts["read"]
    copy = tmp_path / "copy.jsonl.gz"
    import gzip

    copy.write_bytes(gzip.compress(rows.read_bytes()))
    monkeypatch.setattr("llmkit.chat.encode.encode_chat", None)
    outcome, _ = read(rows, encoding, new_cache(tmp_path))
    assert outcome == expected[0]
    assert read(copy, encoding, new_cache(tmp_path))[0][0] == outcome[0]
    monkeypatch.undo()
    monkeypatch.setattr(row_cache, "CHUNK_ROWS", CHUNK)
    rows.write_bytes(rows.read_bytes().replace(b"what 5", b"what 6"))
    cache = new_cache(tmp_path)
    assert read(rows, encoding, cache) == read(rows, encoding, None) and not cache.counts["read"]


def test_the_first_refused_row_stops_the_run(tmp_path: Path, rows: Path, templates: dict[str, dict[str, str]]) -> None:
    """Behaviour: the error is that without a cache, cold and warm."""
    encoding = row_encoding(templates["chatml"], 30)
    errors = []
    for cache in (None, new_cache(tmp_path), new_cache(tmp_path)):
        with pytest.raises(LlmkitError) as caught:
            read(rows, encoding, cache, "stop")
        errors.append((caught.value.message, caught.value.hint))
    assert errors[0] == errors[1] == errors[2] and "rows.jsonl:3: invalid JSON" in errors[0][0]


@pytest.mark.parametrize("damage", ["cut", "bit", "empty", "moved", "link", "other"])
def test_damage_is_noticed(tmp_path: Path, rows: Path, templates: dict[str, dict[str, str]], damage: str) -> None:
    """Property: a damaged chunk is encoded again with a warning, and then whole; the others are read."""
    encoding = row_encoding(templates["chatml"], 30, lossy=True)
    expected = read(rows, encoding, new_cache(tmp_path))
    paths = chunks(tmp_path)
    stored = [path.read_bytes() for path in paths]
    victim = paths[2]
    if damage == "moved":
        victim.write_bytes(stored[1])
    elif damage == "link":
        victim.unlink()
        victim.symlink_to(paths[1])
    elif damage == "other":
        victim.write_bytes(b"\x80\x04cos\nsystem\n(S'false'\ntR.")
    else:
        middle = len(stored[2]) * 3 // 4
        flipped = stored[2][:middle] + bytes([stored[2][middle] ^ 4]) + stored[2][middle + 1 :]
        victim.write_bytes({"cut": stored[2][:-9], "bit": flipped, "empty": b""}[damage])
    warnings: list[str] = []
    cache = new_cache(tmp_path, warnings)
    assert read(rows, encoding, cache) == expected
    assert cache.counts == {"read": 3, "encoded": 1}
    assert len(warnings) == 1 and str(victim) in warnings[0] and "is damaged" in warnings[0]
    assert [path.read_bytes() for path in paths] == stored and not victim.is_symlink()


def test_every_flipped_bit_is_noticed(tmp_path: Path, rows: Path, templates: dict[str, dict[str, str]]) -> None:
    """Property: a chunk with any one byte changed is refused, or holds the same rows."""
    encoding = row_encoding(templates["chatml"], 30, lossy=True)
    read(rows, encoding, new_cache(tmp_path))
    path = chunks(tmp_path)[0]
    stored, name = path.read_bytes(), f"{path.parent.name} 0"
    whole = row_cache._pack(row_cache._unpack(stored, name), name)
    assert whole == stored
    accepted = 0
    for at in range(0, len(stored), 7):
        changed = stored[:at] + bytes([stored[at] ^ 1]) + stored[at + 1 :]
        try:
            accepted += row_cache._pack(row_cache._unpack(changed, name), name) == stored
        except Exception:
            continue
        assert row_cache._pack(row_cache._unpack(changed, name), name) == stored
    assert accepted < 5  # spaces of the header


def test_a_killed_run_goes_on(
    tmp_path: Path, rows: Path, templates: dict[str, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Property: killed before its third chunk, the next run reads two and encodes the rest; the result is as without."""
    encoding = row_encoding(templates["chatml"], 30, lossy=True)
    cache, store = new_cache(tmp_path), RowCache._store

    def dies(self: RowCache, entry: Any, number: int, chunk: Any) -> None:
        if number == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        store(self, entry, number, chunk)

    if (child := os.fork()) == 0:
        monkeypatch.setattr(RowCache, "_store", dies)
        read(rows, encoding, cache)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert [path.stem for path in chunks(tmp_path)] == ["00000", "00001"]
    assert read(rows, encoding, cache) == read(rows, encoding, None)
    assert cache.counts == {"read": 2, "encoded": 2}


def test_two_runs_at_once(tmp_path: Path, rows: Path, templates: dict[str, dict[str, str]]) -> None:
    """Property: runs that take turns chunk by chunk give equal rows; one that cannot store a chunk, since another writes it or
    the disk is full, goes on; a file that changes meanwhile is refused."""
    from llmkit.io.atomic import lock

    encoding = row_encoding(templates["chatml"], 30, lossy=True)
    expected = read(rows, encoding, None)[0][0]
    caches = [new_cache(tmp_path) for _ in range(2)]
    readers = [DocumentReader([str(rows)], ReadOptions(text_key=None, on_bad_line="skip")) for _ in range(2)]
    turns = [cache.read(reader, encoding) for cache, reader in zip(caches, readers, strict=True)]
    taken: list[list[Any]] = [[], []]
    for items in zip_longest(*turns):
        for mine, item in zip(taken, items, strict=True):
            mine += [item] if item is not None else []
    assert [content(encoding.dataset(mine)) for mine in taken] == [expected] * 2
    assert sum(cache.counts["encoded"] for cache in caches) < 8
    busy = chunks(tmp_path)[3]
    busy.unlink()
    with lock(busy.with_name(f".{busy.name}.partial")):
        assert read(rows, encoding, new_cache(tmp_path))[0][0] == expected
    assert not busy.exists()
    warnings: list[str] = []
    shutil.rmtree(busy.parent)
    busy.parent.write_text("")  # in the way
    assert read(rows, encoding, new_cache(tmp_path, warnings))[0][0] == expected
    assert len(warnings) >= 1 and "the rows are not stored" in warnings[-1]
    busy.parent.unlink()
    reader = DocumentReader([str(rows)], ReadOptions(text_key=None, on_bad_line="skip"))
    turn = new_cache(tmp_path).read(reader, encoding)
    next(turn)
    rows.write_bytes(rows.read_bytes() + b'{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(LlmkitError, match="changed while it was read"):
        list(turn)


def test_damaged_files_and_pipes_are_read_as_without(
    tmp_path: Path, rows: Path, templates: dict[str, dict[str, str]]
) -> None:
    """Behaviour: a truncated file is skipped from its damage on, and not stored."""
    import zstandard

    cut = tmp_path / "cut.jsonl.zst"
    cut.write_bytes(zstandard.compress(rows.read_bytes() * 30)[:-20])
    encoding = row_encoding(templates["chatml"], 30, lossy=True)
    outcomes = []
    for cache in (None, new_cache(tmp_path)):
        options = ReadOptions(text_key=None, on_bad_line="skip", on_bad_file="skip")
        with DocumentReader([str(cut), str(rows)], options) as reader:
            encoded = encoding.dataset(cache.read(reader, encoding)) if cache else encoding.read(reader)
        outcomes.append((content(encoded), reader.counts(), [item.digest for item in reader.inputs], reader.paths))
    assert outcomes[0] == outcomes[1] and outcomes[0][1]["bad_files"] == 1
    assert len({path.parent for path in chunks(tmp_path)}) == 1


@pytest.mark.parametrize("command", ["sft", "dpo"])
def test_runs_are_equal(directory: Path, llmkit_here: Call, command: str) -> None:
    """Property: the model, its record and the counts have the same bytes without a cache, with a cold and a warm one, also with
    held-out rows and amounts; the directory is not part of the record."""
    path = {"sft": "chat.jsonl", "dpo": "pairs.jsonl"}[command]
    (directory / "bad.jsonl").write_bytes((directory / path).read_bytes() + b"{bad\n")
    more = ("--heldout", "chat.jsonl") if command == "sft" else ()
    runs = []
    given = ("--row-cache", "cache")
    for number, cache in enumerate(((), given, given) if command == "sft" else (given, ())):
        call = (
            command,
            "base",
            f"{path}:x1",
            "bad.jsonl:x0.5",
            *more,
            "--on-bad-line",
            "skip",
            "--batch-size",
            "8",
            *cache,
        )
        done = llmkit_here(*call, "--json", "-o", f"run{number}", cwd=directory)
        assert done.returncode == 0, done.stderr
        counts = json.loads(done.stderr.splitlines()[-1])
        timed = [name for name in counts if "second" in name or "memory" in name or "tokens_per" in name]
        model = (directory / f"run{number}" / "final" / "model.safetensors").read_bytes()
        runs.append((model, {name: value for name, value in counts.items() if name not in timed}))
    assert all(run == runs[0] for run in runs) and b"cache" not in runs[0][0] and len(chunks(directory)) > 4
    if command == "dpo":
        return
    (directory / "file").write_text("")
    assert (
        b"not a directory" in llmkit_here(command, "base", path, "--row-cache", "file", "-o", "x", cwd=directory).stderr
    )
    before = chunks(directory)
    llmkit_here(command, "base", path, "--row-cache", "none", "-n", "-o", "x", cwd=directory)
    assert not (directory / "none").exists() and chunks(directory) == before


class Half:
    """One of two processes, which are threads here: `broadcast` hands on what the main one has."""

    world_size = 2

    def __init__(self, is_main: bool, values: queue.Queue[Any]) -> None:
        self.is_main, self._values = is_main, values

    def broadcast(self, value: Any) -> Any:
        if self.is_main:
            self._values.put(value)
        return value if self.is_main else self._values.get(timeout=60)


def test_of_two_processes_one_encodes(
    tmp_path: Path, rows: Path, templates: dict[str, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Property: the main process encodes, the other reads, both have the rows of one process; where the main one cannot store
    chunks, each encodes for itself."""
    encoding = row_encoding(templates["chatml"], 30, lossy=True)
    expected = read(rows, encoding, None)
    for directory in ("cache", "file/cache"):
        values: queue.Queue[Any] = queue.Queue()
        caches = [
            RowCache(tmp_path / directory, Half(main, values), [].append)  # type: ignore[arg-type]
            for main in (True, False)
        ]
        (tmp_path / "file").write_text("")  # in the way from now on
        results: list[Any] = [None, None]

        def work(i: int, caches: list[RowCache] = caches, results: list[Any] = results) -> None:
            results[i] = read(rows, encoding, caches[i])

        threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert results == [expected, expected]
        assert caches[1].counts == ({"read": 4} if directory == "cache" else {"encoded": 4})
