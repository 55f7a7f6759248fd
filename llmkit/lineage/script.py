"""A lineage record as a shell script that makes the artefact again.

Inputs with a record are made by earlier lines, inputs from a pipe by a pipe. Inputs without a record are
originals, which the script takes from a directory by name. Records are untrusted: everything in them is quoted.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable
from typing import Any

from llmkit.errors import LlmkitError
from llmkit.io.inputs import STDIN, STDIN_PATH
from llmkit.io.names import shell_name
from llmkit.io.record import base_name
from llmkit.io.run_layout import CHECKPOINTS, STEP_PREFIX, parse_step
from llmkit.lineage.fields import MAX_DEPTH, Record, file_name, inputs_of, options_of

# Parameter name -> (flag, negative flag or "", default) of one command's options.
Flags = Callable[[str], dict[str, tuple[str, str, Any]]]

_STREAM = "(standard input)"
RUN_COMMANDS = ("train", "anneal", "sft", "dpo")  # commands that write checkpoints


def as_script(record: Record, name: str, flags: Flags) -> str:
    """A bash script that makes the artefact again: `bash SCRIPT [INPUTS] [OUTPUT]`.

    Pipes stay pipes, since a stage records whether its input was a pipe or a file. Everything is made in OUTPUT
    under its original base name, and the originals are read from INPUTS, so that equal inputs give equal bytes.
    """
    script = _Script(flags, _originals(record))
    script.make(record, base_name(name))
    originals = [_comment(f"  {original}  {digest}") for original, digest in script.originals.items()]
    call = "bash SCRIPT [INPUTS] [OUTPUT]" + (" < STREAM" if _STREAM in script.originals else "")
    head = [
        "#!/usr/bin/env bash",
        _comment(f"Makes {base_name(name)} again, with llmkit {record.get('llmkit')}: {call}"),
        *(["# INPUTS (default: this directory) holds the originals", *originals] if originals else []),
        "set -euo pipefail",
        "IN=${1:-.}",
        "OUT=${2:-rebuilt}",
        'mkdir -p "$OUT"',
    ]
    return "\n".join(head + script.lines) + "\n"


def _originals(record: Record, depth: int = 0) -> dict[str, str]:
    """Digest -> name of every original that was read as a file."""
    names: dict[str, str] = {}
    for item in inputs_of(record):
        if item["lineage"] and depth < MAX_DEPTH:
            names |= _originals(item["lineage"], depth + 1)
        elif not item["lineage"] and item["name"] != STDIN and item.get("role") in (None, "input"):
            names[str(item.get("digest"))] = file_name(item["name"])
    return names


def _comment(text: str) -> str:
    """A comment on one line, whatever an untrusted record holds."""
    return "# " + "".join(c if c.isprintable() else "?" for c in text)


class _Script:
    """The lines of the script: each artefact is made once, before it is used."""

    def __init__(self, flags: Flags, files: dict[str, str]) -> None:
        self.lines: list[str] = []
        self.originals: dict[str, str] = {}
        self._streams: list[str] = []
        self._flags = flags
        self._files = files  # digest -> name of an original, which stdin may have been too
        self._made: dict[tuple[str, str], str] = {}
        self._outputs: set[str] = set()

    def make(self, node: Record, name: str, save_every: int = 0) -> str:
        """Append the line that makes `name`, and return its path.

        Runs save a checkpoint every `save_every` steps (0: by default).
        """
        is_checkpoint = node.get("command") in RUN_COMMANDS and name.startswith(STEP_PREFIX)
        step = parse_step(name) if is_checkpoint else None
        output = self._output("run" if step else name)
        save_every = step or save_every
        option = f" --save-every {save_every}" if save_every else ""
        self.lines.append(f"{self._pipeline(node, 0)}{option} -o {output}")
        return f"{output}/{CHECKPOINTS}/{name}" if step else output

    def _output(self, name: str) -> str:
        """Path of an artefact.

        A second one of the same name goes into a numbered directory, since its name is part of the lineage.
        """
        number, output = 1, f'"$OUT"/{shell_name(name)}'
        while output in self._outputs:
            number += 1
            output = f'"$OUT"/{number}/{shell_name(name)}'
        if number > 1:
            self.lines.append(f'mkdir -p "$OUT"/{number}')
        self._outputs.add(output)
        return output

    def _pipeline(self, node: Record, depth: int) -> str:
        """The command of `node`, preceded by the commands whose output it reads from pipes."""
        if depth > MAX_DEPTH:
            raise LlmkitError("the lineage is nested too deeply", "it was not written by llmkit")
        command, options, inputs = str(node.get("command")), options_of(node), inputs_of(node)
        flags = self._flags(command)
        words, upstream, redirection = ["llmkit", command], "", ""
        positional: list[str] = []
        suffixes = options.get("specs", [])
        for item in inputs:
            if item["name"] == STDIN and item["lineage"]:
                upstream = self._pipeline(item["lineage"], depth + 1) + " |\n  "
                reference = STDIN
            elif item["name"] == STDIN and str(item.get("digest")) in self._files:
                file = self._original(self._files[str(item.get("digest"))], str(item.get("digest")))
                reference, redirection = STDIN, f' < "$IN"/{shell_name(file)}'
            else:
                reference = self._reference(item, _checkpoint_interval(node))
            option, _, template = str(item.get("role")).partition(" ")
            if option in flags:  # "rule url.domains=*": the path replaces the asterisk
                before, _, after = template.partition("*")
                words += [
                    flags[option][0],
                    shlex.quote(before) * bool(before) + reference + shlex.quote(after) * bool(after),
                ]
            else:
                suffix = suffixes[len(positional)] if len(positional) < len(suffixes) else ""
                if suffix and reference == STDIN:
                    reference = STDIN_PATH  # "-:0.5" would be an option
                positional.append(reference + (shlex.quote(suffix) if suffix else ""))
        roles = {item.get("role") for item in inputs}
        given: set[str] = set()
        for key, value in sorted(options.items()):
            if key in flags and key not in roles and flags[key][0] not in given:  # a former and a present name
                given.add(flags[key][0])
                words += _as_words(value, *flags[key])
        return upstream + " ".join(words[:2] + positional + words[2:]) + redirection

    def _reference(self, item: Record, save_every: int = 0) -> str:
        """Path of an input in the script: made by an earlier line, or an original."""
        name = file_name(item["name"])  # a record must not lead the script outside its directories
        if not item["lineage"]:
            digest = str(item.get("digest", ""))
            if name == STDIN:
                # A stream that no llmkit command wrote: the script's own stdin, and files for any further ones.
                name = f"stdin-{len(self._streams)}" if self._streams else ""
                self._streams.append(digest)
                if not name:
                    self.originals[_STREAM] = digest
                    return STDIN
            return f'"$IN"/{shell_name(self._original(name, digest))}'
        key = (name, str(item.get("digest")))
        if key not in self._made:
            is_run = item["lineage"].get("command") in RUN_COMMANDS
            self._made[key] = self.make(item["lineage"], name, save_every if is_run else 0)
        return self._made[key]

    def _original(self, name: str, digest: str) -> str:
        """Path of an original in INPUTS; another one of the same name is in a numbered directory."""
        number, path = 1, name
        while self.originals.get(path, digest) != digest:
            number += 1
            path = f"{number}/{name}"
        self.originals[path] = digest
        return path


def _checkpoint_interval(node: Record) -> int:
    """Steps between the checkpoints that a command needs from the runs it reads; 0 where the last ones suffice."""
    options = options_of(node)
    if node.get("command") == "anneal":
        return parse_step(str(options.get("step") or options.get("from_") or "")) or 0  # from_: its former name
    steps, last = options.get("steps"), options.get("last")
    if node.get("command") != "average" or not isinstance(steps, list) or not isinstance(last, int) or last < 1:
        return 0
    # The last checkpoint of each run may be its end, which is saved in any case.
    intermediate = [step for i, step in enumerate(steps) if (i + 1) % last and isinstance(step, int)]
    return math.gcd(*intermediate)


def _as_words(value: Any, flag: str, negative: str, default: Any) -> list[str]:
    """The words of one option; none for its default."""
    if value == default or (value in (None, []) and default in (None, [], ())):
        return []
    if isinstance(value, bool):
        return [flag] if value else [negative] if negative else []
    if isinstance(value, list):
        return [word for item in value for word in (flag, shlex.quote(str(item)))]
    return [flag, shlex.quote(str(value))]
