"""`llmkit average`: merge several models into one, by averaging or another method."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from llmkit.cli.shared.options import Run, command
from llmkit.cli.shared.training_command import refuse_own_inputs
from llmkit.errors import LlmkitError, UsageError
from llmkit.merging import methods

if TYPE_CHECKING:
    from llmkit.model.decoder import Decoder
    from llmkit.model.pretrained.directory import LoadedModel


def _help(option: str, text: str, default: str = "") -> str:
    """The help of an option, preceded by the methods that take it."""
    return f"{', '.join(methods.methods_with(option))}: {text}" + (f" (default: {default})" if default else "")


@command(
    examples=(
        "llmkit average run/ --last 3 -o averaged/",
        "llmkit average sft/ chat/ --method ties --base base/ --density 0.3 -o merged/",
        "llmkit average base/ sft/ chat/ --method greedy --heldout heldout.jsonl -o soup/",
        "llmkit average adapter/ --merge-adapter -o whole/",
    ),
    neutral=("base", "heldout"),  # recorded as inputs
)
def main(
    run: Run,
    models: Annotated[list[str], typer.Argument(metavar="MODEL", help="Model directories or runs")],
    method: Annotated[
        str,
        typer.Option(
            "--method",
            metavar="NAME",
            help=". ".join(f"{name}: {entry.help}" for name, entry in methods.METHODS.items()),
        ),
    ] = "uniform",
    last: Annotated[
        int | None, typer.Option("--last", metavar="K", min=1, help="Average the last K checkpoints of each run")
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option("--weights", metavar="LIST", help=_help("weights", "one weight per model, such as 1,1,2")),
    ] = None,
    decay: Annotated[
        float | None,
        typer.Option("--decay", help=_help("decay", "weight of the average so far at each step", "0.9")),
    ] = None,
    t: Annotated[
        float | None,
        typer.Option("--t", help=_help("t", "position on the arc, from 0 (the first model) to 1 (the second)", "0.5")),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="MODEL", help=_help("base", "model from which the others were trained")),
    ] = None,
    density: Annotated[
        str | None,
        typer.Option(
            "--density",
            metavar="LIST",
            help=_help("density", "fraction of the changes to keep, or one fraction per model"),
        ),
    ] = None,
    scale: Annotated[
        float | None, typer.Option("--scale", help=_help("scale", "factor of the sum of the changes", "1"))
    ] = None,
    heldout: Annotated[
        list[str] | None,
        typer.Option("--heldout", metavar="PATH", help=_help("heldout", "held-out token shards or documents")),
    ] = None,
    merge_adapter: Annotated[
        bool,
        typer.Option(
            "--merge-adapter",
            help="Merge one directory of LoRA adapters, PEFT's or of a run with --lora, into its model"
            " (default: the one that it names; or --base)",
        ),
    ] = False,
) -> None:
    """Merge the weights of models of the same architecture and size, or with --last the last checkpoints of a run.

    Methods that take --base merge task vectors: the differences between each model and the model from which it was
    trained. The merge is computed in float32 with a few MB of memory, and stored in the first model's data type with
    its configuration and tokenizer. Use `llmkit eval` to compare the result with its inputs.
    """
    if run.output is None:
        raise UsageError("no output", "name the directory of the merged model with -o")
    if merge_adapter:
        given: dict[str, object] = {
            "last": last,
            "weights": weights,
            "decay": decay,
            "t": t,
            "density": density,
            "scale": scale,
        }
        given |= {"heldout": heldout, "method": None if method == "uniform" else method}
        if wrong := [name for name, value in given.items() if value is not None] or len(models) != 1:
            option = f"--{wrong[0]}" if isinstance(wrong, list) else "several models"
            raise UsageError(f"--merge-adapter does not take {option}", "merge adapters one by one, then average")
        _merge_adapter(run, models[0], base)
        return
    run.options.pop("merge_adapter")
    method = methods.ALIASES.get(method, method)
    method_options = {
        "weights": weights,
        "decay": decay,
        "t": t,
        "density": density,
        "scale": scale,
        "base": base,
        "heldout": heldout,
    }
    methods.check_options(method, method_options)
    from llmkit.io.record import base_name
    from llmkit.io.sealed_file import PENDING
    from llmkit.lineage.formats import describe_input, digest_path
    from llmkit.lineage.outputs import artefact_directory
    from llmkit.merging.average import Digests, write_average
    from llmkit.merging.plan import plan_merge
    from llmkit.merging.streams import ModelSet
    from llmkit.model.pretrained.directory import load_info

    numbers = methods.Numbers(_numbers("weights", weights), decay, t, _numbers("density", density), scale, run.seed)
    plan = plan_merge(models, method, numbers, last=last, base=base, heldout=heldout or [])
    run.options["method"] = method
    if plan.steps is not None:  # the record of a run does not tell which checkpoints it keeps
        run.options["steps"] = plan.steps
    refuse_own_inputs(run, [name for _, name, _ in plan.inputs])
    if run.up_to_date([str(path) for _, _, path in plan.inputs]):
        return
    infos, base_info = [load_info(path) for path in plan.paths], load_info(base) if base else None
    with ModelSet(infos, base_info, digesting=False):
        pass  # reports mismatching tensors before any work is done
    for info in [*infos, *([base_info] if base_info else [])]:
        if info.quantization is not None:
            run.warn(f"{info.path} is quantised: its rounded weights are used; the result is not quantised")
    evaluate = _evaluation(run, infos[0], heldout) if heldout else None
    parameters = infos[0].config.parameters()
    if run.dry_run:
        run.note(f"would average {len(infos)} models of {parameters:,} weights")
        return
    lineage = run.lineage()
    lineage.counts = {"models": len(infos), "parameters": parameters}
    merge, selection = plan.merge, ""
    if evaluate is not None:
        names = [path.name for path in plan.paths] if last else [base_name(model) for model in models]
        infos = [infos[i] for i in _soup(run, infos, names, evaluate)]
        merge = methods.resolve_merge(method, len(infos))
        lineage.counts |= {"kept": len(infos)}
        selection = f"{len(infos)} of "

    def record(digests: Digests | None) -> str:
        lineage.inputs = [
            describe_input(path, role, PENDING if digests is None else digest_path(path, digests), name)
            for role, name, path in plan.inputs
        ]
        return lineage.to_json()

    with artefact_directory(run.output, run.force) as partial, run.progress(parameters, "weights") as bar:
        write_average(infos, merge, partial, record, bar.advance, base_info)
    model_names = ", ".join(path.name for path in plan.paths) if last else f"{len(plan.paths)} models"
    run.finish(lineage.counts, f"average of {selection}{model_names}: {run.output}")


def _merge_adapter(run: Run, adapter: str, base: str | None) -> None:
    """Write the model of a directory of adapters with these merged."""
    from llmkit.io.record import base_name
    from llmkit.lineage.formats import describe_input
    from llmkit.lineage.outputs import artefact_directory
    from llmkit.merging.average import write_average
    from llmkit.model.pretrained.checkpoint import load_tokenizer
    from llmkit.model.pretrained.directory import load_info

    info = load_info(adapter, base, any_base=True)
    if info.adapter is None:
        raise UsageError(
            f"{adapter} holds no adapters", "give a directory with adapter_config.json, or a run of --lora"
        )
    model = info.adapter.base
    if "tokenizer.json" in info.tokenizer_files:
        ids = load_tokenizer(info.tokenizer_files, str(info.path)).get_vocab(with_added_tokens=True).values()
        if max(ids, default=0) >= info.config.vocab_size:
            what = f"its tokenizer has token id {max(ids):,}, the merged model {info.config.vocab_size:,} rows"
            raise LlmkitError(f"{info.path}: {what}", "adapters and tokenizer belong to different models")
    refuse_own_inputs(run, [adapter, str(model.path)])
    run.options.pop("method")
    if run.up_to_date([str(info.path), str(model.path)]):
        return
    run.note(f"merging into {base or model.path}")
    if model.quantization is not None:
        run.warn(f"{model.path} is quantised: its rounded weights are used; the result is not quantised")
    parameters = info.config.parameters()
    if run.dry_run:
        run.note(f"would merge {len(list(info.adapter.config.modules(info.config)))} adapters")
        return
    lineage = run.lineage()
    lineage.counts = {"adapters": len(list(info.adapter.config.modules(info.config))), "parameters": parameters}
    name = base or info.adapter.config.base or base_name(model.path)
    lineage.inputs = [describe_input(model.path, "base", name=name), describe_input(info.path, name=adapter)]
    record = lineage.to_json()
    with artefact_directory(str(run.output), run.force) as partial, run.progress(parameters, "weights") as bar:
        write_average([info], methods.resolve_merge("uniform", 1), partial, lambda _: record, bar.advance)
    run.finish(lineage.counts, f"{lineage.counts['adapters']} adapters merged: {run.output}")


def _numbers(name: str, text: str | None) -> list[float]:
    try:
        return [float(part) for part in text.split(",")] if text is not None else []
    except ValueError:
        raise UsageError(f"--{name} {text!r} is not a list of numbers", "expected a list such as 1,1,2") from None


def _evaluation(run: Run, info: LoadedModel, heldout: list[str]) -> Callable[[Decoder], float]:
    """A function from a model to its held-out loss in nats per token, on token shards or documents."""
    from llmkit.merging.greedy_soup import MAX_SEQUENCE, are_shards, heldout_loss
    from llmkit.shards.tokenizer_info import parse_tokenizer
    from llmkit.training.inputs import held_out_source

    digest = parse_tokenizer(info.tokenizer_files, str(info.path)).digest
    if are_shards(heldout):
        source = held_out_source(heldout, digest, min(info.config.max_position_embeddings, MAX_SEQUENCE), True)
        assert source is not None
        return lambda model: heldout_loss(model, source)
    from llmkit.evaluation.harness import end_of_text_id
    from llmkit.evaluation.perplexity import perplexity
    from llmkit.io.documents import DocumentReader
    from llmkit.model.pretrained.checkpoint import load_tokenizer

    codec = load_tokenizer(info.tokenizer_files, info.path)
    codec.encode_special_tokens = True  # special tokens in documents are plain text
    paths = run.inputs(heldout, files_from=None)

    def encode(text: str) -> list[int]:
        return list(codec.encode(text, add_special_tokens=False).ids)

    def loss(model: Decoder) -> float:
        with DocumentReader(paths) as reader:
            texts = (document.text for document in reader.documents())
            figures = perplexity(model, encode, texts, end_of_text_id(info)).figures()
        return float(figures["nats_per_token"])

    return loss


def _soup(run: Run, infos: list[LoadedModel], names: list[str], evaluate: Callable[[Decoder], float]) -> list[int]:
    """The indices of the models in the greedy soup, in the order in which they were added; shows the decisions."""
    from llmkit.merging.greedy_soup import average_loss, greedy_soup

    with run.progress(2 * len(infos) - 1, "evaluations") as bar:

        def loss(selected: list[int]) -> float:
            result = average_loss([infos[i] for i in selected], evaluate)
            bar.advance(1)
            return result

        decisions = greedy_soup(len(infos), loss)
    rows = [[names[d.index], f"{d.loss:.4f}", f"{d.average_loss:.4f}", "yes" if d.kept else "no"] for d in decisions]
    run.table("Greedy soup, held-out loss in nats per token", ["model", "alone", "average", "kept"], rows)
    return [decision.index for decision in decisions if decision.kept]
