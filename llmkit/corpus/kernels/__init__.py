"""Compiled kernels over documents, shared by filters and deduplication. llmkit/kernels explains how kernels are
written.

Most kernels take a text as `uint8[bytes]` and the table of character classes (`characters.classes()`). Lengths
that they return are in characters.
"""

import llmkit.kernels  # noqa: F401  before numba, since it sets where compiled code is cached
