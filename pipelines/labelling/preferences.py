"""Turn judgements into preferences, and write the session's results."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from pipelines.data import handover
from pipelines.labelling.held_out import TABLE, Gold, problems
from pipelines.labelling.judgements import SKIP, TOP_SCORE, Desk, Judgement
from pipelines.labelling.session import Item, Session
from pipelines.labelling.summary import summarise
from posttrain.files import write_atomic


def rows(session: Session, judgement: Judgement) -> list[dict[str, Any]]:
    """Return the pairs that a judgement implies, with annotator, models and time. A tie, or two bad answers, imply none."""
    item = session.item(judgement.task)
    return [
        handover.preference(item.prompt, item.answers[better].text, item.answers[worse].text, high, low)
        | {
            "annotator": judgement.annotator,
            "time": judgement.time,
            "labelled": {
                "session": session.name,
                "item": item.id,
                "chosen": _weights(item, better),
                "rejected": _weights(item, worse),
            },
        }
        for better, worse, high, low in ordered(session.ask, judgement.value)
        if item.answers[better].text != item.answers[worse].text
    ]


def ordered(ask: str, value: Any) -> Iterator[tuple[int, int, float, float]]:
    """Yield (better, worse, score, score) for every two answers that a value puts in order. Scores are from 0 to 1."""
    if ask == "pairs":
        scores = {value: 1.0, 1 - value: 0.0} if isinstance(value, int) else {}
    elif value == SKIP:
        scores = {}
    elif ask == "scores":
        scores = {i: (score - 1) / (TOP_SCORE - 1) for i, score in enumerate(value)}
    else:
        scores = {i: 1 - rank / (len(value) - 1) for rank, i in enumerate(value)}
    for better, high in scores.items():
        for worse, low in scores.items():
            if high > low:
                yield better, worse, high, low


def hand_over(
    desk: Desk,
    inbox: str,
    *,
    scores: bool,
    trusted: str | None = None,
    gold: Gold | None = None,
    only: str | None = None,
) -> int:
    """Put fresh judgements into the inbox, rewrite the session's results, and return the number of fresh judgements.

    Of models that judge, only the one named `trusted` takes part; with `only`, no annotator but that one. A held-out session needs `gold`,
    which reads the gold answer from an answer; its rows go to the table `evaluation`, and none to the preferences.
    """
    session = desk.session

    def write(number: int, batch: Sequence[Judgement]) -> None:
        if session.held_out:
            assert gold is not None
            found, table = list(problems(session, desk.handed_before(number), batch, gold)), TABLE
        else:
            found, table = [row for judgement in batch for row in rows(session, judgement)], handover.FOLDER
        if found:
            handover.put(inbox, f"label-{session.name}-{number:04d}.jsonl", found, scores=scores, table=table)

    count = desk.hand_over(write, None if session.held_out else trusted, only)
    write_results(desk)
    return count


def write_results(desk: Desk) -> None:
    """Write judgements.jsonl, which also has ties and skips, and summary.json."""
    session, judgements = desk.session, desk.judgements()
    lines = [json.dumps(_record(session, each), ensure_ascii=False, sort_keys=True) + "\n" for each in judgements]
    write_atomic(session.folder / "judgements.jsonl", "".join(lines).encode("utf-8", "surrogatepass"))
    text = json.dumps(summarise(session, judgements), indent=1, ensure_ascii=False) + "\n"
    write_atomic(session.folder / "summary.json", text.encode())


def _record(session: Session, judgement: Judgement) -> dict[str, Any]:
    item = session.item(judgement.task)
    answers = [{"text": a.text, "model": a.model, "md5": a.md5} for a in item.answers]
    fields = {name: getattr(judgement, name) for name in ("annotator", "task", "value", "time")}
    return fields | {"places": list(judgement.places), "prompt": item.prompt, "answers": answers, "ask": session.ask}


def _weights(item: Item, answer: int) -> str:
    """Return the model of an answer and the hash of its weights."""
    return f"{item.answers[answer].model} {item.answers[answer].md5}"
