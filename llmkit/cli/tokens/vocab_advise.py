"""`llmkit vocab advise`: recommend a vocabulary size for a model and a corpus."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmkit.cli.shared.options import InputPaths, Run, command, count_option
from llmkit.errors import LlmkitError, UsageError

if TYPE_CHECKING:
    from llmkit.tokens.advise import CompressionCurve, SizeCost

MAX_GROUPS = 12  # rows in the table of groups


@command(
    reads=True,
    examples=(
        "llmkit vocab advise docs.jsonl.zst --model-size 125m",
        "llmkit vocab advise docs.jsonl.zst --model-size tiny,5m --largest 4096 -o advice.json",
    ),
)
def main(
    run: Run,
    inputs: InputPaths = None,
    model_size: Annotated[
        str, typer.Option("--model-size", "-m", metavar="LIST", help="Presets (125m, llama-1b) or config.json files")
    ] = "125m",
    largest: Annotated[int, count_option("--largest", help="Largest size to consider")] = 1 << 18,
    pattern: Annotated[
        str, typer.Option("--pattern", "-p", metavar="NAME", help="llama-bpe, qwen2, gpt-2 or smollm")
    ] = "llama-bpe",
    by: Annotated[
        str, typer.Option("--by", metavar="FIELD", help="Show the fertility by value of this field")
    ] = "language",
) -> None:
    """Recommend a vocabulary size for a model and the text that it will read.

    Trains one vocabulary on 19 of 20 documents and measures every smaller one on the remaining documents. With
    a larger vocabulary a text has fewer tokens, and each costs more. The recommended size is the smallest whose
    training compute per byte is within 2 % of the minimum, which is close to the sizes found by training models
    (Tao et al., arXiv:2407.13623); the power law of that paper is shown for comparison. Merges that occur fewer
    than ten times are ignored: a warning is given where the corpus is too small to consider large sizes. The
    tables go to stderr, JSON to stdout or -o.
    """
    from llmkit.cli.tokens.vocab_report import write_json
    from llmkit.io.atomic import check_output
    from llmkit.model.config import load_config
    from llmkit.tokens import advise, vocabulary
    from llmkit.tokens.fertility import group_value
    from llmkit.tokens.pretokenize import find_pattern

    names = list(dict.fromkeys(name for name in model_size.split(",") if name))
    if not names:
        raise UsageError("--model-size names no model", "give a preset such as 125m, or a config.json")
    configs = {name: load_config(name, 1) for name in names}
    find_pattern(pattern)
    candidates = advise.candidate_sizes(largest)
    if not candidates or largest > vocabulary.MAX_SIZE:
        raise UsageError(f"--largest {largest:,}: no size to consider", f"from 1,024 to {vocabulary.MAX_SIZE:,}")
    if run.output:
        check_output(run.output, run.force)
    reader, held_out, documents = run.reader(inputs), advise.HeldOutText(), 0
    with run.progress(None, "documents") as bar:

        def texts() -> Iterator[str]:
            nonlocal documents
            for document in reader.documents():
                documents += 1
                bar.advance()
                if not held_out.take(document.text, group_value(document, by)):
                    yield document.text

        trained = vocabulary.train(texts(), candidates[-1], pattern, advise.MIN_FREQUENCY)
    sizes = [size for size in candidates if size <= advise.NON_MERGES + trained.merges]
    if not sizes:
        raise LlmkitError(
            f"the documents have {trained.merges:,} merges that occur {advise.MIN_FREQUENCY} times: "
            "too few for any size",
            "give more text",
        )
    curve = advise.measure_sizes(trained, held_out, sizes)
    models, chosen = [], []
    for name, config in configs.items():
        costs = advise.size_costs(
            curve,
            lambda size, config=config: config.with_vocabulary(size).parameters(),  # type: ignore[misc]
            lambda size, config=config: config.with_vocabulary(size).flops_per_token(0),  # type: ignore[misc]
        )
        best = advise.recommend(costs)
        weights = 2 * config.with_vocabulary(1).parameters() - config.with_vocabulary(2).parameters()
        law = advise.power_law_size(weights, config.hidden_size)
        _show_costs(run, name, costs, best)
        rows = [asdict(cost) for cost in costs]
        models.append({"model": name, "recommended": best.size, "power_law": law, "sizes": rows})
        chosen.append(best.size)
        run.note(f"{name}: {best.size:,} tokens (the power law of Tao et al., for English: {law:,})")
        if min(costs, key=lambda cost: cost.training_flops_per_byte).size == sizes[-1] < candidates[-1]:
            run.warn(f"{name}: the cost still falls at the largest size that this corpus supports: give more text")
    if sizes[-1] < candidates[-1]:
        run.warn(
            f"the corpus has {trained.merges:,} merges that occur {advise.MIN_FREQUENCY} times or more: "
            f"sizes over {sizes[-1]:,} are not considered"
        )
    if len(curve.groups) > 1:
        _show_groups(run, by, curve, chosen)
    groups = {
        name: {"bytes": size, "fertility": dict(zip(map(str, sizes), row, strict=True))}
        for name, (size, row) in curve.groups.items()
    }
    totals = {"documents": documents, "trained_bytes": held_out.trained, "held_out_bytes": held_out.bytes}
    write_json(
        run, {"models": models, "groups": groups} | totals | {"inputs": [item.to_dict() for item in reader.inputs]}
    )
    counts: dict[str, Any] = totals | {"recommended": dict(zip(names, chosen, strict=True))}
    counts |= reader.counts()
    run.finish(
        counts,
        f"trained on {held_out.trained / 1e6:.1f} MB of text, measured on {held_out.bytes / 1e6:.2f} MB held out",
    )


def _show_costs(run: Run, name: str, costs: list[SizeCost], best: SizeCost) -> None:
    rows = []
    least = min(cost.training_flops_per_byte for cost in costs)
    for cost in costs:
        training = cost.training_flops_per_byte
        row = [f"{cost.size:,}{' <' if cost is best else ''}", f"{cost.bytes_per_token:.3f}", f"{cost.fertility:.2f}"]
        row += [f"{cost.embedding_parameters / 1e6:,.1f}M", f"{cost.share:.1%}", f"{training / 1e6:,.1f}"]
        rows.append([*row, f"+{training / least - 1:.1%}", f"{cost.inference_flops_per_byte / 1e6:,.1f}"])
    columns = ["tokens", "bytes/token", "tokens/word", "embedding", "share", "training", "+", "inference"]
    run.table(f"Vocabularies for {name}; training and inference in MFLOP per byte", columns, rows)


def _show_groups(run: Run, by: str, curve: CompressionCurve, chosen: list[int]) -> None:
    """Fertility of the largest groups at the smallest, the recommended and the largest size."""
    sizes = sorted({curve.sizes[0], *chosen, curve.sizes[-1]})
    indices = [curve.sizes.index(size) for size in sizes]
    rows = [
        [name, size, *(f"{row[i]:.2f}" for i in indices)]
        for name, (size, row) in list(curve.groups.items())[:MAX_GROUPS]
    ]
    run.table(f"Tokens per word by {by}", ["", "bytes", *(f"at {size:,}" for size in sizes)], rows)
