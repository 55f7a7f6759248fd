"""The gradient noise scale: the estimate, and its use in the loop."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmkit.cli.main import run_command
from llmkit.errors import LlmkitError
from llmkit.io.run_layout import find_checkpoints
from llmkit.training.checkpoint.trainer_state import load_trainer_state
from llmkit.training.metrics import gradient_noise
from llmkit.training.metrics.gradient_noise import NoiseScale, SmallBatchGradient
from llmkit.training.metrics.log import read_metrics


@pytest.mark.parametrize(("small", "whole", "parts"), [(4, 16, 1), (8, 64, 3)])
def test_estimate_finds_the_scale_of_a_known_problem(small: int, whole: int, parts: int) -> None:
    """Parity with the definition: for gradients G + noise of known covariance, tr(Σ)/|G|² = 40 samples, the
    estimate is within a tenth for any batch sizes."""
    draw = np.random.default_rng(0)
    width, scale = 200, 40.0
    deviations = np.linspace(0.5, 2, width)
    true = draw.normal(size=width)
    true *= np.sqrt((deviations**2).sum() / scale) / np.linalg.norm(true)
    estimate = NoiseScale()
    measurements = []
    for _ in range(2000):
        each = true + draw.normal(size=(whole, width)) * deviations
        norms = [float(((each[i * small : (i + 1) * small].mean(0)) ** 2).sum()) for i in range(parts)]
        estimate.update(sum(norms) / parts, small, float((each.mean(0) ** 2).sum()), whole)
        measurements.append((estimate.noise, estimate.signal))
    means = np.mean(measurements[200:], 0)
    assert means[0] / means[1] == pytest.approx(scale, rel=0.1)


def test_estimate_says_nothing_too_early_or_from_nothing() -> None:
    """Behaviour: no estimate before enough measurements, nor for a gradient hidden by noise.

    Small batches as large as the full one and infinities are ignored.
    """
    estimate = NoiseScale()
    for bad in ((1.0, 8, 1.0, 8), (1.0, 0, 1.0, 8), (float("inf"), 4, 1.0, 8), (1.0, 9, 1.0, 8)):
        estimate.update(*bad)
    assert estimate == NoiseScale()
    for _ in range(gradient_noise.ENOUGH):
        assert estimate.tokens is None
        estimate.update(3.0, 4, 2.0, 8)  # |G|² = 1, tr(Σ) = 8
    assert estimate.tokens == pytest.approx(8.0)
    drowned = NoiseScale()
    for _ in range(gradient_noise.ENOUGH):
        drowned.update(3.0, 4, 1.0, 8)
    assert drowned.tokens is None


def test_parts_of_processes_come_together() -> None:
    """Property: the mean over processes of the squared norm of each mean gradient, and the harmonic mean of
    their sizes; only the first micro-batch counts."""
    parameter = torch.nn.Parameter(torch.zeros(2))
    sums = np.zeros(3)
    for gradient, weight in (([3.0, 4.0], 2.0), ([0.0, 6.0], 3.0)):
        parameter.grad = torch.tensor(gradient) * 0.1
        part = SmallBatchGradient()
        part.observe([parameter], 0.0, 0.1)  # without weight
        part.observe([parameter], weight, 0.1)
        part.observe([parameter], 7.0, 0.1)
        sums += part.values
    square, size = part.combine(list(sums))
    assert square == pytest.approx((25 / 4 + 36 / 9) / 2)
    assert size == pytest.approx(2 / (1 / 2 + 1 / 3))
    assert SmallBatchGradient().combine((0.0, 0.0, 0.0)) == (0.0, 0.0)
    # Sharded, each of two processes has the norm of the joint gradient, with the weights of both: 6² / 5².
    assert SmallBatchGradient(sharded=True).combine((2 * 36.0, 2.0 + 3.0, 2.0)) == (pytest.approx(36 / 25), 5.0)


@pytest.mark.parametrize(("critical", "times"), [(10.0, 1), (1e9, 0)])
def test_said_once_where_the_batch_passes_the_critical_size(
    workplace: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    critical: float,
    times: int,
) -> None:
    """Behaviour: a run with more tokens per step than the scale is warned once, one below it is not.

    Every measurement is logged.
    """
    monkeypatch.setattr(gradient_noise, "EVERY", 1)
    monkeypatch.setattr(NoiseScale, "tokens", property(lambda self: critical))
    monkeypatch.chdir(workplace)
    assert (
        run_command("train", ["shards", "-m", "config.json", "--tokens", "1k", "-b", "2", "-o", str(tmp_path / "run")])
        == 0
    )
    assert capsys.readouterr().err.count("critical batch size") == times
    assert scales(tmp_path / "run") == [(step, critical) for step in range(1, 9)]


def test_a_run_set_back_to_its_start_knows_nothing() -> None:
    """Behaviour: restoring the empty state of a run that has just begun resets the measurements."""
    estimate = NoiseScale(1.0, 1.0, 99)
    estimate.restore([])  # of a run rolled back to its start
    assert estimate == NoiseScale()


def scales(run: Path) -> list[tuple[int, int]]:
    return [(r["step"], r["noise_scale"]) for r in read_metrics(run / "metrics.jsonl") if "noise_scale" in r]


def test_log_is_the_same_after_a_resumption(
    train: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Property: measured at fixed steps, a single micro-batch in halves.

    The running means survive a checkpoint, and the weights are the same.
    """
    monkeypatch.setattr(gradient_noise, "EVERY", 2)
    monkeypatch.setattr(gradient_noise, "ENOUGH", 3)

    def stop(record: dict[str, Any]) -> None:
        if record["step"] == 8:
            raise InterruptedError

    train(tmp_path / "whole", micro_batch_size=4)
    with pytest.raises(InterruptedError):
        train(tmp_path / "run", micro_batch_size=4, report=stop)
    train(tmp_path / "run", micro_batch_size=4, resume=True)
    assert [step for step, _ in scales(tmp_path / "run")] == [5, 7, 9, 11, 13, 15]
    assert scales(tmp_path / "run") == scales(tmp_path / "whole")
    assert (
        load_trainer_state(tmp_path / "run" / "final").noise == load_trainer_state(tmp_path / "whole" / "final").noise
    )
    one, other = ((tmp_path / run / "final" / "model.safetensors").read_bytes() for run in ("run", "whole"))
    assert one == other


def test_damaged_means_are_an_error(train: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """Behaviour: a checkpoint with anything else in their place is refused."""
    for wrong in ([1.0], [1.0, "2", 3], [1, 2, None], [float("nan"), 1, 1], [1, 1, 10**400]):
        with pytest.raises((ValueError, TypeError)):
            NoiseScale().restore(wrong)  # type: ignore[arg-type]
    train(tmp_path / "run")
    file = find_checkpoints(tmp_path / "run")[-1] / "state" / "trainer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"noise": {"a": 1}}))
    with pytest.raises(LlmkitError, match="not a readable trainer state"):
        load_trainer_state(file.parent.parent)
