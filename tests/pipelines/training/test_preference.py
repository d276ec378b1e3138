"""From the table of preferences to pairs with gaps and to ranked lists."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pipelines.training.preference import groups, pairs, unpaired
from posttrain.algorithms.dpo import DPO, DPO_SOFT
from posttrain.data.tokens import Tokens
from posttrain.errors import DataError
from posttrain.training.preference import Answer


def answer(prompt: str, text: str, row: int = 0) -> Answer:
    return Answer(Tokens(tuple(prompt.encode()), tuple(text.encode()), str(row)), np.zeros(len(text), dtype=np.float32))


def table(*rows: tuple[str, str, str, float, float]) -> tuple[list[dict[str, Any]], list[tuple[Answer, Answer]]]:
    scored = [{"chosen_score": high, "rejected_score": low} for *_, high, low in rows]
    return scored, [(answer(p, c, i), answer(p, r, i)) for i, (p, c, r, _, _) in enumerate(rows)]


def listed(found: Any) -> list[dict[str, float]]:
    return [
        {bytes(a.tokens.response).decode(): s for a, s in zip(group.answers, group.scores, strict=True)}
        for group in found
    ]


def test_gaps_of_scores_reach_the_pairs_that_ask_for_them() -> None:
    rows, answers = table(("p", "a", "b", 2.0, 0.5))
    assert [pair.score_gap for pair in pairs(rows, answers, DPO_SOFT)] == [1.5]
    assert [pair.score_gap for pair in pairs(rows, answers, DPO)] == [0.0]
    with pytest.raises(DataError, match="'soft' needs the columns chosen_score"):
        pairs([{}], answers, DPO_SOFT)


def test_without_scores_a_pair_is_a_group_of_plus_and_minus_a_half() -> None:
    _, answers = table(("p", "a", "b", 0, 0), ("p", "a", "c", 0, 0))
    assert listed(groups([{}, {}], answers)) == [{"a": 0.5, "b": -0.5}, {"a": 0.5, "c": -0.5}]


def test_the_scored_pairs_of_a_prompt_are_one_ranked_list() -> None:
    rows = (("p", "a", "b", 3.0, 1.0), ("q", "x", "y", 1.0, 0.0), ("p", "a", "c", 2.0, 0.0), ("p", "c", "b", 1.0, 1.0))
    # a was scored 3 and 2, b twice 1, c 0 and 1
    # the means are 4/3 and 1/2, the deviations 7/6, 1/3, 5/6, 1/2, 1/2: 2/3 on average, so all are divided by 4/3
    first, second = listed(groups(*table(*rows)))
    assert first == pytest.approx({"a": 2.5 * 0.75, "b": 0.75, "c": 0.375})
    assert second == pytest.approx({"x": 0.75, "y": 0.0})


def test_grades_of_any_scale_weigh_at_most_as_much_as_pairs_without_grades() -> None:
    small_grades = (("p", "a", "b", 0.9, 0.5), ("q", "x", "y", 0.6, 0.6))
    assert listed(groups(*table(*small_grades))) == [{"a": 0.9, "b": 0.5}, {"x": 0.6, "y": 0.6}]
    # 1 to 10: deviations 4.5, 4.5, 1.5, 1.5, 3 on average; divided by 6 they are 0.75 and 0.25, 1/2 on average
    large = listed(groups(*table(("p", "a", "b", 10.0, 1.0), ("q", "x", "y", 7.0, 4.0))))
    assert large[0] == pytest.approx({"a": 10 / 6, "b": 1 / 6})
    assert large[1] == pytest.approx({"x": 7 / 6, "y": 4 / 6})


def test_a_list_of_one_answer_has_no_baseline() -> None:
    with pytest.raises(DataError, match="preference row 1: all answers to its prompt are the same"):
        groups(*table(("p", "a", "b", 1.0, 0.0), ("q", "a", "a", 1.0, 0.0)))


def test_pairs_become_single_answers_with_a_label_each_once() -> None:
    rows = [
        {"id": 0, "prompt": "p", "chosen": "a", "rejected": "b", "chosen_score": 1.0, "rejected_score": 0.0},
        {"id": 1, "prompt": "p", "chosen": "a", "rejected": "c", "chosen_score": 1.0, "rejected_score": 0.0},
        {"id": 2, "prompt": "q", "chosen": "b", "rejected": "a", "chosen_score": 1.0, "rejected_score": 0.0},
    ]
    assert [(r["prompt"], r["completion"], r["label"], r["id"]) for r in unpaired(rows)] == [
        ("p", "a", True, "0 chosen"),
        ("p", "b", False, "0 rejected"),
        ("p", "c", False, "1 rejected"),
        ("q", "b", True, "2 chosen"),
        ("q", "a", False, "2 rejected"),
    ]
