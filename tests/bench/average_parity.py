"""`llmkit average` against mergekit on the same models: the largest difference of any weight, by method.

    python tests/bench/average_parity.py

Two sets of models of so many weights as the output says: related (a base and three models a little away from it, as fine-tuning leaves them) and random (four that have
nothing in common), in float32, the related ones also in bfloat16. mergekit 0.1.5 runs in an environment of its own, made by this script (or `--mergekit
PYTHON`), and is told to compute in float32 and to store the type of the models, as llmkit does. DARE draws by chance, another way in each tool:
its formula is compared at density 1, and below it how many changes stay and what they amount to. TIES: where several changes have the very size at
which the trimming stops, mergekit's sort leaves open which of them stay (llmkit: the first); such elements are counted, and compared apart.
Results: average_parity.md.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers import ROOT, asked, call
from safetensors.torch import load_file

from llmkit.model.config import ModelConfig
from llmkit.model.decoder import Decoder
from llmkit.model.pretrained.checkpoint import save_model

MERGEKIT = ["mergekit==0.1.5", "torch>=2.9,<2.14"]
CONFIG = ModelConfig(2048, 256, 640, 5, 8, 4, 32, architecture="llama", tie_word_embeddings=False)
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# What is compared: options of llmkit average, models, mergekit's method, and its parameters for all and for each model.
CASES: list[tuple[str, list[str], int, str, dict[str, Any], list[dict[str, Any]]]] = [
    ("uniform", [], 3, "linear", {}, [{"weight": 1}] * 3),
    ("weighted 1,2,5", ["--weights", "1,2,5"], 3, "linear", {}, [{"weight": w} for w in (1, 2, 5)]),
    ("slerp, t 0.3", ["--t", "0.3"], 2, "slerp", {"t": 0.3}, [{}] * 2),
    ("task, weights 1,0.5,-0.3", ["--weights", "1,0.5,-0.3", "--scale", "0.8"], 3, "task_arithmetic", {"lambda": 0.8}, [{"weight": w} for w in (1, 0.5, -0.3)]),
    *(
        (f"ties, density {d}", ["--density", str(d), "--weights", "1,1,2"], 3, "ties", {}, [{"weight": w, "density": d} for w in (1, 1, 2)])
        for d in (0.2, 0.7, 1.0)
    ),
    ("dare, density 1", ["--density", "1"], 3, "dare_linear", {}, [{"weight": 1, "density": 1.0}] * 3),
    ("dare-ties, density 1", ["--density", "1"], 3, "dare_ties", {"normalize": True}, [{"weight": 1, "density": 1.0}] * 3),
]  # fmt: skip


def make(place: Path, related: bool, dtype: torch.dtype) -> list[Path]:
    """A base and three models; the related ones differ from it by a normal of a hundredth of the weights' size."""
    base = Decoder(CONFIG)
    base.initialize(0)
    state = base.state_dict()
    found = []
    for number in range(4):
        draw = torch.Generator().manual_seed(number)

        def drawn(value: torch.Tensor) -> torch.Tensor:
            return 0.02 * torch.randn(value.shape, generator=draw)  # noqa: B023

        change = 0.01 if related else 1.0
        tensors = {
            name: value * related + (change * drawn(value) if number or not related else 0)
            for name, value in state.items()
        }
        found.append(place / f"model-{number}")
        found[-1].mkdir(parents=True)
        save_model(found[-1], tensors, CONFIG, {}, None, dtype)
    return found


def ours(options: list[str], models: list[Path], output: Path) -> dict[str, torch.Tensor]:
    command = [sys.executable, "-m", "llmkit", "average", *map(str, models), *options, "-q", "-o", str(output)]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    return load_file(output / "model.safetensors")


BATCH = """
import json, sys
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
for config, output in json.load(open(sys.argv[1])):
    run_merge(MergeConfiguration.model_validate(config), output, options=MergeOptions(copy_tokenizer=False, quiet=True, random_seed=1))
"""


