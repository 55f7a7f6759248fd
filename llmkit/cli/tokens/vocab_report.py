"""`llmkit vocab report`: measure tokenizers on real text."""

from __future__ import annotations

import json as jsonlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmkit.cli.shared.messages import counted
from llmkit.cli.shared.options import Run, command
from llmkit.errors import UsageError

if TYPE_CHECKING:
    from llmkit.tokens.fertility import GroupCounts, GroupKey

MAX_NAMED = 5  # groups in one warning
DEFAULT_BY = ("language", "source")


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
        typer.Option("--text", metavar="INPUT", help="Documents (repeatable; default: stdin)"),
    ] = None,
    by: Annotated[
        list[str] | None,
        typer.Option("--by", metavar="FIELD", help="Group by this field (repeatable; default: language, source)"),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option("--baseline", metavar="NAME", help="Group to compare the others with (default: English)"),
    ] = None,
) -> None:
    """Compare tokenizers on real text: fertility (tokens per word), bytes per token, the share of words that
    are a single token, and the number of unused tokens, overall and by language and domain.

    A table goes to stderr, one JSON document to stdout or -o. Groups are the values of the fields `language`
    and `source` (by default the name of the file), or of those given with --by. In scripts without spaces every
    character counts as a word. A warning lists the groups whose fertility is over 1.5 times that of English
    (language en or eng, or the group given with --baseline): their text costs that much more, in training and
    inference.
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
    meter = fertility.FertilityMeter(infos, reader.options, by or DEFAULT_BY)
    total: dict[GroupKey, GroupCounts] = {}
    from llmkit.engine.local import Local

    with run.progress(None, "documents") as bar:
        for chunk in Local(run.jobs).map(meter, reader):
            reader.accept(chunk.bad)
            fertility.merge_groups(total, chunk.groups)
            bar.advance(chunk.documents)
    if by and total:
        for name in by:
            if not _has_values(total, name) and (name, fertility.MISSING) in total:
                run.warn(f"no document has a field {name!r} to group by")
    total = {key: counts for key, counts in total.items() if key[1] != fertility.MISSING or _has_values(total, key[0])}
    base = fertility.find_baseline(total, baseline)
    if baseline is not None and base is None:
        raise UsageError(f"--baseline {baseline}: no group of that name has words", "see --by")
    names = _short_names(tokenizers)
    sizes = [info.vocab_size for info in infos]
    rows = sorted(total.items(), key=lambda item: (item[0][0], -item[1].bytes, item[0][1]))
    report = {
        "baseline": base and base[1],
        "tokenizers": [
            {"name": name, "digest": info.digest, "vocab_size": info.vocab_size}
            for name, info in zip(names, infos, strict=True)
        ],
        "groups": [{"field": key[0], "value": key[1]} | counts.figures(sizes) for key, counts in rows],
    }
    _show_table(run, names, report["groups"])  # type: ignore[arg-type]
    _warn_high_fertility(run, names, total, base)
    write_json(run, report | {"inputs": [item.to_dict() for item in reader.inputs]})
    counts = {"documents": total[fertility.ALL].documents if total else 0, "groups": len(total)}
    run.finish(counts | reader.counts(), f"{counted(counts['documents'], 'document')} measured")


def _has_values(total: dict[GroupKey, GroupCounts], field: str) -> bool:
    """Whether a field has any value besides `MISSING`."""
    return sum(key[0] == field for key in total) > 1


def _short_names(paths: list[Path]) -> list[str]:
    """Names for table rows: the last component of each path, or the whole paths where two would be equal."""
    names = [path.name or str(path) for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def _show_table(run: Run, names: list[str], groups: list[dict[str, Any]]) -> None:
    rows = []
    for group in groups:
        for i, figures in enumerate(group["tokenizers"]):
            row = [f"{group['field']} {group['value']}".strip()[:60] if i == 0 else "", group["words"]]
            row += [names[i]] if names[1:] else []
            row += [_format(figures["fertility"]), _format(figures["bytes_per_token"])]
            rows.append([*row, _format(figures["single_token_words"], "{:.1%}"), figures["unused"]])
    columns = ["words", *(["tokenizer"] if names[1:] else []), "tokens/word", "bytes/token", "single", "unused"]
    run.table("Fertility", ["", *columns], rows)


def _format(value: float | None, template: str = "{:.2f}") -> str:
    return "" if value is None else template.format(value)


def _warn_high_fertility(run: Run, names: list[str], total: dict[GroupKey, GroupCounts], base: GroupKey | None) -> None:
    """Warn about each tokenizer with a high fertility on some group, or note that there is no baseline."""
    from llmkit.tokens.fertility import WARN_OVER, high_fertility

    if base is None:
        if total:
            run.note("no English among the groups to compare the others with: name one with --baseline")
        return
    for t, name in enumerate(names):
        groups = high_fertility(total, base, t)
        if groups:
            shown = ", ".join(f"{key[1]} ({ratio:.1f})" for key, ratio in groups[:MAX_NAMED])
            more = f" and {len(groups) - MAX_NAMED:,} more" if groups[MAX_NAMED:] else ""
            run.warn(f"{name}: fertility over {WARN_OVER} times that of {base[1]}: {shown}{more}")


def write_json(run: Run, report: dict[str, Any]) -> None:
    """Write one JSON document to -o, or to stdout unless that is a terminal."""
    from llmkit.io.names import escape_names

    data = jsonlib.dumps(escape_names(report), indent=1, ensure_ascii=False).encode() + b"\n"
    if run.dry_run:
        return
    if run.output:
        from llmkit.io.atomic import atomic_file

        with atomic_file(run.output, run.force) as sink:
            sink.write(data)
    elif not sys.stdout.isatty():
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
