"""Recipes: published schedules at published tokens, scaling, and refused files."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from llmkit.errors import LlmkitError, UsageError
from llmkit.training.optim.recipe import Recipe, RecipeStage, builtin_recipes, read_recipe
from llmkit.training.optim.schedule import Schedule


def published(name: str) -> tuple[Recipe, list[int], Schedule]:
    """A recipe of the package at its own token count."""
    recipe = read_recipe(name)
    total = sum(stage.tokens or 0 for stage in recipe.stages)
    borders = recipe.stage_ends(total, [total])
    schedule = recipe.schedule(borders, None)
    assert schedule is not None
    return recipe, borders, schedule


def test_amber() -> None:
    """Parity with amber-train's constants: 3e-4 after 2,000 steps of 2,240 × 2,048 tokens, half a cosine,
    3e-5 after 1.26T tokens."""
    recipe, borders, schedule = published("amber")
    batch = recipe.defaults["batch_size"] * recipe.defaults["sequence_length"]
    assert batch == 4_587_520 and borders[-1] == pytest.approx(1.26e12, rel=2e-3)
    assert schedule.rate(0) == 0.0
    assert schedule.rate(1000 * batch) == pytest.approx(1.5e-4)
    assert schedule.rate(2000 * batch) == schedule.peak == 3e-4
    middle = 2000 * batch + (borders[-1] - 2000 * batch) // 2
    assert schedule.rate(middle) == pytest.approx((3e-4 + 3e-5) / 2)
    assert schedule.rate(borders[-1]) == pytest.approx(3e-5)


def test_crystal() -> None:
    """Parity with the three params.yaml of crystalcoder-train: peaks, warm-ups of 86, 86 and 276 steps, and
    the ends of the phases."""
    recipe, borders, schedule = published("crystal")
    batch = recipe.defaults["batch_size"] * recipe.defaults["sequence_length"]
    steps = [0, 79_721, 79_721 + 214_387, 79_721 + 214_387 + 27_728]
    assert [border / batch for border in borders] == pytest.approx(steps[1:])
    for first, warmup, peak in zip(steps, (86, 86, 276), (12e-3, 8.7825e-3, 2e-3), strict=False):
        assert schedule.rate((first + warmup / 2) * batch) == pytest.approx(peak / 2)
        assert schedule.rate((first + warmup) * batch) == pytest.approx(peak)
    # The first decay was planned over 294,337 steps and left after 79,635 of them, where the second continues it.
    line = schedule.segments[1]
    assert (line.end - line.start) / batch == pytest.approx(294_337) and line.last == 1.2408e-4
    left = 12e-3 + (1.2408e-4 - 12e-3) * 79_635 / 294_337
    assert schedule.rate(borders[0] - 1) == pytest.approx(left) and left == pytest.approx(8.7825e-3, rel=1e-3)
    assert schedule.rate(borders[1] - 1) == pytest.approx(1.3679e-4)
    assert schedule.rate(borders[2]) == pytest.approx(2e-4)


def test_olmo() -> None:
    """Behaviour: 3e-4 after the 10,485,760,000 tokens of its configuration, a cosine to 5e-5, and a linear
    decay to 0 over the last 50B."""
    _, borders, schedule = published("olmo")
    assert borders == [2_700_000_000_000, 2_750_000_000_000]
    assert schedule.rate(10_485_760_000) == schedule.peak == 3e-4
    assert schedule.rate(borders[0] - 1) == pytest.approx(5e-5)
    assert schedule.rate(borders[1] - 25_000_000_000) == pytest.approx(2.5e-5)
    assert schedule.rate(borders[1]) == 0.0


@pytest.mark.parametrize("name", builtin_recipes())
def test_scaled_to_any_length(name: str) -> None:
    """Property: at the same share of its tokens a scaled run has the learning rate of the published one.

    `lr` scales all of it.
    """
    recipe, borders, schedule = published(name)
    small = recipe.stage_ends(10_000_000, [10_000_000])
    scaled, stretched = recipe.schedule(small, None), recipe.schedule(small, 1e-3)
    assert scaled and stretched and stretched.peak == pytest.approx(1e-3)
    for share in (0.002, 0.1, 0.2, 0.6, 0.9, 0.99):
        rate = schedule.rate(share * borders[-1])
        assert scaled.rate(share * 10_000_000) == pytest.approx(rate, rel=1e-3)
        assert stretched.rate(share * 10_000_000) == pytest.approx(rate * 1e-3 / schedule.peak, rel=1e-3)
    batch = recipe.scaled_batch_size(borders[-1])
    assert batch == recipe.defaults["batch_size"] == recipe.scaled_batch_size(2 * borders[-1])
    shrunk = recipe.scaled_batch_size(10_000_000)
    assert shrunk and 10_000_000 / (shrunk * recipe.defaults["sequence_length"]) > 50  # steps


def test_stages_of_the_data_set_the_ends() -> None:
    """Behaviour: stage ends of a mix, values that apply until a stage sets another, a learning rate that
    stays if a stage sets none."""
    recipe = Recipe(
        "r",
        (
            RecipeStage("a", lr=1.0, schedule="linear", final_lr=0.5),
            RecipeStage("b", sequence_length=64),
            RecipeStage("c", rope_theta=9.0),
        ),
    )
    assert recipe.stage_ends(60, [10, 30, 60]) == [10, 30, 60]
    schedule = recipe.schedule([10, 30, 60], None)
    assert schedule and [schedule.rate(t) for t in (5, 10, 29, 60)] == [0.75, 0.5, 0.5, 0.5]
    assert recipe.sequence_lengths([10, 30, 60], 32) == [(32, 10), (64, 30), (64, 60)]
    thetas = recipe.rope_thetas([10, 30, 60], 4.0)
    assert thetas and [thetas.at(t) for t in (0, 29, 30, 99)] == [4.0, 4.0, 9.0, 9.0]
    with pytest.raises(UsageError, match="stages of the data total 60"):
        recipe.stage_ends(50, [10, 30, 60])
    with pytest.raises(UsageError, match="has 3 stages, the data 2"):
        recipe.stage_ends(60, [10, 60])
    with pytest.raises(UsageError, match="a has no tokens"):
        recipe.stage_ends(60, [60])
    assert Recipe("r", (RecipeStage("a", sequence_length=64),)).schedule([10], None) is None


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("[[stage]]\nlr = 1e-3\nshedule = 'cosine'", "stage 1: unknown key 'shedule'", "'schedule'"),
        ("batchsize = 3\n[[stage]]\nlr = 1e-3", "unknown key 'batchsize'", "'batch_size'"),
        ("[[stage]]\nlr = 1e-3\nschedule = 'cosin'", "unknown schedule 'cosin'", "'cosine'"),
        ("[[stage]]\nlr = 1e-3\nschedule = ['cosine']", "unknown schedule", ""),
        ("[[stage]]\nlr = 100.0", "lr 100.0 is not a number from 1e-12 to 10", ""),
        ("[[stage]]\nlr = -1", "lr -1", ""),
        ("[[stage]]\nlr = nan", "lr nan", ""),
        ("[[stage]]\nlr = true", "lr True", ""),
        ("[[stage]]\nlr = '1e-3'", "lr '1e-3'", ""),
        ("[[stage]]\nlr = 1e-3\ntokens = '2X'", "tokens '2X' is not an integer", ""),
        ("[[stage]]\nlr = 1e-3\ntokens = '0.5'", "tokens '0.5' is not an integer", ""),
        ("[[stage]]\nlr = 1e-3\nfinal_lr = 2e-3", "final_lr 0.002 is above lr 0.001", ""),
        ("[[stage]]\nlr = 1e-3\ntokens = 10\nhorizon = 5", "horizon is not beyond", ""),
        ("[[stage]]\nwarmup = 10", "a schedule without lr", ""),
        ("[[stage]]\n[[stage]]\nlr = 1e-3", "stage 1 has no lr", ""),
        ("[[stage]]\nsequence_length = 4", "sequence_length 4", ""),
        ("[[stage]]\nsequence_length = 64.5", "sequence_length 64.5", ""),
        ("[[stage]]\nrope_theta = 0", "rope_theta 0", ""),
        ("[[stage]]\nname = 3", "stage 1: name must be a string", ""),
        ("betas = [0.9, 1.0]\n[[stage]]", "betas [0.9, 1.0]", ""),
        ("betas = 0.9\n[[stage]]", "betas 0.9", ""),
        (f"[[stage]]\nlr = 0x{'f' * 5000}", "lr so large a number", ""),
        (f"betas = [0x{'f' * 5000}, 1]\n[[stage]]", "betas so large a number", ""),
        ("stage = 3", "no [[stage]]", ""),
        ("batch_size = 0\n[[stage]]", "batch_size 0", ""),
        ("lr =", "invalid TOML", ""),
    ],
)
def test_refused(tmp_path: Path, text: str, message: str, hint: str) -> None:
    """Behaviour: errors name file, stage and key, with a suggestion."""
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        read_recipe(str(path))
    assert message in caught.value.message and "mine.toml" in caught.value.message and hint in caught.value.hint


def test_unknown_recipes() -> None:
    """Behaviour: a suggestion for an unknown name; a missing file; a warm-up that does not fit."""
    with pytest.raises(UsageError) as caught:
        read_recipe("ambr")
    assert "'amber'" in caught.value.hint
    with pytest.raises(LlmkitError, match="No such file"):
        read_recipe("none/such.toml")
    with pytest.raises(UsageError, match="a warm-up of 20 tokens does not fit into 10"):
        Recipe("r", (RecipeStage("a", lr=1.0, warmup=20),)).schedule([10], None)
    assert math.isclose(read_recipe("olmo").stages[0].lr or 0, 3e-4)
