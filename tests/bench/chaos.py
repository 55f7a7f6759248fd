"""Runs that are killed again and again, in one and in two processes, beside runs that are not: equal to the byte? Prints a dated table.

    python tests/bench/chaos.py [--work DIR] [--kills 30] [--terms 10] [--seed 0] > tests/bench/chaos.md

A run of 120 steps over poisoned data (so that it is rolled back on its way), with evaluations and checkpoints every few steps, is resumed after
every blow until it is done; then the next one begins, until all blows are dealt. SIGKILL falls inside named functions (of the step, the data, a
checkpoint, an evaluation, a rollback, compilation where there is a compiler) or after a random time; SIGTERM likewise, to the process or to the
whole group. Then 1 → 2 → 1 processes.
"""

from __future__ import annotations

import argparse
import platform
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from run_data import TRAIN, disturbing, events, losses, prepare, start

STEPS = 120
# In every process that comes so far: non-finite weights, which a rollback undoes without a trace.
NAN = "llmkit.training.loop:accumulate:25:nan:all"
POISON = {41: "noise", 61: "repetition", 91: "noise"}
CALL = ("train", "poisoned", *TRAIN, "--tokens", str(STEPS * 1024), "--heldout", "heldout.arrow", "--eval-every", "8", "--save-every", "10", "--threads", "1")  # fmt: skip
# Where a blow falls: module:function, and up to which call.
PLACES = {
    "forward and backward": ("llmkit.training.loop:accumulate", 60),
    "update": ("llmkit.training.loop:update", 60),
    "clipping": ("llmkit.training.train_step:clip_gradients", 60),
    "data": ("llmkit.training.data:StreamSource.batch", 60),
    "checkpoint, optimiser": ("llmkit.training.checkpoint.run_directory:write_safetensors", 6),
    "checkpoint, model": ("llmkit.model.pretrained.checkpoint:write_safetensors", 6),
    "checkpoint, link": ("llmkit.training.checkpoint.run_directory:RunDirectory._link", 6),
    "copy to the host": ("llmkit.training.checkpoint.snapshot:HostSnapshot.copy", 8),
    "evaluation": ("llmkit.training.loop:evaluate_held_out", 6),
    "diagnosis": ("llmkit.training.guard.recovery:find_broken_documents", 2),
    "rollback": ("llmkit.training.guard.rollback:_load_weights", 1),
    "log": ("llmkit.training.metrics.log:MetricsLog.write", 60),
    "any time": ("", 0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--terms", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="compile the model, and strike there too")
    arguments = parser.parse_args()
    work = arguments.work or Path(tempfile.mkdtemp(prefix="chaos-"))
    prepare(work, STEPS, POISON, (76,))
    call = [*CALL, *(["--compile"] if arguments.compile else [])]
    if arguments.compile:
        PLACES["compilation"] = ("torch._dynamo.convert_frame:_compile", 2)
    print(f"# Chaos\n\n{time.strftime('%Y-%m-%d')}, two shared CPU cores, torch {torch.__version__}, Python {platform.python_version()}. `python tests/bench/chaos.py --kills {arguments.kills} --terms {arguments.terms} --seed {arguments.seed}{' --compile' if arguments.compile else ''}`\n")  # fmt: skip
    print(f"{STEPS} steps over poisoned data; the undisturbed run meets no NaN, the others one 25 steps after every start.\n")  # fmt: skip
    print("| processes | SIGKILL | SIGTERM | runs | weights equal to the undisturbed run's | steps lost on SIGTERM, at most | blows fell in |\n|---|---|---|---|---|---|---|")  # fmt: skip
    for processes in (1, 2):
        strike_all(work, call, processes, arguments)
    one_two_one(work, call)


def strike_all(work: Path, call: list[str], processes: int, arguments: argparse.Namespace) -> None:
    draw = random.Random(arguments.seed * 10 + processes)
    whole = [*call, "--processes", str(processes)]
    undisturbed(work, whole, f"whole{processes}")
    blows = [signal.SIGKILL] * arguments.kills + [signal.SIGTERM] * arguments.terms
    draw.shuffle(blows)
    fell: Counter[str] = Counter()
    dealt: Counter[int] = Counter()
    runs = equal = lost = 0
    names = list(PLACES)
    while blows:
        run = f"run{processes}-{runs}"
        shutil.rmtree(work / run, ignore_errors=True)
        while not (work / run / "final").exists():
            number = blows[-1] if blows else 0
            place = names[sum(fell.values()) % len(names)] if number else ""
            function, calls = PLACES.get(place, ("", 0))
            rank = draw.randrange(processes)
            if place in ("checkpoint, optimiser", "checkpoint, model", "checkpoint, link", "log"):
                rank = 0  # the others do not write
            what = f"{function}:{draw.randint(1, max(calls, 1))}:kill:{rank}" if function else ""
            what = ";".join(filter(None, (what, NAN)))
            process = start(work, [*whole, "-o", run, "--resume"], disturbing(work, what, number))
            if place == "any time":
                time.sleep(draw.uniform(0, 14))
                process.send_signal(number)
            _, said = process.communicate(timeout=1200)
            if process.returncode == 0:
                continue  # it was over before the blow could fall
            assert number, said
            blows.pop()
            fell[place] += 1
            dealt[number] += 1
            if number == signal.SIGTERM and (work / run / "metrics.jsonl").exists():
                steps = [0, *losses(work / run)]
                saved = [0, *(int(p.name[5:]) for p in (work / run / "checkpoints").glob("step-*"))]
                lost = max(lost, max(steps) - max(saved))
        runs += 1
        equal += same(work, f"whole{processes}", run)
        shutil.rmtree(work / run / "checkpoints")
    where = ", ".join(f"{name} {count}" for name, count in fell.items())
    print(f"| {processes} | {dealt[signal.SIGKILL]} | {dealt[signal.SIGTERM]} | {runs} | {equal} of {runs} | {lost} | {where} |", flush=True)  # fmt: skip


def undisturbed(work: Path, call: list[str], run: str) -> None:
    process = start(work, [*call, "-o", run, "-f"])
    _, said = process.communicate(timeout=1200)
    assert process.returncode == 0, said


def same(work: Path, first: str, second: str) -> bool:
    """Whether the weights are equal to the byte, and the losses and skipped steps to the bit."""
    files = [(work / run / "final" / "model.safetensors").read_bytes() for run in (first, second)]
    logs = [{n: loss for n, loss in losses(work / run).items() if loss == loss} for run in (first, second)]
    return files[0] == files[1] and logs[0] == logs[1]


def one_two_one(work: Path, call: list[str]) -> None:
    """A run that goes on with another number of processes, twice."""
    run = "one-two-one"
    shutil.rmtree(work / run, ignore_errors=True)
    for processes, until in ((1, 40), (2, 80), (1, 0)):
        process = start(work, [*call, "--processes", str(processes), "-o", run, "--resume"])
        while until and max([0, *(losses(work / run) if (work / run / "metrics.jsonl").exists() else [])]) < until:
            assert process.poll() is None
            time.sleep(0.02)
        if until:
            process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=1200)
        assert process.returncode == (143 if until else 0), said
    whole, found = losses(work / "whole1"), losses(work / run)
    apart = [abs(whole[n] - found[n]) for n in whole if whole[n] == whole[n]]
    seen = [len(events(work / run, name)) for name in ("start", "resume")]
    skipped = [[n for e in events(work / name, "rollback") for n in e["skipped"]] for name in ("whole1", run)]
    print(f"\n1 → 2 → 1 processes ({seen[0]} start, {seen[1]} resumptions): losses differ by {max(apart):.1e} at most over {len(apart)} steps ({sorted(apart)[len(apart) // 2]:.1e} in the median); steps {sorted(set(skipped[1]))} skipped, as in the whole run: {sorted(set(skipped[0])) == sorted(set(skipped[1]))}.")  # fmt: skip


if __name__ == "__main__":
    main()
