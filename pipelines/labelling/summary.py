"""Agreement of a session's annotators, their consistency, and their biases for the first place and for long answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

from pipelines.labelling.judgements import SKIP, Judgement, is_judge
from pipelines.labelling.session import AGAIN, Session
from posttrain.evaluation.agreement import cohen_kappa, interval, krippendorff_alpha, nominal
from posttrain.evaluation.statistics import wilson

Labels = dict[str, Any]
"""Label by item, or by item and answer for scores."""


def summarise(session: Session, judgements: Sequence[Judgement]) -> dict[str, Any]:
    """Return counts, agreement, and each annotator's consistency and biases; None for a number that cannot be computed.

    Agreement and wins are of people. Models that judge are under `judges`, each by itself, with its agreement with people.
    """
    by_annotator: dict[str, list[Judgement]] = {}
    for judgement in judgements:
        by_annotator.setdefault(judgement.annotator, []).append(judgement)
    labels = {name: _labels(session, (j for j in mine if j.counts)) for name, mine in by_annotator.items()}
    people = {name: mine for name, mine in labels.items() if not is_judge(name)}
    units: dict[str, list[Any]] = {}
    for mine in people.values():
        for item, label in mine.items():
            units.setdefault(item, []).append(label)
    scored = session.ask == "scores"
    by_people = [judgement for judgement in judgements if not is_judge(judgement.annotator)]
    return {
        "session": session.name,
        "ask": session.ask,
        "items": len(session.items),
        "judgements": sum(judgement.counts for judgement in by_people),
        "krippendorff_alpha": krippendorff_alpha(units.values(), interval if scored else nominal),
        "cohen_kappa": {} if scored else {f"{a} and {b}": _kappa(people[a], people[b]) for a, b in combinations(people, 2)},
        "wins": _wins(session, by_people),
        "judges": {
            name: _with_people(labels[name], people, scored) | {"wins": _wins(session, mine)}
            for name, mine in by_annotator.items()
            if is_judge(name)
        },
        "annotators": {name: _about(session, mine) for name, mine in by_annotator.items()},
    }  # fmt: skip


def _with_people(judge: Labels, people: Mapping[str, Labels], scored: bool) -> dict[str, Any]:
    """Return a judge's agreement with all people: Cohen's kappa, or Krippendorff's alpha for scores, over pairs of labels."""
    pairs = [(label, judge[item]) for mine in people.values() for item, label in mine.items() if item in judge]
    agreement = krippendorff_alpha([list(pair) for pair in pairs], interval) if scored else cohen_kappa(pairs)
    return {"compared": len(pairs), "agreement": agreement}


def describe(found: dict[str, Any]) -> str:
    """Return a summary as text."""
    lines = [f"{found['session']}: {found['judgements']} judgements by people of {found['items']} items"]
    lines.append(f"agreement between people: Krippendorff's alpha {_number(found['krippendorff_alpha'])}")
    lines += [f"  {names}: Cohen's kappa {_number(kappa)}" for names, kappa in found["cohen_kappa"].items()]
    lines += _won(found["wins"])
    measure = "Krippendorff's alpha" if found["ask"] == "scores" else "Cohen's kappa"
    for name, about in found["judges"].items():
        lines.append(
            f"{name} with people: {measure} {_number(about['agreement'])} on {about['compared']} labels of both"
        )
        lines += [f"  for {name}, {line}" for line in _won(about["wins"])]
    for name, about in found["annotators"].items():
        lines.append(f"{name}: {about['judgements']} judgements, {about['skipped']} skipped")
        lines += [
            f"  {title}: {_share(about[key])}"
            for key, title in (
                ("chose_first", "chose the answer in the first place"),
                ("chose_longer", "chose the longer answer"),
                ("consistent", "said the same about a repeated item"),
            )
            if about[key]["of"]
        ]
    return "\n".join(lines)


def _won(wins: Mapping[str, tuple[float, int]]) -> list[str]:
    return [f"{model} won {won} of {of} comparisons with a different model" for model, (won, of) in wins.items()]


def _labels(session: Session, judgements: Iterable[Judgement]) -> Labels:
    """Return the labels that are compared: the choice of a pair, each answer's score, the better of every two ranked answers."""
    found: Labels = {}
    for judgement in judgements:
        item, value = session.item(judgement.task).id, judgement.value
        if session.ask == "pairs":
            found[item] = value
        elif session.ask == "scores":
            found |= {f"{item}/{answer}": score for answer, score in enumerate(value)}
        else:
            places = {answer: place for place, answer in enumerate(value)}
            found |= {f"{item}/{a}/{b}": places[a] < places[b] for a, b in combinations(range(len(value)), 2)}
    return found


def _kappa(first: Labels, second: Labels) -> float | None:
    return cohen_kappa([(label, second[item]) for item, label in first.items() if item in second])


def _about(session: Session, mine: Sequence[Judgement]) -> dict[str, Any]:
    """Return one annotator's counts, consistency and biases."""
    first = {j.task: j.value for j in mine if j.counts}
    again = [j for j in mine if j.task.endswith(AGAIN) and j.value != SKIP]
    both = [(first[name], j.value) for j in again if (name := j.task.removesuffix(AGAIN)) in first]
    decided = [(j, top) for j in mine if j.counts and (top := _top(session.ask, j.value)) is not None]
    lengths = [(_lengths(session, j), top) for j, top in decided]
    uneven = [(all_, top) for all_, top in lengths if len(set(all_)) > 1]
    return {
        "judgements": sum(j.counts for j in mine),
        "skipped": sum(j.value == SKIP for j in mine),
        "chose_first": _proportion(sum(j.places[0] == top for j, top in decided), len(decided)),
        "chose_longer": _proportion(sum(all_[top] == max(all_) for all_, top in uneven), len(uneven)),
        "consistent": _proportion(sum(a == b for a, b in both), len(both)),
    }


def _top(ask: str, value: Any) -> int | None:
    """Return the index of the one best answer; None if there is none."""
    if ask == "pairs":
        return value if isinstance(value, int) else None
    if ask == "ranking":
        return int(value[0])
    best = [i for i, score in enumerate(value) if score == max(value)]
    return best[0] if len(best) == 1 else None


def _lengths(session: Session, judgement: Judgement) -> list[int]:
    """Return the characters of the item's answers."""
    return [len(answer.text) for answer in session.item(judgement.task).answers]


def _wins(session: Session, judgements: Sequence[Judgement]) -> dict[str, tuple[float, int]]:
    """Return (wins, comparisons) of every model in pairs with a different model; a tie is half a win."""
    found: dict[str, tuple[float, int]] = {}
    for judgement in judgements if session.ask == "pairs" else ():
        models = [answer.model for answer in session.item(judgement.task).answers]
        if not judgement.counts or models[0] == models[1]:
            continue
        for index, model in enumerate(models):
            won, of = found.get(model, (0.0, 0))
            gained = float(judgement.value == index) if isinstance(judgement.value, int) else 0.5
            found[model] = (won + gained, of + 1)
    return dict(sorted(found.items()))


def _proportion(count: int, of: int) -> dict[str, Any]:
    low, high = wilson(count, of) if of else (None, None)
    return {"count": count, "of": of, "share": count / of if of else None, "low": low, "high": high}


def _share(found: dict[str, Any]) -> str:
    return (
        f"{found['count']} of {found['of']} ({100 * found['share']:.0f} %; 95 % interval {100 * found['low']:.0f} to"
        f" {100 * found['high']:.0f})"
    )


def _number(value: float | None) -> str:
    return "not defined yet" if value is None else f"{value:.2f}"
