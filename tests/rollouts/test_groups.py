"""Groups of answers: order, judging, shaping, and refilling until enough of them carry a signal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from posttrain.algorithms.dapo import DAPO
from posttrain.algorithms.grpo import GRPO
from posttrain.data.tokens import TextEncoder
from posttrain.errors import RewardError, RolloutError
from posttrain.models.tiny import byte_tokenizer
from posttrain.rewards.sources import FunctionReward
from posttrain.rollouts.engine import Completion, Request, SamplingSettings
from posttrain.rollouts.groups import GroupSampler, GroupSettings, Problem

ENCODER = TextEncoder(byte_tokenizer(64), 64)


@dataclass
class Scripted:
    """An engine that answers prompt "easy" always right, "hard" never, and "mixed" by the seed's last number."""

    asked: list[Request] = field(default_factory=list)
    finished: bool = True
    length: int = 3

    def sample(self, requests: Sequence[Request], settings: SamplingSettings) -> list[list[Completion]]:
        self.asked += requests
        return [[self._answer(ENCODER.text(r.prompt), seed) for seed in r.seeds] for r in requests]

    def _answer(self, prompt: str, seed: tuple[int, ...]) -> Completion:
        right = prompt == "easy" or (prompt == "mixed" and seed[-1] % 2 == 0)
        ids = [*ENCODER.completion("+" if right else "-")[:-1]] * self.length
        return Completion(tuple(ids), (-1.0,) * self.length, self.finished)


def right(prompts: Sequence[Any], completions: Sequence[str], **_: Any) -> list[float | None]:
    return [float("+" in c) for c in completions]


def make(
    prompts: Sequence[str], spec: Any = GRPO, wanted: int = 2, engine: Scripted | None = None, reward: Any = right
) -> GroupSampler:
    from accelerate import Accelerator

    problems = [Problem(p, tuple(ENCODER.prompt(p)), {"answer": p.upper()}, row) for row, p in enumerate(prompts)]
    settings = GroupSettings(wanted, 4, SamplingSettings(10, 1.0))
    rewards = [FunctionReward("right", reward)]
    return GroupSampler(
        problems, engine or Scripted(), ENCODER, rewards, {"right": 2.0}, spec, settings, 0, Accelerator()
    )


def test_equal_prompts_in_a_batch_stay_two_groups_with_their_own_seeds() -> None:
    engine = Scripted()
    answers, _ = make(["mixed", "mixed"], engine=engine).sample()
    assert [a.group for a in answers] == [0] * 4 + [1] * 4
    seeds = [seed for request in engine.asked for seed in request.seeds]
    assert len(set(seeds)) == 8


def test_every_problem_once_an_epoch_in_an_order_that_the_seed_gives() -> None:
    sampler = make(["a", "b", "c", "d", "e", "f"], wanted=3)
    drawn = [a.problem.prompt for _ in range(4) for a in sampler.sample()[0]][::4]
    assert sorted(drawn[:6]) == sorted(drawn[6:]) == ["a", "b", "c", "d", "e", "f"]
    assert drawn[:6] != drawn[6:]


def test_judging_weights_rewards_and_counts_tokens() -> None:
    sampler = make(["mixed", "easy"])
    answers, metrics = sampler.sample()
    by_prompt = {p: [a.reward for a in answers if a.problem.prompt == p] for p in ("mixed", "easy")}
    assert by_prompt == {"mixed": [2.0, 0.0, 2.0, 0.0], "easy": [2.0] * 4}
    assert {a.sources["right"] for a in answers} == {0.0, 1.0}
    assert metrics["groups/zero_variance"] == 0.5
    assert metrics["sampling/acceptance"] == 0.5
    assert metrics["tokens/sampled"] == 2 * 4 * 3
    assert sampler.sample()[1]["tokens/sampled"] == 2 * 2 * 4 * 3


def test_the_state_is_the_position() -> None:
    one = make(["a", "b", "c", "d", "e"])
    one.sample()
    other = make(["a", "b", "c", "d", "e"])
    other.load_state_dict(one.state_dict())
    assert [a.problem.prompt for a in other.sample()[0]] == [a.problem.prompt for a in one.sample()[0]]
    assert other.state_dict() == one.state_dict()


def test_refill_gives_exactly_the_groups_asked_for_and_says_what_it_cost() -> None:
    sampler = make(["easy", "mixed", "hard", "easy", "mixed", "hard"], replace(DAPO, overlong_share=0.0), wanted=2)
    for _ in range(5):
        answers, metrics = sampler.sample()
        assert len(answers) == 2 * 4
        assert {a.problem.prompt for a in answers} == {"mixed"}
        assert len({a.group for a in answers}) == 2
        assert metrics["groups/trained"] == 2
        assert 0 < metrics["sampling/acceptance"] <= 1
        assert metrics["sampling/acceptance"] + metrics["groups/zero_variance"] == pytest.approx(1)
    # the extra generation is in the books: three times as many were drawn as were kept, about
    assert sampler.tokens_sampled == sampler.position * 4 * 3
    assert sampler.position > 10


def test_refill_fails_loudly_and_bounded() -> None:
    engine = Scripted()
    sampler = make(["easy", "hard"], replace(DAPO, refill_limit=3), engine=engine)
    with pytest.raises(RolloutError, match=r"found 0 of 2 groups with unequal rewards in 3 rounds.*refill_limit"):
        sampler.sample()
    assert len(engine.asked) == 3 * 2


