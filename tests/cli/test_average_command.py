"""`llmkit average` on the command line: runs, methods, lineage, refusals."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llmkit.io.lineage import read_lineage

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def place(make_model: Callable[..., Path], tmp_path: Path) -> Path:
    """A run `run/` with checkpoints at steps 5, 10, 15, 20, the last of them final, and two models."""
    for step in (5, 10, 15, 20):
        make_model(tmp_path / "run" / "checkpoints" / f"step-{step:08d}", seed=step)
    # What a killed run leaves behind is no checkpoint.
    (tmp_path / "run" / "checkpoints" / ".step-00000025.partial").mkdir()
    (tmp_path / "run" / "final").symlink_to("checkpoints/step-00000020")
    make_model(tmp_path / "a", seed=1)
    make_model(tmp_path / "b", seed=2)
    return tmp_path


@pytest.fixture
def call(place: Path, llmkit_here: Callable[..., subprocess.CompletedProcess[bytes]]) -> Call:
    """`call("average", "a", "b")` in that directory: exit code, stdout, stderr."""

    def go(command: str, *arguments: str) -> tuple[int, str, str]:
        done = llmkit_here(command, *arguments, cwd=place)
        return done.returncode, done.stdout.decode(), done.stderr.decode()

    return go


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def is_mean(found: Path, parts: dict[Path, float]) -> bool:
    """Whether the weights are Σ c·θ."""
    models = {path: weights(path) for path in parts}
    return all(
        torch.allclose(value.double(), sum(c * models[path][name].double() for path, c in parts.items()), atol=3e-7)  # type: ignore[arg-type]
        for name, value in weights(found).items()
    )


def test_methods_and_order(call: Call, place: Path) -> None:
    """Behaviour: each method by its formula; a run stands for its final model; the order of exponential is that of the arguments."""
    a, b, final = place / "a", place / "b", place / "run" / "final"
    for number, (arguments, parts) in enumerate(
        (
            (("a", "b"), {a: 0.5, b: 0.5}),
            (("run", "a", "--method", "weighted", "--weights", "1,3"), {final: 0.25, a: 0.75}),
            (("a", "b", "--method", "exponential", "--decay", "0.8"), {a: 0.8, b: 0.2}),
            (("b", "a", "--method", "exponential"), {b: 0.9, a: 0.1}),
        )
    ):
        code, _, err = call("average", *arguments, "-o", f"out{number}")
        assert code == 0, err
        assert is_mean(place / f"out{number}", parts), arguments


def test_last_checkpoints_of_a_run(call: Call, place: Path) -> None:
    """Behaviour: --last takes them by step, names them in the lineage, and does nothing the second time; one more checkpoint is a change."""
    checkpoints = place / "run" / "checkpoints"
    wanted = ("average", "run", "--last", "3", "-o", "mean")
    code, _, err = call(*wanted, "--json")
    assert code == 0 and json.loads(err.splitlines()[-1])["models"] == 3
    assert is_mean(place / "mean", {checkpoints / f"step-{step:08d}": 1 / 3 for step in (10, 15, 20)})
    record = read_lineage(place / "mean")
    assert record is not None and record["options"]["steps"] == [10, 15, 20] and record["options"]["last"] == 3
    assert str(place) not in json.dumps(record)
    code, _, err = call(*wanted)
    assert code == 0 and "nothing to do" in err
    (checkpoints / "step-00000020").rename(checkpoints / "step-00000030")
    code, _, err = call(*wanted)
    assert code == 1 and "mean exists" in err


def test_equal_calls_give_equal_bytes(call: Call, place: Path) -> None:
    """Property: every file of the output; and with -q nothing is said."""
    for output in ("one", "two"):
        assert call("average", "a", "b", "-q", "-o", output) == (0, "", "")
    for file in (place / "one").iterdir():
        assert file.read_bytes() == (place / "two" / file.name).read_bytes(), file.name


def test_dry_run_writes_nothing(call: Call, place: Path) -> None:
    """Behaviour: -n checks that the models fit and leaves no file."""
    before = sorted(place.iterdir())
    assert call("average", "a", "b", "-n", "-o", "out")[0] == 0
    assert sorted(place.iterdir()) == before


def test_refusals(call: Call, make_model: Callable[..., Path], place: Path) -> None:
    """Behaviour: what is wrong is named, usage errors exit with 2, and nothing is written."""
    make_model(place / "wide", hidden_size=64)
    make_model(place / "broken")
    file = place / "broken" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    before = sorted(place.iterdir())
    for arguments, wanted, message in (
        (("a", "wide"), 1, "wide: hidden_size is 64"),
        (("a", "broken"), 1, "broken/model.safetensors"),
        (("a", "gone"), 1, "gone: no such file or directory"),
        (("a", "b", "--last", "2"), 1, "a: no checkpoints"),
        (("run", "--last", "5"), 1, "run: 4 checkpoints, not 5"),
        (("a",), 2, "one model is no average"),
        (("a", "b", "--weights", "1,2"), 2, "--weights is of --method weighted"),
        (("a", "b", "--decay", "0.5"), 2, "--decay is of --method exponential"),
        (("a", "b", "--method", "weighted"), 2, "0 weights for 2 models"),
        (("a", "b", "--method", "weighted", "--weights", "1,x"), 2, "'1,x'"),
        (("a", "b", "--method", "exponential", "--decay", "1.5"), 2, "--decay 1.5"),
        (("a", "b", "--method", "unifrom"), 2, "unknown method 'unifrom'"),
    ):
        code, _, err = call("average", *arguments, "-o", "out")
        assert code == wanted and message in err and "internal error" not in err, err
        assert sorted(place.iterdir()) == before
    code, _, err = call("average", "a", "b")
    assert code == 2 and "-o" in err


def test_existing_output(call: Call, place: Path) -> None:
    """Behaviour: kept and named; -f replaces a model, and nothing that is not one of ours."""
    (place / "precious").mkdir()
    (place / "precious" / "note").write_text("mine")
    code, _, err = call("average", "a", "b", "-o", "precious")
    assert code == 1 and "precious exists" in err and (place / "precious" / "note").exists()
    code, _, err = call("average", "a", "b", "-f", "-o", "precious")
    assert code == 1 and "what llmkit did not make" in err and (place / "precious" / "note").exists()
    assert call("average", "a", "b", "--method", "weighted", "--weights", "1,3", "-o", "out")[0] == 0
    assert call("average", "a", "b", "-f", "-o", "out")[0] == 0
    assert is_mean(place / "out", {place / "a": 0.5, place / "b": 0.5})


def test_script_makes_it_again(call: Call, place: Path) -> None:
    """Behaviour: the lineage's script names the command with its options."""
    assert call("average", "a", "b", "--method", "weighted", "--weights", "1,3", "-o", "out")[0] == 0
    code, script, err = call("lineage", "out", "--script")
    assert code == 0, err
    line = next(line for line in script.splitlines() if line.startswith("llmkit average"))
    assert '"$IN"/a "$IN"/b' in line and "--method weighted" in line and "--weights 1,3" in line
