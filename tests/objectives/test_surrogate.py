"""Importance ratios, the clipped surrogate, CISPO's weight, and weights for a sampler that was not quite the policy."""

from __future__ import annotations

import math

import pytest
import torch

from posttrain.objectives.reduce import aggregate
from posttrain.objectives.surrogate import importance_ratio, mismatch_weight, surrogate_loss

NAN = math.nan


def f64(rows: list[list[float]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


LP = f64([[-1.0, -2.0, -0.5], [-3.0, NAN, NAN]])
OLD = f64([[-1.1, -1.7, -0.5], [-2.5, NAN, NAN]])
MASK = torch.tensor([[1, 1, 1], [1, 0, 0]], dtype=torch.bool)


def test_token_ratio_by_hand() -> None:
    ratio = importance_ratio(LP, OLD, MASK, "token")
    assert ratio[MASK].tolist() == pytest.approx([math.exp(0.1), math.exp(-0.3), 1.0, math.exp(-0.5)], abs=1e-12)


def test_sequence_ratio_is_the_geometric_mean_for_every_token() -> None:
    ratio = importance_ratio(LP, OLD, MASK, "sequence")
    assert ratio[0].tolist() == pytest.approx([math.exp((0.1 - 0.3) / 3)] * 3, abs=1e-12)
    assert ratio[1, 0].item() == pytest.approx(math.exp(-0.5), abs=1e-12)


def test_a_response_of_one_token_has_the_token_ratio() -> None:
    lp = f64([[-3.0]]).requires_grad_()
    mask = torch.ones(1, 1, dtype=torch.bool)
    values, gradients = [], []
    for how in ("token", "sequence"):
        ratio = importance_ratio(lp, f64([[-2.5]]), mask, how)
        values.append(ratio.item())
        gradients.append(torch.autograd.grad(ratio.sum(), lp)[0].item())
    assert values[0] == pytest.approx(values[1], abs=1e-15)
    assert gradients[0] == pytest.approx(gradients[1], abs=1e-15)


def test_the_token_form_of_the_sequence_ratio_has_the_gradient_of_the_ratio_itself() -> None:
    advantage = f64([[0.7], [-1.2]])
    lp = LP.clone().requires_grad_()
    form = aggregate(advantage * importance_ratio(lp, OLD, MASK, "sequence"), MASK, "sequence_mean", 0)
    (gradient,) = torch.autograd.grad(form, lp)
    lengths = MASK.sum(-1).double()
    direct_lp = LP.clone().requires_grad_()
    mean = torch.where(MASK, direct_lp - OLD, 0.0).sum(-1) / lengths
    (direct,) = torch.autograd.grad((advantage[:, 0] * mean.exp()).sum(), direct_lp)
    assert torch.allclose(gradient, direct, atol=1e-14)


@pytest.mark.parametrize("how", ["token", "sequence"])
def test_nan_outside_the_mask_reaches_neither_loss_nor_gradient(how: str) -> None:
    lp = LP.clone().requires_grad_()
    advantage = f64([[1.0, 1.0, 1.0], [-1.0, NAN, NAN]])
    surrogate = surrogate_loss(importance_ratio(lp, OLD, MASK, how), lp, advantage, 0.2, 0.2)
    loss = aggregate(surrogate.loss, MASK, "token_mean", 0)
    loss.backward()
    assert math.isfinite(loss.item())
    assert torch.isfinite(lp.grad).all()
    assert (lp.grad[~MASK] == 0).all()


def test_a_far_ratio_stays_finite() -> None:
    mask = torch.ones(1, 2, dtype=torch.bool)
    for how in ("token", "sequence"):
        assert torch.isfinite(
            importance_ratio(torch.tensor([[-500.0, 0.0]]), torch.tensor([[0.0, -500.0]]), mask, how)
        ).all()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "low", "high"),
    [
        (1.1, 2.0, -2.2, -2.0, False, False),  # inside the clip
        (1.5, 2.0, -2.4, 0.0, False, True),  # already likelier than the clip lets it become: flat
        (1.5, -2.0, 3.0, 2.0, False, False),  # wrong direction: no clip protects it
        (0.5, -2.0, 1.6, 0.0, True, False),  # already less likely than the clip: flat
        (0.5, 2.0, -1.0, -2.0, False, False),
        (1.0, 0.0, 0.0, 0.0, False, False),
    ],
)
def test_the_clip_by_hand(ratio: float, advantage: float, loss: float, gradient: float, low: bool, high: bool) -> None:
    rho = f64([[ratio]]).requires_grad_()
    result = surrogate_loss(rho, f64([[0.0]]), f64([[advantage]]), 0.2, 0.2)
    (slope,) = torch.autograd.grad(result.loss.sum(), rho)
    assert result.loss.item() == pytest.approx(loss, abs=1e-12)
    assert slope.item() == pytest.approx(gradient, abs=1e-12)
    assert (result.clipped_low.item(), result.clipped_high.item()) == (low, high)


