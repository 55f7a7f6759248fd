"""Architectures: what a family declares is what the decoder has, third-party ones load, and OLMo 2 trains and generates as in transformers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from random_models import SIZES, VARIANTS, random_model

from llmkit.errors import LlmkitError
from llmkit.model.blocks import AttentionSpec, MLPSpec, NormSpec
from llmkit.model.config import ModelConfig, load_config
from llmkit.model.decoder import Decoder
from llmkit.model.families import ARCHITECTURES
from llmkit.model.family import Family, expected_tensors, find_parameter, linear_weights
from llmkit.model.generate import generate
from llmkit.model.pretrained.checkpoint import load_model, save_model

IDS_BT = torch.randint(0, 97, (2, 100), generator=torch.Generator().manual_seed(1))
OLMO2 = [name for name in VARIANTS if name.startswith("olmo2")]


@pytest.mark.parametrize("variant", VARIANTS)
def test_declared_tensors_are_the_decoder_s(variant: str) -> None:
    """Property: names, shapes and order of the family's parameters are those of the torch model, and so is their number."""
    model = random_model(**VARIANTS[variant])
    tensors = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert list(expected_tensors(model.config).items()) == list(tensors.items())
    assert model.config.parameters() == sum(parameter.numel() for parameter in model.parameters())
    linear = {
        f"{name}.weight"
        for name, module in model.model.named_modules(prefix="model")
        if type(module) is torch.nn.Linear
    }
    assert linear_weights(model.config) == sorted(linear)
    for name, parameter in model.named_parameters():
        found = find_parameter(model.config, name)
        assert found is not None and (parameter.dim() == 1) == (found.kind in ("gain", "bias"))
    assert find_parameter(model.config, "model.layers.0.mlp.router.weight") is None


def test_a_billion_layers_are_counted_at_once() -> None:
    """Behaviour: a hostile configuration costs no time to count."""
    config = ModelConfig(**(SIZES | {"num_hidden_layers": (1 << 31) - 1}))
    assert config.parameters() > 1 << 40


@pytest.mark.parametrize("kind", ["qwen3", "olmo2"])
def test_unsupported_switches_are_refused(kind: str) -> None:
    """Behaviour: a switch that the architecture does not have is an error that names both."""
    content = ModelConfig(**(SIZES | {"architecture": kind})).to_hf()
    with pytest.raises(LlmkitError, match=f"{kind} does not support mlp_bias"):
        ModelConfig.from_hf(content | {"mlp_bias": True})


class ParallelBlock:
    """x + attention(n) + mlp(n) with one norm, as third parties may compose it."""

    def parts(self, config: ModelConfig, layer: int) -> dict[str, Any]:
        return {
            "norm": NormSpec(config.hidden_size, config.rms_norm_eps),
            "attention": AttentionSpec.from_config(config, layer),
            "mlp": MLPSpec.from_config(config, layer),
        }

    def forward(self, modules: Any, x_BTD: torch.Tensor, shared: Any, layer: int) -> torch.Tensor:
        normed = modules.norm(x_BTD, shared.operations)
        return x_BTD + modules.attention(normed, shared, layer) + modules.mlp(normed, shared.operations)


