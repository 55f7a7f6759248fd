"""Fine-tuning against TRL's SFTTrainer on one CPU core: supervised tokens per CPU second on real rows, and the CPU time from the command to the
first step.

    python tests/bench/sft_speed.py --pairs 5
    python tests/bench/sft_speed.py --rows ../shared/data/instruct/dolly15k_from_docx.jsonl.zst

The model is a Llama of about 10M parameters in float32 (train_speed.py) with a vocabulary of 8,192 tokens, trained on the rows. All get the same
tokens and the same masks: those of `llmkit sft` in ChatML, rows over 1,024 tokens dropped. TRL's trainer takes them as `input_ids` and
`completion_mask`; its data loader, collator and loss are its own, with its defaults but for float32 and no activation checkpointing. Padded, a step
is 8 rows in random order; packed (`packing=True`, best fit) it is one sequence of 1,024 positions, as is ours. Every step ends with clipping at
norm 1 and fused AdamW.

Each is a process pinned to the first core; after a step to warm up they take turns of 8 steps. Printed are supervised tokens per CPU second of ours
over those of each, as the median of the turns (least to most), peak memory over that after the imports, the padding factor of the rows at batch 8
(positions over tokens), and CPU seconds (user and system) of a whole `llmkit sft` of one step and of TRL's script for the same.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

from peers import ROOT, SHARED, in_turn, ratios, rows_of, spread
from train_speed import FEED_FORWARD, HEADS, LAYERS, VOCABULARY, WIDTH, Contestant, resident

LENGTH, ROWS, STEPS = 1024, 8, 8
NAMES = ("llmkit", "TRL, padded", "TRL, packed")
FILES = (
    "rasbt_instruction_1100",
    "gpteacher_roleplay-simple-deduped-roleplay-instruct",
    "dolly15k_from_docx",
)
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
Step = Callable[[], int]  # takes a step; its supervised tokens


def prepare(source: Path, place: Path) -> float:
    """Write the model, the rows and their tokens into `place`; returns the padding factor at batch 8."""
    import numpy as np
    import orjson
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from llmkit.chat.encode import encode_conversations
    from llmkit.chat.templates import CHATML as TEMPLATE
    from llmkit.io.documents import DocumentReader, ReadOptions
    from llmkit.model.config import ModelConfig
    from llmkit.model.decoder import Decoder
    from llmkit.model.pretrained.checkpoint import save_model

    content = rows_of(source)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(CHATML),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(("\n".join(map(str, row.values())) for row in content), trainer)
    config = {"eos_token": CHATML[2], "pad_token": CHATML[0], "tokenizer_class": "PreTrainedTokenizerFast"}
    files = {
        "tokenizer.json": tokenizer.to_str(),
        "tokenizer_config.json": orjson.dumps(config).decode(),
        "chat_template.jinja": TEMPLATE,
    }
    sizes = (VOCABULARY, WIDTH, FEED_FORWARD, LAYERS, HEADS, HEADS, WIDTH // HEADS)
    model = Decoder(ModelConfig(*sizes, architecture="llama", max_position_embeddings=LENGTH, eos_token_id=2))
    model.initialize(0)
    (place / "base").mkdir()
    save_model(place / "base", model.state_dict(), model.config, files)
    (place / "rows.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in content))
    with DocumentReader([str(place / "rows.jsonl")], ReadOptions(text_key=None, on_bad_line="skip")) as reader:
        encoded = encode_conversations(reader, files, LENGTH)
    lengths = np.array([len(row.tokens) for row in encoded.rows])
    np.savez(
        place / "rows.npz",
        tokens=np.concatenate([row.tokens for row in encoded.rows]),
        weights=np.concatenate([row.weights for row in encoded.rows]),
        lengths=lengths,
    )
    order = np.random.default_rng(0).permutation(len(lengths))
    batches = np.split(lengths[order][: len(lengths) // ROWS * ROWS], len(lengths) // ROWS)
    return float(sum(ROWS * batch.max() for batch in batches) / sum(batch.sum() for batch in batches))


def tokens_and_weights() -> list[tuple[Any, Any]]:
    import numpy as np

    with np.load(Path(os.environ["PLACE"]) / "rows.npz") as stored:
        ends = np.cumsum(stored["lengths"])[:-1]
        return list(zip(np.split(stored["tokens"], ends), np.split(stored["weights"], ends), strict=True))


def ours() -> Callable[[], Step]:
    import accelerate  # noqa: F401
    import torch

    from llmkit.model.pretrained.checkpoint import load_model
    from llmkit.model.runtime import Runtime
    from llmkit.model.runtime import prepare as prepare_model
    from llmkit.training.data import PackedSource
    from llmkit.training.distributed.processes import start
    from llmkit.training.metrics.step_metrics import StepMetrics
    from llmkit.training.objectives import next_token
    from llmkit.training.optim.optimizer import build_optimizer
    from llmkit.training.train_step import TrainContext, accumulate, update

    def make() -> Step:
        processes = start("fp32")
        model = load_model(Path(os.environ["PLACE"]) / "base", torch.float32)[0]
        prepare_model(model, torch.device("cpu"), Runtime())
        source = PackedSource(tokens_and_weights(), LENGTH, 1, epochs=3)
        none: Any = None
        training = TrainContext(
            model=model, optimizer=build_optimizer(model, weight_decay=0.0), objective=next_token, metric_names=(),
            source=source, schedule=none, processes=processes, directory=none, state=none, write_model=none, initial=none,
            micro_batch=1,
        )  # fmt: skip
        watch = StepMetrics(model, source, processes, Path("."), 0)
        number = -1

        def step() -> int:
            nonlocal number
            number += 1
            accumulate(training, number % source.steps, watch)
            update(training, 1e-4, watch)
            return int(source.weight(number % source.steps))

        return step

    return make


def trl(packed: bool) -> Callable[[], Step]:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    def make() -> Step:
        place = os.environ["PLACE"]
        model = AutoModelForCausalLM.from_pretrained(f"{place}/base", use_cache=False, dtype=torch.float32)
        columns = [
            {"input_ids": tokens.tolist(), "completion_mask": (weights > 0).astype(int).tolist()}
            for tokens, weights in tokens_and_weights()
        ]
        config = SFTConfig(
            f"{place}/trl",
            per_device_train_batch_size=1 if packed else ROWS,
            packing=packed,
            max_length=LENGTH,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            completion_only_loss=True,
            report_to=[],
            dataset_num_proc=1,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        tokenizer = AutoTokenizer.from_pretrained(f"{place}/base")
        trainer = SFTTrainer(
            model=model, args=config, train_dataset=Dataset.from_list(columns), processing_class=tokenizer
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        loader = trainer.get_train_dataloader()

        def forever() -> Iterator[Any]:
            while True:
                yield from loader

        batches = forever()

        def step() -> int:
            batch = next(batches)
            counted = int((batch["labels"][:, 1:] != -100).sum())
            trainer.training_step(model, batch, torch.tensor(counted))
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return counted

        return step

    return make


def serve(make: Callable[[], Callable[[], Step]]) -> None:
    """As train_speed.serve, with turns of several steps: seconds, supervised tokens per second, megabytes."""
    import torch
    import torch._dynamo

    prepared = make()
    torch.set_num_threads(1)
    baseline = resident("VmRSS")
    torch.manual_seed(0)
    step = prepared()
    began = time.process_time()
    print(time.process_time() - began, step(), flush=True)
    for _ in sys.stdin:
        began = time.process_time()
        counted = sum(step() for _ in range(STEPS))
        seconds = time.process_time() - began
        print(seconds, counted / seconds, resident("VmHWM") - baseline, flush=True)


TRL_SCRIPT = """
import sys
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer
place = sys.argv[1]
rows = load_dataset("json", data_files=f"{place}/few.jsonl", split="train", cache_dir=f"{place}/cache")
config = SFTConfig(f"{place}/trl-run", max_steps=1, bf16=False, gradient_checkpointing=False, use_cpu=True, report_to=[],
                   save_strategy="no", disable_tqdm=True)
