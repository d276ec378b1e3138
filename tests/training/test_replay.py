"""Updates that are computed again from kept rollouts: the same metrics and weights to the last bit, and differences by name."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from posttrain.data.tokens import Tokens
from posttrain.training.loop import LoopSettings, fit
from posttrain.training.onpolicy import Experience, OnPolicyObjective
from posttrain.training.replay import Difference, KeptStep, differences, keep_step, replay_step
from posttrain.training.trainer import Trainer
from tests.models import small
from tests.training.runs import OPTIMIZER, STEPS, Memory, options_of, source_of

ALGORITHMS = ("grpo", "ppo", "dapo", "gspo", "chord", "rloo", "reinforce_pp")


def trainer_of(name: str, learning_rate: float = 3e-3) -> tuple[Trainer[Any], Any]:
    torch.manual_seed(0)
    spec = options_of(name)
    policy = small.policy(critic=spec.has_critic)
    updates = STEPS * spec.epochs * spec.minibatches
    optimizer = replace(OPTIMIZER, learning_rate=learning_rate)
    return Trainer(policy, optimizer, total_steps=updates, micro_batch_tokens=60), policy


def trained(name: str) -> tuple[Memory, list[KeptStep], Trainer[Any], OnPolicyObjective]:
    """Train for a few steps and keep them."""
    trainer, policy = trainer_of(name)
    source, objective = source_of(options_of(name), policy)
    recorder, kept = Memory(), []

    def hook(step: int) -> dict[str, float]:
        kept.append(keep_step(step, source.last_batches, objective.kl_coefficient))
        return {}

    fit(trainer, source, objective, LoopSettings(name, STEPS), recorder, hook=hook)
    return recorder, kept, trainer, objective


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_update_is_equal_to_the_last_bit(name: str) -> None:
    recorder, kept, trainer, _ = trained(name)
    spec = options_of(name)
    assert [step.step for step in kept] == list(recorder.steps)
    assert all(len(step.updates) == spec.epochs * spec.minibatches for step in kept)
    # an answer is kept once, whatever the number of epochs
    assert all(sum(isinstance(row, Experience) for row in step.rows) <= 12 for step in kept)
    again, _ = trainer_of(name)
    objective = OnPolicyObjective(spec, 6, 0.9)
    for step in kept:
        found = replay_step(again, objective, step)
        assert {"loss", "grad_norm"} <= found.keys() <= recorder.steps[step.step].keys()
        assert differences(recorder.steps[step.step], found) == []
    weights = again.unwrapped.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in trainer.unwrapped.state_dict().items())


def test_one_bit_of_one_advantage_shows_at_its_step_and_a_learning_rate_at_the_next() -> None:
    recorder, kept, _, _ = trained("grpo")
    row = next(row for row in kept[2].rows if isinstance(row, Experience) and row.advantages.any())
    row.advantages[:] *= 1 + 2**-20
    again, _ = trainer_of("grpo")
    objective = OnPolicyObjective(options_of("grpo"), 6, 0.9)
    found = [differences(recorder.steps[step.step], replay_step(again, objective, step)) for step in kept[:3]]
    assert [bool(each) for each in found] == [False, False, True]
    assert any(each.name == "loss" and each.recorded != each.replayed for each in found[2])
    faster, _ = trainer_of("grpo", learning_rate=4e-3)
    names = [each.name for each in differences(recorder.steps[1], replay_step(faster, objective, kept[0]))]
    assert "learning_rate" in names


def test_numbers_that_are_both_nan_are_equal_and_only_shared_names_count() -> None:
    nan = math.nan
    assert differences({"a": nan, "b": 1.0, "c": 2.0}, {"a": nan, "b": nan, "d": 3.0}) == [
        Difference("b", 1.0, pytest.approx(nan, nan_ok=True))  # type: ignore[arg-type]
    ]


def test_an_update_that_the_run_skipped_is_skipped_again() -> None:
    from posttrain.errors import NotFiniteError

    _, kept, _, _ = trained("rloo")
    spoiled = replace(kept[0], rows=[_spoiled(row) for row in kept[0].rows])
    objective = OnPolicyObjective(options_of("rloo"), 6, 0.9)
    with pytest.raises(NotFiniteError):
        replay_step(trainer_of("rloo")[0], objective, spoiled)
    assert replay_step(trainer_of("rloo")[0], objective, spoiled, skips=True) == {}


def _spoiled(row: Any) -> Any:
    assert isinstance(row.tokens, Tokens)
    return replace(row, advantages=row.advantages * float("nan"))
