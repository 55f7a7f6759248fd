"""Merged models against independent implementations of the papers' formulas; cost; models that must not be merged."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from llmkit.errors import LlmkitError, UsageError
from llmkit.lineage.formats import digest_path, read_lineage
from llmkit.merging import streams
from llmkit.merging.average import Digests, write_average
from llmkit.merging.methods import METHODS, Merge, merged_blocks, resolve_merge, shares
from llmkit.merging.streams import ModelSet, check_alike
from llmkit.model.pretrained.checkpoint import load_info, load_model
from llmkit.model.pretrained.streamed import from_float32, to_float32

MakeModel = Callable[..., Path]
Exact = dict[str, np.ndarray]


def merge_models(paths: list[Path], merge: Merge, output: Path, base: Path | None = None) -> dict[str, torch.Tensor]:
    output.mkdir()
    record = '{"command":"average"}'
    write_average(
        [load_info(path) for path in paths], merge, output, lambda _: record, base=load_info(base) if base else None
    )
    return load_file(output / "model.safetensors")


def exact(path: Path) -> Exact:
    """The weights of a model in float64."""
    return {name: value.double().numpy() for name, value in load_file(path / "model.safetensors").items()}


@pytest.fixture(scope="module")
def three(make_model: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    directory = tmp_path_factory.mktemp("average")
    return [make_model(directory / str(seed), seed=seed) for seed in range(3)]


@pytest.fixture(scope="module")
def base(make_model: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("base") / "base", seed=9)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small enough that tensors of tiny models span several blocks and reads."""
    monkeypatch.setattr(streams, "BLOCK", 256)
    monkeypatch.setattr(streams, "AHEAD", 1024)


@pytest.mark.parametrize(
    ("method", "options", "wanted"),
    [
        ("uniform", {}, [1 / 3, 1 / 3, 1 / 3]),
        ("weighted", {"weights": [1, 2, 5]}, [1 / 8, 2 / 8, 5 / 8]),
        ("weighted", {"weights": [0, 3, 1]}, [0, 3 / 4, 1 / 4]),
        ("ema", {"decay": 0.9}, [0.81, 0.09, 0.1]),
        ("ema", {"decay": 0.0}, [0, 0, 1]),
    ],
)
def test_average_is_the_formula(
    method: str, options: dict[str, Any], wanted: list[float], three: list[Path], tmp_path: Path
) -> None:
    """Parity with Σ cₖ·θₖ in float64, every tensor, within float32's rounding; the result loads."""
    merged = merge_models(three, resolve_merge(method, 3, **options), tmp_path / "out")
    models = [exact(path) for path in three]
    assert merged.keys() == models[0].keys()
    for name, value in merged.items():
        sum_ = sum(c * model[name] for c, model in zip(wanted, models, strict=True))
        assert value.dtype == torch.float32
        np.testing.assert_allclose(value.numpy(), sum_, rtol=0, atol=3e-7)
    loaded, info = load_model(tmp_path / "out")
    assert info.stop_ids == [0, 2] and info.tokenizer_files == load_info(three[0]).tokenizer_files
    assert torch.equal(loaded.state_dict()["model.norm.weight"], merged["model.norm.weight"])
    assert read_lineage(tmp_path / "out") == {"command": "average"}


# ---- formulas of the papers, whole tensors in float64


def exact_slerp(a: np.ndarray, b: np.ndarray, t: float) -> np.ndarray:
    """Shoemake's formula over the tensor as one vector."""
    omega = np.arccos(np.vdot(a, b) / np.linalg.norm(a) / np.linalg.norm(b))
    return (np.sin((1 - t) * omega) * a + np.sin(t * omega) * b) / np.sin(omega)


def exact_task(base: np.ndarray, models: list[np.ndarray], weights: list[float], scale: float) -> np.ndarray:
    return base + scale * sum(w * (model - base) for w, model in zip(weights, models, strict=True))  # type: ignore[return-value]


