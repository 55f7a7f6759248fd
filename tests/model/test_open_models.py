"""Dense families in transformers' directories: logits, gradients, files and generation as transformers has them."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from open_models import (
    BASE,
    FULL,
    MODELS,
    SLIDING,
    UNGROUPED,
    WINDOW,
    long,
    model_directory,
    rope,
    skip_if_changed,
    transformers_model,
    yarn,
)
from safetensors.torch import load_file, save_file

from llmkit.errors import LlmkitError
from llmkit.model.config import ModelConfig, load_config
from llmkit.model.decoder import Decoder
from llmkit.model.families import ARCHITECTURES
from llmkit.model.fused import Fused
from llmkit.model.generate import generate
from llmkit.model.operations import PLAIN
from llmkit.model.pretrained.checkpoint import load_for_inference, load_info, load_model, save_model
from llmkit.model.rope import KINDS

IDS_BT = torch.randint(0, 97, (2, 100), generator=torch.Generator().manual_seed(1))
CASES = [(family, name) for family, variants in MODELS.items() for name in variants]


def loss(logits_BTV: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), IDS_BT[:, 1:].flatten())


def test_every_family_is_here() -> None:
    """Behaviour: a family without a model to compare with is not one."""
    assert set(MODELS) == set(ARCHITECTURES.names())


@pytest.mark.parametrize(("family", "variant"), CASES)
def test_equals_transformers(family: str, variant: str, tmp_path: Path) -> None:
    """Parity with transformers, on directories that it wrote: logits within 1e-5 of their spread and gradients within
    1e-5, past the window and the original context, with torch's operations and with the kernels; it reads ours back
    without a difference, bytes included."""
    from transformers import AutoModelForCausalLM

    skip_if_changed(family == "olmo3" and "yarn" in variant)
    theirs = transformers_model(family, MODELS[family][variant])
    theirs.save_pretrained(tmp_path / "theirs")
    expected = theirs(IDS_BT).logits
    assert expected.std() > 0.2, "the logits are nearly constant: the comparison proves nothing"
    loss(expected).backward()
    gradients = {
        name.replace("lm_head", ARCHITECTURES.get(family).names.head): p.grad for name, p in theirs.named_parameters()
    }
    ours, info = load_model(tmp_path / "theirs")
    for operations in (PLAIN, Fused()):
        ours.operations = operations
        ours.zero_grad()
        logits = ours(IDS_BT)
        assert (logits - expected).abs().max() < 1e-5 * max(1, float(expected.abs().max()))
        loss(logits).backward()
        for name, parameter in ours.named_parameters():
            found, wanted = parameter.grad, gradients[name]
            assert found is not None and wanted is not None
            assert (found - wanted).abs().max() < 1e-5 * max(0.1, float(wanted.abs().max())), name
    (tmp_path / "ours").mkdir()
    save_model(tmp_path / "ours", ours.state_dict(), info.config, {})
    again, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(again.eval()(IDS_BT).logits, expected)
    stored = [load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours")]
    assert stored[0].keys() == stored[1].keys()
    assert all(torch.equal(value, stored[1][name]) for name, value in stored[0].items())
    assert load_model(tmp_path / "ours")[1].config == info.config


@torch.no_grad()
@pytest.mark.parametrize("family", MODELS)
def test_generates_as_without_a_cache(family: str, tmp_path: Path) -> None:
    """Property: greedy tokens with the key-value cache, past the window and in a padded batch, are those of whole
    forward passes."""
    model, _ = load_model(model_directory(tmp_path, family))
    prompts = [IDS_BT[0, :30].tolist(), IDS_BT[1, :7].tolist()]
    for prompt, found in zip(prompts, generate(model, prompts, max_new_tokens=12, temperature=0), strict=True):
        ids = list(prompt)
        for token in found:
            logits = model(torch.tensor([ids]))[0, -1]
            assert logits[token] >= logits.max() - 1e-4
            ids.append(token)
        assert len(found) == 12


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma2", "phi3"])
def test_half_precision_and_shards_are_lossless(family: str, tmp_path: Path) -> None:
    """Property: a directory in bf16, in several files with an index, is loaded and saved without a change of a bit."""
    theirs = transformers_model(family, MODELS[family]["plain"]).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20kB")
    files = sorted((tmp_path / "theirs").glob("*.safetensors"))
    assert len(files) > 2
    model, info = load_model(tmp_path / "theirs")
    (tmp_path / "ours").mkdir()
    save_model(tmp_path / "ours", model.state_dict(), info.config, {})
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    stored = {name: value for file in files for name, value in load_file(file).items()}
    assert ours.keys() == stored.keys()
    assert all(value.dtype == torch.bfloat16 and torch.equal(value, stored[name]) for name, value in ours.items())
    expected = theirs(IDS_BT).logits.float()
    assert (model(IDS_BT).float() - expected).abs().max() < 0.05 * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "qwen2"])
def test_directories_saved_without_their_head(family: str, tmp_path: Path) -> None:
    """Behaviour: names without the body's prefix, and tables of masks, as in the original GPT-2."""
    model_directory(tmp_path, family, changes={"tie_word_embeddings": True})
    expected = load_model(tmp_path)[0](IDS_BT)
    file = tmp_path / "model.safetensors"
    body = ARCHITECTURES.get(family).names.body + "."
    tensors = {name.removeprefix(body): value for name, value in load_file(file).items()}
    if family == "gpt2":
        tensors |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 4, 4) for layer in range(3)}
    save_file(tensors, file)
    assert torch.equal(load_model(tmp_path)[0](IDS_BT), expected)


