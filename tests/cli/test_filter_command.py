"""`llmkit filter` on the real command line."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import orjson
import pytest
import zstandard
from waiting import wait_until

from llmkit.lineage.formats import read_lineage

VOCABULARY = """the of and to with that river garden market harbour school meadow station library orchard bridge letter window winter
found carried painted opened followed remembered repaired measured described borrowed yellow narrow quiet ancient distant""".split()


def good(i: int) -> str:
    """Words without repeated phrases that pass the Gopher and C4 rules."""
    random_ = random.Random(i)
    return "\n".join(" ".join(random_.sample(VOCABULARY, 14)).capitalize() + "." for _ in range(6))


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    rows = [{"id": f"g{i}", "text": good(i)} for i in range(30)]
    rows[10:10] = [{"id": "short", "text": "Too short."}, {"id": "same", "text": "spam and the " * 100}]
    lines = [orjson.dumps(row) for row in rows]
    lines[0] = lines[0].replace(b'"id":', b'"id" :  ')  # spacing that a rewrite would lose
    (tmp_path / "docs.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return tmp_path


def rows_of(path: Path) -> list[dict[str, object]]:
    data = path.read_bytes()
    if path.suffix == ".zst":
        data = zstandard.ZstdDecompressor().stream_reader(data, read_across_frames=True).read()
    return [orjson.loads(line) for line in data.splitlines()]


def test_drops_explains_and_counts(llmkit_here, docs: Path) -> None:
    """Behaviour: kept lines byte for byte, rejects with reason and value, counts by reason in --json and in the lineage."""
    done = llmkit_here("filter", "docs.jsonl", "-o", "out.jsonl", "--rejects", "no.jsonl.zst", "--json", cwd=docs)
    assert done.returncode == 0 and done.stdout == b""
    lines = (docs / "docs.jsonl").read_bytes().splitlines(keepends=True)
    assert (docs / "out.jsonl").read_bytes() == b"".join(lines[:10] + lines[12:])
    rejects = rows_of(docs / "no.jsonl.zst")
    assert [(row["id"], row["filter"], row["reason"]) for row in rejects] == [
        ("short", "gopher_repetition", "top_2_gram"),
        ("same", "gopher_repetition", "top_2_gram"),
    ]
    assert all(isinstance(row["value"], float) for row in rejects)
    counts = json.loads(done.stderr.splitlines()[-1])
    assert (counts["documents"], counts["kept"], counts["dropped"]) == (32, 30, 2)
    assert counts["reasons"] == {"gopher_repetition.top_2_gram": 2}


def test_table_of_reasons(llmkit_here, docs: Path) -> None:
    """Behaviour: people see which rule dropped how many, on stderr."""
    done = llmkit_here("filter", "docs.jsonl", "-o", "out.jsonl", cwd=docs)
    assert b"gopher_repetition.top_2_gram" in done.stderr and b"kept 30 of 32 documents (93.8 %)" in done.stderr
    assert llmkit_here("filter", "docs.jsonl", "-qo", "q.jsonl", cwd=docs).stderr == b""


def test_presets_filters_and_rules_combine(llmkit_here, docs: Path) -> None:
    """Behaviour: a single filter, an overridden threshold, several presets; the C4 edit is written."""

    def kept(*arguments: str) -> list[dict[str, object]]:
        done = llmkit_here("filter", "docs.jsonl", "--plain", "-q", *arguments, cwd=docs)
        assert done.returncode == 0, done.stderr
        return [orjson.loads(line) for line in done.stdout.splitlines()]

    assert len(kept("--filter", "gopher_quality")) == 31
    assert len(kept("--filter", "gopher_quality", "--rule", "gopher_quality.min_doc_words=1000")) == 0
    assert len(kept("--preset", "gopher", "--preset", "c4")) == 30
    edited = {
        row["id"]: row["text"]
        for row in kept("--preset", "c4", "--rule", "c4.min_num_sentences=off", "--rule", "c4.min_words_per_line=2")
    }
    assert edited["short"] == "Too short." and edited["same"] == "" and edited["g3"] == good(3)


def test_jobs_decide_nothing(llmkit, docs: Path) -> None:
    """Property: the same bytes for -j 1 and -j 2, rejects too (several chunks)."""
    (docs / "many.jsonl").write_bytes((docs / "docs.jsonl").read_bytes() * 150)
    for jobs in "12":
        done = llmkit(
            "filter", "many.jsonl", "-j", jobs, "-o", f"o{jobs}.jsonl.zst", "--rejects", f"r{jobs}.jsonl.zst", cwd=docs
        )
        assert done.returncode == 0
    for kind in "or":
        assert (docs / f"{kind}1.jsonl.zst").read_bytes() == (docs / f"{kind}2.jsonl.zst").read_bytes()
    assert (docs / "many.jsonl").stat().st_size > 2 << 20


def test_print_preset_is_a_preset(llmkit_here, docs: Path) -> None:
    """Behaviour: what is printed can be edited and given back; the lineage then holds the rules, not the file's name."""
    printed = llmkit_here("filter", "--preset", "fineweb", "--print-preset", cwd=docs)
    assert printed.returncode == 0 and printed.stdout.startswith(b"# FineWeb")
    (docs / "my.toml").write_bytes(printed.stdout.replace(b"min_doc_words = 50", b"min_doc_words = 2"))
    resolved = llmkit_here(
        "filter", "--preset", "my.toml", "--rule", "c4.min_num_sentences=2", "--print-preset", cwd=docs
    )
    assert b"min_num_sentences = 2" in resolved.stdout and b"min_doc_words = 2" in resolved.stdout
    assert llmkit_here("filter", "docs.jsonl", "--preset", "my.toml", "-o", "out.jsonl.zst", cwd=docs).returncode == 0
    record = read_lineage(docs / "out.jsonl.zst")
    assert record is not None and "preset" not in record["options"]
    assert record["options"]["filter"] == ["gopher_repetition", "gopher_quality", "c4", "fineweb"]
    assert sorted(record["options"]["rule"]) == ["c4.require_end_mark=false", "gopher_quality.min_doc_words=2"]
    script = llmkit_here("lineage", "out.jsonl.zst", "--script", cwd=docs).stdout.decode()
    assert "--rule gopher_quality.min_doc_words=2" in script


