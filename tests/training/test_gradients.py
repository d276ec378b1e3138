"""Gradients of whole objectives against finite differences of their losses in float64, along one random direction."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from posttrain.data.tokens import Tokens
from posttrain.training.onpolicy import Experience
from tests.training.cases import NAMES, case, probe
from tests.training.test_by_hand import TEMPERATURE, token_logprobs

STEP = 1e-5
# their token weights count as constants, so that the loss changes in other ways than its gradient says
WEIGHTED = ["cispo", "chord_phi"]


def direction(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(p.shape, generator=generator, dtype=torch.float64) for name, p in model.named_parameters()
    }


def slope(model: torch.nn.Module, value: Callable[[], float]) -> float:
    """Return the derivative of `value()` along `direction`, by central differences."""
    along, values = direction(model), []
    for sign in (1.0, -1.0):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.add_(along[name], alpha=sign * STEP)
        values.append(value())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.sub_(along[name], alpha=sign * STEP)
    return (values[0] - values[1]) / (2 * STEP)


def along_gradient(model: torch.nn.Module, gradient: dict[str, torch.Tensor]) -> float:
    return sum(float((g * v).sum()) for g, v in zip(gradient.values(), direction(model).values(), strict=True))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in WEIGHTED])
def test_the_gradient_is_that_of_finite_differences(name: str) -> None:
    made = case(name, double=True)
    model = made.model()
    trainer = probe(model, 40)
    trainer.update(made.rows, made.objective)
    expected = slope(model, lambda: trainer.update(made.rows, made.objective)["loss"])
    trainer.update(made.rows, made.objective)
    assert abs(expected) > 1e-3
    assert along_gradient(model, trainer.gradient) == pytest.approx(expected, rel=1e-5, abs=1e-8)


def derivatives(model: torch.nn.Module, tokens: Tokens, temperature: float) -> list[float]:
    return [
        slope(model, lambda t=t: token_logprobs(model, tokens, temperature)[t])  # type: ignore[arg-type, misc]
        for t in range(len(tokens.response))
    ]


def test_the_gradient_of_cispo_has_the_clipped_ratio_as_a_constant_weight() -> None:
    made = case("cispo", double=True)
    model = made.model()
    trainer = probe(model, 40)
    trainer.update(made.rows, made.objective)
    total, tokens = 0.0, 0
    for row in made.rows:
        if not row.trained:
            continue
        now, change = token_logprobs(model, row.tokens, TEMPERATURE), derivatives(model, row.tokens, TEMPERATURE)
        for t, lp in enumerate(now):
            weight = min(math.exp(lp - float(row.old_logprobs[t])), 1.28)
            total += -weight * float(row.advantages[t]) * change[t]
        tokens += len(now)
    assert along_gradient(model, trainer.gradient) == pytest.approx(total / tokens, rel=1e-5)


def test_the_gradient_of_chord_phi_has_p_one_minus_p_as_a_constant_weight() -> None:
    made = case("chord_phi", double=True)
    # the policy's part is that of chord; without it the expert's is left
    rows = [replace(row, weight=0.0) if isinstance(row, Experience) else row for row in made.rows]
    model = made.model()
    trainer = probe(model, 40)
    trainer.update(rows, made.objective)
    experts = [row for row in rows if not isinstance(row, Experience)]
    total = 0.0
    for row in experts:
        now, change = token_logprobs(model, row.tokens), derivatives(model, row.tokens, 1.0)
        total += sum(-math.exp(lp) * (1 - math.exp(lp)) * d for lp, d in zip(now, change, strict=True))
    expected = experts[0].weight * total / sum(len(row.tokens.response) for row in experts)
    assert along_gradient(model, trainer.gradient) == pytest.approx(expected, rel=1e-5)
