"""AdamW and Muon: parity with torch's, properties of the orthogonalization, state in checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model

from llmkit.cli.main import run_command
from llmkit.errors import LlmkitError
from llmkit.training.checkpoint.trainer_state import load_optimizer_tensors
from llmkit.training.optim import muon
from llmkit.training.optim.muon import orthogonalize
from llmkit.training.optim.optimizer import (
    build_optimizer,
    named_state,
    optimizer_of_state,
    restore_optimizer,
    set_learning_rate,
)

RATES = [1e-3 * (1 + step % 3) for step in range(10)]


def gradients(model: torch.nn.Module, step: int) -> None:
    """Set random gradients, the same for all models of the same shape."""
    draw = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=draw)


def other_groups(
    model: torch.nn.Module, names: Callable[[str, torch.Tensor], bool], decay: float
) -> list[dict[str, Any]]:
    return [{"params": [p for name, p in model.named_parameters() if names(name, p)], "weight_decay": decay}]


def test_adamw_equals_torchs_unfused() -> None:
    """Parity: ten steps with changing learning rates against torch.optim.AdamW, one tensor at a time, within
    float32 rounding."""
    ours, theirs = tiny_model(), tiny_model()
    optimizer = build_optimizer(ours, "adamw", 0.1)
    groups = other_groups(theirs, lambda name, _: name.endswith("proj.weight"), 0.1)
    groups += other_groups(theirs, lambda name, _: not name.endswith("proj.weight"), 0.0)
    reference = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-8, foreach=False, fused=False)
    for step, rate in enumerate(RATES):
        for model, each in ((ours, optimizer), (theirs, reference)):
            gradients(model, step)
            for group in each.param_groups:
                group["lr"] = rate
            each.step()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("batch", [1, 1 << 24], ids=["one at a time", "all at once"])
def test_muon_equals_torchs(monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    """Parity: ten steps against torch.optim.Muon (patched to compute in float32) on the layers' square, wide
    and tall matrices, and AdamW on the rest."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)
    monkeypatch.setitem(muon.BATCH_ELEMENTS, "cpu", batch)
    ours, theirs = tiny_model(), tiny_model()
    optimizer = build_optimizer(ours, "muon", 0.1)
    matrices = other_groups(theirs, lambda name, p: p.dim() == 2 and "layers" in name, 0.1)
    rest = other_groups(theirs, lambda name, p: p.dim() < 2 or "layers" not in name, 0.0)
    references = [
        torch.optim.Muon(matrices, lr=0.0, momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=0.0, betas=(0.9, 0.95), eps=1e-8, foreach=False),
    ]
    for step, rate in enumerate(RATES):
        gradients(ours, step)
        gradients(theirs, step)
        set_learning_rate(optimizer, rate)
        optimizer.step()
        for reference in references:
            reference.param_groups[0]["lr"] = rate
            reference.step()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("shape", [(24, 24), (16, 48), (48, 16)])
def test_orthogonalize_keeps_the_directions(shape: tuple[int, int]) -> None:
    """Property: U·S·Vᵀ becomes about U·Vᵀ for any scale of the matrix; a zero matrix stays zero."""
    draw = torch.Generator().manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(3, *shape, generator=draw), full_matrices=False)
    scales = torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
    matrices = scales * (u * torch.linspace(0.05, 1, min(shape))) @ v
    result = orthogonalize(matrices)
    values = torch.linalg.svdvals(result)
    assert 0.6 < float(values.min()) < float(values.max()) < 1.3
    assert (result - u @ v).norm() / (u @ v).norm() < 0.3
    torch.testing.assert_close(orthogonalize(matrices[:1] * 1e6), result[:1], rtol=1e-3, atol=1e-3)
    assert not orthogonalize(torch.zeros(1, *shape)).any()


