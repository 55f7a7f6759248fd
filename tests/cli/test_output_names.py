"""Names of inputs and outputs: checked before the work, in any case, and compared with what is there."""

from __future__ import annotations

import json
from pathlib import Path

import orjson
import pyarrow.parquet as pq
import pytest

ROWS = [{"id": f"{i}", "text": f"Document number {i} of {'word ' * i}some words."} for i in range(8)]
EXTRACT = ("extract", "in.jsonl")
# Commands that write documents: none reaches the broken input if a name is wrong.
COMMANDS = (
    ("filter", "in.jsonl", "--filter", "length"),
    ("dedup", "in.jsonl"),
    ("dedup", "in.jsonl", "--method", "lines"),
    EXTRACT,
    ("mix", "in.jsonl"),
)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "in.jsonl").write_bytes(b"{broken\n")
    (tmp_path / "docs.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in ROWS))
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_names_are_checked_before_the_input(llmkit_here, place: Path, command: tuple[str, ...]) -> None:
    """Behaviour: an output, rejects, quarantine or summary that cannot be written is an error before any input is read."""
    before = sorted(path.name for path in place.iterdir())
    calls = [("-o", "o.txt"), ("--on-bad-line", "quarantine=q.txt"), ("--on-bad-file", "quarantine=q.txt")]
    calls += [("--rejects", "r.csv")] * (command[0] != "mix")
    for more in calls:
        done = llmkit_here(*command, *more, *("-o", "o.jsonl") * ("-o" not in more), cwd=place)
        name = more[-1].removeprefix("quarantine=").encode()
        assert done.returncode == 2 and name + b": unknown document format" in done.stderr, (more, done.stderr)
    done = llmkit_here(*command, "-o", "o.jsonl", "--summary", "nowhere/s.json", cwd=place)
    assert done.returncode == 1 and b"nowhere is not a directory" in done.stderr
    assert sorted(path.name for path in place.iterdir()) == before


def test_suffixes_in_upper_case(llmkit_here, place: Path) -> None:
    """Behaviour: a name in upper case is the same format, for inputs, in directories, for outputs, and for lineage."""
    for name in ("A.JSONL", "B.JSONL.GZ", "C.JSONL.ZST", "D.PARQUET", "E.NDJSON"):
        (place / name[0]).mkdir()
        assert (
            llmkit_here("filter", "docs.jsonl", "--filter", "length", "-o", f"{name[0]}/{name}", cwd=place).returncode
            == 0
        )
        for source in (f"{name[0]}/{name}", name[0]):
            done = llmkit_here("filter", source, "--filter", "length", "-o", "o.jsonl", "-f", cwd=place)
            assert done.returncode == 0, done.stderr
            assert [orjson.loads(line) for line in (place / "o.jsonl").read_bytes().splitlines()] == ROWS
    assert (place / "B/B.JSONL.GZ").read_bytes()[:2] == b"\x1f\x8b" and pq.read_table(
        place / "D/D.PARQUET"
    ).num_rows == 8
    for name in ("C/C.JSONL.ZST", "D/D.PARQUET"):
        again = llmkit_here("filter", "docs.jsonl", "--filter", "length", "-o", name, cwd=place)
        assert again.returncode == 0 and b"up to date" in again.stderr
        assert llmkit_here("lineage", name, "--check", cwd=place).returncode == 0
    done = llmkit_here("dedup", "C/C.JSONL.ZST", "D", "-o", "out/", cwd=place)
    assert done.returncode == 0 and sorted(p.name for p in (place / "out").iterdir()) == ["C.jsonl.zst", "D.jsonl.zst"]
    (place / "pages").mkdir()
    (place / "pages" / "P.TXT").write_text("<plain> text\n")
    done = llmkit_here("extract", "pages", "-o", "p.jsonl", cwd=place)
    assert orjson.loads((place / "p.jsonl").read_bytes())["text"] == "<plain> text\n", done.stderr


def test_an_existing_output_says_what_differs(llmkit_here, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behaviour: the error for an output of another call names what differs, and nothing is replaced."""
    (place / "more.jsonl").write_bytes(b'{"text":"more of it"}\n')
    call = ("dedup", "docs.jsonl", "-o", "o.jsonl.zst")
    assert llmkit_here(*call, cwd=place).returncode == 0
    made = (place / "o.jsonl.zst").read_bytes()
    for other, message in (
        ((*call, "--threshold", "0.9"), "made with other options: threshold 0.75, not 0.9"),
        ((*call, "--seed", "7", "--method", "exact"), "made with other options: method minhash, not exact; "),
        ((*call, "more.jsonl"), "made from other inputs: more.jsonl"),
        (("filter", *call[1:]), "made by another command: dedup, not filter"),
        ((*call, "--rejects", "r.jsonl.zst"), "but r.jsonl.zst does not"),
    ):
        done = llmkit_here(*other, cwd=place)
        assert done.returncode == 1 and f"o.jsonl.zst exists, {message}".encode() in done.stderr, done.stderr
        assert llmkit_here(*other, "--dry-run", cwd=place).returncode == 0
    (place / "docs.jsonl").write_bytes(b'{"text":"changed"}\n')
    done = llmkit_here(*call, cwd=place)
    assert done.returncode == 1 and b"exists, made from other inputs: docs.jsonl" in done.stderr
    monkeypatch.setattr("llmkit.io.record.__version__", "9.9")
    assert b"made by another version: " in llmkit_here(*call, cwd=place).stderr
    assert (place / "o.jsonl.zst").read_bytes() == made


def test_mistyped_inputs(llmkit_here, place: Path) -> None:
    """Behaviour: an input that is named and does not exist is a usage error even where bad files are skipped; one in a list
    may have gone since the list was made, and so may the target of a link."""
    skip = ("--on-bad-file", "skip", "-o", "o.jsonl.zst")
    for command in (("filter", "--filter", "length"), ("dedup",), ("vocab", "--size", "300")):
        done = llmkit_here(command[0], "docs.jsonl", "doc.jsonl", *command[1:], *skip, cwd=place)
        assert done.returncode == 2 and b"doc.jsonl: no such file or directory" in done.stderr
    assert not (place / "o.jsonl.zst").exists()
    (place / "list").write_text("docs.jsonl\ndoc.jsonl\n")
    done = llmkit_here("filter", "--files-from", "list", "--filter", "length", *skip, cwd=place)
    assert done.returncode == 0 and b"1 bad file skipped" in done.stderr


def test_summary_lines_count_what_was_skipped(llmkit_here, place: Path) -> None:
    """Behaviour: the last line of every command that reads documents counts bad lines and bad files, and so does --json."""
    (place / "bad.parquet").write_bytes(b"PAR1 not at all")
    sources = ("docs.jsonl", "in.jsonl", "bad.parquet")
    skip = ("--on-bad-file", "skip", "--on-bad-line", "skip")
    for number, (name, *options) in enumerate(
        (
            ("filter", "--filter", "length"),
            ("filter", "--filter", "length", "--stats"),
            ("dedup",),
            ("vocab", "--size", "300"),
            ("vocab advise", "--model-size", "125m"),
            ("filter train", "--label-key", "id", "--epochs", "1"),
        )
    ):
        call = (name, *sources, *options, *skip, *(("-o", f"o{number}.jsonl") if "--stats" not in options else ()))
        done = llmkit_here(*call, cwd=place)
        if done.returncode == 0:  # `vocab advise` needs more text, but has counted by then
            assert b", 1 bad line skipped, 1 bad file skipped" in done.stderr.splitlines()[-1], (call, done.stderr)
            done = llmkit_here(*call, "--json", "-f", cwd=place)
            counts = json.loads(done.stderr.splitlines()[-1])
            assert (counts["bad_lines"], counts["bad_files"]) == (1, 1)
        else:
            assert name == "vocab advise", done.stderr
    (place / "src").mkdir()
    for source in sources:
        (place / source).rename(place / "src" / source)
    done = llmkit_here("mix", "src", *skip, "-o", "m.jsonl", cwd=place)
    assert b"from 1 source, 1 bad line skipped, 1 bad file skipped; written to m.jsonl" in done.stderr, done.stderr


def test_unknown_formats_of_tokenize(llmkit_here, place: Path) -> None:
    """Behaviour: the message names the known formats."""
    done = llmkit_here("tokenize", "docs.jsonl", "--from", "jsonl", "-t", "tok", cwd=place)
    assert done.returncode == 2 and b"known: documents, megatron, nanogpt, shards" in done.stderr


def test_plain_rejects_do_not_stop_a_repetition(llmkit_here, place: Path) -> None:
    """Behaviour: the record of the output decides where the rejects are plain lines; without them it is made again."""
    call = ("filter", "docs.jsonl", "--preset", "gopher", "--rejects", "r.jsonl", "-o", "o.jsonl.zst")
    assert llmkit_here(*call, cwd=place).returncode == 0
    before = (place / "r.jsonl").read_bytes()
    again = llmkit_here(*call, cwd=place)
    assert again.returncode == 0 and b"up to date" in again.stderr and (place / "r.jsonl").read_bytes() == before
    (place / "r.jsonl").unlink()
    missing = llmkit_here(*call, cwd=place)
    assert missing.returncode == 1 and b"r.jsonl" in missing.stderr


@pytest.mark.parametrize("option", ["-o", "--rejects", "--summary"])
@pytest.mark.parametrize("link", ["same", "symbolic", "hard"])
def test_no_output_is_an_input(llmkit_here, place: Path, option: str, link: str) -> None:
    """Behaviour: with -f too, an input stays as it is where an output is the same file, whatever its name."""
    before, name = (place / "docs.jsonl").read_bytes(), "docs.jsonl" if link == "same" else "other.jsonl"
    if link == "symbolic":
        (place / name).symlink_to("docs.jsonl")
    elif link == "hard":
        (place / name).hardlink_to(place / "docs.jsonl")
    outputs = (option, name) if option == "-o" else (option, name, "-o", "o.jsonl")
    for more in (("docs.jsonl",), ("in.jsonl", "docs.jsonl"), (".",)):
        done = llmkit_here("filter", *more, "--filter", "length", "-f", *outputs, cwd=place)
        assert done.returncode == 2 and f"{option} {name}: this is also an input".encode() in done.stderr, done.stderr
        assert (place / "docs.jsonl").read_bytes() == before and not (place / "o.jsonl").exists()


def test_no_output_is_an_input_of_an_option(llmkit_here, place: Path) -> None:
    """Behaviour: neither is a file that an option names."""
    before = (place / "docs.jsonl").read_bytes()
    (place / "x.jsonl").write_bytes(b'{"text":"x"}\n')
    done = llmkit_here(
        "dedup", "x.jsonl", "--against", "docs.jsonl", "-f", "--rejects", "docs.jsonl", "-o", "o.jsonl", cwd=place
    )
    assert (
        done.returncode == 2
        and b"this is also an input" in done.stderr
        and (place / "docs.jsonl").read_bytes() == before
    )