SFTTrainer(model=f"{place}/base", args=config, train_dataset=rows).train()
"""


def cpu_seconds(command: list[str]) -> float:
    """User and system time of a finished process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    subprocess.run(["taskset", "-c", "0", *command], env=environment, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def first_step(place: Path, pairs: int) -> None:
    """CPU seconds of a whole run of one step on 32 short rows, its model written."""
    import orjson

    few = [{"prompt": f"What is {i}?", "completion": f"The number {i}."} for i in range(32)]
    (place / "few.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in few))
    mine = [
        sys.executable,
        "-m",
        "llmkit",
        "sft",
        f"{place}/base",
        f"{place}/few.jsonl",
        "-b",
        "8",
        "-o",
        f"{place}/run",
    ]
    ways = {
        "llmkit": lambda: cpu_seconds([*mine, "-f", "-q"]),
        "TRL": lambda: cpu_seconds([sys.executable, "-c", TRL_SCRIPT, str(place)]),
    }
    in_turn(ways, 1)
    found = in_turn(ways, pairs)
    print(
        f"\nOne step on 32 rows, CPU seconds of the command: llmkit {spread(found['llmkit'], 2)}, TRL {spread(found['TRL'], 2)}"
    )


def compare(source: Path, pairs: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        factor = prepare(source, place)
        os.environ["PLACE"] = directory
        path = f"{ROOT}:{Path(__file__).parent}"
        contestants = {name: Contestant(name, sys.executable, path, __file__) for name in NAMES}
        in_turn({name: contestant.step for name, contestant in contestants.items()}, 1)
        for contestant in contestants.values():
            contestant.losses.clear()
        in_turn({name: contestant.step for name, contestant in contestants.items()}, pairs)
        speeds = {name: contestant.losses for name, contestant in contestants.items()}
        for name, contestant in contestants.items():
            contestant.close()
            ratio = spread(ratios(speeds[NAMES[0]], speeds[name]), 2)
            share = f"{ratio} (padding {factor:.2f})" if name == NAMES[1] else ratio
            print(
                f"| {source.name.partition('.')[0]:.30} | {name} | {share} | {statistics.median(speeds[name]):,.0f} |"
                f" {contestant.memory:.0f} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--rows", type=Path, action="append", help="JSONL.zst of rows (default: three files)")
    parser.add_argument("--be", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.be:
        return serve(ours if given.be == NAMES[0] else lambda: trl("packed" in given.be))
    (ROOT / ".cache").mkdir(exist_ok=True)
    sources = given.rows or [SHARED / "instruct" / f"{name}.jsonl.zst" for name in FILES]
    print(f"{date.today()}, {given.pairs} turns of {STEPS} steps\n")
    print(
        "| rows | | ours over it, supervised tokens per CPU second | per second | memory, MB |\n|---|---|---|---|---|"
    )
    for source in sources:
        compare(source, given.pairs)
    with tempfile.TemporaryDirectory() as directory:
        prepare(sources[0], Path(directory))
        first_step(Path(directory), given.pairs)


if __name__ == "__main__":
    main()
