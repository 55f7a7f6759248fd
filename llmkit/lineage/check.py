"""Verification of an artefact and of the inputs in its record, by every digest that the record and the files hold.

Of the artefact: its content, its other files (`files`), all its bytes (`bytes`), the record itself, and where it is a
directory of several artefacts (the held-out documents of a mix, the checkpoints of a run) each of them. Of the inputs:
the content. An index of earlier runs is intact if it holds the runs that it had then, and DuckDB's checksums are right.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from llmkit.errors import LlmkitError
from llmkit.io.atomic import is_special
from llmkit.io.digest import digest_stored
from llmkit.io.inputs import STDIN
from llmkit.io.names import unescape_name
from llmkit.io.record import base_name
from llmkit.io.run_layout import (
    ADAPTER_CONFIG,
    DIGESTS,
    FINAL,
    SEALED,
    STATE,
    files_below,
    final_model,
    find_checkpoints,
    is_run,
    regular,
)
from llmkit.io.sealed_file import BYTES, is_sealed_by
from llmkit.lineage.fields import (
    MAX_DEPTH,
    Record,
    counts_of,
    file_name,
    inputs_of,
    is_intact,
    is_well_formed,
    place_of,
)
from llmkit.lineage.formats import (
    content_digest,
    digest_path,
    file_of_record,
    files_digest,
    find_format,
    read_lineage,
    verify,
)

HELD_OUT = "heldout"
INDEX = "index"  # role of an index of earlier runs
# What the list of a checkpoint holds at least; others may have put further files beside them.
CHECKPOINT_FILES = (
    "config.json",
    "model.safetensors",
    ADAPTER_CONFIG,
    "adapter_model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    STATE,
)
INDEX_MODULE = "llmkit.corpus.dedup.index"  # with `holds(path, digest)`


class Checked(NamedTuple):
    """A result: "ok", "DIFFERS", "not found" or "unchecked". `path`: the file that was taken for an input."""

    name: str
    state: str
    path: str = ""


def check(record: Record, path: str, directories: list[str]) -> Iterator[Checked]:
    """The state of the artefact, of its parts, and of each input in its record.

    Inputs are looked for in `directories` and in that of the artefact, also in the numbered directories where a
    script finds a second original of one name.
    """
    name, artefact = base_name(path), Path(path)
    yield Checked(name, _state_of_artefact(record, artefact))
    for checkpoint in find_checkpoints(artefact):
        state = _state_of_files(checkpoint, checkpoint / STATE / DIGESTS)
        yield Checked(f"{name}/{checkpoint.parent.name}/{checkpoint.name}", state)
    if (artefact / FINAL).exists():  # a finished run
        yield Checked(f"{name}/{DIGESTS}", _state_of_files(artefact, artefact / DIGESTS, SEALED))
    held_out = artefact / HELD_OUT
    if held_out.is_dir():
        inner = _read(held_out)
        yield Checked(f"{name}/{HELD_OUT}", "DIFFERS" if inner is None else _state_of_artefact(inner, held_out))
    elif counts_of(record).get("held_out") and artefact.is_dir() and not record.get("part"):
        yield Checked(f"{name}/{HELD_OUT}", "not found")
    yield from _check_inputs(record, [*map(Path, directories), artefact.resolve().parent], artefact.resolve())


def is_whole(record: Record, directory: Path) -> bool:
    """Whether a directory with this record lacks no file, as far as is known without reading its tokens or weights."""
    if counts_of(record).get("held_out") and not (directory / HELD_OUT).is_dir():
        return False
    found = find_format(directory)
    if found is None or found[0].suffix == ".safetensors" or not isinstance(record.get("files"), str):
        return True
    try:
        return bool(files_digest(directory) == record["files"])
    except (LlmkitError, OSError):
        return False


def _read(path: Path) -> Record | None:
    try:
        return read_lineage(path)
    except LlmkitError:
        return None


def _state_of_artefact(record: Record, path: Path) -> str:
    """The state of an artefact by the digests in its record; those of earlier versions hold fewer."""
    path = final_model(path)
    complete = {"counts", "inputs"} <= record.keys() and is_well_formed(record)
    results = [is_intact(record), None if complete else False]
    try:
        verify(path)
        for key, compute in (("digest", content_digest), ("files", files_digest)):
            if key in record and (digest := compute(path)) is not None:
                results.append(digest == record[key])
        if isinstance(record.get(BYTES), str) and (file := file_of_record(path)):
            results.append(is_sealed_by(file, record[BYTES]))
    except (LlmkitError, OSError):
        results.append(False)
    if (path / STATE / DIGESTS).exists():
        results.append(_state_of_files(path, path / STATE / DIGESTS) == "ok")
    verified = any(results[2:])
    return "DIFFERS" if False in results else "ok" if verified else "unchecked"


def _state_of_files(directory: Path, digests: Path, names: Iterable[str] = CHECKPOINT_FILES) -> str:
    """The state of a directory by its list of digests, which holds what there is of `names`."""
    if not digests.exists():
        return "unchecked"
    try:
        stored = regular(digests).read_bytes()
        expected = json.loads(stored)
        intact = (
            isinstance(expected, dict)
            and json.dumps(expected, indent=1).encode() == stored
            and {*files_below(directory, names)} - {f"{STATE}/{DIGESTS}"} <= expected.keys()
            and all(digest_stored(str(_inside(directory, name))) == digest for name, digest in expected.items())
        )
    except (OSError, ValueError, RecursionError, LlmkitError):
        return "DIFFERS"
    return "ok" if intact else "DIFFERS"


def _inside(directory: Path, name: str) -> Path:
    """The path of a file that a list of digests names; LlmkitError where it leads out of the directory."""
    path = directory / name
    if not path.resolve().is_relative_to(directory.resolve()):
        raise LlmkitError(f"{path}: outside of its directory", "the list was not written by llmkit")
    return regular(path)


def _check_inputs(record: Record, directories: list[Path], artefact: Path) -> Iterator[Checked]:
    items: dict[tuple[str, str, str], Record] = {}

    def collect(node: Record, depth: int) -> None:
        for item in inputs_of(node):
            if item["name"] != STDIN:
                items.setdefault((item["name"], item["digest"], item["part"]), item)
            for inner in ([item["lineage"]] if item["lineage"] else []) + (item["runs"] or []):
                if depth < MAX_DEPTH:
                    collect(inner, depth + 1)

    collect(record, 0)
    digests: dict[str, set[str]] = {}
    for name, digest, _ in items:
        digests.setdefault(file_name(name), set()).add(digest)
    known = cache(_digest)
    places = [place for directory in directories for place in (directory, *_numbered(directory))]
    for item in items.values():
        name = item["part"] or item["name"]
        found = dict.fromkeys(
            path for path in _candidates(item, places) if os.path.exists(path) and not is_special(path)
        )
        # Nothing is made from itself: an input of the artefact's name is another file.
        candidates = [path for path in found if artefact not in (path.resolve(), *path.resolve().parents)]
        if item["role"] == INDEX:
            yield Checked(name, *_state_of_index(item, candidates))
            continue
        of_this_name = digests[file_name(item["name"])]
        same = [path for path in candidates if known(path) == item["digest"]]
        if not same:  # a command may have read an earlier checkpoint of a run
            checkpoints = [checkpoint for path in filter(is_run, candidates) for checkpoint in find_checkpoints(path)]
            same = [checkpoint for checkpoint in checkpoints if known(checkpoint) == item["digest"]]
        # A file with the digest of another input of its name is that one.
        differing = [path for path in candidates if known(path) not in of_this_name]
        state = "ok" if same else "DIFFERS" if differing else "not found"
        yield Checked(name, state, "".join(map(str, (same or differing)[:1])))


def _candidates(item: Record, places: list[Path]) -> Iterator[Path]:
    """The paths at which an input may be; a record must not lead outside the directories."""
    name = unescape_name(file_name(item["name"]))
    artefact, inside = map(unescape_name, place_of(item))
    for place in places:
        yield place / name
    for place in places if inside else []:
        yield place / artefact / inside


def _numbered(directory: Path) -> list[Path]:
    return sorted(path for path in directory.glob("[0-9]*") if path.name.isdigit() and path.is_dir())


def _state_of_index(item: Record, candidates: list[Path]) -> tuple[str, str]:
    """The state of an index, whose digest is that of the runs before; later runs may have been added since."""
    holds: Any = import_module(INDEX_MODULE).holds
    for path in candidates:
        return "ok" if holds(str(path), item["digest"]) else "DIFFERS", str(path)
    return "not found", ""


def _digest(path: Path) -> str:
    try:
        return digest_path(path)
    except (LlmkitError, OSError):
        return ""