def test_muon_moves_as_much_as_adamw() -> None:
    """Property: the root mean square of a matrix's update is about 0.2 of the learning rate for any gradient
    (arXiv:2502.16982, eq. 4)."""
    model = tiny_model()
    optimizer = build_optimizer(model, "muon", 0.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradients(model, 0)
    set_learning_rate(optimizer, 1e-3)
    optimizer.step()
    for name, parameter in model.named_parameters():
        if name.endswith("proj.weight"):
            assert float((parameter.detach() - before[name]).square().mean().sqrt()) == pytest.approx(0.2e-3, rel=0.2)


def test_rate_factor_of_a_group() -> None:
    """Behaviour: a group's own factor scales the learning rate of the step."""
    optimizer = build_optimizer(tiny_model(), "muon")
    optimizer.param_groups[0]["rate"] = 0.25
    set_learning_rate(optimizer, 4e-3)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 4e-3, 4e-3][: len(optimizer.param_groups)]


def test_scaler_skips_a_step_with_infinite_gradients() -> None:
    """Behaviour: with fp16's loss scaler neither part of Muon takes such a step.

    The next one is taken with unscaled gradients.
    """
    model, plain = tiny_model(), tiny_model()
    optimizer, expected = build_optimizer(model, "muon"), build_optimizer(plain, "muon")
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.zeros(()))
    before = [p.detach().clone() for p in model.parameters()]
    set_learning_rate(optimizer, 1e-3)
    set_learning_rate(expected, 1e-3)
    for infinite in (True, False):
        gradients(model, 1)
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad.mul_(float("inf") if infinite else scaler.get_scale())
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if infinite:
            assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    gradients(plain, 1)
    expected.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_state_of_muon_and_adamw() -> None:
    """Behaviour: one moment per matrix, AdamW's two for the rest.

    A round trip through tensors; errors name a missing tensor or another optimizer.
    """
    model = tiny_model()
    optimizer = build_optimizer(model, "muon")
    gradients(model, 0)
    optimizer.step()
    tensors = dict(named_state(model, optimizer))
    assert optimizer_of_state(tensors) == "muon"
    assert "momentum.model.layers.0.mlp.up_proj.weight" in tensors
    assert {name for name in tensors if "embed" in name} == {
        f"{m}.model.embed_tokens.weight" for m in ("exp_avg", "exp_avg_sq")
    }
    other = build_optimizer(model, "muon")
    restore_optimizer(model, other, tensors, "state")
    again = dict(named_state(model, other))
    assert again.keys() == tensors.keys()
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)
    with pytest.raises(LlmkitError, match="x: state of muon, but this run uses adamw") as caught:
        restore_optimizer(model, build_optimizer(model), tensors, "x")
    assert caught.value.hint == "--optimizer muon"
    del tensors["momentum.model.layers.1.self_attn.q_proj.weight"]
    with pytest.raises(LlmkitError, match=r"momentum\.model\.layers\.1\.self_attn\.q_proj\.weight is missing"):
        restore_optimizer(model, other, tensors, "state")
    del tensors["step"]
    with pytest.raises(LlmkitError, match="step is missing"):
        restore_optimizer(model, other, tensors, "state")


def test_resumed_run_with_muon_ends_in_the_same_bytes(train: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """Property: interrupted between checkpoints, the run ends in the same bytes as an undisturbed one.

    Its loss falls.
    """

    def stop(record: dict[str, Any]) -> None:
        if record["step"] == 8:
            raise InterruptedError

    first: list[float] = []
    whole = train(tmp_path / "whole", optimizer="muon", report=lambda record: first.append(record["loss"]))
    with pytest.raises(InterruptedError):
        train(tmp_path / "run", optimizer="muon", report=stop)
    train(tmp_path / "run", optimizer="muon", resume=True)
    one, other = ((tmp_path / run / "final" / "model.safetensors").read_bytes() for run in ("run", "whole"))
    assert one == other
    assert whole["loss"] < first[0] - 0.3


def test_anneal_keeps_the_optimizer_of_the_run(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: a run trained by Muon is annealed by Muon, starting from its momenta."""
    monkeypatch.chdir(workplace)
    run, annealed = str(tmp_path / "run"), str(tmp_path / "annealed")
    assert (
        run_command("train", ["shards", "-m", "config.json", "--tokens", "2k", "--optimizer", "muon", "-q", "-o", run])
        == 0
    )
    assert run_command("anneal", [run, "shards", "--tokens", "1k", "-q", "-o", annealed]) == 0
    before, after = (load_optimizer_tensors(Path(place) / "final") for place in (run, annealed))
    assert optimizer_of_state(after) == "muon"
    assert after["step"] > before["step"]
