"""`llmkit dedup` beside datatrove's MinHash, rensa and dolma: what they find in a corpus with known copies, and at what cost; prints a dated table.

    python tests/bench/dedup_speed.py [--shared ../shared/data] [--pairs 5] > tests/bench/dedup_speed.md

Corpus: real documents of at least 60 words, of which a seeded choice comes again, the same or with 1 to 5 % of its words replaced, all shuffled.
Truth is a Jaccard similarity of word 5-grams counted here in plain Python, words as datatrove normalises them: recall over the made copies whose
similarity to their original is at or over 0.75 (found: not both of the two were kept), precision over what was removed: whether any kept document of
the corpus is as similar. Cost: long-lived processes pinned to one core, in turn, CPU time. The peers' environments are made under .cache/ on first use.
"""

from __future__ import annotations

import datetime
import os
import platform
import random
import statistics
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

from filter_parity import REQUIREMENTS
from filter_speed import documents
from peers import asked, call, compete, ratios, rows_of, spread, store

from llmkit.corpus.dedup.normalise import LOOSE, normaliser

PEERS = {
    "datatrove": [*REQUIREMENTS, "datatrove[processing]==0.10.1"],
    "rensa": ["rensa==0.5.0", "orjson", "zstandard"],
    "dolma": ["dolma==1.2.1", "orjson", "zstandard"],
}
CORPUS_BYTES = 12_000_000
THRESHOLD = 0.75

OURS = """
import os, sys, time
from llmkit.cli.main import run_command
def work(source, target):
    if run_command("dedup", [source, "-o", target, "-f", "-q", *{options!r}]): sys.exit("llmkit failed")
"""
WORKER = {
    "llmkit": OURS.format(options=[]),
    "llmkit-exact": OURS.format(options=["--method", "exact", "--no-counts"]),
    "datatrove": """
import os, sys, time, shutil
from loguru import logger
logger.remove()
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter
from datatrove.pipeline.dedup import MinhashDedupSignature, MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter
from datatrove.pipeline.dedup.minhash import MinhashConfig
config = MinhashConfig(n_grams=5, num_buckets=14, hashes_per_bucket=8)
def work(source, target):
    base = target + ".d"
    shutil.rmtree(base, ignore_errors=True)
    def reader(): return JsonlReader(os.path.dirname(source), glob_pattern=os.path.basename(source), compression="zstd")
    def run(*steps, tasks=1): LocalPipelineExecutor(list(steps), tasks=tasks, workers=1, skip_completed=False, logging_dir=base + "/logs").run()
    run(reader(), MinhashDedupSignature(base + "/signatures", config=config))
    run(MinhashDedupBuckets(base + "/signatures", base + "/buckets", config=config), tasks=14)
    run(MinhashDedupCluster(base + "/buckets", base + "/remove", config=config))
    run(reader(), MinhashDedupFilter(base + "/remove"), JsonlWriter(target + ".out", output_filename="out.jsonl.zst", compression="zstd"))
    shutil.move(target + ".out/out.jsonl.zst", target)
""",
    "rensa": """
import os, sys, time, io, re
import orjson, zstandard
from rensa import RMinHash, RMinHashLSH
def work(source, target):
    lsh, kept = RMinHashLSH(threshold=0.75, num_perm=112, num_bands=14), []
    with open(source, "rb") as raw, open(target, "wb") as out, zstandard.ZstdCompressor(1).stream_writer(out) as sink:
        for i, line in enumerate(io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw))):
            words = re.findall(r"\\w+", orjson.loads(line)["text"].lower())
            m = RMinHash(num_perm=112, seed=42)
            m.update([" ".join(words[j : j + 5]) for j in range(max(1, len(words) - 4))])
            if not any(m.jaccard(kept[k]) >= 0.75 for k in lsh.query(m)):
                lsh.insert(len(kept), m)
                kept.append(m)
                sink.write(line)
""",
    "dolma": """
import os, sys, time, gzip, json, io, shutil
import zstandard
from dolma import deduper
def work(source, target):
    base = target + ".d"
    shutil.rmtree(base, ignore_errors=True)
    os.makedirs(base + "/documents"); os.makedirs(base + "/attributes")
    with open(source, "rb") as raw, gzip.open(base + "/documents/0.json.gz", "wb", 1) as out:
        shutil.copyfileobj(zstandard.ZstdDecompressor().stream_reader(raw), out)
    before = time.process_time()
    deduper({"documents": [base + "/documents/0.json.gz"], "work_dir": {"input": base + "/i", "output": base + "/o"},
        "dedupe": {"name": "d", "documents": {"key": "$.text", "attribute_name": "duplicate"}, "skip_empty": True},
        "bloom_filter": {"file": base + "/bloom", "read_only": False, "size_in_bytes": 0, "estimated_doc_count": 20000, "desired_false_positive_rate": 1e-6},
        "processes": 1})

""",
}
WHAT = {
    "llmkit": "llmkit dedup (minhash, verified)",
    "datatrove": "datatrove 0.10.1: signatures, buckets, clusters, filter",
    "rensa": "rensa 0.5.0: shingles in Python, its LSH, its similarity",
    "llmkit-exact": "llmkit dedup --method exact --no-counts",
    "dolma": "dolma 1.2.1: Bloom filter over whole texts, its gzip input made first",
}


