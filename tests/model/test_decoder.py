"""The decoder against transformers, in both directions, and against itself: masks, caches, padding."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import SIZES, VARIANTS, random_model

from llmkit.errors import InputWarning, LlmkitError, UsageError
from llmkit.model.config import PRESETS, ModelConfig, load_config
from llmkit.model.decoder import Decoder
from llmkit.model.kv_cache import KeyValueCache
from llmkit.model.pretrained.checkpoint import load_model, save_model
from llmkit.model.pretrained.directory import with_template_in_both_places

IDS_BT = torch.randint(0, 97, (2, 200), generator=torch.Generator().manual_seed(1))


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> bool:
    """Equal within `tolerance` of logits whose spread is about 1, so that the bound means something."""
    assert expected.std() > 0.3, "the logits are nearly constant: the comparison proves nothing"
    return bool((found - expected).abs().max() < tolerance)


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_reads_ours(variant: str, tmp_path: Path) -> None:
    """Parity with transformers: logits of a directory that we wrote, over 200 positions, within 1e-5."""
    from transformers import AutoModelForCausalLM

    model = random_model(**VARIANTS[variant])
    save_model(tmp_path, model.state_dict(), model.config, {})
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert close(theirs(IDS_BT).logits, model(IDS_BT))
    again, _ = load_model(tmp_path)
    assert torch.equal(again(IDS_BT), model(IDS_BT))


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_we_read_what_transformers_wrote(variant: str, tmp_path: Path) -> None:
    """Parity with transformers, other direction: its own class, weights and new-style config.json."""
    from transformers import AutoConfig, AutoModelForCausalLM

    wanted = ModelConfig(**(SIZES | VARIANTS[variant])).to_hf()
    torch.manual_seed(3)
    config = AutoConfig.for_model(wanted.pop("model_type"), **(wanted | {"initializer_range": 0.15}))
    theirs = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in theirs.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 1, 0.3)
    theirs.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in written and "torch_dtype" not in written, "transformers writes the old style again"
    ours, info = load_model(tmp_path)
    assert close(ours(IDS_BT), theirs(IDS_BT).logits)
    assert info.config == ModelConfig(**(SIZES | VARIANTS[variant] | {"initializer_range": 0.15}))


@torch.no_grad()
def test_configuration_with_few_keys(tmp_path: Path) -> None:
    """Parity with transformers: keys missing from config.json have its defaults (such as qwen3's head width of 128)."""
    from transformers import AutoModelForCausalLM

    for kind, heads in (("qwen3", 2), ("llama", 6), ("olmo2", 6)):
        content = {"model_type": kind, "architectures": [f"{kind.capitalize()}ForCausalLM"]}
        content |= {key: SIZES[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
        content |= {"num_attention_heads": heads, "num_key_value_heads": 2}
        config = ModelConfig.from_hf(content)
        model = Decoder(config)
        model.initialize(0)
        place = tmp_path / kind
        place.mkdir()
        save_model(place, {name: value * 5 for name, value in model.state_dict().items()}, config, {})
        (place / "config.json").write_text(json.dumps(content))
        theirs = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
        assert close(load_model(place)[0](IDS_BT), theirs(IDS_BT).logits)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["qwen3, grouped, tied", "olmo2, grouped, tied"])
def test_bfloat16_follows_transformers(variant: str, tmp_path: Path) -> None:
    """Parity with transformers in bfloat16: the error of the logits is at most a fifth larger than theirs."""
    from transformers import AutoModelForCausalLM

    model = random_model(**VARIANTS[variant])
    exact = model.to(torch.bfloat16).float()(IDS_BT)
    save_model(tmp_path, model.to(torch.bfloat16).state_dict(), model.config, {})
    ours = load_model(tmp_path)[0]
    assert ours.model.norm.weight.dtype == torch.bfloat16
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    errors = [
        float((logits.float() - exact).square().mean().sqrt()) for logits in (ours(IDS_BT), theirs(IDS_BT).logits)
    ]
    assert 0 < errors[0] < 1.2 * errors[1]


@torch.no_grad()
@pytest.mark.parametrize("variant", ["llama, grouped, tied", "qwen3, grouped, tied"])
def test_documents_in_one_row_do_not_see_each_other(variant: str) -> None:
    """Property: with document ids and restarted positions, each document has the same logits as alone."""
    model = random_model(**VARIANTS[variant])
    lengths = [1, 17, 40, 2, 30]
    total = sum(lengths)
    ids_BT = IDS_BT[:, : total + 10]
    documents = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)] + [torch.full((10,), -1)])
    positions = torch.cat([torch.arange(n) for n in [*lengths, 10]])
    packed = model(ids_BT, document_ids=documents.expand(2, -1), positions=positions)
    start = 0
    for n in lengths:
        assert close(packed[:, start : start + n], model(ids_BT[:, start : start + n]))
        start += n
    # Rotary positions are relative: without positions of its own a document has the same logits.
    assert close(model(ids_BT, document_ids=documents.expand(2, -1))[:, :total], packed[:, :total], 1e-4)
    assert not close(model(ids_BT)[:, :total], packed[:, :total], 1e-2), "the document mask has no effect"


