r"""Replace expressions that would need to be computed by a placeholder, so that none of their numbers is taken for the answer.

Example:
    >>> without_expressions("sin(7) = x").replace(HIDDEN, "?"), without_expressions("7 plus 2"), without_expressions("7 squared")
    ('? = x', '7 + 2', '7^2')
"""

from __future__ import annotations

import re

from posttrain.rewards import chinese

HIDDEN = "\ue000"
"""Placeholder for an expression that is not read, such as a root."""
_MONTH = (
    r"(?:Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?"
    r"|Aug(?:ust)?|Sept?(?:ember)?|Oct(?:ober)?|Nov(?:ember)?|Dec(?:ember)?)\b"
)
DATE_AFTER = rf"(?:\s(?:of\s)?{_MONTH})"
"""After a number: it is a day of a month."""
DATE_BEFORE = rf"(?:\b{_MONTH}\.?,?\s(?:\d{{1,2}},?\s)?$)"
COMMAND = (
    r"\\(?!(?:text\w*|math(?:rm|bf|it|sf)|quad|qquad|displaystyle|textstyle|[dtc]?frac|circ|degree|approx|therefore|because|implies|iff|Rightarrow"
    r"|Longrightarrow|boxed|fbox|left|right|big\w*|Big\w*|hspace|vspace|space|cdot|times|div|item|newline|begin|end|mid|hline|section\*?"
    r"|leq?|geq?|neq?|lt|gt|pm|mp|leqslant|geqslant|pmod|bmod|euro|pounds|dollar|square|blacksquare|checkmark|underline|bf|rm|color|textcolor|tag"
    r"|hfill|noindent|par|label|ldots|dots|equiv|cong|sim)(?![A-Za-z]))[A-Za-z]{2,20}"
)
"""A command of LaTeX next to a number that makes an expression of it, such as an angle's name; spaces, fonts and relations do not."""
_NUMBER = r"[-+]?[$\u20ac\u00a3]?\d+(?:[.,]\d+)*%?"
_BRACES = r"\{(?:[^{}]|\{[^{}]{0,40}\}){0,60}\}"
_PARENTHESES = r"\([^()\n]{0,60}\)"
_PARTS = "half|third|quarter|fourth|fifth|sixth|seventh|eighth|ninth|tenth|hundredth"
_FUNCTIONS = re.compile(
    rf"(?<![A-Za-z])\\?(?:(?:arc)?(?:sin|cos|tan|cot)h?|csc|log|ln|lg|sqrt|cbrt)(?:[_^](?:{_BRACES}|\w{{1,6}}))?\s?"
    rf"(?:{_PARENTHESES}|{_BRACES}|{_NUMBER})"
    rf"|(?<![A-Za-z\\])(?:[A-Za-z]|max|min|gcd|lcm|exp|abs|floor|ceil|round|sum|mean|det|sec|mod)\((?=[^()\n]{{0,60}}\d){_PARENTHESES[2:]}"
    rf"|\\(?:max|min|gcd|lcm|exp|det|sec|csc|operatorname\s?{_BRACES})\s?(?:{_PARENTHESES}|{_BRACES}|{_NUMBER})"
)
_ROOTS = re.compile(rf"\\sqrt\s?(?:\[[^\[\]]{{0,20}}\])?\s?(?:{_BRACES}|[0-9A-Za-z])|\u221a\s?\(?[\d.]+\)?")
_LATEX = re.compile(
    rf"\\[dtc]?frac(?!\s?(?:\{{[-+]?\d{{1,30}}\}}\s?\{{\d{{1,30}}\}}|\d\d))\s?(?:{_BRACES}|\w)\s?(?:{_BRACES}|\w)?"
    rf"|\\[dt]?binom\s?(?:{_BRACES}|\w)\s?(?:{_BRACES}|\w)?"
    r"|\\begin\s?\{(?!(?:align|aligned|equation|gather|gathered|split|center|itemize|enumerate)\*?\})(\w{1,12}\*?)\}"
    r"(?:[\s\S]{0,400}?\\end\s?\{\1\}|[^\n]{0,400})"
    r"|\\langle[^\n]{0,60}?\\rangle"
    r"|(?<![\d.])\d{0,20}\.\d{0,20}\(\d{1,20}\)|(?<![\d.,])\d{1,20}(?:[.,]\d{1,20})?[\u0300-\u036f\u20d0-\u20dc]+"
    r"|\\l(?:floor|ceil)\b[^\n]{1,40}?\\r(?:floor|ceil)\b"
    rf"|[\d.]{{0,30}}\\(?:overline|bar|dot)\s?(?:{_BRACES}|\d)"
)
_INFINITY = r"(?:\\infty|\u221e|infinity|inf)"
_INTERVALS = re.compile(
    rf"[(\[]\s?[^()\[\]\n,;]{{1,40}}[,;]\s?\+?{_INFINITY}\s?[)\]]|[(\[]\s?-\s?{_INFINITY}\s?[,;][^()\[\]\n]{{1,40}}[)\]]"
)
_NEGATED = re.compile(r"(?<![\w)\]}] )(?<![\w)\]}])-\s?\([^()\n]{1,60}\)")
_OF = re.compile(
    rf"\b(?:(?:{_PARTS})s?|halves|square|cube|root|sum|product|difference|quotient|logarithm|log|factorial|reciprocal|inverse)"
    rf"\sof\s(?:the\s)?{_NUMBER}(?:\s?(?:,|,?\s?and)\s{_NUMBER}){{0,6}}|\b(?:twice|double|triple|thrice)\s{_NUMBER}",
    re.IGNORECASE,
)
_AFTER = re.compile(
    rf"(?<=\d)(?:\s?(?:\\?%|percent|per\scent)\sof\s(?:the\s)?{_NUMBER}"
    rf"|[\s-](?:factorial\b|doubled\b|tripled\b|halved\b|multiplied\sby\sitself\b|choose-\d+|raised\sto\b|to\sthe\s(?:power|{_PARTS})\b|(?:choose|mod|modulo|div)\s{_NUMBER}))"
    r"|(?<=\d)\s?(?:\\?%|percent|per\scent)\s{0,3}of\s{1,3}\$?[A-Za-z]\b(?!\s[a-z])",
    re.IGNORECASE,
)
_BROKEN_EXPONENT = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?:[ \t][eE][ \t]?|[eE][ \t])[-+]?\d+(?!\w)")
_HIDING = (_ROOTS, _FUNCTIONS, _LATEX, _INTERVALS, _NEGATED, _OF, _AFTER, _BROKEN_EXPONENT)
ORDINALS = {
    "third": 3,
    "fourth": 4,
    "fifth": 5,
    "sixth": 6,
    "seventh": 7,
    "eighth": 8,
    "ninth": 9,
    "tenth": 10,
    "eleventh": 11,
}
ORDINALS |= {
    "twelfth": 12,
    "thirteenth": 13,
    "fourteenth": 14,
    "fifteenth": 15,
    "sixteenth": 16,
    "seventeenth": 17,
    "eighteenth": 18,
}
ORDINALS |= {
    "nineteenth": 19,
    "twentieth": 20,
    "thirtieth": 30,
    "fortieth": 40,
    "fiftieth": 50,
    "sixtieth": 60,
    "seventieth": 70,
}
ORDINALS |= {
    "eightieth": 80,
    "ninetieth": 90,
    "hundredth": 100,
    "thousandth": 1000,
    "millionth": 10**6,
    "billionth": 10**9,
}
"""Parts of a whole, as in three twentieths, and their numbers."""
_SHARES = {
    "half": "1/2",
    "third": "1/3",
    "quarter": "1/4",
    "fourth": "1/4",
    "fifth": "1/5",
    "eighth": "1/8",
    "tenth": "1/10",
}
_SPELLINGS = (
    (re.compile(r"(?<![\w)\]}])\((-?\d{1,12})\)\s?/\s?\((\d{1,12})\)"), r"\1/\2"),
    (re.compile(r"\{\s{0,3}(-?\d{1,12})\s{0,3}\\over\s{0,3}(\d{1,12})\s{0,3}\}"), r"\\frac{\1}{\2}"),
    (re.compile(r"(?:(?<=[$(=])|(?<![^\n]))\s{0,3}(-?\d{1,12})\s{0,3}\\over\s{0,3}(\d{1,12})\s{0,3}(?=[$)]|\.?(?:\n|\Z))"),
     r"\\frac{\1}{\2}"),
    (re.compile(r"(?:(?<=[{$(=:])|(?<![^\n]))\s{0,3}(-?\d{1,12})\s/\s(\d{1,12})(?=\s{0,3}(?:[})$]|\.?(?:\n|\Z)))"), r"\1/\2"),
    (re.compile(r"(?<![\w)\]}] )(?<![\w)\]}])-\s?\(\s?(\d[\d.,]{0,30})\s?\)"), r"-\1"),
    (re.compile(r"\\cfrac"), r"\\frac"),
    (re.compile(r"\|-(\d[\d.,]{0,30})\|"), r"\1"),
    (re.compile(r"(?<=\d)\shalves\b"), "/2"),
    (re.compile(r"(?<=\d)\s?(?:\\pmod\s?(?:\{\d{1,9}\}|\d)|\(\s?mod\s\d{1,9}\s?\))"), ""),
    (re.compile(r"(?<=\d)\s(?:and\s)?(?:an?|one)[\s-](" + "|".join(_SHARES) + r")\b"), lambda found: f" {_SHARES[found[1]]}"),
    (re.compile(r"(?<=\d)\sand\s(?:two[\s-]thirds|2/3)\b"), " 2/3"),
    (re.compile(r"(?<=\d)\sand\sthree[\s-](?:quarters|fourths)\b"), " 3/4"),
    (re.compile(r"(?<=\d)\sand\s(?=\d{1,3}/\d{1,3}(?![\w/]))"), " "),
    (re.compile(r"(?<=\d)\s(" + "|".join(ORDINALS) + r")s\b"), lambda found: f"/{ORDINALS[found[1]]}"),
    (re.compile(r"(?<![\d.,/])1\s(?:(half)|(" + "|".join(ORDINALS) + r"))\b(?!\sof\s(?:the\s)?\d)"),
     lambda found: f"1/{2 if found[1] else ORDINALS[found[2]]}"),
    *chinese.SPELLINGS,
    (re.compile(r"(?<=\d)\spoint\s(?=\d)"), "."),
    (re.compile(r"(?<=\d)\ssquared\b"), "^2"),
    (re.compile(r"(?<=\d)\scubed\b"), "^3"),
    (re.compile(r"(?<=\d)\splus\s(?=[$\u20ac\u00a3]?\d)"), " + "),
    (re.compile(r"(?<=\d)\s(?:times|multiplied\sby)\s(?=[$\u20ac\u00a3]?\d)"), " \u00d7 "),
    (re.compile(r"(?<=\d)\sdivided\sby\s(?=[$\u20ac\u00a3]?\d)"), " \u00f7 "),
    (
        re.compile(
            r"(?<=\d)(\s?(?:[-+*\u00d7\u00f7\u00b7]|\s/\s|\\(?:times|cdot|div)\b)\s?[$\u20ac\u00a3]?\d(?:[\d.,]{0,20}\d)?)[,;]?\s"
            r"(?:(?:(?:which|that|this)\s)?(?:is|equals|makes|gives)\s|i\.e\.,?\s)(?=[*$\u20ac\u00a3(]{0,3}-?\d(?:[\d.,]{0,20}\d)?%?"
            r"(?:\s(?!(?:more|less|fewer|times|over|plus|minus|of|to|or|and)\b)[A-Za-z]{1,12})?[*$)]{0,3}[ \t]*(?:[.!\n]|\Z))"
        ),
        r"\1 = ",
    ),
    (re.compile(r"(?<=\d)\sover\s(?=\d+(?!\s?[A-Za-z\d%]))"), " \u00f7 "),
)  # fmt: skip


def without_expressions(text: str) -> str:
    """Return the text with operators in words as signs, mixed numbers as digits, and other expressions hidden."""
    for pattern, usual in _SPELLINGS:
        text = pattern.sub(usual, text)
    for pattern in _HIDING:
        text = pattern.sub(HIDDEN, text)
    return text
