"""`llmkit mix` on the command line: its options, equal training from a plan and from shards, and resistance to SIGKILL."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import orjson
import pytest

from llmkit.errors import LlmkitError
from llmkit.lineage.check import check
from llmkit.lineage.formats import read_lineage
from llmkit.mixing.order import OrderedTokens
from llmkit.shards.reader import TokenStore

Write = Callable[..., Path]
ROOT = Path(__file__).resolve().parents[2]
STAGES = """
[sources]
web = "web"
code = "code"
wiki = "wiki"
[[stage]]
name = "main"
tokens = "3k"
mix = { web = 0.8, code = 0.2 }
[[stage]]
name = "end"
tokens = 2000
mix = { web = 0.3, wiki = "x2" }
"""


@pytest.fixture
def place(tmp_path: Path, write_shards: Write) -> Path:
    """web (300 documents), code (100) and wiki (10) as shards, and the stages above."""
    draw = np.random.default_rng(0)
    for name, documents in (("web", 300), ("code", 100), ("wiki", 10)):
        write_shards(tmp_path / name, draw.integers(5, 60, documents).tolist(), name, max_tokens_per_shard=4_000)
    (tmp_path / "stages.toml").write_text(STAGES)
    return tmp_path


def first_batches(path: Path, length: int = 16) -> str:
    """Digest of the first 1,000 batches that `train` makes of `path`."""
    from llmkit.training.data import StreamSource

    source = StreamSource(OrderedTokens.open(str(path)), length, 2, 2_000 * length)
    digest = hashlib.sha256()
    for step in range(1_000):
        batch = source.batch(step, 0, 2)
        ids = batch.document_ids
        for tensor in (batch.input_ids, batch.targets, batch.weights, *([] if ids is None else [ids])):
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


CHOICES = {
    "global": "web:0.6 code:0.3 wiki:0.1 --tokens 30k",
    "block": "web:0.6 code:0.4 --shuffle block --pack best-fit --sequence-length 16",
    "none": "web code:x3 --shuffle none --holdout 5%",
    "stages": "--stages stages.toml --holdout 0.05",
    "all": "--stages stages.toml --pack best-fit --sequence-length 16 --shuffle block --holdout 0.05",
}


def test_a_plan_and_shards_train_the_same(llmkit_here, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Property: plan and shards give the same first 1,000 batches for every choice, and different ones between choices."""
    monkeypatch.setattr("llmkit.mixing.order.BLOCK_TOKENS", 512)
    monkeypatch.setattr("llmkit.mixing.packing.WINDOW", 100)
    found = []
    for name, choices in CHOICES.items():
        for output, more in ((f"{name}-mix", ()), (f"{name}-plan", ("--plan",))):
            done = llmkit_here("mix", *choices.split(), "--seed", "3", "-q", "-o", output, *more, cwd=place)
            assert done.returncode == 0, done.stderr
        mixed, planned = (first_batches(place / f"{name}-{form}") for form in ("mix", "plan"))
        assert mixed == planned, name
        found.append(mixed)
        checked = check(read_lineage(place / f"{name}-plan") or {}, str(place / f"{name}-plan"), [])
        assert {result.state for result in checked} == {"ok"}
        if "--holdout" in choices:
            stores = [TokenStore.open(str(place / f"{name}-{form}" / "heldout")) for form in ("mix", "plan")]
            assert stores[0].inputs[0].digest == stores[1].inputs[0].digest
    assert len(set(found)) == len(CHOICES)


def test_held_out_documents(llmkit_here, place: Path) -> None:
    """Property: documents held out of one mix are in no mix with that share, whatever its sources and seed."""
    first = llmkit_here("mix", "web:x2", "code", "--holdout", "10%", "-o", "one", "--json", "-q", cwd=place)
    other = llmkit_here("mix", "wiki", "web", "--holdout", "0.1", "--seed", "9", "-o", "two", "-q", cwd=place)
    assert first.returncode == other.returncode == 0, first.stderr + other.stderr
    one, two = (TokenStore.open(str(place / name / "heldout")) for name in ("one", "two"))
    names = {store: {store.id(i) for i in range(store.documents)} for store in (one, two)}
    assert {name for name in names[one] if "web" in name} == {name for name in names[two] if "web" in name}
    assert 15 <= sum("web" in name for name in names[one]) <= 45
    mixed = TokenStore.open(str(place / "one"))
    seen = {mixed.id(i) for i in range(mixed.documents)}
    assert seen | names[one] == {f"web-{i}" for i in range(300)} | {f"code-{i}" for i in range(100)}
    assert not seen & names[one] and json.loads(first.stderr)["held_out"] == one.documents
    assert not list((place / "one").glob(".*")) and one.inputs[0].lineage["command"] == "mix"
    done = llmkit_here("mix", "web", "--holdout", "5%", "-n", cwd=place)
    assert re.search(rb", [12]?\d held out; nothing written", done.stderr)
    done = llmkit_here("mix", "wiki", "--holdout", "1e-9", "-n", cwd=place)
    assert b"nothing is held out: none of 10 documents" in done.stderr