def test_default_preset_is_recorded(llmkit_here, docs: Path) -> None:
    """Behaviour: the lineage names the preset even where the user did not."""
    llmkit_here("filter", "docs.jsonl", "-o", "out.jsonl.zst", cwd=docs)
    record = read_lineage(docs / "out.jsonl.zst")
    assert record is not None and record["options"]["preset"] == ["gopher"]
    assert record["counts"]["kept"] == 30


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "gofer"], "gopher"),
        (["--filter", "c5"], "c4"),
        (["--words", "unicorn"], "unicode"),
        (["--rule", "gopher_quality.min_doc_word=1"], "gopher_quality.min_doc_words"),
        (["--rejects", "out.jsonl"], "output of the documents"),
        (["--rejects", "out.csv"], ".jsonl"),
    ],
)
def test_usage_errors(llmkit_here, docs: Path, arguments: list[str], message: str) -> None:
    """Behaviour: exit 2, one error line, a hint with the nearest name, no output."""
    done = llmkit_here("filter", "docs.jsonl", "-o", "out.jsonl", *arguments, cwd=docs)
    assert done.returncode == 2 and message in done.stderr.decode()
    assert sorted(path.name for path in docs.iterdir()) == ["docs.jsonl"]


def test_dry_run_counts_and_writes_nothing(llmkit_here, docs: Path) -> None:
    """Behaviour: -n says what would be dropped."""
    done = llmkit_here("filter", "docs.jsonl", "-n", "-o", "out.jsonl", "--rejects", "r.jsonl", cwd=docs)
    assert done.returncode == 0 and b"kept 30 of 32" in done.stderr
    assert [path.name for path in docs.iterdir()] == ["docs.jsonl"]


