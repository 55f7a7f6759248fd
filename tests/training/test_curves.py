"""The curves of metrics.jsonl: each responds to its cause, and measuring them does not change the weights."""

from __future__ import annotations

import mmap
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import ListStream, loop_settings, tiny_model

from llmkit.io.record import Lineage
from llmkit.shards.tokenizer_info import token_bytes
from llmkit.training import session as sessions
from llmkit.training.data import HeldOutSource, PackedSource, StreamSource
from llmkit.training.metrics import curves, machine
from llmkit.training.metrics.log import read_metrics
from llmkit.training.objectives import next_token
from llmkit.training.optim.schedule import build_schedule
from llmkit.training.source_groups import OTHER, document_groups

SIZES = [40] * 32
GPU = {name for name in (c.name for c in curves.CURVES) if name.startswith("gpu_")}


class TwoSources(ListStream):
    """Documents of the sources `order` and `noise` in turn; the tokens of `noise` are random."""

    def __init__(self, sizes: list[int] = SIZES) -> None:
        super().__init__(sizes)
        for i in range(1, len(sizes), 2):
            here = slice(*self.offsets[i : i + 2])
            self.data[here] = np.random.default_rng(i).integers(0, 64, sizes[i])
        self.sizes = np.array(sizes)

    def groups(self) -> Any:
        return document_groups(self.sizes, np.arange(len(self.sizes), dtype=np.int32) % 2, ["order", "noise"], None)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """The last record of a run of the tiny model; keyword arguments replace parts of it."""
    count = 0

    def go(
        steps: int = 1,
        rate: float = 1e-3,
        stream: Any = None,
        batch_size: int = 4,
        sizes: int = 2,
        alter: Callable[[torch.nn.Module], None] = lambda model: None,
        source: Any = None,
        heldout: Any = None,
        objective: Any = next_token,
        **settings: Any,
    ) -> dict[str, Any]:
        nonlocal count
        count += 1
        path = tmp_path / str(count)
        stream = stream or TwoSources()
        source = source or StreamSource(stream, 32, batch_size, steps * batch_size * 32, groups=stream.groups())
        monkeypatch.setattr(sessions, "_token_bytes", lambda files, size: torch.full((size,), sizes))
        model = tiny_model()
        with torch.no_grad():
            alter(model)
        with sessions.session(loop_settings(str(path), **({"log_every": 1} | settings))) as opened:
            opened.begin(Lineage("train", {}), [], batch_size, 32, "")
            opened.train(
                opened.model(lambda: model),
                objective,
                source,
                build_schedule("constant", rate, source.tokens(source.steps)),
                tokenizer_files={},
                heldout=heldout,
            )
        return list(read_metrics(path / "metrics.jsonl"))[-1]

    return go


Run = Callable[..., dict[str, Any]]
MOVED: set[str] = set()  # by the tests below; the last one checks that no curve was forgotten


def moved(*names: str) -> None:
    MOVED.update(names)


def test_losses(run: Run) -> None:
    """Behaviour: losses fall with training, a source's loss reflects its content, repeated documents have a
    lower loss than new ones, and bits per byte follow the bytes."""
    first, trained = run(), run(16, 3e-3)
    for name in ("loss", "loss_smooth"):
        assert trained[name] < first[name] - 0.1
    assert trained["loss/order"] < trained["loss/noise"] - 0.5
    again = run(40, 5e-3, TwoSources([40] * 8))
    assert again["epoch"] == pytest.approx(16)
    assert "loss_first" not in again
    assert again["loss_repeated"] < first["loss_first"] - 0.5
    assert first["bits_per_byte"] == pytest.approx(2 * run(sizes=4)["bits_per_byte"], rel=1e-4)
    assert first["bits_per_byte"] == pytest.approx(first["loss"] / np.log(2) / 2, rel=1e-4)
    assert run(z_loss=0.02)["z_loss"] == pytest.approx(2 * run(z_loss=0.01)["z_loss"], rel=1e-4)
    assert run(z_loss=0.02)["loss"] == pytest.approx(first["loss"], rel=1e-6)
    moved("loss", "loss_smooth", "loss/*", "loss_first", "loss_repeated", "bits_per_byte", "z_loss", "epoch")


