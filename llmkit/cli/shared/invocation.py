"""One invocation of a command: its messages, progress, summary, inputs, output and lineage."""

from __future__ import annotations

import json
import os
import stat
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.cli.shared.messages import Progress, counted, skipped
from llmkit.errors import InputWarning, LlmkitError, UsageError

if TYPE_CHECKING:
    from llmkit.io.document_writer import DocumentWriter, Quarantine
    from llmkit.io.documents import BadLine, DocumentReader, ReadOptions
    from llmkit.io.record import Lineage

QUARANTINES = {"--on-bad-line": "bad_lines", "--on-bad-file": "bad_files"}  # option -> count of what it stores


class Run:
    """One invocation: shared options, messages, progress, summary, inputs, outputs and lineage."""

    reports_json = False  # of the present invocation, also where --json came from a file or the environment

    def __init__(self, command: str, values: dict[str, Any], options: dict[str, Any], paths: dict[str, Path]) -> None:
        from llmkit.io.atomic import check_output

        self.command = command
        self.options = options  # the options that decide the content, as JSON values
        self.output: str | None = None if values["output"] == "-" else values["output"]
        self.force: bool = values["force"]
        self.dry_run: bool = values["dry_run"]
        self.quiet: bool = values["quiet"]
        self.verbose: bool = values["verbose"]
        self.jobs: int = values["jobs"]
        self.seed: int = values["seed"]
        self.as_json: bool = values["json"]
        self._values = values
        if self.skips_bad_files:
            options["on_bad_file"] = "skip"  # what is written to the output is the same with quarantine=FILE
        Run.reports_json = self.as_json
        self.files_from: str | None = values.get("files_from")
        self.config: Callable[[Collection[str]], str] = lambda without: ""  # the options as TOML, except those named
        self._listed: list[str] | None = None  # the paths listed in files_from, once read
        self._paths: list[tuple[str, str | Path]] = []  # (option, path): inputs named by options, for the lineage
        self._stack = ExitStack()
        self._readers: list[DocumentReader] = []
        self._quarantines: dict[str, Quarantine] = {}
        outputs = {"-o": self.output, "--rejects": values.get("rejects"), "--summary": values.get("summary")}
        self._outputs: dict[str, str] = {name: path for name, path in outputs.items() if path}
        self.check_quarantine(self._outputs)
        self.check_documents(*self.quarantine_files().values())
        if values.get("summary"):
            check_output(values["summary"], force=True)  # written last
        if "rejects" in values:
            self.check_documents(self.output, values["rejects"])
        for role, path in paths.items():
            self.reads(role, str(path))
        self.bad_files: dict[str, BadLine] = {}  # by name
        self._started = time.monotonic()

    # Messages go to stderr: stdout carries data only.
    def note(self, text: str) -> None:
        """Print a line on stderr, unless --quiet."""
        if not self.quiet:
            self._print(text)

    def detail(self, text: str) -> None:
        """Print a line on stderr with --verbose."""
        if self.verbose:
            self._print(text)

    def warn(self, text: str) -> None:
        """Print a warning on stderr, even with --quiet."""
        self._print(f"warning: {text}")

    def _print(self, text: str) -> None:
        from llmkit.io.names import printable

        with suppress(OSError):  # a log on a full disk must not stop the command
            print(f"llmkit {self.command}: {printable(text)}", file=sys.stderr, flush=True)

    @contextmanager
    def shows_warnings(self) -> Iterator[None]:
        """Print warnings about inputs like those of the command, each once."""
        with warnings.catch_warnings():
            show = warnings.showwarning

            def show_in_a_line(message: Warning | str, category: type[Warning], *place: Any) -> None:
                if issubclass(category, InputWarning):
                    self.warn(str(message))
                else:
                    show(message, category, *place)

            warnings.simplefilter("default", InputWarning)
            warnings.showwarning = show_in_a_line  # type: ignore[assignment]
            yield

    @contextmanager
    def progress(self, total: int | None, unit: str) -> Iterator[Progress]:
        """Progress over `total` units (None: unknown): a bar on a terminal, otherwise a line every 30 s; nothing with
        --quiet.
        """
        bar = Progress(self.command, total, unit, None if self.quiet else self.note)
        try:
            yield bar
        finally:
            bar.close()

    def table(self, title: str, columns: list[str], rows: list[list[Any]]) -> None:
        """Print a table on stderr, unless --quiet or --json; all columns but the first are right-aligned."""
        if self.quiet or self.as_json:
            return
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(title), title_justify="left", box=None, pad_edge=False)
        for i, column in enumerate(columns):
            table.add_column(Text(column), justify="right" if i else "left")
        for row in rows:
            table.add_row(*(Text(f"{cell:,}" if isinstance(cell, int) else str(cell)) for cell in row))
        width = None if sys.stderr.isatty() else 200  # no folding in a log
        console = Console(stderr=True, highlight=False, soft_wrap=not sys.stderr.isatty(), width=width)
        console.print(table)

    def finish(self, counts: dict[str, Any], line: str) -> None:
        """Report the summary: `line` unless --quiet, or with --json `counts` as JSON; with --summary also to a file.

        `counts["documents"]`, if present, is the number of documents read; 0 gives a warning. What was skipped is added
        to a line without it, before the "; " in front of the output.
        """
        from llmkit.io.names import escape_names

        bad_lines = sum(reader.bad for reader in self._readers)
        counts = escape_names(({"bad_lines": bad_lines} if bad_lines else {}) | counts | self.bad_file_counts())
        if "up_to_date" not in counts and (text := skipped(counts)) not in line:
            line, semicolon, where = line.rpartition("; ") if "; " in line else (line, "", "")
            line += text + semicolon + where
        if counts.get("documents") == 0:
            self.warn("no documents were read")
        if self.as_json:
            print(json.dumps({"command": self.command} | counts), file=sys.stderr, flush=True)
        else:
            self.note(line)
        if self._values["summary"]:
            from llmkit.io.atomic import atomic_file

            seconds = round(time.monotonic() - self._started, 3)
            with atomic_file(self._values["summary"], force=True) as sink:
                sink.write(json.dumps({"command": self.command, "seconds": seconds} | counts).encode() + b"\n")

    # Inputs and outputs.
    def reads(self, role: str, path: str) -> None:
        """Record an input named by an option. `role` is the option, or the option and its value with a star for the
        path (io.record.Input).
        """
        from llmkit.io.atomic import is_special

        if is_special(Path(path)):
            raise UsageError(f"{path}: not a regular file", "write it into one: it is read more than once")
        self._check_apart([path])
        self._paths.append((role, path))

    def lineage(self) -> Lineage:
        """A new record with the command, its options and the inputs that options name."""
        from llmkit.io.record import Lineage
        from llmkit.lineage.formats import describe_input

        inputs = [describe_input(path, role) for role, path in self._paths]
        return Lineage(self.command, dict(self.options), inputs)

    def inputs(self, paths: list[str] | None, **expand_options: Any) -> list[str]:
        """The input files of the call (llmkit.io.inputs.expand), including --files-from unless `files_from=None`.

        Other files in the directories are counted in a message, unless `left_out=None`.
        """
        from glob import has_magic

        from llmkit.io.inputs import STDIN, expand, is_remote

        source = expand_options.pop("files_from", self.files_from)
        if self.skips_bad_files:
            for path in paths or []:
                if not (path == STDIN or is_remote(path) or has_magic(path) or os.path.lexists(path)):
                    raise UsageError(f"{path}: no such file or directory", "only files in --files-from may be missing")
            expand_options |= {"missing_ok": True, "on_empty": self._bad_input}
        all_paths = paths if source is None else list(paths or []) + self.listed(source)
        if source is not None and not all_paths:
            return []
        left_out: Counter[str] | None = expand_options.setdefault("left_out", Counter())
        files = expand(all_paths, **expand_options)
        self._check_apart(files)
        if left_out:
            kinds = ", ".join(f"{count:,} {suffix or 'without a suffix'}" for suffix, count in left_out.most_common())
            self.note(f"{counted(left_out.total(), 'file')} in the directories not read: {kinds}")
        return files

    def listed(self, source: str) -> list[str]:
        """What the file of --files-from lists."""
        from llmkit.io.inputs import read_list

        if self._listed is None:
            self._listed = read_list(source)  # only once: the list may come from stdin
        return self._listed

    def reader(self, paths: list[str] | None, *, text_key: str | None = "", **expand_options: Any) -> DocumentReader:
        """A reader of documents named on the command line, with the reading options; `text_key=None` reads any rows."""
        return self.reader_of(self.inputs(paths, **expand_options), text_key=text_key)

    def reader_of(
        self, paths: list[str], *, text_key: str | None = "", on_bad_file: str | None = None
    ) -> DocumentReader:
        """A reader of exactly these files, with the reading options; `on_bad_file` replaces that option."""
        from llmkit.io.documents import DocumentReader

        options = self.read_options(text_key)
        if on_bad_file is not None:
            options = replace(options, on_bad_file=on_bad_file)
        reader = DocumentReader(paths, options, self._open_quarantine, self.bad_file)
        self._readers.append(reader)
        return self._stack.enter_context(reader)

    def _open_quarantine(self, path: str) -> Quarantine:
        """The quarantine of a file, which all readers share."""
        from llmkit.io.atomic import check_output
        from llmkit.io.document_writer import Quarantine

        if path not in self._quarantines:
            check_output(path, self.force)
            self._quarantines[path] = self._stack.enter_context(Quarantine(path))
        return self._quarantines[path]

    def quarantine_files(self) -> dict[str, str]:
        """Option -> FILE of its quarantine=FILE."""
        values = {name: str(self._values.get(name.strip("-").replace("-", "_"))) for name in QUARANTINES}
        if not any(value.startswith("quarantine=") for value in values.values()):
            return {}
        return {name: file for name, file in zip(values, self.read_options().quarantine_files(), strict=True) if file}

    def check_quarantine(self, others: Mapping[str, str]) -> None:
        """UsageError where a quarantine would be written to another file of the call; `others`: name -> path."""
        for option, file in self.quarantine_files().items():
            for name, path in others.items():
                if os.path.realpath(file) == os.path.realpath(path):
                    raise UsageError(
                        f"{option} quarantine={file}: this is also the file of {name}", "name another file"
                    )

    def _check_apart(self, inputs: list[str]) -> None:
        """UsageError where a file is an input and an output, under any name: -f would empty or replace it."""
        written = {_file_key(path): f"{name} {path}" for name, path in self._outputs.items()}
        for path in inputs if written else ():
            if (key := _file_key(path)) and key in written:
                raise UsageError(f"{written[key]}: this is also an input", "name another file")

    def check_documents(self, *outputs: str | None) -> None:
        """UsageError where the suffix of an output of documents is that of no format; directories have none."""
        from llmkit.io.document_writer import check_suffix

        for path in outputs:
            if path not in (None, "-") and not path.endswith("/") and not os.path.isdir(path):
                check_suffix(path)

    def warn_of_missing_quarantine(self, counts: dict[str, Any]) -> None:
        """Warn where the quarantine that belongs to an output with these counts does not exist any more."""
        from llmkit.io.inputs import exists

        for option, file in self.quarantine_files().items():
            known = len(self.bad_files) if option == "--on-bad-file" else 0  # directories, which are not in it
            if counts.get(QUARANTINES[option], 0) > known and not exists(file):
                self.warn(f"{file} does not exist any more; -f makes it again, with the output")

    @property
    def skips_bad_files(self) -> bool:
        """Whether --on-bad-file allows unreadable inputs."""
        return self._values.get("on_bad_file") not in (None, "stop")

    def bad_file(self, bad: BadLine, quarantine: bool = False) -> None:
        """Warn about an unreadable input and count it; `quarantine`: also store it where --on-bad-file names a file."""
        if bad.file in self.bad_files:
            return  # read a second time
        self.bad_files[bad.file] = bad
        line = f", unreadable from line {bad.line:,} on" if bad.line > 1 else ""
        self.warn(f"{bad.file}: {bad.reason}{line}")
        if quarantine and (file := self.read_options().quarantine_files()[1]):
            self._open_quarantine(file).add([bad.row()])

    def _bad_input(self, name: str, reason: str) -> None:
        """Count a directory or pattern without files as a bad file; there is nothing to quarantine."""
        from llmkit.io.documents import BadLine

        self.bad_file(BadLine(name, 1, reason))

    def bad_file_counts(self) -> dict[str, int]:
        """The number of unreadable inputs, for summary and lineage, if there are any."""
        return {"bad_files": len(self.bad_files)} if self.bad_files else {}

    def check_bad_files(self) -> None:
        """At the end of a call: LlmkitError with --fail-on-bad-file if there was an unreadable input."""
        if self.bad_files and self._values.get("fail_on_bad_file"):
            raise LlmkitError(
                f"{counted(len(self.bad_files), 'file')} could not be read", "the output has everything else"
            )

    def read_options(self, text_key: str | None = "") -> ReadOptions:
        """The reading options, for io.documents."""
        from llmkit.io.documents import ReadOptions

        values = self._values
        key = values["text_key"] if text_key == "" else text_key
        on_bad_file = values["on_bad_file"] or "stop"
        return ReadOptions(key, values["id_key"], values["on_bad_line"], values["max_line_bytes"], on_bad_file)

    def writer(self, force: bool = False, output: str | None = None, json_only: bool = False) -> DocumentWriter:
        """A writer (context manager) of the command's output, or of `output`; `force` replaces it as -f does."""
        from llmkit.io.document_writer import DocumentWriter

        path = self.output if output is None else output
        how: dict[str, Any] = {"plain": self._values.get("plain", False), "json_only": json_only, "warn": self.warn}
        return DocumentWriter(path, self.lineage(), force=self.force or force, **how)

    def made(self, path: str, lineage: Lineage) -> bool:
        """Whether a file was made by the command, version and options of `lineage`."""
        from llmkit.lineage.fields import differences

        record = _record_in(path)
        return record is not None and not differences(record, lineage.header())

    def up_to_date(self, paths: list[str], other_outputs: dict[str, Lineage] | None = None) -> bool:
        """Whether `has_made` finds the output; then reports its counts, and that there is nothing to do."""
        record = self.has_made(paths, other_outputs)
        if record is None:
            return False
        self.warn_of_missing_quarantine(record["counts"])
        self.finish(record["counts"] | {"up_to_date": True}, f"{self.output} is up to date: nothing to do")
        return True

    def has_made(
        self, paths: list[str], other_outputs: dict[str, Lineage] | None = None, output: str | None = None
    ) -> dict[str, Any] | None:
        """The record of the command's output, or `output`, if that already is what this call would make from `paths`.

        `other_outputs` are further outputs of the call with their records. The lineage inside the outputs decides
        (command, version, options, digests of the inputs), never their mere existence. LlmkitError where that shows how
        the call that made the output differs from this one, which would have to replace it.
        """
        from llmkit.io.inputs import exists, has_suffix
        from llmkit.io.record import base_name
        from llmkit.lineage.check import is_whole
        from llmkit.lineage.fields import differences, inputs_of, other_inputs

        output = output or self.output
        if not output or self.force or not (self.skips_bad_files or all(map(exists, paths))):
            return None
        outputs = {output: self.lineage()} | (other_outputs or {})
        records = {path: _record_in(path) for path in outputs}
        if records[output] is not None:
            for path, record in records.items():
                missing = "" if exists(path) else f"but {path} does not"
                if differs := missing or (record is not None and differences(record, outputs[path].header())):
                    self._refuse(output, differs)
                    return None
        # Plain lines cannot tell how they were made: the record of the output decides, if they are there.
        plain = {path for path in outputs if path != output and has_suffix(path, ".jsonl") and exists(path)}
        if any(record is None and path not in plain for path, record in records.items()):
            return None
        if os.path.isdir(output) and not is_whole(records[output] or {}, Path(output)):
            self.warn(f"{output} is not as it was made: a file in it is missing or was changed")
            return None
        digests = {path: self._digest(path) for path in paths}
        for path, header in outputs.items():
            if records[path] is None:
                continue
            recorded = [item for item in inputs_of(records[path] or {}) if item["role"] != "index"]
            expected = [(item.role, item.digest) for item in header.inputs]  # inputs named by options come first
            if [(item["role"], item["digest"]) for item in recorded[: len(expected)]] != expected or [
                item["digest"] for item in recorded[len(expected) :]
            ] != [digests[path] for path in paths]:
                now = [(item.name, item.digest) for item in header.inputs]
                now += [(base_name(path), digests[path]) for path in paths]
                self._refuse(output, other_inputs([(item["name"], item["digest"]) for item in recorded], now))
                return None
        record = records[output]
        assert record is not None
        return record | {"counts": record.get("counts", {})}

    def _refuse(self, output: str, differs: str) -> None:
        """Raise the error for an output that another call made; it is none with --dry-run."""
        from llmkit.io.atomic import HINT_EXISTS

        if not self.dry_run:
            raise LlmkitError(f"{output} exists, {differs}", HINT_EXISTS)

    def _digest(self, path: str) -> str:
        """The digest of an input as its reader records it."""
        from llmkit.io.digest import digest_damaged
        from llmkit.lineage.formats import digest_path

        try:
            return digest_path(path)
        except (LlmkitError, OSError):
            if not self.skips_bad_files:
                raise
            return digest_damaged(path)


def _file_key(path: str) -> tuple[int, int] | None:
    """What two names of one regular file have in common; None for anything else."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return (status.st_dev, status.st_ino) if stat.S_ISREG(status.st_mode) else None


def _record_in(path: str) -> dict[str, Any] | None:
    """The record inside `path`; None if there is none, or it cannot be read."""
    from llmkit.io.atomic import is_special
    from llmkit.io.inputs import exists
    from llmkit.lineage.formats import read_lineage

    if not exists(path) or is_special(Path(path)):  # a device or pipe must not be read
        return None
    try:
        return read_lineage(path)
    except LlmkitError:
        return None
