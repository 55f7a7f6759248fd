"""The guard: skipped, rolled back and accepted steps; runs killed around its decisions end in the same bytes."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import ListStream, loop_settings, tiny_model

from llmkit.errors import LlmkitError
from llmkit.io.record import Input, Lineage
from llmkit.training import session as sessions
from llmkit.training.data import StreamSource
from llmkit.training.guard.guard import ENOUGH, PATIENCE, RECENT, Guard, StepVerdict
from llmkit.training.metrics.log import read_metrics
from llmkit.training.objectives import ObjectiveResult, next_token
from llmkit.training.optim.schedule import build_schedule

STEPS = 70
PLACES = {"noise": (61, 92), "repetition": (123,)}  # documents, far enough apart
RARE = (76, 106)


def documents(poisoned: bool) -> ListStream:
    """160 documents of 128 tokens, random walks over the lower half of the ids.

    If `poisoned`, two hold random ids and one a single id. Two are walks over the upper half, which no other
    document uses: a rare domain.
    """
    stream = ListStream([128] * 160, vocabulary=32)
    draw = np.random.default_rng(5)
    for i in RARE:
        stream.data[i * 128 : (i + 1) * 128] += 32
    for i in PLACES["noise"] if poisoned else ():
        stream.data[i * 128 : (i + 1) * 128] = draw.integers(0, 64, 128)
    for i in PLACES["repetition"] if poisoned else ():
        stream.data[i * 128 : (i + 1) * 128] = 60
    return stream


def train(
    path: Path, stream: ListStream | None = None, objective: Any = next_token, rate: float = 5e-3, **changes: Any
) -> dict[str, Any]:
    """70 steps of 2 documents each."""
    source = StreamSource(stream or documents(True), 64, 4, STEPS * 256)
    report, steps = changes.pop("report", lambda record: None), changes.pop("steps", STEPS)
    source.steps = steps
    settings = loop_settings(str(path), **({"micro_batch_size": 4, "save_every": 20, "resume": True} | changes))
    with sessions.session(settings) as opened:
        opened.begin(Lineage("train", {}), [Input("input", "data", "xxh3:0")], 4, 64, "")
        return opened.train(
            opened.model(tiny_model),
            objective,
            source,
            build_schedule("constant", rate, STEPS * 256, warmup=1000),
            tokenizer_files={},
            report=report,
        )


def events(run: Path, name: str) -> list[dict[str, Any]]:
    log = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [event for event in log if event["event"] == name]


def weights(run: Path) -> bytes:
    return (run / "final" / "model.safetensors").read_bytes()


def log(run: Path) -> list[tuple[int, Any, Any]]:
    return [(r["step"], r.get("loss"), r.get("skipped")) for r in read_metrics(run / "metrics.jsonl")]


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An otherwise undisturbed run over poisoned data; tests only read it."""
    run = tmp_path_factory.mktemp("guard") / "run"
    train(run)
    return run


