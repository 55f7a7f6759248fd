"""Main content by blocks: which paragraphs, headings and list items of a page belong to its text.

resiliparse finds the main part of a page by rules over its tree. The boilerplate that remains (related stories,
share bars, lists of links at the end) differs from the text in its length and its share of links, so blocks are
classified by these two, as in Kohlschütter et al., "Boilerplate Detection using Shallow Text Features" (WSDM
2010). A block with few links is text if it has at least 12 words, or at least 5 and a sentence end. Everything
between the first and the last of these blocks is kept unless it is mostly links, together with the headings
before the first; stray text blocks far after the end are removed. In scripts without spaces between words, two
characters of Chinese or Japanese count as a word, and four of Thai, Lao, Burmese or Khmer.

resiliparse 2.0.1 drops pieces of text that are a single character of three bytes, as most of Chinese, `€` or `’` in an
element of its own. These are lengthened before the page is parsed, except for bullets, arrows and other icons.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from html import unescape
from typing import Any, NamedTuple

from llmkit.corpus.words import TERMINALS

# Elements that declare themselves to contain the text; used if there is exactly one of a kind.
CONTAINERS = ("[itemprop~=articleBody]", "article", "main")
CONTAINER_SHARE = 0.6  # minimum share of the main content in such an element
TEXT_WORDS, SENTENCE_WORDS = 12, 5
TEXT_LINKS, KEPT_LINKS = 0.4, 0.5  # share of characters inside links
STRAY_GAP, STRAY_SHARE = 4, 0.12  # after more than this many other blocks, at most this share of the words is stray
SENTENCE_ENDS = TERMINALS | set('"”…:：」』》')
# Characters of scripts without spaces, and how many of them are about as much as a word.
UNSPACED = (
    (re.compile("[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"), 2),
    (re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]"), 4),
)
SINGLE = re.compile(r">\s*([\u0800-\uffff]|&#?\w{1,31};)(?=\s*<)")
FILLERS = tuple(map(chr, range(0xFDD0, 0xFDF0)))  # characters that no text has
ICONS = frozenset("•‣⁃∙‹›")
ICON_KINDS = ("So", "Co", "Cf", "Zs")

BREAK = re.compile(r"<br\s*/?>")
LINK = re.compile(r"<a\b[^>]*>(.*?)</a>", re.DOTALL)
TAG = re.compile(r"<[^>]*>")
PREFORMATTED = re.compile(r"(<pre>.*?</pre>)", re.DOTALL)
# A blank line, a closing tag after which a block ends, or the "<" of an opening one before which a block begins.
BORDER = re.compile(r"\n\s*\n|<(?:/(?:p|li|h[1-6])>|(?=(?:p|h[1-6]|li|ul|ol)[ >]))")
KIND = re.compile(r"\s*<(p|h[1-6]|li|pre)\b")


class TextBlock(NamedTuple):
    """A block of a page: its element (p, h1, li, pre, or none), text, share of characters in links, number of words."""

    kind: str
    text: str
    links: float
    words: int

    @property
    def is_text(self) -> bool:
        if self.links >= TEXT_LINKS:
            return False
        return self.words >= TEXT_WORDS or (self.words >= SENTENCE_WORDS and self.text[-1] in SENTENCE_ENDS)


def main_text(tree: Any, source: str) -> str:
    """The main text of a parsed page: paragraphs with a blank line between them, list items with bullets."""
    lengthened, filler = _lengthen(source)
    if filler:
        from resiliparse.parse.html import HTMLTree

        tree = HTMLTree.parse(lengthened)
    blocks = split(_main_markup(tree))
    text = join(block for block, keep in zip(blocks, choose(blocks), strict=True) if keep)
    return text.replace(filler, "") if filler else text


def _lengthen(source: str) -> tuple[str, str]:
    """A page with a filler after each character that resiliparse would drop, and the filler; "" if there is none."""
    if source.isascii() and "&" not in source:
        return source, ""
    filler = next((filler for filler in FILLERS if filler not in source), "")
    lengthened = SINGLE.sub(lambda match: match[0] + filler * _is_dropped(unescape(match[1])), source)
    return (lengthened, filler) if len(lengthened) != len(source) else (source, "")


def _is_dropped(text: str) -> bool:
    """Whether resiliparse would drop this character, and it is no icon."""
    if len(text) != 1 or not "\u0800" <= text <= "\uffff" or text in ICONS or "\u2190" <= text <= "\u21ff":
        return False
    return unicodedata.category(text) not in ICON_KINDS


def split(markup: str) -> list[TextBlock]:
    """The blocks of resiliparse's reduced markup, in order, none empty."""
    blocks = []
    for part in PREFORMATTED.split(markup):
        for piece in [part] if part.startswith("<pre>") else _pieces(part):
            kind = KIND.match(piece)
            text = unescape(TAG.sub("", BREAK.sub("\n", piece) if "<br" in piece else piece))
            text = text.rstrip().lstrip("\n") if kind and kind[1] == "pre" else text.strip()
            if text:
                linked = sum(len(TAG.sub("", link)) for link in LINK.findall(piece)) if "<a" in piece else 0
                blocks.append(
                    TextBlock(kind[1] if kind else "", text, min(1.0, linked / len(text)), _count_words(text))
                )
    return blocks


