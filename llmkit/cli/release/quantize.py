"""`llmkit quantize`: store the weights of a model in 8 or 4 bits."""

from __future__ import annotations

from typing import Annotated

import typer

from llmkit.cli.shared.options import ModelPath, Run, command
from llmkit.cli.shared.training_command import refuse_own_inputs
from llmkit.errors import UsageError, unknown_name
from llmkit.quantization.methods import METHODS


@command(
    examples=(
        "llmkit quantize run/ --to int8 -o run-int8/",
        "llmkit quantize run/ --to int4 --group-size 32 -o run-int4/",
    ),
)
def main(
    run: Run,
    model: ModelPath,
    to: Annotated[
        str,
        typer.Option("--to", metavar="METHOD", help="; ".join(f"{name}: {row.help}" for name, row in METHODS.items())),
    ] = "int8",
    group_size: Annotated[
        int | None,
        typer.Option(
            "--group-size",
            metavar="N",
            min=1,
            help="Weights per scale, for methods with groups (default: 128, or less where 128 does not divide the row)",
        ),
    ] = None,
) -> None:
    """Store the weights of a model's layers in 8 or 4 bits, as a compressed-tensors directory for transformers, vLLM
    and llmkit.

    Embeddings, norms, the output layer and activations are not quantised. No calibration data is needed. Use
    `llmkit eval` to measure the loss in quality. Only llmkit can load a quantised gpt2: transformers
    has no quantised form of its layers.
    """
    if to not in METHODS:
        raise unknown_name("method", to, METHODS)
    if group_size is not None and METHODS[to].group is None:
        grouped = " or ".join(name for name, row in METHODS.items() if row.group)
        raise UsageError(f"--group-size applies only to --to {grouped}; {to} has one scale per row", "omit it")
    if run.output is None:
        raise UsageError("no output", "name the directory of the quantised model with -o")
    from llmkit.lineage.formats import describe_input
    from llmkit.lineage.outputs import artefact_directory
    from llmkit.model.pretrained.checkpoint import load_info
    from llmkit.quantization.formats import compressed_tensors

    refuse_own_inputs(run, [model])
    info = load_info(model)
    if run.up_to_date([str(info.path)]):
        return
    method = compressed_tensors.fit_model(info, METHODS[to], group_size)
    if info.config.family.transposed(info.config):
        kind = info.config.architecture
        run.warn(f"transformers cannot load a quantised {kind}: it has no quantised form of its layers")
    if run.dry_run:
        run.note(f"would store {info.config.parameters():,} weights with {method}")
        return
    lineage = run.lineage()
    lineage.inputs.append(describe_input(info.path, name=model))
    lineage.counts = {"parameters": info.config.parameters(), "group_size": method.group}
    with (
        artefact_directory(run.output, run.force) as partial,
        run.progress(info.config.parameters(), "weights") as bar,
    ):
        report = compressed_tensors.write_quantized(info, method, partial, lineage.to_json(), bar.advance)
    run.finish(
        {
            "matrices": report.matrices,
            "weights": report.weights,
            "group_size": method.group,
            "bytes_before": report.bytes_before,
            "bytes_after": report.bytes_after,
            "relative_error": round(report.error, 6),
        },
        f"{report.matrices} matrices in {method}: {report.bytes_before / 1e6:,.2f} MB became"
        f" {report.bytes_after / 1e6:,.2f} MB,"
        f" relative error {100 * report.error:.2f} %: {run.output}",
    )