def test_stdin_to_stdout(llmkit, docs: Path) -> None:
    """Behaviour: `llmkit filter < docs` with nothing else."""
    done = llmkit("filter", stdin=zstandard.compress((docs / "docs.jsonl").read_bytes()), cwd=docs)
    assert done.returncode == 0
    out = zstandard.ZstdDecompressor().stream_reader(done.stdout, read_across_frames=True).read()
    assert out.count(b"\n") == 30


def test_error_leaves_no_rejects_either(llmkit_here, docs: Path) -> None:
    """Behaviour: a bad line in the middle: neither of the two outputs appears."""
    with open(docs / "docs.jsonl", "ab") as file:
        file.write(b"{broken\n")
    done = llmkit_here("filter", "docs.jsonl", "-o", "out.jsonl", "--rejects", "r.jsonl", cwd=docs)
    assert done.returncode == 1 and b"docs.jsonl:33: invalid JSON" in done.stderr
    assert [path.name for path in docs.iterdir()] == ["docs.jsonl"]
    done = llmkit_here("filter", "docs.jsonl", "-o", "out.jsonl", "--on-bad-line", "skip", cwd=docs)
    assert done.returncode == 0 and b"1 bad line skipped" in done.stderr


def test_repeated_with_rejects_does_nothing(llmkit_here, docs: Path) -> None:
    """Behaviour: a finished call with --rejects, repeated, is up to date, but not when the rejects are gone or of another call."""
    command = ("filter", "docs.jsonl", "-o", "out.jsonl.zst", "--rejects", "r.jsonl.zst")
    assert llmkit_here(*command, cwd=docs).returncode == 0
    again = llmkit_here(*command, cwd=docs)
    assert again.returncode == 0 and b"up to date" in again.stderr
    rejects = (docs / "r.jsonl.zst").read_bytes()
    (docs / "r.jsonl.zst").unlink()
    assert llmkit_here(*command, cwd=docs).returncode == 1
    other = ("filter", "docs.jsonl", "--preset", "c4", "-o", "c4.jsonl.zst", "--rejects", "r.jsonl.zst")
    assert llmkit_here(*other, cwd=docs).returncode == 0
    assert llmkit_here(*command, cwd=docs).returncode == 1 and (docs / "r.jsonl.zst").read_bytes() != rejects


def test_annotate_drops_nothing(llmkit_here, docs: Path) -> None:
    """Behaviour: every document comes out, unedited, with its statistics and the rules that would have dropped it, for jq."""
    done = llmkit_here("filter", "docs.jsonl", "--preset", "fineweb", "--annotate", "-o", "out.jsonl", cwd=docs)
    assert done.returncode == 0, done.stderr
    rows = rows_of(docs / "out.jsonl")
    assert [(row["id"], row["text"]) for row in rows] == [
        (row["id"], row["text"]) for row in rows_of(docs / "docs.jsonl")
    ]
    short = next(row for row in rows if row["id"] == "short")["filter"]
    assert short["dropped_by"][0] == "gopher_repetition.top_2_gram" and "c4.too_few_sentences" in short["dropped_by"]
    assert short["gopher_quality"]["words"] == 2 and short["c4"]["sentences"] == 0
    assert next(row for row in rows if row["id"] == "g3")["filter"]["dropped_by"] == []
    for value in (b"5", b"null", b'"x"', b'"dropped_by"', b"[]", b'{"a":1}'):
        (docs / "taken.jsonl").write_bytes(b'{"text":"a","filter":%s}\n' % value)
        refused = llmkit_here("filter", "taken.jsonl", "--annotate", "-o", "t.jsonl", cwd=docs)
        assert refused.returncode == 1 and b"the field 'filter' already exists" in refused.stderr
    refused = llmkit_here("filter", "docs.jsonl", "--annotate", "--rejects", "r.jsonl", cwd=docs)
    assert refused.returncode == 2 and b"drops nothing" in refused.stderr