@torch.no_grad()
def test_block_of_a_third_party(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Behaviour: presets, directories and generation work with a block that is none of ours."""
    family = Family("ParallelForCausalLM", ParallelBlock(), defaults={"rope_theta": 5e5})
    monkeypatch.setattr(ARCHITECTURES, "_entries", ARCHITECTURES._entries | {"parallel": family})
    assert load_config("parallel-tiny", 512).family is family
    model = random_model(architecture="parallel")
    save_model(tmp_path, model.state_dict(), model.config, {})
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["ParallelForCausalLM"]
    again = load_model(tmp_path)[0]
    assert torch.equal(again(IDS_BT), model(IDS_BT))
    tokens = generate(again, [IDS_BT[0, :9].tolist()], max_new_tokens=3, temperature=0)[0]
    for i, token in enumerate(tokens):
        ids = [*IDS_BT[0, :9].tolist(), *tokens[:i]]
        assert model(torch.tensor([ids]))[0, -1].argmax().item() == token
    content = model.config.to_hf()
    del content["rope_theta"]
    assert ModelConfig.from_hf(content).rope_theta == 5e5


EXAONE4 = """
from functools import partial

from llmkit.model.blocks import AttentionSpec, ResidualBlock
from llmkit.model.family import Family, Key, global_rope, patterned_window

WINDOW = patterned_window(4)

FAMILY = Family(
    "Exaone4ForCausalLM",
    ResidualBlock(
        partial(AttentionSpec.from_config, qk_norm="head"),
        norms=("", "post_attention_layernorm", "", "post_feedforward_layernorm"),
    ),
    defaults={"rms_norm_eps": 1e-5},
    keys={
        "sliding_window": Key(4096, "count"),
        "sliding_window_pattern": Key(4, "count", omitted=True),
        "layer_types": Key(None, "layers"),
    },
    unsupported=("attention_bias", "mlp_bias"),
    rope=lambda config, layer: None if WINDOW(config, layer) is None else global_rope(config, layer),
    window=WINDOW,
)
"""


def test_installed_package_adds_an_architecture(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, llmkit_here: Callable[..., Any]
) -> None:
    """Parity with transformers: EXAONE 4, which is not built in, by a file as in model/families/ with an entry point."""
    from transformers import AutoConfig, AutoModelForCausalLM

    site = tmp_path / "site"
    (site / "their_family-1.0.dist-info").mkdir(parents=True)
    (site / "their_family.py").write_text(EXAONE4)
    (site / "their_family-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: their-family\nVersion: 1.0"
    )
    entry_point = "[llmkit.architectures]\nexaone4 = their_family:FAMILY\n"
    (site / "their_family-1.0.dist-info" / "entry_points.txt").write_text(entry_point)
    sizes = {name: value for name, value in SIZES.items() if name != "num_hidden_layers"}
    torch.manual_seed(0)
    config = AutoConfig.for_model("exaone4", num_hidden_layers=8, sliding_window=16, **sizes)
    theirs = AutoModelForCausalLM.from_config(config).eval()
    theirs.save_pretrained(tmp_path / "model")
    with pytest.raises(LlmkitError, match="exaone4"):
        load_model(tmp_path / "model")

    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setattr(ARCHITECTURES, "_entries", dict(ARCHITECTURES._entries))
    ours = load_model(tmp_path / "model")[0]
    logits, expected = ours(IDS_BT), theirs(IDS_BT).logits
    assert (logits - expected).abs().max().item() < 1e-5 * max(1.0, expected.abs().max().item())
    for value in (logits, expected):
        F.cross_entropy(value[:, :-1].flatten(0, 1), IDS_BT[:, 1:].flatten()).backward()
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        gradient = gradients[name].grad
        assert (parameter.grad - gradient).abs().max() < 1e-5 * max(1.0, float(gradient.abs().max())), name
    assert llmkit_here("quantize", "model", "-o", "small", cwd=tmp_path).returncode == 0
    assert json.loads((tmp_path / "small" / "config.json").read_text())["architectures"] == ["Exaone4ForCausalLM"]


@pytest.mark.parametrize("variant", OLMO2)
def test_gradients_of_olmo2(variant: str, tmp_path: Path) -> None:
    """Parity with transformers: loss and every gradient of the plain operations (those of the kernels: test_runtime.py)."""
    from transformers import AutoModelForCausalLM

    model = random_model(**VARIANTS[variant])
    save_model(tmp_path, model.state_dict(), model.config, {})
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    gradients = []
    for logits, module in ((model(IDS_BT), model), (theirs(IDS_BT).logits, theirs)):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS_BT[:, 1:].flatten()).backward()
        gradients.append({name: parameter.grad for name, parameter in module.named_parameters()})
    ours, expected = gradients
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (ours[name] - gradient).abs().max() < 1e-5 * max(1.0, float(gradient.abs().max())), name


def test_generation_of_olmo2_equals_transformers(tmp_path: Path) -> None:
    """Parity with transformers: greedy tokens, with the key-value caches of both, padded prompts on our side."""
    from transformers import AutoModelForCausalLM

    model = random_model(**(VARIANTS[OLMO2[0]] | {"tie_word_embeddings": False}))
    save_model(tmp_path, model.state_dict(), model.config, {})
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    prompts = [[5, 7, 9], [11], [90, 3, 4, 5, 6, 7, 8, 20, 30]]
    for prompt, tokens in zip(prompts, generate(model, prompts, max_new_tokens=20, temperature=0), strict=True):
        options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        assert tokens == theirs.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()
        assert len({*tokens}) > 5, "the model repeats itself: nothing is compared"


def test_olmo2_trains_alike_with_and_without_kernels(
    write_shards: Callable[..., Path], llmkit_here: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour: `llmkit train -m config.json` trains an OLMo 2; the CPU kernels change no loss by more than 1e-5."""
    from llmkit.model import runtime

    write_shards(tmp_path / "shards", [40, 60, 30, 50, 70] * 4)
    config = ModelConfig(**(SIZES | VARIANTS[OLMO2[0]] | {"vocab_size": 299, "max_position_embeddings": 32}))
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    losses = []
    for run in ("kernels", "plain"):
        if run == "plain":
            monkeypatch.setattr(runtime, "fused_kernels", lambda: None)
        done = llmkit_here(
            "train", "shards", "-m", "config.json", "--tokens", "768", "-b", "4", "-q", "-o", run, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr.decode()
        losses.append(
            [json.loads(line)["loss"] for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        )
    assert len(losses[0]) == 6 and losses[0] == pytest.approx(losses[1], abs=1e-5) and losses[0] != losses[1]
    model, info = load_model(tmp_path / "kernels")
    assert info.config == dataclasses.replace(config, vocab_size=info.config.vocab_size, eos_token_id=info.config.eos_token_id, bos_token_id=info.config.bos_token_id, pad_token_id=info.config.pad_token_id)  # fmt: skip
    assert isinstance(model, Decoder) and torch.isfinite(model(IDS_BT)).all()


def test_other_splitting_of_qwen2_is_announced(
    write_shards: Callable[..., Path], llmkit_here: Callable[..., Any], tmp_path: Path
) -> None:
    """Behaviour: transformers replaces the pre-tokenizer of every qwen2 model, and of no other family here."""
    write_shards(tmp_path / "shards", [40, 60, 30, 50, 70] * 4)
    for family, warned in (("qwen2", True), ("qwen3", False)):
        done = llmkit_here(
            "train", "shards", "-m", f"{family}-tiny", "--tokens", "500", "-o", "run", "-n", cwd=tmp_path
        )
        assert done.returncode == 0 and (b"vocab --pattern qwen2" in done.stderr) == warned, done.stderr
