"""`llmkit train` and `llmkit anneal` from the command line."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmkit.cli.main import run_command
from llmkit.io.lineage import read_lineage
from llmkit.training.metrics import read_metrics
from llmkit.training.state import load_trainer_state


@pytest.fixture
def place(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with shards/, heldout.arrow and config.json."""
    for entry in workplace.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(*arguments: str, command: str = "train") -> int:
    return run_command(command, list(arguments))


def weights(run: str) -> bytes:
    return (Path(run) / "final" / "model.safetensors").read_bytes()


def losses(run: str) -> list[float]:
    return [record["loss"] for record in read_metrics(Path(run) / "metrics.jsonl")]


SMALL = ("shards", "-m", "config.json", "--tokens", "4k", "-q")


def test_train_and_train_again(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Behaviour: a run with held-out loss and lineage; the same call and its config.toml give the same bytes; finished is finished."""
    assert train(*SMALL, "-o", "run", "--heldout", "heldout.arrow", "--json") == 0
    summary = json.loads(capsys.readouterr().err)
    assert summary["steps"] == 8
    assert summary["tokens"] == 4032  # whole sequences
    assert summary["heldout_loss"] == list(read_metrics("run/metrics.jsonl"))[-1]["heldout_loss"]
    record = read_lineage("run")
    assert record is not None
    assert record["options"]["model"] == "config.json"
    assert [(item["role"], item["name"]) for item in record["inputs"]] == [
        ("input", "shards"),
        ("model", "config.json"),
    ]
    assert "heldout" not in record["options"]
    assert train("shards", "-c", "run/config.toml", "-q", "-o", "again") == 0
    assert weights("again") == weights("run")
    assert train(*SMALL, "-o", "run", "--resume") == 0
    assert train(*SMALL, "-o", "run") == 1
    assert "--resume goes on with it" in capsys.readouterr().err
    for name in (
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ):
        assert (place / "run" / "final" / name).is_file()


def test_model_loads_in_transformers(place: Path) -> None:
    """Parity: transformers opens a checkpoint of the middle of a run with logits within 1e-5 of ours."""
    import torch
    from transformers import AutoModelForCausalLM

    from llmkit.model.checkpoint import load_model

    assert train(*SMALL, "-o", "run", "--save-every", "3") == 0
    path = "run/checkpoints/step-00000003"
    ids = torch.arange(20)[None]
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(path)(ids).logits
        ours = load_model(path)[0](ids)
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_stream_on_stdin_is_kept_for_a_resumption(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behaviour: `train -` reads stdin once; a resumed run does not need it again; the lineage calls it a pipe."""
    with open("heldout.arrow", "rb") as source:
        monkeypatch.setattr("sys.stdin", open(source.fileno(), closefd=False))
        assert train("-", "-m", "config.json", "--tokens", "2k", "-q", "-o", "run") == 0
    (place / "run" / "final").unlink()
    shutil.rmtree("run/checkpoints/step-00000004")
    monkeypatch.setattr("sys.stdin", open(os.devnull))
    assert train("-", "-m", "config.json", "--tokens", "2k", "-q", "-o", "run", "--resume") == 0
    record = read_lineage("run")
    assert record is not None
    assert record["inputs"][0]["name"] == "-"


def test_anneal(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Behaviour: starts at the checkpoint's rate, with its moments, and ends near zero; --step chooses; a bare model needs --lr."""
    assert train(*SMALL, "-o", "run", "--save-every", "4", "--schedule", "constant") == 0
    data = ("shards", "--tokens", "2k", "-q")
    assert train("run", *data, "-o", "annealed", command="anneal") == 0
    rates = [record["lr"] for record in read_metrics("annealed/metrics.jsonl")]
    begin = load_trainer_state(Path("run/final")).rate
    assert rates[0] == pytest.approx(begin * (1 - 0.5 / len(rates)), rel=0.05)
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.2 * begin
    assert train("run", *data, "--step", "4", "-o", "from4", command="anneal") == 0
    assert weights("from4") != weights("annealed")
    record = read_lineage("from4")
    assert record is not None
    assert record["inputs"][0]["name"] == "run"
    assert record["inputs"][0]["lineage"]["counts"]["steps"] == 4
    shutil.copytree("run/final", "bare", ignore=shutil.ignore_patterns("state"))
    assert train("bare", *data, "-o", "x", command="anneal") == 2
    assert "--lr" in capsys.readouterr().err
    assert train("bare", *data, "--lr", "1e-3", "-o", "y", command="anneal") == 0
    # The moments matter: without them the first update is another one.
    assert train("run", *data, "--lr", "1e-3", "-o", "z", command="anneal") == 0
    assert losses("y")[0] == losses("z")[0]
    assert losses("y")[2] != losses("z")[2]
    assert train("run", *data, "--step", "5", "-o", "w", command="anneal") == 1
    assert "it has 4, 8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("missing", "-m", "tiny", "-o", "x"), 1, "missing: no such file"),
        (("shards", "-m", "tinny", "-o", "x"), 2, "did you mean 'tiny'?"),
        (("shards", "-m", "none.json", "-o", "x"), 1, "none.json: no such file"),
        (("shards", "-m", "tiny"), 2, "name the directory of the run with -o"),
        (("shards", "-m", "tiny", "-o", "x", "--schedule", "cosin"), 2, "did you mean 'cosine'?"),
        (("shards", "-m", "tiny", "-o", "x", "--lr", "0"), 2, "--lr"),
        (("shards", "-m", "tiny", "-o", "x", "--precision", "fp12"), 2, "unknown precision"),
        (("shards", "-m", "tiny", "-o", "x", "--heldout", "other.arrow"), 1, "another tokenizer"),
        (("shards", "-m", "tiny", "-o", "no/where"), 1, "mkdir"),
        (("shards", "-m", "tiny", "-o", "shards"), 1, "shards exists"),
        (("shards", "-m", "tiny", "-o", "shards", "-f"), 1, "is not a run"),
    ],
)
def test_bad_calls(
    place: Path,
    tokenizer_files: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    """Behaviour: what is wrong is said in a line, and nothing is left behind."""
    from llmkit.io.lineage import Lineage
    from llmkit.io.shards import ShardWriter
    from llmkit.io.tokenizer import parse_tokenizer

    other = tokenizer_files | {"tokenizer.json": tokenizer_files["tokenizer.json"].replace("<|im_end|>", "<|eot|>")}
    with ShardWriter("other.arrow", parse_tokenizer(other, "other"), Lineage("tokenize")) as writer:
        writer.write([1, 2, 0], "a", "b")
        writer.finish({}, [])
    assert train(*arguments, "-q") == code
    assert message in capsys.readouterr().err
    assert not (place / "x").exists()


def test_dry_run_writes_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Behaviour: -n prints the plan."""
    before = sorted(place.iterdir())
    assert train("shards", "-m", "tiny", "--tokens", "1M", "-o", "run", "-n") == 0
    assert "parameters" in capsys.readouterr().err
    assert sorted(place.iterdir()) == before


def start(*arguments: str) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "llmkit", *arguments], env=environment, stderr=subprocess.PIPE)


def wait_for_steps(process: subprocess.Popen[bytes], run: Path, count: int) -> None:
    """Until the run has logged `count` steps."""
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or len(list(read_metrics(run / "metrics.jsonl"))) < count:
        assert process.poll() is None, process.stderr.read().decode()  # type: ignore[union-attr]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_held_out_data_by_domain(place: Path) -> None:
    """Behaviour: domains are those named, else the documents' sources; a path that holds an equals sign is a path."""
    from llmkit.cli import fitting
    from llmkit.io.store import TokenStore

    digest = TokenStore.open("shards").tokenizer.digest

    def domains(*named: str) -> tuple[str, ...]:
        found = fitting.held_out(list(named), digest, 32, True)
        assert found is not None
        return found.group_names

    assert domains("heldout.arrow") == ("test",)
    assert domains("web=heldout.arrow", "shards") == ("web", "test")
    os.symlink("heldout.arrow", "a=b.arrow")
    assert domains("a=b.arrow") == ("test",)
    assert train(*SMALL, "-o", "run", "--heldout", "web=heldout.arrow") == 0
    last = list(read_metrics("run/metrics.jsonl"))[-1]
    assert last["heldout/web"] == pytest.approx(last["heldout_loss"], rel=1e-5)
    assert 0 < last["heldout_bpb/web"] == last["heldout_bpb"]


def test_two_processes_and_one(place: Path) -> None:
    """Property: losses of two gloo processes equal those of one within 1e-5, as do the other curves of the model and the data; SIGTERM saves in both (143); one process goes on from there."""
    call = ("shards", "-m", "config.json", "--tokens", "40k", "-q")
    assert train(*call, "-o", "one", "--threads", "1") == 0
    group = start("train", *call, "-o", "two", "--processes", "2")
    wait_for_steps(group, place / "two", 10)
    group.terminate()
    assert group.wait() == 143, group.stderr.read().decode()  # type: ignore[union-attr]
    done = load_trainer_state(place / "two" / "latest").step
    assert done == len(losses("two")) < len(losses("one"))
    assert losses("two") == pytest.approx(losses("one")[:done], abs=1e-5)
    of_machine = r"memory|disk|gpu|seconds|per_second|mfu|rank|clipped"
    for one, two in zip(*(read_metrics(f"{run}/metrics.jsonl") for run in ("one", "two")), strict=False):
        kept = {name: value for name, value in one.items() if not re.search(of_machine, name)}
        assert {name: two[name] for name in kept} == pytest.approx(kept, rel=2e-3)
    assert train(*call, "-o", "two", "--resume") == 0
    assert losses("two") == pytest.approx(losses("one"), abs=1e-5)


def test_kill_and_resume_from_the_shell(place: Path) -> None:
    """Property: kill -9 of the real command, --resume in another, and the bytes are those of the undisturbed run."""
    call = ("shards", "-m", "config.json", "--tokens", "20k", "-q", "--save-every", "7", "--threads", "1")
    assert train(*call, "-o", "whole") == 0
    process = start("train", *call, "-o", "run")
    wait_for_steps(process, place / "run", 10)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (place / "run" / "final").exists()
    assert train(*call, "-o", "run", "--resume") == 0
    assert weights("run") == weights("whole")
    assert losses("run") == losses("whole")


def test_accelerate_launch(place: Path) -> None:
    """Behaviour: `accelerate launch -m llmkit train` trains the same losses."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--cpu", "-m", "llmkit"]
    subprocess.run([*launcher, "train", *SMALL, "-o", "launched"], check=True, capture_output=True)
    assert train(*SMALL, "-o", "one") == 0
    assert losses("launched") == pytest.approx(losses("one"), abs=1e-5)
