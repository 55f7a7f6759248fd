"""TrainContext on one GPU: tokens a second and MFU of a decoder of about 1B parameters in bfloat16, ours against transformers' Trainer at the same shape.

    python tests/bench/train_gpu.py                      # 4 × 4,096 tokens in a pass, 32 sequences a step
    python tests/bench/train_gpu.py --length 2048 --rows 8 --steps 20
    python tests/bench/train_gpu.py --tiny               # a small shape, on a CPU too: does the script work?

Each contestant is a process of its own, one after the other, on the same random tokens: ours eager, compiled, compiled with a document mask, and in fp8
(where torchao is installed), and transformers' Trainer, eager and compiled, with its own defaults for bfloat16 (autocast, fused AdamW). torchtitan and
nanochat are trainers with models of their own shapes: where they are installed, their versions are named, and their own logs give their MFU.
Nothing is downloaded. Printed is a Markdown table. MFU counts attention as causal, at half: 6·N + 6·L·H·d_head·T FLOPs a token, over the vendor's dense
bfloat16 peak, for fp8 too.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peers import ROOT, call

CONTESTANTS = (
    "llmkit", "llmkit, compiled", "llmkit, compiled, documents", "llmkit, compiled, checkpointed", "llmkit, compiled, fp8",
    "transformers", "transformers, compiled",
)  # fmt: skip
OTHERS = ("torchtitan", "nanochat")


def config_of(given: argparse.Namespace) -> Any:
    import dataclasses

    from llmkit.model.config import load_config

    config = load_config("llama-tiny" if given.tiny else "llama-1b", 512 if given.tiny else 65_536)
    return dataclasses.replace(config, max_position_embeddings=given.length)


def ids_of(given: argparse.Namespace) -> Any:
    """Token ids of one step, [sequences, length + 1]."""
    import torch

    draw = torch.Generator().manual_seed(0)
    return torch.randint(0, config_of(given).vocab_size, (given.sequences, given.length + 1), generator=draw)


def ours(given: argparse.Namespace, words: set[str]) -> tuple[list[float], float]:
    """Seconds of each step, and the last loss."""
    import numpy as np
    import torch

    from llmkit.model.decoder import Decoder
    from llmkit.model.runtime import Runtime, prepare
    from llmkit.training.data import StreamSource
    from llmkit.training.distributed.processes import start
    from llmkit.training.metrics.step_metrics import StepMetrics
    from llmkit.training.objectives import next_token
    from llmkit.training.optim.optimizer import build_optimizer
    from llmkit.training.train_step import TrainContext, accumulate, update

    class Stream:
        """The ids again and again, as documents of 1,000 tokens where that is asked for."""

        padding = None
        data = ids_of(given)[:, :-1].flatten().numpy()
        tokens = len(data)
        offsets = np.append(np.arange(0, tokens, 1000), tokens) if "documents" in words else np.array([0, tokens])

        def span(self, start: int, stop: int) -> Any:
            return self.data[start:stop]

    processes = start("fp8" if "fp8" in words else "bf16")
    model = Decoder(config_of(given))
    model.initialize(0)
    runtime = Runtime("compiled" in words, "checkpointed" in words, "fp8" in words, emulate=given.tiny)
    prepare(model, processes.device, runtime, print)
    processes.layout.parallelize(model, processes.device, processes.precision)
    documents = "documents" in words
    none: Any = None
    training = TrainContext(
        model=model, optimizer=build_optimizer(model), objective=next_token, metric_names=(),
        source=StreamSource(Stream(), given.length, given.sequences, 1 << 40, document_mask=documents),
        schedule=none, processes=processes, directory=none, state=none, write_model=none, initial=none, micro_batch=given.rows,
    )  # fmt: skip
    watch = StepMetrics(model, training.source, processes, Path("."), 0)
    seconds, loss = [], 0.0
    for _ in range(given.warmup + given.steps):
        began = time.perf_counter()
        loss = accumulate(training, 0, watch).metrics["loss"]  # a number: the GPU is done
        update(training, 3e-4, watch)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return seconds[given.warmup :], loss


def trainer(given: argparse.Namespace, words: set[str]) -> tuple[list[float], float]:
    """The same of transformers' Trainer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    ids = ids_of(given)[:, :-1]
    settings = config_of(given).to_hf()
    config = AutoConfig.for_model(settings.pop("model_type"), **settings | {"use_cache": False})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    times: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as place:
        arguments = TrainingArguments(
            place, per_device_train_batch_size=given.rows, gradient_accumulation_steps=given.sequences // given.rows,
            max_steps=given.warmup + given.steps, bf16=True, learning_rate=3e-4, adam_beta2=0.95, weight_decay=0.1, max_grad_norm=1.0,
            lr_scheduler_type="constant", torch_compile="compiled" in words, logging_steps=1, save_strategy="no", report_to=[],
            disable_tqdm=True, use_cpu=not torch.cuda.is_available(), dataloader_drop_last=True, seed=0,
        )  # fmt: skip
        rows = [{"input_ids": row, "labels": row} for row in ids] * (given.warmup + given.steps)
        run = Trainer(model, arguments, train_dataset=rows, callbacks=[Clock()])
        run.train()
    losses = [record["loss"] for record in run.state.log_history if "loss" in record]
    return [b - a for a, b in zip(times, times[1:], strict=False)][-given.steps :], losses[-1]


