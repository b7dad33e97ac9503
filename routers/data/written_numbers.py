"""Numbers as people write them: which characters belong to one, and what it states. Every grader reads them here.

Signs, decimal points, slashes, exponents, percent and currency signs are part of a number. So are other marks between
two digits, which make it something else: "5-10" is a range, "12:30" a time, "2001-02-03" a date, "1.2.3" a version,
"1,5" has no reading here (a comma groups thousands; where it is a decimal comma, nobody can tell). Such texts stay as
they are and have no value.
Decimal digits of all scripts, the minus sign and the dashes that stand for it, and fractions such as ½ are read too.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

CURRENCIES = "$\u00a2-\u00a5\u0e3f\u20a0-\u20bf\ufdfc\ufe69\uff04\uffe0\uffe1\uffe5\uffe6"
"""Currency signs, as the inside of a character class."""
_DASHES = "\\-\u2010-\u2015\u207b\u208b\u2212\ufe58\ufe63\uff0d"
_SPACES = "\u00a0\u2007\u2009\u202f"  # no-break and thin spaces group thousands; an ordinary space does not
_WIDE = str.maketrans("\uff0e\uff0c\uff05\uff0f\uff0b\u066b\u066c\u066a\u2044\u2215", ".,%/+.,%//")
_NEXT_TO_DIGIT = re.compile(r"(?<=\d)[．，％／＋٫٬٪⁄∕]|[．，＋٫٬](?=\d)")

_NUMBER = re.compile(
    rf"""
    (?P<compared> (?: != | [<>≤≥≠±∓]=? ) \s* )?
    (?P<sign> (?<![\w.)\]%]) [+{_DASHES}] \s? \(? )?
    (?P<currency> [{CURRENCIES}] \s? )?
    (?P<inner_sign> (?<=[{CURRENCIES}\s]) [{_DASHES}] )?
    (?P<core>
        (?: (?<![\w.]) \. )? \d+ (?: e[+{_DASHES}]?\d+ (?![^\W_]) )?
        (?:
            (?: (?: [^\w\s] | _ )+ | [{_SPACES}] (?=\d{{3}}(?!\d)) | \s* [/*^×÷] \s* )
            \d+ (?: e[+{_DASHES}]?\d+ (?![^\W_]) )?
        )*
    )
    (?P<percent> \s?% | \s+per\ ?cent\b )?
    (?P<currency_after> \s? [{CURRENCIES}] (?!\s?\d) )?
    """,
    re.VERBOSE | re.IGNORECASE,
)
_PLAIN = re.compile(
    rf"(?P<whole>\d+|[1-9]\d{{0,2}}(?P<group>[,'’_{_SPACES}])\d{{3}}(?:(?P=group)\d{{3}})*"
    r"|[1-9]\d?(?:,\d{2})+,\d{3})?"  # thousands, or lakhs and crores
    r"(?:\.(?P<part>\d+))?(?:e(?P<exponent>[-+]?\d{1,6}))?",
    re.IGNORECASE,
)
_CHANGING = ("\u2030", "\u2031")
_FRACTION = re.compile(r"(\d{1,15})/(\d{1,15})")
RELATIVE_TOLERANCE = 1e-6
_LONGEST_PLAIN = 20
"""Digits and zeros up to which the normal form is written out; above, it has an exponent."""

_SCALES = {
    "hundred": 1e2, "thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12, "dozen": 12.0,
    "k": 1e3, "K": 1e3, "M": 1e6, "mn": 1e6, "mln": 1e6, "B": 1e9, "bn": 1e9, "T": 1e12, "tn": 1e12,
}  # fmt: skip
SCALE = re.compile(r"[\s-]?(" + "|".join(sorted(_SCALES, key=len, reverse=True)) + r")s?(?![^\W_])")
"""A scale behind a number: "7 million", "7k", "7M"; "7m" is seven metres."""
_NEGATIVE = re.compile(r"\b(?:minus|negative)\s+$", re.IGNORECASE)
_CHANGES = frozenset(
    # Denied, compared, one of several, or calculated with: the number that stands there is not what the text states.
    "not no never neither nor none cannot without except excluding unlike instead rather wrong false incorrect "
    "than least most under above below or "
    "minus plus negative divided multiplied half halves "
    "root squared cubed power factorial modulo frac dfrac tfrac sqrt \u221a pi \u03c0 log ln exp sin cos tan "
    "hundred hundreds thousand thousands million millions billion billions "
    "trillion trillions dozen dozens mil lakh lakhs crore crores grand "
    "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
    "nineteen twenty thirty forty fifty sixty seventy eighty ninety".split()
)
_CHANGES_WHAT_FOLLOWS = _CHANGES | frozenset(
    # Behind a number they count ("5 pairs", "12 times a week") or say where ("5 miles over the hill").
    "over almost nearly between up times twice thrice double triple quarter quarters pair pairs couple".split()
)
_FRACTION_OF_TEX = re.compile(r"\\[dt]?frac\s*(?:\{\s*(\d+)\s*\}|(\d))\s*(?:\{\s*(\d+)\s*\}|(\d))")


@dataclass(frozen=True)
class Written:
    """A number in a text.

    `text` is its normal form: without thousands separators, leading plus and needless zeros; or, where it is no plain
    number, as it was written, with plain dashes. `value` is None for what is no number or fraction. `named`: a letter
    stands before it, also with a hyphen between ("B12", "GPT-4").
    """

    text: str
    value: float | None
    currency: str
    percent: bool
    compared: bool
    named: bool
    start: int
    end: int


def readable(text: str) -> str:
    """The text with ASCII digits for decimal digits of any script, and with ASCII marks next to them."""
    if text.isascii():
        return text
    text = re.sub(r"[^\W\d_]|[^\x00-\x7f]", _ascii_digit, text)
    return _NEXT_TO_DIGIT.sub(lambda mark: mark[0].translate(_WIDE), text)


def _ascii_digit(match: re.Match[str]) -> str:
    char = match[0]
    if char.isascii():
        return char
    digit = unicodedata.decimal(char, None)
    if digit is not None:
        return str(digit)
    if unicodedata.decomposition(char).startswith("<fraction>"):  # ½
        before = match.string[match.start() - 1 : match.start()]
        return (" " if before.isdecimal() else "") + unicodedata.normalize("NFKC", char).replace("\u2044", "/")
    return char


def rewritten(text: str, others: Callable[[str], str]) -> str:
    """`text` (as `readable` gives it) with every number in its normal form, and `others` applied between them."""
    parts, position = [], 0
    for number in find(text):
        parts += [others(text[position : number.start]), f"{number.currency}{number.text}"]
        position = number.end
    return "".join([*parts, others(text[position:])])


def find(text: str) -> list[Written]:
    """All numbers in `text` (as `readable` gives it), in order."""
    return [_written(match) for match in _NUMBER.finditer(text)]


def stated(text: str) -> Written | None:
    """The one number that a text states, None where it states none, several or another one than is written there.

    Words around it do not matter ("18 apples"), unless they change it: scales are multiplied in ("7 million", "7k"),
    "minus 5" is -5, and a text that denies, compares or calculates ("not 5", "at least 5", "half of 5") states none.
    "1 1/2" is 1.5, and so is TeX's "1\\frac{1}{2}".
    """
    text = readable(_without_tex(text))
    number = _only(find(text), text)
    if number is None or number.value is None or number.compared or number.named:
        return None
    value = number.value
    before, after = text[: number.start], text[number.end :]
    while scale := SCALE.match(after):
        value, after = value * _SCALES[scale[1]], after[scale.end() :]
    if negative := _NEGATIVE.search(before):
        value, before = -value, before[: negative.start()]
    changed = any(
        word in changes or word.endswith(("n't", "n’t"))
        for part, changes in ((before, _CHANGES_WHAT_FOLLOWS), (after, _CHANGES))
        for word in re.findall(r"\u221a|[^\W\d_]+(?:['’][^\W\d_]+)?", part.casefold())
    )
    if changed or not math.isfinite(value):
        return None
    return Written(number.text, value, number.currency, number.percent, False, False, number.start, number.end)


def _without_tex(text: str) -> str:
    if "\\" not in text:
        return text
    text = _FRACTION_OF_TEX.sub(lambda m: f" {m[1] or m[2]}/{m[3] or m[4]}", text)
    return re.sub(r"\\(?=[%$])", "", text)


def _only(found: list[Written], text: str) -> Written | None:
    """The only number, or a whole one and the fraction behind it as one."""
    if len(found) == 1:
        return found[0]
    if len(found) != 2 or text[found[0].end : found[1].start].strip(" ") or found[0].percent or found[1].currency:
        return None
    whole, part = found
    digits = whole.text.removeprefix("-").isdecimal() and not whole.compared
    if not (digits and whole.value is not None and "/" in part.text and 0 < (part.value or 0) < 1):
        return None
    value = whole.value + math.copysign(part.value or 0, -1 if whole.text[0] == "-" else 1)
    text = f"{whole.text} {part.text}"
    return Written(text, value, whole.currency, part.percent, False, whole.named, whole.start, part.end)


def same(first: Written | None, second: Written | None) -> bool:
    """Equal values (relative tolerance 1e-6), both or neither a percentage, and no two different currencies."""
    if first is None or second is None or first.value is None or second.value is None:
        return False
    if (first.percent, first.compared) != (second.percent, second.compared) or (
        first.currency and second.currency and first.currency != second.currency
    ):
        return False
    return math.isclose(first.value, second.value, rel_tol=RELATIVE_TOLERANCE)


def _written(match: re.Match[str]) -> Written:
    core = re.sub(r"\s*([/*^×÷])\s*", r"\1", match["core"])
    core = re.sub(f"[{_DASHES}]", "-", core)
    before = match.string[max(0, match.start() - 2) : match.start()]
    joined = before[-1:].isalpha() and not match["currency"]  # "B12", but not "US$5"
    signs = (match["sign"] or "") + (match["inner_sign"] or "")
    negative = sum(sign not in "+(" for sign in signs if not sign.isspace()) % 2 == 1
    after = match.string[match.end() : match.end() + 1]
    mark = after if after in _CHANGING or unicodedata.category(after or " ") == "No" else ""  # 10², per mille
    plain = None if joined else _PLAIN.fullmatch(core)
    if plain and (plain["whole"] or plain["part"]):
        digits, value = _canonical(plain), _float(re.sub(rf"[,'’_{_SPACES}]", "", core))
    elif fraction := _FRACTION.fullmatch(core):
        digits, value = core, (int(fraction[1]) / int(fraction[2]) if int(fraction[2]) else None)
    else:
        digits, value = core, None
    sign = "-" if negative and digits != "0" else ""
    percent = "%" if match["percent"] else ""
    compared = (match["compared"] or "").strip()
    return Written(
        text=f"{compared}{sign}{digits}{percent}{mark}",
        value=None if value is None or mark else (-value if negative else value),
        currency=(match["currency"] or match["currency_after"] or "").strip(),
        percent=bool(percent),
        compared=bool(compared),
        named=joined or bool(re.search(rf"[^\W\d_][{_DASHES}]$", before)),
        start=match.start(),
        end=match.end() + len(mark),
    )


def _canonical(plain: re.Match[str]) -> str:
    """One spelling of each value: "1,234.50", "1234.5" and "1.2345e3" are the same. A code such as "007" stays."""
    whole, part = re.sub(r"\D", "", plain["whole"] or "0"), plain["part"] or ""
    if len(whole) > 1 and whole[0] == "0":
        return plain[0]
    digits, exponent = (whole + part).lstrip("0"), int(plain["exponent"] or 0) - len(part)
    stripped = digits.rstrip("0")
    exponent += len(digits) - len(stripped)
    if not stripped:
        return "0"
    if not -_LONGEST_PLAIN <= exponent <= _LONGEST_PLAIN:
        return f"{stripped}e{exponent}"
    if exponent >= 0:
        return stripped + "0" * exponent
    padded = stripped.rjust(1 - exponent, "0")
    return f"{padded[:exponent]}.{padded[exponent:]}"


def _float(text: str) -> float | None:
    value = float(text)
    return value if math.isfinite(value) else None
