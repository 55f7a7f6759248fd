"""Compiled kernels over documents: what rules and deduplication measure. See llmkit/kernels for how kernels are written and kept.

Most take a text as `uint8[bytes]` and the table of character classes (`characters.classes()`); lengths that they return are in characters.
"""

import llmkit.kernels  # noqa: F401  before numba, since it says where compiled code is kept
