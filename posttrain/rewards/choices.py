r"""Find the letter that a completion chooses among the options of a multiple-choice question.

Example:
    >>> [chosen_letter(text, None) for text in ("(A) is wrong. (B) is right.", "A or B", "It is not B")]
    ['B', None, None]
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

from posttrain.rewards.final_part import correction, rejection

_NAMED = re.compile(
    r"[(\[]([A-Ja-j])[)\]]|\*\*\(?([A-J])\b|\b(?i:option|choice)\s+[(\"'\u201c\u2018*]{0,3}([A-J])\b"
    r"|\b(?i:option|choice)\s+[(\"'\u201c\u2018*]{0,3}([a-j])(?=[).,:\"'\u201d\u2019*]|\s*$|\s(?:is|was|because|since|fits|works)\b)"
    r"|\b(?:pick|picked|choose|chose|select|go with)\s+([a-j])(?=[).,:!]|\s*$)",
    re.MULTILINE,
)
_NAME = r"[+#&]|-[a-z\d]"
"""After a letter: it belongs to a name, as in C++, A&W, B-52."""
_LEADING = re.compile(
    rf"^\W*(?:([A-HJ]),(?!\s?\(?[A-J]\b)|([A-Ja-j])(?!{_NAME})(?:[).:*](?![A-Za-z])|\W*$))", re.MULTILINE
)
_ANY = re.compile(
    rf"(?<![A-Za-z])([A-J])(?![A-Za-z0-9=]|['\u2019][A-Za-z]|\s=|{_NAME})(?!(?<=[AI])\s+(?!(?:is|are|was|because|since|as|and|or)\b)[a-z])"
    r"(?!(?<=[AI])[ \t]+(?!(?:The|This|That|There|It|Because|Since|Explanation|Reason|Reasoning"
    r"|We|You|As|In|If|So|Therefore|Thus|Hence|Let|To|Here|For|According"
    r"|When|By|Both|Given|Using)\b)[A-Z][a-z])"
)
"""A letter by itself, unless it is the word `A` or `I`, also at the start of a title (`A Christmas Carol`)."""
_PATTERNS = (_NAMED, _LEADING, _ANY)
_ONE = r"\W{0,3}\b(?:(?i:option|choice)\s\W{0,3})?[A-J]\b\W{0,3}"
_SEVERAL = re.compile(
    rf"[A-J](?:[)\]]?\s?[\u3001\u548c\u4e0e\u6216\u53ca]\s?[(\[]?[A-J](?![A-Za-z]))+|[A-J]\b\W{{0,3}}\s(?:and|or|nor)\s{_ONE}|\b[A-J]\s?[/&=]\s?[A-J]\b|\b[A-J]\)?,\s?\(?[A-J]\)?\W*$"
)
_LETTER = r"[(\[*]{0,3}\b(?:(?i:option|choice)\s)?[A-J]\b[)\]*]{0,3}"
_ASKED = re.compile(rf"{_LETTER}(?:,?\s(?:or\s)?{_LETTER}){{1,9}}\s?\?")
"""The letters of a question: `A, B, C, or D?`"""
_OTHER = re.compile(
    r"(?:维生素|维他命)\s?[A-J]|\b(?i:vitamin|hepatitis|plan|grade|class|team|type|appendix|figure|point|line|side|angle|set|event)\s[A-J]\b"
    rf"|{_LETTER}\s(?:is|was|seems|looks)\s(?:worse|weaker|poorer|less\s[a-z]{{1,20}})\sthan\b"
    rf"|\b(?i:than|over|beats|outperforms|surpasses|unlike|except(?:\sfor)?|excluding|excludes|ruled?\sout|rejects?|eliminates?)\s{_LETTER}"
    rf"|(?<=[A-J)\]*])\s?(?:>{{1,3}}|\u227b)\s?{_LETTER}|{_LETTER}\s?(?:<{{1,3}}|\u227a)(?=\s?[(\[*]{{0,3}}[A-J]\b)"
    rf"|\b[A-J][\s-](?i:major|minor|flat|sharp)\b|\b[A-J]\.\s?(?:[A-Z]\.\s?){{1,3}}(?=[A-Z][a-z])"
    r"|\b(?:E\.\s?coli|C\.\s?(?:elegans|difficile|diff|albicans|botulinum|tetani)|H\.\s?(?:pylori|influenzae|sapiens|erectus)|D\.\s?melanogaster"
    r"|A\.\s?(?:thaliana|fumigatus|mellifera|niger)|B\.\s?(?:subtilis|anthracis|cereus|burgdorferi|taurus)|G\.\s?gallus|F\.\s?nucleatum)\b"
    rf"|\d\s?\u00b0?\s?[A-J]\b(?!\))|[A-Za-z0-9]&[A-J]\b|[A-J]\s=\s?[^\sA-J]|\b(?i:is|was|could|would)\s(?i:it|the\sanswer)\s(?:be\s)?{_LETTER}\s?\?"
    rf"|\b(?i:if|suppose|supposing|assuming|maybe|perhaps|possibly|(?:could|might|may)\sbe)\s(?:it\sis\s|it['\u2019]s\s)?{_LETTER}"
    rf"(?:,?\s?(?:then\s)?{_LETTER})?"
    rf"|\b(?i:anything|everything|all|any)(?:\sof\sthem)?\s(?:but|other\sthan)\s{_LETTER}"
)
"""Letters that name a thing (`E. coli`), or an option that is worse (the A of `C > A`) or left out."""
_LABEL = re.compile(
    r"(?:^|(?<=\s))\(?([A-J])[).:]\)?[ \t]+(?=[^\s()])(?!(?i:because|since|is|as|and|or|was|isn|not|fails)\b)",
    re.MULTILINE,
)
"""The label of an option that the text repeats: `(A) 3 (B) 4`."""
_CHINESE_LIST = r"(?<![A-Za-z])[(\[]?[A-J][)\]]?(?:[、和与或及%s]\s?[(\[]?[A-J][)\]]?){0,9}(?![A-Za-z])"
_DENIED = re.compile(
    rf"\b(?:[Nn]ot|cannot|[Nn]either|rather than|instead of)\b(?:\s(?:be|option|choice))?{_ONE}(?:\s?n?or\s{_ONE})?"
    rf"|n['\u2019]t(?:\sbe)?{_ONE}|\b[Nn]either\sis{_ONE}"
    rf"|{_LETTER}(?:,?\s(?:and\s|or\s|&\s)?{_LETTER}){{1,9}},?\s(?:(?:are|were|look|seem|must\sbe)\s(?:all\s|both\s|also\s)?"
    r"(?:wrong|incorrect|false|not|untrue|eliminated|excluded|ruled)|fail|cannot|can['\u2019]t|won['\u2019]t|do\s?n(?:ot|['\u2019]t))\b[^\n.;,]{0,40}"
    r"|[(\[*]{0,3}\b[A-J]\b[)\]*]{0,3}\s(?:is|are|was|must be|would be|will be|looks|seems)\s(?:also\s)?"
    r"(?:wrong|incorrect|false|not|untrue)\b[^\n.;,]{0,40}"
    r"|[(\[*]{0,3}\b[A-J]\b[)\]*]{0,3}[:.]?\s(?i:no|false|wrong|incorrect|not)\b[^\n.;,]{0,40}"
    r"|[(\[*]{0,3}\b[A-J]\b[)\]*]{0,3}\s(?:fails\b|cannot\b|won['\u2019]t\b|will\snot\b|do(?:es)?\s?n(?:ot|['\u2019]t)\b"
    r"|(?:is|are|was|can\sbe|could\sbe|may\sbe|must\sbe|should\sbe)\s(?:ruled|crossed|eliminated|excluded|rejected|discarded|dismissed|out|impossible)\b)"
    r"[^\n.;,]{0,40}"
    r"|[(\[*]{0,3}\b[A-J]\b[)\]*]{0,3}\s(?:isn['\u2019]t|cannot be|can['\u2019]t be)\b[^\n.;,]{0,40}"
    rf"|(?:不是|不选|不能选|不应选|并非|排除|错选|误选)(?:选项)?\s?{_CHINESE_LIST % ','}(?:选?项)?"
    rf"|{_CHINESE_LIST % ''}\s?(?:选?项)?[都均也是]{{0,2}}(?:不对|不正确|错误|错|不符合?|不成立|有误|不可能|不满足)"
)
_REASONED = re.compile(rf"({_LETTER}(?:\s[a-z]{{1,12}}){{0,4}},?)\s(?:since|because)\s[^.;\n]{{0,200}}")
"""The reason for a letter, which may name others: `C is right since D would overflow`."""
_REASON_IN_CHINESE = re.compile(
    r"(?<=[A-J)\]])(?:选?项)?(?:正确|对)?[,\uff0c\u3002.]?\s?(?:因为|由于)[^\u3002;\uff1b\n]{0,200}"
)
_WORD_BEFORE = re.compile(r"([A-Za-z]{2,20})[\s(\[*\"']{1,4}\Z")
_WORDS = re.compile(
    r"is|are|was|be|it|so|therefore|thus|hence|then|and|or|but|than|answer|answers|letter|option|choice|pick|choose"
    r"|chose|chosen|select|selected|say|guess|think|believe|with|to|for|only|just|definitely|clearly|probably|likely"
    r"|yes|no|final|mark|go|going|picked|both|either|neither|nor|between|of|prefer|rank|verdict|correct|right|best"
    r"|true|ok|okay|well|here|not",
    re.IGNORECASE,
)
"""Before a letter by itself: it may be the chosen one. After a different word, such as the noun of `group A`, it is none."""
_FINAL = re.compile(
    r"\b(?:(?i:final(?:\s(?:choice|pick|decision|option|letter|verdict))?|my\s(?:choice|pick))\s?(?::|is\b)"
    r"|I(?:\swill|['\u2019]ll|\swould)?\s(?:choose|chose|pick|select|go\swith))[\s*]{0,6}(?=(?:(?i:option|choice)\s)?[(\[*]{0,3}[A-J]\b)"
    r"|(?:(?<![不误错])(?<!不能)(?<!不应)选择?|正确的?选项[是为]|正确的[是为])[:\uff1a\s*]{0,6}(?=(?:选项)?[(\uff08\[*]{0,3}[A-J](?![A-Za-z]))"
)
"""Before the letter that is chosen in the end, among others that are named."""
LATEX_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf)\s*\{([^{}]*)\}")


def chosen_letter(text: str, marked: str | None, loosely: bool = True) -> str | None:
    """Return the letter after the marker or at the start of the last line that begins with one.

    None if there is none, if it is one of several (`A or B`), or if all are denied (`not B`).

    Args:
        marked: the text after the last marker, None without a marker.
        loosely: also take the letter after `Final:` or `I choose`, or the last separate letter.
    """
    if marked is None and loosely and (final := list(_FINAL.finditer(text))):
        marked = text[final[-1].end() :].split("\n", maxsplit=1)[0]
    if not loosely and marked is not None and _later(marked, text) != marked:
        return None
    if marked is not None and (rest := rejection(text[text.rfind(marked) :])) is not None:
        return _last(rest)
    if marked is not None:
        found = _found(_later(marked, text), _PATTERNS)
        return found[0] if found else (_last(text) if loosely else None)
    leading = _found(text, (_LEADING,))
    return leading[-1] if leading else (_last(text) if loosely else None)


def gold_letter(gold: str) -> str | None:
    """Return the letter of a gold answer, such as `b`, `(B)` or `B. Paris`; None if it is none."""
    return next(iter(_found(gold, _PATTERNS, whole=True)), None)


def _later(marked: str, text: str) -> str:
    """Return the text after a correction if it names a letter."""
    later = correction(text[text.rfind(marked) :])
    return later if later is not None and _found(later, _PATTERNS) else marked


def _last(text: str) -> str | None:
    found = _found(text, _PATTERNS)
    return found[-1] if found else None


def _found(text: str, patterns: Iterable[re.Pattern[str]], whole: bool = False) -> list[str]:
    """Return the letters that the first pattern with a match finds; empty if the last of them is one of several."""
    text = unicodedata.normalize("NFKC", LATEX_TEXT.sub(r"\1", text))
    if not whole:
        text = _REASON_IN_CHINESE.sub(" ", text)
        text = _without_options(_OTHER.sub(" ", _DENIED.sub(" ", _REASONED.sub(r"\1", _ASKED.sub(" ", text)))))
    several = [match.span() for match in _SEVERAL.finditer(text)] if not whole else []
    for pattern in patterns:
        found = [
            match for match in pattern.finditer(text) if whole or pattern is not _ANY or _may_be_chosen(text, match)
        ]
        if found and any(start <= found[-1].start(found[-1].lastindex or 0) < stop for start, stop in several):
            return []
        if found:
            return [str(match[match.lastindex or 0]).upper() for match in found]
    return []


def _may_be_chosen(text: str, match: re.Match[str]) -> bool:
    """Return False for the letter of a name: `group A`."""
    before = _WORD_BEFORE.search(text[max(0, match.start() - 26) : match.start()])
    return before is None or _WORDS.fullmatch(before[1]) is not None


def _without_options(text: str) -> str:
    """Return the text without the labels of options that it repeats in order: A, B, and so on."""
    labels = list(_LABEL.finditer(text))
    if [label[1] for label in labels[:2]] != ["A", "B"]:
        return text
    listed = [label for label, letter in zip(labels, "ABCDEFGHIJ", strict=False) if label[1] == letter]
    for label in reversed(listed):
        text = text[: label.start()] + " " + text[label.end() :]
    return text
