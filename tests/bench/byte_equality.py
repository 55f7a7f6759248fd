"""The same pipeline with two checkouts of llmkit: are the outputs equal, to the byte? For changes that must not change results.

    python tests/bench/byte_equality.py OLD NEW [--old-names] [--rebuild] [--work DIR]

OLD and NEW are checkouts; both run with this interpreter, in OLD/ and NEW/ under the work directory, on the same corpus. Every output file is compared
by the digest of its bytes. Where bytes differ, the lineage record is taken out and the content compared: a record may have fields that the
other one lacks (an option was renamed), but a field of both must have one value. Logs are compared without times. Beyond that, NEW resumes a run that OLD
was stopped in, and checks, prints and, with --rebuild, makes again what OLD made.

An option that NEW has renamed (RENAMED) is given to each checkout in the spelling that its help shows; --old-names gives both the old one.

Prints a table of what is not equal, then `N files equal, N differ`; exit code 1 where something differs. Cost: five minutes of CPU time, so half of that on
two quiet cores, a minute more with --rebuild, and one or two for each checkout that has not compiled its kernels yet.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import zstandard

# (command, old spelling, new spelling)
RENAMED = (
    ("train", "--min-lr", "--final-lr-fraction"),
    ("train", "--samples", "--prompts"),
    ("anneal", "--from", "--step"),
    ("anneal", "--to", "--final-lr-fraction"),
)
MODEL = {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 1024, "hidden_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 160, "max_position_embeddings": 128,
    "tie_word_embeddings": True, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
}  # fmt: skip
TRAIN = "llmkit train mix/ -m model.json --tokens 16k --batch-size 4 --lr 3e-3 --min-lr 0.2 --save-every 8 --heldout heldout/ --eval-every 8 --samples prompts.txt --seed 1 -q"  # fmt: skip
STOPPED = 20  # steps of 32 after which the run that is resumed gets SIGTERM
# In the old spelling. Outputs are what appears in the directory.
PIPELINE = f"""
llmkit filter docs.jsonl prose.jsonl --preset technical.toml --rejects dropped.jsonl.zst -j 2 -q | llmkit dedup --method minhash --rejects copies.jsonl.zst -q -o text.jsonl.zst
llmkit filter code.jsonl --preset technical.toml -q -o code.jsonl.zst
llmkit dedup text.jsonl.zst --method exact -q -o exact.parquet
llmkit vocab text.jsonl.zst code.jsonl.zst --size 1024 --pattern qwen2 -q -o tok/
llmkit vocab report tok/ --text text.jsonl.zst -q -o fertility.json
llmkit vocab advise text.jsonl.zst --model-size tiny,5m --largest 4096 -q -o advice.json
llmkit tokenize text.jsonl.zst -t tok/ -j 2 -q -o text/
llmkit tokenize code.jsonl.zst -t tok/ -q -o code/
llmkit tokenize heldout.jsonl -t tok/ -q -o heldout/
llmkit tokenize code/ --to nanogpt -q -o code.bin
llmkit mix text/:0.75 code/:0.25 --tokens 20k --seed 1 -q -o mix/
llmkit mix text/:0.9 code/:0.1 --tokens 20k --seed 2 --plan -q -o plan/
{TRAIN} -o run/
llmkit train plan/ -m model.json --tokens 8k --batch-size 4 --schedule wsd --decay 0.4 --min-lr 0.05 --optimizer muon --save-every 8 -q -o muon/
llmkit anneal run/ plan/ --tokens 6k --from 24 --to 0.05 --save-every 4 -q -o annealed/
llmkit average annealed/ --last 3 -q -o averaged/
llmkit average run/ annealed/ --method slerp --t 0.3 -q -o slerp/
llmkit sft annealed/ answers.jsonl --epochs 1 --batch-size 8 --lr 1.5e-3 -q -o sft/
llmkit dpo sft/ pairs.jsonl --beta 0.1 --batch-size 8 --lr 1e-4 -q -o chat/
llmkit average sft/ muon/ --method ties --base run/ -q -o ties/
llmkit quantize chat/ --to int8 -q -o chat-int8/
llmkit quantize chat/ --to int4 --group-size 32 -q -o chat-int4/
llmkit eval run/ chat-int4/ --perplexity heldout.jsonl --tasks docstring_choice --limit 8 --include-path tasks -q -o scores.json
llmkit generate chat/ prompts.jsonl --temperature 0 --max-tokens 16 -q -o greedy.jsonl.zst
llmkit generate chat/ prompts.jsonl --temperature 0.8 --samples 2 --seed 3 --max-tokens 16 -q -o sampled.jsonl.zst
llmkit trace run/ --step 3 --text --json > trace-step.jsonl
"""
SHOWN = ("text.jsonl.zst", "exact.parquet", "tok", "plan", "averaged", "ties", "chat-int4", "sampled.jsonl.zst")
# --check ends with 1 where the run that was annealed from has later checkpoints.
HOW = (("tree", "", (0,)), ("script", " --script", (0,)), ("check", " --check --inputs .", (0, 1)))
REBUILT = "averaged"  # with --rebuild: by the script that NEW prints of OLD's
OF_MACHINE = re.compile(r"seconds|per_second|mfu|memory|disk|gpu|rank")  # figures that no two runs share
WITH_PATHS = ("config.toml", "trace.json")  # of a run: where its inputs lie
IGNORED = re.compile(r"(^|/)(\.[^/]*|__pycache__|[^/]*\.log)(/|$)|(^|/)events\.jsonl$")


class FailedCommand(Exception):
    """A command ended with another exit code than it was to."""


@dataclass
class Side:
    """One checkout, the directory that it works in, and the names of its options."""

    name: str
    checkout: Path
    place: Path
    names: dict[tuple[str, str], str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def environment(self) -> dict[str, str]:
        more = {
            "PYTHONPATH": str(self.checkout), "PATH": f"{self.place.parent / f'bin-{self.name}'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "COLUMNS": "200", "NO_COLOR": "1",
        }  # fmt: skip
        return {k: v for k, v in os.environ.items() if not k.startswith("LLMKIT_")} | more

    def prepare(self, inputs: Path, old_names: bool) -> None:
        """The inputs, an `llmkit` for the PATH, and the spelling of each option that was renamed."""
        shutil.copytree(inputs, self.place)
        program = self.place.parent / f"bin-{self.name}" / "llmkit"
        program.parent.mkdir()
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -P -m llmkit "$@"\n')
        program.chmod(0o755)
        where = self.run(f'"{sys.executable}" -P -c "import llmkit; print(llmkit.__file__)"').stdout.strip()
        if Path(where).resolve().parents[1] != self.checkout.resolve():
            raise SystemExit(f"{self.checkout} holds no llmkit: {where} was imported")
        for command in {} if old_names else {command for command, _, _ in RENAMED}:
            text = self.run(f"llmkit {command} --help").stdout
            for _, old, new in (row for row in RENAMED if row[0] == command):
                if re.search(rf"(?<!\S){new}(?!\S)", text) and not re.search(rf"(?<!\S){old}(?!\S)", text):
                    self.names[command, old] = new

    def spelt(self, line: str) -> str:
        """A command line with the names of options that this checkout's help shows."""
        for (command, old), new in self.names.items():
            if line.startswith(f"llmkit {command} "):
                line = re.sub(rf"(?<=\s){old}(?=\s)", new, line)
        return line

    def run(self, line: str, codes: tuple[int, ...] = (0,)) -> subprocess.CompletedProcess[str]:
        """Run a line of bash in the directory."""
        began = time.monotonic()
        command = ["bash", "-euo", "pipefail", "-c", self.spelt(line)]
        done = subprocess.run(command, cwd=self.place, env=self.environment(), capture_output=True, text=True)
        if done.returncode not in codes:
            raise FailedCommand(f"{self.name}: exit code {done.returncode}: {self.spelt(line)}: {done.stderr.strip()}")
        self.seconds[line] = time.monotonic() - began
        return done

    def pipeline(self) -> None:
        """Every stage, and a run that is stopped in the middle."""
        for line in PIPELINE.strip().splitlines():
            self.run(line)
        row = json.loads((self.place / "trace-step.jsonl").read_text().splitlines()[0])
        self.run(f"llmkit trace run/ --find {row['id']} > trace-document.txt")
        self.stop(f"{TRAIN} -o stopped/")
        for name in SHOWN:
            for how, more, codes in HOW:
                self.run(f"llmkit lineage {name}{more} > lineage-{name}.{how}.txt", codes)

    def stop(self, line: str) -> None:
        """Run a training and send it SIGTERM after some steps."""
        command, log = ["bash", "-c", f"exec {self.spelt(line)}"], self.place / "stopped" / "metrics.jsonl"
        process = subprocess.Popen(command, cwd=self.place, env=self.environment(), stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 300
        while not (log.exists() and log.read_bytes().count(b"\n") >= STOPPED):
            if process.poll() is not None or time.monotonic() > deadline:
                said = process.communicate()[1]
                raise FailedCommand(f"{self.name}: not stopped after {STOPPED} steps: {line}: {said}")
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        said = process.communicate()[1]
        if process.returncode != 143:
            raise FailedCommand(f"{self.name}: exit code {process.returncode} after SIGTERM: {line}: {said}")


def build_inputs(checkout: Path, place: Path) -> None:
    """The quickstart's corpus, the first rows of each file of it, and what a pipeline needs besides."""
    corpus = place.parent / "corpus"
    command = [sys.executable, str(checkout / "examples" / "build_corpus.py"), str(corpus), "--items", "8"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    place.mkdir()
    rows = {
        "train/docs": 1500, "train/prose": 40, "train/code": 60, "test/sample": 24, "rows/answers": 160, "rows/pairs": 48, "prompts": 4,
    }  # fmt: skip
    for name, count in rows.items():
        target = place / ("heldout.jsonl" if name == "test/sample" else f"{Path(name).name}.jsonl")
        with open(corpus / f"{name}.jsonl", "rb") as file:
            target.write_bytes(b"".join(islice(file, count)))
    shutil.copytree(corpus / "tasks", place / "tasks")  # the YAML files name the data in corpus/ by its whole path
    shutil.copy(checkout / "examples" / "quickstart" / "technical.toml", place)
    (place / "model.json").write_text(json.dumps(MODEL))
    (place / "prompts.txt").write_text("The function returns\nA list is\n")


# ---- comparison


@dataclass
class Verdict:
    """What is known of one file of both sides: nothing where it is equal."""

    problem: str = ""  # it differs
    record: set[str] = field(default_factory=set)  # fields that only one of the two records has


class Comparison:
    """Files of two trees, those that both were `given` left out; `explained` holds those whose content is equal and whose record is not."""

    def __init__(self, reader: Side, given: set[str]) -> None:
        self.reader, self.given, self.equal = reader, given, 0
        self.explained: dict[str, set[str]] = {}
        self.problems: dict[str, str] = {}

    def trees(self, old: Path, new: Path, names: list[str] | None = None, title: str = "") -> None:
        """Compare the files under two directories, or those that are named."""
        if names is None:
            files = {str(p.relative_to(root)) for root in (old, new) for p in root.rglob("*") if p.is_file()}
            names = sorted(name for name in files - self.given if not name.startswith("stopped/"))
        for name in names:
            if IGNORED.search(name):
                continue
            shown = f"{title}{name}"
            if not all((root / name).is_file() for root in (old, new)):
                self.problems[shown] = f"only in {'OLD' if (old / name).is_file() else 'NEW'}"
                continue
            found = self.file(name, old, new)
            if found.problem:
                self.problems[shown] = found.problem
                continue
            self.equal += 1
            if found.record:
                self.explained[shown] = found.record

    def attempt(self, title: str, side: Side, line: str, codes: tuple[int, ...] = (0,)) -> bool:
        """Run a command; one that fails is a problem."""
        try:
            side.run(line, codes)
        except FailedCommand as error:
            self.problems[title] = str(error)
            return False
        return True

    def file(self, name: str, old_root: Path, new_root: Path) -> Verdict:
        old, new = old_root / name, new_root / name
        if old.name == "metrics.jsonl":
            return Verdict(differing_metrics(old, new))
        if digest(old) == digest(new):
            return Verdict()
        if old.name in WITH_PATHS and without(old_root, old) == without(new_root, new):
            return Verdict()
        if old.name.startswith("lineage-"):  # text made of the record, which is compared where it lies
            return Verdict(record={"text of the record"})
        if old.name == "digests.json":  # of the files beside it, which are compared themselves
            names = [set(json.loads(path.read_text())) for path in (old, new)]
            return Verdict("" if names[0] == names[1] else "other files", {"digests"})
        contents = [self.parted(root / name, root) for root in (old_root, new_root)]
        if contents[0] is None or contents[1] is None:
            return Verdict("bytes differ")
        (was, before), (is_, now) = contents
        if was != is_:
            return Verdict(f"content differs{where(was, is_)}")
        changed, apart = differing_records(before, now)
        if changed:
            return Verdict(f"content equal, record has other values: {', '.join(sorted(changed))}")
        return Verdict(record=apart or {"order of the fields"})

    def parted(self, path: Path, root: Path) -> tuple[Any, Any] | None:
        """(content, record) of a file that carries a record; None where it has no place for one."""
        if path.suffix == ".safetensors":
            with open(path, "rb") as file:
                header, data = json.loads(file.read(int.from_bytes(file.read(8), "little"))), file.read()
            metadata = header.pop("__metadata__", {})
            record = {"command": "", **json.loads(metadata.pop("llmkit", "{}")), "digest": metadata.pop("digest", "")}
            tensors = {name: (t["dtype"], t["shape"], data[slice(*t["data_offsets"])]) for name, t in header.items()}
            return (metadata, tensors), record
        if path.suffix in (".json", ".toml"):
            if path.name == "config.toml":
                return {}, {"command": "config.toml", "options": tomllib.loads(without(root, path))}
            table = tomllib.loads(path.read_text()) if path.suffix == ".toml" else json.loads(path.read_text())
            kept = ("llmkit", "options", "command", "inputs", "environment") if isinstance(table, dict) else ()
            found = {key: table.pop(key) for key in kept if key in table}
            record = found.get("llmkit") if isinstance(found.get("llmkit"), dict) else found
            return table, record
        if path.suffix == ".zst":
            with open(path, "rb") as file:
                content = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True).read()
            return hashlib.sha256(content).hexdigest(), self.record_of(path)
        if path.suffix in (".arrow", ".parquet"):
            return _table(path), self.record_of(path)
        return None

    def record_of(self, path: Path) -> Any:
        """The record as NEW reads it; none where it finds none."""
        return json.loads(self.reader.run(f'llmkit lineage --json "{path}"', (0, 1)).stdout or "{}")


def digest(path: Path) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def without(root: Path, path: Path) -> str:
    """The text of a file without the directory of its side."""
    return path.read_text().replace(f"{root}/", "")


def _table(path: Path) -> tuple[Any, ...]:
    """Schema, metadata without the record, and rows of a token shard or Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.suffix == ".parquet":
        table = pq.read_table(path)
    else:
        with pa.OSFile(str(path)) as file, pa.ipc.open_stream(file) as stream:
            table = stream.read_all()
    metadata = {k: v for k, v in (table.schema.metadata or {}).items() if not k.startswith(b"llmkit")}
    return str(table.schema.remove_metadata()), metadata, table.to_pydict()


def differing_metrics(old: Path, new: Path) -> str:
    """Steps or figures of two logs that differ, those of the machine left out; empty where none does."""
    logs = [[json.loads(line) for line in path.read_text().splitlines()] for path in (old, new)]
    if len(logs[0]) != len(logs[1]):
        return f"{len(logs[0])} and {len(logs[1])} lines"
    apart: dict[str, int] = {}
    for a, b in zip(*logs, strict=True):
        for name in a.keys() | b.keys():
            if not OF_MACHINE.search(name) and a.get(name) != b.get(name):
                apart[name] = min(a["step"], apart.get(name, a["step"]))
    return ", ".join(f"{name} from step {step} on" for name, step in sorted(apart.items()))


def differing_records(old: Any, new: Any, place: str = "") -> tuple[set[str], set[str]]:
    """(fields of both that have other values, fields of one alone). Digests follow from the records of the inputs, and the version is expected to change."""
    if isinstance(old, dict) and isinstance(new, dict):
        changed: set[str] = set()
        apart: set[str] = set()
        here = old.get("command", place) if isinstance(old.get("command"), str) else place
        for key in old.keys() | new.keys():
            name = f"{here}.{key}" if here else key
            if key not in old or key not in new:
                value = json.dumps(old[key] if key in old else new[key])
                apart.add(f"{'-' if key in old else '+'}{name.replace('.options.', '.')}={value}")
            elif key in ("digest", "llmkit") or (key == "inputs" and all(isinstance(x, str) for x in old[key])):
                apart |= {f"{here}.{key}"} if old[key] != new[key] else set()
            else:
                more = differing_records(old[key], new[key], name)
                changed, apart = changed | more[0], apart | more[1]
        return changed, apart
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = [differing_records(a, b, place) for a, b in zip(old, new, strict=True)]
        return set().union(*(c for c, _ in pairs)), set().union(*(a for _, a in pairs))
    return (set(), set()) if old == new else ({f"{place}: {json.dumps(old)[:40]} and {json.dumps(new)[:40]}"}, set())


def where(old: Any, new: Any) -> str:
    """The first keys of two JSON objects that differ."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return ""
    return ": " + ", ".join(sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))[:5])


