"""Mixture-of-experts policies under every objective: the same invariance, real updates, and the routers' choices."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from posttrain.algorithms import PRESETS
from posttrain.algorithms.chord import scheduled
from posttrain.algorithms.specs import OnPolicy
from posttrain.settings import OptimizerSettings
from posttrain.training.onpolicy import Experience
from posttrain.training.sums import Terms
from posttrain.training.trainer import Trainer
from tests.models import small
from tests.models.moe import moe
from tests.training.cases import NAMES, case
from tests.training.runs import source_of
from tests.training.test_invariance import outcome, same, unpacked
from tests.training.test_trainer import Linear
from tests.training.test_trainer import trainer as linear_trainer

POLICIES = [name for name in NAMES if name != "reward"]
ON_POLICY = sorted(name for name, spec in PRESETS.items() if isinstance(spec, OnPolicy))


@pytest.fixture(autouse=True)
def _experts() -> Iterator[None]:
    with moe():
        yield


@pytest.mark.parametrize("name", NAMES)
def test_micro_batches_order_and_padding_change_nothing(name: str) -> None:
    """Within 1e-7: the routers of transformers round their probabilities to float32, whatever the model is in."""
    with moe("eager"):
        made = case(name, double=True)
        whole = outcome(made)
        assert max(float(g.abs().max()) for n, g in whole[1].items() if "gate.weight" in n) > 1e-5
        for budget in (1, 40):
            same(whole, outcome(made, budget), 1e-7)
        same(whole, outcome(made, 40, made.rows[::-1]), 1e-7)
        same(whole, outcome(unpacked(made), 40), 1e-7)
    assert ("router/load_max" in whole[0]) == (name != "reward")


@pytest.mark.parametrize("name", POLICIES)
def test_every_preset_moves_routers_and_experts_and_says_what_the_routers_do(name: str) -> None:
    made = case(name)
    model = made.model()
    before = {key: parameter.clone() for key, parameter in model.named_parameters()}
    trainer: Trainer[Any] = Trainer(model, OptimizerSettings(1e-3), total_steps=2, micro_batch_tokens=60)
    first, second = (trainer.update(made.rows, made.objective) for _ in range(2))
    assert second["loss"] != first["loss"]
    for key in ("gate.weight", "experts.gate_up_proj", "experts.down_proj"):
        moved = [
            k for k, p in model.named_parameters() if k.startswith("lm.") and key in k and not torch.equal(p, before[k])
        ]
        assert len(moved) == 2, key
    # four experts, two a token: the busiest has between an even share (1) and all tokens (2)
    assert 1.0 <= first["router/load_max"] <= 2.0
    assert 0.0 < first["router/entropy"] < torch.tensor(4.0).log()


@pytest.mark.parametrize("name", ON_POLICY)
def test_sampled_by_the_engine_judged_and_trained(name: str) -> None:
    preset = PRESETS[name]
    assert isinstance(preset, OnPolicy)
    # an untrained policy ends few answers by itself; with the others left out nothing might be trained at all
    spec = scheduled(replace(preset, mask_truncated=False), updates=9)
    policy = small.policy(critic=spec.has_critic)
    source, objective = source_of(spec, policy)
    trainer: Trainer[Any] = Trainer(policy, OptimizerSettings(1e-2), total_steps=9, micro_batch_tokens=60)
    updates = [trainer.update(batch, objective) for batch in source.next(0).batches]
    assert len(updates) == spec.epochs * spec.minibatches
    # the engine's log-probabilities, made token by token with a cache, are those of the trainer's forward
    assert updates[0]["mismatch/max"] < 1e-4
    assert updates[0]["ratio/mean"] == pytest.approx(1.0, abs=1e-5)
    if len(updates) > 1:
        assert updates[0]["router/changed"] == 0.0
        # a minibatch of few tokens may see none of the changes
        assert 0.0 < max(update["router/changed"] for update in updates[1:]) < 1.0
        assert all(
            row.old_routing.shape[1:] == (2, 2) for row in source.next(1).batches[0] if isinstance(row, Experience)
        )
    else:
        # a single update right after sampling is that of the policy that chose
        assert updates[0].get("router/changed", 0.0) == 0.0


def test_replayed_routing_is_in_the_ratio_of_later_updates_whatever_the_micro_batches() -> None:
    updates = {}
    for replay in (False, True):
        for budget in (30, 10_000):
            spec = replace(PRESETS["gspo"], ratio="token", clip_low=0.2, clip_high=0.2, router_replay=replay)
            policy = small.policy()
            source, objective = source_of(spec, policy)
            trainer: Trainer[Any] = Trainer(policy, OptimizerSettings(1e-2), total_steps=9, micro_batch_tokens=budget)
            batches = source.next(0).batches
            updates[replay, budget] = [trainer.update(batch, objective) for batch in batches]
    free, replayed = updates[False, 10_000], updates[True, 10_000]
    assert free[0] == replayed[0]
    assert replayed[0]["ratio/max"] == pytest.approx(1.0, abs=1e-5)
    # the routers of later updates would choose otherwise, and the ratio shows whether they may
    changed = next(i for i, update in enumerate(replayed) if update["router/changed"] > 0)
    assert replayed[changed]["ratio/max"] != pytest.approx(free[changed]["ratio/max"], abs=1e-6)
    for one, other in zip(updates[True, 30], replayed, strict=True):
        assert one["ratio/max"] == pytest.approx(other["ratio/max"], rel=1e-3)
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-4)


def test_what_changed_is_counted_against_the_old_policys_choices() -> None:
    source, objective = source_of(PRESETS["gspo"], small.policy())
    rows = [row for batch in source.next(0).batches for row in batch]
    trainer: Trainer[Any] = Trainer(source.policy, OptimizerSettings(1e-2), total_steps=1, micro_batch_tokens=30)
    for row in rows[::2]:
        row.old_routing[0, 1] = 3 - row.old_routing[0, 1][::-1]
    moved = sum(
        bool((row.old_routing[0, 1] != own).any())
        for row, own in zip(rows, [r.copy() for r in _first_choices(source.policy, rows)], strict=True)
    )
    tokens = sum(len(row.tokens.response) for row in rows)
    assert moved > 0
    # one layer of two, of one token, in each of the rows that were tampered with
    assert trainer.update(rows, objective)["router/changed"] == pytest.approx(moved / 2 / tokens)


def _first_choices(policy: Any, rows: list[Any]) -> list[Any]:
    from posttrain.models.inference import token_logprobs

    return [numbers.experts[0, 1] for numbers in token_logprobs(policy, [row.tokens for row in rows], 60, 0.9)]  # type: ignore[index]


class Loads(Linear):
    """Every row is a token that goes to the expert with the same number, in the second of two layers; in the first all go to expert 0."""

    def terms(self, model: Any, rows: Any) -> Terms:
        terms = super().terms(model, rows)
        counts = torch.zeros(2, 4, dtype=torch.long)
        counts[0, 0] = len(rows)
        for row in rows:
            counts[1, int(row)] += 1
        terms.histograms = {"second": counts[1:], "worst": counts}
        return terms


def test_the_greatest_load_is_that_of_the_whole_step_over_an_even_share() -> None:
    for budget in (1, 3, 100):
        metrics = linear_trainer(budget=budget).update([0.0, 1.0, 1.0, 2.0, 3.0], Loads())
        # expert 1 has two of five tokens, and an even share is a quarter
        assert metrics["second"] == pytest.approx(2 / 5 * 4)
        assert metrics["worst"] == 4.0
