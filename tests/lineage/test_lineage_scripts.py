"""Scripts of real artefacts: parts of artefacts, indexes, streams, copies, and a sample of random pipelines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llmkit.lineage.formats import describe_input, locate, read_lineage
from llmkit.lineage.script import Flag, as_script

BENCH = Path(__file__).resolve().parents[1] / "bench"
sys.path.insert(0, str(BENCH))

Call = Callable[..., subprocess.CompletedProcess[bytes]]


def flags_of(command: str) -> dict[str, Flag]:
    from llmkit.cli.release.lineage import _flags

    return _flags(command)


def commands_of(script: str) -> list[str]:
    lines = script.replace(" |\n  ", " | ").splitlines()
    return [line for line in lines if line.startswith(("llmkit", "cp", "cat"))]


def script_of(path: Path) -> list[str]:
    from llmkit.lineage.formats import describe_part

    record = read_lineage(path)
    assert record is not None
    return commands_of(as_script(record, str(path), flags_of, describe_part(path, record)))


@pytest.fixture
def mix(tmp_path: Path, write_shards: Callable[..., Path], llmkit_here: Call) -> Path:
    """A mix of two shards with held-out documents."""
    write_shards(tmp_path / "web", [20] * 60, max_tokens_per_shard=400)
    made = llmkit_here("mix", "web", "--holdout", "20%", "-o", "mix", "-q", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    return tmp_path / "mix"


def test_a_part_of_an_artefact_is_taken_from_the_whole(mix: Path, llmkit_here: Call) -> None:
    """Behaviour: held-out documents, one shard of several and copies of them elsewhere are read from what the command
    made, and the artefact is made once."""
    tmp_path, shard = mix.parent, "web/part-00001.arrow"
    (tmp_path / "held").symlink_to("mix/heldout")
    os.rename(mix / "heldout", tmp_path / "moved")
    os.rename(tmp_path / "moved", mix / "heldout")
    for source in ("mix/heldout", shard):
        name = source.replace("/", "-") + ".jsonl.zst"
        assert llmkit_here("tokenize", "--decode", source, "-q", "-o", name, cwd=tmp_path).returncode == 0
    lines = script_of(tmp_path / "mix-heldout.jsonl.zst")
    assert lines[1].startswith('llmkit mix "$OUT"/web --holdout 20%') and lines[1].endswith('-o "$OUT"/mix')
    assert lines[2].startswith('llmkit tokenize "$OUT"/mix/heldout')
    lines = script_of(tmp_path / "web-part-00001.arrow.jsonl.zst")
    assert lines[0].endswith('-o "$OUT"/web') and lines[1].startswith(f'llmkit tokenize "$OUT"/{shard}')
    assert script_of(mix / "heldout")[-1].endswith('-o "$OUT"/mix')
    subprocess.run(["cp", "-R", str(mix / "heldout"), str(tmp_path / "copy")], check=True)
    item = describe_input(tmp_path / "copy")
    assert (item.name, item.part) == ("copy", "mix/heldout")
    assert script_of(tmp_path / "copy")[-1] == 'cp -RL "$OUT"/mix/heldout "$OUT"/copy'


def test_parts_are_found_by_their_format(mix: Path) -> None:
    """Property: the files that a format declares are parts of it; others beside them, and whole files, are not."""
    tmp_path = mix.parent
    (mix / "notes.txt").write_text("x")
    assert locate(mix / "heldout" / "part-00000.arrow") == (mix, "heldout/part-00000.arrow")
    assert locate(mix / "tokenizer.json") == (mix, "tokenizer.json")
    assert locate(mix / "notes.txt") is None and locate(mix) is None
    (tmp_path / "run" / "checkpoints" / "step-00000002").mkdir(parents=True)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000002"
    assert locate(checkpoint) == (tmp_path / "run", "checkpoints/step-00000002")
    assert locate(checkpoint / "tokenizer.json") == (tmp_path / "run", "checkpoints/step-00000002/tokenizer.json")


def test_an_index_is_filled_by_the_runs_that_filled_it(tmp_path: Path, llmkit_here: Call) -> None:
    """Behaviour: the script of each of several files through one index repeats the runs before it, each once, from an
    empty index; one that an earlier version filled is an original."""
    import duckdb

    (tmp_path / "night").mkdir()
    for name in "abc":
        rows = [{"id": f"{name}{i}", "text": f"{name} {i} seven birds over the water and stone {i}"} for i in range(4)]
        (tmp_path / "night" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert llmkit_here("dedup", "night/", "--index", "seen.duckdb", "-q", "-o", "out/", cwd=tmp_path).returncode == 0
    lines = script_of(tmp_path / "out" / "c.jsonl.zst")
    index = '--index "$OUT"/seen.duckdb'
    assert [line.partition(" --ngram")[0] for line in lines] == [f'llmkit dedup "$IN"/{n}.jsonl {index}' for n in "abc"]
    with duckdb.connect(str(tmp_path / "seen.duckdb")) as old:
        old.execute("DROP TABLE records")
    call = ("dedup", "night/a.jsonl", "--method", "minhash", "--keep", "longest", "--index", "seen.duckdb", "-q")
    assert llmkit_here(*call, "-o", "late.jsonl.zst", cwd=tmp_path).returncode == 0
    lines = script_of(tmp_path / "late.jsonl.zst")
    assert lines[0] == 'cp "$IN"/seen.duckdb "$OUT"/seen.duckdb' and len(lines) == 2


def test_two_streams_are_a_pipe_and_a_process_substitution() -> None:
    """Behaviour: only one stream of a command can be stdin."""
    record = {"command": "filter", "inputs": [{"name": "a.jsonl", "digest": "1"}]}
    streams = [{"role": "input", "name": "-", "digest": str(i), "lineage": record} for i in range(2)]
    script = as_script({"command": "dedup", "inputs": streams}, "x.jsonl.zst", flags_of)
    (line,) = commands_of(script)
    assert line == 'llmkit filter "$IN"/a.jsonl | llmkit dedup - <(llmkit filter "$IN"/a.jsonl) -o "$OUT"/x.jsonl.zst'


def test_rejects_and_joined_streams_can_be_made_again() -> None:
    """Behaviour: the second output of a stage comes from the same command, streams joined by `cat` from their parts."""
    record = {"command": "filter --rejects", "inputs": [{"name": "a.jsonl", "digest": "1"}]}
    script = as_script(record, "dropped.jsonl.zst", flags_of)
    assert commands_of(script) == ['llmkit filter "$IN"/a.jsonl --rejects "$OUT"/dropped.jsonl.zst -o /dev/null']
    parts = [
        {"name": f"part-{i}", "digest": "", "lineage": {"command": "vocab", "options": {"size": i}}} for i in (7, 8)
    ]
    lines = commands_of(as_script({"command": "cat", "inputs": parts}, "all.jsonl.zst", flags_of))
    assert lines[-1] == 'cat "$OUT"/part-7.jsonl.zst "$OUT"/part-8.jsonl.zst > "$OUT"/all.jsonl.zst'


def test_the_script_stops_where_a_digest_differs(tmp_path: Path) -> None:
    """Behaviour: in sh as in bash, the script ends with a message at the first output that is not what was recorded."""
    made = {"command": "filter", "inputs": [{"name": "a.jsonl", "digest": "1"}], "digest": "xxh3:" + "0" * 32}
    record = {"command": "dedup", "inputs": [{"name": "b.jsonl.zst", "digest": "2", "lineage": made}]}
    script = as_script(record, "c.jsonl.zst", flags_of).replace("set -euo pipefail", "set -eu")
    (tmp_path / "again.sh").write_text(script)
    (tmp_path / "a.jsonl").touch()
    (tmp_path / "llmkit").write_text('#!/bin/sh\n[ "$1" = lineage ] && echo xxh3:1 || echo "$1" >> ran\n')
    (tmp_path / "llmkit").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(["sh", "again.sh"], cwd=tmp_path, env=environment, capture_output=True)
    assert done.returncode == 1 and b"b.jsonl.zst is not what was recorded" in done.stderr
    assert (tmp_path / "ran").read_text() == "filter\n"


def test_random_pipelines(tmp_path: Path, preloaded_text_bin: Path) -> None:
    """Behaviour: the scripts of two random pipelines make the same artefacts again; bench/random_pipelines.py runs more.

    They have nine commands each: ten kinds of the generator's steps, all but rejects and those that train.
    """
    from random_pipelines import try_pipeline

    environment = os.environ | {"PATH": f"{preloaded_text_bin}:{os.environ['PATH']}"}
    for seed, scripts in ((106, 2), (129, 1)):
        count, failures = try_pipeline(seed, 9, scripts, tmp_path / str(seed), environment)
        assert count and not failures, "\n".join(failures)


def test_a_process_substitution_has_no_name(tmp_path: Path) -> None:
    """Property: the number of a file descriptor is in no record, and not the source of a document."""
    from llmkit.io.inputs import display_name
    from llmkit.io.record import base_name
    from llmkit.tokens.encoder import source_name

    for path in ("/dev/fd/63", "/proc/self/fd/12", "/dev/stdin", "-"):
        assert base_name(path) == "-" and source_name(display_name(path)) == "stdin"


def test_every_option_is_in_a_script() -> None:
    """Property: bench/scripts.py gives each option that decides the content, of each command that makes a record."""
    from scripts import LINES, uncovered

    from llmkit.cli.shared.schema import schema
    from llmkit.cli.shared.table import COMMANDS

    assert uncovered(LINES.strip().splitlines(), schema(COMMANDS)) == []


def test_digests_in_scripts_are_those_of_the_artefacts(tmp_path: Path, llmkit_here: Call) -> None:
    """Behaviour: what a script compares is what `lineage --digest` prints, for Parquet with lists and a converted
    vocabulary too, and --check finds no difference."""
    import base64

    rows = [{"id": "1", "text": "a river", "tags": ["a", "b"], "deep": [{"x": [1]}]}, {"id": "2", "text": "a stone"}]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ranks = "".join(f"{base64.b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(256))
    (tmp_path / "r.tiktoken").write_text(ranks)
    convert = ("vocab convert", "r.tiktoken", "--pattern", "qwen2", "--eos", "<e>", "-o", "tok", "-q")
    for call in (("dedup", "d.jsonl", "--method", "exact", "-o", "o.parquet", "-q"), convert):
        assert llmkit_here(*call, cwd=tmp_path).returncode == 0
        name = call[call.index("-o") + 1]
        digest = llmkit_here("lineage", name, "--digest", cwd=tmp_path).stdout.decode().strip()
        script = llmkit_here("lineage", name, "--script", cwd=tmp_path).stdout.decode()
        assert script.endswith(f'same "$OUT"/{name} {digest}\n')
        assert llmkit_here("lineage", name, "--check", cwd=tmp_path).returncode == 0


def test_rules_of_a_file_have_the_record_of_the_same_rules(tmp_path: Path, llmkit_here: Call) -> None:
    """Behaviour: the command in the script of a filter by a preset file makes the same bytes, its record included."""
    (tmp_path / "d.jsonl").write_text(json.dumps({"id": "1", "text": "a river " * 20}) + "\n")
    (tmp_path / "p.toml").write_text('[[filter]]\nname = "length"\nmin_characters = 60\n')
    rules = ("--filter", "length", "--rule", "length.min_characters=60")
    for name, how in (("a", ("--preset", "p.toml")), ("b", rules)):
        call = ("filter", "d.jsonl", *how, "-q", "-o", f"{name}.jsonl.zst")
        assert llmkit_here(*call, cwd=tmp_path).returncode == 0
    assert (tmp_path / "a.jsonl.zst").read_bytes() == (tmp_path / "b.jsonl.zst").read_bytes()
