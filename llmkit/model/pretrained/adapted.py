"""The weights of a model with its adapters merged, read one tensor at a time: W + scale · B A, for DoRA with rows of
the trained lengths, computed in float32 and rounded to the type of W. Trained rows replace those of the embedding and
the output layer, or follow them.

    weights = AdaptedWeights(info, info.adapter)
    weights["model.layers.0.self_attn.q_proj.weight"]

Adapters may come from anybody: names and shapes are checked against the configuration before a tensor is read.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from llmkit.errors import LlmkitError
from llmkit.io.run_layout import member
from llmkit.model.family import LORA_A, LORA_B, MAGNITUDE, TOKENS
from llmkit.model.lora.config import ADAPTER_WEIGHTS, PREFIX, LoraConfig
from llmkit.model.pretrained.directory import Adapter, LoadedModel
from llmkit.model.pretrained.header import Stored, read_header
from llmkit.model.pretrained.safetensors import read_tensor
from llmkit.model.pretrained.weights import Weights

TYPES = ("F32", "F16", "BF16")


class AdaptedWeights(Weights):
    """Weights of the base, merged on access."""

    def __init__(self, info: LoadedModel, adapter: Adapter) -> None:
        super().__init__(adapter.base)
        self._transposed = info.config.family.transposed(info.config)
        self._lora = adapter.config
        self._adapters = AdapterTensors(info.path, adapter.config, info)
        self._tokens = {f"{name}.weight": ids for name, ids in adapter.config.tables(info.config).items()}
        for name in self._tokens:
            dtype, (_, width) = self.layout[name]
            self.layout[name] = (dtype, (info.config.vocab_size, width))

    def __getitem__(self, name: str) -> Tensor:
        weight, module = super().__getitem__(name), name.removesuffix(".weight")
        if name in self._tokens:
            table = weight.new_empty(self.layout[name][1])
            table[: len(weight)] = weight
            table[list(self._tokens[name])] = self._adapters[module + TOKENS].to(weight.dtype)
            return table
        if module == name or module + LORA_A not in self._adapters.layout:
            return weight
        dense = (weight.T if self._transposed else weight).float()
        a, b = (self._adapters[module + ending] for ending in (LORA_A, LORA_B))
        merged = torch.addmm(dense, b, a, alpha=self._lora.scale_of(module))
        if self._lora.dora:
            merged *= (self._adapters[module + MAGNITUDE] / torch.linalg.vector_norm(merged, dim=1))[:, None]
        return (merged.T if self._transposed else merged).to(weight.dtype).contiguous()


class AdapterTensors:
    """The tensors of a directory of adapters as float32, by their names in the decoder.

    LlmkitError names the first tensor that is missing, unexpected, or of the wrong type or shape.
    """

    def __init__(self, directory: Path, lora: LoraConfig, info: LoadedModel) -> None:
        self._file = member(directory, ADAPTER_WEIGHTS)
        self.layout: dict[str, Stored] = {}
        for name, entry in read_header(self._file).items():
            if not name.startswith(PREFIX):
                raise LlmkitError(f"{self._file}: tensor {name:.200} is not named as in PEFT", f"{PREFIX}... is")
            self.layout[name.removeprefix(PREFIX)] = entry
        # An adapter has at least two tensors in a layer: a configuration may claim a billion layers.
        expected = lora.tensors(info.config) if info.config.num_hidden_layers <= len(self.layout) else {}
        if not expected:
            raise LlmkitError(f"{self._file}: not adapters of the layers of a {info.config.architecture}", _OTHER)
        if unexpected := sorted(self.layout.keys() - expected.keys()):
            family = info.config.family
            if ".base_layer." in unexpected[0] or unexpected[0] in (family.embedding, family.head):
                what = f"{self._file}: tensor {unexpected[0]:.200}: whole layers beside adapters are not supported"
                raise LlmkitError(what, "merge them with PEFT: merge_and_unload")
            raise LlmkitError(f"{self._file}: unexpected tensor {unexpected[0]:.200}", _OTHER)
        for name, shape in expected.items():
            if (found := self.layout.get(name)) is None:
                raise LlmkitError(f"{self._file}: missing tensor {PREFIX}{name}", _OTHER)
            if found.shape != shape or found.dtype not in TYPES:
                is_ = f"{found.dtype} {list(found.shape)}"
                raise LlmkitError(f"{self._file}: tensor {PREFIX}{name} is {is_}, not F32 {list(shape)}", _OTHER)

    def __getitem__(self, name: str) -> Tensor:
        with open(self._file, "rb", buffering=0) as stream:
            return read_tensor(stream, self.layout[name], f"{self._file}: tensor {name}").float()


_OTHER = "they belong to another model, or adapter_config.json to other adapters"
