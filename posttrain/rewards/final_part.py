r"""Find the part of a completion that gives its answer: after the reasoning, before a further question, after a correction.

Example:
    >>> final_part("<think>6? no</think>It is 5."), final_part("<think>the answer is 6")
    ('It is 5.', '')
    >>> correction("5? No, 6.")
    ' 6.'
"""

from __future__ import annotations

import re

from posttrain.rewards import chinese
from posttrain.rewards.assertions import NEGATIVE
from posttrain.rewards.number_signs import seen
from posttrain.text import after_reasoning

_NEXT_QUESTION = re.compile(
    r"\n\s*[#*]*(?:question|q|problem|user|human|\u95ee\u9898|\u95ee)\s*\d{0,4}\s*[:\uff1a]", re.IGNORECASE
)
_CORRECTION = re.compile(
    r"\b(?:wait|hold on|hang on|oops|scratch that|correction|my mistake|sorry|actually|i (?:mean|meant)"
    r"|(?:let me|i (?:must|should|need to|have to)) (?:correct|fix"
    r"|revise|redo)(?: (?:that|this|it|myself|my answer))?|on second thoughts?|i (?:made|see) (?:a|an|my) (?:mistake|error)|apologies"
    r"|i was (?:wrong|mistaken)|i take (?:that|it) back|rather(?=,)|make that|strike that)\b|(?<![\w'])no[,!.;:](?=\s)"
    rf"|{chinese.CORRECTION}",
    re.IGNORECASE,
)
_SUPPOSED = re.compile(
    r"(?:\b(?:doubt|denies|deny|(?:false|wrong|untrue|not true)(?=\sthat)|not (?:think|believe|say))|n['\u2019]t (?:think|believe|say)"
    r"|\bnobody (?:thinks|believes|says)|\bif|\bsuppose|supposing|assume|assuming|imagine|whether|unless)"
    r"\s(?:that\s)?(?:the|my|our)\s(?:\w{1,12}\s)?answer\s(?:is|was|were|equals)"
    r"\s(?:[^,.;:?!\n]|[.,](?=\d)){1,60}"
    r"|\b(?:is|was|could|would|might|can)\s(?:the|my|our)\s(?:\w{1,12}\s)?answer\s(?:be\s)?(?:[^,.;:?!\n]|[.,](?=\d)){1,60}\?"
    rf"|{chinese.SUPPOSED}",
    re.IGNORECASE,
)
"""An answer that is only supposed or asked for."""
_NOT_THE_ANSWER = re.compile(
    rf"(?:\b(?:{NEGATIVE})\s(?:[a-z]{{1,12}}\s)?(?:answers?|options?|choices?|results?|values?|ones?)"
    rf"[*_\s]{{0,4}}(?:is|are|was|would be|:|=)"
    rf"|(?:(?<![^\n])|(?<=[.;!?]\s))[\s*_]{{0,4}}(?:{NEGATIVE}|not (?:the|my|an?) (?:[a-z]{{1,12}} )?answer)[*_\s]{{0,4}}:)"
    rf"(?:[^,.;:?!\n]|:(?!\s)|[.,](?=\d)){{1,60}}|{chinese.NOT_THE_ANSWER}",
    re.IGNORECASE,
)
"""An answer that the text calls wrong: `the wrong answer is 5`."""
_FIRST_SENTENCE = r"(?:[^.!?;\n]|\.(?=\d)){1,80}"
_REJECTED = re.compile(
    rf"{_FIRST_SENTENCE}(?:[.!?;,]{{1,3}}[*\s]{{0,4}}|\n\s{{0,4}})(?:(?:but|no|hmm|however|oh|well|wait|actually|sorry)[,.!\s]{{1,3}}){{0,3}}"
    r"(?:that|this|it|which|the answer)"
    r"(?:['\u2019]s|\s(?:is|was|would be|must be|seems|looks|can['\u2019]?t be|cannot be|isn['\u2019]t))\s(?:\w{1,12}\s)?"
    r"(?:incorrect|wrong|false|impossible|nonsense|a mistake|an error|right|correct)\b(?!\s(?:to|that|positive|alarm|negative)\b)",
    re.IGNORECASE,
)
_REFUSED = re.compile(
    rf"{_FIRST_SENTENCE}(?:[.!?;,]{{1,3}}[*\s]{{0,4}}|\n\s{{0,4}}|\s?(?=\())\(?(?:no|nope|wrong|incorrect|scratch that|just kidding)\b"
    r"(?=\s?(?:[.!,;)]|\Z))",
    re.IGNORECASE,
)
_REJECTED_IN_CHINESE = re.compile(chinese.REJECTED)
_SENTENCE_END = re.compile(r"[.!?;\n][\s$})>\]]*")
_BEGINS_CORRECTION = re.compile(rf"(?:(?:oh|no|hmm|but|well)[,.]?\s)?(?:{_CORRECTION.pattern})", re.IGNORECASE)
_DOUBT = re.compile(
    r"\b(?:incorrect|wrong|false|impossible|nonsense|mistake|error)\b|(?:\bnot|n['\u2019]t)(?:\s\w{1,12})?\s(?:right|correct)\b",
    re.IGNORECASE,
)
_STRUCK = re.compile(r"~~[^~\n]{1,400}~~|<\|[A-Za-z_]{2,30}\|>")
"""Text that is struck out, and special tokens such as `<|im_end|>`."""


def final_part(completion: str) -> str:
    """Return the text after the reasoning, without special tokens and what is struck out or only supposed.

    It is empty if the reasoning has not ended.
    """
    return _NOT_THE_ANSWER.sub(" ", _SUPPOSED.sub(" ", _STRUCK.sub(" ", after_reasoning(seen(completion)))))


def question_starts(text: str) -> list[int]:
    """Return the place where the text asks a question, after its first line: models without a trained end go on with the next problem."""
    return [found.start() for found in _NEXT_QUESTION.finditer(text)]


def correction(text: str) -> str | None:
    """Return the text after the last words that take something back, such as `wait` or `no,`; None without such."""
    found = list(_CORRECTION.finditer(text))
    return text[found[-1].end() :] if found else None


def later_text(text: str) -> str | None:
    """Return the words after a correction that begins a sentence: the Rome of `Paris. Sorry, I meant Rome.`; None without such."""
    if len(said := _SENTENCE_END.split(text, maxsplit=1)) < 2 or not _BEGINS_CORRECTION.match(said[1]):
        return None
    later = correction(said[1])
    return later.strip(" ,:") or None if later is not None else None


def rejection(text: str) -> str | None:
    """Return the text after a sentence that calls the answer before it wrong, such as `5. That is incorrect.`; None without such."""
    if refused := _REFUSED.match(text) or _REJECTED_IN_CHINESE.match(text):
        return text[refused.end() :]
    found = _REJECTED.match(text)
    if found is None or _is_affirmed(found[0]):
        return None
    return text[found.end() :]


def _is_affirmed(said: str) -> bool:
    """Return True for `that is right` and `that is not wrong`."""
    doubts = _DOUBT.findall(said)
    return not doubts or re.search(r"\b(?:not|never)\s(?:wrong|incorrect|false)\b", said) is not None
