"""Architectures, one small file each: the file `olmo2.py` registers the `Family` (model/family.py) of
model_type `olmo2`.

A file names the architecture's block, whose parts give the tensors, the parameter count and the memory of
activations, and what its config.json leaves out or does not support. Nothing else in the package needs to know.
Third-party packages add architectures with the entry-point group `llmkit.architectures`, each pointing at a
`Family`. No file here imports torch: parameters are counted without it.
"""

from __future__ import annotations

from llmkit.registry import Registry

ARCHITECTURES = Registry("architecture", entry_points="llmkit.architectures", package=__name__)
