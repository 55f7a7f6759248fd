"""Model directories: what is written, what is read, and what is refused."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llmkit.errors import LlmkitError
from llmkit.io.record import Lineage
from llmkit.io.run_layout import resolve_model
from llmkit.lineage.formats import read_lineage
from llmkit.model.config import load_config
from llmkit.model.decoder import Decoder
from llmkit.model.pretrained.checkpoint import (
    load_for_inference,
    load_info,
    load_model,
    load_tokenizer,
    save_model,
)
from llmkit.model.pretrained.safetensors import layout_of, write_safetensors
from llmkit.model.pretrained.streamed import StreamedWeights


@pytest.fixture
def model(make_model: Callable[..., Path], tmp_path: Path) -> Path:
    return make_model(tmp_path / "model")


def read(directory: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(directory / "model.safetensors")


def rewrite(
    directory: Path, change: Callable[[dict[str, torch.Tensor]], None], name: str = "model.safetensors"
) -> None:
    tensors = {key: value.clone() for key, value in read(directory).items()}
    change(tensors)
    write_safetensors(directory / name, layout_of(tensors), lambda key: tensors[key], {"format": "pt"})


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_equal_tensors_give_equal_bytes(model: Path, small_tokenizer: dict[str, str], tmp_path: Path) -> None:
    """Property: the directory depends neither on the order of the tensors nor on the time."""
    loaded, info = load_model(model)
    backwards = dict(reversed(list(loaded.state_dict().items())))
    record = Lineage("train", {"seed": 1}).to_json()
    for name, tensors in (("a", loaded.state_dict()), ("b", backwards)):
        (tmp_path / name).mkdir()
        save_model(tmp_path / name, tensors, info.config, small_tokenizer, record)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == [
        "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_what_is_written(model: Path, small_tokenizer: dict[str, str], tmp_path: Path) -> None:
    """Behaviour: old-style keys and both names of the type, every stop token, the template in both files, lineage in the metadata."""
    config = json.loads((model / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "float32"
    assert config["rope_theta"] == 10000.0 and config["rope_scaling"] is None and "rope_parameters" not in config
    assert json.loads((model / "generation_config.json").read_text())["eos_token_id"] == [0, 2]
    template = (model / "chat_template.jinja").read_text()
    assert template == json.loads((model / "tokenizer_config.json").read_text())["chat_template"]
    loaded, info = load_model(model)
    (tmp_path / "other").mkdir()
    save_model(
        tmp_path / "other",
        loaded.state_dict(),
        info.config,
        {},
        Lineage("train", {"seed": 1}).to_json(),
        torch.bfloat16,
    )
    found = read_lineage(tmp_path / "other")
    assert found is not None and found["command"] == "train" and found["options"] == {"seed": 1}
    assert {value.dtype for value in read(tmp_path / "other").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "other" / "config.json").read_text())["dtype"] == "bfloat16"


def test_tokenizer_opens_in_transformers(model: Path) -> None:
    """Parity with transformers: AutoTokenizer encodes as ours does, renders the template, and knows the end of text."""
    from transformers import AutoTokenizer

    from llmkit.model.pretrained.checkpoint import load_tokenizer

    theirs = AutoTokenizer.from_pretrained(model)
    text = "the quick brown fox<|im_end|> über 12"
    assert (
        theirs(text, add_special_tokens=False).input_ids
        == load_tokenizer(load_info(model).tokenizer_files, model).encode(text).ids
    )
    assert theirs.eos_token == "<|endoftext|>"
    messages = [{"role": "user", "content": "fox"}]
    assert theirs.apply_chat_template(messages, tokenize=False).startswith("<|im_start|>user\nfox<|im_end|>")


def test_sharded_weights(model: Path) -> None:
    """Parity with transformers: a model that it saved in several files loads as the same model."""
    from transformers import AutoModelForCausalLM

    expected = load_model(model)[0].state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(model)
    (model / "model.safetensors").unlink()
    theirs.save_pretrained(model, max_shard_size="60KB")
    assert len(list(model.glob("*.safetensors"))) > 1 and (model / "model.safetensors.index.json").exists()
    found = load_model(model)[0].state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    next(iter(sorted(model.glob("model-*.safetensors")))).unlink()
    with pytest.raises(LlmkitError, match="missing model-00001"):
        load_model(model)


def test_a_run_stands_for_its_final_model(model: Path, tmp_path: Path) -> None:
    """Behaviour: a run loads as its final model directory; for an unfinished run the error says so."""
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    with pytest.raises(LlmkitError, match="no final model yet"):
        resolve_model(run)
    shutil.copytree(model, run / "checkpoints" / "step-00000010")
    (run / "final").symlink_to("checkpoints/step-00000010")
    assert load_model(run)[1].config == load_model(model)[1].config
    for path, message in ((tmp_path / "nothing", "no such file"), (tmp_path, "not a model directory")):
        with pytest.raises(LlmkitError, match=message):
            resolve_model(path)


def test_loading_in_another_type(model: Path) -> None:
    """Behaviour: the requested type, and trainable parameters in eval mode."""
    loaded, _ = load_model(model, torch.float16)
    assert all(parameter.dtype == torch.float16 and parameter.requires_grad for parameter in loaded.parameters())
    assert not loaded.training


def test_a_tied_model_may_store_its_output_layer(model: Path) -> None:
    """Behaviour: some writers store the tied matrix twice, and old ones the table of rotary frequencies."""

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    expected = load_model(model)[0].state_dict()
    rewrite(model, add)
    assert load_model(model)[0].state_dict().keys() == expected.keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "missing tensor model.layers.1.mlp.up_proj.weight"),
        (lambda t: t.update(extra=torch.ones(2)), "unexpected tensor extra"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(7)}),
            r"model.norm.weight has shape \[7\] where config.json implies \[32\]",
        ),
        (lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int64)}), "model.norm.weight has type"),
    ],
)
def test_tensors_that_do_not_fit(model: Path, change: Callable[[dict], None], message: str) -> None:
    """Behaviour: the error names the directory and the tensor."""
    rewrite(model, change)
    with pytest.raises(LlmkitError, match=message) as caught:
        load_model(model)
    assert str(model) in caught.value.message and caught.value.hint


def test_damaged_files(model: Path) -> None:
    """Behaviour: a truncated file, an inconsistent header and a missing header each give one clear error."""
    file = model / "model.safetensors"
    whole = file.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    lying = json.loads(whole[8 : 8 + length])
    lying["model.norm.weight"]["shape"] = [1 << 40]
    lied = json.dumps(lying).encode()
    for content, message in (
        (whole[:-100], "truncated"),
        (whole[: length // 2], "not a readable safetensors file"),
        (b"", "not a readable safetensors file"),
        (struct.pack("<Q", 1 << 60) + whole[8:], "longer than the file"),
        (b"\x80\x04cos\nsystem\n" * 9, "not a readable safetensors file"),
        (struct.pack("<Q", len(lied)) + lied + whole[8 + length :], "its shape needs"),
    ):
        file.write_bytes(content)
        with pytest.raises(LlmkitError, match=message) as caught:
            load_model(model)
        assert str(file) in caught.value.message


def test_pickled_weights_are_refused(model: Path) -> None:
    """Behaviour: a directory with pickles only is refused with a hint, and nothing is unpickled."""
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(LlmkitError, match="only pickled weights") as caught:
        load_model(model)
    assert "safetensors" in caught.value.hint
    (model / "pytorch_model.bin").unlink()
    with pytest.raises(LlmkitError, match=r"no model\.safetensors"):
        load_model(model)


def test_an_index_cannot_lead_outside(model: Path) -> None:
    """Behaviour: names in the index must not leave the directory."""
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../x.safetensors"}}))
    with pytest.raises(LlmkitError, match="no usable weight_map"):
        load_model(model)


def test_a_configuration_that_claims_too_much(model: Path) -> None:
    """Behaviour: a billion layers are refused immediately, without building them."""
    edit(model / "config.json", num_hidden_layers=1_000_000_000)
    with pytest.raises(LlmkitError, match="the files have"):
        load_model(model)


def test_tokenizer_larger_than_the_model(model: Path, small_tokenizer: dict[str, str], tmp_path: Path) -> None:
    """Behaviour: ids without an embedding are refused when a model is written and when it is read."""
    config = load_config("tiny", 100)
    small = Decoder(config)
    (tmp_path / "small").mkdir()
    with pytest.raises(LlmkitError, match="the tokenizer has ids up to 298"):
        save_model(tmp_path / "small", small.state_dict(), config, small_tokenizer)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "small" / name).unlink(missing_ok=True)
    save_model(tmp_path / "small", small.state_dict(), config, {})
    shutil.copy(model / "tokenizer.json", tmp_path / "small")
    with pytest.raises(LlmkitError, match="the tokenizer has ids up to 298"):
        load_model(tmp_path / "small")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json"])
def test_damaged_json(model: Path, name: str) -> None:
    """Behaviour: the error names the file."""
    (model / name).write_text('{"a": ')
    with pytest.raises(LlmkitError, match=name):
        load_model(model)


def test_hostile_fields(model: Path) -> None:
    """Behaviour: fields of the wrong type are named before they are used."""
    for changes, message in (
        ({"rope_theta": 10**400, "rope_parameters": None}, "rope_theta"),
        ({"eos_token_id": "x"}, "eos_token_id"),
        ({"bos_token_id": {"a": 1}}, "bos_token_id"),
    ):
        before = (model / "config.json").read_bytes()
        edit(model / "config.json", **changes)
        with pytest.raises(LlmkitError, match=message):
            load_model(model)
        (model / "config.json").write_bytes(before)
    (model / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(LlmkitError, match=r"tokenizer_config.json: not a JSON object"):
        load_model(model)


def test_settings_stored_with_a_tokenizer_change_no_text(model: Path, small_tokenizer: dict[str, str]) -> None:
    """Behaviour: truncation and padding in tokenizer.json are ignored, as in transformers."""
    text = "the quick brown fox " * 5
    plain = load_tokenizer(small_tokenizer, "here").encode(text).ids
    stored = json.loads(small_tokenizer["tokenizer.json"]) | {
        "truncation": {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": 200}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "x"},
    }  # fmt: skip
    assert load_tokenizer({"tokenizer.json": json.dumps(stored)}, "here").encode(text).ids == plain


def test_type_and_device_by_name(model: Path) -> None:
    """Behaviour: float32 on the CPU by default; unknown types and missing devices are named."""
    assert next(load_for_inference(model, device="cpu")[0].parameters()).dtype == torch.float32
    assert next(load_for_inference(model, "bf16", "cpu")[0].parameters()).dtype == torch.bfloat16
    for dtype, device, message in (("bf61", "cpu", "unknown --dtype 'bf61'"), ("", "gpu", "device 'gpu'")):
        with pytest.raises(LlmkitError, match=message) as caught:
            load_for_inference(model, dtype, device)
        assert caught.value.hint


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "starcoder2"])
def test_output_layers_of_tied_models(family: str, tmp_path: Path) -> None:
    """Parity with transformers: one that differs from the embedding is used; one that is all there is, is both."""
    from open_models import model_directory
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    model_directory(tmp_path, family, None, {"tie_word_embeddings": True})
    config = load_info(tmp_path).config
    assert config.tie_word_embeddings
    weights = load_file(tmp_path / "model.safetensors")
    embedding = weights[config.family.embedding]
    ids = torch.arange(3, 60)[None]

    def agree() -> bool:
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
        return bool((load_model(tmp_path)[0](ids) - theirs(ids).logits).abs().max() < 1e-4)

    save_file(weights | {config.family.head: embedding.clone()}, tmp_path / "model.safetensors", {"format": "pt"})
    assert load_info(tmp_path).config.tie_word_embeddings and agree()
    own = embedding.flip(0).contiguous()
    save_file(weights | {config.family.head: own}, tmp_path / "model.safetensors", {"format": "pt"})
    assert not load_info(tmp_path).config.tie_word_embeddings and agree()
    alone = {name: value for name, value in weights.items() if name != config.family.embedding}
    save_file(alone | {config.family.head: embedding}, tmp_path / "model.safetensors", {"format": "pt"})
    assert load_info(tmp_path).config.tie_word_embeddings and agree()
    with StreamedWeights(load_info(tmp_path)) as streamed:
        assert config.family.embedding in streamed.layout


def test_names_without_prefix_beside_an_output_layer(tmp_path: Path) -> None:
    """Behaviour: the prefix of the body is added, but not to the output layer."""
    from open_models import model_directory
    from safetensors.torch import load_file, save_file

    model_directory(tmp_path, "llama", None, {"tie_word_embeddings": False})
    before = load_model(tmp_path)[0].state_dict()
    weights = {name.removeprefix("model."): value for name, value in load_file(tmp_path / "model.safetensors").items()}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    assert all(torch.equal(value, before[name]) for name, value in load_model(tmp_path)[0].state_dict().items())


def test_settings_for_generation_are_kept(tmp_path: Path) -> None:
    """Behaviour: what else a generation_config.json says is written again; ids that are none are an error."""
    from open_models import model_directory

    (tmp_path / "out").mkdir()
    model_directory(tmp_path / "in", "llama")
    settings = {"temperature": 0.6, "top_p": 0.9, "do_sample": True, "eos_token_id": [0, 5], "odd": float("nan")}
    (tmp_path / "in" / "generation_config.json").write_text(json.dumps(settings))
    model, info = load_model(tmp_path / "in")
    assert info.stop_ids == [0, 5]
    save_model(tmp_path / "out", model.state_dict(), info.config, {}, stop_ids=[7], generation=info.generation)
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written == {"temperature": 0.6, "top_p": 0.9, "do_sample": True, "eos_token_id": 7, "bos_token_id": 1}
    for ids in ("x", 2.5, -5, True, {}, [0, None], 1 << 70):
        (tmp_path / "in" / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
        with pytest.raises(LlmkitError, match=r"generation_config\.json: eos_token_id is "):
            load_info(tmp_path / "in")


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model."])
def test_names_of_wrappers_are_explained(prefix: str, tmp_path: Path) -> None:
    """Behaviour: a directory that torch.compile, DistributedDataParallel or PEFT has named is told apart."""
    from open_models import model_directory
    from safetensors.torch import load_file, save_file

    model_directory(tmp_path, "llama")
    weights = {prefix + name: value for name, value in load_file(tmp_path / "model.safetensors").items()}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(LlmkitError) as error:
        load_model(tmp_path)
    assert f"its names begin with {prefix}" in error.value.hint
