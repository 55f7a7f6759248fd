"""Speed of `llmkit mix` beside a plain gather: the same documents, in the same order, copied from mapped files of raw ids into one file.

Three sources of synthetic uint16 ids, document lengths log-normal with a mean of 1,000 tokens, mixed 5:3:2 by weight, each once. The plain gather is
what one writes in a few lines of Python, tuned: views of the mapped files, positions as lists, one buffered output; no ids, no digests, no lineage,
no checks, and the order made beforehand. A second one slices `np.memmap` in the same loop, as most scripts do.

Both are given their whole processes, start-up included, on one core, in turn; CPU time.

    python tests/bench/mix_speed.py --tokens 200M --rounds 5 > tests/bench/mix_speed.md
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path

from peers import in_turn, measured, measured_python, ratios, spread

SHARES = {"web": 5, "code": 3, "wiki": 2}
PLAIN = """
import sys
import numpy as np

directory, target, way = sys.argv[1:]
sources, documents = np.load(f"{directory}/order.npy").tolist()
files, starts = [], []
for name in ("web", "code", "wiki"):
    ids = np.memmap(f"{directory}/{name}.bin", np.uint16, "r")
    files.append(memoryview(ids) if way == "views" else ids)
    starts.append([0, *np.cumsum(np.load(f"{directory}/{name}.npy")).tolist()])
with open(target, "wb", 1 << 20) as out:
    for source, document in zip(sources, documents):
        at = starts[source]
        out.write(files[source][at[document] : at[document + 1]])
"""


def make(directory: Path, tokens: int) -> None:
    """Shards and raw ids of each source, and the order of their mix."""
    import numpy as np

    from llmkit.io.lineage import Lineage
    from llmkit.io.order import OrderedTokens
    from llmkit.io.shards import ShardWriter, TokenizerInfo

    random = np.random.default_rng(0)
    for name, share in SHARES.items():
        count = tokens * share // 10_000
        lengths = np.maximum(2, random.lognormal(np.log(1000) - 0.5, 1.0, count)).astype(np.int64)
        ids = random.integers(0, 49_152, int(lengths.sum()), dtype=np.uint16)
        names = [f"<urn:uuid:{name}-{i:032x}>".encode() for i in range(count)]
        with ShardWriter(str(directory / name), TokenizerInfo("xxh3:0", 49_152, 0), Lineage("tokenize")) as writer:
            writer.extend(ids, lengths, names, [name] * count)
            writer.finish({}, [])
        ids.tofile(directory / f"{name}.bin")
        np.save(directory / f"{name}.npy", lengths)
    measured("mix", *weights(directory), "--plan", "-q", "-o", directory / "plan.toml")
    order = OrderedTokens.open(str(directory / "plan.toml")).order  # type: ignore[union-attr]
    np.save(directory / "order.npy", np.stack([order.source, order.document]))


def weights(directory: Path) -> list[str]:
    return [f"{directory / name}:{share}" for name, share in SHARES.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description="llmkit mix beside a plain gather")
    parser.add_argument("--tokens", default="200M", help="tokens of the sources")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    from llmkit.cli.options import parse_count

    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", "/tmp")) as name:
        place = Path(name)
        make(place, parse_count(given.tokens))
        calls = {
            "llmkit mix": partial(measured, "mix", *weights(place), "-q", "-f", "-o", place / "mix"),
            "plain gather, views": partial(measured_python, "-c", PLAIN, place, place / "plain.bin", "views"),
            "plain gather, np.memmap": partial(measured_python, "-c", PLAIN, place, place / "memmap.bin", "memmap"),
        }
        found = in_turn(calls, given.rounds + 1)
        from llmkit.io.shards import TokenStore

        mixed = TokenStore.open(str(place / "mix"))
        plain = (place / "plain.bin").read_bytes()
        assert mixed.span(0, mixed.tokens).tobytes() == plain == (place / "memmap.bin").read_bytes(), "not the same"
        size, documents = len(plain) / 1e6, mixed.documents
    seconds = {way: [run[0] for run in runs[1:]] for way, runs in found.items()}  # the first round fills the page cache
    ours = seconds["llmkit mix"]
    print(
        f"# Speed of `llmkit mix`\n\n{datetime.date.today()}, Python {platform.python_version()}, {os.cpu_count()} cores; ",
        end="",
    )
    print(f"`python tests/bench/{' '.join([Path(sys.argv[0]).name, *sys.argv[1:]])}`\n")
    print(
        f"{documents:,} documents, {size:.0f} MB of tokens; {given.rounds} rounds in turn, one core, CPU time of whole processes.\n"
    )
    print(
        "| what | CPU s, median (least to most) | MB/s, median | its speed beside mix's | peak MB |\n|---|---:|---:|---:|---:|"
    )
    for way, values in seconds.items():
        beside = "1" if values is ours else spread(ratios(ours, values), 2)
        peak = max(run[2] for run in found[way])
        print(f"| {way} | {spread(values, 2)} | {size / statistics.median(values):.0f} | {beside} | {peak:.0f} |")
    share = ratios(seconds["plain gather, views"], ours)
    print(f"\nmix runs at {spread([100 * value for value in share], 0)} % of the speed of the faster plain gather.")


if __name__ == "__main__":
    main()
