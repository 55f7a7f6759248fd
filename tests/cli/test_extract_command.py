"""`llmkit extract`."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
from pathlib import Path

import pytest

from llmkit.lineage.formats import read_lineage

STORY = "The quick brown fox jumps over the lazy dog, and then it sleeps in the warm sun until the evening comes. " * 3


@pytest.fixture
def crawl(tmp_path: Path) -> Path:
    """crawl/ with an archive of 40 pages, two of them errors and one broken, and a page as a file."""
    (tmp_path / "crawl").mkdir()
    records = []
    for i in range(40):
        status = "404 Not Found" if i in (3, 4) else "200 OK"
        body = f"HTTP/1.1 {status}\r\nContent-Type: text/html\r\n\r\n<title>Page {i}</title><p>{STORY}{i}</p>".encode()
        head = f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: http://a.example/{i}\r\nWARC-Date: 2024-05-18T01:58:10Z\r\nWARC-Record-ID: <urn:uuid:{i}>\r\n"
        head += f"Content-Type: application/http; msgtype=response\r\nContent-Length: {len(body)}\r\n\r\n"
        records.append(gzip.compress(head.encode() + body + b"\r\n\r\n"))
    records[20] = records[20][:50] + b"\xff" * 20 + records[20][70:]
    (tmp_path / "crawl" / "a.warc.gz").write_bytes(b"".join(records))
    (tmp_path / "crawl" / "b.html").write_text(f"<title>File</title><p>{STORY}</p>")
    return tmp_path


def test_archives_to_documents(llmkit, crawl: Path) -> None:
    """Behaviour: a directory of archives and pages; the same bytes for any -j; rejects, counts and lineage; repeated, nothing to do."""
    call = ("extract", "crawl", "--rejects", "r.jsonl.zst")
    first = llmkit(*call, "-o", "a.jsonl.zst", "--json", cwd=crawl)
    assert first.returncode == 0, first.stderr.decode()
    summary = json.loads(first.stderr.splitlines()[-1])
    assert (summary["documents"], summary["skipped"]) == (38, {"http status": 2}) and summary["broken"] >= 1
    assert b"a.warc.gz: offset " in first.stderr and b"Traceback" not in first.stderr
    assert b"nothing to do" in llmkit(*call, "-o", "a.jsonl.zst", cwd=crawl).stderr
    again = llmkit("extract", "crawl", "-j", "2", "-o", "b.jsonl.zst", cwd=crawl)
    assert again.returncode == 0 and (crawl / "a.jsonl.zst").read_bytes() == (crawl / "b.jsonl.zst").read_bytes()
    record = read_lineage(crawl / "a.jsonl.zst")
    assert record is not None and [item["name"] for item in record["inputs"]] == ["a.warc.gz", "b.html"]
    assert {"engine", "time_limit"} <= record["options"].keys() and "rejects" not in record["options"]


def test_streams_and_rows(llmkit, crawl: Path) -> None:
    """Behaviour: an archive on stdin gives what it gives by name; HTML in a field of rows keeps the other fields; pipes into filter."""
    named = llmkit("extract", "crawl/b.html", "--plain", cwd=crawl)
    piped = llmkit("extract", "--plain", stdin=(crawl / "crawl" / "b.html").read_bytes(), cwd=crawl)
    texts = [json.loads(done.stdout)["text"] for done in (named, piped)]
    assert texts[0] == texts[1] == STORY.strip()
    (crawl / "rows.jsonl").write_text(json.dumps({"id": "x", "html": f"<p>{STORY}", "topic": "fox", "url": "u"}) + "\n")
    row = json.loads(llmkit("extract", "rows.jsonl", "--plain", cwd=crawl).stdout)
    assert row == {"id": "x", "text": STORY.strip(), "content_type": "text/html", "topic": "fox", "url": "u"}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("nowhere.warc.gz",), 1, "no such file"),
        (("crawl", "--engine", "resiliparsec"), 2, "did you mean 'resiliparse'"),
        (("crawl", "--time-limit", "0"), 2, "--time-limit"),
        (("crawl", "--text-key", "html"), 2, "--html-key"),
        (("empty",), 1, "no input files"),
        (("crawl", "-o", "x.jsonl", "--rejects", "x.jsonl"), 2, "output of the documents"),
        (("bad.jsonl",), 1, "bad.jsonl:1"),
    ],
)
def test_bad_calls(llmkit_here, crawl: Path, arguments: tuple[str, ...], code: int, message: str) -> None:
    """Behaviour: one line that names what is wrong, and nothing left behind."""
    (crawl / "empty").mkdir()
    (crawl / "bad.jsonl").write_text("not json\n")
    done = llmkit_here("extract", *arguments, *(() if "-o" in arguments else ("-o", "out.jsonl")), cwd=crawl)
    assert done.returncode == code and message in done.stderr.decode(), done.stderr.decode()
    assert not (crawl / "out.jsonl").exists()


def test_archives_without_pages(llmkit_here, crawl: Path) -> None:
    """Behaviour: exit code 1 and no output, unless --allow-empty; pages that rules skip are not nothing."""
    head = "WARC/1.0\r\nWARC-Type: {}\r\nWARC-Target-URI: http://a.example/\r\nContent-Type: application/http\r\nContent-Length: {}\r\n\r\n"
    missing = b"HTTP/1.1 404 Not Found\r\n\r\n"
    for name, content in {
        "request.warc": head.format("request", 5).encode() + b"GET /\r\n\r\n",
        "empty.warc": b"",
        "junk.warc": b"\x01junk" * 99,
        "cut.warc": head.format("response", 500).encode() + b"HTTP/1.1 200 OK\r\n",
        "missing.warc": head.format("response", len(missing)).encode() + missing + b"\r\n\r\n",
    }.items():
        (crawl / name).write_bytes(content)
        done = llmkit_here("extract", name, "-o", "out.jsonl", cwd=crawl)
        assert done.returncode == (name != "missing.warc"), (name, done.stderr.decode())
        assert (crawl / "out.jsonl").exists() == (name == "missing.warc")
        (crawl / "out.jsonl").unlink(missing_ok=True)
        assert name == "missing.warc" or (name.encode() in done.stderr and b"--allow-empty" in done.stderr)
    assert llmkit_here("extract", "request.warc", "--allow-empty", "-o", "out.jsonl", cwd=crawl).returncode == 0


def test_skipped_bytes_are_counted(llmkit_here, crawl: Path) -> None:
    """Behaviour: one line for each fault, and totals of records and bytes in the summary and the lineage; a pipe too."""
    for arguments, stdin in ((("crawl/a.warc.gz",), b""), ((), (crawl / "crawl" / "a.warc.gz").read_bytes())):
        done = llmkit_here("extract", *arguments, "-f", "-o", "a.jsonl.zst", "--json", stdin=stdin, cwd=crawl)
        summary = json.loads(done.stderr.splitlines()[-1])
        assert done.returncode == 0 and (summary["broken"], summary["documents"]) == (1, 37)
        assert f"({summary['broken_bytes']} bytes skipped)".encode() in done.stderr
        record = read_lineage(crawl / "a.jsonl.zst")
        assert record is not None and record["counts"]["broken_bytes"] == summary["broken_bytes"] > 0


@pytest.mark.parametrize("command", ["filter", "dedup"])
def test_an_archive_is_not_documents(llmkit_here, crawl: Path, command: str) -> None:
    """Behaviour: the other commands name an archive and the command that reads it."""
    done = llmkit_here(command, "crawl/a.warc.gz", "-o", "x.jsonl", cwd=crawl)
    assert done.returncode == 1 and b"web archive" in done.stderr and b"llmkit extract" in done.stderr


def test_a_file_for_each_input(llmkit, crawl: Path) -> None:
    """Behaviour: -o DIR/ with --resume makes what is missing only, and counts all of it."""
    command = ("extract", "crawl", "-o", "pages/", "--rejects", "none/", "--json")
    first = llmkit(*command, cwd=crawl)
    assert first.returncode == 0, first.stderr.decode()
    counts = json.loads(first.stderr.splitlines()[-1])
    assert (counts["files"], counts["documents"], counts["skipped"]) == (2, 38, {"http status": 2})
    whole = (crawl / "pages" / "a.jsonl.zst").read_bytes()
    (crawl / "pages" / "a.jsonl.zst").unlink()
    (crawl / "none" / "a.jsonl.zst").unlink()
    assert llmkit(*command, cwd=crawl).returncode == 1
    again = json.loads(llmkit(*command, "--resume", cwd=crawl).stderr.splitlines()[-1])
    assert (again["files"], again["up_to_date"], again["documents"]) == (1, 1, 37)
    assert (crawl / "pages" / "a.jsonl.zst").read_bytes() == whole


def test_ids_of_files_of_one_name(llmkit, tmp_path: Path) -> None:
    """Behaviour: files of one name get ids of their own, which depend on their order and not on their directories: laid
    out as the script of the lineage demands, they give the same bytes. The first keeps its id."""
    for place in ("a", "b", "c/d"):
        (tmp_path / "p" / place).mkdir(parents=True)
        (tmp_path / "p" / place / "x.html").write_text(f"<p>{STORY}{place}</p>")
    (tmp_path / "p" / "c" / "y.html").write_text(f"<p>{STORY}</p>")
    assert llmkit("extract", "p", "-o", "o.jsonl.zst", cwd=tmp_path).returncode == 0
    lines = llmkit("dedup", "o.jsonl.zst", "--method", "exact", "--plain", cwd=tmp_path).stdout.splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["x.html", "2/x.html", "3/x.html", "y.html"]
    for source, target in (("a", "in"), ("b", "in/2"), ("c/d", "in/3")):
        (tmp_path / target).mkdir(exist_ok=True)
        (tmp_path / "p" / source / "x.html").rename(tmp_path / target / "x.html")
    (tmp_path / "p" / "c" / "y.html").rename(tmp_path / "in" / "y.html")
    files = ["in/x.html", "in/2/x.html", "in/3/x.html", "in/y.html"]
    assert llmkit("extract", *files, "-o", "o2.jsonl.zst", cwd=tmp_path).returncode == 0
    assert (tmp_path / "o.jsonl.zst").read_bytes() == (tmp_path / "o2.jsonl.zst").read_bytes()


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".xz", ".bz2"])
@pytest.mark.parametrize("command", ["extract", "filter"])
def test_an_empty_compressed_file_is_damage(llmkit_here, crawl: Path, command: str, suffix: str) -> None:
    """Behaviour: zero bytes are no gzip, zstd, xz or bzip2 file: an error that names it, or a bad file."""
    (crawl / f"cut.jsonl{suffix}").write_bytes(b"")
    (crawl / "rows.jsonl").write_text(json.dumps({"text": STORY, "html": f"<p>{STORY}"}) + "\n")
    call = (command, f"cut.jsonl{suffix}", "rows.jsonl", "-o", "o.jsonl")
    done = llmkit_here(*call, cwd=crawl)
    assert done.returncode == 1 and f"cut.jsonl{suffix}: truncated".encode() in done.stderr
    done = llmkit_here(*call, "--on-bad-file", "skip", cwd=crawl)
    assert done.returncode == 0 and b"1 bad file skipped" in done.stderr
    (crawl / "empty.jsonl").write_bytes(b"")
    assert llmkit_here(command, "empty.jsonl", "-o", "p.jsonl", cwd=crawl).returncode == 0


@pytest.mark.parametrize("command", ["extract", "filter"])
def test_a_directory_without_inputs_is_a_bad_file(llmkit_here, crawl: Path, command: str) -> None:
    """Behaviour: with --on-bad-file an empty directory, and a pattern without a match, are named and counted."""
    (crawl / "empty").mkdir()
    (crawl / "rows.jsonl").write_text(json.dumps({"text": STORY, "html": f"<p>{STORY}"}) + "\n")
    call = (command, "empty", "no*.jsonl", "rows.jsonl", "-o", "o.jsonl.zst", "--json")
    assert llmkit_here(*call, cwd=crawl).returncode == 1
    for _ in range(2):  # made, then up to date
        done = llmkit_here(*call, "--on-bad-file", "quarantine=q.jsonl", cwd=crawl)
        assert done.returncode == 0 and b"warning: empty: no input files in this directory" in done.stderr
        summary = json.loads(done.stderr.splitlines()[-1])
        assert (summary["bad_files"], summary["documents"]) == (2, 1) and b"any more" not in done.stderr
    assert llmkit_here(command, "empty", "--on-bad-file", "skip", "-o", "p.jsonl", cwd=crawl).returncode == 1


@pytest.mark.parametrize("option", ["--on-bad-line", "--on-bad-file"])
@pytest.mark.parametrize("command", ["extract", "filter"])
def test_a_quarantine_has_a_file_of_its_own(llmkit_here, crawl: Path, command: str, option: str) -> None:
    """Behaviour: a quarantine that is the output, the rejects, the summary or an input is a usage error, before work."""
    (crawl / "rows.jsonl").write_text(json.dumps({"text": STORY, "html": f"<p>{STORY}"}) + "\n")
    before = sorted(crawl.iterdir())
    for more in (("-o", "q.jsonl"), ("-o", "o.jsonl", "--rejects", "./q.jsonl"), ("--summary", "q.jsonl")):
        done = llmkit_here(command, "rows.jsonl", option, "quarantine=q.jsonl", *more, cwd=crawl)
        assert done.returncode == 2 and b"quarantine=q.jsonl" in done.stderr, done.stderr
    done = llmkit_here(command, "rows.jsonl", option, "quarantine=rows.jsonl", "-f", "-o", "o.jsonl", cwd=crawl)
    assert done.returncode == 2 and b"the input rows.jsonl" in done.stderr
    done = llmkit_here(command, "rows.jsonl", option, "quarantine=out/rows.jsonl.zst", "-o", "out/", cwd=crawl)
    assert done.returncode == 2 and sorted(crawl.iterdir()) == before


@pytest.mark.parametrize("command", ["extract", "filter"])
def test_a_quarantine_that_is_gone(llmkit_here, crawl: Path, command: str) -> None:
    """Behaviour: a repeated command does nothing, and says so if the quarantine it wrote does not exist any more."""
    (crawl / "rows.jsonl").write_text(json.dumps({"text": STORY, "html": f"<p>{STORY}"}) + "\nnot JSON\n")
    call = (command, "rows.jsonl", "--on-bad-line", "quarantine=q.jsonl", "-o", "o.jsonl.zst")
    done = llmkit_here(*call, cwd=crawl)
    assert done.returncode == 0 and b"1 bad line skipped" in done.stderr and b"1 document" in done.stderr
    assert b"any more" not in llmkit_here(*call, cwd=crawl).stderr
    (crawl / "q.jsonl").unlink()
    done = llmkit_here(*call, cwd=crawl)
    assert done.returncode == 0 and b"q.jsonl does not exist any more" in done.stderr and b"up to date" in done.stderr


def test_all_texts_of_a_directory(llmkit_here, crawl: Path) -> None:
    """Behaviour: a directory gives what its files give by name; those that are not read are counted by suffix."""
    for name in ("a.txt", "b.md", "c.txt.gz"):
        text = f"{name}:\n{STORY}\n".encode()
        (crawl / "crawl" / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    for name in ("a.zip", "b.zip", "LICENSE", "c.tar.gz"):
        (crawl / "crawl" / name).write_bytes(b"PK\x03\x04")
    done = llmkit_here("extract", "crawl", "-o", "o.jsonl", cwd=crawl)
    assert done.returncode == 0
    assert b"4 files in the directories not read: 2 .zip, 1 without a suffix, 1 .tar.gz\n" in done.stderr
    ids = [json.loads(line)["id"] for line in (crawl / "o.jsonl").read_text().splitlines()]
    assert {"a.txt", "b.md", "c.txt.gz", "b.html"} <= set(ids)


def test_ids_of_rows_keep_their_type(llmkit_here, crawl: Path) -> None:
    """Behaviour: an id that is a number stays that number to the digit, in documents and rejects."""
    ids = ["7", "1.10", "123456789012345678901234567890", '"x"', "null"]
    rows = [f'{{"id": {value}, "html": "<p>{STORY}"}}\n' for value in ids]
    (crawl / "rows.jsonl").write_text("".join(rows) + '{"id": 8, "html": ""}\n')
    call = ("extract", "rows.jsonl", "--rejects", "r.jsonl", "-o", "o.jsonl")
    assert llmkit_here(*call, cwd=crawl).returncode == 0
    lines = (crawl / "o.jsonl").read_text().splitlines()
    assert [line.partition(",")[0] for line in lines[:4]] == [f'{{"id":{value}' for value in ids[:4]]
    assert (crawl / "r.jsonl").read_text().startswith('{"id":8,')
    (crawl / "rows.jsonl").write_text(f'{{"key": 5, "id": 6, "html": "<p>{STORY}"}}\n')
    assert llmkit_here("extract", "rows.jsonl", "--id-key", "key", "-f", "-o", "o.jsonl", cwd=crawl).returncode == 0
    row = json.loads((crawl / "o.jsonl").read_text())
    assert (row["key"], row["id"]) == (5, 6)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_rows_without_a_page(llmkit_here, crawl: Path, name: str) -> None:
    """Behaviour: the hint names the option for the field with the page."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for content in ({"text": STORY}, {"text": STORY, "html": 5}):
        (crawl / "rows.jsonl").write_text(json.dumps(content) + "\n")
        pq.write_table(pa.Table.from_pylist([content]), crawl / "rows.parquet")
        done = llmkit_here("extract", name, "-o", "o.jsonl", cwd=crawl)
        assert done.returncode == 1 and b"hint: --html-key names the field" in done.stderr


