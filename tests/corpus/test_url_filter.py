"""Filters that read the user's lists (URLs, bad words), and those for length, samples and regular expressions."""

from __future__ import annotations

import gzip
import sys
import time
from pathlib import Path

import pytest
from chains import chain_of, reason_of

from llmkit.corpus.chain import Chain
from llmkit.corpus.chain_loader import load_chain
from llmkit.corpus.filters.url import host_of, normalized_url, parents
from llmkit.corpus.lists import StringSet
from llmkit.errors import LlmkitError, UsageError
from llmkit.io.splice import dotted

pytest.importorskip("re2", reason="google-re2 is not installed")


def reason(chain: Chain, text: str = "text", **fields: object) -> tuple[str, object]:
    return reason_of(chain, text, fields)


@pytest.fixture
def url_chain(tmp_path: Path) -> Chain:
    """Every kind of list, with words in mixed case and one compressed file."""
    lists = {
        "domains": "# a comment\nexample.com\n\nmünchen.de\n*.wild.net\n10.0.0.7\nzip\n",
        "hosts": "www.only-here.org\n",
        "urls": "https://news.site.org/A/B?x=1\nhttp://other.org/page/\n",
        "words": "Casino\nслово\n",
        "soft_words": "adult\nsex\nteen\n",
        "substrings": "free-pills\nviagra\n",
        "patterns": "(?i)/tag/[0-9]+$\n",
    }
    rules = []
    for name, content in lists.items():
        path = tmp_path / f"{name}.txt"
        path.write_bytes(gzip.compress(content.encode()) if name == "hosts" else content.encode())
        rules.append(f"url.{name}={path}")
    return load_chain([], ["url"], rules, "unicode")


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://example.com/", ("domain", "example.com")),
        ("HTTPS://user:pass@Shop.EXAMPLE.com.:8080/x", ("domain", "example.com")),
        ("http://notexample.com/", ("", None)),
        ("http://example.com.org/", ("", None)),
        ("https://xn--mnchen-3ya.de/a", ("domain", "xn--mnchen-3ya.de")),
        ("https://www.münchen.de/a", ("domain", "xn--mnchen-3ya.de")),
        ("http://a.wild.net/", ("domain", "wild.net")),
        ("http://anything.zip/x", ("domain", "zip")),
        ("http://10.0.0.7/x", ("domain", "10.0.0.7")),
        ("http://1.10.0.0.7/x", ("", None)),
        ("example.com/no/scheme", ("domain", "example.com")),
        ("//example.com/x", ("domain", "example.com")),
        ("http://www.only-here.org/x", ("subdomain", "www.only-here.org")),
        ("http://only-here.org/x", ("", None)),
        ("http://news.site.org/a/b?x=1#part", ("url", "news.site.org/a/b?x=1")),
        ("http://other.org/page", ("url", "other.org/page")),
        ("http://other.org/page/2", ("", None)),
        ("http://x.org/CASINO-bonus", ("hard_blacklisted", "casino")),
        ("http://x.org/casinos", ("", None)),
        ("http://x.org/%D0%A1%D0%9B%D0%9E%D0%92%D0%9E", ("hard_blacklisted", "слово")),
        ("http://x.org/Adult/sex", ("soft_blacklisted", "adult,sex")),
        ("http://x.org/adult/adult", ("", None)),
        ("http://x.org/buy-FREE-pills-now", ("blacklisted_subword", "freepills")),
        ("http://x.org/v.i.a.g.r.a", ("blacklisted_subword", "viagra")),
        ("http://x.org/Tag/12", ("pattern", "(?i)/tag/[0-9]+$")),
    ],
)
def test_url_reasons(url_chain: Chain, url: str, expected: tuple[str, object]) -> None:
    """Behaviour: each reason in order; case, ports, users, percent escapes and internationalised names do not evade lists."""
    assert reason(url_chain, url=url) == expected


@pytest.mark.parametrize(
    "url",
    ["http://[::1", "http://[::1]/x", "http://[zz]:99999999/", "\x00\n", "http://" + "ä" * 300 + ".de", "http://a" * 20000, 5, None, "", "://", "http://a..b/",
     "http://user@[fe80::1%25eth0]:80", "http://x:port/"],
)  # fmt: skip
def test_malformed_urls_are_kept(url_chain: Chain, url: object) -> None:
    """Behaviour: malformed URLs neither raise nor are dropped."""
    assert reason(url_chain, url=url) == ("", None)


