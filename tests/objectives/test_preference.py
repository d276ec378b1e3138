"""The DPO family and the reward model's loss: the numbers of the papers, and gradients in closed form."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from posttrain.algorithms import PRESETS, choose
from posttrain.algorithms.specs import Preference
from posttrain.objectives.preference import (
    answer_logits,
    bradley_terry,
    preference_loss,
    preference_target,
    unpaired_loss,
)
from posttrain.objectives.surrogate import importance_ratio, surrogate_loss

LN2 = math.log(2)


def spec(name: str, **options: object) -> Preference:
    found = PRESETS[name]
    assert isinstance(found, Preference)
    return replace(found, **options)


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def losses(name: str, differences: list[float], gaps: list[float] | None = None, **options: object) -> list[float]:
    return preference_loss(f64(*differences), f64(*(gaps or [0.0] * len(differences))), spec(name, **options)).tolist()


def test_dpo_starts_at_ln_2_with_half_beta_as_gradient() -> None:
    chosen, rejected = f64(-3.0).requires_grad_(), f64(-5.0).requires_grad_()
    difference = (chosen - chosen.detach()) - (rejected - rejected.detach())
    loss = preference_loss(difference, f64(0.0), spec("dpo", beta=0.3)).sum()
    loss.backward()
    assert loss.item() == pytest.approx(LN2, abs=1e-12)
    assert chosen.grad.item() == pytest.approx(-0.15, abs=1e-12)
    assert rejected.grad.item() == pytest.approx(0.15, abs=1e-12)


def test_grpo_over_a_pair_starts_with_the_gradient_of_dpo_up_to_a_factor() -> None:
    """First order: A = +1/2 and -1/2, sequence ratio 1. For answers of T tokens the factor is 1 / (2 T beta)."""
    tokens, beta = 4, 0.1
    reference = torch.full((2, tokens), -1.5, dtype=torch.float64)
    mask = torch.ones(2, tokens, dtype=torch.bool)

    dpo = reference.clone().requires_grad_()
    sums = (dpo - reference).sum(1)
    preference_loss((sums[0] - sums[1])[None], f64(0.0), spec("dpo", beta=beta)).sum().backward()

    grpo = reference.clone().requires_grad_()
    ratio = importance_ratio(grpo, reference, mask, "sequence")
    surrogate = surrogate_loss(ratio, grpo, f64(0.5, -0.5)[:, None], 0.2, 0.2)
    (surrogate.loss.mean(1).sum() / 2).backward()

    assert dpo.grad[:, 0].tolist() == pytest.approx([-beta / 2, beta / 2], abs=1e-12)
    assert grpo.grad[:, 0].tolist() == pytest.approx([-1 / (4 * tokens), 1 / (4 * tokens)], abs=1e-12)
    assert torch.allclose(grpo.grad, dpo.grad / (2 * tokens * beta), atol=1e-12)


def test_label_smoothing_gives_the_table_of_the_specification() -> None:
    values = losses("dpo", [0.0, 10.0, 20.0], label_smoothing=0.1)
    assert values == pytest.approx([0.6931, 0.4133, 0.3269], abs=5e-5)
    for x, value in zip([0.0, 1.0, 2.0], values, strict=True):
        assert value == pytest.approx(-0.9 * math.log(sigmoid(x)) - 0.1 * math.log(sigmoid(-x)), abs=1e-12)


def test_robust_divides_the_noise_out_and_may_be_negative() -> None:
    for x in (-3.0, 0.0, 2.0, 60.0):
        forward, backward = math.log1p(math.exp(-x)), math.log1p(math.exp(x))
        assert losses("robust", [x * 10])[0] == pytest.approx((0.9 * forward - 0.1 * backward) / 0.8, abs=1e-12)
    assert losses("robust", [600.0])[0] < 0


def test_robust_is_unbiased_under_flipped_labels() -> None:
    # with probability eps the label is flipped; the expectation of the corrected loss is the clean loss
    x, eps = 7.0, 0.1
    right, flipped = losses("robust", [x, -x])
    assert (1 - eps) * right + eps * flipped == pytest.approx(losses("dpo", [x])[0], abs=1e-12)


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_ipo_starts_at_one_over_four_beta_squared_and_ends_at_half_over_beta(beta: float) -> None:
    start, end = losses("ipo", [0.0, 1 / (2 * beta)], beta=beta)
    assert start == pytest.approx(1 / (4 * beta**2), rel=1e-12)
    assert end == pytest.approx(0.0, abs=1e-12)


def test_hinge_and_simpo_by_hand() -> None:
    assert losses("hinge", [0.0, 4.0, 10.0, 30.0]) == pytest.approx([1.0, 0.6, 0.0, 0.0], abs=1e-12)
    # SimPO: -log sigma(beta * difference of means - gamma)
    assert losses("simpo", [1.5])[0] == pytest.approx(-math.log(sigmoid(2.0 * 1.5 - 0.5)), abs=1e-12)


def test_soft_targets_a_tie_is_one_half_with_its_minimum_at_zero() -> None:
    assert preference_target(f64(0.0, 2.0), spec("dpo_soft")).tolist() == pytest.approx([0.5, sigmoid(2.0)])
    x = f64(0.0).requires_grad_()
    loss = preference_loss(x, f64(0.0), spec("dpo_soft")).sum()
    (gradient,) = torch.autograd.grad(loss, x)
    assert loss.item() == pytest.approx(LN2, abs=1e-12)
    assert gradient.item() == pytest.approx(0.0, abs=1e-12)
    assert min(losses("dpo_soft", [-1.0, 1.0])) > LN2


def test_soft_targets_by_hand_and_at_their_limit() -> None:
    p = sigmoid(0.7 * 1.5)
    by_hand = -p * math.log(sigmoid(0.2)) - (1 - p) * math.log(sigmoid(-0.2))
    assert losses("dpo_soft", [2.0], [1.5], score_scale=0.7)[0] == pytest.approx(by_hand, abs=1e-12)
    assert losses("dpo_soft", [2.0], [1.5], score_scale=1e3) == pytest.approx(losses("dpo", [2.0]), abs=1e-12)


def test_offset_moves_the_logit_and_zero_scale_is_dpo() -> None:
    assert losses("dpo", [2.0], [1.5], score_weighting="offset", score_scale=0.4)[0] == pytest.approx(
        -math.log(sigmoid(0.2 - 0.6)), abs=1e-12
    )
    assert losses("dpo", [2.0], [1.5], score_weighting="offset", score_scale=0.0) == losses("dpo", [2.0])


def test_each_pair_is_its_own_logit() -> None:
    together = losses("dpo", [3.0, -4.0])
    assert together == losses("dpo", [3.0]) + losses("dpo", [-4.0])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dpo", {}),
        ("dpo", {"label_smoothing": 0.2}),
        ("dpo", {"score_weighting": "offset", "score_scale": 0.4}),
        ("dpo_soft", {}),
        ("robust", {}),
        ("ipo", {}),
        ("simpo", {}),
        ("hinge", {}),
        ("hinge", {"label_smoothing": 0.2}),
        ("hinge", {"label_smoothing": 0.2, "robust": True}),
    ],
)
def test_gradients_agree_with_finite_differences(name: str, options: dict[str, object]) -> None:
    difference = f64(-7.0, 0.5, 11.0).requires_grad_()
    gap = f64(1.0, 0.0, -2.0)
    assert torch.autograd.gradcheck(lambda d: preference_loss(d, gap, spec(name, **options)), (difference,))


def test_hinge_under_label_noise_by_hand() -> None:
    # logit 0.4: 0.6 to the right side, 1.4 to the wrong one
    assert losses("hinge", [4.0], label_smoothing=0.2)[0] == pytest.approx(0.8 * 0.6 + 0.2 * 1.4, abs=1e-12)
    robust = losses("hinge", [4.0], label_smoothing=0.2, robust=True)[0]
    assert robust == pytest.approx((0.8 * 0.6 - 0.2 * 1.4) / 0.6, abs=1e-12)


def test_far_logits_stay_finite() -> None:
    x = torch.tensor([-1e6, 1e6], requires_grad=True)
    loss = preference_loss(x, torch.zeros(2), spec("dpo"))
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert x.grad.tolist() == pytest.approx([-0.1, 0.0])


CERTAIN = f64(1.0, 1.0)


def test_reward_model_loss_by_hand() -> None:
    loss = bradley_terry(f64(1.2, 0.0), f64(0.4, 0.0), f64(0.5, 0.0), CERTAIN, center=0.01)
    assert loss[0].item() == pytest.approx(-math.log(sigmoid(1.2 - 0.4 - 0.5)) + 0.01 * 1.6**2, abs=1e-12)
    assert loss[1].item() == pytest.approx(LN2, abs=1e-12)


def test_equal_scores_cost_ln_2_wherever_they_lie_without_centring() -> None:
    scores = f64(-3.0, 5.0)
    assert bradley_terry(scores, scores, f64(0.0, 0.0), CERTAIN, 0.0).tolist() == pytest.approx([LN2, LN2])


def test_a_soft_target_of_the_reward_model_is_reached_and_not_passed() -> None:
    p = sigmoid(0.7)
    by_hand = -p * math.log(sigmoid(2.0)) - (1 - p) * math.log(sigmoid(-2.0))
    chosen, zero = f64(2.0, 0.7).requires_grad_(), f64(0.0, 0.0)
    loss = bradley_terry(chosen, zero, zero, f64(p, p), 0.0)
    assert loss[0].item() == pytest.approx(by_hand, abs=1e-12)
    (gradient,) = torch.autograd.grad(loss.sum(), chosen)
    # sigma(x) - p: a difference beyond the one that the scores justify is pulled back, the justified one rests
    assert gradient.tolist() == pytest.approx([sigmoid(2.0) - p, 0.0], abs=1e-12)


def test_reward_model_gradient() -> None:
    chosen, rejected = f64(0.3, -1.0).requires_grad_(), f64(0.1, 2.0).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda c, r: bradley_terry(c, r, f64(0.2, 0.0), f64(1.0, 0.6), 0.01), (chosen, rejected)
    )


def test_log_odds_by_hand_and_finite_for_a_certain_answer() -> None:
    logprobs = torch.tensor([[-0.5, -1.5], [-0.25, 9.0], [0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True], [True, False], [True, True]])
    odds = answer_logits(logprobs, torch.zeros_like(logprobs), mask, PRESETS["orpo"])  # type: ignore[arg-type]
    # of the geometric mean of the tokens' probabilities: exp(-1) and exp(-1/4)
    expected = [math.log(p / (1 - p)) for p in (math.exp(-1.0), math.exp(-0.25))]
    assert odds[:2].tolist() == pytest.approx(expected, abs=1e-12)
    assert math.isfinite(odds[2].item())
    odds.sum().backward()
    # d log(p / (1 - p)) / d log p = 1 / (1 - p), shared by the tokens of the mean
    slope = 0.5 / (1 - math.exp(-1.0))
    assert logprobs.grad[0].tolist() == pytest.approx([slope, slope], abs=1e-12)
    assert logprobs.grad[1].tolist() == pytest.approx([1 / (1 - math.exp(-0.25)), 0.0], abs=1e-12)
    assert torch.isfinite(logprobs.grad).all()


def test_kto_by_hand_is_one_half_at_the_baseline_and_saturates_on_both_sides() -> None:
    spec = choose("kto", {"beta": 0.5, "desirable_weight": 2.0, "undesirable_weight": 3.0})
    log_ratio = torch.tensor([1.0, 1.0, 3.0, 3.0, 200.0, -200.0], dtype=torch.float64, requires_grad=True)
    desirable = torch.tensor([True, False, True, False, True, True])
    loss = unpaired_loss(log_ratio, torch.ones(6, dtype=torch.float64), desirable, spec)  # type: ignore[arg-type]
    up, down = sigmoid(0.5 * (3 - 1)), sigmoid(-0.5 * (3 - 1))
    assert loss.tolist() == pytest.approx([1.0, 1.5, 2 * (1 - up), 3 * (1 - down), 0.0, 2.0], abs=1e-12)
    loss.sum().backward()
    # -w beta sigma (1 - sigma), with the opposite sign for thumbs down
    slopes = [-2 * 0.5 * 0.25, 3 * 0.5 * 0.25, -2 * 0.5 * up * down, 3 * 0.5 * up * down, 0.0, 0.0]
    assert log_ratio.grad.tolist() == pytest.approx(slopes, abs=1e-12)
