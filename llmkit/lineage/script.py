"""A lineage record as a shell script that makes the artefact again.

Inputs with a record are made by earlier lines, inputs from a pipe by a pipe. Inputs without a record are originals,
which the script takes from a directory by name; it looks for each before it is used. A part of an artefact is taken
from the whole, and an index is filled by the runs that filled it. After each line the output is compared with the
digest in the record.

Records are untrusted. Everything in them is quoted, and the number of commands is bounded. Of the options only those
are printed that decide the content, with values that they take; paths are of files in the two directories of the script
alone. A command that would run code that a record names stops the script before it, unless that is allowed.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from llmkit.errors import LlmkitError
from llmkit.io.inputs import STDIN, STDIN_PATH, has_suffix
from llmkit.io.names import one_line, shell_name, shell_word
from llmkit.io.record import base_name
from llmkit.io.run_layout import CHECKPOINTS, MAX_DIGITS, RUN_COMMANDS, checkpoint_name, parse_step
from llmkit.lineage.fields import (
    MAX_DEPTH,
    REJECTS,
    Record,
    counts_of,
    file_name,
    identity,
    inputs_of,
    options_of,
    place_of,
    present_options,
)


class Flag(NamedTuple):
    """An option of a command.

    With `by_role` its value is an input of that role, or does not decide the content, and a record that gives another
    one may want to write there. With `writes` it is never given. `takes`: whether a value is one that the option has;
    `runs`: whether a value names code.
    """

    name: str
    negative: str = ""
    default: Any = None
    by_role: bool = False
    writes: bool = False
    takes: Callable[[Any], bool] = lambda value: True
    runs: Callable[[str], bool] = lambda value: False


Flags = Callable[[str], dict[str, Flag]]  # of a command, by the names of its parameters

INDEX = "index"  # role of an index of earlier runs
MAX_COMMANDS = 10_000
MAX_CHARACTERS = 100_000  # of the words of an option; Linux takes 131,071 in one argument
# Commands whose outputs are compared by the digest of their files, since they have none of their content.
MODELS = (*RUN_COMMANDS, "average", "quantize", "vocab", "vocab extend", "vocab convert")

_STREAM = "(standard input)"
_DIGEST = re.compile(r"xxh3:[0-9a-f]{32}")
_FUNCTIONS = """\
stop() {  # MESSAGE, which holds names from the record
  printf %s "$0: $1" | LC_ALL=C tr '[:cntrl:]' '?' >&2
  echo >&2
  exit 1
}
same() {  # PATH DIGEST
  made=$(llmkit lineage "$1" --digest)
  [ "$made" = "$2" ] || stop "$1 is not what was recorded: its digest is $made, not $2"
}
original() {  # PATH DIGEST [NUMBER of originals of this name, of which it must be the right one]
  [ -e "$1" ] || stop "there is no $1: put the original there whose digest is $2${3:+ ($3 originals have this name)}"
  [ $# = 3 ] || return 0
  made=$(llmkit lineage "$1" --digest) || return 0  # damaged: left to the command that reads it
  [ "$made" = "$2" ] || stop "$1 is another of the $3 originals of this name: its digest is $made, not $2"
}"""


def as_script(record: Record, name: str, flags: Flags, part: str = "", allow_code: bool = False) -> str:
    """A bash script that makes the artefact again: `bash SCRIPT [INPUTS] [OUTPUT]`.

    Pipes stay pipes, since a stage records whether its input was a pipe or a file. Everything is made in OUTPUT
    under its original base name, and the originals are read from INPUTS, so that equal inputs give equal bytes.
    `part` is the artefact's name and the path inside it where `name` is only a part (Input.part). With `allow_code`
    the script runs code that the record names, if it has the recorded digest.
    """
    item = inputs_of({"inputs": [{"name": base_name(name), "lineage": record, "part": part}]})[0]
    script = _Script(flags, record, item, allow_code)
    script.reference(item)
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
        *([_FUNCTIONS] if any(line.startswith(("same ", "original ", "stop ")) for line in script.lines) else []),
    ]
    return "\n".join(head + script.lines) + "\n"


def unknown_steps(record: Record) -> list[str]:
    """A line for each input in a record whose own record could not be read when it was used."""
    return list(dict.fromkeys(_unknown(item) for _, item in _walk(record) if item["unreadable"]))


def _unknown(item: Record) -> str:
    reason = item["unreadable"]
    return f"the step that made {item['part'] or item['name']} is unknown: its lineage record was unreadable ({reason})"


def _walk(record: Record, depth: int = 0) -> Iterator[tuple[Record, Record]]:
    """(record, input) for every input of a record, its inputs, and the runs of its indexes."""
    for item in inputs_of(record) if depth <= MAX_DEPTH else ():
        yield record, item
        for inner in ([item["lineage"]] if item["lineage"] else []) + (item["runs"] or []):
            yield from _walk(inner, depth + 1)


def _comment(text: str) -> str:
    """A comment on one line, whatever an untrusted record holds."""
    return "# " + one_line(text)


def _quote(text: str) -> str:
    return shell_word(text.replace("\0", "?"))


def _file(name: str) -> str:
    """The name of a file in a record as a word of the script."""
    return shell_name(name.replace("\0", "?"))


class _Script:
    """The lines of the script: each artefact is made once, before it is used."""

    def __init__(self, flags: Flags, record: Record, top: Record, allow_code: bool) -> None:
        self._allow_code, self._code = allow_code, list[str]()  # what the present command would run
        self.lines: list[str] = []
        self.originals: dict[str, str] = {}
        self._streams: list[str] = []
        self._flags = flags
        self._identities: dict[int, str] = {}
        self._files: dict[str, str] = {}  # digest -> name of an original file, which stdin may have been too
        self._digests: dict[str, set[str]] = defaultdict(set)  # name -> digests of the original files that have it
        self._names: dict[str, str] = {}  # identity -> name of the artefact as an input
        self._steps: dict[str, set[int]] = {}  # identity of a run -> steps of which a checkpoint is needed
        self._made: dict[tuple[str, str], str] = {}  # (identity, kind of file) -> path
        self._outputs: set[str] = set()
        self._numbers: dict[tuple[bool, str], int] = {}  # (whether it is an output, name) -> of the last of this name
        self._paths: dict[tuple[str, str], str] = {}  # (name, digest) of an original -> path
        self._commands = 0
        self._compared: set[str] = set()
        self._repeated: list[Record] = []  # keeps them in memory: their identities are known by `id`
        self._indexes: dict[str, list[str]] = {}  # path -> state at the start, and identities of the runs since
        for parent, item in [({}, top), *_walk(record)]:
            if node := item["lineage"]:
                self._note(parent, item, node)
                continue
            self._digests[file_name(item["name"])].add(item["digest"])
            if item["name"] != STDIN and item["role"] == "input":
                self._files[item["digest"]] = file_name(item["name"])

    def _note(self, parent: Record, item: Record, node: Record) -> None:
        key = self._identity(node)
        name, inside = place_of(item)
        if not inside:
            self._names.setdefault(key, name)
        if node.get("command") in RUN_COMMANDS:
            directory, _, checkpoint = inside.partition("/")
            step = parse_step(checkpoint.partition("/")[0]) if directory == CHECKPOINTS else None
            self._steps.setdefault(key, set()).update(step for step in (step, _interval(parent)) if step)

    def _identity(self, node: Record) -> str:
        return identity(node, self._identities)

    def reference(self, item: Record) -> str:
        """Path of an input in the script: made by an earlier line, or an original."""
        node, name = item["lineage"], file_name(item["name"])
        if not node:
            return self._original(name, item)
        artefact, inside = place_of(item)
        path = whole = self._make(node, artefact)
        steps = counts_of(node).get("steps")
        if inside:
            path = "/".join([whole, *map(_file, inside.split("/"))])
        if node.get("command") in RUN_COMMANDS and type(steps) is int and 0 < steps < 10**MAX_DIGITS:
            self._compare(f"{whole}/{CHECKPOINTS}/{checkpoint_name(steps)}", _expected(node, artefact))
        elif not inside or inside == node.get("part"):
            self._compare(path, _expected(node, artefact))
        else:
            self._compare(path, item["digest"])
        return path if not inside or inside.split("/")[-1] == name else self._copy(path, name)

    def _make(self, node: Record, name: str) -> str:
        """Append the line that makes `name`, unless there is one, and return its path."""
        command = str(node.get("command"))
        kind = command if command.endswith(REJECTS) else ".parquet" if has_suffix(name, ".parquet") else ""
        key = (self._identity(node), kind)
        if key in self._made:
            made = self._made[key]
            if not made:
                raise LlmkitError("the lineage contains itself", "it was not written by llmkit")
            return made if made.endswith("/" + _file(name)) else self._copy(made, name)
        self._made[key] = ""
        outer, self._code = self._code, []
        line, output = self._pipeline(node, 0), self._output(name)
        if command.endswith(REJECTS):
            line += f" --rejects {output} -o /dev/null"
        elif command == "cat":
            line += f" > {output}"
        else:
            if steps := self._steps.get(key[0]):
                line += f" --save-every {math.gcd(*steps)}"
            line += f" -o {output}"
        self._made[key] = output
        if self._code:
            self.lines += [_comment(f"needs the code of {', '.join(self._code)}: {line}")]
            hint = "read it, then print this script with --allow-code"
            line = f"stop {_quote(f'the next step runs code, {one_line(self._code[0])}: {hint}')}"
        self._code = outer
        self.lines.append(line)
        return output

    def _compare(self, path: str, digest: str) -> None:
        line = f"same {path} {digest}"
        if _DIGEST.fullmatch(digest) and line not in self._compared:
            self._compared.add(line)
            self.lines.append(line)

    def _copy(self, path: str, name: str) -> str:
        """A copy of an artefact under the name that it had when it was read."""
        key = (path, name)
        if key not in self._made:
            output = self._output(name)
            self.lines.append(f"cp -RL {path} {output}")
            self._made[key] = output
        return self._made[key]

    def _output(self, name: str) -> str:
        """Path of an artefact.

        A second one of the same name goes into a numbered directory, since its name is part of the lineage.
        """
        number = self._numbers.get((True, name), 0) + 1
        while (output := f'"$OUT"/{_file(name)}' if number == 1 else f'"$OUT"/{number}/{_file(name)}') in self._outputs:
            number += 1
        self._numbers[True, name] = number
        if number > 1:
            self.lines.append(f'mkdir -p "$OUT"/{number}')
        self._outputs.add(output)
        return output

    def _pipeline(self, node: Record, depth: int) -> str:
        """The command of `node`, preceded by the commands whose output it reads from pipes."""
        if depth > MAX_DEPTH:
            raise LlmkitError("the lineage is nested too deeply", "it was not written by llmkit")
        self._commands += 1
        if self._commands > MAX_COMMANDS:
            raise LlmkitError(f"the script would have over {MAX_COMMANDS:,} commands", "it was not written by llmkit")
        command, options, inputs = str(node.get("command")), present_options(node), inputs_of(node)
        if command == "cat":  # streams joined by other means than llmkit
            return "cat " + " ".join(self.reference(item | {"name": f"{item['name']}.jsonl.zst"}) for item in inputs)
        command = command.removesuffix(REJECTS)
        flags = self._flags(command)
        words, upstream, redirection = ["llmkit", command], "", ""
        positional: list[str] = []
        suffixes = options.get("specs")
        suffixes = suffixes if isinstance(suffixes, list) else []
        for item in inputs:
            if item["role"] == INDEX and INDEX in flags:
                words += [flags[INDEX].name, self._index(node, item)]
                continue
            if item["name"] == STDIN:
                source, is_command = self._stream(item, depth)
                if upstream or redirection:  # a process substitution
                    reference = f"<({source})" if is_command else f"<(cat {source})"
                else:
                    reference = STDIN
                    upstream, redirection = (
                        (f"{source} |\n  ", "") if is_command else ("", f" < {source}" * bool(source))
                    )
            else:
                reference = self.reference(item)
            option, _, template = item["role"].partition(" ")
            if option in flags and flags[option].writes:
                self._leave_out(flags[option].name, item["name"])
            elif option in flags:  # "rule url.domains=*": the path replaces the asterisk
                before, _, after = template.partition("*")
                if flags[option].runs(before + file_name(item["name"]) + after):
                    self._check_code(reference, item)
                words += [flags[option].name, _quote(before) * bool(before) + reference + _quote(after) * bool(after)]
            else:
                suffix = suffixes[len(positional)] if len(positional) < len(suffixes) else ""
                suffix = suffix if isinstance(suffix, str) and suffix[:1] == ":" and "/" not in suffix else ""
                if suffix and reference == STDIN:
                    reference = STDIN_PATH  # "-:0.5" would be an option
                positional.append(reference + (_quote(suffix) if suffix else ""))
        roles = {item["role"] for item in inputs}
        given: set[str] = set()
        for key, value in sorted(options.items()):
            flag = flags.get(key)
            # A former and a present name stand for one option.
            if flag and not flag.by_role and not flag.writes and key not in roles and flag.name not in given:
                given.add(flag.name)
                shown = _as_words(value, flag)
                if not flag.takes(value) or sum(map(len, shown)) > MAX_CHARACTERS:
                    self._leave_out(flag.name, value)
                    continue
                code = [item for item in (value if isinstance(value, list) else [value]) if flag.runs(str(item))]
                self._code += [f"{item} (no digest)" for item in code]
                words += shown
        return upstream + " ".join(words[:2] + positional + words[2:]) + redirection

    def _leave_out(self, option: str, value: Any) -> None:
        self.lines.append(_comment(f"left out: {option} {str(value)[:100]}, which no record of llmkit holds"))

    def _check_code(self, path: str, item: Record) -> None:
        """Allow the code at `path` if the user does, and if it has its digest, which a line compares."""
        if self._allow_code and not item["lineage"] and _DIGEST.fullmatch(item["digest"]):
            self._compare(path, item["digest"])
        else:
            self._code.append(f"{file_name(item['name'])} ({item['digest'] or 'no digest'})")

    def _stream(self, item: Record, depth: int) -> tuple[str, bool]:
        """The source of a stream, and whether it is a command rather than a file; "" is the script's own stdin."""
        if item["lineage"]:
            return self._pipeline(item["lineage"], depth + 1), True
        digest = item["digest"]
        if digest in self._files:
            return self._original(self._files[digest], item), False
        # A stream that no llmkit command wrote: the script's own stdin, and files for any further ones.
        self._streams.append(digest)
        if len(self._streams) == 1:
            self.originals[_STREAM] = digest
            self._tell_unknown(item)
            return "", False
        return self._original(f"stdin-{len(self._streams) - 1}", item), False

    def _index(self, node: Record, item: Record) -> str:
        """Path of the index that a run reads and then adds to, in the state before that run."""
        name, runs, own = file_name(item["name"]), item["runs"], self._identity(node)
        first = next((i for run in runs or [] for i in inputs_of(run) if i["role"] == INDEX), item)
        start = "" if first["runs"] == [] else first["digest"]
        before = [start, *map(self._identity, runs or [])]
        for path, state in self._indexes.items():
            # A run that is in the index already makes the same output again.
            if state[: len(before)] == before and state[len(before) : len(before) + 1] in ([], [own]):
                self._indexes[path] = state if len(state) > len(before) else [*state, own]
                return path
        path = next((p for p, state in self._indexes.items() if before[: len(state)] == state), "")
        if not path or not path.endswith("/" + _file(name)):
            path = self._output(name)
            self._indexes[path] = [start]
            if start:
                self.lines.append(f"cp {self._original(name, item | {'digest': start})} {path}")
        for number in range(len(self._indexes[path]) - 1, len(runs or [])):
            self._fill(path, name, runs or [], number)
        self._indexes[path].append(own)
        return path

    def _fill(self, path: str, name: str, runs: list[Record], number: int) -> None:
        """Repeat one of the runs that filled an index."""
        run = runs[number]
        key = self._identity(run)
        output = self._names.get(key, f"{name}.{number + 1}.jsonl.zst")
        inputs = [i | {"runs": runs[:number]} if i["role"] == INDEX else i for i in inputs_of(run)]
        repeated = run | {"inputs": inputs}
        self._repeated.append(repeated)
        self._made.pop((key, ""), None)
        self._make(repeated, output)
        if self._indexes[path][-1] != key:
            raise LlmkitError("the lineage holds runs of an index in another order", "it was not written by llmkit")

    def _original(self, name: str, item: Record) -> str:
        """Path of an original in INPUTS, which a line looks for. Another one of its name is in a numbered directory."""
        digest = item["digest"]
        path, number = self._paths.get((name, digest), name), self._numbers.get((False, name), 1)
        while self.originals.get(path, digest) != digest:
            number += 1
            path = f"{number}/{name}"
        self._paths[name, digest], self._numbers[False, name] = path, number
        word = f'"$IN"/{_file(path)}'
        if path not in self.originals:
            self.originals[path] = digest
            self._tell_unknown(item)
            several = len(self._digests[name]) if _DIGEST.fullmatch(digest) and item["role"] != INDEX else 1
            self.lines.append(f"original {word} {_quote(digest)}" + f" {several}" * (several > 1))
        return word

    def _tell_unknown(self, item: Record) -> None:
        self.lines += [_comment(_unknown(item))] * bool(item["unreadable"])


def _expected(node: Record, name: str) -> str:
    """The digest that `llmkit lineage --digest` prints of an artefact; "" where the record holds none."""
    digest = node.get("files" if node.get("command") in MODELS or has_suffix(name, ".parquet") else "digest")
    return digest if isinstance(digest, str) else ""


def _interval(node: Record) -> int:
    """Steps between the checkpoints that a command needs from the runs it reads; 0 where the last ones suffice."""
    options = options_of(node)
    if node.get("command") == "anneal":
        return parse_step(str(options.get("step") or options.get("from_") or "")) or 0  # from_: its former name
    steps, last = options.get("steps"), options.get("last")
    if node.get("command") != "average" or not isinstance(steps, list) or type(last) is not int or last < 1:
        return 0
    # The last checkpoint of each run may be its end, which is saved in any case.
    intermediate = [step for i, step in enumerate(steps) if (i + 1) % last and type(step) is int and step > 0]
    return math.gcd(*intermediate)


def _as_words(value: Any, flag: Flag) -> list[str]:
    """The words of one option; none for its default."""
    if value == flag.default or (value in (None, []) and flag.default in (None, [], ())):
        return []
    if isinstance(value, bool):
        return [flag.name] if value else [flag.negative] if flag.negative else []
    if isinstance(value, list):
        return [word for item in value for word in (flag.name, _quote(str(item)))]
    return [flag.name, _quote(str(value))]
