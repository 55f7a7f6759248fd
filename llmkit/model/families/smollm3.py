"""SmolLM 3: Llama's block without a rotary embedding in every fourth layer (arXiv:2501.18795)."""

from __future__ import annotations

from llmkit.model.blocks import ResidualBlock
from llmkit.model.config import ModelConfig
from llmkit.model.families import ARCHITECTURES
from llmkit.model.family import OPTIONAL_WINDOW, Family, Key, global_rope, optional_window
from llmkit.model.rope import Rope


def rope(config: ModelConfig, layer: int) -> Rope | None:
    """Of layers whose entry in `no_rope_layers` is 1; by default those but every `no_rope_layer_interval`-th."""
    switches = config.own["no_rope_layers"]
    rotated = switches[layer] if switches else (layer + 1) % config.own["no_rope_layer_interval"] != 0
    return global_rope(config, layer) if rotated else None


ARCHITECTURES.register("smollm3")(
    Family(
        "SmolLM3ForCausalLM",
        ResidualBlock(),
        defaults={"rope_theta": 2e6, "tie_word_embeddings": True},
        keys=OPTIONAL_WINDOW
        | {"no_rope_layers": Key(None, "switches", omitted=True), "no_rope_layer_interval": Key(4, "count")},
        rope=rope,
        window=optional_window,
    )
)
