"""What `train` makes of a recipe, of stages, warm-ups and a start: rates, sizes and defaults of a run. Not a command."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmkit.cli.shared.options import Run, parse_count, parse_share
from llmkit.cli.shared.training_options import OPTIMISER, STEPS, groups
from llmkit.errors import UsageError

if TYPE_CHECKING:
    from llmkit.model.config import ModelConfig
    from llmkit.training.data import StreamSource
    from llmkit.training.optim.schedule import Schedule
    from llmkit.training.recipe import Recipe, RopeThetas

# fmt: off
RecipeName = Annotated[str | None, typer.Option("--recipe", metavar="NAME", help="amber, crystal, olmo, or a TOML of stages: rates, sizes and defaults", rich_help_panel=OPTIMISER)]
BatchSize = Annotated[int | None, typer.Option("--batch-size", "-b", min=1, help="Sequences a step, over all processes; by default 8, or as the recipe says", rich_help_panel=STEPS)]
BatchWarmup = Annotated[str | None, typer.Option("--batch-warmup", metavar="SIZES", help="Smaller batches first: 8:1M,16:4M is 8 until 1M tokens, 16 until 4M", rich_help_panel=STEPS)]
LengthWarmup = Annotated[str | None, typer.Option("--length-warmup", metavar="SIZES", help="Shorter sequences first, as many more of them a step: 512:1M,1024:4M", rich_help_panel=STEPS)]
ScheduleName = Annotated[str | None, typer.Option("--schedule", metavar="NAME", help="cosine (the default), linear, sqrt, wsd (warm-up, stable, decay) or constant", rich_help_panel=OPTIMISER)]
Warmup = Annotated[float | None, typer.Option("--warmup", parser=parse_share, metavar="TOKENS", help="Tokens over which the rate rises; below 1 a share of all; by default 0.05", rich_help_panel=OPTIMISER)]
Floor = Annotated[float | None, typer.Option("--min-lr", help="Last learning rate, relative to the highest; by default 0.1", rich_help_panel=OPTIMISER)]
Decay = Annotated[float | None, typer.Option("--decay", help="Share of all tokens over which wsd decays; by default 0.2", rich_help_panel=OPTIMISER)]
DecayShape = Annotated[str | None, typer.Option("--decay-shape", metavar="NAME", help="How wsd decays: linear (the default), sqrt or cosine", rich_help_panel=OPTIMISER)]
WeightDecay = Annotated[float | None, typer.Option("--weight-decay", min=0, help="On matrices; never on embeddings, norms and biases; by default 0.1", rich_help_panel=OPTIMISER)]
Clip = Annotated[float | None, typer.Option("--clip", min=0, help="Largest gradient norm; 0 does not clip; by default 1", rich_help_panel=OPTIMISER)]
Betas = Annotated[str | None, typer.Option("--betas", metavar="A,B", help="Memory of Adam's two moments; by default 0.9,0.95", rich_help_panel=OPTIMISER)]
# fmt: on

# What holds where neither the command line nor a recipe says it.
DEFAULTS: dict[str, Any] = {"batch_size": 8, "weight_decay": 0.1, "clip": 1.0, "betas": "0.9,0.95"}
CURVE: dict[str, Any] = {
    "schedule": "cosine",
    "warmup": 0.05,
    "min_lr": 0.1,
    "decay": 0.2,
    "decay_shape": "linear",
}
# Going on at the rate of a checkpoint: it neither rises nor falls unless that is asked for.
CONTINUED = CURVE | {"schedule": "constant", "warmup": 0.0}


@dataclass(frozen=True, slots=True)
class Course:
    """A run as a function of its tokens: batches, rates, the model's configuration with its longest context, and the base of its rotary embedding."""

    source: StreamSource
    schedule: Schedule
    config: ModelConfig
    thetas: RopeThetas | None

    def theta(self, step: int) -> float:
        """Base of the rotary embedding in `step`."""
        return self.thetas.at(self.source.tokens(step)) if self.thetas else self.config.rope_theta


def resolve(run: Run, recipe: Recipe | None, given: dict[str, Any], curve: dict[str, Any]) -> dict[str, Any]:
    """Values of the options in DEFAULTS and CURVE: as `given`, else the recipe's, else by default (`curve`); noted for the lineage.

    Options of the curve that a recipe draws are left out, and may not be given.
    """
    drawn = recipe is not None and any(stage.lr is not None for stage in recipe.stages)
    named = [key for key in (*CURVE, "rewarm") if given.get(key) is not None and given[key] is not False]
    if drawn and named:
        raise UsageError(
            f"--{named[0].replace('_', '-')} together with --recipe", "the recipe draws the curve; --lr stretches it"
        )
    known = dict(recipe.defaults) if recipe else {}
    if "betas" in known:
        known["betas"] = ",".join(map(str, known["betas"]))
    found = (DEFAULTS if drawn else DEFAULTS | curve) | known
    found |= {key: value for key, value in given.items() if key in found and value is not None}
    run.options |= {key: value for key, value in found.items() if key not in ("batch_size", "sequence_length")}
    return found