def work(given: argparse.Namespace) -> None:
    """Be a contestant; the last line says how it went."""
    import torch

    name, *words = given.be.split(", ")
    seconds, loss = (ours if name == "llmkit" else trainer)(given, set(words))
    memory = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0
    print(json.dumps({"seconds": seconds, "loss": loss, "memory": memory}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--length", type=int, default=4096, help="tokens in a sequence")
    parser.add_argument("--rows", type=int, default=4, help="sequences in a pass")
    parser.add_argument("--sequences", type=int, default=32, help="sequences a step")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", action="append", choices=CONTESTANTS)
    parser.add_argument("--be", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.tiny:
        given.length, given.rows, given.sequences, given.steps, given.warmup = 64, 2, 4, 2, 1
    if given.be:
        return work(given)
    import torch

    from llmkit.training.metrics.log import peak_flops

    if not torch.cuda.is_available() and not given.tiny:
        sys.exit("no GPU: --tiny tries the script on a small shape")
    config = config_of(given)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peak, how = peak_flops(device, "bf16")
    flops = config.flops_per_token(given.length)
    versions = ", ".join(
        f"{name} {version(name)}" for name in ("torch", "transformers", "torchao") if importlib.util.find_spec(name)
    )
    found = [name for name in OTHERS if importlib.util.find_spec(name)]
    print(
        f"{config.parameters() / 1e6:,.1f}M parameters, {given.length:,} tokens a sequence, {given.rows} in a pass, {given.sequences} a step;"
    )
    print(f"peak {peak / 1e12:.0f} TFLOP/s ({how}); Python {platform.python_version()}, {versions}; `{call()}`\n")
    print(
        "Installed beside: "
        + (", ".join(f"{name} {version(name)}" for name in found) or "neither torchtitan nor nanochat")
        + "\n"
    )
    print("| | tokens/s | MFU (causal attention at half) | loss | peak memory, GB |\n|---|---|---|---|---|")
    for name in given.only or CONTESTANTS:
        words = [word for word in sys.argv[1:] if word != "--only" and word not in CONTESTANTS]
        done = subprocess.run(
            [sys.executable, __file__, *words, "--be", name], capture_output=True, text=True,
            env=os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"},
        )  # fmt: skip
        if done.returncode:
            print(f"| {name} | failed: {(done.stderr.strip().splitlines() or ['?'])[-1][:150]} | | | |", flush=True)
            continue
        outcome = json.loads(done.stdout.strip().splitlines()[-1])
        speed = given.sequences * given.length / statistics.median(outcome["seconds"])
        mfu = f"{speed * flops / peak:.1%}" if peak else "unknown"
        print(f"| {name} | {speed:,.0f} | {mfu} | {outcome['loss']:.4f} | {outcome['memory']:.1f} |", flush=True)


if __name__ == "__main__":
    main()