LONG = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 64}
OLD_STYLE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gpt_neox": ({"rotary_pct": 0.5, "rotary_emb_base": 5000}, {"partial_rotary_factor": 0.5, "rope_theta": 5000.0}),
    "gemma3_text": (
        {"rope_theta": 5e5, "rope_local_base_freq": 2e4, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"rope_theta": 5e5, "local_rope": {"rope_type": "default", "rope_theta": 2e4}},
    ),
    "phi3": (
        {"rope_scaling": {"type": "longrope"} | LONG},
        {"rope_scaling": {"rope_type": "longrope"} | LONG},
    ),
    "llama": (
        {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0}, "torch_dtype": "bfloat16"},
        {"rope_theta": 1e6, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("family", OLD_STYLE)
def test_old_style_configurations(family: str, tmp_path: Path) -> None:
    """Parity with transformers: keys of older versions mean what they mean there."""
    from transformers import AutoModelForCausalLM

    model_directory(tmp_path, family)
    old, meaning = OLD_STYLE[family]
    content = json.loads((tmp_path / "config.json").read_text())
    del content["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps(content | old))
    ours, info = load_model(tmp_path)
    assert {name: getattr(info.config, name) for name in meaning} == meaning
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    assert (ours(IDS_BT) - theirs(IDS_BT).logits).abs().max() < 2e-5


ABSENT = ("num_key_value_heads", "pad_token_id")


@pytest.mark.parametrize("family", MODELS)
def test_defaults_are_those_of_transformers(family: str) -> None:
    """Parity with transformers: a configuration with the sizes alone means the same model."""
    from transformers import AutoConfig

    skip_if_changed(family == "olmo3")
    sizes = {name: value for name, value in BASE.items() if name not in ABSENT[family not in UNGROUPED :]}
    if family == "gpt2":
        sizes = {"vocab_size": 97, "n_embd": 48, "n_layer": 4, "n_head": 6, "n_positions": 256}
    whole = AutoConfig.for_model(family, **sizes).to_dict()
    found, wanted = (ModelConfig.from_hf({"model_type": family} | content) for content in (sizes, whole))
    different = {
        name for name in ("head_dim", "rms_norm_eps", "rope_theta", "rope_scaling", "local_rope", "partial_rotary_factor", "hidden_act",
                          "tie_word_embeddings", "attention_bias", "mlp_bias", "initializer_range", "intermediate_size", "own")
        if meaning(found, name) != meaning(wanted, name)
    }  # fmt: skip
    assert not different or (family in UNGROUPED and different == {"head_dim"})


def meaning(config: ModelConfig, name: str) -> Any:
    """A field; windows that are switched off have no size."""
    value = getattr(config, name)
    return value | {"sliding_window": None} if name == "own" and value.get("use_sliding_window") is False else value


@pytest.mark.parametrize("family", MODELS)
def test_defaults_of_sizes_are_those_of_transformers(family: str) -> None:
    """Parity with transformers: what is left out of the sizes, and windows that are switched on without a size."""
    from transformers import AutoConfig

    names = dict.fromkeys(("vocab_size", "intermediate_size"), 97) | {"hidden_size": 64, "num_hidden_layers": 4}
    sizes: dict[str, Any] = names | {"num_attention_heads": 32}
    if family == "gpt2":
        sizes = {"vocab_size": 97, "n_embd": 64, "n_layer": 4, "n_head": 32}
    for more in ({}, {"use_sliding_window": True, "max_window_layers": 2} if family.startswith("qwen") else {}):
        whole = AutoConfig.for_model(family, **sizes, **more).to_dict()
        found, wanted = (ModelConfig.from_hf({"model_type": family} | content) for content in (sizes | more, whole))
        for name in ("max_position_embeddings", "num_key_value_heads", "own"):
            assert meaning(found, name) == meaning(wanted, name), name


# What a configuration says beside its sizes; with `refused`, transformers ignores it, and it is an error here.
BESIDE_SIZES: list[tuple[str, dict[str, Any], str]] = [
    ("llama", rope("yarn", factor=8.0) | {"original_max_position_embeddings": 16}, ""),
    ("llama", yarn() | {"original_max_position_embeddings": 16}, ""),
    ("qwen2", long(4, factor=4.0, original_max_position_embeddings=64) | {"original_max_position_embeddings": 16}, ""),
    ("llama", rope("yarn", factor=None, original_max_position_embeddings=32), ""),
    ("llama", yarn(mscale=0), ""),
    ("llama", {"hidden_act": "gelu_fast"}, ""),
    ("gemma", {"hidden_act": "relu"}, ""),
    ("gemma", {"hidden_act": "gelu"}, ""),
    ("cohere2", WINDOW | {"sliding_window_pattern": 2}, ""),
    ("cohere2", WINDOW | {"sliding_window_pattern": 3}, ""),
    ("smollm3", WINDOW | {"use_sliding_window": True}, ""),
    ("smollm3", WINDOW | {"use_sliding_window": True, "max_window_layers": 0, "no_rope_layers": [0, 1, 1, 0]}, ""),
    ("mistral", WINDOW | {"layer_types": [FULL] * 4}, ""),
    ("mistral", WINDOW | {"layer_types": [FULL, SLIDING, FULL, SLIDING]}, ""),
    ("llama", {"partial_rotary_factor": 0.5}, "does not support partial_rotary_factor"),
    ("gemma2", {"partial_rotary_factor": 0.5}, "does not support partial_rotary_factor"),
    ("qwen3", {"is_causal": False}, "is_causal is false"),
]


@torch.no_grad()
@pytest.mark.parametrize("number", range(len(BESIDE_SIZES)))
def test_keys_mean_what_they_mean_in_transformers(number: int, tmp_path: Path) -> None:
    """Parity with transformers: logits, before and after the configuration is written again; or the key is refused."""
    from transformers import AutoModelForCausalLM

    family, changes, refused = BESIDE_SIZES[number]
    skip_if_changed(family == "cohere2" or changes == {"hidden_act": "gelu"})
    model_directory(tmp_path / "a", family)
    content = json.loads((tmp_path / "a" / "config.json").read_text())
    for name in ("layer_types", "rope_parameters") if refused == "" and family != "llama" else ("layer_types",):
        content.pop(name, None)
    (tmp_path / "a" / "config.json").write_text(json.dumps(content | changes))
    if refused:
        with pytest.raises(LlmkitError, match=rf"config.json.*{refused}"):
            load_model(tmp_path / "a")
        return
    ours, info = load_model(tmp_path / "a")
    (tmp_path / "b").mkdir()
    save_model(tmp_path / "b", ours.state_dict(), info.config, {})
    for directory in ("a", "b"):
        theirs = AutoModelForCausalLM.from_pretrained(
            tmp_path / directory, dtype=torch.float32, attn_implementation="eager"
        )
        assert (ours(IDS_BT) - theirs(IDS_BT).logits).abs().max() < 2e-5


def test_old_names_of_scalings() -> None:
    """Behaviour: Phi's first directories call longrope "su", and later "yarn"."""
    for name in ("su", "yarn"):
        content = {
            "model_type": "phi3",
            "rope_scaling": {"type": name, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
        }
        config = ModelConfig.from_hf(MODELS["phi3"]["plain"] | content)
        assert config.rope_scaling and config.rope_scaling["rope_type"] == "longrope"


def test_context_of_yarn() -> None:
    """Behaviour: yarn reaches beyond max_position_embeddings where that is the context before it was extended."""
    content = {"model_type": "qwen2"} | MODELS["qwen2"]["plain"]
    assert content["max_position_embeddings"] == 256
    for scaling, expected in (
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}, 1024),
        ({"type": "yarn", "factor": 4.0}, 1024),
        ({"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32}, 256),
        ({"rope_type": "yarn", "original_max_position_embeddings": 32}, None),  # transformers demands a factor
        ({"rope_type": "linear", "factor": 4.0}, 256),
    ):
        config = ModelConfig.from_hf(content | {"rope_scaling": scaling})
        assert config.context == (expected or 256)


@torch.no_grad()
def test_beyond_the_original_context_of_yarn(tmp_path: Path) -> None:
    """Parity with transformers: a Qwen 2.5 with yarn switched on continues prompts longer than its first context."""
    from transformers import AutoModelForCausalLM

    change = yarn(factor=4.0, original_max_position_embeddings=32) | {"max_position_embeddings": 32}
    model_directory(tmp_path, "qwen2", None, change)
    model, theirs = load_model(tmp_path)[0], AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    prompt = IDS_BT[:1]
    expected = theirs.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=96)
    assert generate(model, prompt.tolist(), max_new_tokens=8, temperature=0) == expected[:, prompt.shape[1] :].tolist()
    with pytest.raises(LlmkitError, match="the context is 128"):
        generate(model, [[1] * 128], max_new_tokens=1, temperature=0)


def test_rotary_embeddings_that_contradict_themselves() -> None:
    """Behaviour: a scaling that does not say for which layers it is, and bounds in the wrong order, are refused."""
    with pytest.raises(LlmkitError, match="rope_parameters does not say for which layers it is"):
        ModelConfig.from_hf({"model_type": "gemma3_text"} | MODELS["gemma3_text"]["plain"] | yarn())
    early = ModelConfig.from_hf({"model_type": "olmo3"} | MODELS["olmo3"]["plain"] | yarn())  # transformers 5.0
    assert early.rope_scaling and early.rope_scaling["rope_type"] == "yarn"
    assert early.local_rope == {"rope_type": "default", "rope_theta": 1e4}
    bounds = {"low_freq_factor": 4.0, "high_freq_factor": 1.0, "factor": 8.0}
    with pytest.raises(LlmkitError, match="high_freq_factor of the rotary embedding is 1.0"):
        ModelConfig.from_hf({"model_type": "llama"} | BASE | rope("llama3", **bounds))


def test_one_type_for_inference(tmp_path: Path) -> None:
    """Behaviour: where norms are stored in another type than matrices, all weights are loaded in that of the matrices."""
    model_directory(tmp_path, "llama")
    weights = load_file(tmp_path / "model.safetensors")
    weights = {name: value if "norm" in name else value.bfloat16() for name, value in weights.items()}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    model = load_for_inference(tmp_path, device="meta")[0]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@torch.no_grad()
@pytest.mark.parametrize("family", MODELS)
def test_presets(family: str, tmp_path: Path) -> None:
    """Parity with transformers: a new model of a preset is read back as it is, by us and by transformers."""
    from transformers import AutoModelForCausalLM

    skip_if_changed(family == "olmo3")
    config = load_config(f"{family}-tiny", 97)
    model = Decoder(config)
    model.initialize(0)
    save_model(tmp_path, model.state_dict(), config, {})
    assert load_model(tmp_path)[1].config == config
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    assert (theirs(IDS_BT).logits - model(IDS_BT)).abs().max() < 1e-5


ODD: tuple[Any, ...] = (None, {}, [], [[1]], "x", -1, 0, 1.5, True, 1e308, 10**30, float("nan"), ["full_attention"])


@pytest.mark.parametrize("family", MODELS)
def test_odd_values_are_read_or_refused(family: str) -> None:
    """Property: any value of any key gives a model that can be counted and written, or a LlmkitError."""
    known = ARCHITECTURES.get(family)
    keys = {"layer_types", "intermediate_size", "head_dim", "eos_token_id", *known.keys, *MODELS[family]["plain"]}
    rope_keys = ("rope_type", "factor", "short_factor", "rope_theta", "full_attention", "partial_rotary_factor")
    ropes = [{"rope_type": kind, "factor": 2.0, "short_factor": [1.0], "long_factor": [1.0]} for kind in KINDS]
    changes: list[dict[str, Any]] = [{key: value} for key in keys | {"rope_parameters"} for value in ODD]
    if family in ("llama", "gemma3_text"):
        changes += [{"rope_scaling": rope | {key: value}} for rope in ropes for key in rope_keys for value in ODD[::2]]
    for change in changes:
        with suppress(LlmkitError):
            config = ModelConfig.from_hf({"model_type": family} | MODELS[family]["plain"] | change)
            assert config.parameters() > 0 and config.to_hf()
            known.rope(config, 0)


def test_values_that_do_not_fit() -> None:
    """Behaviour: keys of a family with values of another kind are refused by name."""
    content = MODELS["gemma2"]["plain"] | {"model_type": "gemma2"}
    for changes, named in (
        ({"sliding_window": -4}, "sliding_window is -4"),
        ({"sliding_window": 2.5}, "sliding_window is 2.5"),
        ({"layer_types": ["full_attention"]}, "layer_types is"),
        ({"layer_types": ["chunked_attention"] * 4}, "layer_types is"),
        ({"query_pre_attn_scalar": "256"}, "query_pre_attn_scalar is '256'"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
    ):
        with pytest.raises(LlmkitError) as error:
            ModelConfig.from_hf(content | changes)
        assert named in error.value.message and error.value.hint


@torch.no_grad()
@pytest.mark.parametrize("family", [family for family in MODELS if family != "gpt2"])
def test_quantised_models_open_in_transformers(family: str, tmp_path: Path) -> None:
    """Parity with transformers: its logits of our directory are those of our own dequantisation, and no weight is
    missing there."""
    from transformers import AutoModelForCausalLM

    from llmkit.quantization.formats.compressed_tensors import fit_model, write_quantized
    from llmkit.quantization.methods import METHODS

    info = load_info(model_directory(tmp_path / "a", family))
    (tmp_path / "b").mkdir()
    write_quantized(info, fit_model(info, METHODS["int8"]), tmp_path / "b")
    options = {"dtype": torch.float32, "attn_implementation": "eager", "output_loading_info": True}
    theirs, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "b", **options)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert (load_model(tmp_path / "b")[0](IDS_BT) - theirs(IDS_BT).logits).abs().max() < 1e-4
    assert (load_model(tmp_path / "b")[0](IDS_BT) - load_model(tmp_path / "a")[0](IDS_BT)).abs().max() > 0


def test_quantised_gpt2_is_for_llmkit_only(tmp_path: Path, llmkit_here: Callable[..., Any]) -> None:
    """Behaviour: transformers quantises none of its layers, and would open it with random weights: a warning says so."""
    model_directory(tmp_path / "a", "gpt2")
    done = llmkit_here("quantize", "a", "-o", "b", "-q", cwd=tmp_path)
    assert done.returncode == 0 and b"transformers cannot load a quantised gpt2" in done.stderr
