"""llmkit in new environments: at its lowest and newest dependencies, as constrained for CI, and from its wheel alone.

    python tests/bench/install.py constrained --python python3.13 tests/io tests/shards
    python tests/bench/install.py lowest      # each direct dependency at its lower bound in pyproject.toml, torch apart
    python tests/bench/install.py newest      # without constraints; --freeze writes what passed to tests/constraints.txt
    python tests/bench/install.py wheel       # built, checked, installed without extras: every help page, the quickstart

Arguments after the mode are pytest's (default: the whole suite, half an hour). Installing takes three to ten minutes, the
quickstart at its smallest three. The environment, compiled kernels and outputs lie in a temporary directory, removed at
the end: 2 GB with a CPU build of torch, 8 GB with a CUDA one, which pip and uv take unless they are configured otherwise.
A failing command ends the script. Results: install.md.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from datetime import date
from pathlib import Path
from typing import Any

from peers import ROOT, environment_of

CONSTRAINTS = ROOT / "tests" / "constraints.txt"
EXTRAS = ("test", "web", "ray")  # as tests/run.sh installs
MODES = ("constrained", "lowest", "newest", "wheel")
OF_TORCH = ("nvidia-", "cuda-", "triton==")  # what a CUDA build of torch pins by itself, and others do not have


class Environment:
    """A new virtual environment in `directory`, whose commands run in `directory` and see no other source tree."""

    def __init__(self, python: str, directory: Path) -> None:
        self.directory, self.bin = directory, directory / "venv" / "bin"
        subprocess.run([python, "-m", "venv", directory / "venv"], check=True)
        outside = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "LLMKIT_"))}
        paths = {"PATH": f"{self.bin}:{os.environ['PATH']}", "NUMBA_CACHE_DIR": str(directory / "kernels")}
        self.variables = {**outside, **paths, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

    def run(self, program: str, *arguments: object, cwd: Path | None = None, **variables: str) -> None:
        """Run a program, of this environment if it has it. Exits if it fails."""
        command = [shutil.which(program, path=self.variables["PATH"]) or program, *map(str, arguments)]
        code = subprocess.run(command, cwd=cwd or self.directory, env=self.variables | variables).returncode
        if code:
            sys.exit(f"failed with exit status {code}: {program} {' '.join(map(str, arguments))}")

    def output(self, *arguments: object) -> str:
        command = [self.bin / "python", *map(str, arguments)]
        return subprocess.run(
            command, cwd=self.directory, env=self.variables, check=True, capture_output=True, text=True
        ).stdout

    def install(self, *arguments: object) -> None:
        """Install with uv, which takes a tenth of the time, or with pip where there is no uv."""
        pip = ("python", "-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check")
        uv = ("uv", "pip", "install", "--quiet", "--python", self.bin / "python")
        self.run(*(uv if shutil.which("uv") else pip), *arguments)

    def versions(self) -> list[str]:
        """`name==version` of everything installed, without llmkit and pip."""
        return self.output("-m", "pip", "freeze", "--all", "--exclude", "pip", "--exclude", "llmkit").splitlines()


def lower_bounds() -> dict[str, str]:
    """Name -> lower bound of each direct dependency, of the build and of the tested extras too."""
    settings: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project = settings["project"]
    extras = [line for extra in EXTRAS for line in project["optional-dependencies"][extra]]
    wanted = [*settings["build-system"]["requires"], *project["dependencies"], *extras]
    return dict(re.match(r"([\w-]+)>=([\w.]+)", line).groups() for line in wanted)  # type: ignore[union-attr]


def build(environment: Environment, *options: str) -> Path:
    """Build the wheel of this checkout."""
    environment.run("python", "-m", "pip", "wheel", "--quiet", "--no-deps", *options, "--wheel-dir", "dist", ROOT)
    (wheel,) = (environment.directory / "dist").glob("llmkit-*.whl")
    return wheel


def install(environment: Environment, mode: str) -> None:
    """Install the checkout with its test extras."""
    options: list[object] = []
    if mode == "lowest":
        bounds = {name: bound for name, bound in lower_bounds().items() if name != "torch"}
        environment.install(f"hatchling=={bounds['hatchling']}")
        build(environment, "--no-build-isolation")
        lowest = environment.directory / "lowest.txt"
        lowest.write_text("".join(f"{name}=={bound}\n" for name, bound in bounds.items()), encoding="utf-8")
        options = ["-c", lowest]
    elif mode == "constrained":
        options = ["-c", CONSTRAINTS]
    environment.install("--upgrade", "-e", f"{ROOT}[{','.join(EXTRAS)}]", *options)


def freeze(versions: list[str]) -> None:
    """Write the versions as constraints. Local versions are left out: other builds of the same release are accepted."""
    kept = [line.partition("+")[0] for line in versions if not line.startswith(OF_TORCH)]
    header = (
        "# Versions that the tests install, with Python 3.11. To renew: python tests/bench/install.py newest --freeze\n"
    )
    CONSTRAINTS.write_text(header + "".join(f"{line}\n" for line in kept), encoding="utf-8")


def use_wheel(environment: Environment) -> None:
    """Install the wheel alone, then read every help page and run the quickstart at its smallest."""
    wheel = build(environment)
    tools = Path(environment_of("wheel-checks", ["twine", "check-wheel-contents"])).parent
    environment.run(str(tools / "twine"), "check", "--strict", wheel)
    environment.run(str(tools / "check-wheel-contents"), wheel)
    environment.install(wheel)
    place = environment.output("-c", "import llmkit; print(llmkit.__file__)")
    assert place.startswith(str(environment.directory)), place
    environment.run("llmkit", "--version")
    names = environment.output("-c", "from llmkit.cli.shared.table import COMMANDS; print(*COMMANDS, sep='\\n')")
    for words in ([], *(name.split() for name in names.splitlines())):
        pages = ("--help", "--help-all") if words else ("--help",)
        for page in pages:
            assert "llmkit" in environment.output("-m", "llmkit", *words, page), (words, page)
    shutil.copytree(ROOT / "examples", environment.directory / "examples")
    (environment.directory / "venv" / ".llmkit-quickstart").touch()  # installed already
    places = {"LLMKIT_VENV": str(environment.directory / "venv"), "LLMKIT_WORK": str(environment.directory / "work")}
    environment.run("bash", "examples/quickstart.sh", LLMKIT_TINY="1", **places)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("--python", default=sys.executable, help="interpreter (default: the running one)")
    parser.add_argument("--freeze", action="store_true", help="newest: write the versions to tests/constraints.txt")
    given, tests = parser.parse_known_args()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="llmkit-install-") as directory:
        environment = Environment(given.python, Path(directory).resolve())
        if given.mode == "wheel":
            use_wheel(environment)
        else:
            install(environment, given.mode)
            print(f"installed in {time.monotonic() - begin:.0f} s", flush=True)
            in_order = ("-n", "2", "--dist", "loadfile", "--no-loadscope-reorder")
            environment.run("python", "-m", "pytest", "-q", *in_order, *(tests or ["tests"]), cwd=ROOT)
        version = environment.output("-c", "import platform; print(platform.python_version())").strip()
        versions = environment.versions()
        print(
            f"\n{date.today()}, {given.mode}, Python {version}, {time.monotonic() - begin:.0f} s: passed, with",
            *versions,
        )
        if given.freeze and given.mode == "newest":
            freeze(versions)


if __name__ == "__main__":
    main()
