"""Plain integers, decimals and fractions in LaTeX, as exact values."""

import functools
import re
import unicodedata
from fractions import Fraction

INTEGER = re.compile(r"(?P<sign>[+-]?)(?P<digits>[0-9]++|[1-9][0-9]{0,2}(?:,[0-9]{3})++)")
_DECIMAL = re.compile(r"[+-]?[0-9]*+\.[0-9]++")
_FRACTION = re.compile(
    r"(?P<sign>[+-]?)(?:"
    r"\\[dt]?frac\{(-?[0-9]++)\}\{([0-9]++)\}"
    r"|\\[dt]?frac([0-9])([0-9])"
    r"|\\[dt]?frac([0-9])\{([0-9]++)\}"
    r"|\\[dt]?frac\{(-?[0-9]++)\}([0-9])"
    r"|([0-9]++) ?/ ?([0-9]++))"
)
_TERM = r"(?:[0-9]++|\\[dt]?frac\{[0-9]++\}\{[0-9]++\})"
_SUM = re.compile(rf"-?{_TERM}(?:[ \t\r\n]*+[+-][ \t\r\n]*+{_TERM})++")
_TERMS = re.compile(rf"(?P<sign>[+-]?)[ \t\r\n]*+(?P<term>{_TERM})")
_MOST_DIGITS = 12  # of a plain number
_MOST_CHARACTERS = 80  # of a plain number with its name and unit
_NAMED = re.compile(r"[a-zA-Z][ \t\r\n]*+=[ \t\r\n]*+(?P<rest>[^,]++)")
_WITH_UNIT = re.compile(r"(?P<number>[^ \t\r\n]++)[ \t\r\n]*+\\text\{ *+(?P<unit>[a-zA-Z]++) *+\}")
# What math-verify takes for a percent sign, or for a comma between two answers.
_NO_UNITS = ("percent", "percentage", "pct", "and", "or")

_MINUS_SIGNS = "\u2212\ufe63\uff0d"
_NO_WIDTH = "\u200b\u200c\u200d\u2060\ufeff"
_DECIMAL_DIGITS = range(0x660, 0x20000)  # those of Unicode beyond ASCII lie in here


def plain_characters(text: str) -> str:
    """The text with decimal digits and minus signs in ASCII, and without characters that have no width.

    A raised digit is none, nor is a letter that only looks like another one.
    """
    return text if text.isascii() else text.translate(_in_ascii())


@functools.cache
def _in_ascii() -> dict[int, str]:
    """What stands for a character, by its number."""
    digits = {code: str(unicodedata.decimal(chr(code))) for code in _DECIMAL_DIGITS if chr(code).isdecimal()}
    return digits | {ord(c): "-" for c in _MINUS_SIGNS} | {ord(c): "" for c in _NO_WIDTH}


def plain_number(text: str) -> Fraction | None:
    """The value of a plain integer, decimal or fraction of at most twelve digits; None for anything else.

    Within twelve digits the floats that math-verify makes of decimals are as good as exact.
    """
    if len(text) > 40 or _has_many_digits(text):
        return None
    if found := INTEGER.fullmatch(text):
        return Fraction(found[0].replace(",", ""))
    if found := _DECIMAL.fullmatch(text):
        return Fraction(found[0])
    if not (found := _FRACTION.fullmatch(text)):
        return None
    over, under = [int(part) for part in found.groups()[1:] if part]
    return Fraction(found["sign"] + "1") * over / under if under else None


def value_of_answer(text: str) -> Fraction | None:
    r"""The value of a plain number, of a sum as in `3 - \frac{1}{2}`, or of `x = 5` or `5 \text{ km}`.

    None for anything else. A unit is one word in letters, and changes nothing: math-verify overlooks it too.
    Terms of a sum are integers and fractions, of at most twelve digits together.
    """
    if len(text) > _MOST_CHARACTERS:
        return None
    if named := _NAMED.fullmatch(text):
        text = named["rest"]
    if _SUM.fullmatch(text):
        return _value_of_sum(text)
    counted = _WITH_UNIT.fullmatch(text)
    if counted and counted["unit"].lower() not in _NO_UNITS:
        text = counted["number"]
    return plain_number(text)


def _value_of_sum(text: str) -> Fraction | None:
    """The value of what `_SUM` matches; None where it is long, or divides by zero."""
    if _has_many_digits(text):
        return None
    terms = [(found["sign"], plain_number(found["term"])) for found in _TERMS.finditer(text)]
    values = [-value if sign == "-" else value for sign, value in terms if value is not None]
    return sum(values, Fraction()) if len(values) == len(terms) else None


def _has_many_digits(text: str) -> bool:
    return sum(character.isdecimal() for character in text) > _MOST_DIGITS
