"""The optimiser step: its schedule, its clip, and the settings it refuses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from posttrain.data.batches import EpochOrder
from posttrain.data.tokens import Tokens
from posttrain.errors import ConfigError, NumericalError
from posttrain.settings import OptimizerSettings
from posttrain.training.checkpoint import Checkpoints
from posttrain.training.loop import LoopSettings, fit
from posttrain.training.sums import Terms
from posttrain.training.supervised import EpochSource
from posttrain.training.trainer import ParameterGroup, Trainer
from tests.training.cases import case
from tests.training.runs import Memory


class Linear:
    """Loss of a row = slope * (first weight + second weight); NaN and infinite slopes stand for a broken batch."""

    def sequences(self, row: float) -> Sequence[Tokens]:
        return (Tokens((), (1,)),)

    def counts(self, rows: Sequence[float]) -> Mapping[str, float]:
        return {"rows": float(len(rows))}

    def terms(self, model: nn.Module, rows: Sequence[float]) -> Terms:
        weight = model.weight
        return Terms(
            losses={"all": ((weight.sum() * torch.tensor(list(rows))).sum(), "rows", 1.0)},
            metrics={"mean_row": (torch.tensor(sum(rows)), "rows")},
            extremes={"row/min": torch.tensor(min(rows)), "row/max": torch.tensor(max(rows))},
        )


def trainer(total: int = 10, budget: int = 2, **options: Any) -> Trainer[float]:
    model = nn.Linear(2, 1, bias=False)
    nn.init.constant_(model.weight, 0.5)
    return Trainer(
        model, OptimizerSettings(**({"learning_rate": 0.1} | options)), total_steps=total, micro_batch_tokens=budget
    )


def weights(of: Trainer[float]) -> list[float]:
    return of.unwrapped.weight[0].tolist()


def test_metrics_are_means_over_the_rows_of_all_micro_batches() -> None:
    metrics = trainer().update([1.0, 2.0, 6.0, -1.0, 2.0], Linear())
    assert metrics["loss"] == pytest.approx(2.0)
    assert metrics["mean_row"] == pytest.approx(2.0)
    assert (metrics["row/min"], metrics["row/max"]) == (-1.0, 6.0)
    assert metrics["grad_norm"] == pytest.approx(2 * math.sqrt(2))


def test_the_gradient_is_clipped_to_its_norm_and_the_metric_is_not() -> None:
    loose, tight = (trainer(max_grad_norm=n) for n in (1e9, 0.5))
    norms = [t.update([3.0], Linear())["grad_norm"] for t in (loose, tight)]
    assert norms == pytest.approx([3 * math.sqrt(2)] * 2)
    # Adam's first moment is a tenth of the gradient it was given
    moments = [t.optimizer.state_dict()["state"][0]["exp_avg"].norm().item() for t in (loose, tight)]
    assert moments == pytest.approx([0.1 * 3 * math.sqrt(2), 0.1 * 0.5], rel=1e-4)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.05, 0.1, 0.1, 0.1, 0.1, 0.1]),
        ("linear", [0.05, 0.1, 0.1, 0.075, 0.05, 0.025]),
        (
            "cosine",
            [0.05, 0.1, 0.1, 0.1 * 0.5 * (1 + math.cos(math.pi / 4)), 0.05, 0.1 * 0.5 * (1 - math.cos(math.pi / 4))],
        ),
    ],
)
def test_the_schedule_counts_optimiser_steps_not_micro_batches(schedule: str, expected: list[float]) -> None:
    made = trainer(total=6, budget=1, schedule=schedule, warmup_steps=2)
    rates = [made.update([1.0, 2.0, 3.0], Linear())["learning_rate"] for _ in range(6)]
    assert rates == pytest.approx(expected)
    assert made.updates == 6


def test_a_warm_up_longer_than_the_run_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"warmup_steps = 7 is longer than this run of 6 optimiser steps.* set it to 0, a tenth"
    ):
        trainer(total=6, warmup_steps=7)
    assert trainer(total=6, warmup_steps=6).updates == 0


def test_the_tokens_of_a_run_are_counted() -> None:
    made = trainer()
    assert [made.update([1.0] * n, Linear())["tokens/trained"] for n in (3, 2)] == [3.0, 5.0]


@pytest.mark.parametrize("name", ["dpo", "grpo_pairs", "reward", "sft", "ppo"])
def test_tokens_are_those_of_prompts_and_responses_without_padding(name: str) -> None:
    made = case(name)
    if name in ("dpo", "grpo_pairs"):
        rows = [r for row in made.rows for r in (row.answers if name == "grpo_pairs" else (row.chosen, row.rejected))]
        tokens = [answer.tokens for answer in rows]
    elif name == "reward":
        tokens = [side for row in made.rows for side in (row.chosen, row.rejected)]
    else:
        tokens = [row.tokens for row in made.rows]
    real = sum(len(t.prompt) + len(t.response) for t in tokens)
    learner: Trainer[Any] = Trainer(made.model(), OptimizerSettings(1e-3), total_steps=1, micro_batch_tokens=40)
    assert learner.update(made.rows, made.objective)["tokens/trained"] == real


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_broken_batch_leaves_weights_and_optimiser_as_they_were(broken: float) -> None:
    made = trainer()
    made.update([1.0, 2.0], Linear())
    before, state = weights(made), made.optimizer.state_dict()["state"][0]["exp_avg"].clone()
    with pytest.raises(NumericalError, match=r"update 2 is .*weights are unchanged"):
        made.update([1.0, 2.0, broken, 3.0], Linear())
    assert weights(made) == before
    assert torch.equal(made.optimizer.state_dict()["state"][0]["exp_avg"], state)
    assert made.updates == 1
    # and the broken gradient is gone: the next update is that of a trainer that never saw it
    clean = trainer()
    for batch in ([1.0, 2.0], [4.0, -3.0, 1.0]):
        clean.update(batch, Linear())
    made.update([4.0, -3.0, 1.0], Linear())
    assert weights(made) == weights(clean)


class Overflowing(Linear):
    """The loss is finite, its gradient is not: sqrt at 0."""

    def terms(self, model: nn.Module, rows: Sequence[float]) -> Terms:
        weight = model.weight
        return Terms(losses={"all": ((weight - weight.detach()).abs().sum().sqrt(), "rows", 1.0)})


def test_an_infinite_gradient_of_a_finite_loss_is_refused_too() -> None:
    made = trainer()
    with pytest.raises(NumericalError, match="gradient norm"):
        made.update([1.0], Overflowing())
    assert weights(made) == [0.5, 0.5]


def test_parameter_groups_have_their_own_rate_and_norm() -> None:
    made = case("ppo")
    model = made.model()
    groups = [
        ParameterGroup("policy", list(model.lm.parameters()), 0.0),
        ParameterGroup("value", list(model.critic.parameters()), 1e-2),
    ]
    both: Trainer[Any] = Trainer(model, OptimizerSettings(1.0), total_steps=1, micro_batch_tokens=99, groups=groups)
    before = {name: p.clone() for name, p in model.named_parameters()}
    metrics = both.update(made.rows, made.objective)
    assert metrics["grad_norm"] > 0
    assert metrics["value/grad_norm"] > 0
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert all(name.startswith("critic.") for name in changed)


class Seen(Linear):
    """Remembers how many rows each optimiser step had."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def counts(self, rows: Sequence[float]) -> Mapping[str, float]:
        self.sizes.append(len(rows))
        return super().counts(rows)


