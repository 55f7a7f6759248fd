"""Main content by blocks: which paragraphs, headings and list items of a page belong to its text.

resiliparse finds the main part of a page by rules over its tree. What it leaves in (related stories, share bars, lists of links at the end) differs from
the text in length and in how much of it is links, so the blocks are judged by these two, as in Kohlschütter et al., "Boilerplate Detection using
Shallow Text Features" (WSDM 2010): a block of at least 12 words, or of 5 that end as a sentence does, with few links is text. Everything between the
first and the last of these stays unless it is mostly links, with the headings before the first; stray good blocks far behind the end go.
"""

from __future__ import annotations

import re
from html import unescape
from typing import Any, NamedTuple

CONTAINERS = (
    "[itemprop~=articleBody]",
    "article",
    "main",
)  # elements that say they hold the text, if there is one of a kind
CONTAINER_SHARE = 0.6  # of the main content that such an element has to hold
TEXT_WORDS, SENTENCE_WORDS = 12, 5
TEXT_LINKS, KEPT_LINKS = 0.4, 0.5  # share of characters inside links
STRAY_GAP, STRAY_SHARE = 4, 0.12  # blocks of other kinds, then at most this share of the words: no longer the text
SENTENCE_ENDS = (".", "!", "?", '"', "”", "…", ":")

LINK = re.compile(r"<a\b[^>]*>(.*?)</a>", re.DOTALL)
TAG = re.compile(r"<[^>]*>")
PREFORMATTED = re.compile(r"(<pre>.*?</pre>)", re.DOTALL)
BORDER = re.compile(r"\n\s*\n|(?=<(?:p|h[1-6]|li|ul|ol)[ >])|(?<=</p>)|(?<=</li>)|(?<=</h[1-6]>)")
KIND = re.compile(r"\s*<(p|h[1-6]|li|pre)\b")


class Block(NamedTuple):
    """A piece of a page: its element (p, h1, li, pre, or none), text, share of characters inside links, and number of words."""

    kind: str
    text: str
    links: float
    words: int

    @property
    def is_text(self) -> bool:
        if self.links >= TEXT_LINKS:
            return False
        return self.words >= TEXT_WORDS or (self.words >= SENTENCE_WORDS and self.text.endswith(SENTENCE_ENDS))


def main_text(tree: Any) -> str:
    """The main text of a parsed page: paragraphs with a blank line between them, list items with bullets."""
    blocks = split(_main_markup(tree))
    return join(block for block, kept in zip(blocks, choose(blocks), strict=True) if kept)


def split(markup: str) -> list[Block]:
    """The blocks of resiliparse's reduced markup, in order, none empty."""
    found = []
    for part in PREFORMATTED.split(markup):
        for piece in [part] if part.startswith("<pre>") else BORDER.split(part):
            kind = KIND.match(piece)
            text = unescape(TAG.sub("", re.sub(r"<br\s*/?>", "\n", piece)))
            text = text.rstrip().lstrip("\n") if kind and kind[1] == "pre" else text.strip()
            if text:
                inside = sum(len(TAG.sub("", link)) for link in LINK.findall(piece))
                found.append(Block(kind[1] if kind else "", text, min(1.0, inside / len(text)), len(text.split())))
    return found


def choose(blocks: list[Block]) -> list[bool]:
    """Whether each block belongs to the text; all do where none looks like text."""
    good = [number for number, block in enumerate(blocks) if block.is_text]
    if not good:
        return [True] * len(blocks)
    first, last = good[0], _last(blocks, good)
    return [
        number <= last
        and (number >= first or block.kind.startswith("h"))
        and (block.is_text or block.kind == "pre" or block.links < KEPT_LINKS)
        for number, block in enumerate(blocks)
    ]


def _last(blocks: list[Block], good: list[int]) -> int:
    """Number of the last block of text, stray ones behind it left out."""
    last, words, behind = good[-1], sum(blocks[number].words for number in good), 0
    for before, after in zip(reversed(good[:-1]), reversed(good[1:]), strict=True):
        behind += blocks[after].words
        if behind > STRAY_SHARE * words:
            break
        if after - before > STRAY_GAP:
            last = before
    return last


def join(blocks: Any) -> str:
    """Text of blocks: a blank line between them, none between list items."""
    text, before = "", ""
    for block in blocks:
        item = block.kind == "li"
        text += "" if not text else "\n" if item and before == "li" else "\n\n"
        text += f"• {block.text}" if item and not block.text.startswith("•") else block.text
        before = block.kind
    return text


def _main_markup(tree: Any) -> str:
    """Reduced markup of the main content, or of the one element that says it is that and holds most of it."""
    from resiliparse.parse.html import HTMLTree

    whole = _markup(tree)
    for selector in CONTAINERS:
        elements = tree.document.query_selector_all(selector)
        if len(elements) == 1:
            inner = _markup(HTMLTree.parse(f"<body><main>{elements[0].outer_html}</main></body>"))
            if len(inner) >= CONTAINER_SHARE * len(whole):
                return inner
    return whole


def _markup(tree: Any) -> str:
    from resiliparse.extract.html2text import extract_plain_text

    markup: str = extract_plain_text(
        tree,
        preserve_formatting="minimal_html",
        main_content=True,
        alt_texts=False,
        links=True,
        comments=False,
        post_meta=False,
    )
    return markup
