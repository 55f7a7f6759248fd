"""Every reader against mutated files, with a fixed seed; by hand, an hour of them: run.py."""

from __future__ import annotations

import base64

import pytest
from isolated import run
from readers import TARGETS, Target

SEED, CASES = 16, 400  # of a target with share 1


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_reader_survives_mutations(target: Target) -> None:
    """Property: a file, however damaged, is read or refused with LlmkitError, in bounded time and memory.

    The kept files are read first: intact ones without an error, and every earlier finding.
    """
    result = run(target, SEED, 0, max(30, round(CASES * target.share)))
    reports = [
        f"{key}\ncase {f.case}, {f.name}, base64: {base64.b64encode(f.data[:3000]).decode()}\n{f.detail}"
        for key, f in result.findings.items()
    ]
    assert not reports, "\n\n".join(reports)
