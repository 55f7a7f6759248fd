"""Compiled kernels over rows of float32, for training on the CPU. See llmkit/kernels for how compiled code is
cached.
"""

import llmkit.kernels  # noqa: F401  before numba, because it sets the cache directory
