"""Speed of `llmkit mix` beside a plain gather: the same documents, in the same order, copied from mapped files of raw ids into one file.

Three sources of synthetic uint16 ids, document lengths log-normal with a mean of 1,000 tokens, mixed 5:3:2 by weight. The plain gather is a loop of a
few lines over positions that were made beforehand, with one buffered output: no ids of documents, no digests, no lineage, no checks. It slices
`memoryview`s of the mapped files, the fastest that we found in plain Python, or `np.memmap`s, as most scripts do.

First the writing alone, in this process, the order known; then whole processes, where mix also opens the shards and makes the order. One core, in turn,
CPU time: writing to disk is waited for by both alike.

    python tests/bench/mix_speed.py --tokens 500M --rounds 5 > tests/bench/mix_speed.md
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
from peers import in_turn, measured, measured_python, ratios, spread

from llmkit.cli.shared.options import parse_count
from llmkit.io.record import Lineage
from llmkit.mixing.gather import write_ordered
from llmkit.mixing.order import OrderedTokens
from llmkit.shards.arrow import as_arrow, encode_sources
from llmkit.shards.reader import TokenStore
from llmkit.shards.tokenizer_info import TokenizerInfo
from llmkit.shards.writer import ShardWriter

SHARES = {"web": 5, "code": 3, "wiki": 2}
OURS, VIEWS, MEMMAP = "llmkit mix", "plain gather, memoryview", "plain gather, np.memmap"
PLAIN = """
import sys
import numpy as np

def gather(directory, target, way):
    sources, documents = np.load(f"{directory}/order.npy").tolist()
    files, starts = [], []
    for name in ("web", "code", "wiki"):
        ids = np.memmap(f"{directory}/{name}.bin", np.uint16, "r")
        files.append(ids if way == "memmap" else memoryview(ids))
        starts.append([0, *np.cumsum(np.load(f"{directory}/{name}.npy")).tolist()])
    with open(target, "wb", 1 << 20) as out:
        for source, document in zip(sources, documents):
            at = starts[source]
            out.write(files[source][at[document] : at[document + 1]])
"""


def make(place: Path, tokens: int) -> OrderedTokens:
    """Shards and raw ids of each source, and the order of their mix."""
    random = np.random.default_rng(0)
    for name, share in SHARES.items():
        count = tokens * share // 10_000
        lengths = np.maximum(2, random.lognormal(np.log(1000) - 0.5, 1.0, count)).astype(np.int64)
        tokens_of = random.integers(0, 49_152, int(lengths.sum()), dtype=np.uint16)
        with ShardWriter(str(place / name), TokenizerInfo("xxh3:0", 49_152, 0), Lineage("tokenize")) as writer:
            ids = as_arrow([f"<urn:uuid:{name}-{i:032x}>" for i in range(count)])
            writer.extend(tokens_of, lengths, ids, encode_sources([name] * count))
            writer.finish({}, [])
        tokens_of.tofile(place / f"{name}.bin")
        np.save(place / f"{name}.npy", lengths)
    measured("mix", *weights(place), "--plan", "-q", "-o", place / "plan.toml")
    ordered = OrderedTokens.open(str(place / "plan.toml"))
    assert isinstance(ordered, OrderedTokens)
    np.save(place / "order.npy", np.stack([ordered.order.source, ordered.order.document]))
    return ordered


def weights(place: Path) -> list[str]:
    return [f"{place / name}:{share}" for name, share in SHARES.items()]


def seconds(work: Callable[[], object]) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin


def anew(output: Path, work: Callable[[], float]) -> float:
    """What `work` gives, with nothing in its way: whoever has to throw an old output away pays for that."""
    if output.is_dir():
        shutil.rmtree(output)
    output.unlink(missing_ok=True)
    return work()


def write(ordered: OrderedTokens, target: Path) -> None:
    with ShardWriter(str(target), ordered.tokenizer, Lineage("mix"), force=True, epochs=True) as writer:
        write_ordered(ordered, writer, lambda number: None)
        writer.finish({}, [])


def anonymous(place: Path) -> float:
    """Peak megabytes of one mix that are its own, not pages of the files that it maps."""
    call = [sys.executable, "-m", "llmkit", "mix", *weights(place), "-q", "-f", "-o", str(place / "mix")]
    process, peak = subprocess.Popen(call), 0
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        peak = max(peak, int(status.split("RssAnon:")[1].split()[0]) if "RssAnon:" in status else 0)
        time.sleep(0.005)
    return peak / 1024


def show(title: str, found: Mapping[str, list[float]], size: float) -> None:
    print(
        f"\n{title}\n\n| what | CPU s, median (least to most) | MB/s, median | speed of mix beside it |\n|---|---:|---:|---:|"
    )
    for way, values in found.items():
        beside = "1" if way == OURS else spread(ratios(values, found[OURS]), 2)
        print(f"| {way} | {spread(values, 2)} | {size / statistics.median(values):.0f} | {beside} |")


def main() -> None:
    parser = argparse.ArgumentParser(description="llmkit mix beside a plain gather")
    parser.add_argument("--tokens", default="200M", help="tokens of the sources")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    plain: dict[str, Callable[..., object]] = {}
    exec(PLAIN, plain)
    os.sched_setaffinity(0, {0})
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        ordered = make(place, parse_count(given.tokens))
        outputs = {OURS: place / "mix", VIEWS: place / "views.bin", MEMMAP: place / "memmap.bin"}
        kinds = {VIEWS: "views", MEMMAP: "memmap"}
        inside = {OURS: partial(seconds, partial(write, ordered, outputs[OURS]))} | {
            way: partial(seconds, partial(plain["gather"], place, outputs[way], kind)) for way, kind in kinds.items()
        }
        inside = {way: partial(anew, outputs[way], work) for way, work in inside.items()}
        in_turn(inside, 1)  # fills the page cache
        alone = in_turn(inside, given.rounds)
        script = PLAIN + "gather(*sys.argv[1:])"
        processes: dict[str, Callable[[], float]] = {
            OURS: lambda: measured("mix", *weights(place), "-q", "-o", outputs[OURS])[0],
            VIEWS: lambda: measured_python("-c", script, place, outputs[VIEWS], kinds[VIEWS])[0],
            MEMMAP: lambda: measured_python("-c", script, place, outputs[MEMMAP], kinds[MEMMAP])[0],
        }
        whole = in_turn({way: partial(anew, outputs[way], work) for way, work in processes.items()}, given.rounds)
        peak = anonymous(place)
        mixed, copied = TokenStore.open(str(place / "mix")), np.memmap(place / "views.bin", np.uint16, "r")
        assert mixed.tokens == len(copied), "not the same tokens"
        for start in range(0, mixed.tokens, 1 << 24):
            stop = min(start + (1 << 24), mixed.tokens)
            assert np.array_equal(mixed.span(start, stop), copied[start:stop]), "not the same tokens"
        size = mixed.tokens * 2 / 1e6
        command = f"python tests/bench/{' '.join([Path(sys.argv[0]).name, *sys.argv[1:]])}"
        cores = f"{datetime.date.today()}, Python {platform.python_version()}, {os.cpu_count()} cores; `{command}`"
        print(
            f"# Speed of `llmkit mix`\n\n{cores}\n\n{mixed.documents:,} documents, {size:.0f} MB of tokens, {given.rounds} rounds in turn, one core."
        )
        show("The writing alone, the order known:", alone, size)
        show("Whole processes, start-up included:", whole, size)
        print(f"\nmix holds {peak:.0f} MB at most beside the pages of the files that it maps.")


if __name__ == "__main__":
    main()
