"""Rows, options and files that would silently train something else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llmkit.chat.encode import row_encoder
from llmkit.chat.messages import RowError, turn
from llmkit.chat.templates import CHATML, special_contents, with_template
from llmkit.cli.main import run_command
from llmkit.model.resize import rows_for


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"train": "false"}, "train 'false' is neither true nor false"),
        ({"train": 0}, "train 0 is neither true nor false"),
        ({"weight": 1e-20}, "weight 1e-20 is neither 0 nor a number"),
        ({"weight": 10**400}, "weight 1000"),
        ({"reasoning_content": 5}, "reasoning_content is not a string"),
    ],
)
def test_messages_that_do_not_mean_what_they_say(files: dict[str, str], extra: dict[str, Any], message: str) -> None:
    """Behaviour: a short error that names the message and its field."""
    encode = row_encoder(with_template(files, CHATML))
    with pytest.raises(RowError, match=message) as error:
        encode({"messages": [turn("user", "what"), turn("assistant", "is") | extra]})
    assert "messages[1]" in str(error.value) and len(str(error.value)) < 200
    with pytest.raises(RowError, match="'tools' is not a list of objects"):
        encode({"messages": [turn("user", "what"), turn("assistant", "is")], "tools": [1]})


def test_fields_of_messages_that_nothing_reads(files: dict[str, str]) -> None:
    """Behaviour: reported as those of rows are, unless the chat template names them."""
    row = {"messages": [turn("user", "what") | {"mood": "good"}, turn("assistant", "is") | {"weigth": 0}]}
    assert row_encoder(with_template(files, CHATML))(row).unused == ["messages.mood", "messages.weigth"]
    reading = CHATML + "{# message.mood #}"
    assert row_encoder(with_template(files, reading))(row).unused == ["messages.weigth"]


@pytest.mark.parametrize(
    "arguments", [["chat.jsonl", "--epochs", "99999999999"], ["chat.jsonl:0.3", "--epochs", "999999999"]]
)
def test_too_many_epochs(directory: Path, capfd: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    """Behaviour: refused before anything of that size is made."""
    assert run_command("sft", ["base", *arguments, "-n", "-o", "x"]) == 2
    assert "epochs: more than 67,108,864 rows" in capfd.readouterr().err


def test_new_tokens_spelled_by_tokens_without_rows() -> None:
    """Behaviour: such a token starts as the mean of all rows."""
    old = torch.arange(8.0).view(4, 2)
    rows = rows_for(old, 4, [[0, 2], [1, 4]], 6)
    assert rows[4:].tolist() == [[2.0, 3.0], [3.0, 4.0]]


def test_ids_are_those_of_the_tokenizer(files: dict[str, str]) -> None:
    """Behaviour: a token that is listed a second time with another id keeps the one that the tokenizer gives it."""
    content = json.loads(files["tokenizer.json"])
    token = next(item for item in content["added_tokens"] if item["content"] == "<|im_end|>")
    content["added_tokens"].append(token | {"id": 3_000_000})
    twice = files | {"tokenizer.json": json.dumps(content)}
    assert special_contents(twice)["<|im_end|>"] == token["id"]


def test_a_tokenizer_that_does_not_fit_the_merged_model(directory: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Behaviour: adapters that lack the rows of their tokenizer's new tokens are not merged."""
    options = ["chat.jsonl", "--lora", "2", "--chat-template", "gemma", "-b", "64", "-q"]
    assert run_command("sft", ["base", *options, "-o", "adapter"]) == 0
    path = directory / "adapter" / "final" / "adapter_config.json"
    config = json.loads(path.read_text())
    indices = config["trainable_token_indices"]
    assert len(indices) == 1
    ((name, ids),) = indices.items()
    path.write_text(json.dumps(config | {"trainable_token_indices": {name: list(range(5, 5 + len(ids)))}}))
    assert run_command("average", ["adapter", "--merge-adapter", "-q", "-o", "merged"]) == 1
    assert "its tokenizer has token id" in capfd.readouterr().err
    assert not Path("merged").exists()


def test_links_in_a_cache_are_not_followed(directory: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Behaviour: a link in the place of an entry gets no chunk, and the run goes on."""

    def call(output: str) -> int:
        return run_command("sft", ["base", "chat.jsonl", "--row-cache", "c", "-b", "64", "-o", output])

    assert call("first") == 0
    (entry,) = (directory / "c").iterdir()
    target = directory / "elsewhere"
    target.mkdir()
    for chunk in entry.iterdir():
        chunk.unlink()
    entry.rmdir()
    entry.symlink_to(target)
    assert call("second") == 0
    assert "is a link, which is not followed" in capfd.readouterr().err
    assert not list(target.iterdir())