def test_counts(run: Run) -> None:
    """Behaviour: batch size, documents and padding are counted."""
    one, two = run(batch_size=4), run(batch_size=8)
    for name in ("tokens", "sequences"):
        assert two[name] == 2 * one[name]
    assert (one["step"], run(3)["step"]) == (1, 3)
    assert one["documents"] == 4 + 3  # in four sequences three documents start inside
    assert one["tokens_counted"] == 4 * 32 - 3
    assert run(stream=TwoSources([8] * 160))["documents"] == 16
    rows = [(np.arange(9, dtype=np.int32), np.ones(9, np.float32))] * 3
    packed = run(source=PackedSource(rows, 32, 4))
    assert (packed["padding"], packed["documents"], one["padding"]) == (0.0, 3, 0.0)
    uneven = [(np.arange(n, dtype=np.int32), np.ones(n, np.float32)) for n in (33, 21)]
    longer = PackedSource(uneven * 4, 32, 4)  # its second step goes through the model at once
    batch = longer.batch(1, 0, 4)
    result = run(source=longer)
    assert result["padding"] == pytest.approx(float((batch.document_ids == -1).float().mean()), rel=1e-5)
    assert result["padding"] > 0
    filled = TwoSources([32] * 4)
    filled.padding = np.array([False, False, False, True])
    assert run(stream=filled)["padding"] == 0.25
    moved("step", "tokens", "sequences", "documents", "tokens_counted", "padding")


def test_gradient_and_update(run: Run) -> None:
    """Behaviour: norms by group follow the weights, updates the learning rate, and the clipped share the limit."""
    base = run(clip=0.0)
    groups = {"embedding": "embed_tokens", "attention": "self_attn.v_proj", "mlp": "mlp.up_proj", "norms": "layernorm"}
    for group, part in groups.items():

        def double(model: torch.nn.Module, part: str = part) -> None:
            for name, parameter in model.named_parameters():
                if part in name:
                    parameter.mul_(2)

        result = run(alter=double, clip=0.0)
        assert result[f"param_norm/{group}"] > 1.2 * base[f"param_norm/{group}"]
        others = [other for other in groups if other != group]
        assert all(result[f"param_norm/{other}"] == base[f"param_norm/{other}"] for other in others)
        assert result[f"grad_norm/{group}"] != base[f"grad_norm/{group}"]
        assert run(rate=2e-3, clip=0.0)[f"update_ratio/{group}"] == pytest.approx(
            2 * base[f"update_ratio/{group}"], rel=1e-2
        )
    squares = sum(value**2 for name, value in base.items() if name.startswith("grad_norm/"))
    assert base["grad_norm"] == pytest.approx(squares**0.5, rel=1e-4)
    assert base["clipped"] == 0
    assert run(clip=base["grad_norm"] / 4)["clipped"] == pytest.approx(0.75, abs=1e-4)
    assert run(rate=2e-3)["lr"] == 2 * base["lr"]
    moved("grad_norm", "grad_norm/*", "param_norm/*", "update_ratio/*", "clipped", "lr")