@torch.no_grad()
def test_no_token_sees_a_later_one() -> None:
    """Property: logits do not depend on later tokens."""
    model = random_model()
    changed = IDS_BT.clone()
    changed[:, 100:] = (changed[:, 100:] + 1) % 97
    before, after = model(IDS_BT), model(changed)
    assert close(after[:, :100], before[:, :100]) and not close(after[:, 100:], before[:, 100:], 1e-2)


@torch.no_grad()
@pytest.mark.parametrize("pieces", [[200], [1] * 20 + [30], [150, 1, 1, 48], [7, 60, 1, 32, 100]])
@pytest.mark.parametrize(
    "variant", ["llama, one group a head, untied, biases", "qwen3, grouped, tied", "olmo2, grouped, tied"]
)
def test_cache_equals_one_pass(variant: str, pieces: list[int]) -> None:
    """Property: piece by piece with a cache that has to grow, a row has the same logits as in one pass."""
    model = random_model(**VARIANTS[variant])
    cache = KeyValueCache(model.config.num_hidden_layers, capacity=16)
    found, start = [], 0
    for n in pieces:
        found.append(model(IDS_BT[:, start : start + n], cache=cache))
        start += n
    assert cache.length == start
    assert close(torch.cat(found, 1), model(IDS_BT[:, :start]))


@torch.no_grad()
def test_left_padding_and_leaving_rows() -> None:
    """Property: a left-padded row, also after another row has left the batch, has the same logits as alone."""
    model = random_model()
    short, rest = IDS_BT[1:, 50:60], IDS_BT[1:, 60:64]
    ids_BT = torch.cat([IDS_BT[:1, :30], torch.cat([torch.zeros(1, 20, dtype=torch.int64), short], 1)])
    documents = torch.zeros_like(ids_BT)
    documents[1, :20] = -1
    positions = torch.arange(30).repeat(2, 1)
    positions[1] = (positions[1] - 20).clamp(min=0)
    cache = KeyValueCache(model.config.num_hidden_layers)
    first = model(ids_BT, document_ids=documents, positions=positions, cache=cache)
    assert close(first[:1], model(IDS_BT[:1, :30])) and close(first[1:, 20:], model(short))
    cache.keep_rows(torch.tensor([1]))
    more = model(rest, document_ids=torch.zeros(1, 4), positions=torch.arange(10, 14)[None], cache=cache)
    assert close(more, model(torch.cat([short, rest], 1))[:, 10:])


def test_initialisation_is_a_function_of_the_seed() -> None:
    """Behaviour: equal seeds give equal bits; outputs to the residual stream start smaller by √(2·layers)."""
    config = ModelConfig(**(SIZES | {"hidden_size": 192, "intermediate_size": 512}))
    models = [Decoder(config), Decoder(config), Decoder(config)]
    for model, seed in zip(models, (5, 5, 6), strict=True):
        torch.manual_seed(seed * 7)
        model.initialize(seed)
    first, second, other = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])
    layer = models[0].model.layers[1]
    assert layer.mlp.up_proj.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert layer.mlp.down_proj.weight.std().item() == pytest.approx(0.02 / math.sqrt(6), rel=0.03)
    assert torch.equal(layer.input_layernorm.weight, torch.ones(192))


def test_flops_of_a_token() -> None:
    """Golden figure: PaLM, appendix B, by hand for one model: 6N + 12·L·H·Q·T."""
    config = load_config("125m", 32_768)
    weights = config.parameters()
    assert config.flops_per_token(2048) == 6 * weights + 6 * 14 * 12 * 64 * 2048


