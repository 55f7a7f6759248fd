"""Quantised directories: parity with transformers and compressed-tensors, rounding errors, the command."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.errors import LlmkitError, UsageError
from llmkit.lineage.formats import read_lineage
from llmkit.model.pretrained.checkpoint import load_info, load_model
from llmkit.model.pretrained.safetensors import layout_of, write_safetensors
from llmkit.model.pretrained.weights import dequantize, unpack
from llmkit.quantization.formats.compressed_tensors import fit_model, pack, write_quantized
from llmkit.quantization.methods import METHODS
from llmkit.quantization.round_to_nearest import quantize

MODELS = [
    {"architecture": "llama"},
    {"architecture": "qwen3", "tie_word_embeddings": False, "dtype": torch.bfloat16},
    {
        "architecture": "qwen3",
        "hidden_size": 44,
        "intermediate_size": 50,
        "attention_bias": True,
    },  # no group divides these
]


def quantised(source: Path, target: Path, to: str) -> Path:
    info = load_info(source)
    target.mkdir()
    write_quantized(info, fit_model(info, METHODS[to]), target)
    return target


@pytest.mark.parametrize("to", list(METHODS))
@pytest.mark.parametrize("changes", MODELS, ids=["llama", "qwen3-bf16", "odd-widths"])
def test_transformers_loads_it(make_model: Callable[..., Path], tmp_path: Path, to: str, changes: dict) -> None:
    """Parity with transformers and compressed-tensors: their logits of the directory equal those of our own dequantisation."""
    from transformers import AutoModelForCausalLM

    source = make_model(tmp_path / "source", **changes)
    target = quantised(source, tmp_path / "target", to)
    ours, info = load_model(target)
    dtype = changes.get("dtype", torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(target, dtype=dtype).eval()
    ids = torch.randint(0, 300, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = ours(ids)
        assert (found - theirs(ids).logits).abs().max() <= (1e-5 if dtype == torch.float32 else 0.05)
        off = (found - load_model(source)[0](ids)).abs().max()
    assert off > 0, "nothing was quantised"
    assert info.stop_ids == [0, 2] and info.quantization["config_groups"]["group_0"]["weights"]["num_bits"] == int(
        to[3:]
    )
    assert {parameter.dtype for parameter in ours.parameters()} == {dtype}


def test_unquantized_tensors_are_copied(make_model: Callable[..., Path], tmp_path: Path) -> None:
    """Behaviour: embeddings, norms, biases and the output layer keep their bytes; the tokenizer is copied; int4 is smaller."""
    source = make_model(tmp_path / "source", tie_word_embeddings=False, attention_bias=True)
    small = quantised(source, tmp_path / "small", "int4")
    before, after = load_model(source)[0].state_dict(), load_model(small)[0].state_dict()
    for name, value in before.items():
        inside = name.startswith("model.layers.") and value.dim() == 2
        assert torch.equal(after[name], value) != inside, name
    assert (small / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    config = json.loads((small / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == ["lm_head"] and "sparsity_config" not in config
    sizes = [(quantised(source, tmp_path / to, to) / "model.safetensors").stat().st_size for to in ("int8", "int4")]
    assert sizes[1] < sizes[0] < (source / "model.safetensors").stat().st_size


@given(bits=st.sampled_from([4, 8]), rows=st.integers(1, 4), width=st.integers(1, 40), seed=st.integers(0, 99))
def test_unpack_inverts_pack(bits: int, rows: int, width: int, seed: int) -> None:
    """Property: unpack inverts pack for every width, in ceil(width·bits/32) words."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    values = torch.randint(low, high, (rows, width), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    words = pack(values, bits)
    assert words.dtype == torch.int32 and words.shape == (rows, -(-width * bits // 32))
    assert torch.equal(unpack(words, bits, width), values)


@pytest.mark.parametrize("bits", [4, 8])
def test_packing_equals_compressed_tensors(bits: int) -> None:
    """Parity with compressed_tensors' own pack_to_int32."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    values = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (3, 21), dtype=torch.int8)
    assert torch.equal(pack(values, bits), pack_to_int32(values, bits))


@settings(deadline=None)
@given(
    bits=st.sampled_from([4, 8]),
    group=st.sampled_from([None, 8, 16]),
    search=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    spread=st.sampled_from([0.0, 1e-30, 0.02, 1e4]),
    seed=st.integers(0, 9),
)
def test_rounding_is_to_the_nearest(
    bits: int, group: int | None, search: bool, dtype: torch.dtype, spread: float, seed: int
) -> None:
    """Property: always finite; no other q with the same scale is nearer; without search errors are at most half a step
    (plus rounding)."""
    weight = torch.randn(3, 32, generator=torch.Generator().manual_seed(seed)) * spread
    q, scale = quantize(weight, bits, group, search=search, dtype=dtype)
    assert q.dtype == torch.int8 and scale.dtype == dtype and scale.shape == (3, 32 // (group or 32))
    assert scale.isfinite().all() and (scale > 0).all()
    assert q.min() >= -(2 ** (bits - 1)) and q.max() <= 2 ** (bits - 1) - 1
    wide = scale.double().repeat_interleave(group or 32, 1)
    off = (q * wide - weight).abs()
    for step in (-1, 1):
        other = (q.long() + step).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        assert (off <= (other * wide - weight).abs() + 2e-5 * wide).all()
    if not search:
        assert (off <= wide * (0.5 + 2**-7 * 2 ** (bits - 1))).all()


def test_search_is_never_worse() -> None:
    """Property: the searched scales have at most the squared error of absmax/7.5 in every group, and here clearly less."""
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    errors = []
    for search in (False, True):
        q, scale = quantize(weight, 4, 64, search=search, dtype=torch.float32)
        errors.append((dequantize(q, scale) - weight).square().view(64, 4, 64).sum(-1))
    assert (errors[1] <= errors[0] + 1e-6).all() and errors[1].sum() < 0.9 * errors[0].sum()


def test_absmax_scales() -> None:
    """Parity with the definition: absmax/7.5 for 4 bits, absmax/127.5 for 8."""
    weight = torch.tensor([[1.0, -3.0, 0.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    for bits, half in ((4, 7.5), (8, 127.5)):
        q, scale = quantize(weight, bits, None, search=False, dtype=torch.float32)
        assert torch.allclose(scale, torch.tensor([[3 / half], [1 / half * 0 + 1.0]])), scale
        assert q[0, 1] == -(2 ** (bits - 1)) and not q[1].any()


def test_group_fits_every_width(make_model: Callable[..., Path], tmp_path: Path) -> None:
    """Behaviour: the largest of 128, 64, 32 that divides every width, else a row; an explicit group must fit."""
    for number, (sizes, group) in enumerate(
        [
            ({"hidden_size": 128, "head_dim": 32, "intermediate_size": 256}, 128),
            ({"hidden_size": 64, "intermediate_size": 128}, 64),
            ({"hidden_size": 96, "intermediate_size": 256}, 32),
            ({"hidden_size": 44}, None),
        ]
    ):
        info = load_info(make_model(tmp_path / str(number), **sizes))
        assert fit_model(info, METHODS["int4"]) == dataclasses.replace(METHODS["int4"], group=group)
        assert fit_model(info, METHODS["int8"]).group is None
    with pytest.raises(UsageError, match="groups of 32 do not divide rows of 44"):
        fit_model(info, METHODS["int4"], 32)


def spoil(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    from safetensors.torch import load_file

    tensors = {name: value.clone() for name, value in load_file(directory / "model.safetensors").items()}
    change(tensors)
    write_safetensors(directory / "model.safetensors", layout_of(tensors), lambda name: tensors[name], {"format": "pt"})


Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(Q + "_scale"), f"missing tensor {Q}_scale"),
        (lambda t: t.pop(Q + "_shape"), "does not fit"),
        (lambda t: t.pop(Q + "_packed"), f"missing tensor {Q}"),
        (lambda t: t.update({Q + "_shape": torch.tensor([64, 31])}), r"has shape \[64, 31\]"),
        (lambda t: t.update({Q + "_shape": torch.tensor([64, 1 << 40])}), "does not fit"),
        (lambda t: t.update({Q + "_scale": torch.ones(64, 5)}), "does not fit"),
        (lambda t: t.update({Q + "_zero_point": torch.zeros(64, 1)}), "asymmetric"),
    ],
)
def test_quantised_tensors_that_do_not_fit(
    make_model: Callable[..., Path], tmp_path: Path, change: Callable[[dict], None], message: str
) -> None:
    """Behaviour: the error names the tensor."""
    target = quantised(make_model(tmp_path / "source"), tmp_path / "target", "int4")
    spoil(target, change)
    with pytest.raises(LlmkitError, match=message):
        load_model(target)


def test_other_methods_are_refused(make_model: Callable[..., Path], tmp_path: Path) -> None:
    """Behaviour: GPTQ and other layouts are refused by name."""
    target = quantised(make_model(tmp_path / "source"), tmp_path / "target", "int4")
    config = json.loads((target / "config.json").read_text())
    for quantization, message in (
        ({"quant_method": "gptq"}, "'gptq' is not supported"),
        ("int4", "None is not supported"),
        ({"quant_method": "compressed-tensors"}, "unknown bits"),
        ({"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"num_bits": 3}}}}, "3 bits"),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"g": {"weights": {"num_bits": 8, "strategy": "tensor"}}},
            },
            "a scale for each tensor are not supported",
        ),
    ):
        (target / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
        with pytest.raises(LlmkitError, match=message):
            load_model(target)


def test_a_diverged_model_is_refused(make_model: Callable[..., Path], tmp_path: Path) -> None:
    """Behaviour: a tensor with infinities is named instead of being quantised."""
    source = make_model(tmp_path / "source")
    spoil(source, lambda tensors: tensors[Q].fill_(float("inf")))
    with pytest.raises(LlmkitError, match=f"{Q} contains non-finite weights"):
        quantised(source, tmp_path / "target", "int4")


def test_int8_weights_of_others(make_model: Callable[..., Path], tmp_path: Path) -> None:
    """Behaviour: `int-quantized` directories (int8 tensors with one scale per row) load, too."""
    source = make_model(tmp_path / "source")
    target = quantised(source, tmp_path / "target", "int8")
    expected = load_model(target)[0].state_dict()

    def as_int8(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("_packed")]:
            base = name.removesuffix("_packed")
            width = int(tensors.pop(base + "_shape")[1])
            tensors[base] = unpack(tensors.pop(name), 8, width)

    spoil(target, as_int8)
    found = load_model(target)[0].state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_command(llmkit_here: Callable, make_model: Callable[..., Path], tmp_path: Path) -> None:
    """Behaviour: atomic output, no overwriting, reproducible bytes, lineage including the model's; a repeated call has nothing to do."""
    make_model(tmp_path / "source")
    call = ("quantize", "source", "--to", "int4")
    done = llmkit_here(*call, "-o", "target", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr.decode()
    summary = json.loads(done.stderr.splitlines()[-1])
    assert summary["group_size"] == 32 and 0.05 < summary["relative_error"] < 0.15 and summary["matrices"] == 14
    record = read_lineage(tmp_path / "target")
    assert record is not None and record["command"] == "quantize" and record["options"]["to"] == "int4"
    assert [item["name"] for item in record["inputs"]] == ["source"]
    assert b"nothing to do" in llmkit_here(*call, "-o", "target", cwd=tmp_path).stderr
    assert llmkit_here(*call, "-o", "again", cwd=tmp_path).returncode == 0
    for file in (tmp_path / "target").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
    for arguments, code, message in (
        (("source", "--to", "int8", "-o", "target"), 1, "target exists"),
        (("source", "--to", "int5", "-o", "other"), 2, "unknown method 'int5'"),
        (("source", "--to", "int8"), 2, "no output"),
        (("source", "--group-size", "32", "-o", "other"), 2, "--group-size applies only to --to int4"),
        (("target", "--to", "int8", "-o", "other"), 1, "quantised already"),
        (("nothing", "--to", "int8", "-o", "other"), 1, "nothing: no such file"),
    ):
        done = llmkit_here("quantize", *arguments, cwd=tmp_path)
        assert done.returncode == code and message in done.stderr.decode(), done.stderr.decode()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "source", "target"]
    assert llmkit_here("quantize", "source", "--to", "int8", "-o", "target", "-f", cwd=tmp_path).returncode == 0
