"""Loss and gradient of one batch are the same for every split into micro-batches, every order and every padding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.functional import pad as pad_tensor

from posttrain.algorithms import PRESETS
from posttrain.data import batches
from posttrain.data.batches import TokenBatch, collate
from posttrain.training import onpolicy, preference, supervised
from posttrain.training.onpolicy import Demonstration, Experience, OnPolicyObjective
from posttrain.training.supervised import Example, SupervisedObjective
from tests.models import small
from tests.training.cases import MAX_LENGTH, NAMES, Case, case, experiences, probe, with_record

WHOLE = 10_000
KINDS = ["ppo", "grpo", "gspo", "chord", "dpo", "ipo", "grpo_pairs", "kto", "sft", "sft_all", "reward"]
"""One preset for each way of reading the model's outputs; the layouts do not depend on the formula."""
Outcome = tuple[dict[str, float], dict[str, torch.Tensor]]


def outcome(made: Case, budget: int = WHOLE, rows: list[Any] | None = None) -> Outcome:
    trainer = probe(made.model(), budget)
    metrics = trainer.update(made.rows if rows is None else rows, made.objective)
    return metrics, trainer.gradient


def same(left: Outcome, right: Outcome, tolerance: float) -> None:
    assert left[0].keys() == right[0].keys()
    for name, value in left[0].items():
        assert right[0][name] == pytest.approx(value, abs=10 * tolerance, rel=10 * tolerance), name
    assert left[0]["loss"] == pytest.approx(right[0]["loss"], abs=tolerance)
    for name, gradient in left[1].items():
        scale = max(1.0, float(gradient.abs().max()))
        assert torch.allclose(gradient, right[1][name], atol=tolerance * scale, rtol=0), name


