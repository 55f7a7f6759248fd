"""Compiled kernels over rows of float32, for training on CPU. See llmkit/kernels for how kernels are kept."""

import llmkit.kernels  # noqa: F401  before numba, since it says where compiled code is kept
