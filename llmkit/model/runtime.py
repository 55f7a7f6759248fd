from __future__ import annotations
import os
import torch
def prepare(model, *, compile=False):
    if not os.environ.get("PLAIN"):
        from llmkit.model.fused import Fused
        model.operations = Fused()
    if compile:
        for layer in model.model.layers:
            layer.compile(dynamic=False)
