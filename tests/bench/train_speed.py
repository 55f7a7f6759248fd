"""The training step against nanoGPT, litgpt and transformers on one CPU core: about 10M parameters, float32, 8 sequences of 512 tokens a step.

    git clone https://github.com/karpathy/nanoGPT ../nanoGPT
    python tests/bench/train_speed.py --nanogpt ../nanoGPT --pairs 5
    python tests/bench/train_speed.py --family gemma2 --only transformers      # another architecture of these sizes

A step is forward, backward, clipping at norm 1 and fused AdamW, on the same tokens for all. Ours is the loop's own `accumulate` and `update`, as `llmkit train`
calls them, with its default micro-batch; the others are stepped as their trainers do it, all with the fused AdamW, which only some of those use. The
shapes are equal (width 320, 6 layers, 5 heads, 8,192 ids, tied); nanoGPT's feed-forward has two matrices instead of three, of the same size together.

Each contestant is a process pinned to the first core, in an environment that has it; after two warm-up steps they take turns, a step each. Printed
are the CPU time of each over ours as the median of the turns (least to most), tokens a second, peak memory over that after the imports, and the
seconds from the imports to the end of the first step.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peers import ROOT, environment_of, in_turn, ratios, spread

# Of an architecture, beside its sizes. Gemma's scores have a soft cap, which torch's attention does not know.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "olmo2": {},
    "gemma2": {"query_pre_attn_scalar": 64, "sliding_window": 256, "head_dim": 64, "attn_implementation": "eager"},
}
SEQUENCES, LENGTH, VOCABULARY, WIDTH, LAYERS, HEADS, FEED_FORWARD = 8, 512, 8192, 320, 6, 5, 864
OURS = ("llmkit", "llmkit, documents", "llmkit, compiled")
PEERS = tuple(f"{name}{how}" for name in ("nanoGPT", "litgpt", "transformers") for how in ("", ", compiled"))


def tokens() -> tuple[Any, Any]:
    """Inputs and targets [8, 512]; the rows follow each other."""
    import torch

    stream = torch.randint(0, VOCABULARY, (SEQUENCES * LENGTH,), generator=torch.Generator().manual_seed(0))
    return stream.view(SEQUENCES, LENGTH), stream.roll(-1).view(SEQUENCES, LENGTH)


def stepper(model: Any, loss: Callable[[], Any], decay: float = 0.1) -> Callable[[], float]:
    """One step as peers take it."""
    import torch

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.95), weight_decay=decay, fused=True)

    def step() -> float:
        value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(value)

    return step


def ours(compiled: bool, documents: bool) -> Callable[[], Callable[[], float]]:
    import accelerate  # noqa: F401
    import numpy as np

    import llmkit.training.session as sessions
    from llmkit.model.config import ModelConfig
    from llmkit.model.decoder import Decoder
    from llmkit.model.families import ARCHITECTURES
    from llmkit.model.runtime import Runtime, prepare
    from llmkit.training.data import StreamSource
    from llmkit.training.distributed.processes import start
    from llmkit.training.metrics.step_metrics import StepMetrics
    from llmkit.training.objectives import next_token
    from llmkit.training.optim.optimizer import build_optimizer
    from llmkit.training.train_step import TrainContext, accumulate, update

    class Stream:
        """The rows again and again; `documents`: of 100 tokens each."""

        padding = None
        tokens = SEQUENCES * LENGTH
        offsets = np.append(np.arange(0, tokens, 100), tokens) if documents else np.array([0, tokens])
        data: Any = None

        def span(self, start: int, stop: int) -> Any:
            if self.data is None:
                self.data = tokens()[0].flatten().numpy()
            return self.data[start:stop]

    def make() -> Callable[[], float]:
        sizes = (VOCABULARY, WIDTH, FEED_FORWARD, LAYERS, HEADS, HEADS, WIDTH // HEADS)
        processes = start("fp32")
        family = os.environ["FAMILY"]
        own = {name: value for name, value in FAMILIES[family].items() if name in ARCHITECTURES.get(family).keys}
        model = Decoder(ModelConfig(*sizes, architecture=family, max_position_embeddings=LENGTH, own=own))
        model.initialize(0)
        prepare(model, processes.device, Runtime(compile=compiled))
        source = StreamSource(Stream(), LENGTH, SEQUENCES, 1 << 40, document_mask=documents)
        limit = sessions.MICRO_BATCH_TOKENS["cpu"] // LENGTH
        none: Any = None
        training = TrainContext(
            model=model, optimizer=build_optimizer(model), objective=next_token, metric_names=(), source=source, schedule=none,
            processes=processes, directory=none, state=none, write_model=none, initial=none,
            micro_batch=int(os.environ.get("MICRO_BATCH", max(1, min(SEQUENCES, limit)))),
        )  # fmt: skip

        watch = StepMetrics(model, source, processes, Path("."), 0)

        def step() -> float:
            measured = accumulate(training, 0, watch)
            update(training, 1e-3, watch)
            return measured.metrics["loss"]

        return step

    return make


def nanogpt(compiled: bool) -> Callable[[], Callable[[], float]]:
    import torch
    from model import GPT, GPTConfig  # of nanoGPT, found through PYTHONPATH

    def make() -> Callable[[], float]:
        ids, targets = tokens()
        config = GPTConfig(LENGTH, VOCABULARY, LAYERS, HEADS, WIDTH, dropout=0.0, bias=False)
        model = GPT(config)
        call: Any = torch.compile(model) if compiled else model
        return stepper(model, lambda: call(ids, targets)[1])

    return make


def litgpt(compiled: bool) -> Callable[[], Callable[[], float]]:
    import torch
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy

    def make() -> Callable[[], float]:
        ids, targets = tokens()
        config = Config(
            block_size=LENGTH, vocab_size=VOCABULARY, padded_vocab_size=VOCABULARY, n_layer=LAYERS, n_head=HEADS,
            n_embd=WIDTH, n_query_groups=HEADS, rotary_percentage=1.0, parallel_residual=False, bias=False,
            norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP", intermediate_size=FEED_FORWARD,
        )  # fmt: skip
        model = GPT(config)
        model.lm_head.weight = model.transformer.wte.weight
        torch.nn.init.normal_(model.lm_head.weight, std=0.02)
        call: Any = torch.compile(model) if compiled else model
        # As litgpt's pretrain.py: chunks only where it fine-tunes.
        return stepper(model, lambda: chunked_cross_entropy(call(ids), targets, chunk_size=0))

    return make


def transformers(compiled: bool) -> Callable[[], Callable[[], float]]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    def make() -> Callable[[], float]:
        ids, targets = tokens()
        family = os.environ["FAMILY"]
        settings = {"attn_implementation": "sdpa"} | FAMILIES[family]
        config = AutoConfig.for_model(
            family, vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=FEED_FORWARD, num_hidden_layers=LAYERS,
            num_attention_heads=HEADS, num_key_value_heads=HEADS, max_position_embeddings=LENGTH, tie_word_embeddings=True,
            use_cache=False, **settings,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config, attn_implementation=settings["attn_implementation"]).train()
        call: Any = torch.compile(model) if compiled else model
        return stepper(model, lambda: call(input_ids=ids, labels=targets, shift_labels=targets).loss)

    return make


def resident(name: str) -> float:
    """Megabytes: VmRSS now, VmHWM the most there ever were."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0]) / 1024


