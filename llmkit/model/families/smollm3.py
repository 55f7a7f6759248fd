"""SmolLM 3: Llama's block without a rotary embedding in every fourth layer (arXiv:2501.18795)."""

from __future__ import annotations

from llmkit.model.blocks import ResidualBlock
from llmkit.model.config import SLIDING, ModelConfig
from llmkit.model.families import ARCHITECTURES
from llmkit.model.family import OPTIONAL_WINDOW, Family, Key, global_rope
from llmkit.model.rope import Rope


def rope(config: ModelConfig, layer: int) -> Rope | None:
    """Of layers whose entry in `no_rope_layers` is 1; by default those but every `no_rope_layer_interval`-th."""
    return global_rope(config, layer) if _is_rotated(config, layer) else None


def window(config: ModelConfig, layer: int) -> int | None:
    """If sliding windows are switched on, of the layers of `layer_types`, or of those without a rotary embedding."""
    own = config.own
    types = own["layer_types"]
    slides = types[layer] == SLIDING if types else not _is_rotated(config, layer)
    return own["sliding_window"] if own["use_sliding_window"] and slides else None


def _is_rotated(config: ModelConfig, layer: int) -> bool:
    switches = config.own["no_rope_layers"]
    return bool(switches[layer]) if switches else (layer + 1) % config.own["no_rope_layer_interval"] != 0


ARCHITECTURES.register("smollm3")(
    Family(
        "SmolLM3ForCausalLM",
        ResidualBlock(),
        defaults={
            "max_position_embeddings": 32_768,
            "num_key_value_heads": 4,
            "rope_theta": 2e6,
            "tie_word_embeddings": True,
        },
        keys=OPTIONAL_WINDOW
        | {"sliding_window": Key(None, "count or null", omitted=True)}
        | {"no_rope_layers": Key(None, "switches", omitted=True), "no_rope_layer_interval": Key(4, "count")},
        rope=rope,
        window=window,
    )
)
