"""`llmkit filter train`: train the classifier that the filter `quality` applies."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from llmkit.cli.shared.options import InputPaths, Run, command
from llmkit.errors import LlmkitError, UsageError


@command(
    reads=True,
    neutral=("folds",),
    examples=(
        "llmkit filter train good.jsonl bad.jsonl -o model.bin",
        "llmkit filter train labelled.jsonl --label-key label --folds 5",
    ),
)
def main(
    run: Run,
    inputs: InputPaths = None,
    label_key: Annotated[
        str | None,
        typer.Option(
            "--label-key", metavar="FIELD", help="Field that holds the label; by default the file's name is it"
        ),
    ] = None,
    epochs: Annotated[
        int, typer.Option("--epochs", min=0, max=1000, help="Passes over the documents; 0: 5 to 50, as they are few")
    ] = 0,
    dim: Annotated[int, typer.Option("--dim", min=1, max=1024, help="Numbers a word is represented by")] = 64,
    ngrams: Annotated[int, typer.Option("--ngrams", min=1, max=5, help="Longest run of words that counts as one")] = 2,
    rate: Annotated[float, typer.Option("--rate", min=1e-6, max=10, help="Learning rate at the start")] = 1.0,
    folds: Annotated[
        int, typer.Option("--folds", metavar="K", min=0, max=100, help="Also cross-validate over K parts")
    ] = 0,
) -> None:
    """Train a classifier of documents and write it as a fastText model, for `llmkit filter --filter quality` or for fastText itself.

    Each file is a class, called by its name up to the first dot: good.jsonl holds the good documents. The filter takes good, hq, high or
    positive as the label to keep, or the one it is told. --folds trains K times more, each time without a K-th of the documents, and prints how
    often those get their own label, with the 95 % interval, and the area under the ROC curve. The model's bytes depend on the documents,
    their order, options and seed alone; the format has no room for a lineage.
    """
    from llmkit.io.atomic import atomic_file, check_output

    if run.output is None and not folds:
        raise UsageError("no output", "name the model with -o, or cross-validate alone with --folds")
    if run.output is not None:
        check_output(run.output, run.force)
    texts, targets, labels = _read(run, inputs, label_key)
    sizes = [targets.count(i) for i in range(len(labels))]
    if len(labels) < 2:
        raise UsageError(f"one class ({', '.join(labels)})", "give a file for each class, or --label-key FIELD")
    if folds == 1 or folds > min(sizes):
        raise UsageError(
            f"--folds {folds}: the smallest class has {min(sizes)} documents",
            "2 folds at least, and a document of each class in every fold",
        )

    from llmkit.corpus import classifier_training as training

    how = training.Training(dim, ngrams, epochs, rate, run.seed)
    counts: dict[str, Any] = {"documents": len(texts), "labels": dict(zip(labels, sizes, strict=True))}
    steps = how.passes(len(texts)) * len(texts)
    if folds:
        with run.progress(None, "documents") as bar:
            found = training.cross_validate(texts, targets, labels, how, folds, bar.advance)
        counts |= training.agreement(found, targets)
        _show(run, counts, folds)
    where = "nothing written"
    if run.output is not None and not run.dry_run:
        with run.progress(steps, "documents") as bar:
            model = training.train(texts, targets, labels, how, bar.advance)
        with atomic_file(run.output, run.force) as sink:
            model.write(sink)
        where = f"written to {run.output}"
    shown = ", ".join(f"{size:,} {label}" for label, size in zip(labels, sizes, strict=True))
    run.finish(counts, f"{len(texts):,} documents ({shown}); {where}")


def _read(run: Run, inputs: list[str] | None, label_key: str | None) -> tuple[list[str], list[int], tuple[str, ...]]:
    """Texts, the index of each one's label, and the labels in the order in which they are met."""
    from llmkit.io.inputs import STDIN
    from llmkit.io.record import base_name

    reader = run.reader(inputs)
    if label_key is None and STDIN in reader.paths:
        raise UsageError("stdin has no name to be a label", "name the field that holds it with --label-key")
    texts: list[str] = []
    targets: list[int] = []
    labels: dict[str, int] = {}
    for document in reader.documents():
        value = base_name(document.file).partition(".")[0] if label_key is None else document.fields.get(label_key)
        label = str(value)
        if (
            isinstance(value, (list, dict))
            or value in (None, "")
            or not label.isprintable()
            or label.split() != [label]
        ):
            wrong = (
                f"{label_key!r} is no label: {value!r}" if label_key else f"the file's name makes no label: {label!r}"
            )
            raise LlmkitError(f"{document.where}: {wrong:.200}", "a label is one word or number")
        targets.append(labels.setdefault(label, len(labels)))
        texts.append(document.text)
    if len(labels) > 1000:
        raise LlmkitError(f"{len(labels):,} labels", "is --label-key the right field?")
    return texts, targets, tuple(labels)


def _show(run: Run, counts: dict[str, Any], folds: int) -> None:
    low, high = counts["interval"]
    rows = [["agreement", f"{counts['agreement']:.1%} ({low:.1%} to {high:.1%})"]]
    rows += [["most frequent label", f"{max(counts['labels'].values()) / counts['documents']:.1%}"]]
    if "auc" in counts:
        rows += [["area under the ROC curve", f"{counts['auc']:.3f}"]]
    run.table(f"{folds}-fold cross-validation", ["", "of documents left out"], rows)