@pytest.mark.parametrize("command", ["extract", "filter"])
def test_a_full_disk(llmkit_here, crawl: Path, command: str) -> None:
    """Behaviour: the error names the file that could not be written, and what to do."""
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    (crawl / "rows.jsonl").write_text("".join(json.dumps({"text": STORY, "html": STORY}) + "\n" for _ in range(99)))
    rules = ("--filter", "length") if command == "filter" else ()
    done = llmkit_here(command, "rows.jsonl", *rules, "-o", "/dev/full", cwd=crawl)
    assert (
        done.returncode == 1 and b"/dev/full: No space left" in done.stderr and b"hint: free some space" in done.stderr
    )


def test_cut_pages_are_counted(llmkit_here, crawl: Path) -> None:
    """Behaviour: documents of pages that the archive marks as cut have the reason, and the summary their number."""
    block = f"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n<p>{STORY}".encode()
    head = f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Truncated: length\r\nContent-Length: {len(block)}\r\n\r\n".encode()
    (crawl / "cut.warc").write_bytes(head + block + b"\r\n\r\n")
    done = llmkit_here("extract", "cut.warc", "-o", "o.jsonl", cwd=crawl)
    assert b"1 document of 1 page, 1 truncated; written to o.jsonl" in done.stderr
    assert json.loads((crawl / "o.jsonl").read_text())["truncated"] == "length"


def test_a_named_pipe_is_read_once(llmkit_here, tmp_path: Path) -> None:
    """Behaviour: the digest of a page from a pipe is that of what was read, as of a file; opening it again would hang."""
    page = b"<html><body><p>A page about otters, which hold hands while they sleep.</p></body></html>"
    digests = []
    for name in ("page.html", "pipe.html"):
        (tmp_path / name).write_bytes(page) if name == "page.html" else os.mkfifo(tmp_path / name)
        writer = subprocess.Popen(["cp", "page.html", name], cwd=tmp_path) if name == "pipe.html" else None
        assert llmkit_here("extract", name, "-q", "-o", f"{name}.jsonl.zst", cwd=tmp_path).returncode == 0
        assert writer is None or writer.wait() == 0
        record = llmkit_here("lineage", f"{name}.jsonl.zst", "--json", cwd=tmp_path).stdout
        digests.append([item["digest"] for item in json.loads(record)["inputs"]])
    assert digests[0] == digests[1]
