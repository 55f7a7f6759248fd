"""Models with rows for new tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llmkit.errors import LlmkitError
from llmkit.model.pretrained.checkpoint import load_info, load_model
from llmkit.model.resize import check_match, write_resized
from llmkit.shards.tokenizer_info import parse_tokenizer

PIECES = [[5, 6, 7], [8, 8], []]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_old_logits_stay(make_model: Callable[..., Path], tmp_path: Path, tied: bool, dtype: torch.dtype) -> None:
    """Property: for old ids, logits are equal to the bit; new rows are means. Parity: transformers agrees."""
    from transformers import AutoModelForCausalLM

    old_path = make_model(tmp_path / "old", tie_word_embeddings=tied, dtype=dtype, tokenizer=False, vocab_size=320)
    (tmp_path / "new").mkdir()
    assert write_resized(load_info(old_path), 320, PIECES, tmp_path / "new", {}, None) == 323
    (old, _), (new, info) = load_model(old_path), load_model(tmp_path / "new")
    assert (info.config.vocab_size, info.config.tie_word_embeddings, info.stop_ids) == (323, tied, [0, 2])
    before, after = old.state_dict(), new.state_dict()
    for name in before:
        rows = after[name][: len(before[name])]
        assert torch.equal(rows, before[name]), name
    for name in ("model.embed_tokens.weight",) if tied else ("model.embed_tokens.weight", "lm_head.weight"):
        for i, ids in enumerate(PIECES, 320):
            mean = before[name][ids or slice(None)].float().mean(0).to(dtype)
            assert torch.equal(after[name][i], mean)
    ids = torch.randint(0, 320, (2, 33), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = new(ids)
        assert torch.equal(ours[..., :320], old(ids))
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "new", dtype=dtype)(ids).logits
        theirs_old = AutoModelForCausalLM.from_pretrained(old_path, dtype=dtype)(ids).logits
    assert torch.equal(theirs[..., :320], theirs_old)
    assert torch.allclose(theirs.float(), ours.float(), atol=1e-4 if dtype == torch.float32 else 0.3)


def test_rows_beyond_the_tokenizer_are_used_first(make_model: Callable[..., Path], tmp_path: Path) -> None:
    """Behaviour: rows beyond the tokenizer are used before the model grows, and it never shrinks."""
    path = make_model(tmp_path / "old", vocab_size=384, tokenizer=False)
    (tmp_path / "new").mkdir()
    assert write_resized(load_info(path), 300, PIECES, tmp_path / "new", {}) == 384
    old, new = (
        load_model(path)[0].state_dict()["model.embed_tokens.weight"],
        load_model(tmp_path / "new")[0].state_dict()["model.embed_tokens.weight"],
    )
    assert torch.equal(new[:300], old[:300]) and torch.equal(new[303:], old[303:])
    assert torch.equal(new[302], old[:300].mean(0))


def test_what_does_not_match_is_refused(
    make_model: Callable[..., Path], small_tokenizer: dict[str, str], tmp_path: Path
) -> None:
    """Behaviour: another tokenizer, too few rows, quantised weights, an unknown architecture: refused by name."""
    info = parse_tokenizer(small_tokenizer, "small")
    path = make_model(tmp_path / "model")
    check_match(load_info(path), info, "small")
    content = json.loads(small_tokenizer["tokenizer.json"])
    content["model"]["merges"] = content["model"]["merges"][:-1]
    other = parse_tokenizer({"tokenizer.json": json.dumps(content)}, "other")
    with pytest.raises(LlmkitError, match="other: not the tokenizer of"):
        check_match(load_info(path), other, "other")
    with pytest.raises(LlmkitError, match="small has 299 tokens, .* only 256 rows"):
        check_match(load_info(make_model(tmp_path / "few", vocab_size=256, tokenizer=False)), info, "small")
    loaded = load_info(path)
    loaded.quantization = {"quant_method": "compressed-tensors"}
    with pytest.raises(LlmkitError, match="quantised"):
        check_match(loaded, info, "small")
    config = json.loads((path / "config.json").read_text()) | {"model_type": "mamba"}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(LlmkitError, match="unknown architecture 'mamba'"):
        load_info(path)
