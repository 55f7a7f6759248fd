"""Adapters against PEFT: its loading of ours, our loading of its, on transformers' models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmkit.cli.main import run_command
from llmkit.model.families import ARCHITECTURES
from llmkit.model.lora.config import LoraConfig, target_modules
from llmkit.model.pretrained.adapter import load_for_adapting, save_adapter
from llmkit.model.pretrained.checkpoint import load_info, load_model, open_weights
from llmkit.model.runtime import Runtime, prepare

IDS = torch.randint(1, 290, (2, 20), generator=torch.Generator().manual_seed(0))
FAMILIES = {
    "llama": {},
    "qwen2": {},
    "gemma2": {"hidden_act": "gelu_pytorch_tanh"},
    "phi3": {},
    "gpt2": {"hidden_act": "gelu_new"},
    "gpt_neox": {"hidden_act": "gelu", "attention_bias": True, "partial_rotary_factor": 0.5},
    "glm4": {"attention_bias": True, "partial_rotary_factor": 0.5},
}
GEMMA = {"query_pre_attn_scalar": 16, "sliding_window": 32}


def make_base(make_model: Callable[..., Path], path: Path, name: str) -> Path:
    family = ARCHITECTURES.get(name)
    sizes = {"num_key_value_heads": 2 if family.grouped else 4, "head_dim": 8, "max_position_embeddings": 64}
    own = {key: value.default for key, value in family.keys.items()} | family.preset(sizes)
    own |= GEMMA if name == "gemma2" else {}
    more = FAMILIES[name] | {"initializer_range": 0.1, "own": own}
    return make_model(path, tokenizer=False, architecture=name, **sizes | more)


def trained(base: Path, lora: LoraConfig) -> Any:
    """A model with adapters that change it."""
    model, generator = load_for_adapting(base, lora, 0), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draw = torch.randn(parameter.shape, generator=generator)
            if "lora_B" in name:
                parameter.copy_(draw * 0.1)
            elif "lora_magnitude" in name:
                parameter.mul_(1 + 0.1 * draw)
    return model


def peft_model(base: Path, adapter: Path) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager", torch_dtype=torch.float32)
    return PeftModel.from_pretrained(reference, adapter, is_trainable=True)


def gradients(model: Any) -> dict[str, Tensor]:
    """Gradients of adapters by our names."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            name = name.removeprefix("base_model.model.").replace(".default", "")
            found[name.replace("magnitude_vector.weight", "magnitude_vector")] = parameter.grad
    return found


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize("variant", ["lora", "dora, rslora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_loads_our_adapters(make_model: Callable[..., Path], tmp_path: Path, family: str, variant: str) -> None:
    """Parity with PEFT: logits of our directory within 1e-5, of the plain operations, of the kernels, and merged; gradients
    of A, B and magnitudes; and the merged weights within 1e-6."""
    base, adapter = make_base(make_model, tmp_path / "base", family), tmp_path / "adapter"
    config, both = load_info(base).config, variant != "lora"
    model = trained(base, LoraConfig(4, 6.0, target_modules(config, "all-linear"), dora=both, rslora=both))
    adapter.mkdir()
    save_adapter(adapter, model.trained_state(), config, model.adapter, {})
    reference = peft_model(base, adapter)
    expected = reference(IDS).logits
    with torch.no_grad():
        assert difference(load_model(base)[0](IDS), expected) > 0.1, "the adapters change nothing"
        assert difference(model(IDS), expected) < 1e-5
        assert difference(load_model(adapter)[0](IDS), expected) < 1e-5
    prepare(model, torch.device("cpu"), Runtime())
    logits = model(IDS)
    assert difference(logits, expected) < 1e-5
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    for result in (logits, expected):
        (result * weights).sum().backward()
    ours, theirs = gradients(model), gradients(reference)
    assert ours.keys() == theirs.keys() == model.trained_state().keys()
    for name, gradient in ours.items():
        assert difference(gradient, theirs[name]) < 1e-4 * float(theirs[name].abs().max()), name
    merged, weights_of = reference.merge_and_unload().state_dict(), open_weights(load_info(adapter))
    changed = [name for name in weights_of if difference(weights_of[name], merged[name]) > 1e-6]
    assert not changed


def test_adapters_of_peft_are_merged(
    make_model: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Parity with PEFT: an adapter that it made, with other ranks and scales in some layers and the base's path, gives its
    merge_and_unload within 1e-6 by `average --merge-adapter`; from A and B of a bfloat16 base, a bfloat16 model. Other
    commands refuse it, since nothing says that its base is the one that was meant."""
    import peft
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(tmp_path)
    base = make_model(tmp_path / "base", architecture="llama", initializer_range=0.1)
    torch.manual_seed(0)
    settings = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 2},
        alpha_pattern={"layers.1.self_attn.q_proj": 3}, init_lora_weights=False, task_type="CAUSAL_LM",
    )  # fmt: skip
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained("base"), settings)
    model.save_pretrained("adapter")
    for command, *arguments in (["generate", "-p", "a"], ["quantize", "-o", "x"], ["eval", "--tasks", "piqa"]):
        assert run_command(command, ["adapter", *arguments, "-q"]) == 1, command
        assert "not the digest of the model" in capfd.readouterr().err, command
        assert not Path("x").exists()
    assert run_command("average", ["adapter", "--merge-adapter", "-q", "-o", "merged"]) == 0
    merged, _ = load_model("merged")
    expected = model.merge_and_unload().state_dict()
    assert max(difference(value, expected[name]) for name, value in merged.state_dict().items()) < 1e-6
    original = load_model(base)[0].state_dict()
    assert (
        difference(
            merged.state_dict()["model.layers.1.self_attn.q_proj.weight"],
            original["model.layers.1.self_attn.q_proj.weight"],
        )
        > 1e-3
    )
    half = make_model(tmp_path / "half", architecture="llama", initializer_range=0.1, dtype=torch.bfloat16)
    assert run_command("average", ["adapter", "--merge-adapter", "--base", str(half), "-q", "-o", "rounded"]) == 0
    rounded = open_weights(load_info("rounded"))
    for name, (dtype, _) in rounded.layout.items():
        assert dtype == torch.bfloat16
        assert difference(rounded[name].float(), expected[name]) < 0.01, name
