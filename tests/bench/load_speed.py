"""Opening a model directory of a gigabyte against reading every byte of it, and against transformers.

    python tests/bench/load_speed.py --pairs 5

transformers writes a random qwen2 of 230M parameters in float32, in shards of 250 MB. Each turn opens it once in a new process pinned to the first
core, in which the files are in the page cache and the libraries are imported: `load_model`, which `train --from`, `sft`, `dpo` and `average` call; all
files read into new memory and kept; all read into one buffer of a megabyte; `from_pretrained`. Printed are the CPU time over that of reading into
new memory, median of the turns (least to most), and the peak memory over that after the imports.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

from peers import call, in_turn, ratios, spread

SIZES = {
    "vocab_size": 32_000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
}
WAYS = ("read, kept", "read, one buffer", "llmkit", "transformers")


def write(directory: Path) -> float:
    """Megabytes of the directory."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **SIZES))
    model.save_pretrained(directory, max_shard_size="250MB")
    return sum(file.stat().st_size for file in directory.iterdir()) / 1e6


def work(way: str, directory: Path) -> None:
    """Open the directory once; prints CPU seconds and the growth of the peak memory in megabytes."""
    import torch
    import transformers

    from llmkit.model.pretrained.checkpoint import load_model

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    files = [file for file in directory.iterdir() if file.suffix == ".safetensors"]
    kept: Any = None
    baseline, began = resident("VmRSS"), time.process_time()
    if way == "llmkit":
        kept = load_model(directory)
    elif way == "transformers":
        kept = transformers.AutoModelForCausalLM.from_pretrained(directory)
    elif way == "read, kept":
        kept = [file.read_bytes() for file in files]
    else:
        buffer = bytearray(1 << 20)
        for file in files:
            with open(file, "rb", buffering=0) as stream:
                while stream.readinto(buffer):
                    pass
    print(time.process_time() - began, resident("VmHWM") - baseline)
    del kept


def resident(name: str) -> float:
    """Megabytes (10⁶ bytes): VmRSS now, VmHWM the most there ever were."""
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) * 1024 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--be", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.be:
        return work(given.be[0], Path(given.be[1]))
    memory: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary) / "model"
        size = write(directory)

        def measure(way: str) -> float:
            command = ["taskset", "-c", "0", sys.executable, __file__, "--be", way, str(directory)]
            seconds, peak = map(float, subprocess.check_output(command, text=True).split())
            memory[way] = peak
            return seconds

        ways = {way: lambda way=way: measure(way) for way in WAYS}  # type: ignore[misc]
        in_turn(ways, 1)
        seconds = in_turn(ways, given.pairs)
    print(f"{date.today()}, `{call()}`, {size:.0f} MB\n")
    print("| | CPU time over reading into new memory | CPU s, median | peak memory, MB |\n|---|---|---|---|")
    for way, found in seconds.items():
        over = spread(ratios(found, seconds[WAYS[0]]), 2)
        print(f"| {way} | {over} | {statistics.median(found):.2f} | {memory[way]:.0f} |")


if __name__ == "__main__":
    main()
