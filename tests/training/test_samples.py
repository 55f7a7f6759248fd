"""Samples and task scores at checkpoints, which change neither weights nor random state."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmkit.cli.main import run_command
from llmkit.errors import LlmkitError
from llmkit.training.metrics.log import read_metrics
from llmkit.training.metrics.samples import MAX_PROMPTS, MAX_TOKENS, PromptGallery, preserved_state, read_prompts


@pytest.fixture
def place(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with shards/, config.json, prompts.txt and a task in tasks/."""
    for entry in workplace.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    (tmp_path / "prompts.txt").write_text("the quick \n\nlazy\n")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "t.jsonl").write_text(
        json.dumps({"q": "the quick", "choices": ["brown", "dog"], "label": 0}) + "\n"
    )
    (tmp_path / "tasks" / "fox.yaml").write_text(
        f"task: fox\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path}/tasks/t.jsonl\n"
        'test_split: test\noutput_type: multiple_choice\ndoc_to_text: "{{q}}"\ndoc_to_choice: choices\n'
        "doc_to_target: label\nmetric_list:\n  - metric: acc\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(*more: str) -> int:
    return run_command("train", ["shards", "-m", "config.json", "--tokens", "4k", "--save-every", "3", "-q", *more])


def rows(run: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(run, "samples.jsonl").read_text().splitlines()]


def test_samples_and_scores_at_checkpoints(place: Path) -> None:
    """Behaviour: every prompt at every checkpoint, greedy and seeded.

    Scores in the log; the same weights as without them; repeated steps replace their samples.
    """
    tasks = ("--eval-tasks", "fox", "--include-path", "tasks")
    assert train("-o", "plain") == 0
    assert train("-o", "run", "--samples", "prompts.txt", *tasks) == 0
    weights = [Path(run, "final", "model.safetensors").read_bytes() for run in ("plain", "run")]
    assert weights[0] == weights[1]
    records = list(read_metrics("run/metrics.jsonl"))
    scored = [record["step"] for record in records if "eval/fox/acc" in record]
    assert scored == [3, 6, 8]
    assert {record["eval/fox/acc"] for record in records if record["step"] in scored} <= {0.0, 1.0}
    samples = rows("run")
    assert [(r["step"], r["prompt"]) for r in samples] == [
        (step, prompt) for step in (3, 6, 8) for _ in range(2) for prompt in ("the quick ", "lazy")
    ]
    assert {r["how"] for r in samples} == {"greedy", "temperature 0.8, seed 0"}
    assert all(isinstance(r["completion"], str) for r in samples)
    Path("run/samples.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in samples) + json.dumps({"step": 9}) + "\n"
    )
    from llmkit.model.pretrained.checkpoint import load_model

    model, info = load_model("run")
    prompts = read_prompts("prompts.txt", info.tokenizer_files)
    PromptGallery(Path("run/samples.jsonl"), prompts, info.tokenizer_files, info.stop_ids)(model, 8)
    assert rows("run") == samples  # the same completions for the same weights, replacing the earlier ones


def test_state_is_preserved(place: Path) -> None:
    """Property: random states and mode are restored, whatever the block does."""
    model = torch.nn.Linear(2, 2).train()
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    with preserved_state(model):
        assert not model.training
        random.random(), np.random.rand(), torch.rand(3)
    assert model.training
    assert random.getstate() == before[0]
    assert (np.random.get_state()[1] == before[1]).all()
    assert torch.equal(torch.get_rng_state(), before[2])


def test_diverged_model_does_not_end_the_run(place: Path, tokenizer_files: dict[str, str]) -> None:
    """Behaviour: non-finite logits are recorded as an error; a prompt longer than the context is cut at its front."""
    from tiny import CONFIG

    from llmkit.model.decoder import Decoder

    model = Decoder(CONFIG.with_vocabulary(280))
    model.initialize(0)
    (place / "long.txt").write_text("the lazy dog " * 50)
    act = PromptGallery(place / "s.jsonl", read_prompts(place / "long.txt", tokenizer_files), tokenizer_files, [0])
    act(model, 1)
    first = [json.loads(line) for line in (place / "s.jsonl").read_text().splitlines()]
    assert [len(r["completion"]) > 0 for r in first] == [True, True]
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    act(model, 2)
    last = [json.loads(line) for line in (place / "s.jsonl").read_text().splitlines()]
    assert last[:2] == first
    assert all("not finite" in r["error"] for r in last[2:])
    assert MAX_TOKENS < 100


def test_prompts(tmp_path: Path, tokenizer_files: dict[str, str]) -> None:
    """Behaviour: text and JSON lines; invalid, too many or missing prompts are reported."""
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a\\nb"}\n{"text": "c"}\n')
    assert [prompt.content for prompt in read_prompts(file, tokenizer_files)] == ["a\nb", "c"]
    for content, words in {
        b"": "0 prompts",
        b'{"prompt": 3}\n': "line 1",
        b'{"prompt": "a"}\n{"p\n': "line 2",
        b"\xff\n": "invalid UTF-8",
        b'{"prompt": "a"}\n' * (MAX_PROMPTS + 1): f"{MAX_PROMPTS + 1} prompts",
        b"a" * (2 << 20): "over 1 MiB",
    }.items():
        file.write_bytes(content)
        with pytest.raises(LlmkitError, match=words):
            read_prompts(file, tokenizer_files)
    with pytest.raises(LlmkitError, match="No such file"):
        read_prompts(tmp_path / "none", tokenizer_files)
