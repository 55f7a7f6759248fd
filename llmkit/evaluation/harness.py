"""lm-eval over our decoder: its tasks, prompts and metrics, our forward pass.

`DecoderLM` implements lm-eval's model interface; `evaluate` runs tasks by name. Tasks come from directories of
local YAML files (whose data may be local JSONL, so nothing is downloaded) and from lm-eval itself (which
downloads their data from a hub, or finds it in its cache). Context and continuation are encoded together and
then split, as lm-eval does for Hugging Face models, so scores agree with its own model class.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from llmkit.chat.control_tokens import beginning_of, encode, hide, marker_in
from llmkit.errors import LlmkitError, unknown_name
from llmkit.evaluation.scoring import BATCH_TOKENS, score
from llmkit.model.decoder import Decoder
from llmkit.model.pretrained.checkpoint import LoadedModel, load_tokenizer

# (messages, add_generation_prompt) -> text: chat.templates.render with the tokenizer files of the model.
Render = Callable[[list[dict[str, str]], bool], str]

DEFAULT_NEW_TOKENS = 256
GENERATION_BATCH = 64  # prompts per batch
Advance = Callable[[int], None]  # called with the number of finished requests


class DecoderLM(TemplateLM):
    """lm-eval's interface to a loaded model."""

    def __init__(
        self,
        model: Decoder,
        info: LoadedModel,
        render: Render | None = None,
        batch_tokens: int = BATCH_TOKENS,
        advance: Advance | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self._seed = seed
        self.model = model
        self.info = info
        self.codec = load_tokenizer(info.tokenizer_files, info.path)
        self._render = render
        self.chat = False  # whether texts come from the chat template, so that names of control tokens are these
        self._batch_tokens = batch_tokens
        self._advance = advance

    @property
    def max_length(self) -> int:
        return self.model.config.max_position_embeddings

    @cached_property  # read for every choice of a task
    def eot_token_id(self) -> int:
        return end_of_text_id(self.info)

    @cached_property
    def _prefix(self) -> str:
        return str(self.codec.decode([self.prefix_token_id], skip_special_tokens=False))

    @property
    def prefix_token_id(self) -> int:
        bos = self.info.config.bos_token_id
        return bos if bos is not None else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        return self.info.path.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        text, marker = (string, marker_in(string)) if self.chat else hide(string, self.info.tokenizer_files)
        if marker:
            ids = encode(text, self.info.tokenizer_files, marker).ids
            return ids[len(beginning_of(self.info.tokenizer_files)) :] if add_special_tokens is False else ids
        # As in lm-eval's own class: with the tokenizer's prefix, unless the text (from a chat template) already has it.
        special = not string.startswith(self._prefix) if add_special_tokens is None else add_special_tokens
        return list(self.codec.encode(string, add_special_tokens=special).ids)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.info.tokenizer_files.get("chat_template.jinja", "") if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        if self._render is None:
            raise LlmkitError(
                f"{self.info.path}: no chat template", "omit --apply-chat-template, or fine-tune the model"
            )
        return self._render(hide(chat_history, self.info.tokenizer_files)[0], add_generation_prompt)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        pair: tuple[list[int], list[int]] = super()._encode_pair(
            context, hide(continuation, self.info.tokenizer_files)[0] if self.chat else continuation
        )
        return pair

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        scores: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return scores

    def _loglikelihood_tokens(self, requests: list[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        for (_, continuation), _, tokens in requests:
            if not 0 < len(tokens) <= self.max_length:
                problem = "is empty" if not tokens else f"has {len(tokens)} tokens, the context {self.max_length}"
                raise LlmkitError(
                    f"a choice of the task {problem}: {continuation[:60]!r}", "the task is not suitable for this model"
                )
        scores = score(
            self.model,
            [(context + tokens, len(tokens)) for _, context, tokens in requests],
            self._batch_tokens,
            self._advance,
        )
        return [(item.logprob, item.greedy) for item in scores]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        windows: list[tuple[list[int], int]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1):
                context, targets = make_disjoint_window(window)
                windows.append((context + targets, len(targets)))
                owners.append(number)
        parts: list[list[float]] = [[] for _ in requests]
        for owner, item in zip(owners, score(self.model, windows, self._batch_tokens, self._advance), strict=True):
            parts[owner].append(item.logprob)
        return [math.fsum(part) for part in parts]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Completions, greedy or sampled according to the task's generation arguments, cut at the first stop
        string.
        """
        from llmkit.model.generate import generate
        from llmkit.seeds import derive

        jobs = [self._generation_job(number, *request.args) for number, request in enumerate(requests)]
        answers = [""] * len(jobs)
        jobs.sort(key=lambda job: (job.settings, len(job.prompt)))
        for batch in _generation_batches(jobs):
            max_new_tokens, temperature, top_p, stops = batch[0].settings

            def ended(tokens: list[int], stops: tuple[str, ...] = stops) -> bool:
                return bool(stops) and _before(self._decode(tokens), stops)[1]

            completions = generate(
                self.model,
                [job.prompt for job in batch],
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                seeds=[derive(self._seed, "eval", job.number) for job in batch],
                stop_ids=sorted({*self.info.stop_ids, self.eot_token_id}),
                ended=ended,
            )
            for job, tokens in zip(batch, completions, strict=True):
                answers[job.number] = _before(self._decode(tokens), stops)[0]
            if self._advance:
                self._advance(len(batch))
        return answers

    def _generation_job(self, number: int, context: str, arguments: dict[str, Any]) -> _GenerationJob:
        options = normalize_gen_kwargs(arguments, min(DEFAULT_NEW_TOKENS, self.max_length // 2))
        max_new_tokens = options["max_gen_toks"]
        if not 0 < max_new_tokens < self.max_length:
            raise LlmkitError(
                f"a task asks for {max_new_tokens:,} new tokens, the model's context is {self.max_length:,}",
                "set max_gen_toks in the task's generation_kwargs, to leave room for the prompt",
            )
        stops = tuple(stop for stop in options["until"] or () if stop)
        temperature = max(float(options.get("temperature", 1.0)), 0.0) if options["do_sample"] else 0.0
        prompt = self.tok_encode(context)[-(self.max_length - max_new_tokens) :] or [self.prefix_token_id]
        settings = (max_new_tokens, temperature, float(options.get("top_p") or 1.0), stops)
        return _GenerationJob(number, prompt, settings)

    def _decode(self, tokens: list[int]) -> str:
        return str(self.codec.decode(list(tokens), skip_special_tokens=True))


@dataclass(frozen=True, slots=True)
class _GenerationJob:
    """One prompt of a task. `settings`: maximum number of new tokens, temperature, top-p, stop strings."""

    number: int
    prompt: list[int]
    settings: tuple[int, float, float, tuple[str, ...]]


def _generation_batches(jobs: list[_GenerationJob]) -> Iterator[list[_GenerationJob]]:
    """Batches of consecutive jobs with equal settings, at most GENERATION_BATCH each."""
    batch: list[_GenerationJob] = []
    for job in jobs:
        if batch and (job.settings != batch[0].settings or len(batch) == GENERATION_BATCH):
            yield batch
            batch = []
        batch.append(job)
    if batch:
        yield batch


def _before(text: str, stops: tuple[str, ...]) -> tuple[str, bool]:
    """`text` up to the first stop string, and whether there was one."""
    end = min((position for position in map(text.find, stops) if position >= 0), default=-1)
    return (text, False) if end < 0 else (text[:end], True)


def end_of_text_id(info: LoadedModel) -> int:
    """Id of the end-of-text token: the tokenizer's eos_token, else the configuration's first eos id."""
    try:
        token = json.loads(info.tokenizer_files.get("tokenizer_config.json", "{}")).get("eos_token")
    except (ValueError, AttributeError, RecursionError):
        token = None
    text = token.get("content") if isinstance(token, dict) else token
    if isinstance(text, str):
        token_id = load_tokenizer(info.tokenizer_files, info.path).token_to_id(text)
        if token_id is not None:
            return int(token_id)
    eos = info.config.eos_token_id
    if eos is None or eos == []:
        raise LlmkitError(
            f"{info.path}: no end-of-text token",
            "set eos_token_id in config.json or eos_token in tokenizer_config.json",
        )
    return eos[0] if isinstance(eos, list) else eos


def task_manager(names: list[str], include: list[str]) -> Any:
    """lm-eval's task manager for the named tasks; UsageError with the nearest names if one is unknown.

    The tasks that come with lm-eval are only indexed (which takes seconds) if a name is not found in `include`.
    """
    from lm_eval.tasks import TaskManager

    for directory in include:
        if not Path(directory).is_dir():
            raise LlmkitError(f"{directory}: no such directory", "--include-path takes a directory of task YAML files")
    manager = TaskManager(include_path=include or None, include_defaults=not include)
    if include and any(name not in manager.all_tasks for name in names):
        manager = TaskManager(include_path=include, include_defaults=True)
    for name in names:
        if name not in manager.all_tasks and not manager.match_tasks([name]):
            raise unknown_name("task", name, manager.all_tasks)
    return manager


def evaluate(
    lm: DecoderLM,
    tasks: list[str],
    manager: Any,
    *,
    limit: int | None = None,
    shots: int | None = None,
    chat: bool = False,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """task -> metric -> value. A metric `m` has its standard error in `m_stderr`, if lm-eval computes one;
    `items` is the number of items.
    """
    from lm_eval import evaluator

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    _seed_everything(seed)
    lm.chat = chat
    try:
        # Not simple_evaluate: it runs git in the working directory and collects facts about the machine.
        try:
            loaded = manager.load(list(tasks))
        except RuntimeError as error:  # datasets finds a script in place of data, which it does not run
            raise ValueError(error) from error
        for task in loaded["tasks"].values():
            default_shots = task.get_config("num_fewshot")
            if default_shots != 0:  # an explicit 0 is not to be overridden
                task.set_config(key="num_fewshot", value=shots if shots is not None else (default_shots or 0))
            task.set_fewshot_seed(seed=seed)
        results = evaluator.evaluate(
            lm,
            loaded,
            limit=limit,
            bootstrap_iters=1000,
            log_samples=False,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
        )
    except LlmkitError:
        raise
    except (ConnectionError, FileNotFoundError, OSError) as error:
        hint = "use tasks with local data (--include-path), or fill the hub's cache on a machine with network access"
        raise LlmkitError(f"task data of {', '.join(tasks)} cannot be loaded: {_first_line(error)}", hint) from error
    except (KeyError, ValueError, TypeError, AttributeError, AssertionError) as error:
        raise LlmkitError(
            f"a task among {', '.join(tasks)} fails: {type(error).__name__}: {_first_line(error)}",
            "check its YAML file",
        ) from error
    assert results is not None
    counts = results.get("n-samples", {})
    return {
        task: _metrics(values) | ({"items": counts[task]["effective"]} if task in counts else {})
        for task, values in results["results"].items()
    }


def _seed_everything(seed: int) -> None:
    """Tasks draw examples from the global random generators."""
    import random

    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _metrics(values: dict[str, Any]) -> dict[str, float]:
    """lm-eval's `acc,none` and `acc_stderr,none` as `acc` and `acc_stderr`; other filters than none stay in the
    name.
    """
    metrics = {}
    for key, value in values.items():
        name, _, filter_name = key.partition(",")
        if isinstance(value, (int, float)) and not isinstance(value, bool) and name != "alias" and "," in key:
            metrics[name if filter_name == "none" else f"{name},{filter_name}"] = float(value)
    return metrics


def _first_line(error: BaseException) -> str:
    text = re.sub(r"\s+", " ", str(error)).strip()
    return text[:200] or type(error).__name__