def events(run: Path) -> list[tuple[str, Any]]:
    """What happened in a run, and at which steps."""
    return [(event["event"], event.get("step")) for event in map(json.loads, (run / "events.jsonl").open())]


def cross(old: Side, new: Side, compare: Comparison, rebuild: bool) -> None:
    """NEW goes on with, checks and prints what OLD made."""
    for side in (old, new):
        place, title = side.place / "resumed", f"OLD's run, resumed by {side.name}"
        shutil.copytree(old.place / "stopped", place, symlinks=True)
        if compare.attempt(title, side, f"{TRAIN} -o resumed/ --resume"):
            if (seen := [name for name, _ in events(place)]) != ["start", "stop", "resume", "end"]:
                compare.problems[f"{title}: events"] = ", ".join(seen)
            last = [str(p.relative_to(place)) for p in (place / "final").resolve().rglob("*") if p.is_file()]
            compare.trees(old.place / "run", place, ["metrics.jsonl", *last], f"{title}: ")
    shown = old.place.parent / "shown"
    shown.mkdir()
    reader = Side("NEW", new.checkout, old.place)
    for name in SHOWN:
        for how, more, codes in HOW:
            line = f"llmkit lineage {name}{more} > {shown}/lineage-{name}.{how}.txt"
            compare.attempt(f"OLD's {name}, shown by NEW", reader, line, codes)
    compare.trees(old.place, shown, sorted(p.name for p in shown.iterdir()), "OLD's artefacts, shown by NEW: ")
    title, line = f"OLD's {REBUILT}, made by the script that NEW prints", f"bash {shown}/lineage-{REBUILT}.script.txt . {shown}/rebuilt < /dev/null"  # fmt: skip
    if rebuild and compare.attempt(title, reader, line):
        names = [str(p.relative_to(old.place)) for p in (old.place / REBUILT).rglob("*") if p.is_file()]
        compare.trees(old.place, shown / "rebuilt", names, f"{title}: ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--work", type=Path, help="keep everything in this directory, which must not exist")
    parser.add_argument("--old-names", action="store_true", help="give NEW the old spellings of options too")
    parser.add_argument("--rebuild", action="store_true", help=f"run the script that NEW prints of OLD's {REBUILT}/")
    parser.add_argument("--times", action="store_true", help="print the seconds of each command")
    arguments = parser.parse_args()
    work = (arguments.work or Path(tempfile.mkdtemp(prefix="byte-equality-")) / "work").absolute()
    work.mkdir(parents=True)
    began = time.monotonic()
    old, new = (
        Side(name, path.absolute(), work / name) for name, path in (("OLD", arguments.old), ("NEW", arguments.new))
    )
    build_inputs(new.checkout, work / "inputs")
    for side, old_names in ((old, True), (new, arguments.old_names)):
        side.prepare(work / "inputs", old_names)
    with ThreadPoolExecutor(2) as threads:
        for done in [threads.submit(side.pipeline) for side in (old, new)]:
            try:
                done.result()
            except FailedCommand as error:
                raise SystemExit(str(error)) from None
    compare = Comparison(
        new, {str(p.relative_to(work / "inputs")) for p in (work / "inputs").rglob("*") if p.is_file()}
    )
    compare.trees(old.place, new.place)
    for run in ("run", "muon", "annealed", "sft", "chat"):
        if events(old.place / run) != events(new.place / run):
            compare.problems[f"{run}/events.jsonl"] = "other events"
    cross(old, new, compare, arguments.rebuild)
    if arguments.times:
        for line, seconds in old.seconds.items():
            print(f"{seconds:6.1f} {new.seconds.get(line, 0.0):6.1f}  {line}")
    report(compare, new)
    if not arguments.work and not compare.problems:
        shutil.rmtree(work.parent)
    print(f"{time.monotonic() - began:.0f} s" + (f"; kept in {work}" if work.exists() else ""))
    if compare.explained:
        print(f"{len(compare.explained)} of the equal files have another record")
    print(f"{compare.equal} files equal, {len(compare.problems)} differ")
    sys.exit(1 if compare.problems else 0)


def report(compare: Comparison, new: Side) -> None:
    """The table: files with one verdict in one row."""
    rows: dict[str, list[str]] = {}
    for name, problem in compare.problems.items():
        rows.setdefault(f"DIFFERS: {' '.join(problem.split())}", []).append(name)
    for name, fields in compare.explained.items():
        rows.setdefault(f"content equal, record differs in: {', '.join(sorted(fields))}", []).append(name)
    if new.names:
        print("NEW's spellings: " + ", ".join(f"{c} {o} → {n}" for (c, o), n in sorted(new.names.items())) + "\n")
    if rows:
        print("| files | verdict |\n|---|---|")
    for verdict, names in rows.items():
        print(f"| {', '.join(names[:4])}{f' and {len(names) - 4} more' if names[4:] else ''} | {verdict} |")
    print()


if __name__ == "__main__":
    main()