def test_url_field_and_missing_url(tmp_path: Path) -> None:
    """Behaviour: the field may be nested; a document without a URL is kept unless one is required."""
    (tmp_path / "d.txt").write_text("bad.org\n")
    chain = chain_of("url", domains=tmp_path / "d.txt", field="metadata.url")
    assert reason(chain, metadata={"url": "http://bad.org"}) == ("domain", "bad.org")
    assert reason(chain, url="http://bad.org") == ("", None)
    assert reason(chain_of("url", require_url="true")) == ("no_url", None)
    assert reason(chain_of("url", require_url="true"), url="http://a.b") == ("", None)


def test_url_parts() -> None:
    """Behaviour: hosts, their parents, and URLs in the form that is compared."""
    assert parents("a.b.co.uk") == ["a.b.co.uk", "b.co.uk", "co.uk", "uk"]
    assert parents("") == [] and parents("::1") == ["::1"] and parents("1.2.3.4") == ["1.2.3.4"]
    assert [host_of(url) for url in ("http://[::1]:80/", "http://[::1", "x", "")] == ["::1", "[", "x", ""]
    assert normalized_url("HTTP://A.org/b%20c/#d") == "a.org/b c"


def test_large_lists_are_compact_and_fast(tmp_path: Path) -> None:
    """Behaviour: 200,000 domains take 8 bytes each and load in seconds (0.4 s when measured)."""
    (tmp_path / "d.txt").write_text("\n".join(f"site{i}.example{i % 7}.org" for i in range(200_000)))
    start = time.process_time()
    chain = chain_of("url", domains=tmp_path / "d.txt")
    chain.warm_up()
    assert time.process_time() - start < 10
    assert reason(chain, url="http://www.site12345.example4.org/") == ("domain", "site12345.example4.org")
    assert reason(chain, url="http://www.site12345.example5.org/") == ("", None)
    table = StringSet(f"entry {i}" for i in range(1000))
    assert table.hashes.nbytes == 8008 and table.members(["entry 7", "no", "entry 999"]) == ["entry 7", "entry 999"]
    assert StringSet([]).first_member(["a"]) is None and table.first_member([]) is None


@pytest.mark.parametrize(
    ("content", "setting", "message"),
    [
        (b"\xff\xfe\n", "domains", ":1: not UTF-8"),
        (b"good\n" + b"x" * 100_000, "words", ":2: a line of over"),
        (b"ok.*\n[a-z\n", "patterns", "x.txt:2: '[a-z' is not a valid pattern"),
        (None, "hosts", "No such file"),
    ],
)
def test_bad_lists(tmp_path: Path, content: bytes | None, setting: str, message: str) -> None:
    """Behaviour: the error names file and line, before the first document is read."""
    if content is not None:
        (tmp_path / "x.txt").write_bytes(content)
    with pytest.raises(LlmkitError) as caught:
        chain_of("url", **{setting: tmp_path / "x.txt"}).warm_up()
    assert message in caught.value.message


@pytest.fixture
def bad_words(tmp_path: Path) -> Path:
    path = tmp_path / "words.txt"
    path.write_text("# list\nass\nbad  phrase\nf*ck\nдурак\n坏词\nfoo bar baz\nfoo bar\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("a class of assets passes", 0),
        ("ASS, ass-like; the ass's. Ass", 4),
        ("a Bad\n phrase and bad, phrase", 1),
        ("f*ck f*ckx", 1),
        ("Дурак! дураки", 1),
        ("这是坏词吗坏词", 2),
        ("foo bar baz", 1),
        ("foo bar qux foo", 1),
        ("end.Ass", 1),
        ("", 0),
    ],
)
def test_bad_words(bad_words: Path, text: str, count: int) -> None:
    """Behaviour: whole words and phrases in any case, or anywhere for scripts without spaces; the value is the count."""
    expected = ("bad_words", count) if count else ("", None)
    assert reason(chain_of("bad_words", words=bad_words), text) == expected
    assert reason(chain_of("bad_words", words=bad_words, max_count=count), text) == ("", None)
    assert chain_of("bad_words", words=bad_words).measure(_page(text))[0][1].value == count


def _page(text: str) -> object:
    from llmkit.corpus.page import Page
    from llmkit.corpus.words import splitter

    return Page(text, splitter("unicode"))


