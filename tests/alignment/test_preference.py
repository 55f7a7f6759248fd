"""Direct preference optimisation."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llmkit.alignment.pairs import (
    FIGURES,
    PairSource,
    pair_batch,
    preference_objective,
    reference_log_probabilities,
    sequence_log_probabilities,
)
from llmkit.alignment.preference import LOSSES
from llmkit.chat.masks import EncodedRow
from llmkit.errors import UsageError
from llmkit.model.decoder import Decoder
from llmkit.model.pretrained.checkpoint import load_model
from llmkit.training.distributed.processes import start


@pytest.fixture
def rows() -> list[EncodedRow]:
    """Ten pairs of 8 to 40 tokens, the loss on the second half of each."""
    draw, encoded = np.random.default_rng(0), []
    for _ in range(20):
        n = int(draw.integers(8, 40))
        weights = np.zeros(n, dtype=np.float32)
        weights[n // 2 :] = 1
        encoded.append(EncodedRow(draw.integers(0, 290, n).astype(np.int32), weights))
    return encoded


@pytest.fixture
def model(base: Path) -> Decoder:
    return load_model(base, torch.float32)[0]


def by_hand(model: Decoder, row: EncodedRow) -> torch.Tensor:
    """log π of one row, from the logits of that row alone."""
    tokens = torch.from_numpy(row.tokens.astype(np.int64))
    log_p = torch.log_softmax(model(tokens[None, :-1])[0], -1).gather(1, tokens[1:, None])[:, 0]
    return (log_p * torch.from_numpy(row.weights[1:])).sum()


def test_log_probabilities_do_not_depend_on_the_batch(model: Decoder, rows: list[EncodedRow]) -> None:
    """Property: padded into a batch with others, each row has the same log-probability as alone, within 1e-5."""
    batch = pair_batch(rows, np.arange(10), torch.zeros(10, 2))
    with torch.no_grad():
        together = sequence_log_probabilities(model, batch)
        order = [2 * i + side for side in (0, 1) for i in range(10)]
        alone = torch.stack([by_hand(model, rows[i]) for i in order])
    assert torch.allclose(together, alone, rtol=1e-5, atol=1e-5)


def test_reference_is_computed_once_and_kept(model: Decoder, rows: list[EncodedRow], tmp_path: Path) -> None:
    """Behaviour: values are those of the model; a second call reads the file; other rows are recomputed."""
    processes, loads = start(), []

    def initial() -> Decoder:
        loads.append(1)
        return model

    cache = tmp_path / "reference.safetensors"
    first = reference_log_probabilities(initial, rows, processes, 3, cache, "digest")
    assert first.shape == (10, 2)
    with torch.no_grad():
        assert torch.allclose(first[4, 1], by_hand(model, rows[9]), rtol=1e-5)
    assert torch.equal(reference_log_probabilities(initial, rows, processes, 3, cache, "digest"), first)
    assert len(loads) == 1
    reference_log_probabilities(initial, rows[:4], processes, 3, cache, "digest")
    reference_log_probabilities(initial, rows[:4], processes, 3, cache, "other model")
    assert len(loads) == 3


def test_loss_at_step_0_is_ln_2(model: Decoder, rows: list[EncodedRow], tmp_path: Path) -> None:
    """Property: with the model as its own reference the loss is ln 2 and the margin 0, in any micro-batch."""
    reference = reference_log_probabilities(lambda: model, rows, start(), 4, tmp_path / "r.safetensors", "")
    source = PairSource(rows, reference, 10)
    totals = dict.fromkeys(("loss", *FIGURES), 0.0)
    for a, b in ((0, 1), (1, 7), (7, 10)):
        result = preference_objective(0.1)(model, source.batch(0, a, b), 1 / source.weight(0))
        for name, value in ({"loss": result.loss.detach()} | result.metrics).items():
            totals[name] += float(value)
    assert totals["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert totals["margin"] == pytest.approx(0, abs=1e-5)


def test_loss_and_gradients_equal_a_direct_implementation(model: Decoder, rows: list[EncodedRow], base: Path) -> None:
    """Parity with the definition, computed as in TRL from all logits and a second reference model: loss and every gradient."""
    beta = 0.3
    reference_model = load_model(base, torch.float32)[0]
    with torch.no_grad():
        for parameter in reference_model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        reference = torch.stack([by_hand(reference_model, row) for row in rows]).view(10, 2)
    log_p = torch.stack([by_hand(model, row) for row in rows]).view(10, 2)
    logits = (log_p[:, 0] - log_p[:, 1]) - (reference[:, 0] - reference[:, 1])
    expected = -F.logsigmoid(beta * logits).mean()
    expected.backward()
    expected_gradients = {name: p.grad.clone() for name, p in model.named_parameters()}  # type: ignore[union-attr]
    model.zero_grad()
    source = PairSource(rows, reference, 10)
    total = 0.0
    for a, b in ((0, 6), (6, 10)):
        loss = preference_objective(beta)(model, source.batch(0, a, b), 1 / source.weight(0)).loss
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(expected.item(), abs=1e-6)
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, expected_gradients[name], rtol=1e-4, atol=1e-6), name  # type: ignore[arg-type]


def test_losses_are_found_by_name() -> None:
    """Behaviour: the registry has help for each loss, and knows near names; it loads no torch."""
    assert all(LOSSES.get(name).help for name in LOSSES.names())
    with pytest.raises(UsageError) as error:
        preference_objective(0.1, "sigmiod")
    assert error.value.message == "unknown preference loss 'sigmiod'" and "'sigmoid'" in error.value.hint
    code = "import sys, llmkit.alignment.preference; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_each_epoch_has_every_pair(rows: list[EncodedRow]) -> None:
    """Property: every pair once per epoch, sides together, tokens counted, order by seed."""
    reference = torch.arange(20.0).view(10, 2)
    source = PairSource(rows, reference, 4, epochs=2, seed=1)
    assert source.steps == 5
    assert [source.rows(s) for s in range(5)] == [4, 4, 4, 4, 4]
    seen = [int(v) for s in range(5) for v in source.batch(s, 0, source.rows(s)).extra["reference"][:, 0] / 2]
    assert sorted(seen) == sorted([*range(10), *range(10)])
    assert seen[:10] != seen[10:]  # each epoch has its own order
    assert source.tokens(5) == 2 * sum(len(row.tokens) - 1 for row in rows)
    batch = source.batch(0, 0, 4)
    for r in range(8):
        pair, side = int(batch.extra["reference"][r % 4, 0] / 2), r // 4
        tokens = rows[2 * pair + side].tokens
        assert batch.input_ids[r, : len(tokens) - 1].tolist() == tokens[:-1].tolist()


def test_pairs_of_similar_length_share_a_step(files: dict[str, str]) -> None:
    """Property: every epoch has every pair once, with far less padding; the same for equal seeds."""
    draw = np.random.default_rng(0)
    rows = [
        EncodedRow(draw.integers(0, 64, n).astype(np.int32), np.ones(n, np.float32))
        for n in draw.integers(3, 300, 400).tolist()
    ]
    reference = torch.arange(400).view(200, 2).float()
    plain, grouped, again = (
        PairSource(rows, reference, 8, epochs=2, seed=1, group_by_length=group) for group in (False, True, True)
    )
    seen = [int(n) // 2 for s in range(grouped.steps) for n in grouped.batch(s, 0, 8).extra["reference"][:, 0]]
    assert np.bincount(seen).tolist() == [2] * 200 and sorted(seen[:200]) == list(range(200))
    assert grouped.padding(8) < plain.padding(8) - 0.1
    assert torch.equal(grouped.batch(3, 0, 8).input_ids, again.batch(3, 0, 8).input_ids)


def test_a_pair_counts_as_two_sequences() -> None:
    """Behaviour: a forward pass of pairs has as many tokens as one of single sequences."""
    from llmkit.alignment.options import DpoOptions, SftOptions
    from llmkit.training.runner import loop_options

    assert [loop_options(kind(), "x").sequences_per_row for kind in (DpoOptions, SftOptions)] == [2, 1]
