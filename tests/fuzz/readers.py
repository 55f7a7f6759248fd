"""Every reader of files that may come from anybody: one row of TARGETS each.

A row's function is given a file, and reads everything in it, as the commands do. It returns, or raises LlmkitError;
Unread stands for what a command counts and skips. Where a reader takes a directory, the case is one of its files, and
`beside` writes the others. `guarded` readers run in a command inside of a guard (llmkit/engine/guarded.py), which
skips a page that crashes or hangs the library: that counts as skipped.

A new reader: one function, one row, and its seeds in seed_files.py.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import views
from mutation import Views

CORPUS, BESIDE = (Path(__file__).parent / name for name in ("corpus", "beside"))
TEXTS = ["", "The quick brown fox, 12345 jumps;\n\n  déjà vu 漢字 \U0001f600 <|im_end|> don't", "a" * 200]
HEAVY = (
    "pyarrow.parquet torch duckdb tokenizers numba safetensors.torch jinja2.sandbox resiliparse.parse.html pypdfium2 zstandard "
    "llmkit.cli.release.lineage llmkit.corpus.extract.engines llmkit.corpus.extract.extractor llmkit.corpus.fasttext llmkit.chat.encode "
    "llmkit.chat.prompts llmkit.model.pretrained.checkpoint llmkit.model.pretrained.streamed llmkit.corpus.dedup.index llmkit.lineage.check "
    "llmkit.tokens.convert_vocabulary llmkit.tokens.text_encoder llmkit.training.checkpoint.run_directory llmkit.training.trace "
    "llmkit.training.optim.recipe llmkit.mixing.stages llmkit.mixing.order llmkit.corpus.chain_loader llmkit.shards.formats llmkit.tokens.bytelevel"
).split()


class Unread(Exception):
    """A page without a document, which `extract` counts and skips."""


@cache
def preload() -> None:
    """Import what the readers need, before workers are forked."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for name in HEAVY:
        import_module(name)


@dataclass(frozen=True, slots=True)
class Target:
    """One reader. `file` is the name under which a case is stored (None: "case" and the suffix of its seed).

    `share` is its part of the cases of a run; `budget` the bytes of memory that it may take (0: isolated.BUDGET).
    """

    name: str
    function: Callable[[Path], None]
    views: tuple[Views, ...] = ()
    text: str = ""  # words of the format, separated by blanks
    file: str | None = None
    beside: Callable[[Path], None] | None = None
    share: float = 1.0
    guarded: bool = False
    packed: bool = False  # seeds are stored as zstd
    budget: int = 0

    @property
    def corpus(self) -> str:
        return self.name.replace(" ", "_")

    @property
    def words(self) -> Sequence[bytes]:
        return _words(self.text)

    def unpacked(self, data: bytes) -> bytes:
        return _unpacked(data) if self.packed else data

    def prepare(self, directory: Path) -> None:
        if self.beside:
            self.beside(directory)


@cache
def _words(text: str) -> list[bytes]:
    return [word.encode().decode("unicode_escape").encode("latin-1") for word in text.split()]


@cache
def _unpacked(data: bytes) -> bytes:
    import zstandard

    return zstandard.decompress(data, max_output_size=1 << 24) if data[:4] == b"\x28\xb5\x2f\xfd" else data


# ---- documents and archives


def documents(path: Path) -> None:
    """Documents in JSON lines or Parquet: every field, changed and unchanged, and the lineage."""
    from llmkit.io.documents import DocumentReader, ReadOptions
    from llmkit.lineage.documents import read_record

    for options in (ReadOptions(on_bad_line="skip"), ReadOptions(None, on_bad_line="skip", on_bad_file="skip")):
        with DocumentReader([str(path)], options) as reader:
            for document in reader.documents():
                document.id, document.value("metadata.a"), document.exact_fields, document.raw_fields()
                document.with_fields({"n": 1})
                if options.text_key:
                    document.change_text("new")
                else:
                    document.change(label=[1, None])
                document.encode()
    if path.suffix != ".parquet":
        read_record(str(path))


def parquet(path: Path) -> None:
    """Parquet: rows, columns, record and digests, and the rows written as Parquet with their types."""
    from llmkit.io.parquet import files_digest, read_record

    documents(path)
    read_record(str(path))
    files_digest(path)