def test_the_last_batch_of_an_epoch_is_partial_and_is_averaged_over_its_own_rows(tmp_path: Path) -> None:
    made, seen, recorder = trainer(total=6), Seen(), Memory()
    rows = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    order = EpochOrder(7, 3, 2, seed=0)
    fit(made, EpochSource(rows, order), seen, LoopSettings("t", order.steps), recorder, Checkpoints(tmp_path))
    assert seen.sizes == [3, 3, 1, 3, 3, 1]
    assert made.updates == order.steps == 6
    drawn = [rows[i] for i in order.indices(2)]
    assert recorder.steps[3]["mean_row"] == drawn[0]
    assert recorder.steps[6]["tokens/trained"] == 14.0


def test_saving_and_loading_gives_the_same_next_step() -> None:
    one = trainer(schedule="cosine", warmup_steps=1)
    one.update([1.0, 2.0], Linear())
    other = trainer(schedule="cosine", warmup_steps=1)
    other.load_state_dict(one.state_dict())
    assert one.update([3.0], Linear()) == other.update([3.0], Linear())
    assert weights(one) == weights(other)


def test_learning_lowers_the_loss() -> None:
    made = case("sft")
    learner: Trainer[Any] = Trainer(made.model(), OptimizerSettings(1e-2), total_steps=30, micro_batch_tokens=50)
    losses = [learner.update(made.rows, made.objective)["loss"] for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]
    made = case("dpo")
    learner = Trainer(made.model(), OptimizerSettings(1e-2), total_steps=20, micro_batch_tokens=50)
    assert [learner.update(made.rows, made.objective)["preference/accuracy"] for _ in range(20)][-1] > 0.99


@pytest.mark.parametrize("sharded", [False, True])
def test_autocast_keeps_no_copies_of_weights_that_are_gathered(sharded: bool) -> None:
    seen: list[tuple[bool, bool]] = []

    class Watched(Linear):
        def terms(self, model: nn.Module, rows: Sequence[float]) -> Terms:
            seen.append((torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()))
            return super().terms(model, rows)

    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        accelerator = Accelerator(mixed_precision="bf16", cpu=True)
        made: Trainer[float] = Trainer(
            nn.Linear(2, 1), OptimizerSettings(0.1), total_steps=1, micro_batch_tokens=1, accelerator=accelerator
        )
        made.sharded = sharded
        made.update([1.0, 2.0], Watched())
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert seen == [(True, not sharded)] * 2


def test_a_precision_whose_gradients_have_to_be_scaled_is_refused() -> None:
    accelerator = Accelerator(cpu=True)
    before = accelerator.state._mixed_precision
    accelerator.state._mixed_precision = "fp16"
    try:
        with pytest.raises(ConfigError, match=r"mixed_precision = 'fp16'.*use 'bf16' or 'no'"):
            Trainer(
                nn.Linear(2, 1), OptimizerSettings(0.1), total_steps=1, micro_batch_tokens=1, accelerator=accelerator
            )
    finally:
        accelerator.state._mixed_precision = before
