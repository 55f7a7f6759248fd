"""The structure of the package: import order, modules loaded by each command, sizes of files and folders."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "bench"))

from startup import HEAVY

from llmkit.cli.shared.table import COMMANDS

PACKAGE = ROOT / "llmkit"
# A room (a folder or file of llmkit/) may import only rooms in the rows above its own.
IMPORT_ORDER = (
    "errors",
    "registry seeds options memory",
    "kernels io",
    "lineage",
    "engine shards",
    "corpus tokens",
    "mixing",
    "model",
    "chat quantization",
    "inference",
    "training",
    "merging alignment evaluation",
    "planning report",
    "cli",
)
WITHOUT_TORCH = (
    "errors registry seeds options memory kernels io lineage engine shards corpus tokens mixing planning report".split()
)
MOST_LINES = 450
MOST_FILES = 14
MOST_COLUMNS = 120
ONE_FILE_PER_ENTRY = {PACKAGE / "corpus" / "filters", PACKAGE / "model" / "families"}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(path: Path) -> set[str]:
    """Every module or name that a file imports, including lazily and for type checking."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def import_graph() -> dict[str, set[str]]:
    """Module -> modules of the package that it imports."""
    paths = {module_name(path): path for path in modules()}

    def module_of_name(name: str) -> str:
        return name if name in paths else module_of_name(name.rpartition(".")[0]) if name else ""

    graph = {name: {module_of_name(target) for target in imported(path)} for name, path in paths.items()}
    return {name: targets - {name, "", "llmkit"} for name, targets in graph.items()}


def test_imports_follow_the_order_of_rooms() -> None:
    """Property: no file imports another room of its own row or a row below, lazily or not."""
    level = {room: i for i, rooms in enumerate(IMPORT_ORDER) for room in rooms.split()}
    violations = []
    for name, targets in import_graph().items():
        room = name.split(".")[1] if "." in name else "__main__"
        for target in targets:
            other = target.split(".")[1]
            if room not in ("__main__", other) and level[other] >= level[room]:
                violations.append(f"{name} imports {target}")
    assert not violations, violations


def test_no_import_cycles() -> None:
    """Property: no cycle of imports between files, including lazy imports and those for type checking."""
    try:
        graphlib.TopologicalSorter(import_graph()).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_text_rooms_never_import_torch() -> None:
    """Property: text and token stages never load torch, which may be slow or absent; only tests use transformers."""
    for path in modules():
        names = {name.split(".")[0] for name in imported(path)}
        if path.relative_to(PACKAGE).parts[0].removesuffix(".py") in WITHOUT_TORCH:
            assert not names & {"torch", "accelerate", "lm_eval"}, path
        assert "transformers" not in names, path


@pytest.mark.parametrize("command", ["--help", "--version", *COMMANDS])
def test_help_loads_no_heavy_module(command: str) -> None:
    """Behaviour: the help of every command loads none of the heavy libraries."""
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
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "loaded: []"
    assert "llmkit" in result.stdout


def test_overview_needs_only_the_standard_library() -> None:
    """Behaviour: `llmkit --help` does not even load typer."""
    code = "import sys\nfrom llmkit.cli.main import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass\nprint('typer' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "False"


def test_file_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    """Property: no file over 450 lines, which would hold more than one subject; prints the largest files and the total."""
    sizes = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in modules()}
    largest = sorted(sizes.items(), key=lambda item: -item[1])[:5]
    with capsys.disabled():
        print(
            f"\nllmkit/: {sum(sizes.values()):,} lines in {len(sizes)} files; largest "
            + ", ".join(f"{n} {s}" for n, s in largest)
        )
    assert not {name: size for name, size in sizes.items() if size > MOST_LINES}


def test_line_widths() -> None:
    """Property: lines of llmkit/ have at most 120 columns, those that the formatter leaves alone included."""
    lines = ((path, i, line) for path in modules() for i, line in enumerate(path.read_text().splitlines(), 1))
    wide = [f"{path.relative_to(ROOT)}:{i}" for path, i, line in lines if len(line) > MOST_COLUMNS]
    assert not wide, f"{len(wide)} lines: {wide[:20]}"


def test_folder_sizes() -> None:
    """Property: no folder of more than 14 files, which would hold more than one subject."""
    folders = {path.parent for path in modules()} - ONE_FILE_PER_ENTRY
    sizes = {str(folder.relative_to(ROOT)): len(list(folder.glob("*.py"))) - 1 for folder in folders}  # __init__.py
    assert not {name: size for name, size in sizes.items() if size > MOST_FILES}


def test_top_level_holds_nothing_else() -> None:
    """Property: the top level of the checkout matches the README's file tree."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    top = {line.split("/")[0] for line in tracked.stdout.splitlines()}
    allowed = {"pyproject.toml", "README.md", "LICENSE", "llmkit", "examples", "tests", "completions"}
    assert {name for name in top if not name.startswith(".")} <= allowed


def test_exact_keys_need_no_compiled_kernels(tmp_path: Path) -> None:
    """Behaviour: single-pass `dedup --method exact` loads none of the heavy libraries."""
    (tmp_path / "docs.jsonl").write_bytes(b'{"text":"a"}\n{"text":"a"}\n')
    code = f"""
import sys
from llmkit.cli.main import run_command
assert run_command("dedup", ["docs.jsonl", "-o", "out.jsonl", "--method", "exact", "--no-counts", "-q"]) == 0
print(sorted(set(sys.modules) & set({HEAVY!r})))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert result.stdout == "[]\n" and (tmp_path / "out.jsonl").read_bytes() == b'{"text":"a"}\n'


def test_text_files_are_utf8() -> None:
    """Property: every text file is opened with its encoding named, which otherwise depends on the locale."""
    unnamed = []
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or any(word.arg == "encoding" for word in node.keywords):
                continue
            name = ast.unparse(node.func)
            binary = any(isinstance(mode, ast.Constant) and "b" in str(mode.value) for mode in node.args[1:2])
            text = any(word.arg == "text" and word.value.__dict__.get("value") is True for word in node.keywords)
            reads = name.endswith((".read_text", ".write_text")) and not name.startswith("formatter.")
            if reads or (name in ("open", "os.fdopen") and not binary) or (name.startswith("subprocess.") and text):
                unnamed.append(f"{path.relative_to(ROOT)}:{node.lineno}: {name}")
    assert not unnamed, unnamed
