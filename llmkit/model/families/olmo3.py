"""OLMo 3 (arXiv:2512.13961): OLMo 2 with a sliding window in three layers of four. A scaling of the rotary
embedding applies to the other layers only.
"""

from __future__ import annotations

from llmkit.model.families import ARCHITECTURES
from llmkit.model.families.olmo2 import BLOCK, NORM
from llmkit.model.family import Family, Key, local_and_global_rope, patterned_window

ARCHITECTURES.register("olmo3")(
    Family(
        "Olmo3ForCausalLM",
        BLOCK,
        defaults={"rms_norm_eps": 1e-5, "rope_theta": 5e5},
        keys={"sliding_window": Key(4096, "count or null"), "layer_types": Key(None, "layers")},
        unsupported=("mlp_bias",),
        norm=NORM,
        rope=local_and_global_rope,
        local_theta=5e5,
        float32_rotation=True,
        window=patterned_window(4),
    )
)
