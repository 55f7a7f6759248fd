"""The whole pipeline on real text at tiny size: one pipe, its reproduction from lineage, equal bytes for any -j, and all
commands in the README and the help."""

from __future__ import annotations

import base64
import gzip
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import orjson
import pytest
import zstandard

from llmkit.cli.shared.table import COMMANDS, module_of
from llmkit.tokens.pretokenize import byte_alphabet

ROOT = Path(__file__).resolve().parents[1]
TINY_MODEL = {
    "model_type": "qwen3", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 16, "vocab_size": 512, "max_position_embeddings": 64, "tie_word_embeddings": True, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
}  # fmt: skip


def real_documents() -> list[dict[str, str]]:
    """Text available on every machine: the topics of Python's own documentation."""
    from pydoc_data.topics import topics

    return [{"id": name, "text": text, "source": "topics"} for name, text in sorted(topics.items())]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, preloaded: list[str]) -> Path:
    """A directory with the inputs named in the README. bin/ has a preloaded `llmkit` for the PATH, anew/bin/ a normal one."""
    directory = tmp_path_factory.mktemp("workspace")
    rows = real_documents()
    (directory / "docs.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    (directory / "heldout.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows[::20]))
    (directory / "curriculum.toml").write_text(
        '[sources]\nall = "shards"\ncode = "code"\n[[stage]]\nmix = { all = "x1" }\n[[stage]]\ntokens = "5k"\nmix = { all = 1, code = 2 }\n'
    )
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"What is {r['id']}?"},
                {"role": "assistant", "content": r["text"][:60]},
            ]
        }
        for r in rows
    ]
    (directory / "chat.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in chats))
    pairs = [
        {"prompt": f"What is {a['id']}?", "chosen": a["text"][:60], "rejected": b["text"][:60]}
        for a, b in zip(rows, reversed(rows), strict=True)
    ]
    (directory / "pairs.jsonl").write_bytes(
        b"".join(orjson.dumps(row) + b"\n" for row in pairs if row["chosen"] != row["rejected"])
    )
    noise = [{"text": " ".join(reversed(row["text"].split())), "label": "bad"} for row in rows]
    kinds = {"good": [{"text": row["text"], "label": "good"} for row in rows], "bad": noise}
    for name, chosen in (kinds | {"labelled": [*kinds["good"], *noise]}).items():
        (directory / f"{name}.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in chosen))
    (directory / "prompts.jsonl").write_bytes(b'{"prompt":"The "}\n{"prompt":"A "}\n')
    (directory / "tiny.json").write_text(json.dumps(TINY_MODEL))
    for parent, command in ((directory, preloaded), (directory / "anew", [sys.executable, "-m", "llmkit"])):
        (parent / "bin").mkdir(parents=True)
        (parent / "bin" / "llmkit").write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
        (parent / "bin" / "llmkit").chmod(0o755)
    (directory / "docs.jsonl.zst").write_bytes(zstandard.compress((directory / "docs.jsonl").read_bytes()))
    (directory / "page.html").write_text(f"<title>A page</title><p>{rows[0]['text']}")
    (directory / "crawl").mkdir()
    page = "HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n<title>A page</title><p>" + rows[0]["text"]
    head = "WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: http://a.example/\r\nWARC-Record-ID: <urn:uuid:1>\r\n"
    head += f"Content-Type: application/http; msgtype=response\r\nContent-Length: {len(page.encode())}\r\n\r\n"
    (directory / "crawl" / "a.warc.gz").write_bytes(gzip.compress(f"{head}{page}\r\n\r\n".encode()))
    shell("llmkit vocab docs.jsonl.zst --size 512 -o tok/ -q", directory)
    return directory


def shell(script: str, directory: Path, anew: bool = False) -> str:
    """Run a bash script with the `llmkit` under test first on the PATH; returns its stdout."""
    bin_directory = next(p / "bin" for p in (directory, *directory.parents) if (p / "bin" / "llmkit").exists())
    bin_directory = bin_directory.parent / "anew" / "bin" if anew else bin_directory
    environment = os.environ | {
        "PATH": f"{bin_directory}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "RAY_ADDRESS": "local",
    }
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=600,
    )
    assert result.returncode == 0, f"{script}\n{result.stderr}"
    return result.stdout


def shrunk(line: str) -> str:
    """A documented command with smaller sizes."""
    line = re.sub(r"--tokens \S+", "--tokens 3k", line)
    line = re.sub(r"--size \S+", "--size 512", line)
    line = re.sub(r"-m (tiny|\d+m|\S+config\.json)", "-m tiny.json", line)
    line = re.sub(r"--epochs \S+", "--epochs 1", line)
    return line + (" --max-tokens 4" if " generate " in line and "--max-tokens" not in line else "")


def test_one_pipe_and_its_lineage_run_again(workspace: Path) -> None:
    """Behaviour: documents to model in one pipe; the script from `lineage --script` reproduces the same bytes."""
    pipe = (
        "llmkit filter < docs.jsonl.zst | llmkit dedup | llmkit tokenize -t tok/ | llmkit mix - --tokens 20k"
        " | llmkit train - -m tiny.json --tokens 20k -o piped/"
    )
    shell(pipe, workspace, anew=True)
    script = shell("llmkit lineage piped/ --script | tee again.sh", workspace)
    assert script.count(" |\n") == 4
    assert 'llmkit filter - --preset gopher < "$IN"/docs.jsonl.zst |' in script  # the tokenizer's input is named
    shell("bash again.sh . rebuilt < /dev/null", workspace)
    assert (workspace / "rebuilt/piped/final/model.safetensors").read_bytes() == (
        workspace / "piped/final/model.safetensors"
    ).read_bytes()
    tree = shell("llmkit lineage piped/", workspace)
    assert [stage for stage in ("train", "mix", "tokenize", "dedup", "filter", "vocab") if f"<- {stage}" in tree] == [
        "train", "mix", "tokenize", "dedup", "filter", "vocab",
    ]  # fmt: skip
    assert shell("llmkit lineage piped/ --check", workspace).startswith("ok        piped\n")


def test_same_bytes_for_any_number_of_jobs(workspace: Path, tmp_path: Path) -> None:
    """Property: filter, dedup, tokenize and mix give the same bytes with -j 1 and -j 2."""
    rows = [row | {"id": f"{row['id']}-{n}"} for n in range(12) for row in real_documents()]  # several chunks
    (tmp_path / "many.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    for name in ("bin", "anew"):
        (tmp_path / name).symlink_to(workspace / name)
    (tmp_path / "tok").symlink_to(workspace / "tok")
    for jobs in (1, 2):
        out = f"out{jobs}"
        shell(
            f"mkdir {out}; llmkit filter many.jsonl -j {jobs} --rejects {out}/rejects.jsonl.zst -o {out}/clean.jsonl.zst;"
            f"llmkit dedup many.jsonl -j {jobs} --method minhash -o {out}/unique.jsonl.zst;"
            f"llmkit tokenize many.jsonl -t tok/ -j {jobs} -o {out}/shards/;"
            f"llmkit mix {out}/shards/ --tokens 100k -j {jobs} -o {out}/mix/",
            tmp_path,
            anew=True,
        )
    files = sorted(p.relative_to(tmp_path / "out1") for p in (tmp_path / "out1").rglob("*") if p.is_file())
    assert len(files) >= 5
    for name in files:
        assert (tmp_path / "out1" / name).read_bytes() == (tmp_path / "out2" / name).read_bytes(), name


def readme_commands() -> list[str]:
    """The llmkit lines of the README's bash blocks, without comments."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    joined = [re.sub(r"\|\n\s+", "| ", block) for block in blocks]  # a pipe may continue on the next line
    lines = [re.split(r"\s+#", line)[0].strip() for block in joined for line in block.splitlines()]
    return [line for line in lines if line.startswith("llmkit ")]


def test_readme_shows_every_command() -> None:
    """Property: the README shows each subcommand, and each name in its file tree exists."""
    shown = {" ".join(line.split()[1:end]) for line in readme_commands() for end in (2, 3)}
    assert shown >= set(COMMANDS)
    tree = re.search(r"## Files\s+```\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert tree
    stack: list[str] = []
    for line in tree.group(1).splitlines():
        entry = re.match(r"( *)(\S+)", line)
        if entry:
            stack = [*stack[: len(entry.group(1)) // 2], entry.group(2)]
            assert (ROOT / "".join(stack)).exists(), line


@pytest.fixture(scope="module")
def after_readme(workspace: Path, tmp_path_factory) -> Path:
    """A directory in which every llmkit line of the README has run, in order, at tiny size."""
    directory = tmp_path_factory.mktemp("readme") / "run"
    shutil.copytree(workspace, directory, ignore=shutil.ignore_patterns("piped", "rebuilt", "out*", "tok", "again.sh"))
    (directory / "gpt2").mkdir()  # vocabularies of other libraries: the bytes alone
    alphabet = byte_alphabet()
    vocabulary = {character: byte for byte, character in enumerate(alphabet)} | {alphabet[32] + "t": 256}
    (directory / "gpt2" / "vocab.json").write_text(json.dumps(vocabulary))
    (directory / "gpt2" / "merges.txt").write_text(f"#version: 0.2\n{alphabet[32]} t\n", encoding="utf-8")
    ranks = (base64.b64encode(bytes([byte])).decode() + f" {byte}\n" for byte in range(256))
    (directory / "ranks.tiktoken").write_text("".join(ranks))
    commands = readme_commands()
    needs_tokenizer = [line for line in commands if "piped/" in line]  # the single pipe comes first, but uses tok/
    for line in [line for line in commands if line not in needs_tokenizer] + needs_tokenizer:
        if " mix " in line and "code/" in line:  # the second source of the example
            shell("llmkit tokenize docs.jsonl -t tok/ -o code/ -q", directory)
        shell(shrunk(line), directory)
    shell("llmkit tokenize heldout.jsonl -t tok/ -o heldout/ -q", directory)
    (directory / "tasks").mkdir()
    (directory / "tasks" / "my_task.jsonl").write_text(
        json.dumps({"q": "What is 1?", "choices": ["one", "two"], "label": 0}) + "\n"
    )
    (directory / "tasks" / "my_task.yaml").write_text(
        f"task: my_task\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {directory}/tasks/my_task.jsonl\ntest_split: test\n"
        'output_type: multiple_choice\ndoc_to_text: "{{q}}"\ndoc_to_choice: choices\ndoc_to_target: label\nmetric_list:\n  - metric: acc\n'
    )
    return directory


def test_readme_commands_run(after_readme: Path) -> None:
    """Behaviour: every llmkit line of the README runs (in the fixture) and writes its output."""
    for line in readme_commands():
        if output := re.search(r" -o (\S+)", line):
            assert (after_readme / output.group(1)).exists(), line


def test_readme_python_runs(after_readme: Path) -> None:
    """Behaviour: the Python block of the README runs after its commands, at tiny size, and prints scores."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(blocks) == 1
    code = re.sub(r"=\d+_000", "=3_000", blocks[0]).replace('"tiny"', '"tiny.json"')
    result = subprocess.run([sys.executable, "-c", code], cwd=after_readme, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "'bits_per_byte'" in result.stdout


def examples() -> list[str]:
    return [line for name in COMMANDS for line in import_module(module_of(name)).main.llmkit["examples"]]


@pytest.mark.parametrize("line", examples())
def test_help_examples_run(after_readme: Path, line: str) -> None:
    """Behaviour: the examples in every command's help run after the README's commands."""
    line = shrunk(line)
    if " -o " in line and "--resume" not in line:
        line += " -f"
    shell(f"set +o pipefail; {line}", after_readme)