def test_statistics(llmkit_here, docs: Path) -> None:
    """Behaviour: --stats prints what each rule drops alone and in order, and quantiles, the same for any -j; documents are not written."""
    (docs / "many.jsonl").write_bytes((docs / "docs.jsonl").read_bytes() * 150)
    outputs = [
        llmkit_here("filter", "many.jsonl", "--preset", "fineweb", "--stats", "-j", jobs, "--json", cwd=docs)
        for jobs in "12"
    ]
    assert outputs[0].returncode == 0 and outputs[0].stdout == outputs[1].stdout
    counts = json.loads(outputs[0].stderr.splitlines()[-1])
    assert (counts["documents"], counts["kept"]) == (32 * 150, 30 * 150)
    assert counts["rules"]["gopher_repetition.top_2_gram"] == {"alone": 300, "in_order": 300}
    assert counts["rules"]["c4.too_few_sentences"] == {"alone": 300, "in_order": 0}
    assert counts["statistics"]["gopher_quality.words"]["0.5"] == 6 * 14
    assert b"4,500 would be kept" in outputs[0].stdout
    assert llmkit_here("filter", "docs.jsonl", "--stats", "-o", "x.jsonl", cwd=docs).returncode == 2


RULE = """
from __future__ import annotations
from dataclasses import dataclass
import numpy as np
from llmkit.corpus.filters import Check

@dataclass(frozen=True)
class Short:
    least: int = 1

    def __call__(self, page):
        yield Check("short", np.int64(len(page.text)), len(page.text) < self.least)

def calm(page):
    return page.text.islower()

def shouting(page):
    return not page.text.isupper()

def fails(page):
    return 1 / (page.fields["id"] != "g7") > 0
"""


def test_a_rule_of_ones_own(llmkit_here, docs: Path) -> None:
    """Behaviour: FILE.py:FUNCTION is a filter, known to the lineage by digest; one that raises is named with file, line and id, and nothing is lost."""
    (docs / "my_rule.py").write_text(RULE)
    (docs / "loud.jsonl").write_text('{"id":"a","text":"LOUD"}\n{"id":"b","text":"calm"}\n')
    done = llmkit_here(
        "filter",
        "loud.jsonl",
        "--rule",
        "./my_rule.py:shouting",
        "-o",
        "out.jsonl.zst",
        "--rejects",
        "no.jsonl",
        cwd=docs,
    )
    assert done.returncode == 0, done.stderr
    assert [row["id"] for row in rows_of(docs / "out.jsonl.zst")] == ["b"]
    assert rows_of(docs / "no.jsonl")[0]["reason"] == "shouting"
    script = llmkit_here("lineage", "out.jsonl.zst", "--script", "--allow-code", cwd=docs).stdout.decode()
    assert '--rule "$IN"/my_rule.py:shouting' in script
    (docs / "again.sh").write_text(script)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    subprocess.run(["bash", "again.sh", ".", "rebuilt"], cwd=docs, env=os.environ | {"PATH": path}, check=True)
    assert (docs / "rebuilt" / "out.jsonl.zst").read_bytes() == (docs / "out.jsonl.zst").read_bytes()
    failed = llmkit_here("filter", "docs.jsonl", "--rule", "my_rule.py:fails", "-o", "f.jsonl", cwd=docs)
    assert (
        failed.returncode == 1 and b"docs.jsonl:8: filter 'my_rule.py:fails' raised ZeroDivisionError" in failed.stderr
    )
    assert not (docs / "f.jsonl").exists()
    # Wherever the file lies, its base name is what stands in outputs and records; another function of it is another call.
    away = ("filter", "loud.jsonl", "--filter", f"{docs}/my_rule.py:shouting", "-o", "out.jsonl.zst")
    assert b"up to date" in llmkit_here(*away, cwd=docs).stderr
    other = ("filter", "loud.jsonl", "--rule", "my_rule.py:calm", "-o", "out.jsonl.zst")
    assert llmkit_here(*other, cwd=docs).returncode == 1
    strict = ("--rule", "my_rule.py:Short", "--rule", "./my_rule.py:Short.least=5")
    kept = llmkit_here("filter", "loud.jsonl", *strict, "--plain", "-q", cwd=docs)
    assert (kept.returncode, kept.stdout) == (0, b""), kept.stderr
    missing = llmkit_here("filter", "docs.jsonl", "--rule", "my_rule.py:other", cwd=docs)
    assert missing.returncode == 1 and b"no function 'other'" in missing.stderr
    assert b"no such file" in llmkit_here("filter", "docs.jsonl", "--rule", "other.py:other", cwd=docs).stderr