def test_the_two_widths_are_apart() -> None:
    result = surrogate_loss(f64([[1.25, 0.75]]), f64([[0.0, 0.0]]), f64([[1.0, -1.0]]), 0.2, 0.28)
    assert result.loss[0].tolist() == pytest.approx([-1.25, 0.8])
    assert result.clipped_high.tolist() == [[False, False]]
    assert result.clipped_low.tolist() == [[False, True]]


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("kind", ["clip", "weight"])
@pytest.mark.parametrize("how", ["token_mean", "sequence_mean", "constant"])
def test_at_ratio_one_every_objective_has_the_policy_gradient(ratio: str, kind: str, how: str) -> None:
    advantage = f64([[0.7] * 3, [-1.3] * 3])
    start = torch.where(MASK, LP, -1.0)
    lp = start.clone().requires_grad_()
    surrogate = surrogate_loss(importance_ratio(lp, start, MASK, ratio), lp, advantage, 0.2, 0.28, kind)
    (gradient,) = torch.autograd.grad(aggregate(surrogate.loss, MASK, how, 5), lp)
    # d/dlp of -A lp, times what each aggregate weighs a token of the rows of 3 and of 1 with
    weights = {"token_mean": [1.0, 1.0], "sequence_mean": [1 / 3, 1.0], "constant": [1 / 5, 1 / 5]}[how]
    expected = f64([[-0.7 * weights[0]] * 3, [1.3 * weights[1], 0.0, 0.0]])
    assert torch.allclose(gradient, expected, atol=1e-14)
    assert not (surrogate.clipped_low | surrogate.clipped_high)[MASK].any()


def test_cispo_keeps_the_gradient_of_a_clipped_token() -> None:
    old, lp = f64([[-2.0, -1.0]]), f64([[-1.0, -1.1]]).requires_grad_()
    mask = torch.ones(1, 2, dtype=torch.bool)
    result = surrogate_loss(importance_ratio(lp, old, mask, "token"), lp, f64([[2.0, -3.0]]), 1.0, 0.28, "weight")
    (gradient,) = torch.autograd.grad(result.loss.sum(), lp)
    # -sg[min(rho, 1.28)] * A * d log p
    assert gradient[0].tolist() == pytest.approx([-1.28 * 2.0, 3.0 * math.exp(-0.1)], abs=1e-12)
    assert result.clipped_high.tolist() == [[True, False]]


@pytest.mark.parametrize("ratio", ["token"])
def test_surrogate_gradients_agree_with_finite_differences(ratio: str) -> None:
    old = f64([[-1.1, -1.7, -0.5], [-2.5, -1.0, -1.0]])
    lp = f64([[-1.0, -2.0, -0.4], [-3.2, -0.95, -1.0]]).requires_grad_()
    advantage = f64([[0.7] * 3, [-1.3] * 3])

    def loss(x: torch.Tensor) -> torch.Tensor:
        return aggregate(
            surrogate_loss(importance_ratio(x, old, MASK, ratio), x, advantage, 0.2, 0.2).loss, MASK, "token_mean", 0
        )

    assert torch.autograd.gradcheck(loss, (lp,))


def test_mismatch_weights_by_hand() -> None:
    old, sampled = f64([[0.0, 0.0, 0.0, 0.0]]), f64([[0.0, -1.0, 1.0, -0.5]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    assert mismatch_weight(old, sampled, mask, "none", 2.0).tolist() == [[1.0] * 4]
    assert mismatch_weight(old, sampled, mask, "truncate", 2.0)[0].tolist() == pytest.approx(
        [1.0, 2.0, math.exp(-1), math.exp(0.5)]
    )
    # a kept token is weighed by its ratio, as IcePop does
    assert mismatch_weight(old, sampled, mask, "mask", 2.0)[0].tolist() == pytest.approx([1.0, 0.0, 0.0, math.exp(0.5)])


def test_mismatch_weights_of_whole_answers_are_the_product_of_their_tokens() -> None:
    old, sampled = (
        f64([[0.0, 0.0, NAN], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]),
        f64([[-0.5, 0.2, NAN], [-0.5, -0.5, 0.1], [0.5, 0.5, 0.1]]),
    )
    mask = torch.tensor([[True, True, False], [True] * 3, [True] * 3])
    products = [math.exp(0.3), math.exp(0.9), math.exp(-1.1)]
    truncated = mismatch_weight(old, sampled, mask, "seq_truncate", 2.0)
    assert truncated[0, :2].tolist() == pytest.approx([products[0]] * 2)
    assert truncated[1].tolist() == pytest.approx([2.0] * 3)
    assert truncated[2].tolist() == pytest.approx([products[2]] * 3)
    masked = mismatch_weight(old, sampled, mask, "seq_mask", 2.0)
    assert masked[0, :2].tolist() == pytest.approx([products[0]] * 2)
    assert masked[1:].tolist() == [[0.0] * 3] * 2
    assert torch.isfinite(masked).all()


def test_dual_clip_bounds_the_loss_of_a_bad_token_and_ends_its_gradient() -> None:
    rho = f64([[5.0, 2.0, 5.0]]).requires_grad_()
    advantage = f64([[-2.0, -2.0, 2.0]])
    result = surrogate_loss(rho, f64([[0.0] * 3]), advantage, 0.2, 0.2, dual_clip=3.0)
    (slope,) = torch.autograd.grad(result.loss.sum(), rho)
    assert result.loss[0].tolist() == pytest.approx([6.0, 4.0, -2.4], abs=1e-12)
    assert slope[0].tolist() == pytest.approx([0.0, 2.0, 0.0], abs=1e-12)
    assert result.clipped_high.tolist() == [[True, False, True]]
