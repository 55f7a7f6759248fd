"""Verification of an artefact and of the inputs in its record, by every digest that the record and the files hold.

Of the artefact: its content, its other files (`files`), the record itself, and where it is a directory of several
artefacts (the held-out documents of a mix, the checkpoints of a run) each of them. Of the inputs: the content.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from llmkit.errors import LlmkitError
from llmkit.io.inputs import STDIN
from llmkit.io.names import unescape_name
from llmkit.io.record import base_name
from llmkit.io.run_layout import STATE, final_model, find_checkpoints
from llmkit.lineage.fields import MAX_DEPTH, Record, counts_of, file_name, inputs_of, is_intact, place_of
from llmkit.lineage.formats import content_digest, digest_path, files_digest, read_lineage, verify

HELD_OUT = "heldout"
DIGESTS = "digests.json"  # of a checkpoint: the digest of every file, in its state/


def check(record: Record, path: str, directories: list[str]) -> Iterator[tuple[str, str]]:
    """(name, "ok" | "DIFFERS" | "not found" | "unchecked") of the artefact, its parts, and each input in its record.

    Inputs are looked for in `directories` and in that of the artefact, also in the numbered directories where a
    script finds a second original of one name.
    """
    name, artefact = base_name(path), Path(path)
    yield name, _state_of_artefact(record, artefact)
    for checkpoint in find_checkpoints(artefact):
        yield f"{name}/{checkpoint.parent.name}/{checkpoint.name}", _state_of_checkpoint(checkpoint)
    held_out = artefact / HELD_OUT
    if held_out.is_dir():
        inner = _read(held_out)
        yield f"{name}/{HELD_OUT}", "DIFFERS" if inner is None else _state_of_artefact(inner, held_out)
    elif counts_of(record).get("held_out") and artefact.is_dir() and not record.get("part"):
        yield f"{name}/{HELD_OUT}", "not found"
    yield from _check_inputs(record, [*map(Path, directories), artefact.resolve().parent])


def _read(path: Path) -> Record | None:
    try:
        return read_lineage(path)
    except LlmkitError:
        return None


def _state_of_artefact(record: Record, path: Path) -> str:
    """The state of an artefact by the digests in its record; those of earlier versions hold fewer."""
    path = final_model(path)
    results = [is_intact(record), None if {"counts", "inputs"} <= record.keys() else False]
    try:
        verify(path)
        for key, compute in (("digest", content_digest), ("files", files_digest)):
            if isinstance(record.get(key), str) and (digest := compute(path)) is not None:
                results.append(digest == record[key])
    except LlmkitError:
        results.append(False)
    if (path / STATE / DIGESTS).is_file():
        results.append(_state_of_checkpoint(path) == "ok")
    verified = any(results[2:])
    return "DIFFERS" if False in results else "ok" if verified else "unchecked"


def _state_of_checkpoint(checkpoint: Path) -> str:
    """The state of a checkpoint by the list of digests that was written with it."""
    try:
        expected = json.loads((checkpoint / STATE / DIGESTS).read_bytes())
        intact = isinstance(expected, dict) and all(
            ".." not in Path(name).parts and digest_path(checkpoint / name) == digest
            for name, digest in expected.items()
        )
    except FileNotFoundError:
        return "unchecked"
    except (OSError, ValueError, RecursionError, LlmkitError):
        return "DIFFERS"
    return "ok" if intact else "DIFFERS"


def _check_inputs(record: Record, directories: list[Path]) -> Iterator[tuple[str, str]]:
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
    known: dict[Path, str] = {}
    for item in items.values():
        is_index = item["role"] == "index"  # its digest is that of the runs before, not of the file
        others = digests[file_name(item["name"])] - {item["digest"]}
        yield item["part"] or item["name"], "unchecked" if is_index else _state(item, directories, others, known)


def _state(item: Record, directories: list[Path], others: set[str], known: dict[Path, str]) -> str:
    """The state of an input. A file with the digest of another input of its name (`others`) is that one."""
    name = unescape_name(file_name(item["name"]))  # a record must not lead outside the directories
    candidates = [candidate for directory in directories for candidate in _candidates(directory, name)]
    artefact, inside = map(unescape_name, place_of(item))
    if inside:
        candidates += [c / inside for directory in directories for c in _candidates(directory, artefact)]
    differing = 0
    for candidate in dict.fromkeys(filter(Path.exists, candidates)):
        if candidate not in known:
            known[candidate] = _digest(candidate)
        if known[candidate] == item["digest"]:
            return "ok"
        differing += known[candidate] not in others
    return "DIFFERS" if differing else "not found"


def _candidates(directory: Path, name: str) -> list[Path]:
    numbered = sorted(path for path in directory.glob("[0-9]*") if path.name.isdigit() and path.is_dir())
    return [place / name for place in (directory, *numbered)]


def _digest(path: Path) -> str:
    try:
        return digest_path(path)
    except (LlmkitError, OSError):
        return ""