def test_presets_have_their_size() -> None:
    """Behaviour: each preset, in every family, has the number of weights in its name, within 20 %."""
    named = {
        "tiny": 1e6,
        "5m": 5e6,
        "15m": 15e6,
        "30m": 30e6,
        "60m": 60e6,
        "125m": 125e6,
        "350m": 350e6,
        "760m": 760e6,
        "1b": 1e9,
    }
    assert list(named) == list(PRESETS)
    for name, size in named.items():
        vocabulary = 8192 if size < 2e7 else 32_768 if size < 2e8 else 65_536
        for prefix in ("", "llama-", "qwen3-", "olmo2-"):
            assert load_config(prefix + name, vocabulary).parameters() == pytest.approx(size, rel=0.2), name


@pytest.mark.parametrize(
    ("name", "message"),
    [("tinny", "did you mean 'tiny'"), ("lama-5m", "did you mean"), ("gone.json", ""), ("2b", "known: tiny")],
)
def test_unknown_preset(name: str, message: str) -> None:
    """Behaviour: a hint with the nearest names."""
    with pytest.raises((UsageError, LlmkitError)) as error:
        load_config(name, 100)
    assert name in error.value.message and message in error.value.hint


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "lama"}, "unknown architecture 'lama'"),
        ({"hidden_act": "quick_gelu"}, "activation 'quick_gelu'"),
        ({"rope_scaling": {"rope_type": "spiral", "factor": 2.0}}, "rope scaling 'spiral'"),
        (
            {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
            "short_factor has 1",
        ),
        ({"use_sliding_window": True, "sliding_window": 0}, "sliding_window is 0"),
        ({"model_type": "llama", "use_sliding_window": True}, "no layers with a sliding window"),
        ({"num_key_value_heads": 4}, "key-value heads"),
        ({"hidden_size": -1}, "hidden_size is -1"),
        ({"hidden_size": "48"}, "hidden_size is '48'"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"head_dim": 7}, "7 dimensions of a head are rotated"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    ],
)
def test_configurations_that_are_refused(changes: dict[str, Any], named: str) -> None:
    """Behaviour: missing, invalid and unsupported fields give an error that names them."""
    content = ModelConfig(**SIZES).to_hf() | changes
    with pytest.raises(LlmkitError) as error:
        ModelConfig.from_hf(content)
    assert named in error.value.message and error.value.hint


def test_auto_map_is_ignored() -> None:
    """Behaviour: a known architecture that also names code loads with a note, and is written without; an unknown one is
    refused, and the hint says why its code does not help."""
    content = ModelConfig(**SIZES).to_hf() | {"auto_map": {"AutoModel": "model.Model"}}
    with pytest.warns(InputWarning, match="auto_map is ignored"):
        config = ModelConfig.from_hf(content)
    assert config == ModelConfig(**SIZES) and "auto_map" not in config.to_hf()
    with pytest.raises(LlmkitError, match="unknown architecture 'new'") as error:
        ModelConfig.from_hf(content | {"model_type": "new"})
    assert "auto_map" in error.value.hint
    files = with_template_in_both_places({"tokenizer_config.json": '{"auto_map": {"AutoTokenizer": ["a.B", null]}}'})
    assert files == {"tokenizer_config.json": "{}\n"}


@pytest.mark.parametrize(
    ("theirs", "nearest"),
    [
        ("qwen2_moe", "qwen2"),
        ("granitemoe", "granite"),
        ("glm", "glm4"),
        ("codegen", "gpt2"),
        ("gemma3n_text", "gemma2"),
    ],
)
def test_unknown_architecture_gets_the_nearest_by_its_configuration(theirs: str, nearest: str) -> None:
    """Behaviour: the hint names the architecture with the most similar config.json."""
    from transformers import AutoConfig

    content = AutoConfig.for_model(theirs).to_dict()
    with pytest.raises(LlmkitError) as error:
        ModelConfig.from_hf(content | {"model_type": "unheard-of"})
    assert f"most like that of {nearest};" in error.value.hint


def test_other_models_than_decoders_are_called_that() -> None:
    """Behaviour: the hint about an encoder, or a model of images, names no decoder that it would be like."""
    from transformers import AutoConfig

    for kind, name in (("bert", "BertForMaskedLM"), ("gemma3", "Gemma3ForConditionalGeneration")):
        content = AutoConfig.for_model(kind).to_dict() | {"architectures": [name]}
        with pytest.raises(LlmkitError, match=f"unknown architecture '{kind}'") as error:
            ModelConfig.from_hf(content)
        assert error.value.hint.startswith(f"'{name}' is not a causal language model of text alone; known: ")
