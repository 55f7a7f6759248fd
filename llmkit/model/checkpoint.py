"""Model directories as Hugging Face lays them out: config.json, model.safetensors, generation_config.json, tokenizer files.

Directories come from strangers: only safetensors are read (never pickles), no code that a directory names is run, sizes are checked against the
configuration before memory is taken. What is written opens in transformers, vLLM, lm-eval and mergekit as it is. Weights are loaded from
memory-mapped files, one copy in memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmkit.errors import LlmkitError, unknown_name
from llmkit.model.config import ModelConfig, read_json
from llmkit.model.decoder import Decoder, expected_tensors
from llmkit.model.safetensors import layout_of, write_safetensors
from llmkit.model.weights import WEIGHTS, Weights

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")
MAX_TOKENIZER_BYTES = 256 << 20
DTYPE_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float64: "float64"}


@dataclass(slots=True)
class LoadedModel:
    """What a model directory says beside its weights."""

    path: Path
    config: ModelConfig
    tokenizer_files: dict[str, str] = field(default_factory=dict)
    stop_ids: list[int] = field(default_factory=list)  # every id that ends a generation
    quantization: dict[str, Any] | None = None


def resolve_model(path: str | Path) -> Path:
    """The model directory that `path` stands for: itself, or the final model of a run."""
    path = Path(path)
    if (path / "config.json").is_file():
        return path
    if (path / "final").is_dir():
        return path / "final"
    if (path / "checkpoints").is_dir():
        raise LlmkitError(f"{path}: the run has no final model yet", f"finish it with --resume, or name {path}/latest")
    if not path.exists():
        raise LlmkitError(
            f"{path}: no such file or directory", "give a model directory or a run; nothing is downloaded"
        )
    raise LlmkitError(f"{path}: not a model directory (no config.json)", "give a Hugging Face directory or a run")


def load_info(path: str | Path) -> LoadedModel:
    """Configuration, tokenizer and stop ids of a model directory or run, without its weights."""
    directory = resolve_model(path)
    content = read_json(directory / "config.json")
    config = ModelConfig.from_hf(content, str(directory / "config.json"))
    files = read_tokenizer_files(directory)
    stop = config.eos_token_id
    if (directory / "generation_config.json").is_file():
        stop = read_json(directory / "generation_config.json").get("eos_token_id", stop)
    stop_ids = stop if isinstance(stop, list) else [stop]
    return LoadedModel(
        directory, config, files, [i for i in stop_ids if isinstance(i, int)], content.get("quantization_config")
    )


def load_model(
    path: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> tuple[Decoder, LoadedModel]:
    """The decoder of a model directory or run, in eval mode, and what the directory says beside.

    `dtype=None` keeps the stored type (of quantised weights: that of their scales). Raises LlmkitError naming the first tensor that is
    missing, unexpected or of another shape. Memory: the weights once, and one tensor more.
    """
    info = load_info(path)
    weights = open_weights(info)
    with torch.device("meta"):
        model = Decoder(info.config)
    if "tokenizer.json" in info.tokenizer_files:
        check_vocabulary(load_tokenizer(info.tokenizer_files, info.path), info.config.vocab_size, info.path)
    found = {name: weights[name].to(device=device, dtype=dtype, copy=True) for name in model.state_dict()}
    model.load_state_dict(found, assign=True)
    model.requires_grad_(True)
    return model.eval(), info


def load_for_inference(path: str | Path, dtype: str = "", device: str = "") -> tuple[Decoder, LoadedModel]:
    """`load_model` as a command's --dtype (fp32, bf16, fp16) and --device name it.

    By default on the GPU, where there is one, in the stored type; else on the CPU in float32, which is the fastest there.
    """
    kinds = {"": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if dtype not in kinds:
        raise unknown_name("--dtype", dtype, [name for name in kinds if name])
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return load_model(path, kinds[dtype] or (torch.float32 if place == "cpu" else None), place)
    except (RuntimeError, AssertionError) as error:  # what torch says of a device that is not there or is full
        raise LlmkitError(f"device {place!r}: {str(error).splitlines()[0]}", "see --device") from error


def open_weights(info: LoadedModel) -> Weights:
    """The weights of a model directory, checked by name and shape against its configuration, none read yet."""
    weights = Weights(info.path, info.quantization)
    # Before a model is built even on the meta device: a configuration may claim a billion layers.
    if info.config.parameters() > 2 * weights.stored_bytes:
        raise LlmkitError(
            f"{info.path}: config.json means {info.config.parameters():,} weights, the files hold {weights.stored_bytes:,} bytes",
            "the directory is incomplete, or its config.json is another model's",
        )
    expected = expected_tensors(info.config)
    check_layout({name: shape for name, (_, shape) in weights.layout.items()}, expected, info)
    for name in expected:
        if not weights.layout[name][0].is_floating_point or weights.layout[name][0].itemsize < 2:
            raise LlmkitError(
                f"{info.path}: tensor {name} has type {weights.layout[name][0]}",
                "quantised weights need a quantization_config in config.json",
            )
    return weights


def check_layout(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], info: LoadedModel
) -> None:
    """Refuse weights that do not fit the configuration, naming the tensor."""

    def some(names: list[str]) -> str:
        return names[0] + (f" and {len(names) - 1} more" if names[1:] else "")

    if missing := sorted(expected.keys() - found.keys()):
        raise LlmkitError(
            f"{info.path}: missing tensor {some(missing)}",
            "the directory is incomplete, or its config.json is another model's",
        )
    # A tied model may store its output layer all the same; old directories hold rotary tables.
    extra = sorted(name for name in found.keys() - expected.keys() if not name.endswith("rotary_emb.inv_freq"))
    if info.config.tie_word_embeddings:
        extra = [name for name in extra if name != "lm_head.weight"]
    if extra:
        raise LlmkitError(
            f"{info.path}: unexpected tensor {some(extra)}",
            f"config.json describes a {info.config.architecture} without it",
        )
    for name, shape in expected.items():
        if found[name] != shape:
            raise LlmkitError(
                f"{info.path}: tensor {name} has shape {list(found[name])} where config.json means {list(shape)}",
                "the directory's parts belong to different models",
            )


def read_tokenizer_files(path: Path) -> dict[str, str]:
    """Name -> text of the tokenizer files in a directory; empty where there is none."""
    files = {}
    for name in TOKENIZER_FILES:
        file = path / name
        if file.is_file():
            if file.stat().st_size > MAX_TOKENIZER_BYTES:
                raise LlmkitError(f"{file}: larger than {MAX_TOKENIZER_BYTES >> 20} MiB", "this is no tokenizer")
            try:
                files[name] = file.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise LlmkitError(f"{file}: invalid UTF-8", "the file is damaged") from error
            if name.endswith(".json") and name != "tokenizer.json":  # which its library reads
                _check_object(file, files[name])
    return files


def _check_object(file: Path, text: str) -> None:
    """LlmkitError where a file's text is no JSON object."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LlmkitError(f"{file}: not JSON ({error})", "the file is damaged") from error
    if not isinstance(found, dict):
        raise LlmkitError(f"{file}: holds no JSON object", "the file is damaged")


