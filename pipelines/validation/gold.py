"""Gold answers that the reward `answer` can compare: their forms, and what to set for answers of a different form."""

from __future__ import annotations

from posttrain.rewards.choices import gold_letter
from posttrain.rewards.extraction import AnswerKind, gold_answers, gold_value


def is_number(gold: str) -> bool:
    """Return True if one of the accepted answers is a number.

    Example:
        >>> is_number("1,200"), is_number("Paris")
        (True, False)
    """
    return any(gold_value(answer) is not None for answer in gold_answers(gold))


def is_choice(gold: str) -> bool:
    """Return True if one of the accepted answers is a letter.

    Example:
        >>> is_choice("(B)"), is_choice("12")
        (True, False)
    """
    return any(gold_letter(answer) is not None for answer in gold_answers(gold))


def can_compare(gold: str, kind: AnswerKind) -> bool:
    """Return True if an answer of this kind can match the gold answer."""
    return is_number(gold) if kind == "number" else is_choice(gold) if kind == "choice" else bool(gold.strip())


def advice(kind: AnswerKind) -> str:
    """Return what to set if the gold answers are not of the kind that the reward `answer` compares, a number or a letter."""
    other = "choice} for letters" if kind == "number" else "number} for numbers"
    return (
        f"the reward `answer` compares a {kind}; give it arguments: {{kind: text}} for words, or {{kind: {other}, for example"
        " `posttrain configure 'rewards.answer.arguments={kind: text}'`"
    )
