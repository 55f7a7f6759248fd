"""Metadata that a page declares: its title, language, licence, and opt-outs from being used for training."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

CREATIVE_COMMONS = re.compile(
    r"creativecommons\.org/(?:licenses/([a-z-]+)/([\d.]+)|publicdomain/(zero|mark)/([\d.]+))", re.IGNORECASE
)
# Directives of robots meta tags and of X-Robots-Tag that concern training or keeping a copy.
OPT_OUTS = ("noai", "noimageai", "noindex", "noarchive", "none")
ROBOTS = re.compile(r"robots|[a-z-]*bot|[a-z-]*crawler", re.IGNORECASE)


def declared(tree: Any, headers: Mapping[str, str]) -> dict[str, Any]:
    """`title`, `language`, `licence`, `opt_out` (a list) of a parsed page; only those that are declared.

    Licences: Creative Commons links as `cc-by-4.0`, `cc0-1.0`, `public-domain`; otherwise the value of a
    rel=license link or a rights meta tag, cut at 200 characters. Opt-outs: robots meta tags and X-Robots-Tag
    (noai, noimageai, noindex, noarchive, none), and the TDM Reservation Protocol's `tdm-reservation: 1` (W3C
    community group report, 2024) as a header or a meta tag.
    """
    metadata: dict[str, Any] = {}
    title = " ".join((tree.title or "").split())
    if title:
        metadata["title"] = title[:1000]
    metas = [
        (
            (meta.getattr("name") or meta.getattr("property") or "").lower(),
            meta.getattr("content") or "",
            meta.getattr("http-equiv") or "",
        )
        for meta in tree.document.query_selector_all("meta")[:500]
    ]
    language = _language(tree, metas, headers)
    if language:
        metadata["language"] = language
    licence = _licence(tree, metas)
    if licence:
        metadata["licence"] = licence
    opt_out = _opt_outs(metas, headers)
    if opt_out:
        metadata["opt_out"] = opt_out
    return metadata


def _language(tree: Any, metas: list[tuple[str, str, str]], headers: Mapping[str, str]) -> str:
    root = tree.document.query_selector("html")
    language = (root.getattr("lang") or root.getattr("xml:lang") or "") if root else ""
    language = language or next(
        (content for _, content, equivalent in metas if equivalent.lower() == "content-language"), ""
    )
    language = (language or headers.get("content-language", "")).split(",")[0].strip().replace("_", "-")
    return language if re.fullmatch(r"[A-Za-z]{2,3}(-[A-Za-z0-9]{1,8})*", language) else ""


def _licence(tree: Any, metas: list[tuple[str, str, str]]) -> str:
    links = tree.document.query_selector_all("a[rel~=license], link[rel~=license], a[href*='creativecommons.org/']")
    targets = [link.getattr("href") or "" for link in links[:50]]
    rights = [
        content
        for name, content, _ in metas
        if name in ("dc.rights", "dcterms.rights", "dcterms.license", "license", "og:license")
    ]
    for text in targets + rights:
        match = CREATIVE_COMMONS.search(text)
        if match and match[1]:
            return f"cc-{match[1].lower()}-{match[2]}"
        if match:
            return f"cc0-{match[4]}" if match[3].lower() == "zero" else "public-domain"
    license_links = [
        link.getattr("href") or "" for link in links[:50] if "license" in (link.getattr("rel") or "").lower()
    ]
    return next((text.strip()[:200] for text in license_links + rights if text.strip()), "")


def _opt_outs(metas: list[tuple[str, str, str]], headers: Mapping[str, str]) -> list[str]:
    directives = [content for name, content, _ in metas if ROBOTS.fullmatch(name)]
    directives.append(headers.get("x-robots-tag", ""))
    words = set(re.findall(r"[a-z]+", " ".join(directives).lower()))
    signals = [word for word in OPT_OUTS if word in words]
    reserved = [content for name, content, _ in metas if name == "tdm-reservation"] + [
        headers.get("tdm-reservation", "")
    ]
    return signals + (["tdm-reservation"] if any(value.strip() == "1" for value in reserved) else [])
