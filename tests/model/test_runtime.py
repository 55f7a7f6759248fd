"""Replacements of the plain operations in training: CPU kernels, joined products, flex attention, checkpointing, fp8."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from random_models import VARIANTS, random_model

from llmkit.errors import UsageError
from llmkit.model import fused, runtime
from llmkit.model.decoder import Decoder
from llmkit.model.kernels import rows as kernels
from llmkit.model.operations import PLAIN
from llmkit.model.pretrained.checkpoint import save_model
from llmkit.model.runtime import Joined, Runtime, prepare

CPU = torch.device("cpu")
DRAW = torch.Generator().manual_seed(2)
IDS_BT, TARGETS_BT = torch.randint(0, 97, (2, 2, 300), generator=DRAW)
DOCUMENTS = torch.tensor([[0] * 50 + [1] * 120 + [2] * 90 + [-1] * 40, [7] * 129 + [8] * 171])
Outcome = tuple[float, dict[str, torch.Tensor]]


def outcome(model: Decoder, documents: torch.Tensor | None = None) -> Outcome:
    """Loss and gradients."""
    logits = model(IDS_BT, document_ids=documents)
    loss = F.cross_entropy(logits.flatten(0, 1), TARGETS_BT.flatten())
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


def same(found: Outcome, expected: Outcome, tolerance: float = 1e-5) -> bool:
    """Loss and gradients within `tolerance`, gradients relative to the largest of their tensor."""
    assert found[1].keys() == expected[1].keys()
    gaps = [float((found[1][n] - g).abs().max() / g.abs().max()) for n, g in expected[1].items()]
    return abs(found[0] - expected[0]) < tolerance and max(gaps) < 2 * tolerance


@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["causal", "documents"])
@pytest.mark.parametrize(
    "variant", ["qwen3, grouped, tied", "llama, one group a head, untied, biases", "olmo2, grouped, tied"]
)
def test_gradients_are_those_of_transformers(
    variant: str, documents: torch.Tensor | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parity with transformers: loss and every gradient of a prepared model, causal and with a document mask, in several blocks of attention."""
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(fused, "SCORES", 1 << 14)  # so that heads take several blocks
    model = random_model(**VARIANTS[variant])
    save_model(tmp_path, model.state_dict(), model.config, {})
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    prepare(model, CPU, Runtime())
    assert isinstance(model.operations, fused.Fused)
    allowed = torch.ones(300, 300, dtype=torch.bool).tril().expand(2, 1, 300, 300)
    if documents is not None:
        allowed = allowed & (documents[:, None, :, None] == documents[:, None, None, :])
    logits = theirs(IDS_BT, attention_mask=allowed, position_ids=torch.arange(300)[None]).logits
    loss = F.cross_entropy(logits.flatten(0, 1), TARGETS_BT.flatten())
    loss.backward()
    expected = loss.item(), {name: p.grad for name, p in theirs.named_parameters()}
    assert same(outcome(model, documents), expected)


@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["causal", "documents"])
@pytest.mark.parametrize("way", ["checkpointed", "checkpointed, plain", "joined"])
def test_runtime_options_change_only_rounding(way: str, documents: torch.Tensor | None) -> None:
    """Property: activation checkpointing and joined products change results by rounding only, and no parameter names."""
    variant = VARIANTS["llama, one group a head, untied, biases"]
    model = random_model(**variant)
    prepare(model, CPU, Runtime(checkpoint=way.startswith("checkpointed")))
    if way.endswith("plain"):
        model.operations = PLAIN
    elif way == "joined":
        model.operations = Joined(join=True, flex=False)
    assert same(outcome(model, documents), outcome(random_model(**variant), documents))


@torch.no_grad()
@pytest.mark.parametrize("variant", ["qwen3, grouped, tied", "llama, one group a head, untied, biases"])
def test_flex_attention_sees_what_the_mask_allows(variant: str) -> None:
    """Parity with the plain operations: torch's flex_attention under our document mask (forward only: on a CPU it has no backward)."""
    model = random_model(**VARIANTS[variant])
    expected = model(IDS_BT, document_ids=DOCUMENTS)
    model.operations = Joined(join=False, flex=True)
    assert (model(IDS_BT, document_ids=DOCUMENTS) - expected).abs().max() < 1e-5
    assert (model(IDS_BT) - expected).abs().max() > 1e-2


