"""Scores a model on tasks and documents: `llmkit eval` as functions.

score_model("run/", documents=["heldout.jsonl"])["perplexity"]["heldout.jsonl"]["bits_per_byte"]
score_model("chat/", tasks=["my_task"], include_path=["tasks/"], chat=True)["tasks"]["my_task"]["acc,none"]
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any

from llmkit.chat.templates import render
from llmkit.evaluation.harness import DecoderLM, end_of_text_id, evaluate, task_manager
from llmkit.evaluation.perplexity import perplexity
from llmkit.io.documents import DocumentReader
from llmkit.model.decoder import Decoder
from llmkit.model.pretrained.checkpoint import LoadedModel, load_for_inference, load_tokenizer

Loaded = tuple[Decoder, LoadedModel]
Advance = Callable[[int], None]  # called with the number of further documents or requests


def score_model(
    path: str,
    *,
    tasks: Sequence[str] = (),
    documents: Sequence[str] = (),
    include_path: Sequence[str] = (),
    limit: int | None = None,
    shots: int | None = None,
    chat: bool = False,
    stride: int | None = None,
    dtype: str = "",
    device: str = "",
    seed: int = 0,
) -> dict[str, Any]:
    """Score the model directory or run at `path`, like `llmkit eval`: "perplexity" by file, "tasks" by task.

    `include_path` are directories of task YAML files. Raises LlmkitError for an unreadable model, document or task, and
    UsageError for an unknown task.
    """
    manager = task_manager(list(tasks), list(include_path)) if tasks else None
    loaded = load_for_inference(path, dtype, device)
    scores: dict[str, Any] = {}
    for name in documents:
        with DocumentReader([name]) as reader:
            texts = (document.text for document in reader.documents())
            scores.setdefault("perplexity", {})[name] = score_documents(loaded, texts, stride=stride, limit=limit)
    if tasks:
        scores["tasks"] = score_tasks(loaded, tasks, manager, limit=limit, shots=shots, chat=chat, seed=seed)
    return scores


def score_documents(
    loaded: Loaded,
    texts: Iterable[str],
    *,
    stride: int | None = None,
    limit: int | None = None,
    advance: Advance = lambda count: None,
) -> dict[str, Any]:
    """Nats per token, bits per byte and perplexity of the first `limit` texts, in windows moving by `stride` tokens."""
    model, info = loaded
    codec = load_tokenizer(info.tokenizer_files, info.path)
    codec.encode_special_tokens = True  # a literal "<|endoftext|>" in a document is plain text
    result = perplexity(
        model,
        lambda text: list(codec.encode(text, add_special_tokens=False).ids),
        islice(texts, limit),
        end_of_text_id(info),
        stride,
        advance,
    )
    return result.figures()


def score_tasks(
    loaded: Loaded,
    tasks: Sequence[str],
    manager: Any,
    *,
    limit: int | None = None,
    shots: int | None = None,
    chat: bool = False,
    seed: int = 0,
    advance: Advance = lambda count: None,
) -> dict[str, dict[str, float]]:
    """Metrics of lm-eval tasks, with their standard errors; `manager` is a `harness.task_manager`."""
    model, info = loaded
    lm = DecoderLM(
        model,
        info,
        lambda messages, prompt: render(messages, info.tokenizer_files, prompt),
        advance=advance,
        seed=seed,
    )
    return evaluate(lm, list(tasks), manager, limit=limit, shots=shots, chat=chat, seed=seed)
