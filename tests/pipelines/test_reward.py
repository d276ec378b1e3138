"""Pairs of the reward model: cut to the context, graded by scores, counted."""

from __future__ import annotations

import math
from typing import Any

import pytest

from pipelines.reward import heldout_results, reward_pairs
from posttrain.data.tokens import TextEncoder
from posttrain.errors import DataError
from posttrain.models.tiny import byte_tokenizer

ENCODER = TextEncoder(byte_tokenizer(16), 16)
ROW: dict[str, Any] = {"id": 3, "prompt": "abcd", "chosen": "right", "rejected": "no"}
GRADED = ROW | {"chosen_score": 2.0, "rejected_score": 0.5}


def test_an_over_long_pair_loses_the_start_of_its_prompt_and_is_counted() -> None:
    short, long = ROW, ROW | {"prompt": "abcdefghijklmnop"}
    (first, second), cut = reward_pairs(ENCODER, [short, long])
    assert cut == 1
    assert (first.chosen.prompt, first.target, first.margin) == (tuple(ENCODER.prompt("abcd")), 1.0, 0.0)
    # 16 tokens of context less 5 and the end of sequence leave room for 10; both sides read the same prompt
    assert second.chosen.prompt == second.rejected.prompt == tuple(ENCODER.prompt("abcdefghijklmnop")[-10:])
    assert second.chosen.response == tuple(ENCODER.completion("right"))
    assert second.rejected.response == tuple(ENCODER.completion("no"))


def test_scores_count_as_a_margin_or_as_a_soft_target() -> None:
    (by_margin,), _ = reward_pairs(ENCODER, [GRADED], margin_from_scores=True)
    assert (by_margin.margin, by_margin.target) == (1.5, 1.0)
    (soft,), _ = reward_pairs(ENCODER, [GRADED], soft_target_scale=0.4)
    assert soft.margin == 0.0
    assert soft.target == pytest.approx(1 / (1 + math.exp(-0.6)), abs=1e-12)
    (certain,), _ = reward_pairs(ENCODER, [GRADED], soft_target_scale=1e6)
    assert certain.target == 1.0
    (tie,), _ = reward_pairs(ENCODER, [GRADED | {"chosen_score": 0.5}], soft_target_scale=0.4)
    assert tie.target == 0.5


@pytest.mark.parametrize(
    "options", [{"margin_from_scores": True}, {"soft_target_scale": 1.0}], ids=["margin", "soft target"]
)
def test_without_scores_it_says_which_option_needs_them(options: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=rf"reward\.{next(iter(options))} needs the columns chosen_score"):
        reward_pairs(ENCODER, [ROW], **options)


def test_a_response_that_fills_the_context_is_refused_by_row() -> None:
    with pytest.raises(DataError, match="preference row 3: a response of 16 tokens leaves no space"):
        reward_pairs(ENCODER, [ROW | {"rejected": "x" * 15}])


def test_held_out_results_have_calibration_and_the_correlation_with_scores() -> None:
    results = heldout_results([2.0, -1.0, 0.5], [0.9, 0.1, 0.4])
    assert results["heldout/accuracy"] == pytest.approx(2 / 3)
    assert results["heldout/score_correlation"] == pytest.approx(1.0)
    assert 0 < results["heldout/calibration_error"] < 1
    assert "heldout/score_correlation" not in heldout_results([2.0, 1.0], [1.0, 1.0])
    assert "heldout/score_correlation" not in heldout_results([2.0, 1.0], [])
