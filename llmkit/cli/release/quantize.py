"""`llmkit quantize`: store the weights of a model in 8 or 4 bits."""

from __future__ import annotations

from typing import Annotated

import typer

from llmkit.cli.shared.options import ModelPath, Run, command
from llmkit.cli.shared.training_options import refuse_own_inputs
from llmkit.errors import UsageError, unknown_name


@command(
    examples=(
        "llmkit quantize run/ --to int8 -o run-int8/",
        "llmkit quantize run/ --to int4 --group-size 32 -o run-int4/",
    ),
)
def main(
    run: Run,
    model: ModelPath,
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help="int8 or int4")] = "int8",
    group_size: Annotated[
        int | None,
        typer.Option(
            "--group-size",
            metavar="N",
            min=1,
            help="int4: weights that share a scale; by default 128, or less where that does not divide",
        ),
    ] = None,
) -> None:
    """Store the weights of a model's layers in 8 or 4 bits, as a compressed-tensors directory that transformers, vLLM and llmkit load.

    int8 has one scale a row. int4 has one for each group of neighbours in a row, the best of sixteen by squared error. Embeddings, norms and the
    output layer stay as they are, and so do activations. No data is needed. `llmkit eval` says what was lost.
    """
    from llmkit.quantization.formats.compressed_tensors import SCHEMES

    if to not in SCHEMES:
        raise unknown_name("format", to, SCHEMES)
    if group_size is not None and SCHEMES[to].group is None:
        raise UsageError(f"--group-size is of --to int4, {to} has one scale a row", "leave it out")
    if run.output is None:
        raise UsageError("no output", "name the directory of the quantised model with -o")
    from llmkit.io.record import Input, base_name
    from llmkit.lineage.formats import digest_path, read_lineage
    from llmkit.lineage.outputs import artefact_directory
    from llmkit.model.pretrained.checkpoint import load_info
    from llmkit.quantization.formats import compressed_tensors

    refuse_own_inputs(run, [model])
    info = load_info(model)
    if run.up_to_date([str(info.path)]):
        return
    scheme = compressed_tensors.fit_scheme(info, SCHEMES[to], group_size)
    if run.dry_run:
        run.note(f"would store {info.config.parameters():,} weights with {scheme}")
        return
    lineage = run.lineage()
    lineage.inputs.append(Input("input", base_name(model), digest_path(info.path), read_lineage(info.path)))
    lineage.counts = {"parameters": info.config.parameters(), "group_size": scheme.group}
    with (
        artefact_directory(run.output, run.force) as partial,
        run.progress(info.config.parameters(), "weights") as bar,
    ):
        report = compressed_tensors.write_quantised(info, scheme, partial, lineage.to_json(), bar.advance)
    run.finish(
        {
            "matrices": report.matrices,
            "weights": report.weights,
            "group_size": scheme.group,
            "bytes_before": report.bytes_before,
            "bytes_after": report.bytes_after,
            "relative_error": round(report.error, 6),
        },
        f"{report.matrices} matrices in {scheme}: {report.bytes_before / 1e6:,.2f} MB became {report.bytes_after / 1e6:,.2f} MB,"
        f" relative error {100 * report.error:.2f} %: {run.output}",
    )
