"""The work of every process in `test_layouts_agree_with_one_process`.

Run by torchrun, or alone as `python group_of_two.py DIRECTORY`.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from tiny import CONFIG, ListStream, loop_settings

from llmkit.io.record import Input, Lineage
from llmkit.model.decoder import Decoder
from llmkit.training.checkpoint.run_directory import open_run
from llmkit.training.data import HeldOutSource, StreamSource
from llmkit.training.distributed import processes as distributed
from llmkit.training.distributed.layout import create_layout, local_tensor
from llmkit.training.guard.guard import Guard, StepVerdict
from llmkit.training.objectives import next_token
from llmkit.training.optim.schedule import build_schedule
from llmkit.training.session import Session

STEPS = 20


def untied() -> Decoder:
    """An untied model, so that FSDP's outermost group has every kind of parameter."""
    model = Decoder(dataclasses.replace(CONFIG, tie_word_embeddings=False))
    model.initialize(0)
    return model


def train(
    processes: distributed.Processes,
    path: Path,
    *,
    resume: bool = False,
    poisoned: bool = False,
    optimizer: str = "adamw",
) -> None:
    """Train for 20 steps of 3 rows (1 row in the last step), two of them judged spikes.

    `poisoned`: after step 8 an embedding of the first process becomes NaN, once.
    """
    struck, judge = [], Guard.judge

    def doubtful(self: Guard, step: int, figures: Sequence[float]) -> StepVerdict:
        return StepVerdict.SPIKE if step in (6, 7) else judge(self, step, figures)

    def report(record: dict[str, object]) -> None:
        if poisoned and record["step"] == 8 and not struck:
            struck.append(local_tensor(model.state_dict()["model.embed_tokens.weight"]).detach()[1:9].fill_(torch.nan))

    stream = ListStream(np.random.default_rng(7).integers(1, 60, size=60).tolist())
    source = StreamSource(stream, 32, 3, (STEPS * 3 - 2) * 32)
    plan = build_schedule("cosine", 3e-3, source.tokens(source.steps), warmup=300, floor=0.1)
    settings = loop_settings(
        str(path), resume=resume, micro_batch_size=1, save_every=5, eval_every=10, optimizer=optimizer
    )
    with (
        patch.object(Guard, "judge", doubtful),
        open_run(str(path), resume=resume, force=False, main=processes.is_main) as directory,
    ):
        processes.barrier()
        opened = Session(settings, processes, directory)
        opened.begin(Lineage("train", {"seed": 0}), [Input("input", "data", "xxh3:0")], 3, 32, "seed = 0\n")
        model = opened.model(untied)
        if processes.layout.lockstep and processes.world_size == 2:  # half of every tensor is here
            assert 2 * sum(local_tensor(p).numel() for p in model.parameters()) == sum(
                p.numel() for p in model.parameters()
            )
        opened.train(
            model,
            next_token,
            source,
            plan,
            tokenizer_files={},
            heldout=HeldOutSource(ListStream([50, 40], seed=3), 32),
            report=report,
        )


def main(place: Path) -> None:
    torch.set_num_threads(1)
    processes = distributed.start()
    for name in ("ddp", "fsdp"):
        laid = dataclasses.replace(processes, layout=create_layout(name, processes.world_size))
        train(laid, place / name)
        train(laid, place / f"{name}_poisoned", poisoned=True)
    sharded = dataclasses.replace(processes, layout=create_layout("fsdp", processes.world_size))
    train(sharded, place / "one_then_two", resume=True)
    train(sharded, place / "muon", optimizer="muon")
    processes.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
