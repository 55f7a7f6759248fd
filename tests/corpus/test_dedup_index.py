"""The index of earlier runs: matches, errors, and recovery after kills."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from resource import RLIMIT_FSIZE, getrlimit, setrlimit

import numpy as np
import orjson
import pytest
from packed import rows_of

from llmkit.corpus.dedup.exact import Exact
from llmkit.corpus.dedup.index import Index, run_key, settings_of
from llmkit.corpus.dedup.minhash import MinHash
from llmkit.errors import LlmkitError, LockedError


def text(seed: int, count: int = 120, changed: int = 0) -> str:
    random_ = random.Random(seed)
    words = ["".join(random_.choices("abcdefghij", k=6)) for _ in range(count)]
    return " ".join(words[: count - changed] + [f"{word}x" for word in words[count - changed :]])


def write(path: Path, rows: list[tuple[str, str]]) -> Path:
    path.write_bytes(b"".join(orjson.dumps({"id": name, "text": body}) + b"\n" for name, body in rows))
    return path


@pytest.fixture
def nights(tmp_path: Path) -> Path:
    """Three nights: fifty texts, some of them repeated exactly or nearly, and short ones."""
    write(tmp_path / "n1.jsonl", [(f"a{i}", text(i)) for i in range(50)] + [("short", "Hello, world")])
    again = [(f"b{i}", text(i, changed=i % 3)) for i in range(25, 75)]
    write(tmp_path / "n2.jsonl", [*again, ("short2", "hello world!"), ("short3", "other words")])
    write(tmp_path / "n3.jsonl", [(f"c{i}", text(i % 80)) for i in range(60, 140)] + [("short4", "other, words")])
    return tmp_path


@pytest.mark.parametrize("more", [(), ("--index-full", "--bits", "61"), ("--method", "exact,minhash", "-j", "2")])
def test_nights_equal_one_run(llmkit_here, nights: Path, more: tuple[str, ...]) -> None:
    """Parity with one run over all nights: the same documents are kept; an earlier night wins, and rejects name its document."""
    files = ["n1.jsonl", "n2.jsonl", "n3.jsonl"]
    for i, name in enumerate(files):
        done = llmkit_here(
            "dedup",
            name,
            "--index",
            "seen.duckdb",
            "-o",
            f"o{i}.jsonl.zst",
            "--rejects",
            f"r{i}.jsonl.zst",
            *more,
            cwd=nights,
        )
        assert done.returncode == 0, done.stderr
    assert (
        llmkit_here(
            "dedup", *files, "-o", "all.jsonl.zst", *(m for m in more if m != "--index-full"), cwd=nights
        ).returncode
        == 0
    )
    kept = [row["id"] for i in range(3) for row in rows_of(nights / f"o{i}.jsonl.zst")]
    assert kept == [row["id"] for row in rows_of(nights / "all.jsonl.zst")] and len(kept) == 82
    duplicate_of = {row["id"]: row["duplicate_of"] for i in range(3) for row in rows_of(nights / f"r{i}.jsonl.zst")}
    assert (duplicate_of["b30"], duplicate_of["c70"]) == ("a30", "b70") and "c79" not in duplicate_of
    assert (duplicate_of["short2"], duplicate_of["short4"]) == ("short", "short3")


def test_repeated_nights(llmkit_here, nights: Path) -> None:
    """Behaviour: a repeated night makes the same output, even after later nights, and is in the index once."""
    calls = [("dedup", f"n{i}.jsonl", "--index", "seen.duckdb", "-o", f"o{i}.jsonl.zst") for i in (1, 2, 3)]
    assert all(llmkit_here(*call, cwd=nights).returncode == 0 for call in calls)
    before = (nights / "o2.jsonl.zst").read_bytes()
    assert b"up to date" in llmkit_here(*calls[1], cwd=nights).stderr
    (nights / "o2.jsonl.zst").unlink()
    assert llmkit_here(*calls[1], cwd=nights).returncode == 0
    assert (nights / "o2.jsonl.zst").read_bytes() == before
    done = llmkit_here("dedup", "--index", "seen.duckdb", "--stats", "--json", "-q", cwd=nights)
    counts = orjson.loads(done.stderr.splitlines()[-1])
    assert [row["run"] for row in counts["runs"]] == [1, 2, 3] and counts["documents"] == 51 + 52 + 81
    assert counts["kept"] == 82 and (done.returncode, done.stdout) == (0, b"")
    assert llmkit_here("lineage", "--check", "o3.jsonl.zst", cwd=nights).returncode == 0


def test_dry_run_and_annotate(llmkit_here, nights: Path) -> None:
    """Behaviour: --dry-run adds nothing; --annotate drops nothing and adds only new documents."""
    assert llmkit_here("dedup", "n1.jsonl", "--index", "i.duckdb", "--dry-run", cwd=nights).returncode == 0
    assert not (nights / "i.duckdb").exists()
    for name in ("n1", "n2"):
        call = ("dedup", f"{name}.jsonl", "--index", "i.duckdb", "--annotate", "-o", f"{name}.jsonl.zst")
        assert llmkit_here(*call, cwd=nights).returncode == 0
    rows = rows_of(nights / "n2.jsonl.zst")
    assert len(rows) == 52 and [row.get("duplicate_of") for row in rows[:26]] == [
        *(f"a{i}" for i in range(25, 50)),
        None,
    ]
    with Index(str(nights / "i.duckdb"), None) as index:
        assert index.stats()["kept"] == 51 + 26


def test_errors(llmkit_here, nights: Path) -> None:
    """Behaviour: other parameters, other files, damaged and missing ones: one line, exit 1, nothing written."""
    call = ("dedup", "n1.jsonl", "--index", "seen.duckdb", "-o", "o.jsonl.zst")
    assert llmkit_here(*call, cwd=nights).returncode == 0
    for more, message in (
        (("--ngram", "4"), b"made with ngram 5, this call has 4"),
        (("--method", "exact"), b"made with minhash True, this call has False"),
        (("--index-full",), b"signature bits 8, this call has 32"),
        (("--seed", "1"), b"seed 0"),
    ):
        done = llmkit_here("dedup", "n2.jsonl", "--index", "seen.duckdb", "-o", "x.jsonl.zst", *more, cwd=nights)
        assert done.returncode == 1 and message in done.stderr, done.stderr
    (nights / "text.duckdb").write_text("no database")
    data = (nights / "seen.duckdb").read_bytes()
    (nights / "cut.duckdb").write_bytes(data[: len(data) // 3])
    (nights / "bits.duckdb").write_bytes(data[:4096] + bytes(b ^ 0x55 for b in data[4096:20000]) + data[20000:])
    for name in ("text", "cut", "bits"):
        done = llmkit_here("dedup", "n2.jsonl", "--index", f"{name}.duckdb", "-o", "x.jsonl.zst", cwd=nights)
        assert done.returncode == 1 and f"{name}.duckdb".encode() in done.stderr and b"internal" not in done.stderr
    done = llmkit_here("dedup", "n2.jsonl", "--index", "no/where.duckdb", "-o", "x.jsonl.zst", cwd=nights)
    assert done.returncode == 1 and b"not a directory" in done.stderr
    for arguments in (
        ["--stats"],
        ["n2.jsonl", "--index", "seen.duckdb", "--clusters", "components"],
        ["n2.jsonl", "--index", "seen.duckdb", "--no-verify"],
        ["n2.jsonl", "--index-full"],
        ["n2.jsonl", "--annotate", "--rejects", "r.jsonl"],
        ["n2.jsonl", "--method", "exact", "--threshold", "0.9"],
    ):
        assert llmkit_here("dedup", *arguments, cwd=nights).returncode == 2
    assert llmkit_here("dedup", "--index", "none.duckdb", "--stats", cwd=nights).returncode == 1
    assert not (nights / "x.jsonl.zst").exists() and not (nights / "none.duckdb").exists()


def test_outputs_of_other_calls(llmkit_here, nights: Path) -> None:
    """Behaviour: without the index, with another index or other options, an output is not up to date and is not replaced."""
    call = ("dedup", "n2.jsonl", "-o", "o.jsonl.zst", "--index")
    assert llmkit_here("dedup", "n1.jsonl", "--index", "a.duckdb", "-o", "first.jsonl.zst", cwd=nights).returncode == 0
    assert llmkit_here(*call, "a.duckdb", cwd=nights).returncode == 0
    (nights / "other").mkdir()
    for more in (
        call[:-1],
        (*call, "b.duckdb"),
        (*call, "other/a.duckdb"),
        (*call, "a.duckdb", "--threshold", "0.76", "--bands", "14", "--rows", "8"),
    ):
        done = llmkit_here(*more, cwd=nights)
        assert done.returncode == 1 and b"exists" in done.stderr, (more, done.stderr)
    assert b"up to date" in llmkit_here(*call, "a.duckdb", cwd=nights).stderr
    assert not (nights / "b.duckdb").exists()
    (nights / "o.jsonl.zst").unlink()  # as if killed when the rejects were in place and the output was not
    rejects = (*call, "a.duckdb", "--rejects", "r.jsonl.zst")
    assert llmkit_here(*rejects, cwd=nights).returncode == 0
    (nights / "o.jsonl.zst").unlink()
    assert llmkit_here(*rejects, cwd=nights).returncode == 0


def test_two_runs_at_once(llmkit, nights: Path) -> None:
    """Behaviour: the second exits with 75 while the first holds the index, and writes nothing."""
    settings = settings_of(MinHash(), None, False) | {"group": None}
    with Index(str(nights / "seen.duckdb"), settings):
        done = llmkit("dedup", "n1.jsonl", "--index", "seen.duckdb", "-o", "o.jsonl.zst", cwd=nights)
    assert done.returncode == 75 and b"in use by another run" in done.stderr, done.stderr
    assert not (nights / "o.jsonl.zst").exists() and issubclass(LockedError, LlmkitError)


def test_kill_at_any_moment(nights: Path) -> None:
    """Property: repeated after kill -9, a call gives the same outputs and index as without kills."""
    random_ = random.Random(4)
    seconds = 1.0
    for name, kills in (("whole", 0), ("killed", 4)):
        (nights / name).mkdir()
        for i in (1, 2):
            call = ("dedup", f"../n{i}.jsonl", "--index", "seen.duckdb", "-o", f"o{i}.jsonl.zst", "-q")
            command = [sys.executable, "-m", "llmkit", *call]
            for _ in range(kills if i == 2 else 0):
                process = subprocess.Popen(command, cwd=nights / name)
                time.sleep(random_.uniform(0.3, 1.1) * seconds)
                process.send_signal(signal.SIGKILL)
                process.wait()
            start = time.monotonic()
            assert subprocess.run(command, cwd=nights / name).returncode == 0
            seconds = time.monotonic() - start
    for i in (1, 2):
        assert (nights / "killed" / f"o{i}.jsonl.zst").read_bytes() == (
            nights / "whole" / f"o{i}.jsonl.zst"
        ).read_bytes()
    with (
        Index(str(nights / "whole/seen.duckdb"), None) as whole,
        Index(str(nights / "killed/seen.duckdb"), None) as killed,
    ):
        assert whole.stats()["runs"] == killed.stats()["runs"] and whole.history(9) == killed.history(9)


def test_killed_between_output_and_index(llmkit_here, nights: Path) -> None:
    """Behaviour: an output whose run is not in the index is unfinished: it is made again, identically, and added."""
    call = ("dedup", "n2.jsonl", "--index", "seen.duckdb", "-o", "o.jsonl.zst")
    assert (
        llmkit_here("dedup", "n1.jsonl", "--index", "seen.duckdb", "-o", "first.jsonl.zst", cwd=nights).returncode == 0
    )
    saved = (nights / "seen.duckdb").read_bytes()
    assert llmkit_here(*call, cwd=nights).returncode == 0
    output, after = (nights / "o.jsonl.zst").read_bytes(), Index(str(nights / "seen.duckdb"), None)
    with after:
        expected = after.stats()["runs"]
    (nights / "seen.duckdb").write_bytes(saved)
    done = llmkit_here(*call, cwd=nights)
    assert done.returncode == 0 and b"up to date" not in done.stderr
    assert (nights / "o.jsonl.zst").read_bytes() == output
    with Index(str(nights / "seen.duckdb"), None) as index:
        assert index.stats()["runs"] == expected


def test_estimates_and_crowded_bands(tmp_path: Path) -> None:
    """Property: estimated similarities are unbiased for both widths; in a band shared by all, few documents are compared."""
    random_ = np.random.default_rng(3)
    n, functions = 400, 112
    for full in (False, True):
        near = MinHash()
        width = np.uint32 if full else np.uint8
        limit = 2**32 if full else 256
        first = random_.integers(0, limit, (n, functions)).astype(width)
        second = np.where(
            random_.random((n, functions)) < 0.8, first, random_.integers(0, limit, (n, functions))
        ).astype(width)
        columns = {"same": np.arange(n).astype(np.uint64), "shingle_counts": np.ones(n, np.int64), "signature": first}
        columns |= {f"band{i}": np.arange(n).astype(np.uint64) + np.uint64(1000 * i) for i in range(14)}
        columns["band3"] = np.zeros(n, np.uint64)
        with Index(str(tmp_path / f"{full}.duckdb"), settings_of(near, None, full)) as index:
            index.begin()
            index.add(1, [f"d{i}" for i in range(n)], columns)
            index.commit(1, run_key(["x"], {}), n, n)
            new = columns | {"same": columns["same"] + np.uint64(n), "signature": second}
            rows, similarities, reasons = index.find(2, new, 0.5)
            assert rows.tolist() == list(range(n)) and set(reasons.tolist()) == {2}
            assert abs(similarities.mean() - 0.8) < 4 * (0.8 * 0.2 / functions / n) ** 0.5
            assert (index.find(1, new, 0.5)[0] == -1).all()  # the run itself and later ones do not match
            assert index.ids(np.array([3, 7])) == {3: "d3", 7: "d7"}


def test_exact_alone(llmkit_here, nights: Path) -> None:
    """Behaviour: an index of one field; documents without it are kept, every night."""
    rows = [{"text": "a", "url": "u"}, {"text": "b"}]
    for i in (1, 2):
        (nights / f"e{i}.jsonl").write_bytes(b"".join(orjson.dumps(row | {"n": i}) + b"\n" for row in rows))
        call = (
            "dedup",
            f"e{i}.jsonl",
            "--method",
            "exact",
            "--key",
            "url",
            "--index",
            "e.duckdb",
            "-o",
            f"e{i}.jsonl.zst",
        )
        assert llmkit_here(*call, cwd=nights).returncode == 0
    assert [row["text"] for row in rows_of(nights / "e2.jsonl.zst")] == ["b"]
    with pytest.raises(LlmkitError, match="normalise none, this call has loose"):
        Index(str(nights / "e.duckdb"), settings_of(None, Exact("url", "loose"), False) | {"group": None})


def test_an_index_that_cannot_be_written_is_removed(tmp_path: Path) -> None:
    """Behaviour: on a full disk (a limit of 8 blocks a file) no stub remains that a later run could not read."""
    (tmp_path / "d.jsonl").write_bytes(b'{"text": "some words"}\n')
    call = f"{sys.executable} -m llmkit dedup d.jsonl --index new.duckdb -o out.jsonl.zst"
    full = subprocess.run(["bash", "-c", f"ulimit -f 8; {call}"], cwd=tmp_path, capture_output=True, text=True)
    assert full.returncode == 1 and "error: new.duckdb cannot be made" in full.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["d.jsonl"]


@pytest.mark.parametrize("kilobytes", [64, 320, 700, 900, 4000])
def test_a_full_disk_leaves_no_log_in_silence(tmp_path: Path, kilobytes: int) -> None:
    """Behaviour: whether the log or the index outgrows the disk (a limit on the size of files), a run is in the index or
    not as it was reported; an empty log is removed, and one that holds a part of the index is named, and merged later."""
    path, settings, (_, hard) = str(tmp_path / "i.duckdb"), settings_of(None, Exact(), False), getrlimit(RLIMIT_FSIZE)

    def add(run: int, count: int) -> Index:
        hashes = np.random.default_rng(run).integers(1 << 63, size=count).astype(np.uint64)
        with Index(path, settings) as index:
            index.begin()
            index.add(run, [f"{hash:x}" for hash in hashes], {"exact": hashes, "keyed": np.ones(count, bool)})
            index.commit(run, f"key {run}", count, count)
        return index

    assert not add(1, 100).log and not (tmp_path / "i.duckdb.wal").exists()
    kept = 100
    setrlimit(RLIMIT_FSIZE, (kilobytes << 10, hard))
    try:
        log = add(2, 20_000).log
        kept += 20_000
    except LlmkitError as error:
        assert "nothing of this run is in the index" in error.hint
        log = ""
    finally:
        setrlimit(RLIMIT_FSIZE, (hard, hard))
    assert (tmp_path / "i.duckdb.wal").exists() == bool(log)
    with Index(path, None) as index:
        assert index.stats()["kept"] == kept
    assert [item.name for item in tmp_path.iterdir()] == ["i.duckdb"]


def test_a_batch_given_twice(llmkit_here, tmp_path: Path) -> None:
    """Behaviour: the same content under another name gives only duplicates, also within one call; the same call again
    makes its output again, and both say so. The digest of an index does not depend on it before."""
    for name in ("a", "b", "sub/a"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / f"{name}.jsonl", [(f"d{i}", text(i)) for i in range(5)])

    def dedup(name: str, output: str) -> tuple[int, bytes]:
        done = llmkit_here("dedup", name, "--index", "seen.duckdb", "-q", "-o", output, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return len(rows_of(tmp_path / output)), done.stderr

    assert dedup("a.jsonl", "1.jsonl.zst") == (5, b"")
    kept, warning = dedup("b.jsonl", "2.jsonl.zst")
    assert kept == 0 and b"run 1 of seen.duckdb read the same content under the name a.jsonl" in warning
    kept, warning = dedup("sub/a.jsonl", "3.jsonl.zst")
    assert kept == 5 and b"run 1 of seen.duckdb read the same input: this makes its output again" in warning
    kept, warning = dedup("b.jsonl", "4.jsonl.zst")
    assert kept == 0 and b"run 2 of seen.duckdb read the same input" in warning
    assert (tmp_path / "4.jsonl.zst").read_bytes() == (tmp_path / "2.jsonl.zst").read_bytes()
    for call in range(2):  # each is found up to date by the second
        done = llmkit_here(
            "dedup", "a.jsonl", "b.jsonl", "--index", "new.duckdb", "--resume", "-o", "out/", cwd=tmp_path
        )
        assert done.returncode == 0 and (b"up to date: nothing to do" in done.stderr) == bool(call)
    assert [len(rows_of(tmp_path / "out" / f"{name}.jsonl.zst")) for name in "ab"] == [5, 0]