def test_inside_of_the_model(run: Run) -> None:
    """Behaviour: the maxima name the layer whose weights were scaled up; entropy and accuracy follow training."""
    base = run(rate=1e-9)

    def scaled(part: str, by: float) -> Callable[[torch.nn.Module], None]:
        return lambda model: model.get_parameter(part).mul_(by)

    for layer in (0, 1):
        result = run(rate=1e-9, alter=scaled(f"model.layers.{layer}.self_attn.q_norm.weight", 10))
        assert result["attention_logit_max"] > 5 * base["attention_logit_max"]
        assert result["attention_logit_max_layer"] == layer
    grown = run(rate=1e-9, alter=scaled("model.layers.1.mlp.down_proj.weight", 1e5))
    assert grown["activation_max"] > 2 * base["activation_max"]
    assert grown["activation_max_layer"] == 1

    trained = run(40, 5e-3, TwoSources([40] * 8))
    assert trained["token_accuracy"] > base["token_accuracy"] + 0.1
    assert trained["entropy"] < base["entropy"] - 0.5
    assert base["entropy"] == pytest.approx(np.log(64), abs=0.1)
    moved("activation_max", "activation_max_layer", "attention_logit_max", "attention_logit_max_layer")
    moved("token_accuracy", "entropy")


def test_attention_logits_are_those_of_the_model() -> None:
    """Parity with the q and k passed to torch's attention, within documents."""
    import torch.nn.functional as F

    from llmkit.training.distributed.processes import start
    from llmkit.training.metrics.activations import activation_statistics

    model, stream = tiny_model(), TwoSources()
    source = StreamSource(stream, 32, 4, 128)
    seen: list[float] = []
    original = F.scaled_dot_product_attention

    def watched(q: Any, k: Any, v: Any, attn_mask: Any = None, is_causal: bool = False, **more: Any) -> Any:
        scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(2, 3) / q.shape[-1] ** 0.5
        visible = torch.ones(scores.shape[2:], dtype=torch.bool).tril() if attn_mask is None else attn_mask
        seen.append(float(scores.masked_fill(~visible, -torch.inf).max()))
        return original(q, k, v, attn_mask=attn_mask, is_causal=is_causal, **more)

    patch = pytest.MonkeyPatch()
    patch.setattr(F, "scaled_dot_product_attention", watched)
    try:
        result = activation_statistics(model, source, 0, start("fp32"))
    finally:
        patch.undo()
    assert result["attention_logit_max"] == pytest.approx(max(seen), rel=1e-5)


def test_time(run: Run, tmp_path: Path) -> None:
    """Behaviour: a slow source shows in data_seconds and in the speed; MFU follows the speed."""

    class Slow(StreamSource):
        def batch(self, step: int, start: int, stop: int) -> Any:
            time.sleep(1.0)  # longer than a step on a busy machine
            return super().batch(step, start, stop)

    fast = run(2)
    slow = run(source=Slow(TwoSources(), 32, 4, 256, groups=TwoSources().groups()), log_every=0)
    assert slow["data_seconds"] > fast["data_seconds"] + 0.25
    assert slow["step_seconds"] > fast["step_seconds"] + 0.2
    assert slow["tokens_per_second"] < fast["tokens_per_second"]
    assert slow["mfu"] < fast["mfu"]
    early, late = (record["eta_seconds"] for record in read_metrics(tmp_path / "2" / "metrics.jsonl"))
    assert early > late == 0
    moved("step_seconds", "data_seconds", "tokens_per_second", "mfu", "eta_seconds")


def test_noise_scale() -> None:
    """Behaviour: the scale grows with the difference between the gradients of a small and the full batch."""
    from llmkit.training.metrics.gradient_noise import NoiseScale

    little, much = NoiseScale(), NoiseScale()
    for _ in range(20):
        little.update(1.5, 100, 1.0, 1000)
        much.update(3.0, 100, 1.0, 1000)
    assert little.tokens is not None
    assert much.tokens is not None
    assert much.tokens > 3 * little.tokens
    moved("noise_scale")


def test_pace_of_processes() -> None:
    """Behaviour: the slowest process is named."""
    from llmkit.training.distributed.stragglers import StragglerDetector

    pace = StragglerDetector()
    result = [pace.update(step, [1.0, 1.0, 2.0])[0] for step in range(1, 61)]
    named = [figures for figures in result if figures]
    assert named
    assert all(figures == {"slowest_rank": 2, "rank_spread": 2.0} for figures in named)
    moved("slowest_rank", "rank_spread")


