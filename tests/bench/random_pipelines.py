"""Does the script that `llmkit lineage --script` prints make the same artefact again? Random pipelines, each run twice.

    python tests/bench/random_pipelines.py [--first 0] [--pipelines 200] [--commands 20]

A pipeline has up to 20 commands, drawn by a seed: extract, filter, dedup with and without an index (also over a directory
of files), vocab, tokenize, decode, mix with held-out documents, plans, curricula, train, anneal, average and quantize.
They read whole artefacts and parts of them (held-out documents, one shard, a checkpoint, the tokenizer.json of a
directory), several inputs of one name, renamed and copied files, pipes, process substitutions, and files in every
compression. Then the script of the last artefact, and of some others, runs in a fresh directory that holds the originals
under the names that its head demands, and stops where a digest differs; at last the digests of both are compared, and
`--check` of the first must find no difference.

Prints one line per pipeline, then `N pipelines, N scripts, N equal`; exit code 1 where one differs. Cost: 4 to 15
seconds per pipeline on a busy machine.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
WORDS = "the a river stone old light of and runs under green hill small house with seven birds over water long".split()
MODEL = {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 64, "max_position_embeddings": 64,
    "tie_word_embeddings": True, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
}  # fmt: skip
NOT_POSSIBLE = (b"no tokens in this source", b"hold the same documents", b"one model is not enough")
SLOW = {"train": 0.25, "anneal": 0.5, "average": 0.7, "quantize": 0.7}  # how often, where it is possible


class Pipeline:
    """Draws commands and runs them in `directory`. Artefacts by kind: paths relative to it."""

    def __init__(self, seed: int, directory: Path, environment: dict[str, str]) -> None:
        self.random = random.Random(seed)
        self.directory, self.environment = directory, environment
        self.made: dict[str, list[str]] = defaultdict(list)
        self.scripted: list[str] = []  # artefacts that carry a record, in order
        self.commands: list[str] = []
        self.number = 0
        self._originals()

    def _documents(self, count: int) -> bytes:
        texts = [" ".join(self.random.choices(WORDS, k=self.random.randint(8, 60))) for _ in range(count)]
        texts += self.random.sample(texts, count // 4)
        rows = [{"id": f"{self.random.getrandbits(48):x}", "text": text} for text in texts]
        return b"".join(json.dumps(row).encode() + b"\n" for row in rows)

    def _originals(self) -> None:
        for name in (
            "docs.jsonl",
            "more.jsonl",
            "sub/docs.jsonl",
            "night/one.jsonl",
            "night/two.jsonl",
            "night/three.jsonl",
        ):
            path = self.directory / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(self._documents(24))
            self.made["documents"].append(name)
        (self.directory / "pages").mkdir()
        for number in range(3):
            text = "".join(f"<p>{' '.join(self.random.choices(WORDS, k=40))}.</p>" for _ in range(4))
            (self.directory / "pages" / f"{number}.html").write_text(
                f"<html><body><article>{text}</article></body></html>"
            )
        (self.directory / "model.json").write_text(json.dumps(MODEL))
        (self.directory / "tiny.toml").write_text('[[filter]]\nname = "length"\nmin_characters = 60\n')

    def run(self, command: str) -> None:
        self.commands.append(command)
        done = subprocess.run(["bash", "-c", command], cwd=self.directory, env=self.environment, capture_output=True)
        if any(reason in done.stderr for reason in NOT_POSSIBLE):
            self.commands.pop()
            raise LookupError
        if done.returncode:
            raise RuntimeError(f"{command}\n{done.stderr.decode()[-800:]}")

    def pick(self, kind: str) -> str:
        return self.random.choice(self.made[kind])

    def new(self, kind: str, suffix: str) -> str:
        """The name of a new artefact, sometimes in a directory of its own under a name that exists already."""
        self.number += 1
        name = f"{kind}{self.number}{suffix}"
        if self.random.random() < 0.25:
            name = f"in{self.number}/{self.random.choice(['a', 'docs', 'web'])}{suffix}"
            (self.directory / name).parent.mkdir()
        return name

    def keep(self, kind: str, name: str) -> None:
        self.made[kind].append(name)
        self.scripted.append(name)
        if self.random.random() < 0.15 and (self.directory / name).exists():  # renamed, or copied elsewhere
            self.number += 1
            suffix = "".join(Path(name).suffixes)
            copy = f"renamed{self.number}{suffix}"
            verb = "mv" if self.random.random() < 0.5 and not kind.startswith("run") else "cp -RL"
            self.run(f"{verb} {name} {copy}")
            if verb == "mv":
                self.made[kind].remove(name)
                self.scripted.remove(name)
            self.made[kind].append(copy)
            self.scripted.append(copy)

    def documents_output(self) -> str:
        return self.new("docs", self.random.choice([".jsonl.zst", ".jsonl.zst", ".jsonl.gz", ".parquet"]))

    def stage(self) -> str:
        """A stage over documents, without its inputs."""
        return self.random.choice(
            [
                "filter --preset gopher --rule gopher_quality.min_doc_words=12 --filter length",
                "filter --preset tiny.toml",
                "filter --preset gopher --rule gopher_quality.min_doc_words=9 --on-bad-line quarantine=$PWD/bad.jsonl -f",
                "dedup", "dedup --method exact", "dedup --keep longest", "dedup --method lines",
            ]
        )  # fmt: skip

    def sources(self) -> str:
        """Inputs of a stage: files, a pipe is added by `step_pipe`."""
        files = [self.pick("documents") for _ in range(self.random.choice([1, 1, 2, 3]))]
        return " ".join(dict.fromkeys(files))

    # Each step makes one artefact, or raises LookupError where what it reads does not exist yet.
    def step_extract(self) -> None:
        output = self.new("pages", ".jsonl.zst")
        self.run(f"llmkit extract pages/ -q -o {output}")
        self.keep("documents", output)

    def step_stage(self) -> None:
        output = self.documents_output()
        self.run(f"llmkit {self.stage()} {self.sources()} -q -o {output}")
        self.keep("documents", output)

    def step_rejects(self) -> None:
        output, rejects = self.documents_output(), self.new("rejects", ".jsonl.zst")
        self.run(
            f"llmkit filter --filter length --rule length.min_characters=150 {self.sources()} --rejects {rejects} -q -o {output}"
        )
        self.keep("documents", output)
        self.keep("rejects", rejects)

    def step_pipe(self) -> None:
        output = self.documents_output()
        first, second = (f"llmkit {self.stage().replace(' -f', '')} {self.sources()} -q" for _ in range(2))
        self.run(
            self.random.choice(
                [
                    f"{first} | llmkit {self.stage()} -q -o {output}",
                    f"llmkit dedup <({first}) <({second}) -q -o {output}",
                    f"{first} | llmkit dedup - <({second}) {self.pick('documents')} -q -o {output}",
                    f"cat {self.pick('plain')} | llmkit {self.stage()} -q -o {output}",
                    f"llmkit dedup --method exact <(cat {self.pick('plain')}) {self.pick('documents')} -q -o {output}",
                ]
            )
        )
        self.keep("documents", output)

    def step_index(self) -> None:
        index = self.random.choice(["seen.duckdb", "other.duckdb"])
        if self.random.random() < 0.4:
            self.number += 1
            directory = f"out{self.number}"
            self.run(f"llmkit dedup night/ --index {index} -q -o {directory}/")
            for name in ("one", "two", "three"):
                self.keep("documents", f"{directory}/{name}.jsonl.zst")
            return
        output = self.documents_output()
        self.run(f"llmkit dedup {self.sources()} --index {index} -q -o {output}")
        self.keep("documents", output)

    def step_vocab(self) -> None:
        output = self.new("tok", "")
        self.run(f"llmkit vocab {self.sources()} --size 320 -q -o {output}")
        self.keep("tokenizer", output)

    def tokenizer(self) -> str:
        """One tokenizer for the pipeline, so that its shards fit each other; by its directory or its file."""
        tokenizer = self.made["tokenizer"][0] if self.made["tokenizer"] else ""
        if not tokenizer:
            raise LookupError
        return self.random.choice([tokenizer, tokenizer, f"{tokenizer}/tokenizer.json"])

    def step_tokenize(self) -> None:
        output = self.new("shards", self.random.choice(["", "", ".arrow"]))
        limit = " --max-tokens-per-shard 300" * (self.random.random() < 0.4)
        source = self.random.choice([self.sources(), self.sources(), f"<(llmkit dedup {self.sources()} -q)"])
        self.run(f"llmkit tokenize {source} -t {self.tokenizer()}{limit} -q -o {output}")
        self.keep("shards", output)

    def shards(self) -> str:
        """Shards, one of several shards, or the held-out documents of a mix."""
        held_out = [f"{mix}/heldout" for mix in self.made["mix"] if (self.directory / mix / "heldout").is_dir()]
        whole = self.pick("shards")
        parts = sorted((self.directory / whole).glob("part-*.arrow"))
        choices = [whole, *([str(self.random.choice(parts).relative_to(self.directory))] if parts else []), *held_out]
        return self.random.choice(choices)

    def step_decode(self) -> None:
        output = self.new("docs", ".jsonl.zst")
        self.run(f"llmkit tokenize --decode {self.shards()} -q -o {output}")
        self.keep("documents", output)

    def step_against(self) -> None:
        """Decontamination against the held-out documents, as documents."""
        output = self.new("docs", ".jsonl.zst")
        self.run(f"llmkit dedup {self.sources()} --against {self.pick('documents')} -q -o {output}")
        self.keep("documents", output)

    def step_mix(self) -> None:
        sources = list(dict.fromkeys(self.shards() for _ in range(self.random.choice([1, 2]))))
        amounts = [self.random.choice(["0.5", "1"]) for _ in sources] if self.random.random() < 0.5 else []
        words = [f"{source}:{amount}" for source, amount in zip(sources, amounts, strict=False)] if amounts else sources
        form = self.random.choice(["", "--holdout 20%", "--plan", "--plan --holdout 20%", "--shuffle none"])
        output = self.new("mix", "")
        self.run(f"llmkit mix {' '.join(words)} {form} --seed {self.random.randint(0, 9)} -q -o {output}")
        self.keep("mix", output)

    def step_curriculum(self) -> None:
        a, b = self.shards(), self.shards()
        self.number += 1
        text = f'[sources]\na = "{a}"\nb = "{b}"\n[[stage]]\nmix = {{ a = "200" }}\n[[stage]]\nmix = {{ b = "x1" }}\n'
        if a == b:
            raise LookupError
        (self.directory / f"stages{self.number}.toml").write_text(text.replace('"200"', '"0.2k"'))
        stages, output = f"stages{self.number}.toml", self.new("mix", "")
        self.run(f"llmkit mix --stages {stages} -q -o {output}")
        self.keep("mix", output)

    def step_document_mix(self) -> None:
        sources = list(dict.fromkeys([self.pick("documents"), self.pick("documents")]))
        output = self.new("docs", ".jsonl.zst")
        self.run(f"llmkit mix {' '.join(sources)} -q -o {output}")
        self.keep("documents", output)

    def step_train(self) -> None:
        data, output = self.random.choice(self.made["shards"] + self.made["mix"]), self.new("run", "")
        steps = "--tokens 768 --batch-size 2 --save-every 3 --lr 1e-3"
        self.run(f"llmkit train {data} -m model.json {steps} -q -o {output}")
        self.keep("run", output)

    def model(self) -> str:
        run = self.pick("run")
        checkpoints = sorted((self.directory / run / "checkpoints").glob("step-*"))
        choices = [run, *(str(path.relative_to(self.directory)) for path in checkpoints)]
        return self.random.choice([*choices, *self.made["model"]])

    def step_anneal(self) -> None:
        output = self.new("annealed", "")
        step = self.random.choice(["", " --step 3"])
        run = self.pick("run")
        if not (self.directory / run / "checkpoints").is_dir():
            raise LookupError
        self.run(
            f"llmkit anneal {run} {self.pick('shards')}{step} --tokens 256 --batch-size 2 --lr 1e-4 -q -o {output}"
        )
        self.keep("run", output)

    def step_average(self) -> None:
        output = self.new("average", "")
        models = list(dict.fromkeys([self.model(), self.model()]))
        run = self.pick("run")
        if len(models) < 2 and len(list((self.directory / run / "checkpoints").glob("step-*"))) < 2:
            raise LookupError
        self.run(f"llmkit average {' '.join(models) if len(models) > 1 else f'{run} --last 2'} -q -o {output}")
        self.keep("model", output)

    def step_quantize(self) -> None:
        output = self.new("quantized", "")
        self.run(f"llmkit quantize {self.model()} --to int8 -q -o {output}")
        self.keep("quantized", output)

    def draw(self, commands: int) -> None:
        """Run commands, each drawn from those that have something to read."""
        self.made["plain"] = [name for name in self.made["documents"] if name.endswith(".jsonl")]
        steps = sorted(name.removeprefix("step_") for name in dir(self) if name.startswith("step_"))
        self.step_vocab()
        self.step_tokenize()
        for _ in range(commands - 2):
            name = self.random.choice(steps)
            if self.random.random() >= SLOW.get(name, 1.0):
                continue
            try:
                getattr(self, f"step_{name}")()
            except (LookupError, IndexError):  # nothing to read yet
                continue


def lay_out(script: str, origin: Path, target: Path) -> str:
    """Copy the originals that the head of a script demands, by digest, and return that of its stdin ("" for none)."""
    stream = ""
    digests = _digests(origin)
    for name, digest in re.findall(r"^#   (.+?)  (xxh3:[0-9a-f]{32})$", script, re.MULTILINE):
        source = digests.get(digest)
        if source is None:
            raise RuntimeError(f"no original has the digest of {name}, {digest}")
        if name == "(standard input)":
            stream = str(source)
            continue
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, target / name)
    return stream


def _digests(origin: Path) -> dict[str, Path]:
    """Digest -> original, a file or a directory."""
    from llmkit.lineage.formats import digest_path

    return {digest_path(path): path for path in sorted(origin.rglob("*")) if not path.is_symlink()}


class Repeated(NamedTuple):
    """What the script of an artefact made: `problem` is "" where it is the same."""

    problem: str
    script: str = ""
    again: Path = Path()


def repeat(
    directory: Path, environment: dict[str, str], originals: Path, artefact: str, work: Path, *options: str
) -> Repeated:
    """Run the script of an artefact in a fresh directory, and compare the digests; `options` are those of `lineage`."""

    def call(*words: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(["llmkit", *words], cwd=directory, env=environment, capture_output=True)

    printed = call("lineage", artefact, "--script", *options)
    if printed.returncode:
        return Repeated(f"--script: {printed.stderr.decode()[-400:]}")
    script = printed.stdout.decode()
    shutil.rmtree(work, ignore_errors=True)
    (work / "in").mkdir(parents=True)
    (work / "again.sh").write_text(script)
    try:
        stream = lay_out(script, originals, work / "in")
    except RuntimeError as error:
        return Repeated(f"{error}\n{script}", script)
    with open(stream or os.devnull, "rb") as stdin:
        done = subprocess.run(
            ["bash", "again.sh", "in", "out"], cwd=work, env=environment, stdin=stdin, capture_output=True
        )
    if done.returncode:
        return Repeated(f"{done.stderr.decode()[-600:]}\n{script}", script)
    outputs = re.findall(r'"\$OUT"(\S*)$', script.rstrip().splitlines()[-1].partition(" xxh3:")[0])
    again = work / f"out{shlex.split(outputs[-1])[0]}"
    first, second = (call("lineage", str(path), "--digest").stdout for path in (artefact, again))
    if first != second or not first:
        return Repeated(f"{artefact}: {first!r}, and again {second!r}\n{script}", script, again)
    checked = call("lineage", str(again), "--check", "--inputs", str(work / "in"))
    if checked.returncode:
        return Repeated(f"--check: {checked.stdout.decode()}{checked.stderr.decode()[-300:]}", script, again)
    return Repeated("", script, again)


def try_pipeline(
    seed: int, commands: int, scripts: int, work: Path, environment: dict[str, str]
) -> tuple[int, list[str]]:
    """Run a pipeline and repeat its last artefact and up to `scripts` - 1 others. Returns (scripts, failures)."""
    directory, originals = work / "first", work / "originals"
    directory.mkdir(parents=True)
    pipeline = Pipeline(seed, directory, environment)
    shutil.copytree(directory, originals)
    pipeline.draw(commands)
    for path in directory.glob("stages*.toml"):
        shutil.copy(path, originals / path.name)
    chosen = dict.fromkeys(
        [pipeline.scripted[-1], *pipeline.random.sample(pipeline.scripted, min(scripts - 1, len(pipeline.scripted)))]
    )
    failures = [
        f"{name}: {repeated.problem}"
        for name in chosen
        if (repeated := repeat(directory, environment, originals, name, work / "again")).problem
    ]
    if failures:
        failures.append("the pipeline:\n" + "\n".join(pipeline.commands))
    return len(chosen), failures


@contextmanager
def preloaded(socket: str | None = None) -> Iterator[tuple[Path, dict[str, str]]]:
    """A temporary directory, and an environment in which `llmkit` is forked from tests/preloaded.py at `socket`, or a new one."""
    with tempfile.TemporaryDirectory(prefix="scripts-") as temporary:
        work = Path(temporary)
        command = [sys.executable, "-P", str(ROOT / "tests" / "preloaded.py")]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "PATH": f"{work / 'bin'}:{os.environ['PATH']}"}
        path = socket or f"{work}/socket"
        (work / "bin").mkdir()
        call = shlex.join([sys.executable, "-IS", *command[2:]])
        (work / "bin" / "llmkit").write_text(f'#!/bin/sh\nexec {call} {path} "$@"\n')
        (work / "bin" / "llmkit").chmod(0o755)
        if socket:
            yield work, environment
            return
        pipe = subprocess.PIPE
        with subprocess.Popen([*command, "serve", path], stdin=pipe, stdout=pipe, env=environment) as server:
            assert server.stdout and server.stdout.readline() == b"ready\n"
            yield work, environment
            server.terminate()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=0, help="the seed of the first pipeline")
    parser.add_argument("--pipelines", type=int, default=200)
    parser.add_argument("--commands", type=int, default=20, help="at most, in a pipeline")
    parser.add_argument("--socket", help="of a running server (tests/preloaded.py), instead of a new one")
    parser.add_argument("--scripts", type=int, default=3, help="artefacts of a pipeline whose scripts are run")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    began, equal, scripts = time.monotonic(), 0, 0
    with preloaded(arguments.socket) as (work, environment):
        for seed in range(arguments.first, arguments.first + arguments.pipelines):
            commands = random.Random(seed).randint(5, arguments.commands)
            place = work / f"{seed}"
            try:
                count, failures = try_pipeline(seed, commands, arguments.scripts, place, environment)
            except RuntimeError as error:
                count, failures = 0, [f"a command of the pipeline failed: {error}"]
            scripts += count
            equal += not failures
            print(f"{seed}: {'equal' if not failures else chr(10).join(failures)}", flush=True)
            shutil.rmtree(place, ignore_errors=True)
    seconds = time.monotonic() - began
    print(f"{arguments.pipelines} pipelines, {scripts} scripts, {equal} equal; {seconds:.0f} s")
    return equal != arguments.pipelines


if __name__ == "__main__":
    sys.exit(main())
