"""CPU time and memory of one update: Muon and AdamW of llmkit against torch's.

    python tests/bench/optimizer_speed.py [--model 15m] [--pairs 7]

The preset's weights with a vocabulary of 8,192 and drawn gradients, one thread, ours and the peer in turn after a warm-up. Muon is compared on the
matrices of the layers alone. Prints the table of optimizer_speed.md: seconds of each, ratio peer / ours, bytes of state a weight.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable

import torch
from peers import in_turn, ratios, spread

from llmkit.model.config import load_config
from llmkit.model.decoder import Decoder
from llmkit.training.optim.muon import Muon
from llmkit.training.optim.optimizer import BETAS, EPSILON, build_optimizer, set_learning_rate


def timed(step: Callable[[], object]) -> Callable[[], float]:
    def run() -> float:
        begin = time.process_time()
        step()
        return time.process_time() - begin

    return run


def state_bytes(optimizer: torch.optim.Optimizer, weights: int) -> float:
    return sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.dim()) / weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="15m")
    parser.add_argument("--pairs", type=int, default=7)
    given = parser.parse_args()
    os.sched_setaffinity(0, {0})
    torch.set_num_threads(1)
    model = Decoder(load_config(given.model, 8192))
    model.initialize(0)
    everything = list(model.parameters())
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "layers" in name]
    for parameter in everything:
        parameter.grad = torch.randn_like(parameter)
    group = {"params": matrices, "optimizer": "muon", "weight_decay": 0.1, "rate": 1.0, "lr": 1e-3}
    fused = build_optimizer(model)
    set_learning_rate(fused, 1e-3)
    adamw = {"lr": 1e-3, "betas": BETAS, "eps": EPSILON, "weight_decay": 0.1}
    pairs: list[tuple[str, list[torch.nn.Parameter], torch.optim.Optimizer, str, torch.optim.Optimizer]] = [
        ("Muon", matrices, Muon([group]), "torch.optim.Muon", torch.optim.Muon(matrices, lr=1e-3, adjust_lr_fn="match_rms_adamw")),
        ("AdamW, fused", everything, fused, "torch.optim.AdamW, a tensor at a time", torch.optim.AdamW(everything, foreach=False, **adamw)),  # type: ignore[arg-type]
    ]  # fmt: skip
    print(
        "| ours | weights | seconds | peer | seconds | peer / ours | bytes of state a weight |\n|---|---:|---:|---|---:|---:|---:|"
    )
    for name, parameters, ours, other, theirs in pairs:
        ways = {"ours": timed(ours.step), "theirs": timed(theirs.step)}
        in_turn(ways, 1)
        found = in_turn(ways, given.pairs)
        weights = sum(p.numel() for p in parameters)
        print(
            f"| {name} | {weights:,} | {spread(found['ours'], 3)} | {other} | {spread(found['theirs'], 3)} "
            f"| {spread(ratios(found['theirs'], found['ours']), 2)} | {state_bytes(ours, weights):.1f}, {state_bytes(theirs, weights):.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