def exact_ties(
    base: np.ndarray, models: list[np.ndarray], weights: list[float], scale: float, density: float
) -> np.ndarray:
    """Algorithm 1 of the paper: trim, elect, disjoint merge; element by element."""
    trimmed = []
    for weight, model in zip(weights, models, strict=True):
        task = (model - base).ravel()
        kept = np.argsort(-np.abs(task), kind="stable")[: max(1, int(density * task.size))]
        sparse = np.zeros_like(task)
        sparse[kept] = task[kept]
        trimmed.append((weight, sparse))
    result = np.zeros(base.size)
    for p in range(base.size):
        sign = 1 if sum(w * task[p] for w, task in trimmed) >= 0 else -1
        agreeing = [(w, task[p]) for w, task in trimmed if np.sign(task[p]) == sign]
        if agreeing:
            result[p] = sum(w * x for w, x in agreeing) / sum(w for w, _ in agreeing)
    return base + scale * result.reshape(base.shape)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp(t: float, three: list[Path], tmp_path: Path) -> None:
    """Parity with the formula on every tensor, or with the straight line where tensors are nearly parallel (norms of fresh models)."""
    merged = merge_models(three[:2], resolve_merge("slerp", 2, t=t), tmp_path / "out")
    a, b = exact(three[0]), exact(three[1])
    arcs = 0
    for name, value in merged.items():
        cosine = np.vdot(a[name], b[name]) / np.linalg.norm(a[name]) / np.linalg.norm(b[name])
        arcs += abs(cosine) < 0.9995
        wanted = exact_slerp(a[name], b[name], t) if abs(cosine) < 0.9995 else (1 - t) * a[name] + t * b[name]
        np.testing.assert_allclose(value.numpy(), wanted, rtol=0, atol=4e-7)
    assert arcs > 5


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.5, -0.3, 2.0]])
def test_task_arithmetic(weights: list[float], three: list[Path], base: Path, tmp_path: Path) -> None:
    """Parity with base + λ Σ w·(θ − base); one task vector with weight 1 restores its model."""
    merged = merge_models(three, resolve_merge("task", 3, weights, scale=0.7), tmp_path / "out", base)
    models, start = [exact(path) for path in three], exact(base)
    for name, value in merged.items():
        wanted = exact_task(start[name], [model[name] for model in models], weights, 0.7)
        np.testing.assert_allclose(value.numpy(), wanted, rtol=0, atol=2e-6)
    same = merge_models([three[0]], resolve_merge("task", 1), tmp_path / "same", base)
    for name, value in same.items():
        np.testing.assert_allclose(value.numpy(), models[0][name], rtol=0, atol=3e-7)


@pytest.mark.parametrize(
    ("density", "weights"), [(0.2, [1.0, 1.0, 1.0]), (0.6, [1.0, 0.5, 2.0]), (1.0, [1.0, 1.0, 0.0])]
)
def test_ties(density: float, weights: list[float], three: list[Path], base: Path, tmp_path: Path) -> None:
    """Parity with the paper's algorithm."""
    merged = merge_models(
        three, resolve_merge("ties", 3, weights, density=[density], scale=1.2), tmp_path / "out", base
    )
    models, start = [exact(path) for path in three], exact(base)
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"):
        wanted = exact_ties(start[name], [model[name] for model in models], weights, 1.2, density)
        np.testing.assert_allclose(merged[name].numpy(), wanted, rtol=0, atol=2e-6)


def test_ties_among_equal_changes(make_model: MakeModel, tmp_path: Path) -> None:
    """Parity with the paper's algorithm when many changes have equal size, as in bfloat16: exactly the density is kept, the first in the tensor."""
    paths = [make_model(tmp_path / str(seed), seed=seed) for seed in range(3)]
    for path in paths:
        tensors = load_file(path / "model.safetensors")
        coarse = {name: (value * 8).round() / 8 for name, value in tensors.items()}
        save_file(coarse, path / "model.safetensors", {"format": "pt"})
    start, *models = [exact(path) for path in paths]
    merged = merge_models(paths[1:], resolve_merge("ties", 2, density=[0.4]), tmp_path / "out", paths[0])
    for name in ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"):
        assert len(np.unique(np.abs(models[0][name] - start[name]))) < 30
        wanted = exact_ties(start[name], [model[name] for model in models], [1.0, 1.0], 1.0, 0.4)
        np.testing.assert_allclose(merged[name].numpy(), wanted, rtol=0, atol=1e-6)


