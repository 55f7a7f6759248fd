"""`llmkit filter train`: train the classifier that the filter `quality` applies."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from llmkit.cli.shared.messages import counted
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
        typer.Option("--label-key", metavar="FIELD", help="Field with the label (default: the file name is the label)"),
    ] = None,
    epochs: Annotated[
        int, typer.Option("--epochs", min=0, max=1000, help="Number of epochs (0 = 5 to 50, more for fewer documents)")
    ] = 0,
    dim: Annotated[int, typer.Option("--dim", min=1, max=1024, help="Dimension of word vectors")] = 64,
    ngrams: Annotated[int, typer.Option("--ngrams", min=1, max=5, help="Length of the longest word n-gram")] = 2,
    rate: Annotated[float, typer.Option("--rate", min=1e-6, max=10, help="Initial learning rate")] = 1.0,
    folds: Annotated[
        int, typer.Option("--folds", metavar="K", min=0, max=100, help="Also cross-validate with K folds")
    ] = 0,
) -> None:
    """Train a document classifier and write it as a fastText model, for `llmkit filter --filter quality` or for
    fastText.

    Each file is a class, named by the file name up to the first dot: good.jsonl contains the good documents. The
    filter keeps the label called good, hq, high or positive, or the one set by `quality.label`. --folds trains K more
    times, each time without a K-th of the documents, and prints how often these get their own label, with the 95 %
    interval, and the area under the ROC curve. The model's bytes depend only on the documents, their order, the
    options and the seed; the format has no room for lineage.
    """
    from llmkit.io.atomic import atomic_file, check_output

    if run.output is None and not folds:
        raise UsageError("no output", "name the model with -o, or only cross-validate with --folds")
    if run.output is not None:
        check_output(run.output, run.force)
    texts, targets, labels = _read(run, inputs, label_key)
    sizes = [targets.count(i) for i in range(len(labels))]
    if len(labels) < 2:
        raise UsageError(f"one class ({', '.join(labels)})", "use one file per class, or --label-key FIELD")
    if folds == 1 or folds > min(sizes):
        raise UsageError(
            f"--folds {folds}: the smallest class has {min(sizes)} documents",
            "use at least 2 folds, with a document of each class in every fold",
        )

    from llmkit.corpus import classifier_training as training

    classifier_options = training.ClassifierOptions(dim, ngrams, epochs, rate, run.seed)
    counts: dict[str, Any] = {"documents": len(texts), "labels": dict(zip(labels, sizes, strict=True))}
    steps = classifier_options.epochs_for(len(texts)) * len(texts)
    if folds:
        with run.progress(None, "documents") as bar:
            probabilities = training.cross_validate(texts, targets, labels, classifier_options, folds, bar.advance)
        counts |= training.agreement(probabilities, targets)
        _show(run, counts, folds)
    destination = "nothing written"
    if run.output is not None and not run.dry_run:
        with run.progress(steps, "documents") as bar:
            model = training.train(texts, targets, labels, classifier_options, bar.advance)
        with atomic_file(run.output, run.force) as sink:
            model.write(sink)
        destination = f"written to {run.output}"
    class_sizes = ", ".join(f"{size:,} {label}" for label, size in zip(labels, sizes, strict=True))
    run.finish(counts, f"{counted(len(texts), 'document')} ({class_sizes}); {destination}")


def _read(run: Run, inputs: list[str] | None, label_key: str | None) -> tuple[list[str], list[int], tuple[str, ...]]:
    """Texts, the index of the label of each text, and the labels in order of first occurrence."""
    from llmkit.io.inputs import STDIN
    from llmkit.io.record import base_name

    reader = run.reader(inputs)
    if label_key is None and STDIN in reader.paths:
        raise UsageError("stdin has no file name to use as a label", "name the field with the label with --label-key")
    texts: list[str] = []
    targets: list[int] = []
    labels: dict[str, int] = {}
    for document in reader.documents():
        value = (
            base_name(document.file).partition(".")[0] if label_key is None else document.exact_fields.get(label_key)
        )
        label = str(value)
        if (
            isinstance(value, (list, dict))
            or value in (None, "")
            or not label.isprintable()
            or label.split() != [label]
        ):
            problem = (
                f"{label_key!r} is not a label: {value!r}" if label_key else f"the file name is not a label: {label!r}"
            )
            raise LlmkitError(f"{document.where}: {problem:.200}", "a label is one word or number")
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