def test_train_keeps_to_the_packing(llmkit_here, place: Path) -> None:
    """Behaviour: `train` uses the packed length; another length, and attention over padding, are refused;
    --heldout reads it.
    """
    call = ("web", "code", "--pack", "best-fit", "--sequence-length", "24", "--holdout", "5%", "--json")
    done = llmkit_here("mix", *call, "-o", "m", cwd=place)
    summary = json.loads(done.stderr.splitlines()[-1])
    concat, best = summary["packing"]
    assert best["cut"] < concat["cut"] and best["padding"] == summary["padding"] / (
        summary["padding"] + summary["tokens"]
    )
    assert llmkit_here("mix", *call, "--plan", "-o", "p", cwd=place).returncode == 0
    lines = llmkit_here("tokenize", "m", "--to", "jsonl", "--plain", cwd=place).stdout.splitlines()
    assert all(orjson.loads(line)["id"] for line in lines)  # padding is no document
    assert sum(len(orjson.loads(line)["tokens"]) for line in lines) == summary["tokens"]
    for data in ("m", "p"):
        train = ("train", data, "-m", "tiny", "-n", "-o", "run", "--heldout", f"{data}/heldout")
        planned = llmkit_here(*train, "--json", "-q", cwd=place)
        tokens = json.loads(planned.stderr.splitlines()[-1])["tokens"]
        assert tokens == summary["tokens"] + summary["padding"] and tokens % 24 == 0
        for option, message in (
            (("--sequence-length", "32"), f"--sequence-length 32, but {data} is packed for sequences of 24"),
            (("--no-document-mask",), f"{data} is packed"),
        ):
            done = llmkit_here(*train, *option, cwd=place)
            assert done.returncode == 2 and message in done.stderr.decode()
        done = llmkit_here("train", "web", "--heldout", "m", "--no-document-mask", "-n", "-o", "run", cwd=place)
        assert done.returncode == 2 and b"m is packed" in done.stderr
        assert llmkit_here(*train, "--sequence-length", "24", cwd=place).returncode == 0


def test_stages_table(llmkit_here, place: Path) -> None:
    """Behaviour: each stage has its own shares; paths on the command line replace the file's; lineage records the file."""
    (place / "elsewhere").mkdir()
    shutil.copy(place / "stages.toml", place / "elsewhere" / "s.toml")
    call = ("web", "code", "wiki", "--stages", "elsewhere/s.toml", "-o", "m", "--summary", "s.json")
    done = llmkit_here("mix", *call, cwd=place)
    assert done.returncode == 0 and b"main" in done.stderr, done.stderr
    rows = json.loads((place / "s.json").read_bytes())["stages"]
    assert [(row["stage"], row["source"]) for row in rows] == [
        ("main", "web"), ("main", "code"), ("end", "web"), ("end", "wiki"),
    ]  # fmt: skip
    assert abs(rows[0]["tokens"] - 2_400) <= 30 and abs(rows[2]["tokens"] + rows[3]["tokens"] - 2_000) <= 60
    again = llmkit_here("mix", *call, cwd=place)
    assert again.returncode == 0 and b"up to date" in again.stderr
    again = llmkit_here("mix", *call, "--sequence-length", "64", cwd=place)  # it decides nothing without best-fit
    assert again.returncode == 0 and b"up to date" in again.stderr
    (place / "elsewhere" / "s.toml").write_text(STAGES.replace("0.8", "0.7"))
    assert b"m exists" in llmkit_here("mix", *call, cwd=place).stderr
    done = llmkit_here("mix", "web", "code", "--stages", "elsewhere/s.toml", "-n", cwd=place)
    assert done.returncode == 2 and b"2 sources named, but 3 in" in done.stderr


