"""The share of malformed answers: those in which the judge finds nothing to compare."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from pipelines.config.schema import RewardFunctionParams
from pipelines.evaluate import answers_not_found
from posttrain.evaluation.answers import EvaluatedAnswer
from posttrain.rollouts.groups import Problem


def answered(texts: Sequence[str]) -> list[EvaluatedAnswer]:
    problem = Problem("2+2=", (1,), {"answer": "4"})
    return [EvaluatedAnswer(0, i, problem, text, 3, False, 0.1, 0.0, {"answer": 0.0}) for i, text in enumerate(texts)]


def test_malformed_answers_are_those_without_an_answer_right_or_wrong() -> None:
    answers = answered(["2+2=4;#4", "it is 5", "no idea", ""])
    # the second is wrong and well formed; two of four hold no number
    found = answers_not_found(answers, RewardFunctionParams(function="answer"))
    assert found == {"answers/not_found": pytest.approx(2 / 4)}
    # a strict reader wants a marker, so that a bare number is malformed as well
    strict = RewardFunctionParams(function="answer", arguments={"extract": "strict"})
    assert answers_not_found(answers, strict) == {"answers/not_found": pytest.approx(3 / 4)}
    # other judges do not say whether they found something
    assert answers_not_found(answers, RewardFunctionParams(function="length")) == {}
