"""Length shaping, CHORD's schedule and its token weight."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from posttrain.algorithms.chord import CHORD, CHORD_PHI, scheduled
from posttrain.algorithms.dapo import DAPO
from posttrain.errors import ConfigError
from posttrain.objectives.sequence import negative_log_likelihood, token_weight
from posttrain.objectives.shaping import expert_weight, overlong_penalty


def test_soft_overlong_punishment_of_the_paper() -> None:
    penalties = overlong_penalty(torch.tensor([50, 80, 90, 100, 110]), max_length=100, cache=20)
    assert penalties.tolist() == [0.0, 0.0, -0.5, -1.0, -1.0]


def test_mu_warms_up_from_zero_decays_by_a_cosine_and_stays() -> None:
    spec = replace(CHORD, mu_warmup_steps=10, mu_decay_steps=100)
    assert expert_weight(0, spec) == 0.0
    assert expert_weight(5, spec) == pytest.approx(0.45)
    assert expert_weight(10, spec) == pytest.approx(0.9)
    assert expert_weight(60, spec) == pytest.approx((0.9 + 0.05) / 2)
    assert expert_weight(35, spec) == pytest.approx(0.05 + 0.85 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert expert_weight(110, spec) == expert_weight(10_000, spec) == 0.05


def test_the_schedules_of_the_two_presets() -> None:
    assert [expert_weight(step, scheduled(CHORD, 267)) for step in (0, 100, 200)] == pytest.approx([0.9, 0.475, 0.05])
    assert {expert_weight(step, CHORD_PHI) for step in (0, 1, 500)} == {0.1}


def test_a_schedule_is_a_share_of_the_run_or_fits_into_it() -> None:
    # three quarters of the 40 updates that follow 4 of warm-up: floor(0.75 * 36) = 27
    assert scheduled(replace(CHORD, mu_warmup_steps=4), 40).mu_decay_steps == 27
    assert scheduled(replace(CHORD, mu_decay_steps=30), 40).mu_decay_steps == 30
    assert scheduled(DAPO, 3) is DAPO
    with pytest.raises(ConfigError, match=r"mu_decay_steps = 200 are longer than the run's 40 optimiser steps"):
        scheduled(replace(CHORD, mu_decay_steps=200), 40)
    with pytest.raises(ConfigError, match=r"mu_warmup_steps = 40 .* are longer than the run's 40"):
        scheduled(replace(CHORD, mu_warmup_steps=40), 40)


def test_phi_is_p_times_one_minus_p_without_a_gradient() -> None:
    p = torch.tensor([0.5, 0.9, 0.01], dtype=torch.float64)
    lp = p.log().requires_grad_()
    assert token_weight(lp, "p_one_minus_p").tolist() == pytest.approx([0.25, 0.09, 0.0099], abs=1e-12)
    loss = negative_log_likelihood(lp, "p_one_minus_p")
    assert loss.tolist() == pytest.approx([-w * math.log(x) for w, x in ((0.25, 0.5), (0.09, 0.9), (0.0099, 0.01))])
    (gradient,) = torch.autograd.grad(loss.sum(), lp)
    assert gradient.tolist() == pytest.approx([-0.25, -0.09, -0.0099], abs=1e-12)


def test_plain_likelihood_is_the_negative_log_probability() -> None:
    lp = torch.tensor([-0.3, -2.0])
    assert negative_log_likelihood(lp).tolist() == pytest.approx([0.3, 2.0])
