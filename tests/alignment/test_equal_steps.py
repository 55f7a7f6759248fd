"""A step of fine-tuning is the same for every way to lay out its rows, with noise on the embeddings too."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_peft import FAMILIES, make_base

from llmkit.cli.main import run_command
from llmkit.model.decoder import Decoder
from llmkit.model.pretrained.checkpoint import load_model
from llmkit.training.data import Batch, PackedSource, collate
from llmkit.training.metrics.log import read_metrics
from llmkit.training.objectives import EmbeddingNoise, next_token

Rows = list[tuple[np.ndarray, np.ndarray]]
CONTEXT = 64


@pytest.fixture(scope="module", params=["llama", "gemma2", "gpt2"])
def model(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory, request: Any) -> Decoder:
    assert request.param in FAMILIES
    base = make_base(make_model, tmp_path_factory.mktemp("models") / request.param, request.param)
    return load_model(base, torch.float32)[0].train()


@pytest.fixture(scope="module")
def rows() -> Rows:
    """Rows of 3 to 40 tokens, of which about half are trained, some by a half."""
    draw = np.random.default_rng(0)
    sizes = draw.integers(3, 41, 14)
    weights = [draw.choice([0, 0.5, 1], size, p=[0.4, 0.2, 0.4]).astype(np.float32) for size in sizes]
    for weight in weights:
        weight[-1] = 1
    tokens = [draw.integers(0, 300, size).astype(np.int32) for size in sizes]
    return list(zip(tokens, weights, strict=True))


def step(model: Decoder, batches: list[Batch], weight: float, **options: Any) -> tuple[float, torch.Tensor]:
    """Loss and gradients of a step of these micro-batches."""
    model.zero_grad()
    loss = 0.0
    for batch in batches:
        result = next_token(model, batch, 1 / weight, **options)
        result.loss.backward()
        loss += float(result.loss.detach())
    return loss, torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])


def micro_batches(source: PackedSource, size: int) -> list[Batch]:
    assert source.steps == 1
    return [source.batch(0, i, min(i + size, source.rows(0))) for i in range(0, source.rows(0), size)]


@pytest.mark.parametrize("noise", [None, EmbeddingNoise(5.0, 1)])
def test_layout_does_not_change_the_step(model: Decoder, rows: Rows, noise: EmbeddingNoise | None) -> None:
    """Property: loss and gradients are equal to 1e-6 for micro-batches of any size; without noise, which belongs to a
    row's number, also for packed sequences, rows padded to the context or to the longest, and rows alone."""
    packed = PackedSource(rows, CONTEXT, 100)
    weight = packed.weight(0)
    reference_loss, reference = step(model, micro_batches(packed, 100), weight, noise=noise)
    layouts = [micro_batches(packed, 1), micro_batches(packed, 2), micro_batches(packed, 3)]
    if noise is None:
        layouts += [
            [collate([[row] for row in rows], CONTEXT)],
            [collate([[row] for row in rows], 40)],
            [collate([[row]], len(row[0]) - 1) for row in rows],
        ]
    else:
        assert abs(step(model, layouts[0], weight)[0] - reference_loss) > 1e-4
    for batches in layouts:
        loss, gradients = step(model, batches, weight, noise=noise)
        assert abs(loss - reference_loss) <= 1e-6 * reference_loss
        assert (gradients - reference).norm() <= 1e-6 * reference.norm()


def test_noise_is_that_of_neftune(rows: Rows) -> None:
    """Property: uniform within ±alpha / √(tokens · width) of each row, nowhere else, drawn anew for every row and epoch
    and equal in every run; another seed gives other noise."""
    source = PackedSource(rows, CONTEXT, 2, epochs=2)
    seen = []
    for number in range(source.steps):
        batch = source.batch(number, 0, source.rows(number))
        noise = EmbeddingNoise(5.0, 1)(batch, 32)
        assert torch.equal(noise, EmbeddingNoise(5.0, 1)(batch, 32))
        assert not torch.equal(noise, EmbeddingNoise(5.0, 2)(batch, 32))
        assert batch.document_ids is not None
        assert not noise[batch.document_ids < 0].any()
        for sequence, start, stop, _ in batch.extra["rows"].tolist():
            span = noise[sequence, start:stop]
            limit = 5.0 / ((stop - start) * 32) ** 0.5
            assert 0.9 * limit < span.abs().max() <= limit
            assert abs(float(span.std()) - limit / 3**0.5) < 0.2 * limit
            seen.append(float(span[0, 0]))
    assert len(set(seen)) == len(seen) == 2 * len(rows)


def test_noise_and_prompts_in_a_run(directory: Path) -> None:
    """Behaviour: --neftune changes training, not the held-out loss of the start, and a repeated run not at all; a resumed
    run ends in the same bytes; --prompts are answered in the chat template at every checkpoint."""
    (directory / "prompts.jsonl").write_text(
        '{"prompt": "what is it"}\n{"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]}\n'
    )
    rows = (directory / "chat.jsonl").read_bytes().splitlines(keepends=True)
    (directory / "few.jsonl").write_bytes(b"".join(rows[:12]))
    options = ["base", "few.jsonl", "-b", "1", "--heldout", "few.jsonl", "--save-every", "3", "--keep", "0", "-q"]
    noisy = [*options, "--neftune", "5", "--prompts", "prompts.jsonl"]
    for output, arguments in {"plain": options, "noisy": noisy, "again": noisy}.items():
        assert run_command("sft", [*arguments, "-o", output]) == 0
    digests = {
        name: (directory / name / "final" / "model.safetensors").read_bytes() for name in ("plain", "noisy", "again")
    }
    assert digests["noisy"] == digests["again"] != digests["plain"]
    samples = [json.loads(line) for line in (directory / "noisy" / "samples.jsonl").read_text().splitlines()]
    assert {type(sample["prompt"]) for sample in samples} == {list}
    steps = sorted(
        int(path.name.removeprefix("step-")) for path in (directory / "noisy" / "checkpoints").glob("step-*")
    )
    assert [sample["step"] for sample in samples] == [step for step in steps for _ in range(4)]
    assert len(steps) > 1
    (directory / "noisy" / "final").unlink()
    (directory / "noisy" / "latest").unlink(missing_ok=True)
    shutil.rmtree(directory / "noisy" / "checkpoints" / f"step-{steps[-1]:08}")
    assert run_command("sft", [*noisy, "-o", "noisy", "--resume"]) == 0
    assert (directory / "noisy" / "final" / "model.safetensors").read_bytes() == digests["again"]
    assert next(iter(read_metrics(directory / "noisy" / "metrics.jsonl")))


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf"])
def test_wrong_noise(directory: Path, value: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Behaviour: one line for an alpha that is not above 0 and finite."""
    assert run_command("sft", ["base", "chat.jsonl", f"--neftune={value}", "-o", "x"]) == 2
    assert "--neftune" in capfd.readouterr().err
    assert not Path("x").exists()