def run_theirs(python: str, jobs: list[tuple[dict[str, Any], Path]], place: Path) -> None:
    """mergekit's results, as its command makes them, in one process: it takes seconds to start."""
    (place / "jobs.json").write_text(json.dumps([(config, str(output)) for config, output in jobs]))
    command = [python, "-c", BATCH, str(place / "jobs.json")]
    done = subprocess.run(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def stored(output: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(output.glob("*.safetensors")) for name, value in load_file(file).items()}


def described(
    method: str, shared: dict[str, Any], each: list[dict[str, Any]], models: list[Path], base: Path, dtype: str
) -> dict[str, Any]:
    config: dict[str, Any] = {"merge_method": method, "parameters": shared, "dtype": "float32", "out_dtype": dtype}
    if method == "slerp":
        config["base_model"] = str(models[0])
    elif method != "linear":
        config["base_model"] = str(base)
    config["models"] = [{"model": str(m), "parameters": p} for m, p in zip(models, each, strict=True)]
    return config


def flat(tensors: dict[str, torch.Tensor]) -> np.ndarray:
    return np.concatenate([tensors[name].double().flatten().numpy() for name in sorted(tensors)])


def undecided(models: list[Path], base: Path, density: float) -> np.ndarray:
    """Which elements, in the order of `flat`, have in some model a change of the least size that stays, which others have too."""
    start, found = load_file(base / "model.safetensors"), []
    tasks = [load_file(model / "model.safetensors") for model in models]
    for name in sorted(start):
        tied = torch.zeros(start[name].numel(), dtype=torch.bool)
        for task in tasks:
            size = (task[name].float() - start[name].float()).abs().flatten()
            least = size.sort(descending=True).values[max(1, int(density * len(size))) - 1]
            tied |= (size == least) & ((size == least).sum() > 1)
        found.append(tied.numpy())
    return np.concatenate(found)


def main() -> None:
    python = asked(__doc__ or "", {"mergekit": MERGEKIT})[1]["mergekit"]
    print(f"{date.today()}, {call()}; mergekit 0.1.5, torch {torch.__version__}, numpy {np.__version__}")
    print(f"\nModels of {CONFIG.parameters():,} weights.\n")
    print(
        "| models | method | largest difference | weights that differ | undecided by TIES, and their largest difference |"
    )
    print("|---|---|---:|---:|---:|")
    with tempfile.TemporaryDirectory(prefix="average-") as temporary:
        sets = {
            f"{'related' if related else 'random'}, {dtype}": (
                dtype,
                make(Path(temporary) / f"{related}-{dtype}", related, kind),
            )
            for related in (True, False)
            for dtype, kind in (TYPES.items() if related else [("float32", torch.float32)])
        }
        _, (start, end, *_) = sets["related, float32"]
        chance, out = Path(temporary) / "chance", Path(temporary)
        each = [{"weight": 1, "density": 0.3}]
        jobs = [(described("dare_linear", {}, each, [end], start, "float32"), chance)]
        for title, (dtype, (base, *models)) in sets.items():
            for name, _, count, method, shared, parameters in CASES:
                jobs.append(
                    (described(method, shared, parameters, models[:count], base, dtype), out / f"{title} {name}")
                )
        run_theirs(python, jobs, out)
        for title, (_, (base, *models)) in sets.items():
            for name, options, count, method, _, parameters in CASES:
                own = ["--method", name.split(",")[0].split()[0], *options]
                own += ["--base", str(base)] if method not in ("linear", "slerp") else []
                a = flat(ours(own, models[:count], out / f"ours {title} {name}"))
                b = flat(stored(out / f"{title} {name}"))
                assert a.shape == b.shape
                open_ = np.zeros(len(a), np.bool_)
                if method == "ties" and parameters[0]["density"] < 1:
                    open_ = undecided(models[:count], base, parameters[0]["density"])
                apart = f"{open_.mean():.3%}, {np.abs(a - b)[open_].max():.1e}" if open_.any() else ""
                a, b = a[~open_], b[~open_]
                print(f"| {title} | {name} | {np.abs(a - b).max():.1e} | {(a != b).mean():.2%} | {apart} |", flush=True)
        print("\nDARE of one model at density 0.3 (related, float32):\n")
        print(
            "| tool | share of changes that stay | factor of those | projection on the whole change (1 is unbiased) |"
        )
        print("|---|---:|---:|---:|")
        results = {
            "llmkit": ours(["--method", "dare", "--density", "0.3", "--base", str(start)], [end], out / "ours chance"),
            "mergekit": stored(chance),
        }
        before, task = flat(stored(start)), flat(stored(end)) - flat(stored(start))
        for tool, found in results.items():
            change = flat(found) - before
            kept = np.abs(change) > 0.5 * np.abs(task)
            factor, projection = np.median(change[kept] / task[kept]), (change * task).sum() / (task * task).sum()
            print(f"| {tool} | {kept.mean():.4f} | {factor:.4f} | {projection:.4f} |")


if __name__ == "__main__":
    main()
