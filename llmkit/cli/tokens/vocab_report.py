"""`llmkit vocab report`: measure what tokenizers make of real text."""

from __future__ import annotations

import json as jsonlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmkit.cli.shared.options import Run, command
from llmkit.errors import UsageError

if TYPE_CHECKING:
    from llmkit.tokens.fertility import Key, Tally

NAMED = 5  # groups in one warning
BY = ("language", "source")


@command(
    reads=True,
    examples=(
        "llmkit vocab report tok/ --text docs.jsonl.zst",
        "llmkit vocab report tok/ chat/ --text docs.jsonl --text heldout.jsonl --by source -o fertility.json",
        "llmkit filter docs.jsonl.zst | llmkit vocab report tok/ -q | head -12",
    ),
)
def main(
    run: Run,
    tokenizers: Annotated[
        list[Path], typer.Argument(metavar="TOKENIZER", help="Tokenizer or model directories, or tokenizer.json files")
    ],
    text: Annotated[
        list[str] | None,
        typer.Option("--text", metavar="INPUT", help="Documents; may be repeated; without it stdin"),
    ] = None,
    by: Annotated[
        list[str] | None,
        typer.Option("--by", metavar="FIELD", help="Group by this field; may be repeated; default: language, source"),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option("--baseline", metavar="NAME", help="The group that others are held against; default: English"),
    ] = None,
) -> None:
    """Measure tokenizers on real text, side by side: fertility (tokens a word), bytes a token, the share of words that are a single token, and the
    tokens that never occur; over all, and by language and domain.

    A table goes to stderr, one JSON document to stdout or -o. Groups are the values of the documents' fields, `language` and `source` (a file's name
    where there is none) or those of --by. In scripts without spaces every character counts as a word. A group whose fertility is over 1.5
    times that of English (language en or eng, or the group of --baseline) is warned of: its text costs that much more, in training and in use.
    """
    import orjson

    from llmkit.shards.reader import load_tokenizer_info
    from llmkit.tokens import fertility
    from llmkit.tokens.pretokenize import gguf_warning

    infos = [load_tokenizer_info(path) for path in tokenizers]
    for path, info in zip(tokenizers, infos, strict=True):
        if warning := gguf_warning(str(path), orjson.loads(info.files.get("tokenizer.json", "{}"))):
            run.warn(warning)
    if run.output:
        from llmkit.io.atomic import check_output

        check_output(run.output, run.force)
    reader = run.reader(text)
    meter = fertility.Meter(infos, reader.options, by or BY)
    total: dict[Key, Tally] = {}
    from llmkit.engine.local import ordered_map

    with run.progress(None, "documents") as bar:
        for part in ordered_map(meter, reader.chunks(), run.jobs):
            reader.accept(part.bad)
            fertility.merge(total, part.groups)
            bar.advance(part.documents)
    if by and total:
        for name in by:
            if not _others(total, name) and (name, fertility.NONE) in total:
                run.warn(f"no document has a field {name!r} to group by")
    total = {key: tally for key, tally in total.items() if key[1] != fertility.NONE or _others(total, key[0])}
    base = fertility.baseline(total, baseline)
    if baseline is not None and base is None:
        raise UsageError(f"--baseline {baseline}: no group of that name holds words", "see --by")
    names = _distinct(tokenizers)
    sizes = [info.vocab_size for info in infos]
    rows = sorted(total.items(), key=lambda item: (item[0][0], -item[1].bytes, item[0][1]))
    report = {
        "baseline": base and base[1],
        "tokenizers": [
            {"name": name, "digest": info.digest, "vocab_size": info.vocab_size}
            for name, info in zip(names, infos, strict=True)
        ],
        "groups": [{"field": key[0], "value": key[1]} | tally.figures(sizes) for key, tally in rows],
    }
    _table(run, names, report["groups"])  # type: ignore[arg-type]
    _warn(run, names, total, base)
    write_json(run, report | {"inputs": [item.to_dict() for item in reader.inputs]})
    counts = {"documents": total[fertility.ALL].documents if total else 0, "groups": len(total)}
    run.finish(
        counts | ({"bad_lines": reader.bad} if reader.bad else {}), f"{counts['documents']:,} documents measured"
    )


def _others(total: dict[Key, Tally], field: str) -> bool:
    """Whether a field has more values than "there is none"."""
    return sum(key[0] == field for key in total) > 1


def _distinct(paths: list[Path]) -> list[str]:
    """Short names for columns: the last component, the whole path where two have the same."""
    names = [path.name or str(path) for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def _table(run: Run, names: list[str], groups: list[dict[str, Any]]) -> None:
    rows = []
    for group in groups:
        for i, made in enumerate(group["tokenizers"]):
            row = [f"{group['field']} {group['value']}".strip()[:60] if i == 0 else "", group["words"]]
            row += [names[i]] if names[1:] else []
            row += [_shown(made["fertility"]), _shown(made["bytes_per_token"])]
            rows.append([*row, _shown(made["single_token_words"], "{:.1%}"), made["unused"]])
    columns = ["words", *(["tokenizer"] if names[1:] else []), "tokens/word", "bytes/token", "single", "unused"]
    run.table("Fertility", ["", *columns], rows)


def _shown(value: float | None, form: str = "{:.2f}") -> str:
    return "" if value is None else form.format(value)


def _warn(run: Run, names: list[str], total: dict[Key, Tally], base: Key | None) -> None:
    """A line for each tokenizer that is dear on some group; a note where nothing can be said."""
    from llmkit.tokens.fertility import WARN_OVER, costly

    if base is None:
        if total:
            run.note("no English among the groups to hold the others against: name one with --baseline")
        return
    for t, name in enumerate(names):
        found = costly(total, base, t)
        if found:
            shown = ", ".join(f"{key[1]} ({ratio:.1f})" for key, ratio in found[:NAMED])
            more = f" and {len(found) - NAMED:,} more" if found[NAMED:] else ""
            run.warn(f"{name}: fertility over {WARN_OVER} times that of {base[1]}: {shown}{more}")


def write_json(run: Run, report: dict[str, Any]) -> None:
    """One JSON document to -o, else to stdout where that is no terminal."""
    data = jsonlib.dumps(report, indent=1, ensure_ascii=False).encode() + b"\n"
    if run.dry_run:
        return
    if run.output:
        from llmkit.io.atomic import atomic_file

        with atomic_file(run.output, run.force) as sink:
            sink.write(data)
    elif not sys.stdout.isatty():
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
