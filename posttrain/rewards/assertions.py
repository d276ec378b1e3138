"""Decide whether a marked answer is asserted, as one number: a strict verdict needs words that a small grammar understands whole.

Before the marker, a clause of connectives and usual adjectives is understood (`so my final answer is`), but no other speaker (`a student
thinks the answer is`). Between marker and number, nothing, or words that end in a verb (`she has 42 apples`), but no bound (`up to 42`) and
no name (`May 5`). After the number, its unit, and no further number in the same clause.

Example:
    >>> asserts("So the final "), asserts("A student said the ")
    (True, False)
    >>> leads("she has "), leads("no more than "), ends(" apples"), ends(", 43 and 44")
    (True, False, True, False)
"""

from __future__ import annotations

import re

_BREAK = re.compile(r"[\n:;,!?\u3001\u3002\uff0c\uff1a]|\.(?!\d)|\u2014|\s-\s|\u2192|[<\[]/?answer[>\]]")
_SENTENCE = re.compile(r"[\n;!?\u3002]|\.(?!\d)")
_CONNECTIVE = (
    r"so|thus|hence|therefore|then|and|but|or|finally|now|ok|okay|yes|well|since|because|as|that|which|this|it|means?|implies|gives?|shows?|follows"
    r"|in conclusion|in total|in summary|as a result|overall|clearly|i|we|you|get|got|find|found|conclude|see|know|think|believe|say"
    r"|am|are|is|be|shown|here['\u2019]s"
    r"|confident|sure|certain|clear|obvious|evident|have|can|will|must|here|there|indeed|of course|to sum up"
    r"|let me|let us|give|state|us|for|all|together|altogether"
    r"|also|still|again|simply|just|hello|great|good|putting it together|step|given|write|box|report"
)
_ARTICLE = r"the|my|our|your|this|an?|la|le|el|die|der|das|het|de|o|l['\u2019]|il|den|det|meine?|ma|mi|minha|nossa|nuestra|notre|unsere"
_ADJECTIVE = (
    r"final|correct|right|numerical|numeric|simplified|exact|only|best|required|desired|actual|overall|total|short|full|complete|expected"
    r"|true|approximate|decimal|integer|resulting|single|unique|proper|corrected|appropriate|most|likely"
    r"|finale?|finales|correcta|correto|correta|correcte|bonne|richtige|endg\u00fcltige|korrekte|juiste|r\u00e4tta|slutliga|corretta|definitiva"
    r"|\u0438\u0442\u043e\u0433\u043e\u0432\u044b\u0439"
    r"|\u043f\u0440\u0430\u0432\u0438\u043b\u044c\u043d\u044b\u0439|donc|daher|por tanto|entonces|\u0438\u0442\u0430\u043a"
)
_LEAD = re.compile(
    rf"[\s*_#>\"'(\[$\\~`\u2022\d)-]*(?:(?:{_CONNECTIVE}|{_ARTICLE}|{_ADJECTIVE})\b[\s*_\"'(]*)*", re.IGNORECASE
)
_CHINESE = re.compile(
    r"(?:.*[^\u3400-\u9fff])?(?:\u6240\u4ee5|\u56e0\u6b64|\u6545|\u6700\u7ec8|\u6700\u540e|\u6b63\u786e|\u6b63\u89e3|\u672c\u9898|\u8be5\u9898|\u9898\u76ee|\u6211\u7684|\u5219|\u7684|\u662f|\u3067\u3059)*"
)
NEGATIVE = (
    r"wrong|incorrect|false|invalid|mistaken|erroneous|bad|worse|worst|tempting|naive|na\u00efve"
    r"|second[\s-]best|implausible|unlikely|impossible"
)
_SUPPOSING = re.compile(
    r"\b(?:nobody|if|suppose|supposing|assume|assuming|imagine|whether|unless|might|may|could|would|according|opinion|view|doubt|denies|deny"
    r"|(?:(?!(?:i|we)\b)[a-z]{1,20})\s(?:said|says|say|think|thinks|thought|claims?|claimed|believes?|believed"
    r"|guess(?:es|ed)?|argues?|argued|wrote|writes|answered|answers))\b",
    re.IGNORECASE,
)
"""In the sentence before a marker: a different speaker, or something supposed."""
_DENYING = re.compile(
    rf"\b(?:{NEGATIVE}|not|never|cannot|wrongly|incorrectly|mistakenly|erroneously|falsely)\b|n['\u2019]t\b",
    re.IGNORECASE,
)
_CONCLUDING = re.compile(r"[\s*_]*(?:and\s)?(?:so|thus|hence|therefore)\b", re.IGNORECASE)
_BOUND = (
    r"than|to|under|over|below|above|at (?:least|most)|up|until|till|within|before|after|between|from|beyond|exceeds?|exceeding"
    r"|maximum|minimum|max|min|nearly|almost|not|never|cannot|n['\u2019]t|no|if|maybe|might|could|may|perhaps|possibly|either|neither|hardly"
)
_BOUNDING = re.compile(rf"\b(?:{_BOUND})\b|n['\u2019]t\b", re.IGNORECASE)
_BOX_BOUND = re.compile(
    r"\b(?:(?:more|less|fewer|greater|smaller|larger|higher|lower)\sthan|up to|under|below|above|at (?:least|most)|exceeds?|not|never"
    r"|n['\u2019]t)(?:\s(?:be|equal|exactly|just))?[\s$*:\\(\[]*\Z"
    r"|(?:(?<=[\w)}$]\s)>|[<\u2260\u2264\u2265\u00b1]|\\(?:leq?|geq?|neq?|leqslant|geqslant|lt|gt|pm)(?![A-Za-z]))[\s${\\]*\Z",
    re.IGNORECASE,
)
_DIRECT = re.compile(
    r"[\s,*_$({\[\"'`\u201c\u2018\u300c~:=\u2248\\]*"
    r"(?:(?:(?:about|approximately|approx\.?|around|roughly|exactly|just|simply|only|but|equal to|therefore|indeed|clearly|thus|so"
    r"|a total of|x|[A-Za-z](?=\s?[=:])|\\approx|\\(?:displaystyle|quad|qquad|;|:|!|\())[\s*_$({\[\"'=:\\]*)){0,3}",
    re.IGNORECASE,
)
_VERB_LAST = re.compile(
    r"[^\d\ue000\ue002]{0,120}\b(?:is|are|was|were|equals?|has|have|had|costs?|makes?|made|needs?|takes?|took|gets?|got|gives?|earns?|earned|pays?"
    r"|paid|spends?|spent|saves?|saved|sells?|sold|buys?|bought|eats?|ate|uses?|used|reads?|read|weighs?|contains?|holds?|totals?|becomes?"
    r"|be|remains?|leaves?|left|received?|receives|runs?|ran|drives?|drove|walks?|walked|owes?|owed|bakes?|baked|collects?|collected|wins?|won"
    r"|about|approximately|exactly|only|just|total of|there are|there were|es|est|ist|son|sont|sind)[\s*_$({\[\"'=:\\]*",
    re.IGNORECASE,
)
_TAIL = re.compile(
    r"[\s*_$)\]}\"'`%\u00b0\u201d\u2019\u300d]*(?:\+(?!\s?[A-Za-z])|\.{2,}\s?\d|\u2026\s?\d|\u2192\s?\d|\?|\(?\s?or\b"
    r"|(?:max|min(?!\.?[\s$*_)\]}]*\Z)|maximum|minimum|at (?:least|most|best|worst)|tops|or|plus|minus|times|div|mod|through|until"
    r"|till|upwards?|less|fewer)\b)"
)
_EQUAL_PART = re.compile(r"[\s*_$)\]}]*or\s(?:so\b|[$*]*(?P<other>[-\d./]+))")
_PRECISION = re.compile(
    r"[\s*_$)]*(?:[A-Za-z]{1,12}\s)?\(?(?:rounded |correct )?to \d{1,2} (?:decimal|significant|places|digits|figures|d\.?p|s\.?f)\b"
)
_FURTHER = re.compile(r"(?P<gap>[^\n]*?)(?<![\w^{])(?<!\d[.,])\d")
_SEPARATE = re.compile(
    r"[;:!?(\u2192]|\.(?!\d)|\s-\s|\u2014|,\s(?:which|because|since|as|that|not|so|i\.e|given|where|while)\b"
    r"|\b(?:because|since|given|when|where|after|before|while|with|using)\b"
    r"|\b(?:of|in|per|out of|rounded to|to (?:the nearest|within)?|correct to|for|on|at|by|every|than)\s[\s$A-Za-z]{0,20}\Z"
)
_PLAIN_RANGE = re.compile(r"[\s*_$)]*(?:to|through|bis|and|-|\u2013|\u2014)[\s*_$(]*\Z")
_OTHER_BASE = re.compile(r"[\s*_$)]*\(?(?:in\s)?(?:binary|octal|hexadecimal|hex)\b", re.IGNORECASE)
_CONCLUSION = re.compile(
    r"[^\n.!?;]{0,20},\s(?:so|hence|thus|therefore)\s(?:[a-z']{1,8}\s){0,3}[$-]{0,2}\d[\d.,]*(?:\s[a-z]+)?[.!]?\s*(?:\n|\Z)"
)
"""A number that follows from the marked one, as in `42.5, so 43`."""
_UNLIKE_UNIT = re.compile(r"\b(?:base|away|short)\b")
_AFTER_BOX = re.compile(
    r"[A-Za-z]|[\s$}\\\])*]{0,6}(?:[-+*/^<>\u00d7\u00f7\u00b7\u2192]\s?[$\\({]{0,3}[\dA-Za-z](?![A-Za-z])|\\(?:cdot|times|pm|leq?|geq?|div|to)\b"
    r"|(?:or|to|minus|plus|times)\s|(?:is|was)\s(?:not|wrong|incorrect|false|what\s[a-z]{1,5}\s(?:gets?|got|would))\b|isn['\u2019]t\b|cannot\b|can['\u2019]t\b"
    r"|(?:,|;|and)\s?\$?-?\d)"
)
_SHORT = re.compile(r"[\s*_$]*(?P<unit>['\u2032]{1,2}|[A-Za-z]{1,2})(?=[\s*_$)\]}\"'\u201d\u2019.,;:!?]*(?:\n|\Z))")
"""One or two letters, or a prime, that are all that follows a number."""
_UNITS = (
    "m cm mm km nm dm in ft yd mi g kg mg lb oz t s ms ns h hr d wk mo yr l L ml mL cl cL dl dL V A W J N K C F Pa Hz kW MW kJ kN kV mV mA"
    " B kB KB MB GB TB kb Mb Gb sq cu pt qt gr Rs TL kr"
)
_USUAL_UNITS = frozenset(_UNITS.split())
_SECOND = re.compile(
    r"^[^\n.!?;]{0,60}(?:[.!?;](?!\d)|\n)\s*(?:correct:\s)?(?:(?!step|page|part)[A-Za-z'\u2019,]{1,12}\s){0,4}[$*]{0,3}(-?\d[\d.,]{0,20})[.!*$]{0,4}\s*\Z",
    re.IGNORECASE,
)


