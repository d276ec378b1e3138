"""KTO's batches: partners of different prompts, and one KL for a whole batch."""

from __future__ import annotations

import numpy as np
import pytest
from accelerate import Accelerator

from posttrain.algorithms.kto import KTO
from posttrain.data.batches import EpochOrder
from posttrain.data.tokens import Tokens
from posttrain.errors import DataError
from posttrain.training.preference import Answer
from posttrain.training.unpaired import LabelledAnswer, UnpairedSource, mismatched
from tests.models import small
from tests.training.cases import near
from tests.training.test_by_hand import token_logprobs


def test_partners_answer_a_different_prompt_and_keep_their_own_weights() -> None:
    rows = [
        Tokens((1,), (10,), "0"),
        Tokens((1,), (11,), "1"),
        Tokens((2,), (12, 13), "2", (1.0, 0.0)),
        Tokens((1,), (14,), "3"),
        Tokens((1,), (15,), "4"),
    ]
    partners = mismatched(rows, max_length=4)
    assert [(p.prompt, p.response) for p in partners] == [
        ((1,), (12, 13)),
        ((1,), (12, 13)),
        ((2,), (14,)),
        ((1,), (12, 13)),
        ((1,), (12, 13)),
    ]
    assert partners[0].weights == (1.0, 0.0)
    assert [p.id for p in partners] == ["0", "1", "2", "3", "4"]


def test_a_partner_ends_at_the_context_of_the_model() -> None:
    long_prompt, long_answer = Tokens((1, 2, 3, 4), (10,)), Tokens((5,), (11, 12, 13, 14), weights=(1.0, 0.0, 1.0, 1.0))
    first, second = mismatched([long_prompt, long_answer], max_length=6)
    assert (first.response, first.weights, second.response) == ((11, 12), (1.0, 0.0), (10,))


def test_one_prompt_has_no_partner() -> None:
    with pytest.raises(DataError, match="all 2 labelled answers have the same prompt"):
        mismatched([Tokens((1,), (2,)), Tokens((1,), (3,))], max_length=4)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_baseline_is_the_mean_log_ratio_of_the_partners_of_the_batch_and_never_negative(sign: int) -> None:
    policy = small.policy(double=True)
    tokens = small.rows(6, seed=2)
    partners = mismatched(tokens, max_length=99)
    references = [r.astype(np.float64) - sign * 0.3 for r in near(small.policy(), partners, 4, 0.2)]
    rows = [
        LabelledAnswer(Answer(t, np.zeros(len(t.response))), True, Answer(p, r))
        for t, p, r in zip(tokens, partners, references, strict=True)
    ]
    order = EpochOrder(len(rows), 4, 1, seed=0)
    for budget in (1, 1000):
        data = UnpairedSource(rows, order, policy, Accelerator(), budget).next(0)
        chosen = order.indices(0)
        sums = [sum(token_logprobs(policy, partners[i])) - references[i].sum() for i in chosen]
        assert sum(sums) * sign > 0
        expected = max(0.0, sum(sums) / 4)
        assert data.metrics["unpaired/baseline"] == pytest.approx(expected, abs=1e-5)
        assert [row.baseline for row in data.batches[0]] == pytest.approx([expected] * 4, abs=1e-5)
        assert [row.answer.tokens for row in data.batches[0]] == [tokens[i] for i in chosen]


def test_the_preset() -> None:
    assert (KTO.beta, KTO.desirable_weight, KTO.undesirable_weight, KTO.epochs) == (0.1, 1.0, 1.0, 1)