def wider(tokens: Any) -> TokenBatch:
    """`collate` with padding that nothing asked for."""
    batch = collate(tokens)
    length = batch.rows.shape[1]
    padded = {name: pad_tensor(getattr(batch, name), (0, 3)) for name in ("source", "targets", "mask", "rows")}
    padded["trained"] = padded["mask"].flatten().nonzero()[:, 0]
    return replace(batch, place=batch.place // length * (length + 3) + batch.place % length, **padded)


def unpacked(made: Case) -> Case:
    """Return the case with its model computed on padded rows, each with its own prompt."""

    def model() -> torch.nn.Module:
        module = made.model()
        assert module.packs
        module.packs = False
        return module

    return replace(made, model=model)


@pytest.mark.parametrize("name", NAMES)
def test_micro_batches_order_and_padding_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = case(name, double=True)
    whole = outcome(made)
    assert max(float(g.abs().max()) for g in whole[1].values()) > 1e-4
    for budget in (1, 25, 70):
        same(whole, outcome(made, budget), 1e-10)
    same(whole, outcome(made, 40, made.rows[::-1]), 1e-10)
    for module in (onpolicy, preference, supervised):
        monkeypatch.setattr(module, "collate", wider)
    same(whole, outcome(made, 70), 1e-10)
    same(whole, outcome(unpacked(made), 70), 1e-10)


@pytest.mark.parametrize("name", KINDS)
def test_packed_is_padded_whatever_the_prompts_share(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = case(name, double=True)
    padded = outcome(unpacked(made))
    for shared_from in (1, 4, 100):
        monkeypatch.setattr(batches, "SHARED_FROM_TOKENS", shared_from)
        same(padded, outcome(made), 1e-10)
        same(padded, outcome(made, 40), 1e-10)


@pytest.mark.parametrize("name", KINDS)
def test_and_in_float32(name: str) -> None:
    made = case(name)
    whole = outcome(made)
    same(whole, outcome(made, 30, made.rows[::-1]), 1e-5)
    same(whole, outcome(unpacked(made)), 1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_twice_is_the_batch_once(name: str) -> None:
    """Whatever the normaliser, it grows with the batch."""
    made = case(name, double=True)
    once, twice = outcome(made), outcome(made, rows=[*made.rows, *made.rows])
    assert twice[0]["loss"] == pytest.approx(once[0]["loss"], abs=1e-10)
    for parameter, gradient in once[1].items():
        assert torch.allclose(gradient, twice[1][parameter], atol=1e-10), parameter


@pytest.mark.parametrize("name", ["dapo", "ppo", "gspo"])
def test_a_masked_truncated_response_counts_for_nothing(name: str) -> None:
    made = case(name, double=True)
    without = [row for row in made.rows if row.trained]
    left, right = outcome(made), outcome(made, rows=without)
    assert left[0]["loss"] == pytest.approx(right[0]["loss"], abs=1e-10)
    for parameter, gradient in left[1].items():
        assert torch.allclose(gradient, right[1][parameter], atol=1e-10), parameter


def test_a_step_in_which_nothing_is_trained_is_zero_with_a_graph() -> None:
    made = case("dapo", double=True)
    metrics, gradient = outcome(made, 30, [replace(row, trained=False) for row in made.rows])
    assert metrics["loss"] == 0.0
    assert all(float(g.abs().max()) == 0.0 for g in gradient.values())


def test_mu_zero_is_the_policy_alone_and_mu_one_is_supervised() -> None:
    made = case("chord", double=True)
    policy_rows = [r for r in made.rows if isinstance(r, Experience)]
    experts = [r for r in made.rows if isinstance(r, Demonstration)]
    zero = [replace(r, weight=1.0) for r in policy_rows] + [replace(r, weight=0.0) for r in experts]
    alone = replace(
        made, objective=OnPolicyObjective(replace(PRESETS["grpo"], advantage="group_z", kl="none"), MAX_LENGTH, 0.8)
    )
    left, right = outcome(made, 40, zero), outcome(alone, rows=[replace(r, weight=1.0) for r in policy_rows])
    assert left[0]["loss"] == pytest.approx(right[0]["loss"], abs=1e-10)
    for name, gradient in left[1].items():
        assert torch.allclose(gradient, right[1][name], atol=1e-10), name

    one = [replace(r, weight=0.0) for r in policy_rows] + [replace(r, weight=1.0) for r in experts]
    supervised_case = replace(made, objective=SupervisedObjective(), rows=[Example(r.tokens) for r in experts])
    left, right = outcome(made, 40, one), outcome(supervised_case)
    assert left[0]["loss"] == pytest.approx(right[0]["loss"], abs=1e-10)
    for name, gradient in left[1].items():
        assert torch.allclose(gradient, right[1][name], atol=1e-10), name


def test_equal_lengths_make_the_three_aggregates_of_one_policy_agree() -> None:
    made = case("dr_grpo", double=True)
    rows = [r for r in made.rows if len(r.tokens.response) == 4]
    assert rows
    again = [replace(rows[0], advantages=-2 * rows[0].advantages), *rows]
    losses = []
    for how in ("token_mean", "sequence_mean", "constant"):
        changed = with_record(made, aggregate=how)
        changed.objective.max_length = 4
        losses.append(outcome(changed, rows=again)[0]["loss"])
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-12)


@pytest.mark.parametrize(
    "name", [n for n, r in PRESETS.items() if n in {"grpo", "dr_grpo", "gspo", "dapo", "rloo", "cispo"}]
)
def test_the_first_update_after_sampling_has_ratio_one(name: str) -> None:
    made = case(name)
    metrics, _ = outcome(made, 30, [replace(row, old_logprobs=None) for row in made.rows])
    assert metrics["ratio/min"] == metrics["ratio/max"] == 1.0
    assert metrics["clip/low"] == metrics["clip/high"] == metrics["kl/approx"] == 0.0


def test_dropout_of_any_kind_is_off_while_training() -> None:
    made = case("sft", double=True)
    dropping = small.policy(double=True)
    for module in dropping.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    same(outcome(made), outcome(replace(made, model=lambda: dropping)), 1e-10)


def test_experiences_cover_what_they_are_meant_to_cover() -> None:
    rows = experiences(PRESETS["dapo"])
    assert len({len(r.tokens.response) for r in rows}) > 3
    assert sum(not r.trained for r in rows) == 1
    metrics, _ = outcome(case("dapo"))
    assert metrics["clip/low"] > 0
    assert metrics["clip/high"] > 0
