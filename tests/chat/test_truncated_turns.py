"""`--too-long truncate-turns`: rows that are too long keep their first whole turns."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import orjson
import pytest

from llmkit.chat.encode import TRUNCATE_TURNS, encode_conversations, encode_preferences, fitting_rows, row_encoder
from llmkit.chat.templates import special_contents
from llmkit.errors import LlmkitError, UsageError
from llmkit.io.documents import DocumentReader, ReadOptions

WORDS = ["what", "is", "the", "weather", "like", "sunny", "today"]


def conversation(draw: random.Random, turns: int) -> list[dict[str, Any]]:
    def some(role: str, **more: Any) -> dict[str, Any]:
        return {"role": role, "content": " ".join(draw.choices(WORDS, k=draw.randint(1, 6)))} | more

    return [
        message
        for _ in range(turns)
        for message in (some("user"), some("assistant", **({"train": False} if draw.random() < 0.3 else {})))
    ]


def reader_of(path: Path, rows: list[Any]) -> DocumentReader:
    path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    return DocumentReader([str(path)], ReadOptions(text_key=None))


@pytest.mark.parametrize("name", ["chatml", "llama3", "tulu"])
def test_whole_turns_are_kept(templates: dict[str, dict[str, str]], name: str) -> None:
    """Property: what is kept is the most trained turns that fit, with the tokens and weights of the row that holds these
    turns alone, up to the last token that is trained."""
    files = templates[name]
    encode = row_encoder(files)
    draw = random.Random(1)
    kept = 0
    for _ in range(12):
        messages = conversation(draw, 5)
        messages[-1].pop("train", None)
        whole = encode({"messages": messages})[0]
        # The first turns alone, up to each trained answer: as many tokens as the last one that is trained needs.
        alone = [
            (row.tokens[:stop], row.weights[:stop])
            for i, message in enumerate(messages)
            if message["role"] == "assistant" and message.get("train") is not False
            for row in encode({"messages": messages[: i + 1]})
            for stop in [int(row.weights.nonzero()[0][-1]) + 1]
        ]
        for context in range(4, len(whole.tokens) + 2):
            fit = [row for row in alone if len(row[0]) <= context]
            cut = fitting_rows([whole], context, TRUNCATE_TURNS)
            assert bool(cut) == bool(fit)
            if len(whole.tokens) <= context:
                assert cut == [whole]
            elif fit:
                assert cut[0].tokens.tolist() == fit[-1][0].tolist()
                assert cut[0].weights.tolist() == fit[-1][1].tolist()
                kept += 1
    assert kept > 50


def test_counts_and_refusals(tmp_path: Path, templates: dict[str, dict[str, str]]) -> None:
    """Behaviour: a cut row ends with its stop token and counts as too long; one without a whole turn is dropped; what the
    template does not show of a cut row is counted; a pair has no turns to leave out."""
    files, path = templates["chatml"], tmp_path / "rows.jsonl"
    turns = [
        {"role": "user", "content": "what is"},
        {"role": "assistant", "content": "sunny", "reasoning_content": "hidden thought"},
    ]
    long = {"messages": [*turns, {"role": "user", "content": "today"}, {"role": "assistant", "content": "is " * 40}]}
    unfit = {"prompt": "what", "completion": "is " * 60}
    encoded = encode_conversations(reader_of(path, [long, unfit]), files, 40, too_long=TRUNCATE_TURNS, lossy=True)
    assert {name: encoded.counts[name] for name in ("rows", "too_long", "dropped")} == {
        "rows": 1, "too_long": 2, "dropped": 1
    }  # fmt: skip
    assert encoded.rows[0].tokens[-1] == special_contents(files)["<|im_end|>"] and encoded.rows[0].weights[-1] == 1
    assert encoded.lost.total() == 1
    with pytest.raises(LlmkitError, match="the cut leaves nothing to learn"):
        encode_conversations(reader_of(path, [unfit]), files, 40, too_long=TRUNCATE_TURNS)
    with pytest.raises(UsageError, match="--too-long truncate-turns is for sft"):
        encode_preferences(reader_of(path, []), files, 40, too_long=TRUNCATE_TURNS)
