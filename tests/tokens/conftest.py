"""A small vocabulary for each pattern, trained once."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import pytest

from llmkit.shards.tokenizer_info import TokenizerInfo, parse_tokenizer
from llmkit.tokens import vocabulary

TEXTS = [
    "The quick brown fox jumps over the lazy dog, and the dog didn't mind: it'd seen 1234 foxes since 2019.\n",
    "def main():\n    for i in range(100):\n        print(f'{i:>8}')\n\n\n    return None\n",
    "Straße, naïve café, 東京都 and 日本語のテキスト; Привет, мир! مرحبا بالعالم 👩‍👩‍👧 \t\u00a0\r\n",
] * 4


@pytest.fixture(scope="session")
def trained() -> Callable[[str], TokenizerInfo]:
    """`trained(pattern)`: a vocabulary of 384 tokens from a few lines of prose, code and other scripts."""

    @lru_cache
    def make(pattern: str) -> TokenizerInfo:
        files = vocabulary.train(TEXTS, 384, pattern).files
        return parse_tokenizer(files | {"tokenizer_config.json": vocabulary.tokenizer_config({})}, pattern)

    return make
