"""Answers that are begun by older weights and go on under newer ones: whose tokens they are, and a kill that changes nothing."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.config.params import parse_params
from pipelines.config.yaml_files import read_yaml
from posttrain.algorithms.dapo import DAPO
from posttrain.data.tokens import Tokens
from posttrain.errors import ConfigError
from posttrain.models.inference import token_logprobs
from posttrain.models.policy import Policy
from posttrain.rollouts.ahead import Ahead, Background, continued, unfinished
from posttrain.rollouts.engine import Completion, Request
from posttrain.rollouts.packing import from_bytes, packed, to_bytes, unpacked
from tests.models import small
from tests.rollouts.test_ahead import SPEC, Copies, same, start
from tests.training.runs import STEPS, sampler

CUT, STALENESS, NEW_TOKENS = 2, 3, 6
"""Tokens of a part, steps ahead, and the most tokens of an answer in tests/training/runs.py."""


def interrupted(folder: Path, **options: Any) -> Any:
    return start(folder, STALENESS, interrupt=CUT, **options)


def test_each_step_goes_on_with_its_own_weights(tmp_path: Path) -> None:
    """Step k is begun at step k - 3, goes on once, and gets all that is left at step k - 1."""
    _, engine, watch = interrupted(tmp_path)
    weights = {total: step for step, total in watch.weights.items()}
    found: dict[int, list[int]] = {}
    for position, total in engine.asked:
        versions = found.setdefault(position // 4, [])
        if weights[total] not in versions:
            versions.append(weights[total])
    # step 0 and 1 meet no newer weights; step 2 is begun by the first ones, too
    expected = {0: [0], 1: [0], 2: [0, 1], **{k: [k - 3, k - 2, k - 1] for k in range(3, STEPS)}}
    # an answer that ends early is not asked for again, but not all end
    assert found == expected
    assert [watch.steps[k + 1]["staleness/mean"] for k in range(STEPS)] == [min(k, STALENESS) for k in range(STEPS)]
    ages = [watch.steps[k + 1]["staleness/tokens"] for k in range(STEPS)]
    assert ages[:2] == [0.0, 1.0]
    assert all(1.0 < age < 3.0 for age in ages[3:])


def test_parts_are_joined_by_hand() -> None:
    asked = [Request((5, 6), ((1, 0), (1, 1)))]
    first = [
        [Completion((7, 8), (-0.1, -0.2), False, parts=((3, 2),)), Completion((9,), (-0.3,), True, parts=((3, 1),))]
    ]
    (rest,) = unfinished(asked, first)
    assert (rest.prompt, rest.seeds) == ((5, 6, 7, 8), ((1, 0, 1),))
    (group,) = continued(first, [[Completion((2, 4), (-0.4, -0.5), True)]], 4)
    assert group[0] == Completion((7, 8, 2, 4), (-0.1, -0.2, -0.4, -0.5), True, parts=((3, 2), (4, 2)))
    assert group[1] == first[0][1]
    assert unfinished(asked, [group]) == []
    assert unpacked(from_bytes(to_bytes(packed([group])))) == [group]


def test_the_tokens_are_those_of_their_weights() -> None:
    """With weights that stay the same, the parts' log-probabilities are those of a whole answer."""
    lm = small.language_model()
    drawn = sampler(SPEC, lm, ahead=Ahead(Background(Copies(lm)), STALENESS, 5, CUT))
    for step in range(4):
        answers, _ = drawn.sample()
        for each in answers:
            counts = [tokens for _, tokens in each.completion.parts]
            assert sum(counts) == len(each.completion.tokens) <= NEW_TOKENS
            assert step < 2 or all(count <= CUT for count in counts[:-1])
        assert step < 2 or any(len(each.completion.parts) == min(step, STALENESS) for each in answers)
        forced = token_logprobs(Policy(lm), [Tokens(a.tokens.prompt, a.completion.tokens) for a in answers], 60, 0.9)
        for each, numbers in zip(answers, forced, strict=True):
            assert np.allclose(each.completion.logprobs, numbers.logprobs, atol=1e-5)


def test_no_result_depends_on_who_is_faster(tmp_path: Path) -> None:
    one, _, slow_sampler = interrupted(tmp_path / "one", delays=(0.01, 0.0))
    other, _, slow_trainer = interrupted(tmp_path / "other", delays=(0.0, 0.02))
    assert same(one, other)
    assert slow_sampler.steps == slow_trainer.steps


@pytest.mark.parametrize("kill_at", [3, 4])
def test_a_kill_and_a_resume_change_nothing(kill_at: int, tmp_path: Path) -> None:
    straight, _, expected = interrupted(tmp_path / "straight")
    _, _, killed = interrupted(tmp_path / "killed", kill_at=kill_at)
    resumed, _, recorder = interrupted(tmp_path / "killed", earlier=killed)
    assert same(straight, resumed)
    assert recorder.steps == expected.steps


def test_dynamic_sampling_goes_on_once_a_step(tmp_path: Path) -> None:
    spec = replace(DAPO, anchor="rollout", refill_limit=3, refill_partial=True, overlong_share=0.0)
    _, _, watch = interrupted(tmp_path, spec=spec)
    assert all(watch.steps[k]["staleness/tokens"] <= watch.steps[k]["staleness/max"] for k in range(1, STEPS + 1))


@pytest.mark.parametrize(
    ("staleness", "cut", "message"),
    [
        (1, 8, "interrupt = 8 with staleness = 1 .*no answer would be interrupted"),
        (2, 44, "interrupt = 44 with staleness = 2 and max_new_tokens = 44: no answer"),
        (2, 43, None),
        (2, -1, "interrupt"),
    ],
)
def test_a_cut_without_effect_is_refused(root: Path, staleness: int, cut: int, message: str | None) -> None:
    tree: Any = read_yaml(root / "params.yaml")
    budget = {"rollouts": {"staleness": staleness, "interrupt": cut}}
    tree["algorithms"]["grpo"] |= {"budget": budget, "options": {"anchor": "rollout"}}
    with nullcontext() if message is None else pytest.raises(ConfigError, match=message):
        assert parse_params(tree).budget("grpo").rollouts.interrupt == 43  # type: ignore[union-attr]
