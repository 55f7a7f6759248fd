"""What the model says to a few prompts at every checkpoint: RUN/samples.jsonl, the prompt gallery.

    {"step": 500, "prompt": "The ", "how": "greedy", "completion": "first of the ..."}
    {"step": 500, "prompt": "The ", "how": "temperature 0.8, seed 0", "completion": "city ..."}

Each prompt is completed twice, greedily and by sampling with a seed of its own, MAX_TOKENS at most, so that checkpoints can be read beside each other.
Prompts are those of the first MAX_PROMPTS lines of a text file, or of JSON lines with `prompt` (or `text`). Nothing of the run changes: not the
weights, not the state of any random generator. A resumed run replaces what it says again.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmkit.errors import LlmkitError
from llmkit.io.atomic import atomic_file
from llmkit.model.generate import generate
from llmkit.model.pretrained.checkpoint import load_tokenizer
from llmkit.seeds import derive
from llmkit.training.metrics.activations import eagerly
from llmkit.training.metrics.log import read_metrics

MAX_PROMPTS = 32
MAX_TOKENS = 64
TEMPERATURE = 0.8
MAX_BYTES = 1 << 20  # of the file of prompts


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a file; LlmkitError where there is none."""
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise LlmkitError(f"{path}: over {MAX_BYTES >> 20} MiB", f"a few prompts are enough, {MAX_PROMPTS} at most")
        lines = [line for line in content.decode().splitlines() if line.strip()]
    except OSError as error:
        raise LlmkitError(f"{path}: {error.strerror}", "--samples names a file of prompts") from error
    except UnicodeDecodeError as error:
        raise LlmkitError(f"{path}: invalid UTF-8 (byte {error.start})", "one prompt a line") from error
    prompts = []
    for number, line in enumerate(lines, 1):
        if Path(path).suffix == ".jsonl" or line.startswith('{"'):
            try:
                record = json.loads(line)
                line = record["prompt"] if "prompt" in record else record["text"]
                if not isinstance(line, str):
                    raise TypeError
            except (ValueError, KeyError, TypeError, RecursionError):
                raise LlmkitError(f"{path}: line {number} is no object with a prompt", '{"prompt": "..."}') from None
        prompts.append(line)
    if not prompts or len(prompts) > MAX_PROMPTS:
        raise LlmkitError(f"{path}: {len(prompts)} prompts", f"give 1 to {MAX_PROMPTS}, one a line")
    return prompts


def gallery(
    path: Path | None, prompts: Sequence[str], tokenizer_files: dict[str, str], stop_ids: Sequence[int], seed: int = 0
) -> Callable[[Any, int], dict[str, float]]:
    """A function of (model, step) that adds the completions of that step to the file at `path`; for Training.at_checkpoint.

    Without a path it only takes its part in the passes of a model that lies over several processes.
    """
    codec = load_tokenizer(tokenizer_files, "the run")
    encoded = [list(codec.encode(prompt).ids) for prompt in prompts]

    def add(model: Any, step: int) -> dict[str, float]:
        limit = model.config.max_position_embeddings
        room = min(MAX_TOKENS, limit // 2)
        kept = [ids[-(limit - room) :] or [min(stop_ids, default=0)] for ids in encoded]
        records = []
        for how, temperature in (("greedy", 0.0), (f"temperature {TEMPERATURE}, seed {seed}", TEMPERATURE)):
            seeds = [derive(seed, "samples", i) for i in range(len(kept))]
            try:
                with undisturbed(model):
                    found = generate(
                        model, kept, max_new_tokens=room, temperature=temperature, seeds=seeds, stop_ids=stop_ids
                    )
            except LlmkitError as error:  # a model that diverged: the guard's business, not ours
                records += [{"step": step, "prompt": prompt, "how": how, "error": error.message} for prompt in prompts]
                continue
            for prompt, tokens in zip(prompts, found, strict=True):
                text = codec.decode(tokens, skip_special_tokens=False)
                records.append({"step": step, "prompt": prompt, "how": how, "completion": text})
        if path is None:
            return {}
        earlier = [r for r in read_metrics(path) if r["step"] < step] if path.exists() else []
        with atomic_file(path, force=True) as sink:
            sink.writelines(json.dumps(r, ensure_ascii=False).encode() + b"\n" for r in [*earlier, *records])
        return {}

    return add


@contextmanager
def undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """Leave the mode of the model, and the state of all random generators, as they were; compile nothing."""
    training, of_python, of_numpy = model.training, random.getstate(), np.random.get_state()
    model.eval()
    try:
        with torch.random.fork_rng(), eagerly():
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)
        model.train(training)
