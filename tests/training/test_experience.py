"""From judged answers to rows: old and reference log-probabilities, KL in the reward, advantages, minibatches, experts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from posttrain.algorithms import PRESETS
from posttrain.algorithms.chord import scheduled
from posttrain.algorithms.specs import OnPolicy
from posttrain.data.tokens import Tokens
from posttrain.errors import NotFiniteError, NumericalError
from posttrain.models.inference import token_logprobs
from posttrain.objectives.kl import adapted_coefficient
from posttrain.objectives.shaping import expert_weight
from posttrain.rewards.sources import FunctionReward
from posttrain.rollouts.engine import Completion
from posttrain.rollouts.groups import Problem, ScoredAnswer, _carries_signal
from posttrain.rollouts.native import NativeEngine
from posttrain.settings import OptimizerSettings
from posttrain.training.experience import Demonstrations, _informative_members, minibatches
from posttrain.training.onpolicy import Demonstration, Experience
from posttrain.training.trainer import Trainer
from tests.models import small
from tests.training.runs import source_of


def spec(name: str, **options: Any) -> OnPolicy:
    found = PRESETS[name]
    assert isinstance(found, OnPolicy)
    return replace(found, **options)


def step(made: OnPolicy, **options: Any) -> tuple[Any, Any, Any]:
    policy = small.policy(critic=made.has_critic)
    source, _ = source_of(made, policy, **options)
    return source, source.next(0), policy


def test_old_and_reference_are_those_of_the_two_models() -> None:
    source, data, policy = step(spec("gspo"))
    rows = [row for batch in data.batches for row in batch]
    own = token_logprobs(policy, [r.tokens for r in rows], 50, 0.9)
    reference = token_logprobs(small.policy(seed=1), [r.tokens for r in rows], 50, 0.9)
    for row, mine, other, answer in zip(rows, own, reference, source.last_answers, strict=True):
        assert row.tokens == answer.tokens
        assert row.old_logprobs == pytest.approx(mine.logprobs, abs=1e-5)
        assert row.rollout_logprobs == pytest.approx(mine.logprobs, abs=1e-5)
        assert row.ref_logprobs == pytest.approx(other.logprobs, abs=1e-5)


@pytest.mark.parametrize(("name", "measured"), [("gspo", [True, False, True, False]), ("grpo", [True] * 4)])
def test_the_kl_is_measured_every_second_step_and_always_where_the_loss_needs_it(
    name: str, measured: list[bool]
) -> None:
    policy = small.policy()
    source, objective = source_of(spec(name, minibatches=1), policy)
    source.measure_kl_every = 2
    trainer: Trainer[Any] = Trainer(policy, OptimizerSettings(1e-2), total_steps=4, micro_batch_tokens=40)
    every, _ = source_of(spec(name, minibatches=1), policy)
    updates = []
    for number in range(4):
        (batch,), (whole,) = source.next(number).batches, every.next(number).batches
        assert [row.advantages.tolist() for row in batch] == [row.advantages.tolist() for row in whole]
        updates.append(trainer.update(batch, objective))
    assert ["kl/ref_k1" in metrics for metrics in updates] == measured
    assert all("kl/approx" in metrics for metrics in updates)


def test_advantages_are_those_of_the_group_for_every_token() -> None:
    source, data, _ = step(spec("grpo"))
    rows = data.batches[0]
    groups: dict[int, list[float]] = {}
    for answer in source.last_answers:
        groups.setdefault(answer.group, []).append(answer.reward)
    assert len(groups) == 4
    for row, answer in zip(rows, source.last_answers, strict=True):
        known = [r for r in groups[answer.group] if not math.isnan(r)]
        expected = 0.0 if math.isnan(answer.reward) else answer.reward - sum(known) / len(known)
        assert row.advantages.tolist() == pytest.approx([expected] * len(row.tokens.response), abs=1e-6)
    total = [a.reward for a in source.last_answers if not math.isnan(a.reward)]
    assert data.metrics["reward/total/mean"] == pytest.approx(np.mean(total))
    assert data.metrics["reward/varied/missing"] == pytest.approx(1 - len(total) / 12)


@pytest.mark.parametrize("name", ["grpo", "rloo", "reinforce_pp"])
def test_large_rewards_have_the_advantages_of_their_differences(name: str) -> None:
    source, _, _ = step(spec(name))

    def advantages(shift: float) -> list[list[float]]:
        answers = [replace(a, reward=shift + i % 3) for i, a in enumerate(source.last_answers)]
        return [row.tolist() for row in source._advantages(answers, None, None)[0]]

    for large, small_ones in zip(advantages(2.0**24), advantages(0.0), strict=True):  # in float32, 2^24 + 1 is 2^24
        assert large == pytest.approx(small_ones, abs=1e-6)


def test_gdpo_normalises_over_answers_and_not_over_their_tokens() -> None:
    """2601.05242: mean and deviation over the answers of the batch, so that a group without a signal has no advantage."""
    source, _, _ = step(spec("reinforce_pp", reward_combination="group_normalised", kl="none", kl_coefficient=0.0))
    totals = [
        2.0,
        -1.0,
        -1.0,
        0.0,
        0.0,
        0.0,
        0.5,
        -1.0,
        0.5,
        0.0,
        0.0,
        0.0,
    ]  # the sums of z-scores in four groups of three
    answers = [
        replace(a, reward=total, tokens=Tokens(a.tokens.prompt, a.tokens.response[: 1 + i % 5]))
        for i, (a, total) in enumerate(zip(source.last_answers, totals, strict=True))
    ]
    rows = source._advantages(answers, None, None)[0]
    deviation = math.sqrt(sum(total**2 for total in totals) / 12)  # sqrt(7.5 / 12); their mean is 0
    for row, total in zip(rows, totals, strict=True):
        assert row.tolist() == pytest.approx([total / deviation] * len(row), abs=1e-6)


def test_kl_in_the_reward_is_paid_before_the_baseline() -> None:
    source, data, _policy = step(spec("rloo", kl_coefficient=0.3))
    rows = data.batches[0]
    paid = [
        a.reward - 0.3 * float((r.old_logprobs.astype(float) - r.ref_logprobs).sum())
        for a, r in zip(source.last_answers, rows, strict=True)
    ]
    for i, (row, answer) in enumerate(zip(rows, source.last_answers, strict=True)):
        others = [
            paid[j]
            for j, other in enumerate(source.last_answers)
            if other.group == answer.group and j != i and not math.isnan(paid[j])
        ]
        expected = 0.0 if math.isnan(paid[i]) or not others else paid[i] - sum(others) / len(others)
        assert row.advantages[0] == pytest.approx(expected, abs=1e-4)


def test_gae_puts_the_score_on_the_last_response_token() -> None:
    source, data, _policy = step(spec("ppo", whiten=False, missing_eos_penalty=0.0))
    assert len(data.batches) == 4
    for row, answer in zip(data.batches[0], source.last_answers, strict=True):
        if math.isnan(answer.reward):
            assert not row.trained
            assert not row.advantages.any()
            continue
        rewards = -0.05 * (row.old_logprobs.astype(float) - row.ref_logprobs)
        rewards[-1] += answer.reward
        values, running, expected = [*row.old_values.astype(float), 0.0], 0.0, []
        for t in reversed(range(len(rewards))):
            running = rewards[t] + values[t + 1] - values[t] + 0.95 * running
            expected.insert(0, running)
        assert row.advantages.tolist() == pytest.approx(expected, abs=1e-4)
        assert row.returns.tolist() == pytest.approx([e + v for e, v in zip(expected, values, strict=False)], abs=1e-4)


def test_explained_variance_is_what_the_critic_knew_of_the_returns() -> None:
    _, data, _ = step(spec("ppo"))
    scored = [r for r in data.batches[0] if r.trained]
    returns = np.concatenate([r.returns for r in scored]).astype(float)
    values = np.concatenate([r.old_values for r in scored]).astype(float)
    expected = 1 - np.var(returns - values) / np.var(returns)
    assert data.metrics["value/explained_variance"] == pytest.approx(expected, rel=1e-4)


def test_whitened_advantages_have_mean_0_and_std_1_over_the_batch() -> None:
    _, data, _ = step(spec("ppo"))
    every = np.concatenate([r.advantages for r in data.batches[0] if r.trained])
    assert every.mean() == pytest.approx(0, abs=1e-5)
    assert every.std() == pytest.approx(1, abs=1e-3)


def test_reinforce_plus_plus_normalises_the_reward_to_go_over_the_batch() -> None:
    source, data, _ = step(spec("reinforce_pp", kl_coefficient=0.0))
    known = [(a.reward, len(a.completion.tokens)) for a in source.last_answers if not math.isnan(a.reward)]
    tokens = np.repeat([r for r, _ in known], [n for _, n in known])
    for row, answer in zip(data.batches[0], source.last_answers, strict=True):
        expected = 0.0 if math.isnan(answer.reward) else (answer.reward - tokens.mean()) / tokens.std()
        assert row.advantages.tolist() == pytest.approx([expected] * len(row.advantages), abs=1e-4)


@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_the_adaptive_coefficient_moves_wherever_the_kl_is(name: str) -> None:
    made = spec(name, kl_target=0.5, kl_horizon=100)
    source, data, _ = step(made)
    kl = [float((r.old_logprobs.astype(float) - r.ref_logprobs).sum()) for r in data.batches[0]]
    expected = adapted_coefficient(made.kl_coefficient, float(np.mean(kl)), 0.5, 12, 100)
    assert expected != made.kl_coefficient
    # the reward was paid with the coefficient from before, the loss will be with the one after
    in_force = made.kl_coefficient if name == "ppo" else expected
    assert data.metrics["kl/coefficient"] == pytest.approx(in_force, rel=1e-5)
    assert source.state_dict()["kl_coefficient"] == pytest.approx(expected, rel=1e-5)


def test_minibatches_hold_whole_groups_and_every_row_once_an_epoch() -> None:
    source, data, _ = step(spec("grpo", minibatches=2, epochs=2))
    assert [len(batch) for batch in data.batches] == [6, 6, 6, 6]
    answers = [a.tokens for a in source.last_answers]
    assert [r.tokens for r in data.batches[0]] + [r.tokens for r in data.batches[1]] == answers
    assert [r.tokens for b in data.batches[2:] for r in b] == answers
    assert source.updates == 4


@pytest.mark.parametrize(
    ("groups", "count", "expected"),
    [
        (6, 3, [[0, 1], [2, 3], [4, 5]]),
        (5, 4, [[0], [1], [2], [3, 4]]),
        (5, 2, [[0, 1], [2, 3, 4]]),
        (2, 4, [[0], [1], [0], [1]]),
    ],
)
def test_minibatches_are_as_many_as_announced_however_many_groups_a_filter_left(
    groups: int, count: int, expected: list[list[int]]
) -> None:
    rows: list[Any] = [(group, answer) for group in range(groups) for answer in range(2)]
    parts = minibatches(rows, 2, count)
    assert parts == [[(g, a) for g in part for a in range(2)] for part in expected]


def test_a_filter_changes_the_groups_and_not_the_number_of_updates() -> None:
    def by_prompt(prompts: Sequence[Any], completions: Sequence[str], **_: Any) -> list[float | None]:
        return [float(i % 2) if prompt == "bc" else 1.0 for i, prompt in enumerate(prompts)]

    made = spec("grpo", filter="drop", minibatches=4, epochs=2)
    policy = small.policy()
    # all six problems a step, one of which tells its answers apart
    source, objective = source_of(made, policy, rewards=[FunctionReward("varied", by_prompt)], prompts=6)
    trainer: Trainer[Any] = Trainer(policy, OptimizerSettings(1e-3), total_steps=16, micro_batch_tokens=60)
    for number in range(2):
        data = source.next(number)
        assert data.metrics["groups/trained"] == 1
        for batch in data.batches:
            assert [row.tokens for row in batch] == [a.tokens for a in source.last_answers]
            trainer.update(batch, objective)
    assert trainer.updates == source.updates == 16


def test_truncated_answers_stay_out_where_the_algorithm_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    source, data, _ = step(spec("dapo", filter="none", overlong_share=0.0, minibatches=1))
    finished = [a.completion.finished for a in source.last_answers]
    assert [r.trained for r in data.batches[0]] == finished
    assert not all(finished)
    assert data.metrics["length/truncated"] == pytest.approx(1 - np.mean(finished))
    assert "trains nothing" not in capsys.readouterr().err
    rows = [replace(row, trained=False) for row in data.batches[0]]
    for number in (0, 1):  # said once
        source._report_untrained(rows, number)
    said = capsys.readouterr().err
    assert said.count("trains nothing") == 1
    assert (
        f"step 1 trains nothing: all its {len(rows)} answers were cut off, and mask_truncated leaves such answers out"
        in said
    )
    assert "raise max_new_tokens = 6" in said


def test_a_truncated_answer_is_left_out_of_the_loss_and_stays_in_the_baseline_of_its_group() -> None:
    made = spec("dapo", filter="none", overlong_share=0.5, minibatches=1)
    source, data, _ = step(made)
    groups: dict[int, list[float]] = {}
    for answer in source.last_answers:
        groups.setdefault(answer.group, []).append(answer.reward)
    cut = 0
    for row, answer in zip(data.batches[0], source.last_answers, strict=True):
        # the limit is 6 and the cache half of it: 4 tokens cost 1/3, 5 cost 2/3, 6 cost 1
        bare = answer.sources["varied"]
        shaped = math.nan if bare is None else bare - max(0, len(answer.completion.tokens) - 3) / 3
        assert answer.reward == pytest.approx(shaped, abs=1e-6, nan_ok=True)
        known = np.array([r for r in groups[answer.group] if not math.isnan(r)])
        cut += not row.trained and len(known) > 1
        if not math.isnan(answer.reward) and np.ptp(known) > 0:
            kept = {
                a.sources["varied"] for a in source.last_answers if a.group == answer.group and a.completion.finished
            }
            equal = len(kept - {None}) < 2  # members that stay in the loss and are all as good carry no signal
            expected = 0.0 if equal else (answer.reward - known.mean()) / (known.std() + 1e-6)
            assert row.advantages.tolist() == pytest.approx([expected] * len(row.advantages), abs=1e-4)
    assert cut > 0
    counts = source.objective.counts(data.batches[0])
    assert counts["sequences"] == sum(a.completion.finished for a in source.last_answers)


def test_experts_join_every_update_with_mu_and_their_cursor_is_the_update() -> None:
    made = spec("chord", mu_warmup_steps=2, mu_decay_steps=4, minibatches=2)
    source, data, _ = step(made)
    drawn: list[Any] = []
    for update, batch in enumerate(data.batches):
        mu = expert_weight(update, made)
        experts = [r for r in batch if isinstance(r, Demonstration)]
        assert [e.weight for e in experts] == [mu, mu]
        assert {r.weight for r in batch if isinstance(r, Experience)} == {1 - mu}
        drawn += [e.tokens for e in experts]
    later = source_of(made, small.policy())[0]
    later.load_state_dict(source.state_dict())
    drawn += [e.tokens for batch in later.next(1).batches for e in batch if isinstance(e, Demonstration)]
    stream = Demonstrations(small.rows(5, seed=20), 2, 3)
    assert drawn == [t for update in range(4) for t in stream.draw(update)]
    assert len({t.response for t in drawn[:5]}) == 5
    assert sorted(t.response for t in drawn[:5]) == sorted(t.response for t in small.rows(5, seed=20))


@pytest.mark.parametrize("name", ["grpo", "ppo", "gspo", "chord"])
def test_the_first_update_of_a_step_is_exactly_on_policy(name: str) -> None:
    made = scheduled(spec(name), updates=8)
    policy = small.policy(critic=made.has_critic)
    source, objective = source_of(made, policy)
    trainer: Trainer[Any] = Trainer(policy, OptimizerSettings(1e-2), total_steps=9, micro_batch_tokens=40)
    for number in range(2):
        data = source.next(number)
        metrics = [trainer.update(batch, objective) for batch in data.batches]
        assert metrics[0]["ratio/mean"] == pytest.approx(1.0, abs=1e-5)
        assert metrics[0]["clip/low"] == metrics[0]["clip/high"] == 0.0
        assert metrics[0]["kl/approx"] == pytest.approx(0.0, abs=1e-8)
        assert metrics[0]["mismatch/max"] < 1e-4
    if len(metrics) > 1:
        assert metrics[-1]["kl/approx"] > 1e-6


def test_a_sampler_that_serves_other_weights_stops_the_run() -> None:
    policy = small.policy()
    source, objective = source_of(spec("grpo"), policy)
    source.sampler.engine = NativeEngine(small.language_model(seed=9), small.EOS)
    trainer: Trainer[Any] = Trainer(policy, OptimizerSettings(1e-2), total_steps=1, micro_batch_tokens=40)
    before = policy.lm.lm_head.weight.clone()
    with pytest.raises(NumericalError, match=r"mismatch/mean of update 1 .*the sampler uses other weights"):
        trainer.update(source.next(0).batches[0], objective)
    assert torch.equal(before, policy.lm.lm_head.weight)


@pytest.mark.parametrize("mismatch", ["none", "mask"])
def test_a_log_probability_that_the_sampler_does_not_know_is_a_fault(mismatch: str) -> None:
    policy = small.policy()
    source, objective = source_of(spec("dr_grpo", mismatch=mismatch), policy)
    trainer: Trainer[Any] = Trainer(policy, OptimizerSettings(1e-2), total_steps=1, micro_batch_tokens=40)
    first, *others = source.next(0).batches[0]
    sampled = first.rollout_logprobs.copy()
    sampled[0] = math.nan
    with pytest.raises(NotFiniteError, match="mismatch/mean of update 1 is nan"):
        trainer.update([replace(first, rollout_logprobs=sampled), *others], objective)
    assert trainer.updates == 0


def test_a_step_without_any_known_reward_trains_nothing_and_stays_finite() -> None:
    def silent(prompts: Sequence[Any], completions: Sequence[str], **_: Any) -> list[float | None]:
        return [None] * len(completions)

    for name in ("grpo", "rloo", "gspo"):
        source, data, policy = step(spec(name, kl="none", minibatches=1), rewards=[FunctionReward("varied", silent)])
        assert all(not r.advantages.any() for r in data.batches[0])
        trainer: Trainer[Any] = Trainer(policy, OptimizerSettings(1e-2), total_steps=1, micro_batch_tokens=40)
        before = policy.lm.lm_head.weight.clone()
        assert trainer.update(data.batches[0], source.objective)["loss"] == 0.0
        assert torch.equal(before, policy.lm.lm_head.weight)
        assert math.isnan(data.metrics["reward/total/mean"])


def test_the_reward_goes_up() -> None:
    def short(prompts: Sequence[Any], completions: Sequence[str], **_: Any) -> list[float | None]:
        return [-float(len(c)) for c in completions]

    made = spec("grpo", kl="none", advantage="group_z")
    policy = small.policy()
    source, objective = source_of(made, policy, rewards=[FunctionReward("varied", short)], samples=8)
    trainer: Trainer[Any] = Trainer(policy, OptimizerSettings(2e-2), total_steps=25, micro_batch_tokens=400)
    means = []
    for number in range(25):
        data = source.next(number)
        means.append(data.metrics["reward/total/mean"])
        for batch in data.batches:
            trainer.update(batch, objective)
    assert np.mean(means[-5:]) > np.mean(means[:5]) + 1.0


def scored(group: int, task: float, shaped: float, finished: bool) -> ScoredAnswer:
    completion = Completion((5, 2), (0.0, 0.0), finished)
    problem = Problem("", (3,), {})
    return ScoredAnswer(Tokens((3,), (5, 2)), completion, "", group, problem, task + shaped, {}, task)


def test_length_shaping_makes_no_group_informative_and_raises_no_equal_answers() -> None:
    """Four wrong answers of which one is truncated, and punished for its length: nothing is to be learnt from them (2503.14476)."""
    wrong = [scored(0, 0.0, 0.0, True) for _ in range(3)] + [scored(0, 0.0, -1.0, False)]
    mixed = [scored(1, 1.0, 0.0, True), scored(1, 0.0, -0.5, True)]
    right_but_cut = [scored(2, 0.0, 0.0, True), scored(2, 1.0, -1.0, False)]
    assert [_carries_signal(group) for group in (wrong, mixed, right_but_cut)] == [False, True, True]
    # of the third group only one answer is trained, so there is nothing to compare it with
    found = _informative_members([*wrong, *mixed, *right_but_cut], spec("dapo"))
    assert found.tolist() == [False] * 4 + [True] * 2 + [False] * 2
