"""Speed of `llmkit average`: large models beside `cp`, small ones beside mergekit, whole commands in turn.

    python tests/bench/average_speed.py [--megabytes 1000] [--pairs 5]

Large: bytes read and written a second of averaging 2 and 3 float32 models, against `cp` of one of them and `sync` of the copy (average stores its output
on disk before it gives it its name), and against `cp` alone, which leaves the copy in memory. Cold: the files were dropped from the page cache
before each turn; warm: they are in it. Wall time, since the disk is what is measured; CPU seconds stand beside it.

Small: CPU seconds of the whole command on two models of 5M weights, both tools pinned to one core. mergekit 0.1.5 runs in an environment of its
own, made by this script (or `--mergekit PYTHON`). Results: average_speed.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path

import numpy as np
from average_parity import MERGEKIT, make
from peers import MEASURE, ROOT, call, environment_of, in_turn, ratios, spread

Measured = tuple[float, float, float]  # CPU s, wall s, peak MB


def timed(command: list[str], cores: str) -> Measured:
    with tempfile.NamedTemporaryFile("r") as report:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        subprocess.run(
            ["taskset", "-c", cores, sys.executable, "-c", MEASURE, report.name, *command],
            check=True,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        cpu, wall, peak = map(float, report.read().split())
    return cpu, wall, peak


def average(models: list[Path], output: Path, *options: str, cores: str) -> Measured:
    shutil.rmtree(output, ignore_errors=True)
    return timed(
        [sys.executable, "-m", "llmkit", "average", *map(str, models), *options, "-q", "-o", str(output)], cores
    )


# ---- large models


def make_large(place: Path, megabytes: int) -> list[Path]:
    """Three float32 models of about so many megabytes, of random numbers."""
    from llmkit.model.config import ModelConfig
    from llmkit.model.family import expected_tensors
    from llmkit.model.pretrained.directory import save_description
    from llmkit.model.pretrained.header import Stored, encode_header, file_order

    layers = max(1, round((megabytes * 1e6 / 4 - (16384 * 1024)) / 11.8e6))
    config = ModelConfig(16384, 1024, 2816, layers, 16, 8, 64, architecture="llama")
    layout = {name: Stored("F32", shape) for name, shape in expected_tensors(config).items()}
    found = []
    for number in range(3):
        found.append(place / f"large-{number}")
        found[-1].mkdir()
        save_description(found[-1], config.to_hf(), {})
        draw = np.random.default_rng(number)
        with open(found[-1] / "model.safetensors", "wb") as file:
            file.write(encode_header(layout, {"format": "pt"}))
            for name in file_order(layout):
                file.write(draw.standard_normal(layout[name].count, dtype=np.float32).data)
    return found


def prepare(models: list[Path], cold: bool) -> None:
    """Nothing is left to be stored, and the files are out of the page cache, or in it."""
    os.sync()
    for model in models:
        descriptor = os.open(model / "model.safetensors", os.O_RDONLY)
        if cold:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        else:
            while os.read(descriptor, 1 << 22):
                pass
        os.close(descriptor)


def large(place: Path, megabytes: int, pairs: int) -> None:
    models = make_large(place, megabytes)
    size = (models[0] / "model.safetensors").stat().st_size / 1e6
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    print(
        f"\nModels of {size:,.0f} MB, {pairs} rounds in turn, load {os.getloadavg()[0]:.1f} of {os.cpu_count()} cores before:\n"
    )
    print("| files | what | MB/s moved | beside cp and sync | beside cp | CPU s |\n|---|---|---:|---:|---:|---:|")
    for cold in (True, False):
        used: dict[str, list[float]] = {}

        def copy(synced: bool, cold: bool = cold, used: dict[str, list[float]] = used) -> float:
            (place / "copy").unlink(missing_ok=True)
            prepare(models, cold)
            end = '&& sync "$2"' if synced else ""
            command = [
                "sh",
                "-c",
                f'cp --reflink=never "$1" "$2" {end}',
                "-",
                str(models[0] / "model.safetensors"),
                str(place / "copy"),
            ]
            cpu, wall, _ = timed(command, cores)
            used.setdefault(f"cp{' and sync' if synced else ''}", []).append(cpu)
            return 2 * size / wall

        def merge(count: int, cold: bool = cold, used: dict[str, list[float]] = used) -> float:
            shutil.rmtree(place / "averaged", ignore_errors=True)
            prepare(models, cold)
            cpu, wall, _ = average(models[:count], place / "averaged", cores=cores)
            used.setdefault(f"average of {count}", []).append(cpu)
            return (count + 1) * size / wall

        ways: dict[str, Callable[[], float]] = {
            "cp": partial(copy, False),
            "cp and sync": partial(copy, True),
            "average of 2": partial(merge, 2),
            "average of 3": partial(merge, 3),
        }
        speeds = in_turn(ways, pairs)
        for name, found in speeds.items():
            beside = [spread(ratios(found, speeds[peer]), 2) for peer in ("cp and sync", "cp")]
            print(
                f"| {'cold' if cold else 'warm'} | {name} | {spread(found, 0)} | {beside[0]} | {beside[1]} | {spread(used[name], 2)} |",
                flush=True,
            )
    for model in models:
        shutil.rmtree(model)
    (place / "copy").unlink()
    shutil.rmtree(place / "averaged")
    print(f"\nLoad after: {os.getloadavg()[0]:.1f}.")


# ---- small models


def small(place: Path, python: str, pairs: int) -> None:
    import torch

    base, *models = make(place / "small", True, torch.float32)

    def theirs(method: str) -> Measured:
        shutil.rmtree(place / "theirs", ignore_errors=True)
        config = {"merge_method": method, "dtype": "float32"} | ({"base_model": str(base)} if method == "ties" else {})
        numbers = {"weight": 1} | ({"density": 0.2} if method == "ties" else {})
        config["models"] = [{"model": str(model), "parameters": numbers} for model in models[:2]]
        (place / "config.yml").write_text(json.dumps(config))
        command = [
            "mergekit.scripts.run_yaml",
            str(place / "config.yml"),
            str(place / "theirs"),
            "--no-copy-tokenizer",
            "--quiet",
        ]
        return timed([python, "-m", *command], "0")

    print("\nSmall models (5M weights, 20 MB), CPU seconds of the whole command on one core:\n")
    print("| method | llmkit | mergekit | times faster | peak MB | mergekit's |\n|---|---:|---:|---:|---:|---:|")
    for name, options, method in (("uniform", [], "linear"), ("ties", ["--base", str(base)], "ties")):
        own = partial(average, models[:2], place / "ours", "--method", name, *options, cores="0")
        own(), theirs(method)  # once before it counts
        runs = [(own(), theirs(method)) for _ in range(pairs)]
        ours_cpu, theirs_cpu = [a[0] for a, _ in runs], [b[0] for _, b in runs]
        memory = [max(run[side][2] for run in runs) for side in (0, 1)]
        print(
            f"| {name} | {spread(ours_cpu, 2)} | {spread(theirs_cpu, 2)} | {spread(ratios(theirs_cpu, ours_cpu))} | {memory[0]:.0f} | {memory[1]:.0f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--part", choices=("large", "small", "both"), default="both")
    parser.add_argument("--mergekit", help="interpreter that has mergekit (default: make an environment)")
    given = parser.parse_args()
    print(f"{date.today()}, {call()}; Python {sys.version.split()[0]}, numpy {np.__version__}, mergekit 0.1.5")
    with tempfile.TemporaryDirectory(prefix="average-", dir=os.environ.get("TMPDIR")) as temporary:
        if given.part != "small":
            large(Path(temporary), given.megabytes, given.pairs)
        if given.part != "large":
            small(Path(temporary), given.mergekit or environment_of("mergekit-speed", MERGEKIT), given.pairs)


if __name__ == "__main__":
    main()
