"""Averages against their formulas, and what may not be averaged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from llmkit.errors import LlmkitError, UsageError
from llmkit.io.lineage import read_lineage
from llmkit.model.checkpoint import load_info, load_model
from llmkit.training.average import check_alike, shares, write_average

MakeModel = Callable[..., Path]


def average(paths: list[Path], parts: list[float], output: Path) -> dict[str, torch.Tensor]:
    output.mkdir()
    write_average([load_info(path) for path in paths], parts, output, '{"command":"average"}')
    return load_file(output / "model.safetensors")


@pytest.fixture(scope="module")
def three(make_model: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    place = tmp_path_factory.mktemp("average")
    return [make_model(place / str(seed), seed=seed) for seed in range(3)]


@pytest.mark.parametrize(
    ("method", "options", "wanted"),
    [
        ("uniform", {}, [1 / 3, 1 / 3, 1 / 3]),
        ("weighted", {"weights": [1, 2, 5]}, [1 / 8, 2 / 8, 5 / 8]),
        ("weighted", {"weights": [0, 3, 1]}, [0, 3 / 4, 1 / 4]),
        ("exponential", {"decay": 0.9}, [0.81, 0.09, 0.1]),
        ("exponential", {"decay": 0.0}, [0, 0, 1]),
    ],
)
def test_average_is_the_formula(
    method: str, options: dict[str, Any], wanted: list[float], three: list[Path], tmp_path: Path
) -> None:
    """Parity with Σ cₖ·θₖ in float64, every tensor, within float32's rounding; the result loads."""
    found = average(three, shares(method, 3, **options), tmp_path / "out")
    models = [load_file(path / "model.safetensors") for path in three]
    assert found.keys() == models[0].keys()
    for name, value in found.items():
        exact = sum(c * model[name].double() for c, model in zip(wanted, models, strict=True))
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), exact, rtol=0, atol=3e-7)
    loaded, info = load_model(tmp_path / "out")
    assert info.stop_ids == [0, 2] and info.tokenizer_files == load_info(three[0]).tokenizer_files
    assert torch.equal(loaded.state_dict()["model.norm.weight"], found["model.norm.weight"])
    assert read_lineage(tmp_path / "out") == {"command": "average"}


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
    assert coefficients(shares("exponential", n, decay=decay)) == pytest.approx(powers, abs=1e-9)


def test_average_of_equal_models_is_that_model(three: list[Path], tmp_path: Path) -> None:
    """Property: to the bit, by every method, and the same bytes each time."""
    for i, parts in enumerate((shares("uniform", 3), shares("weighted", 3, [1, 7, 3]), shares("exponential", 3))):
        found = average([three[0]] * 3, parts, tmp_path / f"{i}")
        for name, value in load_file(three[0] / "model.safetensors").items():
            assert torch.equal(found[name], value), name
    assert (tmp_path / "0" / "model.safetensors").read_bytes() == (tmp_path / "1" / "model.safetensors").read_bytes()


def test_half_precision_is_accumulated_in_float32(make_model: MakeModel, tmp_path: Path) -> None:
    """Property: nine bfloat16 models give the exact mean rounded once; adding up in bfloat16 would not."""
    paths = [make_model(tmp_path / str(seed), seed=seed, dtype=torch.bfloat16) for seed in range(9)]
    found = average(paths, shares("uniform", 9), tmp_path / "out")
    models = [load_file(path / "model.safetensors") for path in paths]
    worse = 0
    for name, value in found.items():
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
    """Behaviour: models of different types mix, and the output has the first one's."""
    half = make_model(tmp_path / "half", seed=5, dtype=torch.float16)
    assert average([half, three[0]], [1, 0.5], tmp_path / "a")["model.norm.weight"].dtype == torch.float16
    assert average([three[0], half], [1, 0.5], tmp_path / "b")["model.norm.weight"].dtype == torch.float32


def test_different_models_are_refused_by_name(make_model: MakeModel, three: list[Path], tmp_path: Path) -> None:
    """Behaviour: the model and the first field that differs stand in the message; the context length may differ."""
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
    """Behaviour: equal sizes with another vocabulary do not average; a directory without a tokenizer does."""
    other = make_model(tmp_path / "other", seed=1)
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace("<|im_start|>", "<|turn|>"))
    with pytest.raises(LlmkitError, match="another tokenizer"):
        check_alike([load_info(three[0]), load_info(other)])
    check_alike([load_info(three[0]), load_info(make_model(tmp_path / "bare", tokenizer=False))])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("weighted", 3, [1.0, 2.0]), "2 weights for 3 models"),
        (("weighted", 2, [1.0, -2.0]), "-2.0"),
        (("weighted", 2, [1.0, float("nan")]), "nan"),
        (("weighted", 2, [0.0, 0.0]), "all weights are 0"),
        (("exponential", 2, [], 1.0), "--decay 1.0"),
        (("exponential", 2, [], float("nan")), "--decay nan"),
        (("unifrom", 2), "unknown method 'unifrom'"),
    ],
)
def test_wrong_options(arguments: tuple[Any, ...], message: str) -> None:
    """Behaviour: usage errors that name the value, with a hint."""
    with pytest.raises(UsageError) as error:
        shares(*arguments)
    assert message in error.value.message and error.value.hint
