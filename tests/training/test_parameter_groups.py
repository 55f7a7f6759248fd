"""The table of tensor rules, memory and FLOPs agree with the actual model and optimizer."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from tiny import CONFIG, tiny_model

from llmkit.cli.main import run_command
from llmkit.errors import UsageError
from llmkit.model.config import load_config
from llmkit.model.decoder import Decoder
from llmkit.model.family import expected_tensors
from llmkit.training.memory_estimate import activation_bytes, estimate_memory, training_flops
from llmkit.training.optim.optimizer import build_optimizer, named_state
from llmkit.training.optim.parameter_groups import merge_layers, tensor_table

UNTIED = dataclasses.replace(CONFIG, tie_word_embeddings=False, attention_bias=True)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_tensor_has_its_rule(optimizer: str) -> None:
    """Behaviour: matrices and the head decay.

    Muon only gets the layers' matrices; biases and norms count as vectors everywhere.
    """
    rows = {row.name: row for row in tensor_table(expected_tensors(UNTIED), UNTIED, optimizer, 0.1, "bf16")}
    assert list(rows) == list(expected_tensors(UNTIED))
    matrices = {name for name in rows if name.endswith("proj.weight")}
    assert {name for name, row in rows.items() if row.decay} == matrices | {"lm_head.weight"}
    assert {name for name, row in rows.items() if row.optimizer == "muon"} == (
        matrices if optimizer == "muon" else set()
    )
    assert {name for name, row in rows.items() if row.computed == "f32"} == {
        n for n, r in rows.items() if len(r.shape) == 1
    }
    assert all(row.rate == 1.0 and row.stored == "f32" for row in rows.values())


def test_kinds_join_the_layers() -> None:
    """Property: every tensor is in one row; layers that do not differ share a row."""
    rows = tensor_table(expected_tensors(UNTIED), UNTIED, "muon", 0.1)
    joined = {row.name: count for row, count in merge_layers(rows)}
    assert sum(joined.values()) == len(rows)
    assert joined["model.layers.*.self_attn.q_proj.weight"] == UNTIED.num_hidden_layers
    assert joined["model.norm.weight"] == joined["lm_head.weight"] == 1


def test_start_is_what_is_drawn() -> None:
    """Property: a new model's tensors have the standard deviation or the value in the table."""
    config = dataclasses.replace(load_config("tiny", 512), attention_bias=True)
    model = Decoder(config)
    model.initialize(3)
    tensors = model.state_dict()
    for row in tensor_table(expected_tensors(config), config, "adamw", 0.1):
        kind, _, number = row.initial.rpartition(" ")
        if kind == "normal":
            assert float(tensors[row.name].std()) == pytest.approx(float(number), rel=0.05)
            assert abs(float(tensors[row.name].mean())) < 0.05 * float(number)
        else:
            assert bool((tensors[row.name] == float(number)).all())
            assert number == ("0" if row.name.endswith("bias") else "1")


def test_unknown_optimizer_is_an_error() -> None:
    """Behaviour: with a suggestion."""
    with pytest.raises(UsageError, match="unknown optimizer 'moun'") as caught:
        build_optimizer(tiny_model(), "moun")
    assert "muon" in str(caught.value.hint)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_memory_of_weights_and_moments_is_exact(optimizer: str) -> None:
    """Parity with the bytes of the tensors of a model and its optimizer after a step."""
    model = tiny_model()
    made = build_optimizer(model, optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    made.step()
    needs = estimate_memory(tensor_table(expected_tensors(CONFIG), CONFIG, optimizer, 0.1), CONFIG, 1, "fp32", "cpu")
    weights = sum(p.nbytes for p in model.parameters())
    moments = sum(t.nbytes for name, t in named_state(model, made) if name != "step")
    assert needs["weights"] == needs["gradients"] == weights
    assert sum(size for name, size in needs.items() if name.startswith("moments")) == moments
    assert needs["snapshot on the host"] == weights + moments


@pytest.mark.parametrize(
    ("name", "half"), [("15m", False), ("15m", True), ("llama-tiny", False), ("olmo2-tiny", False), ("olmo2-15m", True)]
)
def test_activations_are_about_what_is_saved(name: str, half: bool) -> None:
    """Parity within a tenth with the storages that autograd keeps for the backward pass through the layers."""
    config = load_config(name, 100)
    model = Decoder(config)
    model.initialize(0)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}  # storages alive, so that no address is reused

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage
        return tensor

    ids = torch.zeros(2, 256, dtype=torch.long)
    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda t: t),
        torch.autocast("cpu", torch.bfloat16, enabled=half),
    ):
        model.hidden(ids)
    copies = sum(2 * p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "layers" in name)
    saved = sum(storage.nbytes() for storage in storages.values()) - (copies if half else 0)
    assert activation_bytes(config, half) * ids.numel() == pytest.approx(saved, rel=0.1)


def test_flops_by_hand() -> None:
    """Parity with 6·(weights in products) + 12·L·H·d_head·T, and 6·L·H·d_head·T with causal attention."""
    full, half = training_flops(CONFIG, 32)
    attention = 2 * 4 * 8 * 32
    assert full == 6 * CONFIG.parameters() + 12 * attention
    assert half == 6 * CONFIG.parameters() + 6 * attention


def test_dry_run_prints_the_table(workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Behaviour: one line per kind of tensor, memory by use, FLOPs by both conventions; the same values with --json."""
    call = [
        str(workplace / "shards"),
        "-m",
        str(workplace / "config.json"),
        "--optimizer",
        "muon",
        "-n",
        "-o",
        str(tmp_path / "r"),
    ]
    assert run_command("train", list(call)) == 0
    shown = re.sub(r" +", " ", capsys.readouterr().err)
    assert "model.layers.*.self_attn.q_proj.weight 2 32x32 normal 0.02 x1 0.1 muon f32 f32" in shown
    assert "model.layers.*.mlp.down_proj.weight 2 32x64 normal 0.01 x1 0.1 muon f32 f32" in shown
    assert "model.norm.weight 1 32 1 x1 0 adamw f32 f32" in shown
    for what in (
        "moments of muon",
        "moments of adamw",
        "snapshot on the host",
        "activations, about",
        "6N + causal attention",
    ):
        assert what in shown
    assert run_command("train", [*call, "--json"]) == 0
    plan = json.loads(capsys.readouterr().err)
    assert plan["bytes"]["weights"] == 4 * plan["parameters"]