def pages(path: Path) -> None:
    """Archives, pages and texts: what `extract` reads of a file before an engine gets it."""
    from llmkit.corpus.extract.archives import read_pages

    for verify in (False, True):
        for _ in read_pages(str(path), max_bytes=1 << 20, verify=verify, digest=[]):
            pass


def extracted(path: Path) -> None:
    """Pages and their text, by both engines that are always there."""
    from llmkit.corpus.extract.archives import BrokenRecord, read_pages
    from llmkit.corpus.extract.engines import ENGINES, Skip, document_of

    texts = 0
    for page in read_pages(str(path), max_bytes=1 << 20):
        if isinstance(page, BrokenRecord):
            continue
        for engine in ("resiliparse", "plain"):
            try:
                json.dumps(document_of(page, ENGINES[engine]), default=str)
                texts += 1
            except Skip:
                pass
    if not texts:
        raise Unread


# ---- tokens


@cache
def _tokenizer_files() -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in sorted((BESIDE / "tokenizer").iterdir())}


def beside_tokenizer(directory: Path) -> None:
    shutil.copytree(BESIDE / "tokenizer", directory, dirs_exist_ok=True)


def shards(path: Path) -> None:
    """Token shards: all documents, digests, tokenizer and record."""
    from llmkit.shards.lineage import files_digest, read_record, shard_digest, verify
    from llmkit.shards.reader import TokenStore, load_tokenizer_info
    from llmkit.tokens.convert import read_stored

    load_tokenizer_info(path)
    store = TokenStore.open(str(path))
    for i in range(min(store.documents, 50)):
        store.document(i), store.id(i), store.source(i), store.epoch(i)
    store.origins(), store.sequence_length, store.stages, store.padding, store.duplicates
    for target in ("shards", "texts"):
        for block in read_stored("shards", [str(path)], None, target=target, lossy=True)[1]:
            list(block.documents())
    store.verify()
    read_record(str(path)), shard_digest(path), files_digest(path), verify(path)


def tokenizer(path: Path) -> None:
    """A tokenizer directory: its facts, texts encoded by the library, compiled, and for chats, and decoded."""
    from llmkit.chat.masks import Span, encode_spans
    from llmkit.chat.templates import special_contents
    from llmkit.model.pretrained.directory import read_tokenizer_files
    from llmkit.shards.tokenizer_files import files_digest, verify
    from llmkit.shards.tokenizer_info import read_record, read_tokenizer, token_bytes
    from llmkit.tokens.encoder import decode_documents
    from llmkit.tokens.text_encoder import TextEncoder, load_tokenizer

    directory = path.parent
    info = read_tokenizer(directory)
    token_bytes(info.files)
    for compiled in (False, True):
        for special in (False, True):
            ids = TextEncoder(info, allow_special=special, compiled=compiled)(TEXTS, info.eos_id)[0]
    decode_documents(load_tokenizer(info), [ids[:200]], info.eos_id)
    files = read_tokenizer_files(directory)
    special_contents(files), encode_spans(TEXTS[1], [Span(3, 9)], files)
    files_digest(directory), verify(directory), read_record(str(directory / "tokenizer_config.json"))


def vocabulary(path: Path) -> None:
    """Vocabularies of other libraries."""
    from llmkit.shards.foreign_vocabulary import convertible_file, name_format
    from llmkit.tokens.convert_vocabulary import convert

    name_format(path), name_format(path.parent), convertible_file(path.parent)
    if convertible_file(path):
        convert(path, "llama-bpe", ["<|endoftext|>"])


def nanogpt(path: Path) -> None:
    """Token ids alone, with and without a header."""
    _ids_of_others("nanogpt", path)


def megatron(path: Path) -> None:
    """The index of a pair of files."""
    _ids_of_others("megatron", path)


def _ids_of_others(kind: str, path: Path) -> None:
    from llmkit.tokens.convert import read_stored

    for block in read_stored(kind, [str(path)], _tokenizer_info(), target="jsonl")[1]:
        list(block.documents())


@cache
def _tokenizer_info() -> Any:
    from llmkit.shards.tokenizer_info import parse_tokenizer

    return parse_tokenizer(_tokenizer_files(), "tokenizer")


def beside_megatron(directory: Path) -> None:
    shutil.copy(BESIDE / "pair.bin", directory)