def test_k2(llmkit_here, tmp_path: Path, write_shards: Write) -> None:
    """Golden: K2's multipliers on its starting tokens, to scale, give the (rounded) shares published in its data card."""
    lines = re.findall(r'(?m)^(\S+) = "x\S+" +# +([0-9.]+)B +([0-9.]+) %$', (ROOT / "examples" / "k2.toml").read_text())
    assert len(lines) == 14 and sum(float(share) for _, _, share in lines) == pytest.approx(100)
    for name, tokens, _ in lines:
        write_shards(tmp_path / f"{name}.arrow", [10] * round(float(tokens) * 10), name)
    paths = [f"{name}.arrow" for name, *_ in lines]
    done = llmkit_here(
        "mix", *paths, "--stages", str(ROOT / "examples" / "k2.toml"), "-n", "-q", "--json", cwd=tmp_path
    )
    for row, (_, _, share) in zip(json.loads(done.stderr)["sources"], lines, strict=True):
        assert 100 * row["share"] == pytest.approx(float(share), abs=0.06)


def test_no_repeat(llmkit_here, place: Path) -> None:
    """Behaviour: refused where a source would be repeated, over all stages; using a source up is allowed."""
    for call in (("web:x1.5",), ("wiki", "--tokens", "2k"), ("--stages", "stages.toml")):
        done = llmkit_here("mix", *call, "--no-repeat", "-n", cwd=place)
        assert done.returncode == 2 and re.search(rb"w\w+ holds [\d,]+ tokens, but [\d,]+ are requested", done.stderr)
    assert llmkit_here("mix", "web", "wiki:x0.5", "--no-repeat", "-n", cwd=place).returncode == 0


