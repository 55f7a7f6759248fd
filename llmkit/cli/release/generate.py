"""`llmkit generate`: complete prompts, or chat."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmkit.cli.shared.messages import counted
from llmkit.cli.shared.options import ModelPath, Run, command, count_option
from llmkit.errors import UsageError

if TYPE_CHECKING:
    from llmkit.chat.prompts import Prompt
    from llmkit.io.documents import Document, DocumentReader
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
        typer.Argument(metavar="PROMPTS", help="JSON lines with `prompt`, `messages` or text (default: stdin)"),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", metavar="TEXT", help="Prompt, instead of PROMPTS (repeatable)"),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Format text prompts as user messages, with the chat template")
    ] = False,
    control_tokens: Annotated[
        bool,
        typer.Option("--control-tokens", help="Read names such as <|im_end|> in text prompts as control tokens"),
    ] = False,
    text: Annotated[
        bool, typer.Option("--text", help="Print plain text instead of JSON lines (default on a terminal)")
    ] = False,
    max_tokens: Annotated[
        int, count_option("--max-tokens", help="Maximum tokens per completion", rich_help_panel=SAMPLING)
    ] = 256,
    samples: Annotated[
        int, typer.Option("--samples", min=1, help="Completions per prompt", rich_help_panel=SAMPLING)
    ] = 1,
    temperature: Annotated[
        float,
        typer.Option(
            "--temperature",
            min=0,
            help="Sampling temperature; 0 takes the most probable token",
            rich_help_panel=SAMPLING,
        ),
    ] = 0.8,
    top_p: Annotated[
        float,
        typer.Option(
            "--top-p",
            help="Sample from the smallest set of tokens with this total probability",
            rich_help_panel=SAMPLING,
        ),
    ] = 0.95,
    stop: Annotated[
        list[str] | None,
        typer.Option(
            "--stop",
            metavar="TEXT",
            help="Stop string, not included in the completion (repeatable)",
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    truncate_prompt: Annotated[
        bool,
        typer.Option("--truncate-prompt", help="Truncate long prompts at the front instead of failing"),
    ] = False,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Completions per batch")] = 16,
    dtype: Annotated[
        str, typer.Option("--dtype", metavar="TYPE", help="fp32, bf16 or fp16 (default: fp32 on CPU, as stored on GPU)")
    ] = "",
    device: Annotated[
        str, typer.Option("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: cuda if available)")
    ] = "",
) -> None:
    """Complete prompts with a model: reads JSON lines, writes JSON lines with `prompt`, `completion` and all
    `completions`.

    Rows with messages are formatted with the model's chat template, and so are texts with --chat. Names of control
    tokens in rows are plain text. Other fields pass through, and an answer in the row becomes `reference`. A completion
    ends at any stop token of the model, at --stop, after --max-tokens, or when the context is full. Each completion has
    its own seed, derived from --seed, the number of the prompt and the number of the sample.
    """
    if not 0 < top_p <= 1:
        raise UsageError(f"--top-p {top_p} is not above 0 and at most 1", "--top-p 1 samples from all tokens")
    if not math.isfinite(temperature):
        raise UsageError(
            f"--temperature {temperature} is not a finite number", "--temperature 0 takes the most probable token"
        )
    if max_tokens < 1:
        raise UsageError(f"--max-tokens {max_tokens} is not above 0", "see --help")
    if prompt and prompts:
        raise UsageError("--prompt and PROMPTS are mutually exclusive", "use one of them")
    from llmkit.io.names import is_utf8

    if not is_utf8("".join(prompt or [])):
        raise UsageError("--prompt is not UTF-8", "convert it, or give a file of prompts")
    if text and run.output:
        raise UsageError("--text and -o are mutually exclusive", "use one of them, or redirect stdout")
    run.check_documents(run.output)
    if any(not text for text in stop or []):
        raise UsageError("--stop is empty", "omit it, or give a string")
    import orjson

    from llmkit.chat.prompts import complete
    from llmkit.lineage.formats import describe_input
    from llmkit.model.pretrained.checkpoint import load_for_inference, load_info, load_tokenizer

    files = [] if prompt else run.inputs(prompts)
    info = load_info(model)
    load_tokenizer(info.tokenizer_files, info.path)
    if not text and not run.dry_run and run.up_to_date([str(info.path), *files]):
        return
    reader = None if prompt else run.reader(files, text_key=None, files_from=None)
    rows = _read_prompts(run, info, reader, prompt or [], max_tokens if truncate_prompt else None)
    if run.dry_run:
        run.note(f"{sum(1 for _ in rows):,} prompts are valid; nothing written (--dry-run)")
        return
    as_text = text or (run.output is None and sys.stdout.isatty())
    counts = {"prompts": 0, "completions": 0, "tokens": 0}
    with ExitStack() as stack:
        decoder, info = load_for_inference(model, dtype, device)
        writer = None if as_text else stack.enter_context(run.writer())
        bar = stack.enter_context(run.progress(None, "completions"))
        for item, completions, tokens in complete(
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
                writer.write(orjson.dumps(item.row(completions), default=orjson.Fragment) + b"\n")
            else:
                _print(item, completions)
            for key, count in zip(counts, (1, len(completions), tokens), strict=True):
                counts[key] += count
            bar.advance(len(completions))
        if writer:
            source = describe_input(info.path, name=model)
            writer.finish(counts, [source, *(reader.inputs if reader else [])])
    line = (
        f"{counted(counts['completions'], 'completion')} of {counted(counts['prompts'], 'prompt')},"
        f" {counted(counts['tokens'], 'token')}"
    )
    run.finish(counts, line + (f": {run.output}" if run.output else ""))


def _read_prompts(
    run: Run, info: LoadedModel, reader: DocumentReader | None, texts: list[str], reserve: int | None
) -> Iterator[Prompt]:
    """Prompts from `reader`, or if None from `texts`. With `reserve`, long prompts are truncated to leave room for that
    many tokens; without, they raise LlmkitError.
    """
    from llmkit.chat.prompts import fit_context, read_prompts
    from llmkit.chat.rows import read_rows

    def convert(fields: Mapping[str, Any]) -> list[Prompt]:
        options = {name: run.options[name] for name in ("chat", "control_tokens", "text_key")}
        return read_prompts(fields, info.tokenizer_files, **options)

    prompts: Iterator[tuple[str, Prompt]]
    if reader is None:
        prompts = ((f"prompt {i}", item) for i, text in enumerate(texts, 1) for item in convert({"prompt": text}))
    else:
        rows = read_rows(reader, convert)
        prompts = ((document.where, _with_raw_fields(item, document)) for document, items in rows for item in items)
    for where, item in prompts:
        fit_context(item, info, where, reserve)
        yield item


def _with_raw_fields(item: Prompt, document: Document) -> Prompt:
    """The prompt with the row's other fields as their bytes, so that they are written as they were read."""
    fields, raw = document.fields, document.raw_fields()
    item.other_fields = {
        key: raw[key] if value is fields.get(key) and value is not None else value
        for key, value in item.other_fields.items()
    }
    return item


def _print(item: Prompt, completions: list[str]) -> None:
    """Print a prompt and its completions as text, separated by lines of dashes."""
    if isinstance(item.content, str):
        blocks = [f"{item.content}{completion}" for completion in completions]
    else:
        turns = "".join(f"[{message['role']}] {message['content']}\n" for message in item.content)
        blocks = [turns + "\n".join(f"[assistant] {completion}" for completion in completions)]
    for block in blocks:
        # Generated text must not contain terminal control sequences.
        print("".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in block), "-" * 20, sep="\n", flush=True)