def test_dare_drops_and_rescales(three: list[Path], base: Path, tmp_path: Path) -> None:
    """Property: each change is dropped or divided by the density, at the right rate, independently of position and model."""
    merged = merge_models(three[:1], resolve_merge("dare", 1, density=[0.3]), tmp_path / "out", base)
    model, start = exact(three[0]), exact(base)
    kept: list[np.ndarray] = []
    for name, value in merged.items():
        change, scaled = value.numpy() - start[name], (model[name] - start[name]) / 0.3
        stays = np.abs(change) > 0.5 * np.abs(scaled)
        np.testing.assert_allclose(change, stays * scaled, rtol=0, atol=1e-6)
        kept.append(stays.ravel())
    drawn = np.concatenate(kept)
    n = len(drawn)
    assert abs(drawn.mean() - 0.3) < 5 * np.sqrt(0.21 / n)
    assert abs((drawn[1:] & drawn[:-1]).mean() - 0.09) < 5 * np.sqrt(0.0819 / n)
    two = merge_models([three[0], three[0]], resolve_merge("dare", 2, density=[0.5]), tmp_path / "two", base)
    shape = two["model.embed_tokens.weight"].numpy() - start["model.embed_tokens.weight"]
    unit = model["model.embed_tokens.weight"] - start["model.embed_tokens.weight"]
    counts = [np.mean(np.abs(shape - times * unit) < 1e-5) for times in (0, 2, 4)]
    assert np.allclose(counts, [0.25, 0.5, 0.25], atol=0.03)  # the same model twice draws twice


def test_dare_is_right_on_average_and_exact_when_nothing_is_dropped(
    three: list[Path], base: Path, tmp_path: Path
) -> None:
    """Property: the mean over seeds is the model of task arithmetic (DARE is unbiased); density 1 gives its bytes, or those of TIES."""
    infos, start = [load_info(path) for path in three[:2]], load_info(base)
    name = "model.layers.0.mlp.down_proj.weight"
    with ModelSet(infos, start, digesting=False) as opened:

        def merged(merge: Merge) -> np.ndarray:
            return np.concatenate([block.copy() for block in merged_blocks(opened, name, merge)])

        plain = merged(resolve_merge("task", 2))
        seeds = np.stack([merged(resolve_merge("dare", 2, density=[0.5], seed=seed)) for seed in range(200)])
        assert len({row.tobytes() for row in seeds}) == 200
        error = np.abs(seeds.astype(np.float64).mean(0) - plain)
        spread = seeds.std(0) / np.sqrt(200)
        assert (error > 5 * spread + 1e-6).sum() == 0
        assert np.array_equal(merged(resolve_merge("dare", 2, density=[1.0])), plain)
        assert np.array_equal(
            merged(resolve_merge("dare-ties", 2, density=[1.0])), merged(resolve_merge("ties", 2, density=[1.0]))
        )


def test_what_dare_draws_is_fixed() -> None:
    """Behaviour: a golden digest; if it changes, the same call gives a different model than before."""
    from llmkit.merging.formulas import drop

    ones = np.ones(1000, np.float32)
    drop(ones, 0.25, 7, "model.norm.weight", 1, 65536)
    import xxhash

    assert (ones > 0).sum() == 237 and xxhash.xxh3_64_hexdigest(ones.tobytes()) == "c22ac053f8582b60"


@given(
    st.lists(st.floats(0, 1e6), min_size=1, max_size=9).filter(lambda weights: sum(weights) > 1e-3), st.floats(0, 0.99)
)
def test_shares_amount_to_coefficients(weights: list[float], decay: float) -> None:
    """Property: unrolled, the running mean has the coefficients wₖ/Σw, 1/n and (1 − d)·dⁿ⁻ᵏ, which add up to 1."""

    def coefficients(parts: list[float]) -> list[float]:
        result: list[float] = []
        for part in parts:
            result = [c * (1 - part) for c in result] + [part]
        return result

    n = len(weights)
    assert coefficients(shares("weighted", n, weights)) == pytest.approx([w / sum(weights) for w in weights], abs=1e-9)
    assert coefficients(shares("uniform", n)) == pytest.approx([1 / n] * n)
    powers = [decay ** (n - 1)] + [(1 - decay) * decay ** (n - 1 - k) for k in range(1, n)]
    assert coefficients(shares("ema", n, decay=decay)) == pytest.approx(powers, abs=1e-9)


