"""`llmkit mix` on the command line."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import orjson
import pytest
import zstandard

from llmkit.lineage.formats import read_lineage
from llmkit.mixing.order import OrderedTokens
from llmkit.shards.reader import TokenStore

Write = Callable[..., Path]


@pytest.fixture
def place(tmp_path: Path, write_shards: Write) -> Path:
    """web (300 documents), code (100) and wiki (10) as shards."""
    random = np.random.default_rng(0)
    for name, documents in (("web", 300), ("code", 100), ("wiki", 10)):
        write_shards(tmp_path / name, random.integers(5, 60, documents).tolist(), name, max_tokens_per_shard=4_000)
    return tmp_path


def flat(store: TokenStore | OrderedTokens) -> list[int]:
    return store.span(0, store.tokens).tolist()


def test_shares_table_and_epochs(llmkit, place: Path) -> None:
    """Behaviour: weights share what the multiplier leaves; table and summary report the result; epochs count
    repetitions.
    """
    done = llmkit(
        "mix", "web/:0.7", "code/:0.2", "wiki/:x6", "--tokens", "10k", "-o", "mix/", "--summary", "s.json", cwd=place
    )
    assert done.returncode == 0, done.stderr
    mixed = TokenStore.open(str(place / "mix"))
    tokens: Counter[str] = Counter()
    for i in range(mixed.documents):
        tokens[mixed.source(i)] += len(mixed.document(i))
    wiki = TokenStore.open(str(place / "wiki")).tokens
    assert tokens["wiki"] == 6 * wiki
    assert abs(tokens["web"] - (10_000 - 6 * wiki) * 7 / 9) <= 60
    assert Counter(mixed.epoch(i) for i in range(mixed.documents) if mixed.source(i) == "wiki") == dict.fromkeys(
        range(6), 10
    )
    rows = {row["source"]: row for row in json.loads((place / "s.json").read_bytes())["sources"]}
    assert rows["wiki/"]["epochs"] == 6 and rows["web/"]["tokens"] == tokens["web"]
    assert abs(sum(row["share"] for row in rows.values()) - 1) < 1e-9
    assert b"6.000" in done.stderr and f"{tokens['web']:,}".encode() in done.stderr
    record = read_lineage(place / "mix")
    assert record is not None and record["options"]["specs"] == [":0.7", ":0.2", ":x6"]
    assert [item["name"] for item in record["inputs"]] == ["web", "code", "wiki"]
    assert record["counts"]["tokens"] == mixed.tokens and record["digest"] == mixed.inputs[0].digest
    assert llmkit("lineage", "mix", "--check", cwd=place).returncode == 0


@pytest.mark.parametrize("missing", ["", "heldout", "tokenizer.json"])
def test_a_mix_that_lacks_a_file_is_not_up_to_date(llmkit_here, place: Path, missing: str) -> None:
    """Behaviour: a repeated command does nothing only if the whole output is there; else it says so, and -f is needed."""
    call = ("mix", "web", "code", "--holdout", "20%", "-o", "mix")
    assert llmkit_here(*call, cwd=place).returncode == 0
    if missing == "heldout":
        shutil.rmtree(place / "mix" / missing)
    elif missing:
        (place / "mix" / missing).unlink()
    done = llmkit_here(*call, cwd=place)
    if missing:
        assert done.returncode == 1 and b"missing or was changed" in done.stderr and b"-f" in done.stderr
    else:
        assert done.returncode == 0 and b"nothing to do" in done.stderr


def test_plan_and_shards_are_one_order(llmkit, place: Path) -> None:
    """Property: following the plan gives exactly the token stream that mix writes; so do a single file and any -j."""
    call = ("mix", "web:0.5", "code:0.3", "wiki:0.2", "--tokens", "30k", "--seed", "3", "-q")
    for output in ("mix", "plan/", "plan.toml", "one.arrow", "two.arrow"):
        more = ["--plan"] if "plan" in output else ["-j", "2"] if output == "two.arrow" else []
        assert llmkit(*call, "-o", output, *more, cwd=place).returncode == 0
    assert (place / "one.arrow").read_bytes() == (place / "two.arrow").read_bytes()
    mixed = TokenStore.open(str(place / "mix"))
    for name in ("plan", "plan.toml", "plan/plan.toml", "one.arrow"):
        other = OrderedTokens.open(str(place / name))
        assert flat(other) == flat(mixed) and np.array_equal(other.offsets, mixed.offsets)
        for i in range(mixed.documents):
            assert (other.id(i), other.source(i), other.epoch(i)) == (mixed.id(i), mixed.source(i), mixed.epoch(i))
    text = (place / "plan.toml").read_text()
    assert str(place) not in text and (record := read_lineage(place / "plan")) and record["command"] == "mix"
    assert llmkit(*call[:-3], "--seed", "4", "-q", "-o", "other.arrow", cwd=place).returncode == 0
    assert flat(TokenStore.open(str(place / "other.arrow"))) != flat(mixed)


def test_asking_for_more_than_there_is(llmkit, place: Path) -> None:
    """Behaviour: the source is repeated, with a warning that gives the epochs, and the total is as requested."""
    done = llmkit("mix", "wiki", "--tokens", "1k", "-o", "m.arrow", cwd=place)
    held = TokenStore.open(str(place / "wiki")).tokens
    assert (
        f"warning: wiki holds {held:,} tokens and gives 1,000: repeated, {1000 / held:.2f} epochs"
        in done.stderr.decode()
    )
    assert abs(TokenStore.open(str(place / "m.arrow")).tokens - 1_000) <= 30


def test_without_tokens_nothing_is_repeated(llmkit, place: Path) -> None:
    """Behaviour: weights are scaled to the first source to run out; bare paths are taken completely."""
    done = llmkit("mix", "web:1", "wiki:1", "--json", "-q", "-n", cwd=place)
    rows = json.loads(done.stderr)["sources"]
    assert [row["epochs"] for row in rows] == [1, 1] and rows[1]["multiplier"] == 1.0
    assert abs(rows[0]["tokens"] - rows[1]["tokens"]) <= 30
    rows = json.loads(llmkit("mix", "web", "wiki", "--json", "-q", "-n", cwd=place).stderr)["sources"]
    assert [row["multiplier"] for row in rows] == [1.0, 1.0]
    assert sorted(p.name for p in place.iterdir()) == ["code", "web", "wiki"]


def test_stream_in_stream_out(llmkit, place: Path) -> None:
    """Behaviour: `mix -` reads shards from a pipe and writes them to one; lineage records the input as `-`."""
    upstream = llmkit("mix", "web", cwd=place).stdout
    done = llmkit("mix", "-", "--tokens", "2k", cwd=place, stdin=upstream)
    assert done.returncode == 0, done.stderr
    (place / "out.arrow").write_bytes(done.stdout)
    assert abs(TokenStore.open(str(place / "out.arrow")).tokens - 2_000) <= 30
    record = read_lineage(place / "out.arrow")
    assert (
        record is not None and record["inputs"][0]["name"] == "-" and record["inputs"][0]["lineage"]["command"] == "mix"
    )
    cut = llmkit("mix", "--tokens", "2k", cwd=place, stdin=upstream[: len(upstream) // 2])
    assert cut.returncode == 1 and b"<stdin>: truncated" in cut.stderr


def test_repeated_run_does_nothing(llmkit, place: Path) -> None:
    """Behaviour: the recorded lineage decides whether the output is up to date; another seed is another mix."""
    call = ("mix", "web:1", "wiki:2", "--tokens", "2k", "-o", "mix")
    assert llmkit(*call, cwd=place).returncode == 0
    again = llmkit(*call, cwd=place)
    assert again.returncode == 0 and b"up to date" in again.stderr
    other = llmkit(*call, "--seed", "1", cwd=place)
    assert other.returncode == 1 and b"mix exists" in other.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["web:0"], 2, "'0' is not above zero"),
        (["web:-1"], 2, "'-1' is not an amount"),
        (["web:nan"], 2, "'nan' is not an amount"),
        (["web:half"], 2, "'half' is not an amount"),
        (["web", "code:1"], 2, "web: no weight"),
        (["web:1", "--tokens", "0"], 2, "--tokens 0"),
        (["nowhere:1"], 1, "nowhere: no such file"),
        (["empty"], 1, "no token shards"),
        (["web", "docs.jsonl"], 2, "web holds tokens, docs.jsonl documents"),
        (["web", "other.arrow"], 1, "another tokenizer"),
        (["web", "-t", "web"], 2, "--tokenizer is for documents"),
        (["docs.jsonl", "--plan"], 2, "--plan is for token shards"),
        (["-", "--plan"], 2, "stdin has none"),
        (["-", "-"], 2, "more than once"),
        (["web:1", "code:1", "./web:2"], 2, "web and ./web hold the same documents"),
        (["*.jsonl"], 2, "a pattern is not one source"),
        (["web", "--tokens", "1"], 1, "the mix is empty"),
    ],
)
def test_bad_calls(llmkit, place: Path, write_shards: Write, arguments: list[str], code: int, message: str) -> None:
    """Behaviour: exit code, one error line, and nothing under the output's name."""
    from llmkit.shards.tokenizer_info import TokenizerInfo

    (place / "empty").mkdir()
    (place / "docs.jsonl").write_bytes(b'{"text": "x"}\n')
    write_shards(place / "other.arrow", [5], tokenizer=TokenizerInfo("xxh3:0", 300, 0))
    done = llmkit("mix", *arguments, "-o", "out", cwd=place)
    assert done.returncode == code and message in done.stderr.decode() and b"Traceback" not in done.stderr
    assert not (place / "out").exists()


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    for name, count, size in (("prose", 200, 40), ("code", 50, 90)):
        lines = [
            orjson.dumps({"id": f"{name}{i}", "text": name[0] * (size + i % 7), "n": i}) + b"\n" for i in range(count)
        ]
        (tmp_path / f"{name}.jsonl.zst").write_bytes(zstandard.compress(b"".join(lines)))
    return tmp_path