def load_tokenizer(files: Mapping[str, str], where: str | Path) -> Tokenizer:
    """The tokenizer of a directory's files (the `tokenizers` library's); LlmkitError where there is none or it is damaged."""
    from tokenizers import Tokenizer

    if "tokenizer.json" not in files:
        raise LlmkitError(f"{where}: no tokenizer.json", "copy the tokenizer's files into the model directory")
    try:
        tokenizer = Tokenizer.from_str(files["tokenizer.json"])
    except Exception as error:  # the library raises bare Exception
        raise LlmkitError(
            f"{where}: tokenizer.json is not readable ({error})", "the file is damaged or of a newer version"
        ) from error
    # The file may hold the settings of whoever saved it; a text that is cut or padded in silence is another text.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, where: str | Path) -> None:
    """Refuse a tokenizer with ids that the model has no embedding for."""
    size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    if size > vocab_size:
        raise LlmkitError(
            f"{where}: the tokenizer has ids up to {size - 1:,}, the model only {vocab_size:,} of them",
            "they belong to different models",
        )


def save_model(
    directory: Path,
    state_dict: Mapping[str, Tensor],
    config: ModelConfig,
    tokenizer_files: Mapping[str, str],
    lineage_json: str | None = None,
    dtype: torch.dtype | None = None,
    stop_ids: list[int] | None = None,
) -> None:
    """Fill `directory` (it exists; the caller makes it atomic) with a model; `dtype=None` keeps the tensors' type.

    `stop_ids` go into generation_config.json; they default to the configuration's eos_token_id.
    """
    kept = {
        name: value
        for name, value in state_dict.items()
        if not (name == "lm_head.weight" and config.tie_word_embeddings)
    }
    layout = {name: (dtype or value.dtype, tuple(value.shape)) for name, value in kept.items()}
    metadata = {"format": "pt"} | ({"llmkit": lineage_json} if lineage_json else {})
    write_safetensors(directory / WEIGHTS, layout, lambda name: kept[name].to(layout[name][0]), metadata)
    stored = dtype or next(iter(layout_of(kept).values()))[0]
    save_description(directory, config.to_hf(DTYPE_NAMES[stored]), tokenizer_files, stop_ids)


def save_description(
    directory: Path, config_json: dict[str, Any], tokenizer_files: Mapping[str, str], stop_ids: list[int] | None = None
) -> None:
    """Everything of a model directory but the weights."""
    vocabulary = config_json["vocab_size"]
    if "tokenizer.json" in tokenizer_files:
        check_vocabulary(load_tokenizer(tokenizer_files, directory), vocabulary, directory)
    eos = stop_ids or config_json.get("eos_token_id")
    generation = {"eos_token_id": eos[0] if isinstance(eos, list) and len(eos) == 1 else eos}
    generation |= {name: config_json.get(name) for name in ("bos_token_id", "pad_token_id")}
    write_json(directory / "config.json", config_json)
    write_json(
        directory / "generation_config.json", {key: value for key, value in generation.items() if value is not None}
    )
    for name, text in with_template_in_both_places(tokenizer_files).items():
        (directory / name).write_text(text, encoding="utf-8")


def with_template_in_both_places(files: Mapping[str, str]) -> dict[str, str]:
    """transformers 5 reads the chat template from chat_template.jinja, older readers from tokenizer_config.json: the same text in both."""
    files = dict(files)
    if "tokenizer_config.json" in files:
        try:
            config = json.loads(files["tokenizer_config.json"])
        except ValueError as error:
            raise LlmkitError(
                f"tokenizer_config.json is not JSON ({error})", "the tokenizer's directory is damaged"
            ) from error
        if "chat_template.jinja" in files:
            config["chat_template"] = files["chat_template.jinja"]
            files["tokenizer_config.json"] = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        elif isinstance(config.get("chat_template"), str):
            files["chat_template.jinja"] = config["chat_template"]
    return files


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Indented JSON with sorted keys; a number that JSON has no form for is our bug."""
    assert all(not isinstance(value, float) or math.isfinite(value) for value in content.values())
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