def test_weight_by_duplicates(llmkit_here, tmp_path: Path) -> None:
    """Behaviour: documents are repeated by the range of their count, 1 where they have none; an invalid count
    is an error.
    """
    rows = [{"id": f"{i}", "text": "x" * 40} | ({"duplicates": i} if i else {}) for i in range(12)]
    (tmp_path / "d.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    call = ("mix", "--weight-by", "duplicates", "--weight-map", "1:1,2-5:2,6-10:3", "--plain")
    done = llmkit_here(*call, "d.jsonl", cwd=tmp_path)
    assert done.returncode == 0 and b"warning" not in done.stderr
    found = Counter(orjson.loads(line)["id"] for line in done.stdout.splitlines())
    assert found == {f"{i}": 1 if i < 2 else 2 if i < 6 else 3 for i in range(12)}
    (tmp_path / "d.jsonl").write_bytes(b'{"text":"a"}\n{"text":"b","duplicates":"many"}\n')
    done = llmkit_here(*call, "d.jsonl", cwd=tmp_path)
    assert done.returncode == 1 and b"d.jsonl:2" in done.stderr and b"'duplicates' is not a count" in done.stderr


def test_shards_keep_duplicates(llmkit_here, place: Path, small_tokenizer: dict[str, str]) -> None:
    """Behaviour: tokenize keeps duplicate counts and includes them in the digest; a mix by them is the same
    from a plan; documents without a count have 1; held-out documents never occur; shards without counts are
    unaffected.
    """
    (place / "tok").mkdir()
    for name, text in small_tokenizer.items():
        (place / "tok" / name).write_text(text)
    rows = [{"id": f"{i}", "text": "x" * 40 + f"{i}"} | ({"duplicates": i} if i else {}) for i in range(12)]
    (place / "d.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    for output, more in (("d", ("--keep-duplicates",)), ("e", ())):
        done = llmkit_here("tokenize", "d.jsonl", "-t", "tok", "-o", output, *more, cwd=place)
        assert done.returncode == 0, done.stderr
    store, without = TokenStore.open(str(place / "d")), TokenStore.open(str(place / "e"))
    assert store.duplicates is not None and store.duplicates.tolist() == [1, *range(1, 12)]
    assert without.duplicates is None and without.inputs[0].digest != store.inputs[0].digest
    store.verify()
    part = place / "d" / "part-00000.arrow"
    content = part.read_bytes()
    part.write_bytes(content.replace(np.int64(11).tobytes(), np.int64(12).tobytes()))
    with pytest.raises(LlmkitError, match="does not match its digest"):
        TokenStore.open(str(place / "d")).verify()
    part.write_bytes(content)
    call = ("mix", "d", "web", "--weight-by", "duplicates", "--weight-map", "1:1,2-5:2,6-10:3", "--holdout", "30%")
    for output, more in (("m", ()), ("p", ("--plan",))):
        assert llmkit_here(*call, "-o", output, *more, cwd=place).returncode == 0
    mixed, planned = (OrderedTokens.open(str(place / name)) for name in "mp")
    found = [(mixed.id(i), mixed.epoch(i)) for i in range(mixed.documents)]
    assert found == [(planned.id(i), planned.epoch(i)) for i in range(planned.documents)]
    kept = TokenStore.open(str(place / "m" / "heldout"))
    out = {kept.id(i) for i in range(kept.documents)}
    expected = {f"{i}": 1 if i < 2 else 2 if i < 6 else 3 for i in range(12) if f"{i}" not in out}
    assert Counter(id for id, _ in found if "web" not in id) == expected and len(expected) < 12
    assert {count for id, count in Counter(id for id, _ in found).items() if "web" in id} == {1}
    for option, message in (("--to", b"--to jsonl cannot store"), ("--decode", b"cannot store")):
        value = ("jsonl",) if option == "--to" else ("--from", "shards")
        done = llmkit_here("tokenize", "d.jsonl", "-t", "tok", option, *value, "--keep-duplicates", cwd=place)
        assert done.returncode == 2 and message in done.stderr


@pytest.mark.parametrize(
    ("call", "code", "message"),
    [
        ("web --shuffle globl", 2, "unknown --shuffle 'globl'"),
        ("web --pack bestfit", 2, "unknown --pack 'bestfit'"),
        ("web --pack best-fit", 2, "--pack best-fit without --sequence-length"),
        ("web --sequence-length 1", 2, "--sequence-length"),
        ("web --sequence-length 9223372036854775808", 2, "--sequence-length"),
        ("gone --holdout 1%", 1, "gone: no such file or directory"),
        ("web --holdout 0", 2, "--holdout 0: not a fraction"),
        ("web --holdout 101%", 2, "--holdout 101%: not a fraction"),
        ("web --holdout 99.999999%", 1, "web: no tokens in this source"),
        ("web --holdout 1% --plan -o p.toml", 2, "--holdout writes a directory"),
        ("web --holdout 1% -o p.arrow", 2, "--holdout writes a directory"),
        ("web --weight-by duplicates", 2, "go together"),
        ("web --weight-by duplicates --weight-map 1:1", 1, "web: its shards hold no duplicate counts"),
        ("web --weight-by pages --weight-map 1:1", 2, "--weight-by pages is for documents"),
        ("docs.jsonl --weight-by duplicates --weight-map 1:0", 2, "'1:0' is not a range"),
        ("docs.jsonl --pack best-fit --sequence-length 8", 2, "--pack best-fit is for token shards"),
        ("docs.jsonl --holdout 1%", 2, "--holdout is for token shards"),
        ("--stages gone.toml", 1, "gone.toml: No such file"),
        ("--stages stages.toml --tokens 5k", 2, "--tokens 5000"),
        ("--stages empty.toml", 1, "nothing: no tokens in this source"),
        ("--stages small.toml", 1, "end is empty"),
        ("cut.arrow", 1, "cut.arrow: truncated"),
        ("wide.arrow", 1, "part-00001.arrow: uint32 tokens"),
        ("web wide", 1, "wide: uint32 tokens, but uint16 in web"),
    ],
)
def test_bad_choices(llmkit_here, place: Path, write_shards: Write, call: str, code: int, message: str) -> None:
    """Behaviour: exit code, one error line, no traceback, nothing under the output's name."""
    (place / "docs.jsonl").write_bytes(b'{"text": "x"}\n')
    if "empty" in call:
        write_shards(place / "nothing", [0, 0], "nothing")
        (place / "empty.toml").write_text('[sources]\na = "nothing"\n[[stage]]\nmix = { a = "x1" }\n')
    if "small" in call:
        (place / "small.toml").write_text(
            STAGES.replace('tokens = 2000\nmix = { web = 0.3, wiki = "x2" }', "tokens = 1\nmix = { web = 1 }")
        )
    if "cut" in call:
        write_shards(place / "whole.arrow", [50] * 40)
        (place / "cut.arrow").write_bytes((place / "whole.arrow").read_bytes()[:-900])
    if "wide" in call:
        widened(write_shards(place / "wide", [50] * 40, "wide", max_tokens_per_shard=1_000), "wide.arrow" in call)
        call = call.replace("wide.arrow", "wide")
    done = llmkit_here("mix", *(call if " -o " in call else f"{call} -o out").split(), cwd=place)
    errors = [line for line in done.stderr.decode().splitlines() if ": error: " in line]
    assert done.returncode == code and len(errors) == 1 and message in errors[0], done.stderr
    assert b"Traceback" not in done.stderr and not list(place.glob("out*")) + list(place.glob("p.*"))


def widened(directory: Path, only_last: bool) -> None:
    """Rewrite parts of a shard directory with 32-bit tokens, although 16 bits suffice."""
    import pyarrow as pa

    parts = sorted(directory.glob("*.arrow"))
    for path in parts[-1:] if only_last else parts:
        with pa.ipc.open_stream(path.read_bytes()) as stream:
            schema, batches = stream.schema, []
            while True:
                try:
                    batches.append(stream.read_next_batch_with_custom_metadata())
                except StopIteration:
                    break
        wide = schema.set(
            0, pa.field("tokens", pa.large_list(pa.field("item", pa.uint32(), nullable=False)), nullable=False)
        )
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, wide) as out:
            for batch, custom in batches:
                columns = [batch.column(0).cast(wide.field(0).type), *batch.columns[1:]]
                out.write_batch(pa.RecordBatch.from_arrays(columns, schema=wide), custom_metadata=custom)


def test_force_replaces_and_keeps(llmkit_here, place: Path) -> None:
    """Behaviour: -f replaces another mix completely, held-out documents included; files not made by llmkit are
    never replaced.
    """
    assert llmkit_here("mix", "web", "--holdout", "5%", "-o", "m", "-q", cwd=place).returncode == 0
    assert llmkit_here("mix", "web", "-o", "m", cwd=place).returncode == 1 and (place / "m" / "heldout").is_dir()
    assert llmkit_here("mix", "web", "-o", "m", "-f", "-q", cwd=place).returncode == 0
    assert not (place / "m" / "heldout").exists()
    (place / "mine").mkdir()
    (place / "mine" / "notes").write_text("x")
    done = llmkit_here("mix", "web", "-o", "mine", "-f", cwd=place)
    assert done.returncode == 1 and b"did not make" in done.stderr and (place / "mine" / "notes").exists()


KILLING = """
import os, random, shutil, signal, sys, time
import llmkit.mixing.order, llmkit.shards.writer, pyarrow.ipc
from llmkit.cli.main import run_command
def begin(output):
    child = os.fork()
    if not child:
        os._exit(run_command("mix", [*sys.argv[1:], "-q", "-o", output]))
    return child
assert run_command("mix", [*sys.argv[1:], "-q", "-n"]) == 0  # everything is imported now
start = time.monotonic()
assert os.waitpid(begin("whole"), 0)[1] == 0
took, draw, states = time.monotonic() - start, random.Random(5), set()
for n in range(100):
    if n >= 25 and "part" in states:
        break
    child = begin("killed")
    time.sleep(1.2 * took * draw.random())
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    states.add("whole" if os.path.isdir("killed") else "part" if os.path.isdir(".killed.partial") else "none")
    if os.path.isdir("killed"):
        os.rename("killed", "killed-%d" % len(os.listdir()))
assert os.waitpid(begin("killed"), 0)[1] == 0
print(*sorted(states))
"""


def test_killed_anywhere_and_run_again(place: Path) -> None:
    """Behaviour: SIGKILL at any moment leaves nothing or everything, and a rerun gives the bytes of an undisturbed run."""

    def bytes_of(directory: Path) -> dict[str, bytes]:
        return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}

    call = [sys.executable, "-c", KILLING, *CHOICES["all"].split()]
    states = subprocess.run(call, cwd=place, check=True, capture_output=True, text=True).stdout.split()
    assert "part" in states, states
    whole = bytes_of(place / "whole")
    assert len(whole) == 8 and all(bytes_of(directory) == whole for directory in place.glob("killed*"))
    assert not list(place.glob(".*"))