def test_split_documents_use_plain_operations() -> None:
    """Behaviour: a document that continues later in its row attends to its first part, which blocks of keys would miss."""
    documents = DOCUMENTS.clone()
    documents[0, 280:] = 0
    assert fused.document_begins(documents, 2, 300) is None
    assert fused.document_begins(DOCUMENTS, 2, 300)[0, [0, 49, 50, 299]].tolist() == [0, 0, 50, 260]
    model = random_model()
    expected = model(IDS_BT, document_ids=documents)
    prepare(model, CPU, Runtime())
    assert torch.equal(model(IDS_BT, document_ids=documents), expected)


def test_threads_do_not_change_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Property: every kernel gives the same bits for any number of threads."""
    x, grad = (torch.randn(700, 64, generator=DRAW) for _ in range(2))
    weight = torch.randn(64, generator=DRAW)
    found = []
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        monkeypatch.setattr(fused, "GRAIN", 64)
        y, dx, inverse, dweight = torch.empty_like(x), torch.empty_like(x), torch.empty(700), torch.zeros(3, 64)
        fused.over_rows(kernels.norm, 700, 64, x, weight, np.float32(1e-6), y, inverse)
        fused.over_rows(kernels.norm_back, 700, 64, x, weight, inverse, grad, dx, dweight, together=kernels.BLOCK)
        logits = x.clone()
        losses = fused.cross_entropy(logits, torch.arange(700) % 64, grad[:, 0].contiguous(), 1e-3, True)
        found.append([y, dx, dweight, logits, *losses])
    assert all(torch.equal(one, several) for one, several in zip(*found, strict=True))


def test_exponential() -> None:
    """Parity with numpy in float64: within 3 units in the last place; NaN stays NaN, and large negative numbers give almost 0."""
    draw = np.random.default_rng(0)
    x = np.concatenate([draw.uniform(-87, 88, 20_000), draw.uniform(-1, 1, 5_000), [0.0]]).astype(np.float32)
    found = np.array([kernels.exp(value) for value in x[::25]])
    exact = np.exp(x[::25].astype(np.float64))
    assert np.abs(found / exact - 1).max() < 3 * 2**-23
    assert np.isnan(kernels.exp(np.float32(np.nan))) and 0 <= kernels.exp(np.float32(-np.inf)) < 1e-37


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_weights_propagate(bad: float) -> None:
    """Behaviour: a NaN or infinite weight gives a non-finite loss, which the guard detects."""
    model = random_model()
    prepare(model, CPU, Runtime())
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = bad
    assert not np.isfinite(outcome(model)[0])


def test_a_target_outside_the_vocabulary_is_an_error() -> None:
    """Behaviour: an IndexError, as in torch; compiled code would read beyond the row."""
    for target in (-1, 5):
        with pytest.raises(IndexError):
            fused.cross_entropy(torch.zeros(1, 5), torch.tensor([target]), torch.ones(1), 0.0, True)


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behaviour: if torch cannot compile, one line says why, and the model trains uncompiled."""

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("InvalidCxxCompiler: none of g++, clang\nmore")

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "unused")
    model, lines = random_model(), []
    prepare(model, CPU, Runtime(compile=True), lines.append)
    assert lines == ["nothing is compiled: InvalidCxxCompiler: none of g++, clang"]
    assert same(outcome(model), outcome(random_model()))


def test_without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behaviour: without numba the model trains with the plain operations."""
    monkeypatch.setitem(sys.modules, "llmkit.model.fused", None)
    monkeypatch.delattr("llmkit.model.fused")
    runtime.fused_kernels.cache_clear()
    try:
        model = random_model()
        prepare(model, CPU, Runtime())
        assert isinstance(model.operations, Joined) and runtime.cpu_kernels(torch.zeros(1)) is None
        assert same(outcome(model), outcome(random_model()))
    finally:
        runtime.fused_kernels.cache_clear()


def test_fp8() -> None:
    """Behaviour: a one-line error without torchao or a suitable GPU; emulated, layers keep their names and the loss stays close."""
    if not find_spec("torchao"):
        with pytest.raises(UsageError, match="fp8 needs torchao"):
            prepare(random_model(), CPU, Runtime(fp8=True))
        return
    with pytest.raises(UsageError, match="8 bits"):
        prepare(random_model(), CPU, Runtime(fp8=True))
    model, plain = random_model(), random_model()
    prepare(model, CPU, Runtime(fp8=True, emulate=True))
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Float8Linear"
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert outcome(model)[0] == pytest.approx(outcome(plain)[0], abs=0.05)
