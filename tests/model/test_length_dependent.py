"""What depends on the length of a sequence: rotary embeddings that change with it, and learned positions in packed rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from open_models import BASE, WIDE, long, model_directory, rope

from llmkit.evaluation.scoring import score
from llmkit.model.decoder import positions_in_documents
from llmkit.model.generate import generate
from llmkit.model.pretrained.checkpoint import load_model

LONG = long(4, factor=4.0, original_max_position_embeddings=32)
PHI3 = BASE | {"original_max_position_embeddings": 32} | long(4)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3, longrope": ("phi3", PHI3),
    "llama, longrope": ("llama", BASE | LONG),
    "qwen3, dynamic": ("qwen3", WIDE | {"max_position_embeddings": 128} | rope("dynamic", factor=2.0)),
    "gpt2": ("gpt2", {}),
}
DRAW = torch.Generator().manual_seed(5)
PROMPTS = [torch.randint(2, 97, (length,), generator=DRAW).tolist() for length in (5, 26, 31, 40)]


def opened(name: str, directory: Path) -> Any:
    family, config = MODELS[name]
    model_directory(directory, family, None, config)
    return load_model(directory)[0]


@pytest.mark.parametrize("name", MODELS)
def test_completions_do_not_depend_on_the_batch(name: str, tmp_path: Path) -> None:
    """Property: a prompt beside longer ones is continued as alone."""
    model = opened(name, tmp_path)
    seeds = [1, 2, 3, 4]
    together = generate(model, PROMPTS, max_new_tokens=20, seeds=seeds)
    pairs = zip(PROMPTS, seeds, strict=True)
    assert together == [generate(model, [prompt], max_new_tokens=20, seeds=[seed])[0] for prompt, seed in pairs]
    assert len({token for tokens in together for token in tokens}) > 10


@torch.no_grad()
@pytest.mark.parametrize("name", ["phi3, longrope", "llama, longrope"])
def test_crossing_the_original_context(name: str, tmp_path: Path) -> None:
    """Parity with transformers without a cache: the keys of the first tokens are rotated again."""
    from transformers import AutoModelForCausalLM

    model = opened(name, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    for prompt in PROMPTS:
        tokens = list(prompt)
        for _ in range(12):
            tokens.append(int(theirs(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
        assert generate(model, [prompt], max_new_tokens=12, temperature=0)[0] == tokens[len(prompt) :]


@pytest.mark.parametrize("name", MODELS)
def test_scores_do_not_depend_on_the_batch(name: str, tmp_path: Path) -> None:
    """Property: padded rows are scored as alone."""
    model = opened(name, tmp_path)
    requests = [(prompt, len(prompt) - 1) for prompt in PROMPTS]
    alone = [score(model, [request])[0].logprob for request in requests]
    assert [item.logprob for item in score(model, requests)] == pytest.approx(alone, abs=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_packed_rows_are_computed_as_alone(name: str, tmp_path: Path) -> None:
    """Property: documents beside each other have their own positions and lengths."""
    model = opened(name, tmp_path)
    ids = torch.tensor([[token for prompt in PROMPTS for token in prompt]])
    documents = torch.tensor([[number for number, prompt in enumerate(PROMPTS) for _ in prompt]])
    packed = model(ids, document_ids=documents)[0].split([len(prompt) for prompt in PROMPTS])
    for logits, prompt in zip(packed, PROMPTS, strict=True):
        assert (logits - model(torch.tensor([prompt]))[0]).abs().max() < 1e-4


def test_positions_in_documents() -> None:
    """Behaviour: both are counted within each document, padding (-1) included."""
    positions, lengths = positions_in_documents(torch.tensor([[0, 0, 0, 1, 2, 2], [-1, -1, 4, 4, 4, 4]]))
    assert positions.tolist() == [[0, 1, 2, 0, 0, 1], [0, 1, 0, 1, 2, 3]]
    assert lengths.tolist() == [[3, 3, 3, 1, 2, 2], [2, 2, 4, 4, 4, 4]]
