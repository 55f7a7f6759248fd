"""`llmkit average` against mergekit on the same models: the largest difference of any weight, by method.

    python tests/bench/average_parity.py

Two sets of models of 5.0M weights: related (a base and three models a little away from it, as fine-tuning leaves them) and random (four that have
nothing in common), each in float32 and in bfloat16. mergekit 0.1.5 runs in an environment of its own, made by this script (or `--mergekit
PYTHON`), and is told to compute in float32 and to store the type of the models, as llmkit does. DARE draws by chance, another way in each tool:
its formula is compared at density 1, and below it how many changes stay and what they amount to. Results: average_parity.md.
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

from llmkit.model.checkpoint import save_model
from llmkit.model.config import ModelConfig
from llmkit.model.decoder import Decoder

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
    base.initialise(0)
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


def theirs(python: str, config: dict[str, Any], output: Path) -> dict[str, torch.Tensor]:
    """mergekit's result; its configuration is YAML, of which JSON is a part."""
    file = output.with_suffix(".yml")
    file.write_text(json.dumps(config))
    command = [
        python,
        "-m",
        "mergekit.scripts.run_yaml",
        str(file),
        str(output),
        "--no-copy-tokenizer",
        "--quiet",
        "--random-seed",
        "1",
    ]
    done = subprocess.run(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
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


def main() -> None:
    python = asked(__doc__ or "", {"mergekit": MERGEKIT})[1]["mergekit"]
    print(f"{date.today()}, {call()}; mergekit 0.1.5, torch {torch.__version__}, numpy {np.__version__}\n")
    print("| models | method | largest difference | weights that differ | largest weight |\n|---|---|---:|---:|---:|")
    chance = []
    with tempfile.TemporaryDirectory(prefix="average-") as temporary:
        for related in (True, False):
            for dtype, kind in TYPES.items():
                place = Path(temporary) / f"{related}-{dtype}"
                base, *models = make(place, related, kind)
                title = f"{'related' if related else 'random'}, {dtype}"
                for number, (name, options, count, method, shared, each) in enumerate(CASES):
                    own = ["--method", name.split(",")[0].split()[0], *options]
                    own += ["--base", str(base)] if method not in ("linear", "slerp") else []
                    a = flat(ours(own, models[:count], place / f"ours-{number}"))
                    b = flat(
                        theirs(
                            python,
                            described(method, shared, each, models[:count], base, dtype),
                            place / f"theirs-{number}",
                        )
                    )
                    assert a.shape == b.shape
                    print(
                        f"| {title} | {name} | {np.abs(a - b).max():.1e} | {(a != b).mean():.2%} | {np.abs(b).max():.2f} |",
                        flush=True,
                    )
                if not (related and dtype == "float32"):
                    continue
                start, end = (flat(load_file(m / "model.safetensors")) for m in (base, models[0]))
                each = [{"weight": 1, "density": 0.3}]
                results = {
                    "llmkit": ours(
                        ["--method", "dare", "--density", "0.3", "--base", str(base)], models[:1], place / "ours-dare"
                    ),
                    "mergekit": theirs(
                        python, described("dare_linear", {}, each, models[:1], base, dtype), place / "theirs-dare"
                    ),
                }
                for tool, found in results.items():
                    change, task = flat(found) - start, end - start
                    kept = np.abs(change) > 0.5 * np.abs(task)
                    factor = np.median(change[kept] / task[kept])
                    chance.append(
                        f"| {tool} | {kept.mean():.4f} | {factor:.4f} | {(change * task).sum() / (task * task).sum():.4f} |"
                    )
    print("\nDARE of one model at density 0.3 (related, float32):\n")
    print(
        "| tool | share of changes that stay | factor of those | projection on the whole change (1 is unbiased) |\n|---|---:|---:|---:|"
    )
    print("\n".join(chance))


if __name__ == "__main__":
    main()