def parse_betas(text: str) -> tuple[float, float]:
    """`0.9,0.95` as two numbers; UsageError where they are none."""
    try:
        first, second = map(float, text.split(","))
    except ValueError:
        first = second = -1.0
    if not (0 <= first < 1 and 0 <= second < 1):
        raise UsageError(f"--betas {text!r} are not two numbers from 0 up to 1", "such as 0.9,0.95")
    return first, second


def parse_sizes(text: str | None, option: str) -> list[tuple[int, int]]:
    """`8:1M,16:4M` as sizes with the token until which each holds; UsageError where it is another form."""
    found = []
    for part in text.split(",") if text else []:
        size, _, until = part.strip().partition(":")
        try:
            found.append((int(size), parse_count(until)))
        except (ValueError, typer.BadParameter):
            raise UsageError(f"{option}: {part!r} is no size with its tokens", "such as 8:1M,16:4M") from None
    if any(size < 1 for size, _ in found):
        raise UsageError(f"{option}: a size below 1", "such as 8:1M,16:4M")
    return found


def plan_course(
    stream: Any,
    data: str,
    config: ModelConfig,
    length: int,
    asked: dict[str, Any],
    *,
    total: int,
    recipe: Recipe | None,
    lr: float,
    stretch: float | None,
    first: float = 0.0,
    batch_warmup: str | None = None,
    length_warmup: str | None = None,
    document_mask: bool = True,
    fixed_context: bool = False,
) -> Course:
    """Put together what a run over `stream` does. `lr` is the peak of a curve by name, `stretch` that of a recipe's, `first` where a warm-up begins.

    With `fixed_context` the model has one that only a stage with a rope_theta may go beyond. UsageError where something does not fit.
    """
    from llmkit.training.batch_schedule import size_changes
    from llmkit.training.data import StreamSource
    from llmkit.training.optim.schedule import build_schedule, warmup_tokens

    borders = recipe.stage_ends(total, stream.stages) if recipe else [total]
    stages = recipe.sequence_lengths(borders, length) if recipe else []
    thetas = recipe.rope_thetas(borders, config.rope_theta) if recipe else None
    shorter = parse_sizes(length_warmup, "--length-warmup")
    longest = max([length, *(size for size, _ in stages)])
    if longest > stream.tokens:
        raise UsageError(
            f"sequences of {longest:,} tokens, but {data} holds {stream.tokens:,}", "give a shorter --sequence-length"
        )
    if stream.sequence_length and (shorter or any(size != length for size, _ in stages)):
        raise UsageError(f"{data} is packed for sequences of {length:,}, which would change", "mix with --pack concat")
    if fixed_context and longest > config.max_position_embeddings and not thetas:
        raise UsageError(
            f"sequences of {longest:,} tokens are beyond the model's context of {config.max_position_embeddings:,}",
            "a stage with another rope_theta may be longer",
        )
    batches = parse_sizes(batch_warmup, "--batch-warmup")
    sizes = size_changes(asked["batch_size"], length, total, batches=batches, lengths=shorter, stages=stages)
    source = StreamSource(
        stream, longest, asked["batch_size"], total,
        changes=sizes, document_mask=document_mask, vocabulary=config.vocab_size, groups=groups(stream),
    )  # fmt: skip
    schedule = recipe.schedule(borders, stretch) if recipe else None
    if schedule is None:
        planned = source.tokens(source.steps)
        schedule = build_schedule(
            asked["schedule"], lr, planned, warmup_tokens(asked["warmup"], planned),
            asked["min_lr"], asked["decay"], asked["decay_shape"], first=first,
        )  # fmt: skip
    kept = max(longest, config.max_position_embeddings) if fixed_context else longest
    return Course(source, schedule, dataclasses.replace(config, max_position_embeddings=kept), thetas)


def show_course(run: Run, course: Course, asked: dict[str, Any]) -> None:
    """The tables of --dry-run: rates by segment, sizes by phase, and the other values that came to hold."""
    rates = [
        [f"{s.start:,}", f"{s.end:,}", f"{s.first:.4g}", f"{s.last:.4g}", s.shape] for s in course.schedule.segments
    ]
    run.table("learning rate", ["from token", "to token", "first", "last", "shape"], rates)
    phases = [
        [f"{phase.step:,}", f"{phase.token:,}", phase.rows, phase.length, f"{course.theta(phase.step):g}"]
        for phase in course.source.phases
    ]
    run.table("steps", ["from step", "from token", "sequences", "of tokens", "rope theta"], phases)
    run.table("options", ["", ""], [[key.replace("_", "-"), str(value)] for key, value in sorted(asked.items())])
