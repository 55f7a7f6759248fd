"""`llmkit train` and `llmkit anneal` from the command line."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from waiting import wait_until

from llmkit.cli.main import run_command
from llmkit.errors import LlmkitError
from llmkit.lineage.formats import read_lineage
from llmkit.training.checkpoint.run_directory import open_run
from llmkit.training.checkpoint.trainer_state import load_trainer_state
from llmkit.training.metrics.log import read_metrics


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


def tensors(run: str) -> bytes:
    """The weights without the header, which holds the lineage."""
    content = weights(run)
    return content[8 + int.from_bytes(content[:8], "little") :]


def losses(run: str) -> list[float]:
    return [record["loss"] for record in read_metrics(Path(run) / "metrics.jsonl")]


SMALL = ("shards", "-m", "config.json", "--tokens", "4k", "-q")


def test_train_and_train_again(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Behaviour: a run has a held-out loss and lineage.

    The same call and its config.toml give the same bytes; a finished run is left alone.
    """
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
    assert "--resume continues it" in capsys.readouterr().err
    for name in (
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ):
        assert (place / "run" / "final" / name).is_file()


def test_model_loads_in_transformers(place: Path) -> None:
    """Parity: transformers opens an intermediate checkpoint, with logits within 1e-5 of ours."""
    import torch
    from transformers import AutoModelForCausalLM

    from llmkit.model.pretrained.checkpoint import load_model

    assert train(*SMALL, "-o", "run", "--save-every", "3") == 0
    path = "run/checkpoints/step-00000003"
    ids = torch.arange(20)[None]
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(path)(ids).logits
        ours = load_model(path)[0](ids)
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_stream_on_stdin_is_kept_for_resumption(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    """Behaviour: an anneal starts at the checkpoint's learning rate, with its moments, and ends near zero.

    --from chooses a checkpoint; a bare model needs --lr.
    """
    assert train(*SMALL, "-o", "run", "--save-every", "4", "--schedule", "constant") == 0
    data = ("shards", "--tokens", "2k", "-q")
    assert train("run", *data, "-o", "annealed", command="anneal") == 0
    rates = [record["lr"] for record in read_metrics("annealed/metrics.jsonl")]
    begin = load_trainer_state(Path("run/final")).rate
    assert rates[0] == pytest.approx(begin * (1 - 0.5 / len(rates)), rel=0.05)
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.2 * begin
    assert train("run", *data, "--from", "4", "-o", "from4", command="anneal") == 0
    assert weights("from4") != weights("annealed")
    record = read_lineage("from4")
    assert record is not None
    assert record["inputs"][0]["name"] == "run"
    assert record["inputs"][0]["lineage"]["counts"]["steps"] == 4
    shutil.copytree("run/final", "bare", ignore=shutil.ignore_patterns("state"))
    assert train("bare", *data, "-o", "x", command="anneal") == 2
    assert "--lr" in capsys.readouterr().err
    assert train("bare", *data, "--lr", "1e-3", "-o", "y", command="anneal") == 0
    # The moments matter: without them the first update differs.
    assert train("run", *data, "--lr", "1e-3", "-o", "z", command="anneal") == 0
    assert losses("y")[0] == losses("z")[0]
    assert losses("y")[2] != losses("z")[2]
    assert train("run", *data, "--from", "step-00000005", "-o", "w", command="anneal") == 1
    assert "it has 4, 8" in capsys.readouterr().err
    # The script names the checkpoint that the run started from, however it was given.
    assert train("run/checkpoints/step-00000004", *data, "-o", "named4", command="anneal") == 0
    for made, start in (("from4", "run "), ("named4", "run/checkpoints/step-00000004 ")):
        assert run_command("lineage", [made, "--script"]) == 0
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("llmkit")]
        assert lines[-2].endswith('--save-every 4 -o "$OUT"/run') and f'llmkit anneal "$OUT"/{start}' in lines[-1]
    # A damaged start, and one with a NaN.
    file = Path("run/checkpoints/step-00000004/state/optimizer.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1]))
    assert train("run", *data, "--from", "4", "-o", "w", command="anneal") == 1
    assert "step-00000004: state/optimizer.safetensors is not what was written" in capsys.readouterr().err
    content = Path("bare/model.safetensors").read_bytes()
    Path("bare/model.safetensors").write_bytes(content[:-4] + np.float32("nan").tobytes())
    assert train("bare", *data, "--lr", "1e-3", "-o", "w", command="anneal") == 1
    assert "has non-finite weights" in capsys.readouterr().err and not Path("w").exists()


def test_ramps_and_ends(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Behaviour: the learning rate of an anneal falls by --ramp to the share --to; unknown names are refused."""
    assert train(*SMALL, "-o", "run", "--schedule", "constant") == 0
    data = ("run", "shards", "--tokens", "2k", "-q", "--lr", "1e-3")
    rates = {}
    for ramp in ("linear", "sqrt", "cosine"):
        assert train(*data, "--ramp", ramp, "--to", "0.5", "-o", ramp, command="anneal") == 0
        rates[ramp] = [record["lr"] for record in read_metrics(f"{ramp}/metrics.jsonl")]
        assert rates[ramp] == sorted(rates[ramp], reverse=True) and 5e-4 < rates[ramp][-1] < 7e-4
    assert rates["sqrt"][0] < rates["linear"][0] < rates["cosine"][0] < 1e-3
    for wrong, message in ((("--ramp", "cosin"), "'cosine'"), (("--to", "2"), "--to"), (("--from", "last"), "--from")):
        assert train(*data, *wrong, "-o", "x", command="anneal") == 2
        assert message in capsys.readouterr().err


def stop_at(run: str, step: int) -> None:
    """Reset a finished run to the time when its checkpoint of `step` was the last."""
    (Path(run) / "final").unlink()
    for checkpoint in Path(run, "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)


def test_recipe_and_warm_ups(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Behaviour: learning rates and defaults of a recipe, scaled.

    --lr scales the rates; sizes warm up; config.toml and a resumption give the same bytes.
    """
    call = (
        "shards",
        "-m",
        "config.json",
        "--tokens",
        "6k",
        "--recipe",
        "amber",
        "--sequence-length",
        "64",
        "--batch-size",
        "4",
    )
    warm = ("--batch-warmup", "1:1k,2:2k", "--length-warmup", "16:500,32:3k", "--save-every", "5", "-q")
    assert train(*call, *warm, "-o", "run") == 0
    records = list(read_metrics("run/metrics.jsonl"))
    rates = [record["lr"] for record in records]
    assert 2.8e-4 < max(rates) <= 3e-4 and 3e-5 <= rates[-1] < 4e-5
    sizes = np.diff([0, *(record["tokens"] for record in records)]).tolist()
    assert sizes[0] == 64 and sizes[-2] == 256 and sizes == sorted(sizes[:-1]) + sizes[-1:]
    before, whole = losses("run"), weights("run")
    stop_at("run", 10)
    assert train(*call, *warm, "-o", "run", "--resume") == 0 and losses("run") == before and weights("run") == whole
    assert train("shards", "-c", "run/config.toml", "-q", "-o", "third") == 0 and weights("third") == weights("run")
    record = read_lineage("run")
    assert record is not None and record["options"]["recipe"] == "amber" and "schedule" not in record["options"]
    assert record["options"]["betas"] == "0.9,0.95"
    assert train(*call, "--lr", "1e-3", "--betas", "0.8,0.9", "-o", "x", "-n") == 0
    shown = capsys.readouterr().err
    assert "cosine" in shown and "1.00e-03" in shown and "0.8,0.9" in shown
    Path("mine.toml").write_text("weight_decay = 0.5\n[[stage]]\nlr = 2e-3\nwarmup = 0.1\nschedule = 'linear'\n")
    assert train(*SMALL, "--recipe", "mine.toml", "-o", "mine") == 0
    record = read_lineage("mine")
    assert (
        record is not None and record["options"]["weight_decay"] == 0.5 and record["inputs"][-1]["name"] == "mine.toml"
    )
    os.chdir("mine")  # the configuration finds its files from anywhere
    assert train("../shards", "-c", "config.toml", "-q", "-o", "../mine2") == 0
    os.chdir("..")
    assert weights("mine2") == weights("mine")


STAGES = """
sequence_length = 32
[sources]
all = "shards"
[[stage]]
name = "short"
tokens = 1500
mix = { all = 1 }
lr = 1e-3
warmup = 0.2
[[stage]]
name = "long"
tokens = 1000
mix = { all = 1 }
lr = 5e-4
schedule = "linear"
sequence_length = 64
rope_theta = 50000.0
"""


def test_stages_of_a_mix(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Behaviour: one file mixes and trains.

    Each stage has its learning rates, length and rope_theta; a plan, shards and a resumption give the same
    bytes.
    """
    Path("stages.toml").write_text(STAGES)
    for output, more in (("plan", ["--plan"]), ("mixed", [])):
        assert run_command("mix", ["--stages", "stages.toml", *more, "-q", "-o", output]) == 0
    call = ("-m", "config.json", "--recipe", "stages.toml", "--batch-size", "2", "--save-every", "5", "-q")
    assert train("plan", *call, "-o", "run") == 0 and train("mixed", *call, "-o", "other") == 0
    assert tensors("other") == tensors("run")  # the lineage of their data differs
    config = {p.name: json.loads((p / "config.json").read_text()) for p in Path("run/checkpoints").iterdir()}
    thetas = [config[name]["rope_theta"] for name in sorted(config)]
    assert thetas == sorted(thetas) and set(thetas) == {10_000.0, 50_000.0}
    assert {c["max_position_embeddings"] for c in config.values()} == {64}
    border = thetas.index(50_000.0) * 5  # the last checkpoint in front of the second stage
    rates = [record["lr"] for record in read_metrics("run/metrics.jsonl")]
    assert rates[border - 2] == 1e-3 and rates[-1] < 1e-4
    before = weights("run")
    stop_at("run", border)
    assert train("plan", *call, "-o", "run", "--resume") == 0 and weights("run") == before
    assert train("mixed", *call, "--tokens", "2k", "-o", "x") == 2
    assert "stages of the data total" in capsys.readouterr().err
    # From a model the file's length holds too, and a stage with a rope_theta may go beyond the context.
    short = json.loads(Path("config.json").read_text()) | {"max_position_embeddings": 32}
    Path("short.json").write_text(json.dumps(short))
    assert train("shards", "-m", "short.json", "--tokens", "500", "-q", "-o", "base") == 0
    assert train("mixed", "--from", "base", *call[2:], "-o", "longer") == 0
    longer = json.loads(Path("longer/final/config.json").read_text())
    assert (longer["max_position_embeddings"], longer["rope_theta"]) == (64, 50_000.0)
    assert train("shards", *call, "-o", "x", "-n") == 0  # no stages in the data: those of the recipe, scaled
    Path("wrong.toml").write_text(STAGES.replace("rope_theta", "rope_thetta"))
    assert run_command("mix", ["--stages", "wrong.toml", "--plan", "-q", "-o", "p2"]) == 2
    assert train("mixed", "-m", "config.json", "--recipe", "wrong.toml", "-o", "x") == 2
    assert capsys.readouterr().err.count("did you mean 'rope_theta'?") == 2


def test_training_from_a_model(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Behaviour: --from keeps the moments and the last learning rate.

    --rewarm raises it from there; a bare model has neither; the lineage records the start.
    """
    assert train(*SMALL, "-o", "run", "--save-every", "4") == 0
    last = load_trainer_state(Path("run/final")).rate
    data = ("shards", "--tokens", "4k", "-q")
    assert train("--from", "run", *data, "-o", "on", "--batch-size", "4") == 0
    assert [record["lr"] for record in read_metrics("on/metrics.jsonl")] == [last] * 16
    assert train("--from", "run", *data, "-o", "up", "--rewarm", "--lr", "2e-3", "--warmup", "0.5") == 0
    rates = [record["lr"] for record in read_metrics("up/metrics.jsonl")]
    assert rates[:4] == sorted(rates[:4]) and last < rates[0] < rates[3] < 2e-3 and rates[4:] == sorted(rates[4:])[::-1]
    shutil.copytree("run/final", "bare", ignore=shutil.ignore_patterns("state"))
    assert train("--from", "bare", *data, "-o", "cold", "--lr", str(last), "--batch-size", "4") == 0
    assert losses("cold")[0] == losses("on")[0] and losses("cold")[2] != losses("on")[2]  # without moments
    record = read_lineage("up")
    assert record is not None and record["options"]["from_"] == "run" and "model" not in record["options"]
    assert [(item["role"], item["name"]) for item in record["inputs"]] == [("input", "shards"), ("from_", "run")]
    stop_at("up", 4)
    done = load_trainer_state(sorted(Path("up/checkpoints").iterdir())[-1]).step
    assert 0 < done <= 4
    assert train("shards", "-c", "up/config.toml", "-q", "-o", "up", "--resume") == 0
    assert [record["lr"] for record in read_metrics("up/metrics.jsonl")] == rates
    assert train("shards", "-c", "up/config.toml", "-q", "-o", "up2") == 0 and weights("up2") == weights("up")
    for wrong, message in (
        (("--from", "run", "-m", "tiny"), "--model and --from are mutually exclusive"),
        (("--rewarm",), "--rewarm requires --from"),
        (("--from", "run", "--sequence-length", "128"), "exceeds the model's context of 64"),
        (("--from", "run", "--recipe", "amber", "--rewarm"), "--rewarm cannot be combined with this --recipe"),
    ):
        assert train(*data, *wrong, "-o", "x") == 2
        assert message in capsys.readouterr().err
    assert train("run", "shards", "--tokens", "1k", "-q", "-o", "ended", "--ramp", "sqrt", command="anneal") == 0
    Path("ended/final/state/digests.json").unlink()
    Path("ended/final/state/trainer.json").write_text(
        Path("ended/final/state/trainer.json").read_text().replace('"rate": ', '"rate": 0.0, "_": ')
    )
    assert train("--from", "ended", *data, "-o", "x") == 2 and "--rewarm" in capsys.readouterr().err


def test_training_with_an_extended_vocabulary(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Behaviour: a model with an extended vocabulary trains on shards of its own tokenizer.

    Those of the old one are refused.
    """
    assert train(*SMALL, "-o", "run") == 0
    Path("new.jsonl").write_text(
        "".join(f'{{"text": "zebras graze gently on {i % 7} prairies"}}\n' for i in range(200))
    )
    assert run_command("vocab extend", ["run", "new.jsonl", "--add", "8", "--model", "run", "-q", "-o", "bigger"]) == 0
    assert run_command("tokenize", ["new.jsonl", "-t", "bigger", "-q", "-o", "more"]) == 0
    assert train("--from", "bigger", "more", "--rewarm", "-q", "-o", "on") == 0
    assert json.loads(Path("on/final/config.json").read_text())["vocab_size"] > 280
    assert losses("on")[-1] < losses("on")[0]
    assert train("--from", "bigger", "shards", "-q", "-o", "x") == 1
    assert "not made with the model's tokenizer" in capsys.readouterr().err


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
        (("shards", "-m", "tiny", "-o", "x", "--precision", "fp8"), 2, "fp8 needs"),
        (("shards", "-m", "tiny", "-o", "x", "--heldout", "other.arrow"), 1, "not made with the model's tokenizer"),
        (("shards", "-m", "tiny", "-o", "x", "--recipe", "ambr"), 2, "did you mean 'amber'?"),
        (
            ("shards", "-m", "tiny", "-o", "x", "--recipe", "amber", "--warmup", "0.1"),
            2,
            "--warmup cannot be combined with this --rec",
        ),
        (("shards", "-m", "tiny", "-o", "x", "--recipe", "none.toml"), 1, "none.toml: No such file"),
        (("shards", "-m", "tiny", "-o", "x", "--batch-warmup", "4"), 2, "not a size with its tokens"),
        (("shards", "-m", "tiny", "-o", "x", "--batch-warmup", "16:1k"), 2, "--batch-warmup: 16 is not below 8"),
        (("shards", "-m", "tiny", "-o", "x", "--warmup", "10M"), 2, "--warmup"),
        (("shards", "-m", "tiny", "-o", "x", "--warmup", "1000000"), 2, "does not fit into"),
        (("shards", "-m", "tiny", "-o", "x", "--sequence-length", "8192"), 2, "sequences of 8,192 tokens, but shards"),
        (("shards", "-m", "tiny", "-o", "x", "--betas", "0.9,1"), 2, "--betas"),
        (("shards", "-m", "tiny", "-o", "no/where"), 1, "mkdir"),
        (("shards", "-m", "tiny", "-o", "shards"), 1, "shards exists"),
        (("shards", "-m", "tiny", "-o", "shards", "-f"), 2, "shards is in the output shards"),
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
    """Behaviour: a wrong call gives one line of error and leaves nothing behind."""
    from llmkit.io.record import Lineage
    from llmkit.shards.tokenizer_info import parse_tokenizer
    from llmkit.shards.writer import ShardWriter

    other = tokenizer_files | {"tokenizer.json": tokenizer_files["tokenizer.json"].replace("<|im_end|>", "<|eot|>")}
    with ShardWriter("other.arrow", parse_tokenizer(other, "other"), Lineage("tokenize")) as writer:
        writer.write([1, 2, 0], "a", "b")
        writer.finish({}, [])
    assert train(*arguments, "-q") == code
    assert message in capsys.readouterr().err
    assert not (place / "x").exists()


def test_failed_start_leaves_nothing(tmp_path: Path) -> None:
    """Behaviour: an error before the first step removes the directory.

    A signal does not, nor an error of a resumed run.
    """
    config = tmp_path / "run" / "config.toml"
    cases = ((LlmkitError("", ""), False, False), (KeyboardInterrupt(), False, True), (LlmkitError("", ""), True, True))
    for error, resume, stays in cases:
        with pytest.raises(type(error)), open_run(str(tmp_path / "run"), resume=resume, force=False):
            config.write_text("")
            raise error
        assert config.exists() == stays == config.parent.exists()


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
    """Wait until the run has logged `count` steps."""
    log = run / "metrics.jsonl"
    wait_until(lambda: log.exists() and len(list(read_metrics(log))) >= count, process)


def test_held_out_data_by_domain(place: Path) -> None:
    """Behaviour: domains are the given names, otherwise the documents' sources; a path may contain an equals sign."""
    from llmkit.shards.reader import TokenStore
    from llmkit.training.inputs import held_out_source

    digest = TokenStore.open("shards").tokenizer.digest

    def domains(*named: str) -> tuple[str, ...]:
        source = held_out_source(list(named), digest, 32, True)
        assert source is not None
        return source.group_names

    assert domains("heldout.arrow") == ("test",)
    assert domains("web=heldout.arrow", "shards") == ("web", "test")
    os.symlink("heldout.arrow", "a=b.arrow")
    assert domains("a=b.arrow") == ("test",)
    assert train(*SMALL, "-o", "run", "--heldout", "web=heldout.arrow") == 0
    last = list(read_metrics("run/metrics.jsonl"))[-1]
    assert last["heldout/web"] == pytest.approx(last["heldout_loss"], rel=1e-5)
    assert 0 < last["heldout_bpb/web"] == last["heldout_bpb"]


def test_two_processes_and_one(place: Path) -> None:
    """Property: losses of two gloo processes equal those of one within 1e-5, as do the other curves of the
    model and the data. SIGTERM saves (143), and one process resumes from there."""
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
        expected = {name: value for name, value in one.items() if not re.search(of_machine, name)}
        assert {name: two[name] for name in expected} == pytest.approx(expected, rel=2e-3)
    assert train(*call, "-o", "two", "--resume") == 0
    assert losses("two") == pytest.approx(losses("one"), abs=1e-5)


def test_kill_and_resume_from_the_shell(place: Path) -> None:
    """Property: after kill -9 of the real command, --resume in a new process gives the bytes of the undisturbed run."""
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
    """Behaviour: `accelerate launch -m llmkit train` gives the same losses."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--cpu", "-m", "llmkit"]
    subprocess.run([*launcher, "train", *SMALL, "-o", "launched"], check=True, capture_output=True)
    assert train(*SMALL, "-o", "one") == 0
    assert losses("launched") == pytest.approx(losses("one"), abs=1e-5)


def test_warmup_is_a_share_or_a_count(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Behaviour: --warmup 1k is 1,000 tokens, 0.25 a share; a negative number or a word is a usage error."""
    for name, warmup in (("a", "1k"), ("b", "1000"), ("c", "0.25")):
        assert train(*SMALL, "--warmup", warmup, "-o", name) == 0
    rates = [[record["lr"] for record in read_metrics(f"{name}/metrics.jsonl")] for name in "abc"]
    assert rates[0] == rates[1] and rates[2] == pytest.approx(rates[1], rel=0.02)
    for wrong in ("-1", "many", "nan"):
        assert train(*SMALL, "--warmup", wrong, "-o", "x") == 2
        assert "Traceback" not in capsys.readouterr().err


def test_python_makes_the_same_run(place: Path) -> None:
    """Property: `pretrain` and `anneal` with the options of the command line give the same bytes.

    A finished run is not repeated.
    """
    from llmkit.errors import UsageError
    from llmkit.training.pretraining import anneal, pretrain

    assert train(*SMALL, "-o", "run", "--lr", "1e-3", "--save-every", "4") == 0
    steps = []
    outcome = pretrain(
        "shards",
        "python",
        model="config.json",
        tokens=4000,
        lr=1e-3,
        save_every=4,
        report=lambda r: steps.append(r["step"]),
    )
    assert outcome is not None and outcome["steps"] == 8 and steps == list(range(1, 9))
    assert weights("python") == weights("run")
    assert Path("python/config.toml").read_bytes() == Path("run/config.toml").read_bytes()
    assert pretrain("shards", "python", model="config.json", tokens=4000, lr=1e-3, save_every=4, resume=True) is None
    assert train("run", "shards", "--tokens", "2k", "-q", "-o", "annealed", command="anneal") == 0
    assert anneal("run", "shards", "annealed2", tokens=2000)
    assert weights("annealed2") == weights("annealed")
    with pytest.raises(UsageError, match="unknown option 'token'"):
        pretrain("shards", "other", token=1)


def test_records_with_former_names(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Behaviour: runs, configurations and records with former names of options can be resumed, trained and
    scripted with the current names."""
    call = (*SMALL, "--save-every", "4", "-o", "run")
    assert train(*call, "--min-lr", "0.2") == 0
    expected = weights("run")
    for checkpoint in Path("run/checkpoints").iterdir():
        path = checkpoint / "state" / "trainer.json"
        state = json.loads(path.read_text())
        state["options"]["min_lr"] = state["options"].pop("final_lr_fraction")
        path.write_text(json.dumps(state))
        (checkpoint / "state" / "digests.json").unlink()
    shutil.rmtree("run/checkpoints/step-00000008")
    for link in ("final", "latest"):
        os.unlink(f"run/{link}")
    os.symlink("checkpoints/step-00000004", "run/latest")
    shutil.copy("run/config.toml", "old.toml")
    text = Path("old.toml").read_text()
    Path("old.toml").write_text(text.replace("final-lr-fraction", "min-lr"))
    from llmkit.training.checkpoint import run_directory

    for checkpoint in Path("run/checkpoints").iterdir():
        (checkpoint / "state" / "digests.json").write_text(json.dumps(run_directory._file_digests(checkpoint)))
    assert train("shards", "-c", "old.toml", "-q", "--resume", "-o", "run") == 0
    assert weights("run") == expected
    record = read_lineage("run")
    assert record is not None
    record["options"]["min_lr"] = record["options"].pop("final_lr_fraction")
    from llmkit.cli.release.lineage import _flags
    from llmkit.lineage.script import as_script

    assert "--final-lr-fraction 0.2" in as_script(record, "run", _flags)
    anneal_record = {"command": "anneal", "options": {"from_": "step-4", "to": 0.1}, "inputs": []}
    script = as_script(anneal_record, "annealed", _flags)
    assert "--step step-4" in script and "--final-lr-fraction 0.1" in script
