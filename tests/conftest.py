"""Fixtures shared by the whole suite."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from small_tokenizer import small_tokenizer_files

from llmkit.memory import set_budget

settings.register_profile("repeatable", derandomize=True)  # the same examples in every run
settings.load_profile("repeatable")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A suite that a script starts in the background inherits an ignored SIGINT, and so would every process it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # likewise, under nohup

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _default_budget() -> Iterator[None]:
    """A command that a test runs in its own process leaves no --memory for the next test."""
    yield
    set_budget(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Directory of real test data beside the checkout; tests that need it are skipped if it is absent."""
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip("the shared test data is not beside this checkout")
    return path


REAL = [sys.executable, "-m", "llmkit"]


@contextmanager
def serving(directory: Path, *what: str) -> Iterator[list[str]]:
    """The command for calling llmkit without the seconds that imports take; see preloaded.py."""
    socket_path, script = directory / "socket", str(ROOT / "tests" / "preloaded.py")
    with subprocess.Popen(
        [sys.executable, "-P", script, "serve", socket_path, *what], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as server:
        assert server.stdout and server.stdout.readline() == b"ready\n"
        yield [sys.executable, "-IS", script, str(socket_path)]
        server.terminate()


def as_programs(directory: Path, llmkit: list[str]) -> Path:
    """A directory for the PATH, with the command `llmkit`, and `python`."""
    for name, command in (("llmkit", llmkit), ("python", [sys.executable])):
        (directory / name).write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
        (directory / name).chmod(0o755)
    return directory


@pytest.fixture(scope="session")
def preloaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """The command of a server that has imported everything."""
    with serving(tmp_path_factory.mktemp("preloaded")) as command:
        yield command


@pytest.fixture(scope="session")
def preloaded_bin(preloaded: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for the PATH, with a preloaded `llmkit`, and `python`."""
    return as_programs(tmp_path_factory.mktemp("preloaded-bin"), preloaded)


@pytest.fixture
def preloaded_text_bin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Like `preloaded_bin`, and ready sooner: the server has imported nothing that needs torch."""
    directory = tmp_path_factory.mktemp("preloaded-text")
    with serving(directory, "text") as command:
        yield as_programs(directory, command)


def caller(command: list[str]) -> Callable[..., subprocess.CompletedProcess[bytes]]:
    """A function that runs a command with more arguments and captures stdout and stderr."""

    def call(
        *arguments: str, stdin: bytes = b"", cwd: Path | None = None, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[bytes]:
        environment = os.environ | (env or {})
        return subprocess.run(
            [*command, *arguments], input=stdin, capture_output=True, cwd=cwd, env=environment, timeout=300
        )

    return call


@pytest.fixture(scope="session")
def llmkit(preloaded: list[str]) -> Callable[..., subprocess.CompletedProcess[bytes]]:
    """The command line as a function: `llmkit("filter", "docs.jsonl", cwd=tmp_path)`, in its own process."""
    return caller(preloaded)


@pytest.fixture(scope="session")
def llmkit_anew() -> Callable[..., subprocess.CompletedProcess[bytes]]:
    """Like `llmkit`, but through `python -m llmkit`, for tests of the start itself."""
    return caller(REAL)


@pytest.fixture
def llmkit_here(
    capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., subprocess.CompletedProcess[bytes]]:
    """Like `llmkit`, but inside the test's process, which avoids importing torch for each of many calls."""
    import io
    import signal

    from llmkit.cli.main import run_command

    def call(
        name: str, *arguments: str, stdin: bytes = b"", cwd: Path | None = None
    ) -> subprocess.CompletedProcess[bytes]:
        before = signal.getsignal(signal.SIGTERM)
        capfdbinary.readouterr()
        with monkeypatch.context() as patch:
            if cwd is not None:
                patch.chdir(cwd)
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
            try:
                code = run_command(name, list(arguments))
            finally:
                signal.signal(signal.SIGTERM, before)
        out, err = capfdbinary.readouterr()
        return subprocess.CompletedProcess([name, *arguments], int(code), out, err)

    return call


@pytest.fixture(scope="session")
def small_tokenizer() -> dict[str, str]:
    """Files of a byte-level BPE tokenizer with 299 ids and chat tokens, by name."""
    return small_tokenizer_files()


@pytest.fixture(scope="session")
def make_model(small_tokenizer: dict[str, str]) -> Callable[..., Path]:
    """Writes a random model of 60,000 parameters: `make_model(path, seed=1, architecture="llama", dtype=torch.bfloat16)`."""

    def make(path: Path, seed: int = 0, dtype: Any = None, tokenizer: bool = True, **changes: Any) -> Path:
        import torch

        from llmkit.model.config import ModelConfig
        from llmkit.model.decoder import Decoder
        from llmkit.model.pretrained.checkpoint import save_model

        sizes: dict[str, Any] = {
            "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "eos_token_id": 0, "initializer_range": 0.3,
        }  # fmt: skip
        model = Decoder(ModelConfig(**(sizes | changes)))
        model.initialize(seed)
        with torch.no_grad():  # nonzero norms and biases, so that omitting one changes the output
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
        path.mkdir(parents=True)
        save_model(
            path, model.state_dict(), model.config, small_tokenizer if tokenizer else {}, None, dtype, stop_ids=[0, 2]
        )
        return path

    return make


@pytest.fixture(scope="session")
def write_shards(small_tokenizer: dict[str, str]) -> Callable[..., Path]:
    """Write token shards of random documents: `write_shards(path, lengths, source="web")`; ids are `web-0`, `web-1`, ..."""

    def write(path: Path, lengths: list[int], source: str = "web", tokenizer: Any = None, **options: Any) -> Path:
        import numpy as np

        from llmkit.io.record import Lineage
        from llmkit.shards.tokenizer_info import parse_tokenizer
        from llmkit.shards.writer import ShardWriter

        info = tokenizer or parse_tokenizer(small_tokenizer, "small")
        random = np.random.default_rng(len(lengths) + len(source))
        with ShardWriter(str(path), info, Lineage("tokenize", {"source": source}), **options) as writer:
            for i, length in enumerate(lengths):
                writer.write(random.integers(0, info.vocab_size, length), f"{source}-{i}", source)
            writer.finish({"documents": len(lengths)}, [])
        return path

    return write
