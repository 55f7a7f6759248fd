"""The environment must not change unnoticed within a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmkit.errors import LlmkitError, UsageError
from llmkit.training.checkpoint import environment, run_directory
from llmkit.training.checkpoint.trainer_state import load_trainer_state
from llmkit.training.metrics.log import read_metrics

Train = Callable[..., dict[str, Any]]


def stopped(train: Train, run: Path, at: int = 7, **changes: Any) -> None:
    """A run stopped after 7 of 16 steps (or another step), with a checkpoint at 6."""

    def report(record: dict[str, Any]) -> None:
        if record["step"] == at:
            raise LlmkitError("enough")

    with pytest.raises(LlmkitError, match="enough"):
        train(run, report=report, **changes)


def sealed(checkpoint: Path) -> None:
    """Update the digests to those of the current files."""
    (checkpoint / "state" / run_directory.DIGESTS).write_text(json.dumps(run_directory._file_digests(checkpoint)))


def events(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def test_record(train: Train, tmp_path: Path) -> None:
    """Behaviour: the start event and every checkpoint record the environment.

    Threads and processor are in the event only.
    """
    stopped(train, tmp_path / "run")
    stored = load_trainer_state(tmp_path / "run" / "latest").environment
    assert stored.keys() == set(environment.NAMES)
    assert (stored["device"], stored["precision"], stored["deterministic"]) == ("cpu", "fp32", False)
    assert torch.__version__.startswith(stored["torch"])
    recorded = events(tmp_path / "run")[0]["environment"]
    assert stored.items() <= recorded.items()
    assert recorded["threads"] == torch.get_num_threads()
    assert recorded["processes"] == 1


def test_a_run_of_an_earlier_version_with_a_quarantine_resumes(train: Train, tmp_path: Path) -> None:
    """Behaviour: earlier versions recorded the file of a quarantine, which decides nothing."""
    stopped(train, tmp_path / "run", options={"on_bad_line": "quarantine=/elsewhere/bad.jsonl"})
    with pytest.raises(LlmkitError, match="--on-bad-line was 'skip'"):
        train(tmp_path / "run", resume=True, options={"on_bad_line": "stop"})
    train(tmp_path / "run", resume=True, options={"on_bad_line": "skip"})


def test_another_torch_is_refused_until_it_is_accepted(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: the error names the change and both values.

    Once accepted, the run continues, records it, and compares with the new value.
    """
    run = tmp_path / "run"
    stopped(train, run)
    before = load_trainer_state(run / "latest").environment["torch"]
    monkeypatch.setattr(environment.torch, "__version__", "2.99.1+cpu")
    with pytest.raises(LlmkitError) as error:
        train(run, resume=True)
    assert error.value.message == f"torch was {before} when the run was started and is 2.99.1 now"
    assert error.value.hint == "accept it with --accept-change torch; results may not be bit-identical"
    with pytest.raises(LlmkitError, match="torch was"):
        train(run, resume=True, accept_change="llmkit,precision")
    stopped(train, run, at=10, resume=True, accept_change="torch")
    assert events(run)[-1]["accepted"] == ["torch"]
    train(run, resume=True)
    assert [record["step"] for record in read_metrics(run / "metrics.jsonl")] == list(range(1, 17))
    assert load_trainer_state(run / "final").environment["torch"] == "2.99.1"


def test_other_threads_and_records_without_a_name_are_no_change(train: Train, tmp_path: Path) -> None:
    """Behaviour: threads may change, and a checkpoint without a recorded environment resumes."""
    run = tmp_path / "run"
    stopped(train, run)
    path = run / "latest" / "state" / "trainer.json"
    fields = json.loads(path.read_bytes())
    del fields["environment"]
    path.write_text(json.dumps(fields))
    sealed(run / "latest")
    threads = torch.get_num_threads()
    train(run, resume=True, threads=threads + 1)
    torch.set_num_threads(threads)


def test_several_changes(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behaviour: the first change is described, the hint names all; an edited config.json is a change too."""
    run = tmp_path / "run"
    stopped(train, run)
    config = run / "latest" / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    sealed(run / "latest")
    with pytest.raises(LlmkitError, match="the model's configuration was"):
        train(run, resume=True)
    monkeypatch.setattr(environment, "__version__", "9.0")
    with pytest.raises(LlmkitError, match=r"llmkit was .* and is 9\.0 now \(and model\)") as error:
        train(run, resume=True, accept_change="torch")
    assert error.value.hint == "accept it with --accept-change llmkit,model,torch; results may not be bit-identical"


@pytest.mark.parametrize(("text", "hint"), [("torhc", "'torch'"), ("torch,prec", "precision"), ("threads", "known")])
def test_names_are_known(train: Train, tmp_path: Path, text: str, hint: str) -> None:
    """Behaviour: an unknown name is a usage error with the nearest known name."""
    with pytest.raises(UsageError, match="unknown --accept-change") as error:
        train(tmp_path / "run", accept_change=text)
    assert hint in error.value.hint
    assert not (tmp_path / "run").exists()


def test_values_are_shown_as_words() -> None:
    """Behaviour: messages say on and off, not True and False."""
    with pytest.raises(LlmkitError, match="deterministic mode was off when the run was started and is on now"):
        environment.refuse_drift({"deterministic": False}, {"deterministic": True}, ())
    with pytest.raises(LlmkitError, match="precision was fp32 when the run was started and is bf16 now"):
        environment.refuse_drift({"precision": "fp32"}, {"precision": "bf16"}, ("torch",))
    assert environment.refuse_drift({"a": 1, "b": 2}, {"a": 1, "c": 3}, ()) == []