def test_compat_brings_the_quirks_back(llmkit_here, docs: Path) -> None:
    """Behaviour: a lone bracket drops a document, but not with --compat datatrove."""
    text = "\n".join([*good(1).splitlines(), "{"])
    (docs / "b.jsonl").write_bytes(orjson.dumps({"text": text}) + b"\n")
    kept = [
        llmkit_here("filter", "b.jsonl", "--preset", "c4", "--plain", "-q", *more, cwd=docs).stdout
        for more in ((), ("--compat", "datatrove"))
    ]
    assert kept[0] == b"" and orjson.loads(kept[1])["text"] == good(1)
    assert b"datatrove" in llmkit_here("filter", "b.jsonl", "--compat", "datatrov", cwd=docs).stderr


def test_licence_and_opt_out(llmkit_here, docs: Path) -> None:
    """Behaviour: what pages declare decides, any version of a licence, and not a licence whose name only begins alike."""
    rows = [
        {"id": "by", "text": "a", "licence": "cc-by-4.0"},
        {"id": "nc", "text": "b", "licence": "cc-by-nc-4.0"},
        {"id": "zero", "text": "c", "licence": "cc0-1.0", "opt_out": ["noai"]},
        {"id": "none", "text": "d"},
    ]
    (docs / "l.jsonl").write_bytes(b"\n".join(map(orjson.dumps, rows)))

    def kept(*arguments: str) -> list[str]:
        done = llmkit_here("filter", "l.jsonl", "--plain", "-q", *arguments, cwd=docs)
        assert done.returncode == 0, done.stderr
        return [orjson.loads(line)["id"] for line in done.stdout.splitlines()]

    assert kept("--licence", "cc-by,cc0") == ["by", "zero"]
    assert kept("--respect-opt-out") == ["by", "nc", "none"]
    assert kept("--licence", "CC-BY,cc0", "--respect-opt-out") == ["by"]


def test_directory_of_inputs(llmkit_here, docs: Path) -> None:
    """Behaviour: -o DIR/ makes one file of each input; --resume makes what is missing, and nothing else; names that clash are refused."""
    lines = (docs / "docs.jsonl").read_bytes().splitlines(keepends=True)
    (docs / "in").mkdir()
    for i in range(3):
        (docs / "in" / f"part-{i}.jsonl").write_bytes(b"".join(lines[i * 10 : i * 10 + 12]))
    command = ("filter", "in", "-o", "out/", "--rejects", "no/")
    assert llmkit_here(*command, "--json", cwd=docs).returncode == 0
    made = {path: path.read_bytes() for path in sorted((docs / "out").iterdir())}
    assert (
        [path.name for path in made]
        == [f"part-{i}.jsonl.zst" for i in range(3)]
        == sorted(p.name for p in (docs / "no").iterdir())
    )
    repeated = llmkit_here(*command, cwd=docs)
    assert repeated.returncode == 0 and b"up to date" in repeated.stderr
    times = {path: path.stat().st_mtime_ns for path in made}
    (docs / "out" / "part-1.jsonl.zst").unlink()
    (docs / "no" / "part-1.jsonl.zst").unlink()
    incomplete = llmkit_here(*command, cwd=docs)
    assert incomplete.returncode == 1 and b"--resume" in incomplete.stderr
    again = llmkit_here(*command, "--resume", "--json", cwd=docs)
    counts = json.loads(again.stderr.splitlines()[-1])
    assert (counts["files"], counts["up_to_date"], counts["documents"]) == (1, 2, 12)
    assert {path: path.read_bytes() for path in made} == made
    assert [path.stat().st_mtime_ns == times[path] for path in made] == [True, False, True]
    assert b"up to date" in llmkit_here(*command, "--resume", cwd=docs).stderr
    other = llmkit_here(*command, "--preset", "c4", "--resume", cwd=docs)
    assert other.returncode == 1 and b"part-0.jsonl.zst exists, made with other options: preset" in other.stderr
    (docs / "in" / "more").mkdir()
    (docs / "in" / "more" / "part-1.jsonl.gz").write_bytes(b"")
    clash = llmkit_here("filter", "in", "-o", "new/", cwd=docs)
    assert clash.returncode == 1 and b"would both become part-1.jsonl.zst" in clash.stderr


