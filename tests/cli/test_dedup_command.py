"""`llmkit dedup` on the real command line."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import orjson
import pytest

from llmkit.lineage.formats import read_lineage


def text(seed: int, count: int = 120) -> str:
    random_ = random.Random(seed)
    return " ".join("".join(random_.choices("abcdefghij", k=6)) for _ in range(count))


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    rows = [{"id": f"d{i}", "text": text(i), "url": f"http://site/{i % 15}"} for i in range(20)]
    rows += [{"id": f"copy{i}", "text": text(i)} for i in range(5)]
    rows += [{"id": f"near{i}", "text": text(i).upper() + " and so on"} for i in range(5, 10)]
    (tmp_path / "docs.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    return tmp_path


def rows_of(data: bytes) -> list[dict[str, object]]:
    return [orjson.loads(line) for line in data.splitlines()]


def test_minhash_is_the_default(llmkit, docs: Path) -> None:
    """Behaviour: copies and near copies are removed, each with the id of its kept document and the true similarity; other
    documents are unchanged."""
    done = llmkit("dedup", "docs.jsonl", "-o", "out.jsonl", "--no-counts", "--rejects", "r.jsonl", "--json", cwd=docs)
    assert done.returncode == 0, done.stderr
    lines = (docs / "docs.jsonl").read_bytes().splitlines(keepends=True)
    assert (docs / "out.jsonl").read_bytes() == b"".join(lines[:20])
    rejects = rows_of((docs / "r.jsonl").read_bytes())
    assert [(row["id"], row["duplicate_of"]) for row in rejects] == [
        *((f"copy{i}", f"d{i}") for i in range(5)),
        *((f"near{i}", f"d{i}") for i in range(5, 10)),
    ]
    # 116 five-grams each, and three more with the words added
    assert [row["similarity"] for row in rejects] == [1.0] * 5 + [116 / 119] * 5
    counts = json.loads(done.stderr.splitlines()[-1])
    assert (counts["documents"], counts["kept"], counts["dropped"]) == (30, 20, 10)
    assert counts["reasons"] == {"minhash": 10}


def test_counts_annotate_and_against(llmkit, docs: Path) -> None:
    """Behaviour: survivors carry the size of their cluster, other documents keep their bytes; --annotate keeps everything;
    duplicates of --against are removed."""
    assert llmkit("dedup", "docs.jsonl", "-o", "out.jsonl", cwd=docs).returncode == 0
    lines = (docs / "docs.jsonl").read_bytes().splitlines()
    kept = (docs / "out.jsonl").read_bytes().splitlines()
    assert kept[10:] == lines[10:20] and [orjson.loads(line)["duplicates"] for line in kept[:10]] == [2] * 10
    done = llmkit("dedup", "docs.jsonl", "--annotate", "--plain", cwd=docs)
    rows = rows_of(done.stdout)
    assert len(rows) == 30 and sum("duplicate_of" in row for row in rows) == 10 and b"removed 0" in done.stderr
    done = llmkit("dedup", "docs.jsonl", "--against", "out.jsonl", "--plain", "--rejects", "r.jsonl", cwd=docs)
    assert (done.returncode, done.stdout) == (0, b""), done.stderr
    assert {row["duplicate_of"] for row in rows_of((docs / "r.jsonl").read_bytes())} == {f"d{i}" for i in range(20)}
    done = llmkit("dedup", "docs.jsonl", "--against", "nowhere.jsonl", "-o", "x.jsonl", cwd=docs)
    assert done.returncode == 1 and b"nowhere.jsonl" in done.stderr
    done = llmkit("dedup", "docs.jsonl", "--keep", "best:score", "-o", "x.jsonl", cwd=docs)
    assert done.returncode == 1 and b"docs.jsonl:1: --keep best:score: no such field" in done.stderr
    assert not (docs / "x.jsonl").exists()


def test_exact_and_keys(llmkit, docs: Path) -> None:
    """Behaviour: exact removes only copies; --key compares another field; both methods combine."""

    def kept(*arguments: str) -> int:
        done = llmkit("dedup", "docs.jsonl", "--plain", "-q", *arguments, cwd=docs)
        assert done.returncode == 0, done.stderr
        return len(done.stdout.splitlines())

    assert kept("--method", "exact") == kept("--method", "exact", "--no-counts") == 25
    assert kept("--method", "exact", "--key", "url") == 15 + 10
    assert kept("--method", "exact,minhash", "--key", "url") == 15
    assert kept("--method", "minhash", "--threshold", "0.99") == 25
    assert kept("--method", "minhash", "--threshold", "0.99", "--no-verify", "--bands", "14", "--rows", "8") == 20


def test_lines_and_paragraphs(llmkit_here, docs: Path) -> None:
    """Behaviour: repeats are cut out of texts, emptied documents are rejected, a list is an input of the lineage; the
    summary reports the share that was cut."""
    rows = [{"id": str(i), "text": f"Menu\nShare this\n\n{text(i)}\n\nShare this"} for i in range(4)]
    rows.append({"id": "empty", "text": "Menu\nShare this\n\nShare this"})
    (docs / "pages.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    (docs / "list.txt").write_text("share  this\n")

    def texts(*arguments: str) -> list[object]:
        """The kept texts and the ids of the rejects."""
        files = ("-f", "-o", "out.jsonl", "--rejects", "r.jsonl")
        done = llmkit_here("dedup", "pages.jsonl", *files, *arguments, cwd=docs)
        assert done.returncode == 0 and b"% of the characters" in done.stderr, done.stderr
        rejects = rows_of((docs / "r.jsonl").read_bytes())
        assert {row["reason"] for row in rejects} <= {arguments[1]}
        return [row["text"] for row in rows_of((docs / "out.jsonl").read_bytes())] + [row["id"] for row in rejects]

    menu = "Menu\nShare this"
    assert texts("--method", "lines") == [f"{menu}\n\n{text(0)}\n", *(f"\n{text(i)}\n" for i in range(1, 4)), "empty"]
    first = f"{menu}\n\n{text(0)}\n\nShare this"
    assert texts("--method", "paragraphs") == [first, *(text(i) for i in range(1, 4)), "empty"]
    frequent = ("--repeated", "5", "--min-characters", "5")
    assert texts("--method", "lines", *frequent) == [*(f"Menu\n\n{text(i)}\n" for i in range(4)), "Menu\n"]
    listed = ("--boilerplate", "list.txt", "--normalise", "loose", "--repeated", "100")
    done = llmkit_here("dedup", "pages.jsonl", "--method", "lines", *listed, "-o", "listed.jsonl.zst", cwd=docs)
    assert done.returncode == 0 and b"kept 5 of 5" in done.stderr and b"edited 5" in done.stderr
    record = read_lineage(docs / "listed.jsonl.zst")
    assert record is not None and record["counts"]["characters_cut"] > 0 and "list.txt" in str(record["inputs"])


def test_substring(llmkit_here, docs: Path) -> None:
    """Behaviour: the later copy of a repeat of 50 words is cut, at any position; --length and --unit; the same for -j 2."""
    long, short = text(90, 60), text(91, 20)
    rows = [{"id": str(i), "text": f"{text(i)} {long} {text(i + 50)}\n{short}"} for i in range(3)]
    (docs / "pages.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in [*rows, {"text": long}]))

    def texts(*arguments: str) -> list[object]:
        done = llmkit_here("dedup", "pages.jsonl", "--method", "substring", "--plain", *arguments, cwd=docs)
        assert done.returncode == 0 and b"removed 1;" in done.stderr, done.stderr
        return [row["text"] for row in rows_of(done.stdout)]

    without = [f"{text(i)} {text(i + 50)}" for i in (1, 2)]
    assert (
        texts()
        == texts("-j", "2", "--memory", "1k")
        == [rows[0]["text"], *(f"{remainder}\n{short}" for remainder in without)]
    )
    assert texts("--length", "20") == [rows[0]["text"], *without]
    assert texts("--length", "300", "--unit", "bytes")[1] == f"{text(1)}{text(51)}\n{short}"


def test_one_output_per_file(llmkit_here, docs: Path) -> None:
    """Behaviour: with a directory as output, each input is deduplicated and counted separately."""
    (docs / "other.jsonl").write_bytes((docs / "docs.jsonl").read_bytes())
    for method in ("exact", "minhash", "lines", "substring"):
        call = ("dedup", "docs.jsonl", "other.jsonl", "--method", method, "-o", f"{method}/")
        done = llmkit_here(*call, "--json", cwd=docs)
        assert done.returncode == 0 and json.loads(done.stderr.splitlines()[-1])["documents"] == 60
        record = read_lineage(docs / method / "other.jsonl.zst")
        assert record is not None and record["counts"]["documents"] == 30


def test_a_directory_at_a_url(llmkit_here, docs: Path) -> None:
    """Behaviour: inputs and outputs may be URLs, also of directories and patterns; --resume makes only missing files."""
    (docs / "in").mkdir()
    for name in "ab":
        (docs / "in" / f"{name}.jsonl").write_bytes((docs / "docs.jsonl").read_bytes())
    call = ("dedup", f"local://{docs}/in/", "-o", f"local://{docs}/out/", "--rejects", f"local://{docs}/gone/")
    done = llmkit_here(*call)
    assert done.returncode == 0 and b"each file is deduplicated separately" in done.stderr
    made = {path.name: path.read_bytes() for path in sorted(docs.glob("*/*.zst"))}
    assert len(list(docs.glob("out/*.zst"))) == len(list(docs.glob("gone/*.zst"))) == 2
    assert b"up to date" in llmkit_here(*call).stderr
    (docs / "out" / "b.jsonl.zst").unlink()
    assert b"1 file up to date" in llmkit_here(*call, "--resume").stderr
    assert made == {path.name: path.read_bytes() for path in sorted(docs.glob("*/*.zst"))}
    done = llmkit_here(
        "dedup", f"local://{docs}/in/[ab].jsonl", "--method", "exact", "-o", "one.jsonl", "--json", cwd=docs
    )
    assert json.loads(done.stderr.splitlines()[-1])["kept"] == 25
    assert (
        b"no input files there" in llmkit_here("dedup", f"local://{docs}/in/*.none", "-o", "x.jsonl", cwd=docs).stderr
    )


def test_no_space_for_temporary_files(docs: Path) -> None:
    """Behaviour: the error names the directory; there is no output, and no temporary file remains."""
    (docs / "more.jsonl").write_bytes(b"".join(orjson.dumps({"text": text(i)}) + b"\n" for i in range(1000)))
    (docs / "spill").mkdir()
    call = f"ulimit -f 64; exec {sys.executable} -m llmkit dedup more.jsonl --temp-dir spill -o out.jsonl"
    done = subprocess.run(["bash", "-c", call], cwd=docs, capture_output=True)
    assert done.returncode == 1 and b"error: spill: File too large" in done.stderr, done.stderr
    assert not list((docs / "spill").iterdir()) and not list(docs.glob("*out.jsonl*"))


def test_a_field_that_no_document_has(llmkit_here, docs: Path) -> None:
    """Behaviour: a misspelt field gives a warning."""
    for more in (
        ("--group", "sit"),
        ("--method", "exact", "--key", "ur"),
        ("--method", "exact", "--key", "ur", "--no-counts"),
    ):
        done = llmkit_here("dedup", "docs.jsonl", "-o", "x.jsonl", "-f", "-q", *more, cwd=docs)
        assert done.returncode == 0 and b"no document has this field" in done.stderr, more
    assert llmkit_here("dedup", "docs.jsonl", "-o", "x.jsonl", "-f", "-q", "--group", "url", cwd=docs).stderr == b""


def test_output_does_not_depend_on_jobs(llmkit, docs: Path) -> None:
    """Property: the same bytes for -j 1 and -j 2, also of the rejects, over several chunks."""
    rows = [{"id": str(i), "text": text(i % 1900, 150) + f" {'tail ' * (i % 3)}"} for i in range(2500)]
    (docs / "many.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    assert (docs / "many.jsonl").stat().st_size > 2 << 20
    for jobs in "12":
        done = llmkit(
            "dedup", "many.jsonl", "-j", jobs, "-o", f"o{jobs}.jsonl.zst", "--rejects", f"r{jobs}.jsonl.zst", cwd=docs
        )
        assert done.returncode == 0 and b"removed 600" in done.stderr, done.stderr
    for kind in "or":
        assert (docs / f"{kind}1.jsonl.zst").read_bytes() == (docs / f"{kind}2.jsonl.zst").read_bytes()


def test_seed_is_recorded_and_changes_only_the_hash_functions(llmkit, docs: Path) -> None:
    """Behaviour: the lineage records seed and parameters, but not the temporary directory."""
    (docs / "scratch").mkdir()
    done = llmkit("dedup", "docs.jsonl", "--seed", "7", "--temp-dir", "scratch", "-o", "out.jsonl.zst", cwd=docs)
    assert done.returncode == 0
    record = read_lineage(docs / "out.jsonl.zst")
    assert record is not None and record["options"]["seed"] == 7 and record["options"]["threshold"] == 0.75
    assert "temp_dir" not in record["options"] and record["counts"]["kept"] == 20
    assert list((docs / "scratch").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "minhsh"], "minhash"),
        (["--method", "exact,minhsh"], "minhash"),
        (["--method", "exact", "--normalise", "lose"], "loose"),
        (["--key", "url"], "exact,minhash"),
        (["--threshold", "1.5"], "similarity"),
        (["--rows", "0"], "rows"),
        (["--bits", "16"], "32, 61"),
        (["--keep", "last"], "longest"),
        (["--clusters", "cliques"], "components"),
        (["--method", "lines,exact"], "--method lines | llmkit dedup"),
        (["--method", "lines", "--annotate"], "exact, minhash"),
        (["--method", "lines", "--key", "url"], "--method exact"),
        (["--method", "lines", "--repeated", "1"], "2 or more"),
        (["--method", "paragraphs", "--normalise", "lose"], "loose"),
        (["--boilerplate", "docs.jsonl"], "lines"),
        (["--method", "exact,substring"], "--method substring | llmkit dedup"),
        (["--method", "substring", "--repeated", "3"], "lines, paragraphs"),
        (["--method", "substring", "--unit", "tokens"], "words, bytes"),
        (["--length", "20"], "--method substring"),
    ],
)
def test_usage_errors(llmkit_here, docs: Path, arguments: list[str], message: str) -> None:
    """Behaviour: exit 2 and a hint, before any output."""
    done = llmkit_here("dedup", "docs.jsonl", "-o", "out.jsonl", *arguments, cwd=docs)
    assert done.returncode == 2 and message in done.stderr.decode()
    assert [path.name for path in docs.iterdir()] == ["docs.jsonl"]


def test_empty_and_wordless_input(llmkit, docs: Path) -> None:
    """Behaviour: empty input and documents without words are processed."""
    (docs / "empty.jsonl").write_bytes(b"")
    assert llmkit("dedup", "empty.jsonl", "--plain", cwd=docs).stdout == b""
    (docs / "odd.jsonl").write_bytes(
        b"".join(orjson.dumps({"text": t}) + b"\n" for t in ("", "...", "one two", "...", "One, two!"))
    )
    done = llmkit("dedup", "odd.jsonl", "--plain", cwd=docs)
    assert [row["text"] for row in rows_of(done.stdout)] == ["", "...", "one two"]


def test_missing_temporary_directory(llmkit, docs: Path) -> None:
    """Behaviour: named, exit 1, no output."""
    done = llmkit("dedup", "docs.jsonl", "--temp-dir", "nowhere", "-o", "out.jsonl", cwd=docs)
    assert done.returncode == 1 and b"nowhere" in done.stderr and b"Traceback" not in done.stderr
    assert not (docs / "out.jsonl").exists()