def test_refill_goes_on_with_what_it_has_only_if_asked_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    spec = replace(DAPO, refill_limit=1, refill_partial=True)
    sampler = make(["easy", "mixed"], spec, wanted=2)
    answers, metrics = sampler.sample()
    assert {a.problem.prompt for a in answers} == {"mixed"}
    assert metrics["groups/trained"] == 1
    assert "continuing with 1 of 2 groups" in capsys.readouterr().err
    with pytest.raises(RolloutError, match="found 0 of 2"):
        make(["easy", "hard"], spec).sample()


def test_drop_keeps_what_carries_a_signal_in_one_round() -> None:
    sampler = make(["easy", "mixed"], replace(GRPO, filter="drop"))
    answers, metrics = sampler.sample()
    assert {a.problem.prompt for a in answers} == {"mixed"}
    assert metrics["sampling/rounds"] == 1
    with pytest.raises(RolloutError, match="no group of this step carries a signal"):
        make(["easy", "hard"], replace(GRPO, filter="drop")).sample()


def test_a_missing_reward_is_missing_and_never_zero() -> None:
    def gaps(prompts: Sequence[Any], completions: Sequence[str], **_: Any) -> list[float | None]:
        return [None if "-" in c else 1.0 for c in completions]

    answers, metrics = make(["mixed", "hard"], reward=gaps).sample()
    known = {p: [a.reward for a in answers if a.problem.prompt == p] for p in ("mixed", "hard")}
    assert known["mixed"][0] == known["mixed"][2] == 2.0
    assert all(math.isnan(r) for r in [known["mixed"][1], known["mixed"][3], *known["hard"]])
    assert metrics["groups/zero_variance"] == 1.0


def test_failures_of_a_source_are_counted_each_step_over_all_that_was_sampled() -> None:
    def failing(prompts: Sequence[Any], completions: Sequence[str], **_: Any) -> list[float | None]:
        if "hard" in prompts:
            raise ValueError("too hard")
        return [float("+" in c) for c in completions]

    sampler = make(["mixed", "hard"])
    sampler.rewards = [FunctionReward("right", failing, on_failure="skip")]
    for _ in range(2):
        answers, metrics = sampler.sample()
        assert metrics["reward/right/failed"] == 0.5
        assert metrics["reward/right/timed_out"] == 0.0
        assert all(math.isnan(a.reward) == (a.problem.prompt == "hard") for a in answers)
    sampler.rewards = [FunctionReward("right", failing)]
    with pytest.raises(
        RewardError, match=r"failed on 4 of 8 answers \(rows 1; the first to prompt 'hard': '---'\): ValueError"
    ):
        sampler.sample()


def test_rewards_normalised_within_the_group_are_what_is_trained_on() -> None:
    def long(prompts: Sequence[Any], completions: Sequence[str], **_: Any) -> list[float | None]:
        return [100.0 * i for i in range(len(completions))]

    sampler = make(["mixed", "easy"], replace(GRPO, reward_combination="group_normalised"))
    sampler.rewards = [FunctionReward("right", right), FunctionReward("long", long)]
    sampler.weights = {"right": 2.0, "long": 1.0}
    answers, _ = sampler.sample()
    # within a group the positions are 0..3 up to a shift: mean 1.5, population std sqrt(1.25)
    standing = [(i - 1.5) / math.sqrt(1.25) for i in range(4)]
    by_prompt = {p: [a.reward for a in answers if a.problem.prompt == p] for p in ("mixed", "easy")}
    assert by_prompt["easy"] == pytest.approx(standing, abs=1e-4)
    assert by_prompt["mixed"] == pytest.approx([s + r for s, r in zip(standing, [2, -2, 2, -2], strict=True)], abs=1e-4)


def test_shaping_by_a_missing_end_and_by_length() -> None:
    spec = replace(GRPO, missing_eos_penalty=1.5, overlong_share=0.4)
    # limit 10, cache 40 % of it: length 8 costs 1/2, length 10 costs 1
    for finished, length, expected in [(True, 6, 0.0), (True, 8, -0.5), (False, 10, -2.5), (False, 8, -2.0)]:
        answers, _ = make(["hard", "hard"], spec, engine=Scripted(finished=finished, length=length)).sample()
        assert {a.reward for a in answers} == {expected}


class OneCutOff(Scripted):
    """Of the answers to each prompt, one is cut off."""

    def _answer(self, prompt: str, seed: tuple[int, ...]) -> Completion:
        return replace(super()._answer(prompt, seed), finished=seed[-1] != 1)


def test_groups_are_filtered_by_the_reward_of_the_task_before_shaping() -> None:
    """Four wrong answers of which one is cut off have shaped rewards 0 and -1.5, and teach nothing about the task."""
    spec = replace(GRPO, filter="drop", missing_eos_penalty=1.5)
    answers, _ = make(["hard", "mixed"], spec, engine=OneCutOff()).sample()
    assert {answer.problem.prompt for answer in answers} == {"mixed"}
    assert sorted(answer.reward for answer in answers) == [-1.5, 0.0, 2.0, 2.0]
    assert sorted(answer.task for answer in answers) == [0.0, 0.0, 2.0, 2.0]
    with pytest.raises(RolloutError, match="no group of this step carries a signal"):
        make(["hard", "easy"], spec, engine=OneCutOff()).sample()


def test_columns_of_the_problem_reach_the_reward() -> None:
    seen: list[Any] = []

    def reward(
        prompts: Sequence[Any], completions: Sequence[str], answer: Sequence[str], **_: Any
    ) -> list[float | None]:
        seen.extend(zip(prompts, answer, strict=True))
        return [0.0] * len(completions)

    make(["easy", "hard"], reward=reward).sample()
    assert set(seen) == {("easy", "EASY"), ("hard", "HARD")}
    assert len(seen) == 8