def test_average_of_equal_models_is_that_model(three: list[Path], tmp_path: Path) -> None:
    """Property: to the bit, by every linear method, and the same bytes each time."""
    for i, merge in enumerate(
        (resolve_merge("uniform", 3), resolve_merge("weighted", 3, [1, 7, 3]), resolve_merge("ema", 3))
    ):
        merged = merge_models([three[0]] * 3, merge, tmp_path / f"{i}")
        for name, value in load_file(three[0] / "model.safetensors").items():
            assert torch.equal(merged[name], value), name
    assert (tmp_path / "0" / "model.safetensors").read_bytes() == (tmp_path / "1" / "model.safetensors").read_bytes()


def test_half_precision_is_accumulated_in_float32(make_model: MakeModel, tmp_path: Path) -> None:
    """Property: nine bfloat16 models give the exact mean, rounded once; accumulation in bfloat16 would not."""
    paths = [make_model(tmp_path / str(seed), seed=seed, dtype=torch.bfloat16) for seed in range(9)]
    merged = merge_models(paths, resolve_merge("uniform", 9), tmp_path / "out")
    models = [load_file(path / "model.safetensors") for path in paths]
    worse = 0
    for name, value in merged.items():
        assert value.dtype == torch.bfloat16
        exact = torch.stack([model[name].double() for model in models]).mean(0)
        best = (exact.to(torch.bfloat16).double() - exact).abs()
        # The slack is float32's rounding: it decides only exact ties between two bfloat16 values.
        assert ((value.double() - exact).abs() <= best + 3e-7).all(), name
        running = models[0][name].clone()
        for k, model in enumerate(models[1:], 2):
            running.lerp_(model[name], 1 / k)
        worse += int(((running.double() - exact).abs() > best + 3e-7).sum())
    assert worse > 1000


def test_the_type_is_the_first_models(make_model: MakeModel, three: list[Path], tmp_path: Path) -> None:
    """Behaviour: models of different types can be merged, and the output has the type of the first."""
    half = make_model(tmp_path / "half", seed=5, dtype=torch.float16)
    uniform = resolve_merge("uniform", 2)
    assert merge_models([half, three[0]], uniform, tmp_path / "a")["model.norm.weight"].dtype == torch.float16
    assert merge_models([three[0], half], uniform, tmp_path / "b")["model.norm.weight"].dtype == torch.float32


def test_different_models_are_refused_by_name(make_model: MakeModel, three: list[Path], tmp_path: Path) -> None:
    """Behaviour: the message names the model and the first field that differs; the context length may differ."""
    changes: list[dict[str, Any]] = [
        {"hidden_size": 64},
        {"num_hidden_layers": 3},
        {"num_key_value_heads": 1},
        {"architecture": "llama"},
        {"tie_word_embeddings": False},
        {"rope_theta": 5e5},
        {"rms_norm_eps": 1e-5},
    ]
    for i, change in enumerate(changes):
        other = make_model(tmp_path / f"other{i}", **change)
        with pytest.raises(LlmkitError) as error:
            check_alike([load_info(three[0]), load_info(other)])
        assert str(other) in error.value.message and next(iter(change)) in error.value.message
    longer = make_model(tmp_path / "longer", max_position_embeddings=128)
    check_alike([load_info(three[0]), load_info(longer)])


