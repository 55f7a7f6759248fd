"""`llmkit average` on the command line: runs, methods, lineage, refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmkit.lineage.formats import digest_path, read_lineage

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def directory(make_model: Callable[..., Path], tmp_path: Path) -> Path:
    """A run `run/` with checkpoints at steps 5, 10, 15, 20, the last of them final, and two models."""
    for step in (5, 10, 15, 20):
        make_model(tmp_path / "run" / "checkpoints" / f"step-{step:08d}", seed=step)
    # A leftover of a killed run, which is not a checkpoint.
    (tmp_path / "run" / "checkpoints" / ".step-00000025.partial").mkdir()
    (tmp_path / "run" / "final").symlink_to("checkpoints/step-00000020")
    make_model(tmp_path / "a", seed=1)
    make_model(tmp_path / "b", seed=2)
    return tmp_path


@pytest.fixture
def call(directory: Path, llmkit_here: Callable[..., subprocess.CompletedProcess[bytes]]) -> Call:
    """`call("average", "a", "b")` in that directory: exit code, stdout, stderr."""

    def go(command: str, *arguments: str) -> tuple[int, str, str]:
        done = llmkit_here(command, *arguments, cwd=directory)
        return done.returncode, done.stdout.decode(), done.stderr.decode()

    return go


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def is_mean(merged: Path, parts: dict[Path, float]) -> bool:
    """Whether the weights are Σ c·θ."""
    models = {path: weights(path) for path in parts}
    return all(
        torch.allclose(value.double(), sum(c * models[path][name].double() for path, c in parts.items()), atol=3e-7)  # type: ignore[arg-type]
        for name, value in weights(merged).items()
    )


def test_methods_and_order(call: Call, directory: Path) -> None:
    """Behaviour: each method by its formula; a run stands for its final model; `exponential` is `ema`; the order of ema is that of the arguments."""
    a, b, final = directory / "a", directory / "b", directory / "run" / "final"
    for number, (arguments, parts) in enumerate(
        (
            (("a", "b"), {a: 0.5, b: 0.5}),
            (("run", "a", "--method", "weighted", "--weights", "1,3"), {final: 0.25, a: 0.75}),
            (("a", "b", "--method", "ema", "--decay", "0.8"), {a: 0.8, b: 0.2}),
            (("b", "a", "--method", "ema"), {b: 0.9, a: 0.1}),
            (("b", "a", "--method", "exponential"), {b: 0.9, a: 0.1}),
            (("a", "b", "--method", "task", "--base", "run", "--weights", "1,0.5"), {a: 1, b: 0.5, final: -0.5}),
            (("a", "--method", "task", "--base", "run", "--scale", "0.25"), {a: 0.25, final: 0.75}),
        )
    ):
        code, _, err = call("average", *arguments, "-o", f"out{number}")
        assert code == 0, err
        assert is_mean(directory / f"out{number}", parts), arguments


def test_last_checkpoints_of_a_run(call: Call, directory: Path) -> None:
    """Behaviour: --last takes them in order of steps and records them in the lineage; a repeated call does nothing; another checkpoint is a change."""
    checkpoints = directory / "run" / "checkpoints"
    wanted = ("average", "run", "--last", "3", "-o", "mean")
    code, _, err = call(*wanted, "--json")
    assert code == 0 and json.loads(err.splitlines()[-1])["models"] == 3
    assert is_mean(directory / "mean", {checkpoints / f"step-{step:08d}": 1 / 3 for step in (10, 15, 20)})
    record = read_lineage(directory / "mean")
    assert record is not None and record["options"]["steps"] == [10, 15, 20] and record["options"]["last"] == 3
    assert str(directory) not in json.dumps(record)
    code, _, err = call(*wanted)
    assert code == 0 and "nothing to do" in err
    (checkpoints / "step-00000020").rename(checkpoints / "step-00000030")
    code, _, err = call(*wanted)
    assert code == 1 and "mean exists" in err


def test_equal_calls_give_equal_bytes(call: Call, directory: Path) -> None:
    """Property: every file of the output; with -q nothing is printed."""
    for output in ("one", "two"):
        assert call("average", "a", "b", "-q", "-o", output) == (0, "", "")
    for file in (directory / "one").iterdir():
        assert file.read_bytes() == (directory / "two" / file.name).read_bytes(), file.name


def test_dry_run_writes_nothing(call: Call, directory: Path) -> None:
    """Behaviour: -n checks that the models match and writes no file."""
    before = sorted(directory.iterdir())
    assert call("average", "a", "b", "-n", "-o", "out")[0] == 0
    assert sorted(directory.iterdir()) == before


def test_refusals(call: Call, make_model: Callable[..., Path], directory: Path) -> None:
    """Behaviour: messages name the mistake, usage errors exit with 2, and nothing is written."""
    make_model(directory / "wide", hidden_size=64)
    make_model(directory / "broken")
    file = directory / "broken" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    sick = make_model(directory / "sick", seed=3)
    tensors = weights(sick)
    tensors["model.layers.0.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, sick / "model.safetensors", {"format": "pt"})
    before = sorted(directory.iterdir())
    for arguments, wanted, message in (
        (("a", "wide"), 1, "wide: hidden_size is 64"),
        (("a", "broken"), 1, "broken/model.safetensors"),
        (("a", "gone"), 1, "gone: no such file or directory"),
        (("a", "b", "--last", "2"), 1, "a: no checkpoints"),
        (("run", "--last", "5"), 1, "run: 4 checkpoints, not 5"),
        (("a",), 2, "one model is not enough"),
        (("a", "b", "--weights", "1,2"), 2, "--weights only applies to --method weighted"),
        (("a", "b", "--decay", "0.5"), 2, "--decay only applies to --method ema"),
        (("a", "b", "--method", "weighted"), 2, "0 weights for 2 models"),
        (("a", "b", "--method", "weighted", "--weights", "1,x"), 2, "'1,x'"),
        (("a", "b", "--method", "ema", "--decay", "1.5"), 2, "--decay 1.5"),
        (("a", "b", "--t", "0.5"), 2, "--t only applies to --method slerp"),
        (("a", "b", "--density", "0.5"), 2, "--density only applies to --method ties or dare or dare-ties"),
        (("a", "b", "--method", "ties"), 2, "--method ties needs --base"),
        (("a", "b", "--method", "task", "--base", "wide"), 1, "wide: hidden_size is 64"),
        (("a", "b", "--method", "task", "--base", "gone"), 1, "gone: no such file or directory"),
        (("a", "b", "--method", "dare", "--base", "run", "--density", "0"), 2, "--density 0"),
        (("a", "b", "--method", "dare", "--base", "run", "--density", "x"), 2, "--density 'x'"),
        (("a", "b", "run", "--method", "slerp"), 2, "two models, not 3"),
        (("a", "b", "--method", "greedy"), 2, "--method greedy needs --heldout"),
        (("a", "b", "--method", "greedy", "--heldout", "none.jsonl"), 1, "none.jsonl"),
        (("a", "sick"), 1, "sick: tensor model.layers.0.mlp.up_proj.weight contains nan"),
        (("a", "b", "--method", "unifrom"), 2, "unknown method 'unifrom'"),
    ):
        code, _, err = call("average", *arguments, "-o", "out")
        assert code == wanted and message in err and "internal error" not in err, err
        assert sorted(directory.iterdir()) == before
    code, _, err = call("average", "a", "b")
    assert code == 2 and "-o" in err


def test_existing_output(call: Call, directory: Path) -> None:
    """Behaviour: it is kept and named; -f replaces a model, but nothing that llmkit did not write."""
    (directory / "precious").mkdir()
    (directory / "precious" / "note").write_text("mine")
    code, _, err = call("average", "a", "b", "-o", "precious")
    assert code == 1 and "precious exists" in err and (directory / "precious" / "note").exists()
    code, _, err = call("average", "a", "b", "-f", "-o", "precious")
    assert code == 1 and "what llmkit did not make" in err and (directory / "precious" / "note").exists()
    assert call("average", "a", "b", "--method", "weighted", "--weights", "1,3", "-o", "out")[0] == 0
    assert call("average", "a", "b", "-f", "-o", "out")[0] == 0
    assert is_mean(directory / "out", {directory / "a": 0.5, directory / "b": 0.5})
    for model, output in (("run", "run"), ("run/checkpoints/step-00000005", "run"), ("a", "a")):
        code, _, err = call("average", model, "b", "-f", "-o", output)
        assert code == 2 and f"{model} is in the output {output}" in err
    assert (directory / "run" / "final").exists()


def test_script_makes_it_again(call: Call, directory: Path) -> None:
    """Behaviour: the script of the lineage has the command with its options."""
    assert call("average", "a", "b", "--method", "weighted", "--weights", "1,3", "-o", "out")[0] == 0
    code, script, err = call("lineage", "out", "--script")
    assert code == 0, err
    line = next(line for line in script.splitlines() if line.startswith("llmkit average"))
    assert '"$IN"/a "$IN"/b' in line and "--method weighted" in line and "--weights 1,3" in line


def test_methods_with_a_base_are_recorded(call: Call, directory: Path) -> None:
    """Behaviour: record and script contain method, numbers and base; the seed determines what DARE drops."""
    wanted = ("a", "b", "--base", "run", "--method", "dare-ties", "--density", "0.4,0.6", "--scale", "0.9")
    assert call("average", *wanted, "--seed", "3", "-o", "one")[0] == 0
    record = read_lineage(directory / "one")
    assert record is not None
    assert [(item["role"], item["name"]) for item in record["inputs"]] == [
        ("base", "run"),
        ("input", "a"),
        ("input", "b"),
    ]
    assert record["options"] == {"method": "dare-ties", "density": "0.4,0.6", "scale": 0.9, "seed": 3}
    code, _, err = call("average", *wanted, "--seed", "3", "-o", "one")
    assert code == 0 and "nothing to do" in err
    script = call("lineage", "one", "--script")[1]
    line = next(line for line in script.splitlines() if line.startswith("llmkit average"))
    assert '--base "$IN"/run' in line and "--density 0.4,0.6" in line and "--seed 3" in line
    assert call("average", *wanted, "--seed", "4", "-o", "two")[0] == 0
    first, second = weights(directory / "one"), weights(directory / "two")
    assert not torch.equal(first["model.embed_tokens.weight"], second["model.embed_tokens.weight"])
    code, out, err = call("lineage", "one", "--check")
    assert code == 0 and out.count("ok") == 4, err


def test_greedy_soup(
    call: Call, directory: Path, write_shards: Callable[..., Path], make_model: Callable[..., Path]
) -> None:
    """Behaviour: models that improve the average are used, judged by shards or documents; a ruined one is left out; the table shows why."""
    write_shards(directory / "heldout.arrow", [40, 30, 50])
    (directory / "heldout.jsonl").write_text('{"text": "the quick brown fox"}\n{"text": "jumps over the lazy dog"}\n')
    ruined = make_model(directory / "ruined", seed=7)
    save_file({n: v * 30 for n, v in weights(ruined).items()}, ruined / "model.safetensors", {"format": "pt"})
    for heldout in ("heldout.arrow", "heldout.jsonl"):
        code, _, err = call(
            "average", "ruined", "a", "b", "a", "--method", "greedy", "--heldout", heldout, "-o", f"soup-{heldout}"
        )
        assert code == 0, err
        rows = [line.split() for line in err.splitlines() if line.split()[:1] in (["a"], ["b"], ["ruined"])]
        assert len(rows) == 4 and rows[0][1] == rows[0][2] and rows[0][3] == "yes"
        assert rows[-1][0] == "ruined" and rows[-1][3] == "no"
        kept = [row[0] for row in rows if row[3] == "yes"]
        assert is_mean(directory / f"soup-{heldout}", {directory / n: kept.count(n) / len(kept) for n in kept})
        record = read_lineage(directory / f"soup-{heldout}")
        assert record is not None and record["counts"] == {
            "kept": len(kept),
            "models": 4,
            "parameters": record["counts"]["parameters"],
        }
        assert record["inputs"][-1]["role"] == "heldout" and record["inputs"][-1]["name"] == heldout
        losses = [float(row[2]) for row in rows if row[3] == "yes"]
        assert losses == sorted(losses, reverse=True) and losses[-1] <= min(float(row[1]) for row in rows)
    other = write_shards(directory / "other.arrow", [10])
    assert other.exists()
    code, _, err = call(
        "average", "a", "b", "--method", "greedy", "--heldout", "other.arrow", "--heldout", "heldout.jsonl", "-o", "x"
    )
    assert code == 2 and "shards and documents" in err


def test_averaging_does_not_load_torch(directory: Path) -> None:
    """Behaviour: torch would take most of the time with small models."""
    code = """
import sys
from llmkit.cli.main import run_command
assert run_command("average", ["a", "b", "-q", "-o", "light"]) == 0
print(sorted(set(sys.modules) & {"torch", "numba", "pyarrow", "transformers"}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=directory)
    assert done.stdout == "[]\n", done.stderr


def test_quantised_models_are_averaged_with_a_warning(call: Call, directory: Path) -> None:
    """Behaviour: the average of their rounded weights, unquantised; the digests of such inputs are recorded too."""
    for name in ("a", "b"):
        assert call("quantize", name, "--to", "int8", "-o", f"{name}8")[0] == 0
    code, _, err = call("average", "a8", "b8", "-o", "out")
    assert code == 0 and err.count("is quantised") == 2
    exact = {n: (weights(directory / "a")[n] + weights(directory / "b")[n]) / 2 for n in weights(directory / "a")}
    merged = weights(directory / "out")
    assert max(float((merged[n] - exact[n]).abs().max()) for n in exact) < 0.05
    assert "quantization_config" not in json.loads((directory / "out" / "config.json").read_text())
    record = read_lineage(directory / "out")
    assert record is not None and [item["digest"] for item in record["inputs"]] == [
        digest_path(directory / n) for n in ("a8", "b8")
    ]