def work(name: str) -> None:
    """Be a contestant."""
    compiled, documents = "compiled" in name, "documents" in name
    kinds: dict[str, Callable[[], Any]] = {
        "llmkit": lambda: ours(compiled, documents),
        "nanoGPT": lambda: nanogpt(compiled),
        "litgpt": lambda: litgpt(compiled),
        "transformers": lambda: transformers(compiled),
    }
    serve(kinds[name.split(",")[0]])


def serve(prepare: Callable[[], Callable[[], Callable[[], float]]]) -> None:
    """Say seconds and loss of the first step, then CPU seconds, loss and peak megabytes for each line on stdin.

    `prepare` imports, and returns what makes the function that takes a step.
    """
    import torch
    import torch._dynamo  # torch.optim loads it for everyone

    make = prepare()
    torch.set_num_threads(1)
    baseline, began = resident("VmRSS"), time.perf_counter()
    torch.manual_seed(0)
    step = make()
    loss = step()
    first = time.perf_counter() - began
    print(first, loss, flush=True)
    for _ in sys.stdin:
        began = time.process_time()
        loss = step()
        print(time.process_time() - began, loss, resident("VmHWM") - baseline, flush=True)


class Contestant:
    """A process that takes steps when it is told to."""

    def __init__(self, name: str, python: str, path: str, script: str = __file__) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        command = ["taskset", "-c", "0", python, script, "--be", name]
        log = open(ROOT / ".cache" / "train_speed.log", "ab")
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.into, self.out = self.process.stdin, self.process.stdout
        line = self._read()
        assert line, f"{name} does not start: see {log.name}"
        self.first, self.losses = line[0], [line[1]]
        self.memory = 0.0

    def _read(self) -> list[float]:
        while line := self.out.readline():  # type: ignore[union-attr]
            try:
                return [float(word) for word in line.split()]
            except ValueError:
                continue  # nanoGPT talks
        return []

    def step(self) -> float:
        """CPU seconds."""
        print("step", file=self.into, flush=True)
        seconds, loss, self.memory = self._read()
        self.losses.append(loss)
        return seconds

    def close(self) -> None:
        self.into.close()
        self.process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--nanogpt", type=Path, help="clone of nanoGPT; without it that peer is left out")
    parser.add_argument("--litgpt", help="interpreter that has litgpt (default: make an environment)")
    parser.add_argument("--family", choices=FAMILIES, default="llama", help="of ours and of transformers")
    parser.add_argument("--only", action="append", help="contestants to run beside the first")
    parser.add_argument("--be", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.be:
        return work(given.be)
    os.environ["FAMILY"] = given.family
    (ROOT / ".cache").mkdir(exist_ok=True)
    names = [n for n in OURS + PEERS if n == OURS[0] or not given.only or n in given.only]
    names = [n for n in names if given.nanogpt or not n.startswith("nanoGPT")]
    here = f"{ROOT}:{Path(__file__).parent}"
    contestants = {}
    for name in names:
        python, path = sys.executable, here
        if name.startswith("litgpt"):
            python = given.litgpt or environment_of("litgpt-speed", ["torch>=2.9,<2.14", "litgpt==0.5.13"])
        if name.startswith("nanoGPT"):
            path = f"{Path(__file__).parent}:{given.nanogpt.absolute()}"
        contestants[name] = Contestant(name, python, path)
    steps = {name: contestant.step for name, contestant in contestants.items()}
    in_turn(steps, 1)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(given.pairs):
        for name, found in in_turn(steps, 1).items():
            seconds[name] += found
        print(
            f"turn {turn + 1}",
            {name: round(found[-1], 2) for name, found in seconds.items()},
            file=sys.stderr,
            flush=True,
        )
    print("| | CPU time over ours | tokens/s | memory, MB | first step, s | loss of the first and last step |")
    print("|---|---|---|---|---|---|")
    for name, contestant in contestants.items():
        speed = SEQUENCES * LENGTH / sorted(seconds[name])[given.pairs // 2]
        contestant.close()
        print(
            f"| {name} | {spread(ratios(seconds[name], seconds[OURS[0]]), 2)} | {speed:,.0f} | {contestant.memory:.0f}"
            f" | {contestant.first:.1f} | {contestant.losses[0]:.4f}, {contestant.losses[-1]:.4f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