def test_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Behaviour: memory follows allocations, the peak stays; disk and GPU metrics are those of the system."""
    before = machine.machine_metrics(torch.device("cpu"), tmp_path)
    allocation = mmap.mmap(-1, 40 << 20)  # not what an allocator may already have reserved
    allocation.write(b"x" * len(allocation))
    during = machine.machine_metrics(torch.device("cpu"), tmp_path)
    assert during["memory"] > before["memory"] + (30 << 20)
    allocation.close()
    assert machine.machine_metrics(torch.device("cpu"), tmp_path)["memory_peak"] >= during["memory"] * 0.95
    free = shutil.disk_usage(tmp_path)._replace(free=12345)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    cuda_values = {
        "memory_allocated": 1,
        "max_memory_allocated": 2,
        "utilization": 3,
        "temperature": 4,
        "power_draw": 5000,
    }
    for name, value in cuda_values.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    result = machine.machine_metrics(torch.device("cuda"), tmp_path)
    assert result["disk_free"] == 12345
    assert {name: result[name] for name in GPU} == {
        "gpu_memory": 1,
        "gpu_memory_peak": 2,
        "gpu_utilisation": 3,
        "gpu_temperature": 4,
        "gpu_power": 5.0,
    }
    moved("memory", "memory_peak", "disk_free", *GPU)


def test_heldout_by_domain(run: Run) -> None:
    """Behaviour: each domain has its loss and bits per byte, whose mean weighted by tokens is the total."""
    stream = TwoSources([40] * 8)
    heldout = HeldOutSource(stream, 32, groups=stream.groups())
    result = run(30, 5e-3, heldout=heldout, eval_every=1, log_every=0)
    assert result["heldout/order"] < result["heldout/noise"] - 0.5
    assert result["heldout_loss"] == pytest.approx((result["heldout/order"] + result["heldout/noise"]) / 2, rel=0.02)
    assert result["heldout_bpb/order"] == pytest.approx(result["heldout/order"] / np.log(2) / 2, rel=1e-5)
    assert result["heldout_bpb"] == pytest.approx(result["heldout_loss"] / np.log(2) / 2, rel=1e-5)
    moved("heldout_loss", "heldout/*", "heldout_bpb", "heldout_bpb/*")


def test_skipped_step_is_marked(run: Run, tmp_path: Path) -> None:
    """Behaviour: a step skipped by the guard is marked in its line, and leaves the smoothed loss unchanged."""
    calls = 0

    def objective(model: Any, batch: Any, scale: float) -> Any:
        nonlocal calls
        calls += 1
        result = next_token(model, batch, scale)
        return result._replace(loss=result.loss * (float("nan") if calls == 4 else 1.0))

    run(6, objective=objective)
    records = list(read_metrics(tmp_path / "1" / "metrics.jsonl"))
    (skipped,) = (i for i, r in enumerate(records) if r.get("skipped"))
    before, here, after = (records[i]["loss_smooth"] for i in (skipped - 1, skipped, skipped + 1))
    assert before == here != after
    moved("skipped")


def test_watching_changes_no_weight(run: Run, tmp_path: Path) -> None:
    """Property: weights and random state are the same with every curve in every step and without the costly ones."""
    torch.manual_seed(5)
    before = torch.get_rng_state()
    run(6, 3e-3, log_every=1)
    run(6, 3e-3, log_every=0)
    weights = [(tmp_path / name / "final" / "model.safetensors").read_bytes() for name in "12"]
    assert weights[0] == weights[1]
    torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), before)


def test_costly_figures_come_every_few_steps(run: Run, tmp_path: Path) -> None:
    """Behaviour: with --log-every 3 costly metrics are in the first step and every third; cheap ones in every step."""
    run(7, log_every=3)
    records = list(read_metrics(tmp_path / "1" / "metrics.jsonl"))
    assert [r["step"] for r in records if "entropy" in r] == [1, 3, 6]
    assert all("documents" in r and "loss/order" in r for r in records)


def test_smoothed_is_a_function_of_the_log() -> None:
    """Property: first a mean, then an exponential mean; it depends only on its last value."""
    losses = np.random.default_rng(0).random(200).tolist()
    record: dict[str, Any] = {}
    for step, loss in enumerate(losses, 1):
        record = {"loss_smooth": curves.smoothed_loss(record, {"step": step, "loss": loss})}
        if step == 40:
            assert record["loss_smooth"] == pytest.approx(np.mean(losses[:40]))
    assert record["loss_smooth"] == pytest.approx(0.5, abs=0.1)
    for more in ({}, {"loss": None}, {"loss": 99.0, "skipped": True}, {"loss": float("nan")}):
        assert curves.smoothed_loss(record, {"step": 9, **more}) == record["loss_smooth"]


def test_resumed_run_has_the_same_curves(train: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """Property: killed between checkpoints and resumed, every curve of model and data equals that of the
    undisturbed run; the log states the MFU convention."""

    class Crash(Exception):
        pass

    def crash(record: dict[str, Any]) -> None:
        if record["step"] == 8:
            raise Crash

    train(tmp_path / "whole", log_every=4)
    with pytest.raises(Crash):
        train(tmp_path / "run", log_every=4, report=crash)
    train(tmp_path / "run", log_every=4, resume=True)
    of_machine = ("memory", "disk", "gpu", "step_seconds", "data_seconds", "tokens_per", "mfu", "eta")
    runs = [list(read_metrics(tmp_path / run / "metrics.jsonl")) for run in ("whole", "run")]
    first, second = ([{k: v for k, v in r.items() if not k.startswith(of_machine)} for r in run] for run in runs)
    assert first == second
    assert "loss_smooth" in first[-1]
    assert "causal attention at half" in (tmp_path / "run" / "events.jsonl").read_text()


def test_many_sources_share_a_curve() -> None:
    """Behaviour: the largest sources keep their names, the others share `other`; padding belongs to none."""
    sizes = np.array([*range(1, 21), 50])
    codes = np.arange(21, dtype=np.int32)
    groups = document_groups(sizes, codes, [*map(str, range(20)), "<padding>"], np.array([1] + [0] * 20, np.int32))
    assert groups.names == (*map(str, range(5, 20)), OTHER)
    assert groups.codes.tolist() == [31, 30, 30, 30, 30, *range(0, 30, 2), -1]


def test_bytes_of_tokens(tokenizer_files: dict[str, str]) -> None:
    """Property: the lengths of a text's tokens add up to its bytes; None for other kinds of tokenizers."""
    from tokenizers import Tokenizer

    lengths = token_bytes(tokenizer_files)
    assert lengths is not None
    text = "the quick brøwn fox \n\t 狐"
    assert sum(lengths[Tokenizer.from_str(tokenizer_files["tokenizer.json"]).encode(text).ids]) == len(text.encode())
    assert lengths[0] == 0  # end of text
    assert token_bytes({"tokenizer.json": '{"model": {"type": "WordLevel", "vocab": {"a": 0}}}'}) is None
    assert token_bytes({"tokenizer.json": "{"}) is None


def test_table_is_complete(run: Run) -> None:
    """Property: every logged name is in the table, and the tests of this file (run in one process) covered
    every curve."""
    stream = TwoSources()
    result = run(2, heldout=HeldOutSource(stream, 32, groups=stream.groups()), z_loss=0.1)
    assert not [name for name in result if not curves.is_known(name)]
    assert len(curves.CURVES) >= 40
    if len(MOVED) > 30:  # the whole file was run
        assert {curve.name for curve in curves.CURVES} - MOVED == {"eval/*"}  # tests/training/test_samples.py