def test_killed_in_the_middle(llmkit, docs: Path) -> None:
    """Behaviour: kill -9 leaves nothing under a final name that is not whole; --resume then gives the bytes of an undisturbed run."""
    data = (docs / "docs.jsonl").read_bytes() * 60
    (docs / "in").mkdir()
    for i in range(4):
        (docs / "in" / f"{i}.jsonl").write_bytes(data)
    assert llmkit("filter", "in", "-o", "whole/", cwd=docs).returncode == 0
    killed = 0
    for i in range(4):
        process = subprocess.Popen(
            [sys.executable, "-m", "llmkit", "filter", "in", "-o", "out/", "--resume", "-qj2"], cwd=docs
        )
        partial = docs / "out" / f".{i}.jsonl.zst.partial"
        wait_until(lambda partial=partial, process=process: partial.exists() or process.poll() is not None)
        process.kill()
        killed += process.wait() == -signal.SIGKILL
        for path in (docs / "out").glob("[0-9]*") if (docs / "out").exists() else ():
            assert path.read_bytes() == (docs / "whole" / path.name).read_bytes()
    assert llmkit("filter", "in", "-o", "out/", "--resume", cwd=docs).returncode == 0
    assert killed > 0
    for path in (docs / "whole").iterdir():
        assert (docs / "out" / path.name).read_bytes() == path.read_bytes()


def test_lists_decide_what_is_up_to_date(llmkit_here, docs: Path) -> None:
    """Behaviour: the same file in another role, or a changed one, is another call; a pipe, which could be read once, is refused."""
    (docs / "list.txt").write_text("bad.com\n")
    rows = [{"id": "a", "text": "x", "url": "http://www.bad.com/"}, {"id": "b", "text": "y", "url": "http://good.org/"}]
    (docs / "u.jsonl").write_bytes(b"\n".join(map(orjson.dumps, rows)))

    def call(rule: str, *more: str) -> subprocess.CompletedProcess[bytes]:
        return llmkit_here("filter", "u.jsonl", "--filter", "url", "--rule", rule, "-o", "o.jsonl.zst", *more, cwd=docs)

    assert call("url.domains=list.txt").returncode == 0
    assert [row["id"] for row in rows_of(docs / "o.jsonl.zst")] == ["b"]
    assert b"up to date" in call("url.domains=list.txt").stderr
    assert call("url.hosts=list.txt").returncode == 1
    (docs / "list.txt").write_text("good.org\n")
    assert call("url.domains=list.txt").returncode == 1
    os.mkfifo(docs / "pipe")
    refused = call("url.domains=pipe", "-f")
    assert refused.returncode == 2 and b"not a regular file" in refused.stderr
    quoted = [
        llmkit_here("filter", "u.jsonl", "--filter", "regex", "--rule", rule, "--plain", cwd=docs).stdout
        for rule in ("regex.pattern=x", 'regex.pattern="x')
    ]
    assert b'"id":"a"' not in quoted[0] and b'"id":"a"' in quoted[1]


def test_empty_list_of_inputs_is_not_stdin(llmkit_here, docs: Path) -> None:
    """Behaviour: --files-from an empty file reads nothing, whatever is on stdin."""
    (docs / "empty").write_text("")
    done = llmkit_here("filter", "--files-from", "empty", "--plain", stdin=(docs / "docs.jsonl").read_bytes(), cwd=docs)
    assert done.returncode == 0 and done.stdout == b"" and b"no documents were read" in done.stderr
