"""Turn a session's scores into fresh held-out problems: prompts with a gold answer on which all people agree."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pipelines.config.params import Params
from pipelines.data.sources import CANONICAL, FORM
from pipelines.labelling.judgements import TOP_SCORE, Judgement, is_judge
from pipelines.labelling.session import Item, Session

TABLE = "evaluation"
PEOPLE = 2
"""People who must have given an answer the top score, and nobody less."""
Gold = Callable[[str], str | None]
"""Return the gold answer that a right completion states, None if it states none."""


def gold_answer(params: Params) -> Gold:
    """Return the function that reads a gold answer from a completion, as the reward `evaluation.accuracy` reads completions."""
    judge = params.rewards[params.evaluation.accuracy]
    if judge.function != "answer":
        return lambda text: text.strip() or None
    from posttrain.rewards.extraction import extracted

    options = {name: judge.arguments[name] for name in ("extract", "kind") if name in judge.arguments}
    return lambda text: extracted(text, **options)


def problems(
    session: Session, before: Sequence[Judgement], now: Sequence[Judgement], gold: Gold
) -> Iterator[dict[str, Any]]:
    """Yield a row for each item that `now` settles and `before` did not.

    An item is settled if two or more people gave one of its answers the top score, nobody gave it less, and all such answers state the
    same gold answer.
    """
    settled = {item.id for item, _ in _settled(session, before, gold)}
    for item, answer in _settled(session, [*before, *now], gold):
        if item.id not in settled:
            labelled = {"session": session.name, "item": item.id}
            yield {"prompt": item.prompt, "answer": answer, "labelled": labelled, FORM: CANONICAL}


def _settled(session: Session, judgements: Sequence[Judgement], gold: Gold) -> Iterator[tuple[Item, str]]:
    scores: dict[str, list[list[int]]] = {}
    for judgement in judgements:
        if judgement.counts and not is_judge(judgement.annotator):
            scores.setdefault(session.item(judgement.task).id, []).append(judgement.value)
    for item in session.items:
        given = scores.get(item.id, [])
        right = [i for i in range(len(item.answers)) if all(each[i] == TOP_SCORE for each in given)]
        stated = {gold(item.answers[i].text) for i in right}
        if len(given) >= PEOPLE and len(stated) == 1 and (answer := stated.pop()) is not None:
            yield item, answer