def corpus(shared: Path) -> list[dict[str, str]]:
    """Documents; ids say which original they come from and how much was changed: `d12` `d12.copy` `d12.3%`."""
    random_ = random.Random(20)
    rows, size = [], 0
    for i, row in enumerate(documents(shared)):
        words = row["text"].split()
        if len(words) < 60 or len(row["text"]) > 60_000:
            continue
        rows.append({"id": f"d{i}", "text": row["text"]})
        if random_.random() < 0.1:
            rows.append({"id": f"d{i}.copy", "text": row["text"]})
        if random_.random() < 0.2:
            percent = random_.randint(1, 5)
            text = " ".join(f"w{random_.randrange(10**6):x}" if random_.random() < percent / 100 else w for w in words)
            rows.append({"id": f"d{i}.{percent}%", "text": text})
        size += sum(len(new["text"].encode()) for new in rows[-3:] if new["id"].startswith(f"d{i}"))
        if size > CORPUS_BYTES:
            break
    random_.shuffle(rows)
    return rows


def grams(text: str) -> frozenset[str]:
    words = normaliser(LOOSE)(text).split(" ")
    return frozenset(" ".join(words[i : i + 5]) for i in range(len(words) - 4))


def jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    return len(a & b) / max(1, len(a | b))


def found(rows: list[dict[str, str]], sets: dict[str, frozenset[str]], output: Path) -> tuple[str, str, str]:
    """Recall of copies, recall of edited ones at or over the threshold, precision."""
    kept = {row["id"] for row in rows_of(output)}
    holders = defaultdict(list)  # kept documents by 5-gram
    for name in kept:
        for gram in sets[name]:
            holders[gram].append(name)
    removed = [row["id"] for row in rows if row["id"] not in kept]
    right = 0
    for name in removed:
        shared = Counter(other for gram in sets[name] for other in holders[gram])
        right += any(n / (len(sets[name]) + len(sets[other]) - n) >= THRESHOLD for other, n in shared.items())
    copies = near = copies_found = near_found = 0
    for name in sets:
        original, dot, kind = name.partition(".")
        gone = not (name in kept and original in kept)
        if kind == "copy":
            copies += 1
            copies_found += gone
        elif dot and jaccard(sets[name], sets[original]) >= THRESHOLD:
            near += 1
            near_found += gone
    share = lambda part, whole: f"{100 * part / max(1, whole):.1f} % ({part:,} of {whole:,})"  # noqa: E731
    return share(copies_found, copies), share(near_found, near), share(right, len(removed))


def main() -> None:
    given, pythons = asked(__doc__, PEERS)
    rows = corpus(given.shared)
    sets = {row["id"]: grams(row["text"]) for row in rows}
    with tempfile.TemporaryDirectory() as temporary:
        here = Path(temporary)
        megabytes = store(rows, here / "corpus.jsonl.zst")
        store(rows[:20], here / "warm.jsonl.zst")
        workers = {name: (pythons.get(name, sys.executable), WORKER[name]) for name in WHAT}
        seconds, memory = compete(workers, given.pairs, here / "corpus.jsonl.zst", here / "warm.jsonl.zst")
        print(
            f"# Deduplication: what is found, and at what cost\n\n{datetime.date.today()}, Python {platform.python_version()}, ",
            end="",
        )
        print(f"{os.cpu_count()} cores; `{call()}`\n")
        print(
            f"{len(rows):,} documents, {megabytes:.1f} MB of text, JSONL.zst in and out; {given.pairs} rounds in turn, one core, CPU time.\n"
        )
        print(
            "| what | MB/s, median | CPU time beside llmkit's minhash, median (minimum to maximum) | peak MB |\n|---|---:|---:|---:|"
        )
        for name, runs in seconds.items():
            ratio = spread(ratios(runs, seconds["llmkit"]), 2)
            print(f"| {WHAT[name]} | {megabytes / statistics.median(runs):.2f} | {ratio} | {memory[name]:.0f} |")
        print(
            "\n| what | exact copies found | edited copies at 0.75 or more found | removed with a kept one at 0.75 |\n|---|---:|---:|---:|"
        )
        for name in ("llmkit", "datatrove", "rensa"):
            print(f"| {WHAT[name]} | " + " | ".join(found(rows, sets, here / f"{name}.jsonl.zst")) + " |")


if __name__ == "__main__":
    main()
