"""Phone numbers: international by country code and length, national by shape or by a preceding word."""

from __future__ import annotations

import re

GAP = r" \u00a0\u2009\u202f"  # spaces within a number
DASH = r"\u2010\u2011\u2013-"
# Country calling codes (ITU E.164) of one and two digits, with the minimum and maximum number of digits of a
# national number. All other codes have three digits.
CALLING_CODES = {
    "1": (10, 10), "7": (10, 10), "20": (8, 10), "27": (9, 9), "30": (10, 10), "31": (9, 9), "32": (8, 9), "33": (9, 9),
    "34": (9, 9), "36": (8, 9), "39": (6, 11), "40": (9, 9), "41": (9, 9), "43": (7, 13), "44": (9, 10), "45": (8, 8),
    "46": (7, 10), "47": (8, 8), "48": (9, 9), "49": (6, 11), "51": (8, 9), "52": (10, 11), "53": (6, 8),
    "54": (10, 11), "55": (10, 11), "56": (9, 9), "57": (8, 10), "58": (10, 10), "60": (8, 10), "61": (9, 9),
    "62": (7, 12), "63": (8, 10), "64": (8, 10), "65": (8, 8), "66": (8, 9), "81": (9, 10), "82": (8, 10),
    "84": (9, 10), "86": (9, 11), "90": (10, 10), "91": (10, 10), "92": (9, 10), "93": (9, 9), "94": (9, 9),
    "95": (7, 10), "98": (10, 10),
}  # fmt: skip
LONG_CODES = re.compile(
    "21[12368]|2[2346][0-9]|25[0-8]|29[01789]|35[0-9]|37[0-9]|38[0-35-79]|42[013]|50[0-9]|59[0-9]|67[02-9]|68[0-35-9]"
    "|69[0-2]|80[08]|85[02356]|87[08]|88[01236]|96[0-8]|97[0-79]|99[2-68]"
)
PHONE_WORDS = frozenset(
    "tel phone phone_number phones telephone fax mobile mob cell cellphone call calling dial ph sms whatsapp hotline"
    " helpline toll ring tél téléphone appelez portable telefon telefono teléfono telefone telefoon celular móvil"
    " cellulare handy mobil rufnummer gsm тел телефон моб".split()
)
PHONE_SIGN = re.compile(r"[☎📞📱]|电话|電話|手机|传真|\b[TMPF]:")
NUMBER_WORDS = frozenset(
    "isbn issn doi order invoice item sku part parts serial model ref reference id no nr n num number code case ticket"
    " tracking patent ean upc vat account acct catalog catalogue lot batch pmid oclc ssn page pages pp grant contract"
    " permit license licence commande pedido rechnung".split()
)
CONTEXT = 40  # characters before a number
BEFORE = re.compile(r"[^0-9\n]*+")
EXTENSION = re.compile(r" ?(?:x|,? ?ext\.?|,? ?extension) ?[0-9]{1,6}(?![\w.])", re.IGNORECASE)
AMERICAN_MARK = re.compile(rf"[.(/{DASH}]")
DECIMAL = re.compile(r"\+?[0-9]+\.[0-9]+")
HEX_PAIR = re.compile(r"\s[0-9A-Fa-f]{2}\b")  # the number is in a dump or a table
OPENING = frozenset(" \t\n\r\u00a0\u2009\u202f([{<>\"'“„«`|,;:*•·、，：（")


