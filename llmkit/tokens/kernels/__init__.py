"""Compiled kernels over text and tokens: splitting text into pieces, merging pieces into ids. See llmkit/kernels."""

import llmkit.kernels  # noqa: F401  before numba, since it sets the cache directory
