"""The group sizes that real models get, 128 and 64, as transformers reads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llmkit.model.pretrained.checkpoint import load_info, load_model, save_model
from llmkit.quantization.formats.compressed_tensors import fit_model, write_quantized
from llmkit.quantization.methods import METHODS


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", [128, 64])
def test_transformers_and_we_turn_weights_back_alike(
    make_model: Callable[..., Path], tmp_path: Path, group: int, dtype: torch.dtype
) -> None:
    """Parity with transformers: the same logits from the quantised directory, from our dequantised weights, and from our decoder."""
    from transformers import AutoModelForCausalLM

    info = load_info(
        make_model(
            tmp_path / "source", dtype=dtype, hidden_size=group, intermediate_size=3 * group, head_dim=group // 4
        )
    )
    method = fit_model(info, METHODS["int4"])
    assert method.group == group
    for name in ("quantised", "plain"):
        (tmp_path / name).mkdir()
    write_quantized(info, method, tmp_path / "quantised")
    ours, _ = load_model(tmp_path / "quantised")
    save_model(tmp_path / "plain", ours.state_dict(), ours.config, {})
    ids_BT = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(0))
    quantised, plain = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=dtype)(ids_BT).logits
        for name in ("quantised", "plain")
    )
    assert plain.std() > 0.1 and torch.equal(quantised, plain)
    assert (ours(ids_BT) - quantised).abs().max() <= (1e-5 if dtype == torch.float32 else 0.05)
    assert (load_model(tmp_path / "source")[0](ids_BT) - quantised).abs().max() > 0.1, "nothing was quantised"
