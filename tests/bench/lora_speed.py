"""The step of training adapters against PEFT on one CPU core: a Llama of about 10M parameters, rank 16 in every linear layer, float32,
8 rows of 512 tokens a step with the loss on the second half of each.

    python tests/bench/lora_speed.py --pairs 7
    python tests/bench/lora_speed.py --family gemma2 --dora

Both start from the same model directory and the same directory of adapters, so that their losses must agree. A step is forward, backward,
clipping at norm 1 and fused AdamW. Ours is the loop's own `accumulate` and `update`, as `llmkit sft --lora` calls them, in its default
micro-batches of 4 rows; PEFT's adapters are in transformers' model, stepped as its trainer does it: with all rows at once, and, as another
contestant, in micro-batches of 4 rows, summed. Each is a process pinned to the first core; after two steps to warm up they take turns, a step each.

Printed are the CPU time of each over ours as the median of the turns (least to most), tokens a second, peak memory over that after the
imports, and the losses of the first and last step.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peers import ROOT, in_turn, ratios, spread
from train_speed import FAMILIES, HEADS, LAYERS, LENGTH, SEQUENCES, VOCABULARY, WIDTH, Contestant, serve, stepper

FEED_FORWARD, RANK, MICRO_BATCH = 864, 16, 4
NAMES = ("llmkit", "PEFT", "PEFT, micro-batches")


def rows() -> list[tuple[Any, Any]]:
    """Tokens and weights of each row."""
    import numpy as np

    random = np.random.default_rng(0)
    weights = (np.arange(LENGTH + 1) > LENGTH // 2).astype(np.float32)
    return [(random.integers(0, VOCABULARY, LENGTH + 1).astype(np.int32), weights) for _ in range(SEQUENCES)]


def make_directories(place: Path, family: str, dora: bool) -> None:
    """A random model, and new adapters for it."""
    from llmkit.model.config import ModelConfig
    from llmkit.model.decoder import Decoder
    from llmkit.model.families import ARCHITECTURES
    from llmkit.model.lora.config import LoraConfig, target_modules
    from llmkit.model.pretrained.adapter import load_for_adapting, save_adapter
    from llmkit.model.pretrained.checkpoint import save_model

    own = {name: value for name, value in FAMILIES[family].items() if name in ARCHITECTURES.get(family).keys}
    sizes = (VOCABULARY, WIDTH, FEED_FORWARD, LAYERS, HEADS, HEADS, WIDTH // HEADS)
    more = {"hidden_act": "gelu_pytorch_tanh"} if family.startswith("gemma") else {}
    model = Decoder(ModelConfig(*sizes, architecture=family, max_position_embeddings=LENGTH, own=own, **more))
    model.initialize(0)
    for name in ("base", "adapter"):
        (place / name).mkdir()
    save_model(place / "base", model.state_dict(), model.config, {})
    lora = LoraConfig(RANK, 2.0 * RANK, target_modules(model.config, "all-linear"), dora=dora)
    adapted = load_for_adapting(place / "base", lora, 0)
    save_adapter(place / "adapter", adapted.trained_state(), adapted.config, adapted.adapter, {})


def ours() -> Callable[[], Callable[[], float]]:
    import accelerate  # noqa: F401
    import torch

    from llmkit.model.lora.config import read_config
    from llmkit.model.pretrained.adapter import load_for_adapting
    from llmkit.model.runtime import Runtime, prepare
    from llmkit.training.data import PackedSource
    from llmkit.training.distributed.processes import start
    from llmkit.training.metrics.step_metrics import StepMetrics
    from llmkit.training.objectives import next_token
    from llmkit.training.optim.optimizer import build_optimizer
    from llmkit.training.session import MICRO_BATCH_TOKENS
    from llmkit.training.train_step import TrainContext, accumulate, update

    def make() -> Callable[[], float]:
        place = Path(os.environ["PLACE"])
        processes = start("fp32")
        model = load_for_adapting(place / "base", read_config(place / "adapter"), 0)
        prepare(model, torch.device("cpu"), Runtime())
        source = PackedSource(rows(), LENGTH, SEQUENCES)
        assert MICRO_BATCH_TOKENS["cpu"] // LENGTH == MICRO_BATCH
        none: Any = None
        training = TrainContext(
            model=model, optimizer=build_optimizer(model, weight_decay=0.0), objective=next_token, metric_names=(),
            source=source, schedule=none, processes=processes, directory=none, state=none, write_model=none, initial=none,
            micro_batch=MICRO_BATCH,
        )  # fmt: skip
        watch = StepMetrics(model, source, processes, Path("."), 0)

        def step() -> float:
            measured = accumulate(training, 0, watch)
            update(training, 1e-3, watch)
            return measured.metrics["loss"]

        return step

    return make


def theirs(micro_batches: bool) -> Callable[[], Callable[[], float]]:
    import numpy as np
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def make() -> Callable[[], float]:
        place = os.environ["PLACE"]
        attention = FAMILIES[os.environ["FAMILY"]].get("attn_implementation", "sdpa")
        base = AutoModelForCausalLM.from_pretrained(f"{place}/base", attn_implementation=attention, use_cache=False)
        model = PeftModel.from_pretrained(base, f"{place}/adapter", is_trainable=True).train()
        tokens = torch.from_numpy(np.stack([row for row, _ in rows()])).long()
        counted = torch.from_numpy(np.stack([weights for _, weights in rows()]))[:, 1:] > 0
        ids, targets = tokens[:, :-1], tokens[:, 1:].masked_fill(~counted, -100)
        size = MICRO_BATCH if micro_batches else SEQUENCES

        def loss() -> Any:
            total: Any = 0
            for start in range(0, SEQUENCES, size):
                part = slice(start, start + size)
                result = model(input_ids=ids[part], labels=targets[part], shift_labels=targets[part])
                value = result.loss * size / SEQUENCES
                if start + size < SEQUENCES:
                    value.backward()
                    value = value.detach()
                total = total + value
            return total

        return stepper(model, loss, 0.0)

    return make


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--family", choices=FAMILIES, default="llama")
    parser.add_argument("--dora", action="store_true")
    parser.add_argument("--be", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.be:
        return serve(ours if given.be == NAMES[0] else lambda: theirs("," in given.be))
    (ROOT / ".cache").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        make_directories(Path(place), given.family, given.dora)
        os.environ |= {"PLACE": place, "FAMILY": given.family}
        path = f"{ROOT}:{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"
        contestants = {name: Contestant(name, sys.executable, path, __file__) for name in NAMES}
        steps = {name: contestant.step for name, contestant in contestants.items()}
        in_turn(steps, 1)
        seconds: dict[str, list[float]] = {name: [] for name in NAMES}
        for turn in range(given.pairs):
            for name, found in in_turn(steps, 1).items():
                seconds[name] += found
            print(
                f"turn {turn + 1}",
                {name: round(found[-1], 2) for name, found in seconds.items()},
                file=sys.stderr,
                flush=True,
            )
    print("| | CPU time over ours | tokens/s | memory, MB | loss of the first and last step |")
    print("|---|---|---|---|---|")
    for name, contestant in contestants.items():
        speed = SEQUENCES * LENGTH / sorted(seconds[name])[given.pairs // 2]
        contestant.close()
        losses = f"{contestant.losses[0]:.4f}, {contestant.losses[-1]:.4f}"
        cells = (
            spread(ratios(seconds[name], seconds[NAMES[0]]), 2),
            f"{speed:,.0f}",
            f"{contestant.memory:.0f}",
            losses,
        )
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