def test_documents(llmkit, texts: Path) -> None:
    """Behaviour: documents keep their bytes; shares hold by bytes / 4; -j, pipes and files give the same output."""
    call = ("mix", "prose.jsonl.zst:0.5", "code.jsonl.zst:0.5", "--tokens", "1500")
    one = llmkit(*call, "--plain", cwd=texts)
    assert one.returncode == 0, one.stderr
    assert llmkit(*call, "--plain", "-j", "2", cwd=texts).stdout == one.stdout
    assert llmkit(*call, "-o", "mix.jsonl", cwd=texts).returncode == 0
    assert (texts / "mix.jsonl").read_bytes() == one.stdout
    originals = {
        line
        for name in ("prose", "code")
        for line in zstandard.decompress((texts / f"{name}.jsonl.zst").read_bytes(), 1 << 20).splitlines()
    }
    lines = one.stdout.splitlines()
    assert set(lines) <= originals
    sizes: Counter[str] = Counter()
    for line in lines:
        row = orjson.loads(line)
        sizes[row["text"][0]] += -(-len(row["text"]) // 4)
    assert abs(sizes["p"] - 750) <= 12 and abs(sizes["c"] - 750) <= 24
    stdin = (texts / "prose.jsonl.zst").read_bytes()
    piped = llmkit("mix", "/dev/stdin:0.5", "code.jsonl.zst:0.5", "--tokens", "1500", "--plain", cwd=texts, stdin=stdin)
    assert piped.stdout == one.stdout


def test_documents_by_directory_and_tokenizer(llmkit, texts: Path, small_tokenizer: dict[str, str]) -> None:
    """Behaviour: a directory of files is one source; -t counts as `tokenize` does; bad lines are reported with
    their file.
    """
    (texts / "tok").mkdir()
    for name, text in small_tokenizer.items():
        (texts / "tok" / name).write_text(text)
    (texts / "all").mkdir()
    for name in ("prose.jsonl.zst", "code.jsonl.zst"):
        (texts / name).rename(texts / "all" / name)
    done = llmkit("mix", "all/", "-t", "tok", "--json", "-q", "-o", "m.jsonl.zst", cwd=texts)
    row = json.loads(done.stderr)["sources"][0]
    # One letter repeated merges with nothing in this tokenizer: a token a letter, and the end of text.
    assert (
        row["start_tokens"] == row["tokens"] == sum(41 + i % 7 for i in range(200)) + sum(91 + i % 7 for i in range(50))
    )
    record = read_lineage(texts / "m.jsonl.zst")
    assert record is not None and [(item["role"], item["name"]) for item in record["inputs"]] == [
        ("tokenizer", "tok"),
        ("input", "all"),
    ]
    (texts / "all" / "z.jsonl").write_bytes(b"{}\n")
    bad = llmkit("mix", "all/", cwd=texts)
    assert bad.returncode == 1 and b"z.jsonl:1: no field 'text'" in bad.stderr


@pytest.mark.parametrize("options", [[], ["--tokens", "2k"]])
def test_missed_weights_are_reported(llmkit, place: Path, options: list[str]) -> None:
    """Behaviour: shares that miss the weights by over 1 % are warned of, with those reached; exact ones are not."""
    call = ("mix", "web/:0.5", "wiki/:0.5", *options, "--seed", "3", "-o", "m", "-f")
    done = llmkit(*call, cwd=place)
    assert done.returncode == 0, done.stderr
    store = TokenStore.open(str(place / "m"))
    web = sum(len(store.document(i)) for i in range(store.documents) if store.source(i) == "web") / store.tokens
    missed = abs(web - 0.5) > 0.005
    assert missed == (f"shares are web/ {web:.2%} instead of 50.00%".encode() in done.stderr)
    assert b"shares are" not in llmkit(*call, "--cut-last", cwd=place).stderr
