"""`llmkit extract`."""

from __future__ import annotations

import gzip
import json
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
