"""Who a tokenizer is, and which token ends a document."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmkit.errors import LlmkitError
from llmkit.shards import tokenizer_info as tokenizers
from llmkit.shards.reader import load_tokenizer_info
from llmkit.shards.tokenizer_info import parse_tokenizer


def files(
    config: dict[str, object] | None = None,
    tokens: tuple[str, ...] = ("a", "b", "ab", "<|endoftext|>"),
    **model: object,
) -> dict[str, str]:
    added = [{"id": i, "content": t, "special": True} for i, t in enumerate(tokens) if t.startswith("<")]
    content = {
        "model": {"type": "BPE", "vocab": {t: i for i, t in enumerate(tokens)}, "merges": [["a", "b"]]} | model,
        "added_tokens": added,
    }
    return {"tokenizer.json": json.dumps(content), "tokenizer_config.json": json.dumps(config or {})}


def test_identity_is_what_decides_the_ids() -> None:
    """Property: layout, spelling of merges, chat template and padding do not count; vocabulary, merges and pre-tokenizer do."""
    first = parse_tokenizer(files(), "tok")
    content = json.loads(files()["tokenizer.json"])
    content["padding"] = {"strategy": "BatchLongest"}
    content["model"]["merges"] = ["a b"]
    again = {
        "tokenizer.json": json.dumps(content, indent=3, sort_keys=True),
        "tokenizer_config.json": '{"chat_template": "x"}',
    }
    assert parse_tokenizer(again, "tok").digest == first.digest
    assert parse_tokenizer(files(merges=[]), "tok").digest != first.digest
    assert parse_tokenizer(files(tokens=("b", "a", "ab", "<|endoftext|>")), "tok").digest != first.digest
    content["pre_tokenizer"] = {"type": "Whitespace"}
    assert parse_tokenizer({"tokenizer.json": json.dumps(content)}, "tok").digest != first.digest


def test_ids_of_special_tokens() -> None:
    """Behaviour: eos_token ends a document, unless it ends a turn and the vocabulary has an end of text; sizes count added tokens."""
    chat = ("a", "b", "ab", "<|endoftext|>", "<|im_end|>", "<|pad|>", "<s>")
    info = parse_tokenizer(
        files({"eos_token": "<|im_end|>", "pad_token": {"content": "<|pad|>"}, "bos_token": "<s>"}, chat), "tok"
    )
    assert (info.eos_id, info.pad_id, info.bos_id, info.vocab_size) == (3, 5, 6, 7)
    assert parse_tokenizer(files({"eos_token": "<|im_end|>"}, ("a", "b", "ab", "<|im_end|>")), "tok").eos_id == 3
    assert parse_tokenizer(files({"eos_token": "ab"}), "tok").eos_id == 2
    made = files(None, ("a", "b", "ab", "[X]"))
    with pytest.raises(LlmkitError, match="no end-of-text"):
        parse_tokenizer(made, "tok")
    made["special_tokens_map.json"] = '{"eos_token": "[X]"}'
    assert parse_tokenizer(made, "tok").eos_id == 3


def test_ids_of_added_tokens() -> None:
    """Parity with `tokenizers`, which numbers added tokens itself where a file says something else."""
    from tokenizers import Tokenizer

    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    for names in (("<|endoftext|>", "<x>"), ("a", "<|endoftext|>"), ("<x>", "<x>", "ab", "<|endoftext|>")):
        made = files(tokens=("a", "b", "ab"))
        content = json.loads(made["tokenizer.json"])
        content["model"]["vocab"]["ab"] = 7  # a gap
        content["added_tokens"] = [{"id": 40 - i, "content": name, **flags} for i, name in enumerate(names)]
        made["tokenizer.json"] = json.dumps(content)
        library = Tokenizer.from_str(made["tokenizer.json"]).get_vocab(with_added_tokens=True)
        info = parse_tokenizer(made, "tok")
        assert (info.eos_id, info.vocab_size) == (library["<|endoftext|>"], max(library.values()) + 1)


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "{}", '{"model": []}', '{"model": {"type": "BPE", "vocab": 3}}', '{"model": {"type": "BPE", "vocab": {}}}',
        '{"model": {"type": "BPE", "vocab": {"a": "b"}}}', '{"model": {"type": "BPE", "vocab": {"a": -1}}}',
        '{"model": {"type": "Unigram", "vocab": [3]}}', '{"model": {"type": "BPE", "vocab": {"a": 0}}, "added_tokens": [7]}',
        '{"model": {"type": "Mystery", "vocab": {"a": 0}}}', '{"model": {"type": "BPE", "vocab": {"a": 99999999999999}}}', "[" * 100_000,
    ],
)  # fmt: skip
def test_malformed_files(text: str) -> None:
    """Behaviour: one clear error that names the file, for any content."""
    with pytest.raises(LlmkitError, match=r"here.*tokenizer"):
        parse_tokenizer({"tokenizer.json": text}, "here")


def test_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behaviour: a directory, a run with final/, the file itself; missing, huge or undecodable ones are refused by name."""
    for name, text in files().items():
        (tmp_path / name).write_text(text)
    info = load_tokenizer_info(tmp_path)
    assert set(info.files) == {"tokenizer.json", "tokenizer_config.json"}
    assert load_tokenizer_info(tmp_path / "tokenizer.json").digest == info.digest
    run = tmp_path / "run"
    run.mkdir()
    (run / "final").symlink_to(tmp_path)
    assert load_tokenizer_info(run) == info
    for place in (tmp_path / "nowhere", tmp_path / "nowhere.json"):
        with pytest.raises(LlmkitError, match="no such tokenizer"):
            load_tokenizer_info(place)
    (tmp_path / "empty").mkdir()
    with pytest.raises(LlmkitError, match=r"no tokenizer\.json"):
        load_tokenizer_info(tmp_path / "empty")
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(LlmkitError, match=r"chat_template\.jinja: invalid UTF-8"):
        load_tokenizer_info(tmp_path)
    monkeypatch.setattr(tokenizers, "MAX_FILE_BYTES", 10)
    with pytest.raises(LlmkitError, match="over"):
        load_tokenizer_info(tmp_path)