def test_bad_words_needs_a_list() -> None:
    """Behaviour: no list is shipped, and the error comes before the first document is read."""
    with pytest.raises(UsageError, match="names no list"):
        chain_of("bad_words").warm_up()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"min_characters": 18}, ("too_short", 17)),
        ({"max_characters": 16}, ("too_long", 17)),
        ({"min_words": 4}, ("too_few_words", 3)),
        ({"max_words": 2}, ("too_many_words", 3)),
        ({"min_lines": 3}, ("too_few_lines", 2)),
        ({"max_lines": 1}, ("too_many_lines", 2)),
        ({"min_characters": 17, "max_characters": 17, "min_words": 3, "max_words": 3, "min_lines": 2, "max_lines": 2}, ("", None)),
        ({}, ("", None)),
    ],
)  # fmt: skip
def test_length(settings: dict[str, object], expected: tuple[str, object]) -> None:
    """Behaviour: each limit is strict; marks are not words."""
    assert reason(chain_of("length", **settings), "Three ! words\nok?") == expected


def test_sample_is_a_function_of_the_id() -> None:
    """Property: the share is kept, smaller rates keep subsets, seeds are independent, the text replaces a missing id."""
    ids = [f"document-{i}" for i in range(4000)]

    def kept(**settings: object) -> set[str]:
        chain = chain_of("sample", **settings)
        return {name for name in ids if reason(chain, id=name) == ("", None)}

    quarter, half, other = kept(rate=0.25), kept(rate=0.5), kept(rate=0.5, seed=1)
    assert 900 < len(quarter) < 1100 and quarter < half
    assert 900 < len(half & other) < 1100  # independent: a quarter of all documents
    assert len(kept(rate=1)) == 4000 and not kept(rate=0)
    chain = chain_of("sample", rate=0.5)
    assert reason(chain, "some text") == reason(chain, "some text", id=None)
    assert {reason(chain, f"text {i}")[0] for i in range(20)} == {"", "sampled_out"}
    for settings in ({"rate": 2}, {"rate": -0.1}, {"seed": -1}, {"seed": 0.5}):
        with pytest.raises(UsageError, match="sample"):
            chain_of("sample", **settings)


def test_regex_on_fields() -> None:
    """Behaviour: drop or keep, by the text, nested fields and values other than strings."""
    assert reason(chain_of("regex", pattern="(?i)add to (cart|basket)"), "Add to Basket!") == ("regex", "Add to Basket")
    assert reason(chain_of("regex", pattern="basket"), "cart") == ("", None)
    keep = chain_of("regex", pattern="^(en|de)$", field="metadata.lang", keep="true")
    assert reason(keep, metadata={"lang": "de"}) == ("", None)
    assert reason(keep, metadata={"lang": "den"}) == ("regex", None)
    assert reason(keep, metadata=None) == ("regex", None)
    assert reason(chain_of("regex", pattern="^[1-9]$", field="score"), score=7) == ("regex", "7")
    assert reason(chain_of("regex", pattern='"a"', field="tags"), tags=["b", "a"]) == ("regex", '"a"')
    assert reason(chain_of("regex", pattern="ü.", field="text"), "müß") == ("regex", "üß")
    assert dotted({"a.b": 1, "a": {"b": 2}}, "a.b") == 1 and dotted({"a": {"b": {"c": 3}}}, "a.b.c") == 3
    assert dotted({"a": [1]}, "a.b") is None


def test_several_regex_filters_in_one_chain() -> None:
    """Behaviour: each filter has its own name."""
    chain = load_chain([], ["regex@a", "regex@b"], ["regex@a.pattern=one", "regex@b.pattern=two"], "unicode")
    verdict = chain.judge("number two")
    assert verdict.filter == "regex@b" and verdict.drop is not None and verdict.drop.value == "two"
    assert chain.judge("three").drop is None


def test_regex_takes_linear_time() -> None:
    """Behaviour: patterns with catastrophic backtracking elsewhere, on a megabyte (at most 0.1 s when measured)."""
    start = time.process_time()
    for pattern in ("(a+)+$", "(a+)+b", "(.*a){12}c", "(a?){50}a{50}$"):
        reason(chain_of("regex", pattern=pattern), "a" * 1_000_000 + "!")
    assert time.process_time() - start < 10


@pytest.mark.parametrize("pattern", ["(", "[a-", "(?=a)", r"(a)\1", "a{2000}", "*"])
def test_bad_patterns(pattern: str) -> None:
    """Behaviour: the error names the rule and gives RE2's message."""
    with pytest.raises(UsageError, match=r"regex\.pattern: .* is not a valid pattern \(.+\)"):
        chain_of("regex", pattern=pattern).warm_up()


def test_regex_without_pattern_or_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behaviour: the error explains what to do."""
    with pytest.raises(UsageError, match="pattern is empty"):
        chain_of("regex").warm_up()
    monkeypatch.setitem(sys.modules, "re2", None)
    with pytest.raises(LlmkitError) as caught:
        chain_of("regex", pattern="not seen before").warm_up()
    assert "RE2" in caught.value.message and "google-re2" in caught.value.hint
