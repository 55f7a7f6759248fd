"""`llmkit generate`: complete prompts, or chat."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmkit.cli.shared.options import ModelPath, Run, command, count_option
from llmkit.errors import UsageError

if TYPE_CHECKING:
    from llmkit.chat.prompts import Prompt
    from llmkit.io.documents import DocumentReader
    from llmkit.model.pretrained.checkpoint import LoadedModel

SAMPLING = "Sampling"


@command(
    reads=True,
    writes=True,
    neutral=("device", "text"),
    examples=(
        'llmkit generate run/ --prompt "Once upon a time" --max-tokens 30 --text',
        "llmkit generate run/ prompts.jsonl --max-tokens 10 --samples 2 -o completions.jsonl.zst",
        "llmkit generate sft/ --chat --prompt 'What is a list?' --temperature 0 --plain",
    ),
)
def main(
    run: Run,
    model: ModelPath,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PROMPTS", help="JSON lines with `prompt`, `messages` or a text; '-' or nothing is stdin"
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", metavar="TEXT", help="A prompt on the command line; may be repeated"),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Prompts are what a user says: put them in the chat template")
    ] = False,
    text: Annotated[
        bool, typer.Option("--text", help="Print for reading instead of JSON lines; the default on a terminal")
    ] = False,
    max_tokens: Annotated[int, count_option("--max-tokens", help="Longest completion", rich_help_panel=SAMPLING)] = 256,
    samples: Annotated[
        int, typer.Option("--samples", min=1, help="Completions of each prompt", rich_help_panel=SAMPLING)
    ] = 1,
    temperature: Annotated[
        float,
        typer.Option("--temperature", min=0, help="0 always takes the most probable token", rich_help_panel=SAMPLING),
    ] = 0.8,
    top_p: Annotated[
        float,
        typer.Option(
            "--top-p", help="Draw from the fewest tokens that have this probability", rich_help_panel=SAMPLING
        ),
    ] = 0.95,
    stop: Annotated[
        list[str] | None,
        typer.Option("--stop", metavar="TEXT", help="End before this text; may be repeated", rich_help_panel=SAMPLING),
    ] = None,
    truncate_prompt: Annotated[
        bool,
        typer.Option("--truncate-prompt", help="Cut prompts that are too long at the front instead of refusing them"),
    ] = False,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Completions made at once")] = 16,
    dtype: Annotated[
        str, typer.Option("--dtype", help="fp32, bf16 or fp16; default: fp32 on CPU, as stored on GPU")
    ] = "",
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1; default: cuda where there is one")] = "",
) -> None:
    """Complete prompts with a model: JSON lines in, JSON lines out with `prompt`, `completion` and all `completions`.

    Rows with messages go through the model's chat template; so do texts with --chat. Other fields pass through, and an answer that a row
    brings along becomes `reference`. A completion ends at any stop token of the model, at --stop, after --max-tokens, or where the context
    is full. Each is drawn with a seed of its own, from --seed, the prompt's number and the sample's.
    """
    if not 0 < top_p <= 1:
        raise UsageError(f"--top-p {top_p} is not above 0 and at most 1", "1 draws from all tokens")
    if not math.isfinite(temperature):
        raise UsageError(f"--temperature {temperature} is not a number", "0 always takes the most probable token")
    if max_tokens < 1:
        raise UsageError(f"--max-tokens {max_tokens} is not above 0", "see --help")
    if prompt and prompts:
        raise UsageError("prompts both on the command line and in files", "give --prompt or PROMPTS")
    if text and run.output:
        raise UsageError("--text is for reading on the terminal, -o for a file", "give one of them, or redirect stdout")
    if any(not text for text in stop or []):
        raise UsageError("--stop is empty", "leave it out")
    import orjson

    from llmkit.chat.prompts import complete
    from llmkit.io.record import Input, base_name
    from llmkit.lineage.formats import digest_path, read_lineage
    from llmkit.model.pretrained.checkpoint import load_for_inference, load_info, load_tokenizer

    files = [] if prompt else run.inputs(prompts)
    info = load_info(model)
    load_tokenizer(info.tokenizer_files, info.path)
    if not text and not run.dry_run and run.up_to_date([str(info.path), *files]):
        return
    reader = None if prompt else run.reader(files, text_key=None, files_from=None)
    rows = _prompts(run, info, reader, prompt or [], chat, max_tokens if truncate_prompt else None)
    if run.dry_run:
        run.note(f"{sum(1 for _ in rows):,} prompts are in order; nothing written (--dry-run)")
        return
    shown = text or (run.output is None and sys.stdout.isatty())
    counts = {"prompts": 0, "completions": 0, "tokens": 0}
    with ExitStack() as stack:
        writer = None if shown else stack.enter_context(run.writer())
        decoder, info = load_for_inference(model, dtype, device)
        bar = stack.enter_context(run.progress(None, "completions"))
        for asked, completions, tokens in complete(
            decoder,
            info,
            rows,
            samples=samples,
            batch_size=batch_size,
            seed=run.seed,
            stops=stop or [],
            max_new_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
        ):
            if writer:
                writer.write(orjson.dumps(asked.row(completions)) + b"\n")
            else:
                _show(asked, completions)
            for key, count in zip(counts, (1, len(completions), tokens), strict=True):
                counts[key] += count
            bar.advance(len(completions))
        if writer:
            source = Input("input", base_name(model), digest_path(info.path), read_lineage(info.path))
            writer.finish(counts, [source, *(reader.inputs if reader else [])])
    line = f"{counts['completions']:,} completions of {counts['prompts']:,} prompts, {counts['tokens']:,} tokens"
    run.finish(counts, line + (f": {run.output}" if run.output else ""))


def _prompts(
    run: Run, info: LoadedModel, reader: DocumentReader | None, given: list[str], chat: bool, keep: int | None
) -> Iterator[Prompt]:
    """Every prompt with its tokens, each of which fits into the context."""
    from llmkit.chat.prompts import fit, read_prompt
    from llmkit.chat.rows import read_rows

    def convert(fields: Mapping[str, Any]) -> Prompt:
        return read_prompt(fields, info.tokenizer_files, chat=chat, text_key=run.options["text_key"])

    found: Iterator[tuple[str, Prompt]]
    if reader is None:
        found = ((f"prompt {i}", convert({"prompt": text})) for i, text in enumerate(given, 1))
    else:
        found = ((document.where, item) for document, item in read_rows(reader, convert))
    for where, item in found:
        fit(item, info, where, keep)
        yield item


def _show(asked: Prompt, completions: list[str]) -> None:
    """A prompt and its completions for people, separated by a line."""
    if isinstance(asked.asked, str):
        blocks = [f"{asked.asked}{completion}" for completion in completions]
    else:
        turns = "".join(f"[{message['role']}] {message['content']}\n" for message in asked.asked)
        blocks = [turns + "\n".join(f"[assistant] {completion}" for completion in completions)]
    for block in blocks:
        # What a model writes must not steer the terminal.
        print("".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in block), "-" * 20, sep="\n", flush=True)
