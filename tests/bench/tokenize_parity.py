"""Does `llmkit tokenize` give the ids of the `tokenizers` library? Every text of ../shared/data/text, every language of UDHR, random strings; prints a dated table.

    python tests/bench/tokenize_parity.py [--shared ../shared/data] [--strings 100000] > tests/bench/tokenize_parity.md

For the four patterns, each at three vocabulary sizes trained on a share of the same texts: ids of each text, compiled, against `Tokenizer.encode`. Random
strings are drawn by a fixed seed: characters of all planes; letters with marks on them; what the patterns tell apart (apostrophes, digits, carriage
returns, U+0085, spaces of all widths, zero-width characters); right-to-left text; emoji sequences; names of special tokens. Anything but 0 differences is a bug.
"""

from __future__ import annotations

import argparse
import datetime
import io
import platform
import random
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from peers import SHARED, call, decompress, members, rows_of

from llmkit.shards.tokenizer_info import parse_tokenizer
from llmkit.tokens import vocabulary
from llmkit.tokens.pretokenize import PATTERNS
from llmkit.tokens.text_encoder import TextEncoder, load_tokenizer

SIZES = (1024, 8192, 32768)
SAMPLE = 6  # every so many-th text is trained on
KINDS = {
    "all planes": None,
    "marks": "aeiouAEIOUnсйकखがｶ\u0300\u0301\u0308\u0323\u064b\u0651\u093c\u094d\u3099\u20dd\u0e31\u0e49",
    "edges": " \u00a0\u2003\u3000\u2028\u0085\t\n\r\x0b\x0c\x1c'’sStTreEvVmMlLdDſK0123456789٣½²Ⅳ.,!?-_—()[]{}<|>/\\\u200b\u200c\u200d\u2060\ufeff\u00ad\x00",
    "right to left": "אבגדהשלום ابتثجمرحبا0123٠١٢٣.,()\u200e\u200f\u202b\u202c\u2067\u2069\u05b0\u05bc\u0640",
    "emoji": "👩👨👧🏽🏿❤🏳🌈🇩🇪🇫🇷⚧✊🙂😀\ufe0f\ufe0e\u200d\u20e3#*0 ",
}  # fmt: skip
PIECES = ("<|endoftext|>", "<|im_start|>", "<|pad|>", " the", "don't", "\r\n", "\n\n", "  ", "1234567", "I'LL")


def texts_of(path: Path) -> Iterator[str]:
    """Every text in a file of ../shared/data."""
    name = path.name
    if name.endswith(".jsonl.zst"):
        yield from (row["text"] for row in rows_of(path))
    elif name.endswith(".tar.zst"):
        yield from (content.decode(errors="replace") for _, content in members(path))
    elif name.endswith(".zip"):
        with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as packed:
            yield from (packed.read(item).decode(errors="replace") for item in packed.infolist())
    else:
        yield decompress(path).decode(errors="replace")


def strings(count: int) -> Iterator[str]:
    """Random texts by a fixed seed, of each kind in turn."""
    draw = random.Random(5)
    kinds = list(KINDS.values())
    for i in range(count):
        characters, size = kinds[i % len(kinds)], draw.randrange(1, 60)
        if characters is None:
            tops = draw.choices((0x80, 0x800, 0x3000, 0x10000, 0x20000, 0x110000), k=size)
            codes = [draw.randrange(top) for top in tops]
            text = "".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000)
        else:
            text = "".join(draw.choices(characters, k=size))
        if draw.random() < 0.3:
            at = draw.randrange(len(text) + 1)
            text = text[:at] + draw.choice(PIECES) + text[at:]
        yield text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, default=SHARED)
    parser.add_argument("--strings", type=int, default=100_000)
    given = parser.parse_args()
    files = sorted((given.shared / "text").iterdir())
    languages = [given.shared / "lang" / name for name in ("udhr_xml_text.jsonl.zst", "nltk_udhr2.zip")]
    groups = {
        f"{len(files)} files of text": [text for file in files for text in texts_of(file)],
        "UDHR in every language": [text for file in languages for text in texts_of(file)],
        "random strings": list(strings(given.strings)),
    }
    import tokenizers

    print(
        f"# Ids beside those of `tokenizers` {tokenizers.__version__}\n\n{datetime.date.today()}, Python {platform.python_version()}; `{call()}`\n"
    )
    for name, texts in groups.items():
        print(f"{name}: {len(texts):,} texts, {sum(len(text.encode()) for text in texts) / 1e6:.1f} MB. ", end="")
    print(f"\n\n| pattern | vocabulary | {' | '.join(groups)} | ids |\n|---|---:|{'---:|' * len(groups)}---:|")
    wrong = 0
    for pattern in PATTERNS:
        for size in SIZES:
            sample = (text for texts in groups.values() for text in texts[::SAMPLE])
            made = vocabulary.train(sample, size, pattern)
            files_made = made.files | {"tokenizer_config.json": vocabulary.tokenizer_config({})}
            info = parse_tokenizer(files_made, pattern)
            encoder, library = TextEncoder(info, compiled=True), load_tokenizer(info)
            cells, total = [], 0
            for name, texts in groups.items():
                begin = time.perf_counter()
                ids, lengths = encoder(texts)
                parts = np.split(ids, np.cumsum(lengths)[:-1])
                different = [text for text, part in zip(texts, parts, strict=True)
                             if library.encode(text, add_special_tokens=False).ids != part.tolist()]  # fmt: skip
                cells.append(f"{len(different):,} differ")
                wrong += len(different)
                total += len(ids)
                print(f"{pattern} {size} {name}: {time.perf_counter() - begin:.0f} s", file=sys.stderr)
                for text in different[:3]:
                    print(f"{pattern} {size}: {text[:200]!r}", file=sys.stderr)
            assert encoder._fast is not None
            print(f"| {pattern} | {info.vocab_size:,} | {' | '.join(cells)} | {total:,} |", flush=True)
    print(f"\n{wrong} differences.")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
