"""Chunked linear cross-entropy and token log-probabilities."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny import ListStream, tiny_model

from llmkit.training import objectives
from llmkit.training.data import StreamSource
from llmkit.training.optim.optimizer import (
    build_optimizer,
    clip_gradients,
    named_state,
    restore_optimizer,
    set_learning_rate,
)


@pytest.fixture
def problem() -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(50, 12, generator=draw).requires_grad_()
    head = torch.randn(33, 12, generator=draw).requires_grad_()
    targets = torch.randint(0, 33, (50,), generator=draw)
    factors = torch.rand(50, generator=draw) / 50
    return hidden, head, targets, factors


@pytest.mark.parametrize("chunk", [1, 33 * 20, 1 << 20])
def test_linear_cross_entropy_is_torch_cross_entropy(
    problem: tuple[torch.Tensor, ...], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parity with value and gradients of torch's cross-entropy on full logits, for any chunk size."""
    monkeypatch.setitem(objectives.CHUNK_ELEMENTS, "cpu", chunk)
    hidden, head, targets, factors = problem
    expected = (F.cross_entropy(hidden @ head.T, targets, reduction="none") * factors).sum()
    wanted = torch.autograd.grad(expected * 3, (hidden, head))
    result, token_losses = objectives.linear_cross_entropy(hidden, head, targets, factors)
    gradients = torch.autograd.grad(result * 3, (hidden, head))
    assert torch.allclose(result, expected, atol=1e-6)
    assert torch.allclose(token_losses, F.cross_entropy(hidden @ head.T, targets, reduction="none"), atol=1e-5)
    assert not token_losses.requires_grad
    for a, b in zip(gradients, wanted, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("chunk", [33 * 20, 1 << 20])
def test_z_loss_is_what_autograd_makes_of_it(
    problem: tuple[torch.Tensor, ...], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parity with value and gradients of autograd through logsumexp in float64; token losses exclude the z-loss."""
    monkeypatch.setitem(objectives.CHUNK_ELEMENTS, "cpu", chunk)
    hidden, head = (part.detach().double().requires_grad_() for part in problem[:2])
    targets, factors = problem[2], problem[3].double()
    logits = hidden @ head.T
    plain = F.cross_entropy(logits, targets, reduction="none")
    expected = ((plain + 0.3 * logits.logsumexp(1) ** 2) * factors).sum()
    result, token_losses = objectives.linear_cross_entropy(hidden, head, targets, factors, 0.3)
    assert result.item() == pytest.approx(expected.item(), rel=1e-12)
    assert torch.allclose(token_losses, plain.float())
    wanted = torch.autograd.grad(expected * 3, (hidden, head))
    for a, b in zip(torch.autograd.grad(result * 3, (hidden, head)), wanted, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("chunk", [33 * 20, 1 << 20])
def test_gradients_of_some_rows_alone(
    problem: tuple[torch.Tensor, ...], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parity with those rows of the gradient of the whole head, with z-loss and softcap; the others have none."""
    monkeypatch.setitem(objectives.CHUNK_ELEMENTS, "cpu", chunk)
    hidden, head, targets, factors = problem
    ids = torch.tensor([3, 4, 32])
    frozen, rows = head.detach(), head.detach()[ids].requires_grad_()
    for whole, part in (
        (
            objectives.linear_cross_entropy(hidden, head, targets, factors, 0.3, 5.0)[0],
            objectives.linear_cross_entropy(hidden, frozen, targets, factors, 0.3, 5.0, (ids, rows))[0],
        ),
        (
            objectives.token_log_probabilities(hidden, head, targets, 5.0) @ factors,
            objectives.token_log_probabilities(hidden, frozen, targets, 5.0, (ids, rows)) @ factors,
        ),
    ):
        assert torch.equal(whole, part)
        dx, dhead = torch.autograd.grad(whole * 3, (hidden, head))
        again, drows = torch.autograd.grad(part * 3, (hidden, rows))
        assert torch.equal(dx, again) and torch.allclose(drows, dhead[ids], atol=1e-6)


def test_log_shows_the_plain_loss_beside_the_z_loss() -> None:
    """Behaviour: with a z-loss the metrics hold both parts of the minimised loss, and `loss` is that of a run
    without one."""
    source = StreamSource(ListStream([40, 30, 50]), 16, 4, 64)
    model, batch = tiny_model(), source.batch(0, 0, 4)
    plain = objectives.next_token(model, batch, 0.1)
    result = objectives.next_token(model, batch, 0.1, z_loss=0.01)
    assert result.metrics["loss"].item() == pytest.approx(plain.loss.item(), rel=1e-6)
    assert (result.metrics["loss"] + result.metrics["z_loss"]).item() == pytest.approx(result.loss.item(), rel=1e-6)
    assert result.metrics["z_loss"].item() > 0.1


def test_token_log_probabilities(problem: tuple[torch.Tensor, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parity with value and gradients of torch's log-softmax, also for a loss that is not linear in them."""
    monkeypatch.setitem(objectives.CHUNK_ELEMENTS, "cpu", 33 * 20)
    hidden, head, targets, _ = problem
    expected = torch.log_softmax(hidden @ head.T, 1).gather(1, targets[:, None])[:, 0]
    result = objectives.token_log_probabilities(hidden, head, targets)
    assert torch.allclose(result, expected, atol=1e-5)
    wanted = torch.autograd.grad((expected**2).sum(), (hidden, head))
    gradients = torch.autograd.grad((result**2).sum(), (hidden, head))
    for a, b in zip(gradients, wanted, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def test_no_rows_no_loss(problem: tuple[torch.Tensor, ...]) -> None:
    """Behaviour: a batch without counted positions has loss 0 and gradient 0."""
    hidden, head, targets, factors = problem
    loss, _ = objectives.linear_cross_entropy(hidden[:0], head, targets[:0], factors[:0])
    (gradient,) = torch.autograd.grad(loss, head)
    assert loss == 0
    assert not gradient.any()


def test_tiny_factors_survive_half_precision(problem: tuple[torch.Tensor, ...]) -> None:
    """Property: with autocast to bfloat16 and factors of 1e-6 the gradients agree with float32 within the
    precision of bfloat16."""
    hidden, head, targets, factors = problem
    exact = torch.autograd.grad(objectives.linear_cross_entropy(hidden, head, targets, factors * 1e-4)[0], head)[0]
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = objectives.linear_cross_entropy(hidden, head, targets, factors * 1e-4)
    rough = torch.autograd.grad(loss, head)[0]
    assert rough.dtype == torch.float32
    assert (rough - exact).norm() < 0.02 * exact.norm()


def test_decay_groups_and_state() -> None:
    """Behaviour: matrices decay, embeddings and norms do not; the state survives a round trip through tensors."""
    model = tiny_model()
    optimizer = build_optimizer(model)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed = {names[id(p)] for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert all(name.endswith("proj.weight") for name in decayed)
    assert len(decayed) == 14
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    norm = clip_gradients(list(model.parameters()), 1.0)
    assert norm == pytest.approx(sum(p.numel() for p in model.parameters()) ** 0.5, rel=1e-5)
    after = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()  # type: ignore[union-attr]
    assert after == pytest.approx(1.0, rel=1e-4)
    set_learning_rate(optimizer, 1e-3)
    optimizer.step()
    tensors = dict(named_state(model, optimizer))
    other = build_optimizer(model)
    restore_optimizer(model, other, tensors, "state")
    assert all(torch.equal(tensors[key], value) for key, value in named_state(model, other))
    del tensors["exp_avg.model.norm.weight"]
    from llmkit.errors import LlmkitError

    with pytest.raises(LlmkitError, match=r"exp_avg\.model\.norm\.weight is missing"):
        restore_optimizer(model, other, tensors, "state")
