"""Completions of a few prompts at every checkpoint: RUN/samples.jsonl, the prompt gallery.

    {"step": 500, "prompt": "The ", "how": "greedy", "completion": "first of the ..."}
    {"step": 500, "prompt": "The ", "how": "temperature 0.8, seed 0", "completion": "city ..."}

Each prompt is completed twice, greedily and by sampling with a fixed seed, by at most MAX_TOKENS tokens, so
that checkpoints can be compared. The prompts, at most MAX_PROMPTS, are the lines of a text file, or rows of a
JSON lines file as `llmkit generate` takes them; a chat model gets them in its template. Sampling changes nothing
in the run: neither the weights nor the state of any random generator. A resumed run replaces the completions of
steps that it repeats.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmkit.chat.messages import RowError
from llmkit.chat.prompts import Prompt
from llmkit.chat.prompts import read_prompts as prompts_of_row
from llmkit.errors import LlmkitError
from llmkit.io.atomic import atomic_file
from llmkit.model.generate import generate
from llmkit.model.pretrained.checkpoint import load_tokenizer
from llmkit.seeds import derive
from llmkit.training.metrics.activations import eager_mode
from llmkit.training.metrics.log import read_metrics

MAX_PROMPTS = 32
MAX_TOKENS = 64
TEMPERATURE = 0.8
MAX_BYTES = 1 << 20  # of the file of prompts


def read_prompts(path: str | Path, tokenizer_files: Mapping[str, str], chat: bool = False) -> list[Prompt]:
    """The prompts of a file, with `chat` in the chat template; raises LlmkitError if there are none, too many, or one
    is invalid."""
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise LlmkitError(f"{path}: over {MAX_BYTES >> 20} MiB", f"a few prompts are enough, {MAX_PROMPTS} at most")
        lines = [line for line in content.decode().splitlines() if line.strip()]
    except OSError as error:
        raise LlmkitError(f"{path}: {error.strerror}", "--prompts takes a file of prompts") from error
    except UnicodeDecodeError as error:
        raise LlmkitError(f"{path}: invalid UTF-8 (byte {error.start})", "one prompt per line") from error
    prompts: list[Prompt] = []
    for number, line in enumerate(lines, 1):
        fields = {"prompt": line}
        if Path(path).suffix.lower() == ".jsonl" or line.startswith('{"'):
            try:
                fields = dict(json.loads(line))
            except (ValueError, TypeError, RecursionError):
                raise LlmkitError(
                    f"{path}: line {number} is not an object with a prompt", '{"prompt": "..."}'
                ) from None
        try:
            prompts += prompts_of_row(fields, tokenizer_files, chat=chat)
        except RowError as error:
            raise LlmkitError(f"{path}: line {number}: {error}", "rows as `llmkit generate` takes them") from error
    if not prompts or len(prompts) > MAX_PROMPTS:
        raise LlmkitError(f"{path}: {len(prompts)} prompts", f"give 1 to {MAX_PROMPTS}, one per line")
    return prompts


class PromptGallery:
    """Adds the completions of a step to the file at `path`; an entry of TrainContext.at_checkpoint.

    Without a path it only takes part in the forward passes of a model sharded over several processes.
    """

    def __init__(
        self,
        path: Path | None,
        prompts: Sequence[Prompt],
        tokenizer_files: dict[str, str],
        stop_ids: Sequence[int],
        seed: int = 0,
    ) -> None:
        self._path, self._prompts, self._stop_ids, self._seed = path, prompts, stop_ids, seed
        self._tokenizer = load_tokenizer(tokenizer_files, "the run")

    def __call__(self, model: Any, step: int) -> dict[str, float]:
        records = self._complete(model, step)
        if self._path is None:
            return {}
        earlier = [r for r in read_metrics(self._path) if r["step"] < step] if self._path.exists() else []
        with atomic_file(self._path, force=True, follow=False) as sink:
            sink.writelines(json.dumps(r, ensure_ascii=False).encode() + b"\n" for r in [*earlier, *records])
        return {}

    def _complete(self, model: Any, step: int) -> list[dict[str, Any]]:
        """A record for each prompt, greedy and sampled. Prompts longer than the context are cut at the front."""
        context = model.config.max_position_embeddings
        max_tokens = min(MAX_TOKENS, context // 2)
        prompt_ids = [p.tokens[-(context - max_tokens) :] or [min(self._stop_ids, default=0)] for p in self._prompts]
        records: list[dict[str, Any]] = []
        for how, temperature in (("greedy", 0.0), (f"temperature {TEMPERATURE}, seed {self._seed}", TEMPERATURE)):
            seeds = [derive(self._seed, "samples", i) for i in range(len(prompt_ids))]
            try:
                with preserved_state(model):
                    completions = generate(
                        model,
                        prompt_ids,
                        max_new_tokens=max_tokens,
                        temperature=temperature,
                        seeds=seeds,
                        stop_ids=self._stop_ids,
                    )
            except LlmkitError as error:  # a diverged model, which the guard deals with
                for prompt in self._prompts:
                    records.append({"step": step, "prompt": prompt.content, "how": how, "error": error.message})
                continue
            for prompt, tokens in zip(self._prompts, completions, strict=True):
                text = self._tokenizer.decode(tokens, skip_special_tokens=False)
                records.append({"step": step, "prompt": prompt.content, "how": how, "completion": text})
        return records


@contextmanager
def preserved_state(model: torch.nn.Module) -> Iterator[None]:
    """Run a block in evaluation mode without compilation.

    Restore the model's mode and the state of all random generators afterwards.
    """
    training, python_state, numpy_state = model.training, random.getstate(), np.random.get_state()
    model.eval()
    try:
        with torch.random.fork_rng(), eager_mode():
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        model.train(training)