# ---- models


def beside_model(directory: Path) -> None:
    shutil.copytree(BESIDE / "model", directory, dirs_exist_ok=True)


def model(path: Path) -> None:
    """A model directory, of which the case is one file: weights by both readers, record and digests."""
    from llmkit.model.pretrained.checkpoint import load_model
    from llmkit.model.pretrained.content import files_digest, verify
    from llmkit.model.pretrained.directory import load_info
    from llmkit.model.pretrained.header import read_header, read_record
    from llmkit.model.pretrained.streamed import StreamedWeights

    directory = path.parent
    info = load_info(directory)
    if info.quantization is None:
        with StreamedWeights(info) as weights:
            weights.digests()
    load_model(directory)
    read_header(directory / "model.safetensors"), read_record(str(directory / "model.safetensors"))
    files_digest(directory), verify(directory)


def checkpoint(path: Path) -> None:
    """The state of a training run: trainer.json, the optimizer's tensors, the list of digests."""
    from llmkit.training.checkpoint.run_directory import find_damage
    from llmkit.training.checkpoint.trainer_state import load_optimizer_tensors, load_trainer_state

    directory = path.parent.parent
    find_damage(directory)
    load_trainer_state(directory)
    load_optimizer_tensors(directory)


def trace(path: Path) -> None:
    """The trace of a run: the documents of its first and last steps, and the steps of a document."""
    from llmkit.training.trace import Trace, skipped_steps, steps_done

    run = path.parent.parent
    skipped_steps(run), steps_done(run)
    opened = Trace(run)
    for number in (1, 2, opened.steps):
        list(islice(opened.step(number), 50))
    list(islice(opened.find("0"), 50))


def beside_run(directory: Path) -> None:
    shutil.copytree(BESIDE / "run", directory, dirs_exist_ok=True)


def fasttext(path: Path) -> None:
    """A classifier, and its predictions."""
    from llmkit.corpus.fasttext import load

    classifier = load(path)
    for text in TEXTS:
        classifier.predict(text, k=3)


# ---- chats


def rows(path: Path) -> None:
    """Rows for fine-tuning, alignment and generation, with the template of the tokenizer."""
    from llmkit.chat.encode import encode_conversations, encode_preferences
    from llmkit.chat.prompts import read_prompts
    from llmkit.chat.rows import read_rows
    from llmkit.errors import LlmkitError
    from llmkit.io.documents import DocumentReader, ReadOptions

    files, refused = _tokenizer_files(), 0
    for on_bad_line in ("stop", "skip"):
        options = ReadOptions(None, on_bad_line=on_bad_line)
        for read in (
            lambda reader: encode_conversations(reader, files, 64, too_long="truncate"),
            lambda reader: encode_conversations(reader, files, 64, template=False),
            lambda reader: encode_preferences(reader, files, 64),
            lambda reader: list(read_rows(reader, lambda fields: read_prompts(fields, files, chat=True))),
        ):
            try:
                with DocumentReader([str(path)], options) as reader:
                    read(reader)
            except LlmkitError as error:
                refused += 1
                if error.__cause__ is not None and type(error.__cause__).__name__ == "WorkerError":
                    raise
    if refused == 8:
        raise Unread