def test_another_tokenizer_is_refused(make_model: MakeModel, three: list[Path], tmp_path: Path) -> None:
    """Behaviour: models of equal size with different vocabularies are refused; a directory without a tokenizer is accepted."""
    other = make_model(tmp_path / "other", seed=1)
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace("<|im_start|>", "<|turn|>"))
    with pytest.raises(LlmkitError, match="another tokenizer than in"):
        check_alike([load_info(three[0]), load_info(other)])
    check_alike([load_info(three[0]), load_info(make_model(tmp_path / "bare", tokenizer=False))])


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("weighted", 3, [1.0, 2.0]), {}, "2 weights for 3 models"),
        (("weighted", 2, [1.0, -2.0]), {}, "-2.0"),
        (("weighted", 2, [1.0, float("nan")]), {}, "nan"),
        (("weighted", 2, [0.0, 0.0]), {}, "all weights are 0"),
        (("ema", 2), {"decay": 1.0}, "--decay 1.0"),
        (("ema", 2), {"decay": float("nan")}, "--decay nan"),
        (("slerp", 3), {}, "two models, not 3"),
        (("slerp", 2), {"t": 1.5}, "--t 1.5"),
        (("slerp", 2), {"t": float("nan")}, "--t nan"),
        (("task", 2, [1.0, 2.0, 3.0]), {}, "3 weights for 2 models"),
        (("task", 2, [1.0, float("inf")]), {}, "weights 1,inf"),
        (("task", 2), {"scale": float("nan")}, "--scale nan"),
        (("ties", 2, [1.0, -1.0]), {}, "weights 1,-1"),
        (("ties", 2), {"density": [0.0]}, "--density 0"),
        (("dare", 2), {"density": [1.01]}, "--density 1.01"),
        (("dare", 2), {"density": [float("nan")]}, "--density nan"),
        (("dare-ties", 3), {"density": [0.1, 0.2]}, "2 densities for 3 models"),
        (("unifrom", 2), {}, "unknown method 'unifrom'"),
    ],
)
def test_wrong_options(arguments: tuple[Any, ...], options: dict[str, Any], message: str) -> None:
    """Behaviour: usage errors that name the value, with a hint."""
    with pytest.raises(UsageError) as error:
        resolve_merge(*arguments, **options)
    assert message in error.value.message and error.value.hint


def test_methods_without_torch_or_numpy() -> None:
    """Behaviour: every method has help, requires only options that it takes, and help can list them all cheaply."""
    for method in METHODS.values():
        assert method.help and set(method.required) <= set(method.options)
    code = "import sys, llmkit.merging.methods; print({'torch', 'numpy'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_one_number_stands_for_all_models() -> None:
    """Behaviour: a weight or density for each model, or one for all; TIES keeps a fifth by default, as in its paper."""
    assert resolve_merge("ties", 3, [2.0]).weights == (2.0,) * 3 and resolve_merge("ties", 3).densities == (0.2,) * 3
    assert resolve_merge("dare", 2, density=[0.1, 1]).densities == (0.1, 1)


@pytest.mark.parametrize("method", ["uniform", "slerp", "task", "ties", "dare", "dare-ties"])
@pytest.mark.parametrize("number", [float("nan"), float("-inf")])
def test_non_finite_weights_are_refused_by_name(
    method: str, number: float, make_model: MakeModel, three: list[Path], base: Path, tmp_path: Path
) -> None:
    """Behaviour: NaN and infinity in a model are detected while merging; the error names model, tensor and element."""
    damaged = make_model(tmp_path / "damaged", seed=4)
    tensors = load_file(damaged / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"].view(-1)[700] = number
    save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
    with pytest.raises(LlmkitError) as error:
        merge_models(
            [three[0], damaged], resolve_merge(method, 2), tmp_path / "out", base if method[0] in "td" else None
        )
    assert str(damaged) in error.value.message
    assert f"model.layers.1.mlp.up_proj.weight contains {number} (element 700)" in error.value.message


def test_tensors_that_differ_are_refused_by_name(
    make_model: MakeModel, three: list[Path], base: Path, tmp_path: Path
) -> None:
    """Behaviour: a model with the same configuration whose tensors are missing, additional, or of another shape or type; also as the base."""
    for number, (edit, message) in enumerate(
        (
            (lambda t: t.pop("model.norm.weight"), "missing tensor model.norm.weight"),
            (lambda t: t.update(extra=torch.ones(2)), "missing tensor extra"),
            (lambda t: t.update({"model.norm.weight": torch.ones(3)}), "tensor model.norm.weight has shape [3]"),
            (
                lambda t: t.update({"model.norm.weight": torch.ones(3, dtype=torch.int8)}),
                "model.norm.weight has type I8",
            ),
        )
    ):
        other = make_model(tmp_path / f"other{number}", seed=1)
        tensors = load_file(other / "model.safetensors")
        edit(tensors)  # type: ignore[no-untyped-call]
        save_file(tensors, other / "model.safetensors", {"format": "pt"})
        for models, start in (([three[0], other], None), (three[:2], other)):
            with pytest.raises(LlmkitError) as error:
                ModelSet([load_info(path) for path in models], load_info(start) if start else None)
            assert message in error.value.message and str(other) in error.value.message
    with pytest.raises(LlmkitError, match="vocab_size is 64"):
        ModelSet([load_info(three[0])], load_info(make_model(tmp_path / "small", vocab_size=64, tokenizer=False)))
    with pytest.raises(LlmkitError, match="config.json implies"):
        ModelSet([load_info(_with_wrong_config(three[0], tmp_path / "lying"))])


def _with_wrong_config(model: Path, copy: Path) -> Path:
    """A copy of a model with a configuration of another size."""
    import shutil

    shutil.copytree(model, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"intermediate_size": config["intermediate_size"] + 8}))
    return copy


