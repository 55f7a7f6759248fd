"""What watching costs: share of the CPU time of a run that goes into the figures of metrics.jsonl.

    taskset -c 0 python tests/bench/curves_cost.py [--steps 20] [--layers 6] [--width 320]

A model of about 10M parameters, 8 sequences of 512 tokens a step, `--log-every` as by default. The calls that the loop makes for the curves are timed one by one (CPU
time), and set against the CPU time of the steps they stand in. One process, so no pairs of runs are needed: the shares are of the same steps.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

from tiny import ListStream, loop_settings

from llmkit.io.record import Lineage
from llmkit.model.config import ModelConfig
from llmkit.model.decoder import Decoder
from llmkit.training import loop
from llmkit.training import session as sessions
from llmkit.training.data import StreamSource
from llmkit.training.metrics import step_metrics
from llmkit.training.metrics.log import read_metrics
from llmkit.training.objectives import next_token
from llmkit.training.optim.schedule import build_schedule
from llmkit.training.source_groups import document_groups

VOCABULARY = 8192


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=320)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    config = ModelConfig(
        vocab_size=VOCABULARY,
        hidden_size=asked.width,
        intermediate_size=asked.width * 8 // 3,
        num_hidden_layers=asked.layers,
        num_attention_heads=asked.width // 64,
        num_key_value_heads=asked.width // 64,
        head_dim=64,
        max_position_embeddings=512,
    )
    spent: dict[str, float] = defaultdict(float)

    def timed(owner: Any, name: str, label: str) -> None:
        original = getattr(owner, name)

        def call(*arguments: Any, **named: Any) -> Any:
            began = time.process_time()
            try:
                return original(*arguments, **named)
            finally:
                spent[label] += time.process_time() - began

        setattr(owner, name, call)

    for name in ("_count_contents", "add_losses", "local_sums", "before_update", "after_update", "finish_step"):
        timed(step_metrics.StepMetrics, name, name)
    timed(step_metrics, "activation_statistics", "activation_statistics (in finish_step)")
    timed(loop, "accumulate", "step")
    timed(loop, "update", "step")
    stream = ListStream([300] * 4000, VOCABULARY)
    stream.data = np.random.default_rng(0).integers(0, VOCABULARY, stream.tokens).astype(np.uint16)
    sizes = np.full(4000, 300)
    groups = document_groups(sizes, np.arange(4000, dtype=np.int32) % 8, [f"source{i}" for i in range(8)], None)
    sessions._token_bytes = lambda files, size: torch.full((size,), 4)
    with tempfile.TemporaryDirectory() as place:
        run = Path(place) / "run"
        source = StreamSource(stream, 512, 8, asked.steps * 8 * 512, groups=groups)
        with sessions.session(loop_settings(str(run), precision="fp32", save_every=10**6)) as opened:
            opened.begin(Lineage("train", {}), [], 8, 512, "")
            model = Decoder(config)
            model.initialize(0)
            opened.train(
                opened.model(lambda: model),
                next_token,
                source,
                build_schedule("constant", 1e-3, source.tokens(source.steps)),
                tokenizer_files={},
            )
        records = list(read_metrics(run / "metrics.jsonl"))
    spent["step"] += spent["finish_step"]
    print(
        f"{config.parameters() / 1e6:.1f}M parameters, {asked.steps} steps of {8 * 512:,} tokens, {spent['step']:.1f} s of CPU in steps"
    )
    for label, seconds in spent.items():
        print(f"  {label:<16} {seconds:8.4f} s  {seconds / spent['step']:8.3%}")
    total = sum(
        seconds for label, seconds in spent.items() if label not in ("step", "activation_statistics (in finish_step)")
    )
    due = sum("entropy" in record for record in records)
    print(
        f"all curves together: {total / spent['step']:.2%} of a step ({due} of {len(records)} steps measured all of them)"
    )


if __name__ == "__main__":
    main()
