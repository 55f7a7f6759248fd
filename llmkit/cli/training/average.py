"""`llmkit average`: one model of several, by averaging or merging their weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmkit.cli.shared.options import Run, command
from llmkit.cli.shared.training_options import refuse_own_inputs
from llmkit.errors import LlmkitError, UsageError

if TYPE_CHECKING:
    from llmkit.model.pretrained.directory import LoadedModel

# fmt: off
# Options of some methods alone, by parameter.
OF_METHODS = {
    "weights": ("weighted", "task", "ties", "dare", "dare-ties"), "decay": ("ema",), "t": ("slerp",), "density": ("ties", "dare", "dare-ties"),
    "scale": ("task", "ties", "dare", "dare-ties"), "base": ("task", "ties", "dare", "dare-ties"), "heldout": ("greedy",),
}
# fmt: on
LONGEST = 2048  # tokens in a sequence of the held-out shards: a model may claim a context of a million
PENDING = "xxh3:" + "0" * 32  # as long as any digest


@command(
    examples=(
        "llmkit average run/ --last 3 -o averaged/",
        "llmkit average sft/ chat/ --method ties --base base/ --density 0.3 -o merged/",
        "llmkit average base/ sft/ chat/ --method greedy --heldout heldout.jsonl -o soup/",
    ),
    neutral=("base", "heldout"),  # they are inputs
)
def main(
    run: Run,
    models: Annotated[list[str], typer.Argument(metavar="MODEL", help="Model directories or runs, in order")],
    method: Annotated[
        str,
        typer.Option(
            "--method", metavar="NAME", help="uniform, weighted, ema, slerp, task, ties, dare, dare-ties, or greedy"
        ),
    ] = "uniform",
    last: Annotated[
        int | None, typer.Option("--last", metavar="K", min=1, help="The last K checkpoints of each run")
    ] = None,
    weights: Annotated[
        str | None, typer.Option("--weights", metavar="LIST", help="One a model: 1,1,2 (weighted, task, ties, dare)")
    ] = None,
    decay: Annotated[
        float | None, typer.Option("--decay", help="What each step keeps of the mean so far; by default 0.9 (ema)")
    ] = None,
    t: Annotated[
        float | None, typer.Option("--t", help="Way from the first model, 0, to the second, 1; by default 0.5 (slerp)")
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", metavar="MODEL", help="What the models were trained from (task, ties, dare)")
    ] = None,
    density: Annotated[
        str | None,
        typer.Option(
            "--density", metavar="LIST", help="Share of the changes that stays; by default 0.2 (ties), 0.5 (dare)"
        ),
    ] = None,
    scale: Annotated[
        float | None, typer.Option("--scale", help="Factor of all changes; by default 1 (task, ties, dare)")
    ] = None,
    heldout: Annotated[
        list[str] | None, typer.Option("--heldout", metavar="PATH", help="Token shards or documents (greedy)")
    ] = None,
) -> None:
    """Average the weights of models of one architecture and size, or with --last those of the last checkpoints of a run.

    ema starts with the first model and moves by 1 - DECAY towards each of the others; slerp goes along the arc between two. task adds to the
    base what each model changed, times its weight; ties adds only the largest of these changes, where most agree in sign; dare a random share
    of them (--seed), made larger in proportion; dare-ties both. greedy takes the models from the best to the worst on --heldout, and each into
    the uniform average if that does not get worse.

    Computed in float32 with a few MB of memory; stored in the first model's type, with its configuration and tokenizer. Whether the result is
    better than its parts, `llmkit eval` says.
    """
    method = {"exponential": "ema"}.get(method, method)
    given = {
        "weights": weights,
        "decay": decay,
        "t": t,
        "density": density,
        "scale": scale,
        "base": base,
        "heldout": heldout,
    }
    for name, methods in OF_METHODS.items():
        if given[name] is not None and given[name] != [] and method not in methods:
            raise UsageError(f"--{name} is of --method {' or '.join(methods)}", f"add --method {methods[0]}")
    if run.output is None:
        raise UsageError("no output", "name the directory of the averaged model with -o")
    from llmkit.io.record import Input, base_name
    from llmkit.lineage.formats import digest_path, read_lineage
    from llmkit.lineage.outputs import artefact_directory
    from llmkit.merging import average
    from llmkit.model.pretrained.directory import load_info, resolve_model

    groups = [_checkpoints(model, last) for model in models]
    places = [place for group in groups for place in group]
    if len(places) < 2 and method not in average.WITH_BASE:
        raise UsageError("one model is no average", "name several, or the last checkpoints of a run with --last K")
    merge = average.choose(
        method, len(places), _numbers("weights", weights), decay, t, _numbers("density", density), scale, run.seed
    )
    for name, value in (("base", base), ("heldout", heldout)):
        if not value and method in OF_METHODS[name]:
            raise UsageError(f"--method {method} needs --{name}", "see --help")
    run.options["method"] = method
    if last is not None:  # which checkpoints a run keeps is not part of its own record
        run.options["steps"] = [int(place.name.removeprefix("step-")) for place in places]
    # Role, name and place of each input. The digest of a run is that of its last checkpoint.
    named = [("base", base, resolve_model(base))] if base else []
    named += [("input", model, group[-1]) for model, group in zip(models, groups, strict=True)]
    named += [("heldout", path, Path(path)) for path in heldout or []]
    for path in heldout or []:
        if not Path(path).exists():
            raise LlmkitError(f"{path}: no such file or directory", "name shards or documents, without wildcards")
    refuse_own_inputs(run, [name for _, name, _ in named])
    if run.up_to_date([str(place) for _, _, place in named]):
        return
    infos, base_info = [load_info(place) for place in places], load_info(base) if base else None
    with average.Opened(infos, base_info, digesting=False):
        pass  # what does not fit is found before any work
    for info in [*infos, *([base_info] if base_info else [])]:
        if info.quantization is not None:
            run.warn(f"{info.path} is quantised: the average takes its rounded weights, and is not quantised itself")
    score = _scorer(run, infos[0], heldout) if heldout else None
    parameters = infos[0].config.parameters()
    if run.dry_run:
        run.note(f"would average {len(places)} models of {parameters:,} weights")
        return
    lineage = run.lineage()
    lineage.counts = {"models": len(places), "parameters": parameters}
    if score is not None:
        infos = [
            infos[i]
            for i in _soup(
                run, infos, [place.name for place in places] if last else [base_name(model) for model in models], score
            )
        ]
        merge = average.choose("uniform", len(infos))
        lineage.counts |= {"kept": len(infos)}

    def record(digests: average.Digests | None) -> str:
        lineage.inputs = [
            Input(
                role,
                base_name(name),
                PENDING if digests is None else digest_path(place, digests),
                read_lineage(place),
            )
            for role, name, place in named
        ]
        return lineage.to_json()

    with artefact_directory(run.output, run.force) as partial, run.progress(parameters, "weights") as bar:
        average.write_average(infos, merge, partial, record, bar.advance, base_info)
    names = ", ".join(place.name for place in places) if last else f"{len(places)} models"
    kept = f"{len(infos)} of " if score is not None else ""
    run.finish(lineage.counts, f"average of {kept}{names}: {run.output}")


def _checkpoints(model: str, last: int | None) -> list[Path]:
    """The directories that `model` stands for: itself, or with `last` that many checkpoints of the run, oldest first."""
    if last is None:
        from llmkit.model.pretrained.directory import resolve_model

        return [resolve_model(model)]
    from llmkit.training.checkpoint.run_directory import find_checkpoints

    found = find_checkpoints(model)
    if not found:
        raise LlmkitError(f"{model}: no checkpoints", "--last takes a run; give model directories without it")
    if len(found) < last:
        raise LlmkitError(
            f"{model}: {len(found)} checkpoints, not {last}", "train with --save-every and --keep to have more"
        )
    return found[-last:]


def _numbers(name: str, text: str | None) -> list[float]:
    try:
        return [float(part) for part in text.split(",")] if text is not None else []
    except ValueError:
        raise UsageError(f"--{name} {text!r} is not a list of numbers", "such as 1,1,2") from None


def _scorer(run: Run, info: LoadedModel, heldout: list[str]) -> Callable[[list[LoadedModel]], float]:
    """A function that gives the held-out loss of the uniform average of some models, in nats a token, on token shards or on documents."""
    import torch

    from llmkit.cli.shared.training_options import held_out
    from llmkit.merging.greedy_soup import averaged_decoder, heldout_loss
    from llmkit.shards.tokenizer_info import parse_tokenizer

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    digest = parse_tokenizer(info.tokenizer_files, str(info.path)).digest
    shards = [Path(path).suffix == ".arrow" or any(Path(path).glob("*.arrow")) for path in heldout]
    if all(shards):
        source = held_out(heldout, digest, min(info.config.max_position_embeddings, LONGEST), True)
        assert source is not None
        return lambda models: heldout_loss(averaged_decoder(models, device), source)
    if any(shards):
        raise UsageError("--heldout names shards and documents", "give one kind")
    from llmkit.evaluation.harness import end_of_text_id
    from llmkit.evaluation.perplexity import perplexity
    from llmkit.io.documents import DocumentReader
    from llmkit.model.pretrained.checkpoint import load_tokenizer

    codec = load_tokenizer(info.tokenizer_files, info.path)
    codec.encode_special_tokens = True  # text is text
    paths = run.inputs(heldout, files_from=None)

    def encode(text: str) -> list[int]:
        return list(codec.encode(text, add_special_tokens=False).ids)

    def loss(models: list[LoadedModel]) -> float:
        with DocumentReader(paths) as reader:
            texts = (document.text for document in reader.documents())
            found = perplexity(averaged_decoder(models, device), encode, texts, end_of_text_id(info))
        return float(found.figures()["nats_per_token"])

    return loss


def _soup(
    run: Run, infos: list[LoadedModel], names: list[str], score: Callable[[list[LoadedModel]], float]
) -> list[int]:
    """The models that the greedy soup keeps, in the order in which they joined; shows the decisions."""
    from llmkit.merging.greedy_soup import greedy_soup

    with run.progress(2 * len(infos) - 1, "evaluations") as bar:

        def loss(chosen: list[int]) -> float:
            found = score([infos[i] for i in chosen])
            bar.advance(1)
            return found

        decisions = greedy_soup(len(infos), loss)
    rows = [[names[d.index], f"{d.loss:.4f}", f"{d.together:.4f}", "yes" if d.kept else "no"] for d in decisions]
    run.table("Greedy soup, held-out loss in nats a token", ["model", "alone", "with those before", "kept"], rows)
    return [decision.index for decision in decisions if decision.kept]