def phone_end(text: str, start: int, shape: re.Match[str]) -> int:
    """End of the phone number at `start`, including its extension; 0 if there is none."""
    before = text[max(0, start - CONTEXT) : start]
    national = shape.lastgroup == "national"
    if national and before[-1:].isspace() and before[-2:-1].isdigit():  # in a row of numbers
        return 0
    value = shape[0]
    parts = re.findall("[0-9]+", value)
    if before.endswith(("+", ")", ".")) or (DECIMAL.fullmatch(value) and (value[0] != "+" or len(parts[0]) > 3)):
        return 0
    while national and len(parts) > 1 and sum(map(len, parts)) > 13:  # a phone number and a following number
        parts.pop()
    if national and (not 7 <= sum(map(len, parts)) <= 13 or min(map(len, parts[1:]), default=2) < 2 or _is_date(parts)):
        return 0
    same_line = BEFORE.match(before[::-1]).group()[::-1]  # type: ignore[union-attr]
    words = re.findall(r"[^\W\d]+", same_line.lower())[len(same_line) == CONTEXT :]  # the first word may be cut off
    named = not PHONE_WORDS.isdisjoint(words) or PHONE_SIGN.search(same_line) is not None
    opened = (not before or before[-1] in OPENING) and not (words and words[-1] in NUMBER_WORDS)
    ends = [start + match.end() for match in re.finditer("[0-9]+", value)]
    end = ends[len(parts) - 1]
    if shape.lastgroup == "international":
        if not ("+" in value or named or (opened and len(parts) > 1)):
            return 0
        end = _international_end(text, list(zip(ends, parts, strict=True)))
    elif not named:
        if national:
            likely = _is_long_distance(value, parts, before, text[end : end + 3])
        else:  # not in a row of numbers
            neighbours = before[-2:-1] + text[end + 1 : end + 2]
            likely = AMERICAN_MARK.search(value) is not None or not any(map(str.isdigit, neighbours))
        if not (opened and likely):
            return 0
    extension = EXTENSION.match(text, end) if end else None
    return extension.end() if extension else end


def _is_long_distance(value: str, parts: list[str], before: str, after: str) -> bool:
    """Whether a number without a word such as "Tel." is shaped like one with an area code: 0, 9 or 10 more
    digits, 2 to 5 groups."""
    digits = "".join(parts)
    return (
        digits[:1] == "0" != digits[1:2]
        and 10 <= len(digits) <= 11
        and 2 <= len(parts) <= 5
        and 2 <= len(parts[0]) <= 5
        and len({c for c in value if c in "./"}) < 2
        and len({int(b) - int(a) for a, b in zip(parts, parts[1:], strict=False)}) + (len(parts) < 3)
        > 1  # 01 02 03 04 05
        and not HEX_PAIR.match(before[:-4:-1])
        and not HEX_PAIR.match(after)
    )


def _international_end(text: str, groups: list[tuple[int, str]]) -> int:
    """End of the longest run of complete digit groups whose length is valid for its country; 0 if there is none."""
    groups = [group for group in groups if group[1] != "0" or text[group[0] - 2 : group[0] + 1] != "(0)"]
    digits = "".join(part for _, part in groups)
    trunk = 2 if digits.startswith("00") else 0  # in place of +
    code = next((digits[trunk : trunk + n] for n in (1, 2) if digits[trunk : trunk + n] in CALLING_CODES), "")
    if not code and LONG_CODES.match(digits, trunk):
        code = digits[trunk : trunk + 3]
    if not code or (code == "1" and digits[trunk + 1 : trunk + 2] in ("0", "1")):
        return 0
    min_digits, max_digits = CALLING_CODES.get(code, (5, 11))
    while groups and not min_digits <= len(digits) - len(code) - trunk <= max_digits:
        digits = digits[: -len(groups.pop()[1])]
    return groups[-1][0] if groups else 0


def _is_date(parts: list[str]) -> bool:
    """Whether the parts form a date or a range of years: 01 02 2003, 2003 01 02, 1999 2003."""
    years = [len(part) == 4 and part[:2] in ("18", "19", "20") for part in parts[:3]]
    shape = "".join(
        "y" if year else "n" if len(part) <= 2 and int(part) <= 31 else "?"
        for year, part in zip(years, parts, strict=False)
    )
    return shape in ("nny", "ynn", "yn", "ny", "yy", "yyy", "nyy")