def clause_before(text: str, place: int) -> tuple[str, str]:
    """Return the sentence and the clause that lead to a place."""
    sentence = _SENTENCE.split(text[max(0, place - 300) : place])[-1]
    return sentence, _BREAK.split(sentence)[-1]


def asserts(text: str, word: bool = True) -> bool:
    """Return True if the text asserts the marker behind it: a word by known words, a sign by words that deny nothing."""
    sentence, clause = clause_before(text, len(text))
    if _SUPPOSING.search(clause if not word or _CONCLUDING.match(clause) else sentence):
        return False
    if not word:
        return not (_BOX_BOUND.search(sentence) or _DENYING.search(clause))
    return bool(_LEAD.fullmatch(clause) or (not clause.isascii() and _CHINESE.fullmatch(clause)))


def leads(text: str) -> bool:
    """Return True if the text between a marker and its number is nothing, or a clause that ends in a verb."""
    return bool(_DIRECT.fullmatch(text) or (_VERB_LAST.fullmatch(text) and not _BOUNDING.search(text)))


def ends(text: str) -> bool:
    """Return True if the text after a number leaves the number whole: a unit, a reason, a new sentence, but no list or range.

    One or two letters are a unit only if they are a usual one: `42 cm`, but not `42 ab` or the year `42 AD`, and `42'` has a prime.
    """
    if _EQUAL_PART.match(text) or _PRECISION.match(text):
        return True  # compared by value elsewhere
    if _TAIL.match(text) or re.match(r"c\b", text) or _OTHER_BASE.match(text) or _CONCLUSION.match(text):
        return False
    short = _SHORT.match(text)
    if short and short["unit"] not in _USUAL_UNITS:
        return False
    further = _FURTHER.match(text)
    if further is None:
        return True
    gap = further["gap"]
    return bool(_SEPARATE.search(gap)) and not _PLAIN_RANGE.fullmatch(gap) and not _UNLIKE_UNIT.search(gap)


def box_ends(text: str) -> bool:
    """Return True if the text after a box neither calculates with it, nor denies it, nor lists a second answer."""
    return _AFTER_BOX.match(text) is None


def second_number(text: str) -> str | None:
    """Return a number that is the whole next sentence after an answer: the 43 of `42. Hmm, 43.`; None without such."""
    found = _SECOND.search(text)
    return found[1].rstrip(".,") if found else None