def _pieces(markup: str) -> Iterator[str]:
    """What lies between borders."""
    start = 0
    for border in BORDER.finditer(markup):
        first, last = border.span()
        yield markup[start : last if border[0].startswith("</") else first]
        start = first if border[0] == "<" else last
    yield markup[start:]


def _count_words(text: str) -> int:
    words = len(text.split())
    return words if text.isascii() else words + sum(len(script.findall(text)) // size for script, size in UNSPACED)


def choose(blocks: list[TextBlock]) -> list[bool]:
    """Whether each block belongs to the text; all blocks do if none looks like text."""
    is_text = [block.is_text for block in blocks]
    text_blocks = [number for number, found in enumerate(is_text) if found]
    if not text_blocks:
        return [True] * len(blocks)
    first, last = text_blocks[0], _last_text_block(blocks, text_blocks)
    return [
        number <= last
        and (number >= first or block.kind.startswith("h"))
        and (is_text[number] or block.kind == "pre" or block.links < KEPT_LINKS)
        for number, block in enumerate(blocks)
    ]


def _last_text_block(blocks: list[TextBlock], text_blocks: list[int]) -> int:
    """Number of the last block of the text, without stray blocks after it."""
    last, words, words_after = text_blocks[-1], sum(blocks[number].words for number in text_blocks), 0
    for before, after in zip(reversed(text_blocks[:-1]), reversed(text_blocks[1:]), strict=True):
        words_after += blocks[after].words
        if words_after > STRAY_SHARE * words:
            break
        if after - before > STRAY_GAP:
            last = before
    return last


def join(blocks: Any) -> str:
    """Text of blocks: a blank line between them, none between list items."""
    text, previous_kind = "", ""
    for block in blocks:
        item = block.kind == "li"
        text += "" if not text else "\n" if item and previous_kind == "li" else "\n\n"
        text += f"• {block.text}" if item and not block.text.startswith("•") else block.text
        previous_kind = block.kind
    return text


def _main_markup(tree: Any) -> str:
    """Reduced markup of the main content, or of the element that declares to be it and contains most of it."""
    from resiliparse.parse.html import HTMLTree

    page_markup = _markup(tree)
    for selector in CONTAINERS:
        elements = tree.document.query_selector_all(selector)
        if len(elements) == 1:
            container_markup = _markup(HTMLTree.parse(f"<body><main>{elements[0].outer_html}</main></body>"))
            if len(container_markup) >= CONTAINER_SHARE * len(page_markup):
                return container_markup
    return page_markup


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
