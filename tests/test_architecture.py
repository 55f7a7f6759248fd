"""The structure that DESIGN rests on: who imports whom, what a command loads, how large files are."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "bench"))

from startup import HEAVY

from llmkit.cli.shared.table import COMMANDS

PACKAGE = ROOT / "llmkit"

LEAF = {"errors", "registry", "seeds"}
MAY_IMPORT = {
    "errors": set(),
    "registry": {"errors"},
    "seeds": set(),
    "io": LEAF,
    "kernels": set(),
    "engine": LEAF | {"io"},
    "corpus": LEAF | {"io", "engine", "kernels"},
    "tokens": LEAF | {"io", "engine", "kernels"},
    "model": LEAF | {"io", "kernels"},
    "training": LEAF | {"io", "model"},
    "alignment": LEAF | {"io", "model", "training"},
    "quantization": LEAF | {"io", "model", "training"},
    "evaluation": LEAF | {"io", "model", "training"},
    "planning": LEAF | {"io"},
    "report": LEAF | {"io"},
    "cli": LEAF | {"io", "engine", "kernels", "corpus", "tokens", "model", "training", "alignment", "quantization", "evaluation", "planning", "report"},
}  # fmt: skip


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_imports_follow_the_layers() -> None:
    """Property: no file imports a layer that it must not."""
    wrong = []
    for path in modules():
        layer = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if layer in ("__init__", "__main__"):
            continue
        for name in imported(path):
            parts = name.split(".")
            if parts[0] == "llmkit" and len(parts) > 1 and parts[1] != "__version__":
                target = parts[1]
                if target != layer and target not in MAY_IMPORT[layer]:
                    wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong, wrong


def test_text_layers_never_import_torch() -> None:
    """Property: corpus and tokens run where torch is slow to load or absent; transformers is for tests alone."""
    for path in modules():
        names = {name.split(".")[0] for name in imported(path)}
        layer = path.relative_to(PACKAGE).parts[0]
        if layer in ("io", "engine", "corpus", "tokens"):
            assert not names & {"torch", "accelerate", "lm_eval"}, path
        assert "transformers" not in names, path


@pytest.mark.parametrize("command", ["--help", "--version", *COMMANDS])
def test_help_loads_no_heavy_module(command: str) -> None:
    """Behaviour: the help of every command imports none of the heavy libraries."""
    arguments = [command] if command.startswith("-") else [command, "--help"]
    code = f"""
import sys
from llmkit.cli.main import main
try:
    main({arguments!r})
except SystemExit as end:
    assert not end.code, end.code
print("loaded:", sorted(set(sys.modules) & set({HEAVY!r})))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded: []"
    assert "llmkit" in done.stdout


def test_overview_needs_the_standard_library_only() -> None:
    """Behaviour: `llmkit --help` does not even load typer."""
    code = "import sys\nfrom llmkit.cli.main import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass\nprint('typer' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_file_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    """Property: a file over 450 lines is one thing too many; the report shows the largest and the total."""
    sizes = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in modules()}
    largest = sorted(sizes.items(), key=lambda item: -item[1])[:5]
    with capsys.disabled():
        print(
            f"\nllmkit/: {sum(sizes.values()):,} lines in {len(sizes)} files; largest "
            + ", ".join(f"{n} {s}" for n, s in largest)
        )
    assert not {name: size for name, size in sizes.items() if size > 450}


def test_top_level_holds_nothing_else() -> None:
    """Property: the checkout's top level is what the README's file tree shows."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    top = {line.split("/")[0] for line in tracked.stdout.splitlines()}
    allowed = {"pyproject.toml", "README.md", "LICENSE", "llmkit", "examples", "tests", "completions"}
    assert {name for name in top if not name.startswith(".")} <= allowed


def test_exact_keys_need_no_compiled_kernels(tmp_path: Path) -> None:
    """Behaviour: the one pass of `dedup --method exact` loads nothing that is slow to load."""
    (tmp_path / "docs.jsonl").write_bytes(b'{"text":"a"}\n{"text":"a"}\n')
    code = f"""
import sys
from llmkit.cli.main import run_command
assert run_command("dedup", ["docs.jsonl", "-o", "out.jsonl", "--method", "exact", "--no-counts", "-q"]) == 0
print(sorted(set(sys.modules) & set({HEAVY!r})))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout == "[]\n" and (tmp_path / "out.jsonl").read_bytes() == b'{"text":"a"}\n'
