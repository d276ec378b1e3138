"""Judgements survive everything, count once, can be undone until they are handed over, and become preferences."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.data.files import read_file
from pipelines.labelling.judgements import Desk, Judgement
from pipelines.labelling.preferences import hand_over, rows
from pipelines.labelling.session import AGAIN, Session, open_session, pair_up
from pipelines.labelling.summary import describe, summarise
from posttrain.errors import DataError
from tests.pipelines.labelling.sessions import session


def opened(made: Session) -> Desk:
    return Desk(made, now=lambda: "2026-11-29T12:00:00+00:00")


def judge_by(desk: Desk, annotator: str, better: dict[str, Any]) -> None:
    """Judge all tasks of one annotator: `better` holds the index of the better answer, or a label, by item."""
    while (item := desk.state(annotator)["item"]) is not None:
        name = item["task"].removesuffix(AGAIN)
        value = better.get(name, 0)
        if isinstance(value, int):
            value = ("first", "second")[desk.session.places(annotator, item["task"]).index(value)]
        desk.judge(annotator, item["task"], f"{annotator}/{item['task']}", value)


def scored_pairs(made: Session, judgement: Judgement) -> list[tuple[Any, ...]]:
    columns = ("chosen", "rejected", "chosen_score", "rejected_score")
    return [tuple(row[name] for name in columns) for row in rows(made, judgement)]


def files(inbox: Path) -> list[Path]:
    return sorted((inbox / "preferences").glob("*"))


def test_a_session_is_read_as_it_was_written(tmp_path: Path) -> None:
    made = session(tmp_path / "labels" / "one")
    assert open_session(made.folder) == made
    with pytest.raises(DataError, match="no labelling session two; sessions: one"):
        open_session(tmp_path / "labels" / "two")


def test_signs_that_end_a_line_for_unicode_only_stay_in_their_text(tmp_path: Path) -> None:
    made = session(tmp_path / "labels" / "one")
    text = "5\u2028+\u2029 5\x85=\ud800"
    made = replace(made, items=(replace(made.items[0], prompt=text), *made.items[1:]))
    made.save()
    assert open_session(made.folder).items[0].prompt == text


def test_orders_are_blind_and_a_second_time_reversed(tmp_path: Path) -> None:
    made = session(tmp_path / "s", count=40, repeated=5)
    assert made.tasks("ann") == made.tasks("ann") != made.tasks("bob")
    assert len(made.tasks("ann")) == 45
    first_places = [made.places("ann", str(i))[0] for i in range(40)]
    assert 10 < sum(first_places) < 30
    assert made.places("ann", "3:again") == made.places("ann", "3")[::-1]
    desk = opened(made)
    assert "model-" not in json.dumps(desk.state("ann"))
    desk.close()


def test_a_judgement_counts_once_and_is_there_after_a_kill(tmp_path: Path) -> None:
    made = session(tmp_path / "s", count=3)
    desk = opened(made)
    task = desk.state("ann")["item"]["task"]
    desk.judge("ann", task, "k1", "first")
    desk.judge("ann", task, "k1", "second")
    desk.judge("ann", task, "k2", "second")
    better = made.places("ann", task)[0]
    desk.close()
    with (made.folder / "journal.jsonl").open("ab") as file:
        file.write(b'{"kind": "judgement", "key": "torn')
    again = opened(made)
    assert [(j.task, j.value) for j in again.judgements()] == [(task, better)]
    again.judge("ann", again.state("ann")["item"]["task"], "k3", "tie")
    again.close()
    third = opened(made)
    assert [j.value for j in third.judgements()] == [better, "tie"]
    third.close()


def test_an_undone_judgement_does_not_come_back_when_it_is_sent_again(tmp_path: Path) -> None:
    desk = opened(session(tmp_path / "s", count=2))
    task = desk.state("ann")["item"]["task"]
    desk.judge("ann", task, "k1", "bad")
    desk.undo("ann")
    desk.judge("ann", task, "k1", "bad")
    assert desk.judgements() == []
    assert desk.state("ann")["item"]["task"] == task
    with pytest.raises(DataError, match="no judgement to undo"):
        desk.undo("ann")
    desk.close()


@pytest.mark.parametrize(
    ("ask", "value"),
    [("pairs", "best"), ("pairs", 0), ("scores", [1, 11]), ("scores", [1]), ("scores", [True, 2]), ("ranking", [0, 0])],
)
def test_a_value_of_the_wrong_form_is_refused(tmp_path: Path, ask: Any, value: Any) -> None:
    desk = opened(session(tmp_path / "s", ask=ask))
    with pytest.raises(DataError, match="is no judgement here; valid: "):
        desk.judge("ann", "0", "k", value)
    for name in ("", "a" * 41, "a\nb"):
        with pytest.raises(DataError, match="an annotator's name"):
            desk.state(name)
    desk.close()


def test_values_are_stored_by_answer_whatever_the_places(tmp_path: Path) -> None:
    scored = opened(session(tmp_path / "scores", ask="scores", answers=3))
    places = scored.session.places("ann", "4")
    scored.judge("ann", "4", "k", [10 * (answer == 2) or 1 for answer in places])
    assert scored.judgements()[0].value == [1, 1, 10]
    scored.close()
    ranked = opened(session(tmp_path / "ranking", ask="ranking", answers=3))
    places = ranked.session.places("ann", "4")
    ranked.judge("ann", "4", "k", [places.index(2), places.index(0), places.index(1)])
    (judgement,) = ranked.judgements()
    assert judgement.value == [2, 0, 1]
    found = scored_pairs(ranked.session, judgement)
    assert found == [("4.2xx", "4.0", 1.0, 0.5), ("4.2xx", "4.1x", 1.0, 0.0), ("4.0", "4.1x", 0.5, 0.0)]
    ranked.close()


def test_scores_become_pairs_with_scores_from_0_to_1(tmp_path: Path) -> None:
    made = session(tmp_path / "s", ask="scores", answers=3)
    judgement = Judgement("k", "ann", "5", (2, 0, 1), [10, 1, 1], "now")
    assert scored_pairs(made, judgement) == [("5.0", "5.1x", 1.0, 0.0), ("5.0", "5.2xx", 1.0, 0.0)]
    assert rows(made, Judgement("k", "ann", "5", (0, 1, 2), "skip", "now")) == []


def test_only_decisions_go_to_the_inbox_each_once_with_who_and_which(tmp_path: Path) -> None:
    inbox = tmp_path / "inbox"
    desk = opened(session(tmp_path / "s", count=4))
    judge_by(desk, "ann", {"0": 0, "1": 1, "2": "tie", "3": "bad"})
    assert hand_over(desk, str(inbox), scores=True) == 4
    assert hand_over(desk, str(inbox), scores=True) == 0
    with pytest.raises(DataError, match="was handed to the inbox"):
        desk.undo("ann")
    (file,) = files(inbox)
    found = {row["prompt"]: row for row in read_file(file)}
    assert found.keys() == {"0+0=", "1+0="}
    assert found["1+0="] == {
        "prompt": "1+0=", "chosen": "1.1x", "rejected": "1.0", "chosen_score": 1.0, "rejected_score": 0.0,
        "form": "canonical", "annotator": "ann", "time": "2026-11-29T12:00:00+00:00",
        "labelled": {"session": "s", "item": "1", "chosen": "model-1 md5-1", "rejected": "model-0 md5-0"},
    }  # fmt: skip
    kept = read_file(desk.session.folder / "judgements.jsonl")
    assert {(each["task"], each["value"]) for each in kept} == {("2", "tie"), ("3", "bad"), ("0", 0), ("1", 1)}
    judge_by(desk, "bob", {})
    assert hand_over(desk, str(inbox), scores=False) == 4
    assert [path.name for path in files(inbox)] == ["label-s-0001.jsonl", "label-s-0002.jsonl"]
    assert "chosen_score" not in read_file(files(inbox)[1])[0]
    desk.close()


def test_a_process_that_dies_while_it_hands_over_writes_the_same_file_again(tmp_path: Path) -> None:
    made = session(tmp_path / "s", count=3)
    desk = opened(made)
    desk.judge("ann", "0", "k", "first")

    def dies(number: int, batch: list[Judgement]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        desk.hand_over(dies)
    desk.close()
    again = opened(made)
    again.judge("ann", "1", "k2", "first")
    written: list[tuple[int, list[str]]] = []
    again.hand_over(lambda number, batch: written.append((number, [each.key for each in batch])))
    assert written == [(1, ["k"]), (2, ["k2"])]
    again.close()


def test_one_process_serves_a_session(tmp_path: Path) -> None:
    made = session(tmp_path / "s")
    desk = opened(made)
    with pytest.raises(DataError, match="is already open in a different process"):
        opened(made)
    desk.close()
    opened(made).close()


def test_agreement_and_biases_by_hand(tmp_path: Path) -> None:
    desk = opened(session(tmp_path / "s", count=4, repeated=2))
    judge_by(desk, "ann", {})
    judge_by(desk, "bob", {"0": 1, "1": "tie"})
    for task, value in (("0", 0), ("1", 0), ("2", 0), ("3", 1)):
        desk.judge_item("judge/m", task, f"m{task}", value)
    found = summarise(desk.session, desk.judgements())
    # ann: 0 0 0 0, bob: 1 tie 0 0. Observed disagreement 4/8. Six 0, one 1, one tie: 2 x (6 + 6 + 1) of 56 ordered pairs by chance
    assert found["krippendorff_alpha"] == pytest.approx(1 - (4 / 8) / (26 / 56))
    # by chance 1 x 1/2 = 1/2, observed 2/4
    assert found["cohen_kappa"] == {"ann and bob": pytest.approx(0.0)}
    ann, bob = found["annotators"]["ann"], found["annotators"]["bob"]
    assert (ann["chose_longer"]["count"], ann["chose_longer"]["of"]) == (0, 4)
    assert (bob["chose_longer"]["count"], bob["chose_longer"]["of"]) == (1, 3)
    assert (ann["consistent"]["count"], ann["consistent"]["of"]) == (2, 2)
    first = sum(desk.session.places("ann", str(i))[0] == 0 for i in range(4))
    assert (ann["chose_first"]["count"], ann["chose_first"]["of"]) == (first, 4)
    assert found["wins"] == {"model-0": (6.5, 8), "model-1": (1.5, 8)}
    assert found["judgements"] == 8
    # the judge's 0 0 0 1 with both people: 4 of 8 agree; by chance 6/8 x 6/8 + 1/8 x 2/8 = 38/64
    assert found["judges"]["judge/m"]["agreement"] == pytest.approx((1 / 2 - 38 / 64) / (1 - 38 / 64))
    assert found["judges"]["judge/m"]["wins"] == {"model-0": (3.0, 4), "model-1": (1.0, 4)}
    shown = describe(found)
    assert "s: 8 judgements by people of 4 items\nagreement between people: Krippendorff's alpha -0.08\n" in shown
    assert "ann and bob: Cohen's kappa 0.00" in shown
    assert "judge/m with people: Cohen's kappa -0.23 on 8 labels of both\n  for judge/m, model-0 won 3.0 of 4" in shown
    desk.close()


def test_equal_answers_are_no_pair(tmp_path: Path) -> None:
    a, b = session(tmp_path / "s", count=1).items[0].answers
    assert [[answer.text for answer in item.answers] for item in pair_up("p", [a, a, b], 5)] == [["0.0", "0.1x"]] * 2
    assert [item.id for item in pair_up("p", [a, a, b], 5)] == ["5", "6"]
