"""Compiled kernels over text and tokens: cutting text into pieces, merging pieces into ids. See llmkit/kernels for how kernels are written and kept."""

import llmkit.kernels  # noqa: F401  before numba, since it says where compiled code is kept