def template(path: Path) -> None:
    """A chat template: rendered, and checked for stop tokens."""
    from llmkit.chat.masks import check_template, encode_chat, stop_token_ids
    from llmkit.chat.templates import with_template

    files = with_template(_tokenizer_files(), path.read_bytes().decode("utf-8", "replace"))
    messages = [
        {"role": "system", "content": "s"}, {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hi <|im_end|>", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]},
        {"role": "tool", "content": "1"}, {"role": "assistant", "content": "one"},
    ]  # fmt: skip
    stop_token_ids(files)
    check_template(files)
    encode_chat(messages, files, [{"type": "function", "function": {"name": "f"}}], lossy=True)


# ---- configuration


def configuration(path: Path) -> None:
    """TOML: options, recipes, stages, plans and presets; refused by all of them, or read by one."""
    from types import SimpleNamespace

    from llmkit.cli.shared.configuration import load_config
    from llmkit.cli.shared.options import click_command
    from llmkit.corpus.chain_loader import load_chain
    from llmkit.errors import LlmkitError
    from llmkit.mixing.plan import plan_digest, read_plan, read_record, verify
    from llmkit.mixing.stages import read_stages
    from llmkit.training.optim.recipe import read_recipe

    context = SimpleNamespace(command=_train_command(click_command), default_map=None)
    readers: list[Callable[[], Any]] = [
        lambda: load_config(context, str(path), "train", {}), lambda: read_recipe(str(path)), lambda: read_stages(path, []),
        lambda: load_chain([str(path)], [], [], "unicode"), lambda: read_plan(path), lambda: verify(path),
        lambda: (plan_digest(path), read_record(str(path))),
    ]  # fmt: skip
    refused = 0
    for read in readers:
        try:
            read()
        except LlmkitError:
            refused += 1
    if refused >= len(readers) - 1:
        raise LlmkitError("refused by all")


@cache
def _train_command(click_command: Any) -> Any:
    return click_command(import_module("llmkit.cli.training.train").main, "train")


# ---- lineage and indexes


def lineage(path: Path) -> None:
    """An artefact's record, wherever it stands: as a tree, as a script, checked, and as that of an input."""
    from llmkit.lineage.check import check
    from llmkit.lineage.formats import describe_input, describe_part, own_digest, read_lineage
    from llmkit.lineage.script import as_script
    from llmkit.lineage.tree import as_tree

    artefact = path.parent if path.name in ("tokenizer_config.json", "model.safetensors", "plan.toml") else path
    record = read_lineage(artefact)
    if record is None:
        raise Unread
    list(check(record, str(artefact), [str(path.parent)]))
    describe_input(artefact), own_digest(str(artefact))
    printed = as_tree(record, str(path), 80) + as_script(
        record, str(path), _flags_of, describe_part(str(artefact), record)
    )
    raw = [c for c in printed if not c.isprintable() and c not in "\n "]
    assert not raw, f"printed raw: {raw[:5]}"


@cache
def _flags_of(command: str) -> Any:
    return import_module("llmkit.cli.release.lineage")._flags(command)


def index(path: Path) -> None:
    """An index of deduplication."""
    from llmkit.corpus.dedup.index import Index, holds

    try:
        with Index(str(path), None) as opened:
            opened.stats()
            opened.runs_before(99)
            opened.names_of("x"), opened.has("x"), opened.history(2)
    finally:
        for left in path.parent.glob("case.duckdb.*"):
            left.unlink() if left.is_file() else None
    holds(str(path), "xxh3:" + "0" * 32)


HTML = "<html> <body> <p> </p> <table> <tr> <td> <ul> <li> <dl> <math> <script> <title> <meta\\x20charset=utf-16> <!-- --> <![CDATA[ &amp; &#x10ffff; <pre> <sub>"
PDF = "obj endobj stream endstream /Length /Kids /Page /Pages /Filter /FlateDecode /Font << >> xref trailer startxref /Prev /XRef /ObjStm R"
HTTP = "HTTP/1.1\\x20200\\x20OK \\r\\n \\r\\n\\r\\n Content-Encoding:\\x20gzip Content-Length: Transfer-Encoding:\\x20chunked ffffffff\\r\\n"
WARC = f"WARC/1.0\\r\\n WARC/1.1\\r\\n WARC-Type:\\x20response WARC-Type:\\x20continuation WARC-Segment-Number:\\x202 WARC-Truncated:\\x20length {HTTP}"
JSON = '"text" "id" "metadata" null true 1e999 1e400 -0 \\\\u0000 \\\\ud800 [ ] { } , : "" \\xef\\xbb\\xbf \\xff'
ROLES = '"messages" "role" "content" "user" "assistant" "system" "tool_calls" "function" "arguments" "tools" "prompt" "completion" "chosen" "rejected" "weight" "train" "conversations" "from" "value" "instruction" "output" "\\n\\nHuman:" "text" "completions"'
JINJA = "{{ }} {% %} {%- -%} {% for x in y %} {% endfor %} {% if a %} {% endif %} {% set a=b %} {% macro f() %}{% endmacro %} messages tools | tojson length join range( loop. namespace( raise_exception( strftime_now( {% generation %} {% endgeneration %} __class__ .format( ~ * ** // [::-1] {% include 'x' %} {% import 'x' %} cycler( self _self"
TOML = "[[stage]] [sources] [[source]] [train] [filters] tokens = seed lr betas mix warmup '''  \"\"\" inf nan 1e999 0x7fffffffffffffffffffffff 1979-05-27 true {} [] . -"
TOKENIZER = "BPE Unigram WordPiece WordLevel ByteLevel Sequence Split Regex NFC NFKD Replace Prepend Metaspace Digits Template ByteFallback Fuse Strip Punctuation (?i: \\\\p{L} \\\\s+ (a+)+$ Precompiled added_tokens vocab merges dropout special normalized lstrip unk_token"
RECORD = "command options inputs counts digest role name lineage part runs files record bytes llmkit train filter dedup mix tokenize vocab average quantize cat index input -"

TARGETS = (
    Target("documents", documents, (views.json_lines,), JSON),
    Target("compression", documents, (views.compressed,), JSON, share=0.6),
    Target("parquet", parquet, (views.parquet_record,), JSON, share=0.4),
    Target("warc", pages, (views.warc_members,), WARC, share=0.8),
    Target("arc", pages, (views.warc_members,), "http:// 1.2.3.4 20200101000000 filedesc:// text/html " + HTTP, share=0.6),
    Target("html", extracted, (), HTML, guarded=True, share=0.4),
    Target("pdf", extracted, (), PDF, guarded=True, share=0.3),
    Target("plain text", extracted, (), "\\xff\\xfe \\xfe\\xff \\xef\\xbb\\xbf <p> <br> WARC/1.0 %PDF- {\\\\rtf \\0", guarded=True, share=0.4),
    Target("shards", shards, (views.arrow_metadata,), JSON, beside=None, share=0.3),
    Target("tokenizer", tokenizer, (views.whole_json,), TOKENIZER, file="tokenizer.json", beside=beside_tokenizer, share=0.1),
    Target("tokenizer config", tokenizer, (views.whole_json,), TOKENIZER, file="tokenizer_config.json", beside=beside_tokenizer, share=0.1),
    Target("vocabulary", vocabulary, (views.whole_json,), "YQ== token_bytes token_str rank config pattern default_vocab_size special_tokens 0 = \\n", share=0.5),
    Target("nanogpt", nanogpt, (), "\\x98\\x3c\\x34\\x01 \\0\\0", share=0.6),
    Target("megatron", megatron, (), "MMIDIDX\\0\\0", file="pair.idx", beside=beside_megatron),
    Target("fasttext", fasttext, (), "__label__ </s> \\xba\\x16O/", share=0.5),
    Target("rows", rows, (views.json_lines,), ROLES, share=0.2),
    Target("template", template, (), JINJA, share=0.2),
    Target("toml", configuration, (), TOML, share=0.3),
    Target("safetensors", model, (views.safetensors_header,), "F32 BF16 I64 dtype shape data_offsets __metadata__", file="model.safetensors", beside=beside_model, share=0.2),
    Target("model config", model, (views.whole_json,), "llama qwen3 olmo2 rope_scaling llama3 yarn auto_map quantization_config", file="config.json", beside=beside_model, share=0.2),
    Target("trainer state", checkpoint, (views.whole_json,), "step tokens options", file="state/trainer.json", beside=beside_model, share=0.4),
    Target("optimizer state", checkpoint, (views.safetensors_header,), "F32", file="state/optimizer.safetensors", beside=beside_model, share=0.4),
    Target("trace", trace, (views.whole_json,), "version legs total stores", file="trace/trace.json", beside=beside_run, share=0.4),
    Target("trace table", trace, (), "descr fortran_order shape <i8 |O", file="trace/offsets.npy", beside=beside_run, share=0.4),
    Target("lineage", lineage, (views.compressed, views.parquet_record, views.arrow_metadata), RECORD, share=0.3),
    Target("lineage of a tokenizer", lineage, (views.inner_record,), RECORD, file="tokenizer_config.json", beside=beside_tokenizer, share=0.3),
    Target("lineage of a model", lineage, (views.safetensors_header,), RECORD, file="model.safetensors", beside=beside_model, share=0.3),
    Target("lineage of a plan", lineage, (views.inner_record,), RECORD, file="plan.toml", share=0.3),
    Target("index", index, (views.duckdb_block,), "llmkit runs seen settings", packed=True, share=0.03),
)  # fmt: skip