def test_broken_documents_are_skipped_and_rare_ones_kept(poisoned: Path, tmp_path: Path) -> None:
    """Behaviour: exactly the injected documents are reported and their batches skipped.

    The rare domain is trained on; the loss is that of clean data.
    """
    rollbacks = events(poisoned, "rollback")
    assert sorted((d["id"], d["reason"]) for e in rollbacks for d in e["documents"]) == sorted(
        (f"d{i}", reason) for reason, places in PLACES.items() for i in places
    )
    batches = sorted(i // 2 + 1 for places in PLACES.values() for i in places)
    assert [e["skipped"] for e in rollbacks] == [[n] for n in batches]
    assert [r["step"] for r in read_metrics(poisoned / "metrics.jsonl") if r.get("skipped")] == batches
    spikes = {e["step"] for e in events(poisoned, "spike")}
    assert {i // 2 + 1 for i in RARE} <= spikes
    train(tmp_path / "clean", documents(False))
    last = [list(read_metrics(run / "metrics.jsonl"))[-1]["loss"] for run in (poisoned, tmp_path / "clean")]
    assert last[0] == pytest.approx(last[1], rel=0.02)


def kill_at(step: int) -> Callable[[dict[str, Any]], None]:
    def report(record: dict[str, Any]) -> None:
        if record["step"] == step:
            os.kill(os.getpid(), signal.SIGKILL)

    return report


@pytest.mark.parametrize("moment", [31, 46, 63])
def test_killed_after_a_rollback_and_before_the_next_checkpoint(poisoned: Path, tmp_path: Path, moment: int) -> None:
    """Property: after SIGKILL right after steps were skipped, the resumed run makes the same decisions and
    ends in the same bytes."""
    run = tmp_path / "run"
    child = os.fork()
    if child == 0:
        try:
            train(run, report=kill_at(moment))
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    train(run)
    assert weights(run) == weights(poisoned)
    assert log(run) == log(poisoned)


def test_nonfinite_weights_are_rolled_back(tmp_path: Path) -> None:
    """Property: a NaN written once into an embedding row costs only time: the run rolls back to its last good
    state and ends like an undisturbed one."""
    train(tmp_path / "clean", documents(False))
    broken = False

    def objective(model: Any, batch: Any, scale: float) -> ObjectiveResult:
        nonlocal broken
        if not broken and model.training and len(log(tmp_path / "run")) == 33:
            broken = True
            with torch.no_grad():
                model.model.embed_tokens.weight[7] = float("nan")
        return next_token(model, batch, scale)

    train(tmp_path / "run", documents(False), objective)
    (rollback,) = events(tmp_path / "run", "rollback")
    assert (rollback["step"], rollback["skipped"], rollback["cause"]) == (34, [], "non-finite weights")
    assert weights(tmp_path / "run") == weights(tmp_path / "clean")
    assert log(tmp_path / "run") == log(tmp_path / "clean")


def test_degraded_model_is_rolled_back(tmp_path: Path) -> None:
    """Property: a persistent rise in loss with a degraded model is rolled back and its batches skipped.

    A resumed run ends in the same bytes.
    """

    def harmful(place: Path) -> Any:
        def objective(model: Any, batch: Any, scale: float) -> ObjectiveResult:
            if model.training and len(log(place)) == 40:  # step 41, unless it is skipped
                with torch.no_grad():
                    embeddings = model.model.embed_tokens.weight
                    embeddings.copy_(embeddings.sort(0).values)  # a repetition in the same step changes nothing
            return next_token(model, batch, scale)

        return objective

    results = []
    for name, moment in (("whole", 0), ("killed", 44)):
        run = tmp_path / name
        if moment:
            child = os.fork()
            if child == 0:
                try:
                    train(run, documents(False), harmful(run), report=kill_at(moment))
                finally:
                    os._exit(1)
            os.waitpid(child, 0)
        train(run, documents(False), harmful(run))
        results.append((weights(run), [e["skipped"] for e in events(run, "rollback")]))
    assert results[0][1] == [[41, 42, 43, 44, 45]] and results[0] == results[1]


def test_a_new_kind_of_data_becomes_normal(tmp_path: Path) -> None:
    """Behaviour: a loss that rises because the data changed is trained on: nothing is skipped, and the change
    is logged."""
    stream = documents(False)
    stream.data[80 * 128 :] = stream.data[80 * 128 :] % 32 + 32
    train(tmp_path / "run", stream)
    assert not events(tmp_path / "run", "rollback")
    assert len(events(tmp_path / "run", "change")) == 1
    losses = [loss for _, loss, _ in log(tmp_path / "run")]
    assert losses[40] > losses[39] + 0.5 and losses[-1] < losses[41]


def test_diverging_rate_ends_with_a_clear_error(tmp_path: Path) -> None:
    """Behaviour: a learning rate far too high ends in an error with advice."""
    with pytest.raises(LlmkitError, match="more than 8 rollbacks within 128 steps") as caught:
        train(tmp_path / "run", documents(False), rate=300.0)
    assert "lower the learning rate" in caught.value.hint


def test_without_a_guard_all_is_taken(tmp_path: Path) -> None:
    """Behaviour: --max-rollbacks 0 skips nothing."""
    train(tmp_path / "run", max_rollbacks=0, steps=48)
    assert [e["event"] for e in map(json.loads, (tmp_path / "run" / "events.jsonl").open())] == ["start", "end"]
    assert not any(skipped for _, _, skipped in log(tmp_path / "run"))


def steady(count: int) -> Guard:
    guard, draw = Guard(uniform_loss=9.0), np.random.default_rng(0)
    for step in range(1, count + 1):
        figures = (4 + 0.05 * draw.standard_normal(), float(np.exp(0.2 * draw.standard_normal())), 4.3)
        assert guard.judge(step, figures) is StepVerdict.GOOD
        guard.accept(step, figures)
    return guard


def test_verdicts() -> None:
    """Behaviour: a loss far above or below, a large norm or a bad row is a spike, a ripple is not.

    Many spikes in a row are persistent; NaN and infinity are non-finite.
    """
    guard = steady(60)
    for figures, verdict in (
        ((4.1, 1.2, 4.4), StepVerdict.GOOD),
        ((5.0, 1.0, 4.3), StepVerdict.SPIKE),
        ((2.0, 1.0, 4.3), StepVerdict.SPIKE),
        ((4.0, 20.0, 4.3), StepVerdict.SPIKE),
        ((4.0, 1.0, 9.0), StepVerdict.SPIKE),
        ((4.0, 0.01, 1.0), StepVerdict.GOOD),
        ((float("nan"), 1.0, 4.3), StepVerdict.NON_FINITE),
        ((4.0, float("inf"), 4.3), StepVerdict.NON_FINITE),
        ((4.0, 1.0, float("nan")), StepVerdict.GOOD),
    ):
        assert guard.judge(61, figures) is verdict, figures
    for step in range(61, 60 + PATIENCE):
        assert guard.judge(step, (6.0, 1.0, 6.0)) is StepVerdict.SPIKE
        guard.record_spike(step)
    assert guard.judge(60 + PATIENCE, (6.0, 1.0, 6.0)) is StepVerdict.PERSISTENT
    assert guard.model_degraded(4.2, (6.0, 1.0, 6.0)) and not guard.model_degraded(5.8, (6.0, 1.0, 6.0))
    assert not guard.model_degraded(7.0, (6.0, 1.0, 6.0)) and not guard.model_degraded(2.0, (3.0, 99.0, 3.0))


def test_early_steps() -> None:
    """Behaviour: without enough history only a loss worse than a uniform guess is a spike."""
    guard = steady(ENOUGH + RECENT - 1)
    assert guard.judge(ENOUGH, (8.0, 50.0, 9.0)) is StepVerdict.GOOD
    assert guard.judge(ENOUGH, (10.5, 1.0, 11.0)) is StepVerdict.SPIKE


def test_state_survives_json() -> None:
    """Property: a guard restored from its state equals the original; damaged states are refused."""
    guard = steady(40)
    guard.skip(41, 43, 43)
    guard.record_spike(44)
    other = Guard(uniform_loss=9.0)
    other.restore(json.loads(json.dumps(guard.state())))
    assert other.state() == guard.state()
    assert other.deviation((5.0, 1.0, 4.0)) == guard.deviation((5.0, 1.0, 4.0))
    for damage in ({"skipped": ["a"]}, {"since": -1}, {"history": [[1.0]]}, {"reference": [1]}, {"rollbacks": 3}):
        with pytest.raises((ValueError, TypeError)):
            Guard().restore(guard.state() | damage)
