"""The evaluation has grown: the gain on the champion's own prompts and on fresh ones, by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pipelines.promotion.decision import SampledAnswers
from pipelines.promotion.growth import by_age, mark
from posttrain.evaluation.statistics import Resampling

RESAMPLING = Resampling(200, 0.95, 0)


def answers(name: str, rewards: list[float], texts: str = "abcdef") -> SampledAnswers:
    values = np.array(rewards)[:, None]
    prompts = tuple((i, text, "1") for i, text in enumerate(texts[: len(rewards)]))
    return SampledAnswers(name, prompts, values, {}, values * 0, values * 0 + 5, values * 0)


def test_old_and_fresh_prompts_have_their_own_gain() -> None:
    before = mark(answers("champion", [1, 1, 0, 0]).prompts)
    assert before.startswith("4:")
    new, old = answers("grpo-0", [1, 1, 1, 1, 0, 0]), answers("champion", [1, 1, 0, 0, 1, 1])
    first, since = by_age(new, old, before, RESAMPLING)
    # two of four gained; both fresh ones lost
    assert first.startswith("On the 4 prompts by which the champion was judged: true reward +0.5 (95 % interval")
    assert (
        since == "On the 2 prompts that joined the evaluation since: true reward -1 (no interval from 2 equal values)."
    )
    one = by_age(answers("grpo-0", [1, 1, 1, 1, 0]), answers("champion", [1, 1, 0, 0, 1]), before, RESAMPLING)
    assert one[1] == "On the 1 prompts that joined the evaluation since: true reward -1."


def test_nothing_is_said_about_an_evaluation_that_did_not_grow_or_is_another_one() -> None:
    old = answers("champion", [1, 1, 0, 0])
    assert by_age(answers("grpo-0", [1, 1, 1, 1]), old, mark(old.prompts), RESAMPLING) == ()
    other = answers("champion", [1, 1, 0, 0, 0], "xbcde")
    assert by_age(answers("grpo-0", [1, 1, 1, 1, 1], "xbcde"), other, mark(old.prompts), RESAMPLING) == ()


def test_an_interval_over_one_group_does_not_exist() -> None:
    old, new = answers("champion", [1, 1, 0, 0, 1, 1]), answers("grpo-0", [1, 1, 1, 1, 0, 0])
    grouped = replace(new, groups=("a", "a", "b", "b", "c", "c"))
    first, since = by_age(grouped, old, mark(old.prompts[:4]), RESAMPLING)
    # the groups' sums of deviations are -1 and 1: error sqrt(2 / 16 x 2) = .5, 1 degree of freedom
    assert first == (
        "On the 4 prompts by which the champion was judged: true reward +0.5 (95 % interval -5.853 to +6.853)."
    )
    assert since == "On the 2 prompts that joined the evaluation since: true reward -1."