def test_digests_are_computed_while_reading(make_model: MakeModel, three: list[Path], tmp_path: Path) -> None:
    """Property: they equal those of the files, for one file or several, with tensors in any order."""
    tensors = load_file(three[0] / "model.safetensors")
    names = sorted(tensors, reverse=True)
    sharded = make_model(tmp_path / "sharded", seed=0)
    (sharded / "model.safetensors").unlink()
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, chosen in parts.items():
        save_file({name: tensors[name] for name in chosen}, sharded / file, {"format": "pt"})
    index = {"weight_map": {name: file for file, chosen in parts.items() for name in chosen}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    backwards = make_model(tmp_path / "backwards", seed=1)
    _write_backwards(load_file(three[1] / "model.safetensors"), backwards / "model.safetensors")

    recorded: list[Digests | None] = []
    (tmp_path / "out").mkdir()

    def record(digests: Digests | None) -> str:
        recorded.append(digests)
        return "{}"

    models = [sharded, backwards, three[2]]
    write_average([load_info(model) for model in models], resolve_merge("uniform", 3), tmp_path / "out", record)
    assert recorded[0] is None and recorded[1] is not None and len(recorded[1]) == 4
    for model in models:
        assert digest_path(model, recorded[1]) == digest_path(model)
        assert digest_path(model, dict.fromkeys(recorded[1], "xxh3:other")) != digest_path(model)
    plain = merge_models(three, resolve_merge("uniform", 3), tmp_path / "plain")
    for name, value in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(plain[name], value)


def _write_backwards(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """A file with tensors in reverse order of names, unlike those of any of our writers."""
    import struct

    header: dict[str, Any] = {}
    data = b""
    for name in sorted(tensors, reverse=True):
        raw = tensors[name].numpy().tobytes()
        header[name] = {
            "dtype": "F32",
            "shape": list(tensors[name].shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize(("name", "dtype"), [("BF16", torch.bfloat16), ("F16", torch.float16), ("F64", torch.float64)])
def test_types_are_converted_as_torch_does(name: str, dtype: torch.dtype) -> None:
    """Parity with torch: every finite half-precision number into float32, and a million float32 numbers back, including ties and subnormals."""
    if name != "F64":
        every = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(dtype)
        every = every[every.isfinite()]
        stored = every.view(torch.uint16).numpy().view("<f2" if name == "F16" else "<u2")
        out = np.empty(len(stored), np.float32)
        to_float32(stored, name, out)
        assert np.array_equal(out.view(np.uint32), every.float().numpy().view(np.uint32))
    bits = np.random.default_rng(0).integers(0, 1 << 32, 1 << 20, dtype=np.uint32)
    bits[::3] &= 0xFFFF8000  # halfway between two bfloat16 numbers, every second one
    values = bits.view(np.float32)[np.isfinite(bits.view(np.float32))]
    wanted = torch.from_numpy(values.copy()).to(dtype).view(torch.uint8).numpy()
    assert np.array_equal(from_float32(values, name).view(np.uint8), wanted)


# A process of its own, because memory of the parent counts for forked processes. Prints megabytes above the imports.
MEASURED = """
import sys
from pathlib import Path
from llmkit.model.pretrained.directory import load_info
from llmkit.merging.average import write_average
from llmkit.merging.methods import resolve_merge

def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024

method, out, start, *models = sys.argv[1:]
before = peak()
Path(out).mkdir()
base = load_info(start) if method in ("ties", "dare") else None
write_average([load_info(m) for m in models], resolve_merge(method, len(models)), Path(out), lambda _: "{}", base=base)
print(peak() - before, "torch" in sys.modules)
"""


def test_memory_is_a_few_blocks(tmp_path: Path) -> None:
    """Property: merging 192 MB models takes less than 48 MB above the imports, TIES one tensor (16 MB) more; torch is not loaded.

    The documented bound is one largest tensor per model, and 200 MB. The files are sparse: read in full, small on disk.
    """
    from llmkit.model.config import ModelConfig
    from llmkit.model.family import expected_tensors
    from llmkit.model.pretrained.directory import save_description
    from llmkit.model.pretrained.header import SIZES, Stored, encode_header

    config = ModelConfig(4096, 1024, 4096, 3, 8, 8, 64)
    layout = {name: Stored("F32", shape) for name, shape in expected_tensors(config).items()}
    largest = max(SIZES["F32"] * entry.count for entry in layout.values()) / 2**20
    for name in ("base", "a", "b"):
        (tmp_path / name).mkdir()
        save_description(tmp_path / name, config.to_hf(), {})
        with open(tmp_path / name / "model.safetensors", "wb") as file:
            header = encode_header(layout, {"format": "pt"})
            file.write(header)
            file.truncate(len(header) + sum(4 * entry.count for entry in layout.values()))
    assert largest == 16 and (tmp_path / "a" / "model.safetensors").stat().st_size > 190e6
    for method in ("uniform", "ties", "dare"):
        call = [sys.executable, "-c", MEASURED, method, *(str(tmp_path / n) for n in (method, "base", "a", "b"))]
        done = subprocess.run(call, capture_output=True, text=True, check=True)
        grown, torch_loaded = done.stdout.split()
        assert float(grown) < 48 + (largest if method == "ties" else 0), (method, grown)
        assert torch_loaded == "False"
        (tmp_path / method / "model.safetensors").unlink()


@given(st.lists(st.floats(0.5, 4), min_size=1, max_size=6), st.data())
def test_greedy_soup(alone: list[float], data: st.DataObject) -> None:
    """Property: recipe 1 of the paper, for any losses: from best to worst, a model is kept if the average does not get worse."""
    from llmkit.merging.greedy_soup import greedy_soup

    losses: dict[tuple[int, ...], float] = {(i,): loss for i, loss in enumerate(alone)}

    def loss(selected: list[int]) -> float:
        if tuple(selected) not in losses:
            losses[tuple(selected)] = data.draw(st.floats(0.4, 4))
        return losses[tuple(selected)]

    decisions = greedy_soup(len(alone), loss)
    assert [d.index for d in decisions] == sorted(range(len(alone)), key=lambda i: (alone[i], i))
    soup: list[int] = []
    for decision in decisions:
        better = not soup or losses[(*soup, decision.index)] <= losses[tuple(soup)]
        assert decision.kept == better and decision.loss == alone[decision.index]
        soup += [decision.index] if better else []
    assert losses[tuple(soup)] <= min(alone)


def test_soup_is_evaluated_as_stored(make_model: MakeModel, tmp_path: Path) -> None:
    """Property: the decoder that greedy soup evaluates has the weights of the stored model, rounded to bfloat16."""
    from llmkit.merging.greedy_soup import averaged_decoder

    paths = [make_model(tmp_path / str(seed), seed=seed, dtype=torch.bfloat16) for seed in range(3)]
    merged = merge_models(paths, resolve_merge("uniform", 3), tmp_path / "out")
    decoder = averaged_decoder([load_info(path) for path in paths], torch.device("cpu"))
    for name, value in decoder.state_dict().items():
        assert torch.equal(value, merged[name].float()), name
