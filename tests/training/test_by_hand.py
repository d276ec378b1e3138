"""Whole objectives against sums written out token by token in float64, from the model's full logits."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from posttrain.algorithms import PRESETS, choose
from posttrain.algorithms.specs import OnPolicy
from posttrain.data.tokens import Tokens
from posttrain.models.policy import Policy
from posttrain.training.onpolicy import Demonstration, Experience
from posttrain.training.preference import Answer, AnswerGroup
from tests.training.by_hand import loss_of, token_logprobs
from tests.training.cases import MAX_LENGTH, case, probe, with_record

TEMPERATURE = 0.8


def token_entropies(policy: Policy, tokens: Tokens) -> list[float]:
    with torch.no_grad():
        logits = policy.lm(input_ids=torch.tensor([tokens.prompt + tokens.response])).logits[0] / TEMPERATURE
    table = logits.log_softmax(-1)[len(tokens.prompt) - 1 : -1]
    return [-sum(lp * math.exp(lp) for lp in row) for row in table.tolist()]


def correction(spec: OnPolicy, row: Experience) -> list[float]:
    """Return the weight of each token for a sampler that differs from the trainer."""
    w = [math.exp(float(o) - float(r)) for o, r in zip(row.old_logprobs, row.rollout_logprobs, strict=True)]
    if spec.mismatch == "none":
        return [1.0] * len(w)
    if spec.mismatch.startswith("seq_"):
        w = [math.prod(w)] * len(w)
    if spec.mismatch.endswith("truncate"):
        return [min(x, spec.mismatch_cap) for x in w]
    return [x if 1 / spec.mismatch_cap <= x <= spec.mismatch_cap else 0.0 for x in w]


def geometric_term(spec: OnPolicy, lp: list[float], old: list[float], a: float) -> float:
    """-A times the geometric mean of ratios that are clipped on the side of A."""
    ratios = [math.exp(x - y) for x, y in zip(lp, old, strict=True)]
    kept = [min(r, math.exp(spec.clip_high)) if a > 0 else max(r, math.exp(-spec.clip_low)) for r in ratios]
    return -a * math.prod(kept) ** (1 / len(kept))


def divergence_term(spec: OnPolicy, lp: float, old: float, a: float) -> float:
    p, q = math.exp(lp), math.exp(old)
    apart = abs(p - q) if spec.surrogate == "tv" else q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))
    leaves = (a > 0 and p > q and apart > spec.clip_high) or (a < 0 and p < q and apart > spec.clip_low)
    return 0.0 if leaves else -a * p / q


def policy_term(spec: OnPolicy, lp: list[float], row: Experience) -> list[float]:
    old, ref = [float(x) for x in row.old_logprobs], [float(x) for x in row.ref_logprobs]
    weights = correction(spec, row)
    if spec.anchor == "rollout":
        old = [float(x) for x in row.rollout_logprobs]
    n = len(lp)
    geometric = math.exp(sum(a - b for a, b in zip(lp, old, strict=True)) / n)
    terms = []
    for t in range(n):
        a = float(row.advantages[t])
        rho = geometric if spec.ratio == "sequence" else math.exp(lp[t] - old[t])
        clipped = min(max(rho, 1 - spec.clip_low), 1 + spec.clip_high)
        tau = spec.tau_positive if a > 0 else spec.tau_negative
        pessimistic = max(-a * rho, -a * clipped)
        if spec.dual_clip is not None and a < 0:
            pessimistic = min(pessimistic, -spec.dual_clip * a)
        s = {
            "clip": lambda: pessimistic,  # noqa: B023
            "weight": lambda: -clipped * a * lp[t],  # noqa: B023
            "soft": lambda: -a * 4 / tau / (1 + math.exp(-tau * (rho - 1))),  # noqa: B023
            "geometric": lambda: geometric_term(spec, lp, old, a),  # noqa: B023
            "tv": lambda: divergence_term(spec, lp[t], old[t], a),  # noqa: B023
            "kl": lambda: divergence_term(spec, lp[t], old[t], a),  # noqa: B023
        }[spec.surrogate]() * weights[t]
        if spec.kl == "loss":
            s += spec.kl_coefficient * (math.exp(ref[t] - lp[t]) - 1 + lp[t] - ref[t])
        terms.append(row.weight * s)
    return terms


def value_term(critic: Any, row: Experience, clip: float) -> float:
    with torch.no_grad():
        hidden = critic.model(input_ids=torch.tensor([row.tokens.prompt + row.tokens.response])).last_hidden_state[0]
        values = critic.score(hidden).squeeze(-1)[len(row.tokens.prompt) - 1 : -1].tolist()
    total = 0.0
    for v, old, ret in zip(values, row.old_values.tolist(), row.returns.tolist(), strict=True):
        held = old + min(max(v - old, -clip), clip)
        total += 0.5 * max((v - ret) ** 2, (held - ret) ** 2)
    return total


ON_POLICY: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name, r in sorted(PRESETS.items()) if isinstance(r, OnPolicy)),
    ("grpo", {"mismatch": "mask", "mismatch_cap": 1.005}),
    ("dapo", {"mismatch": "seq_mask", "mismatch_cap": 1.01}),
    ("cispo", {"mismatch": "seq_truncate", "mismatch_cap": 1.001}),
    ("dapo", {"dual_clip": 1.1}),
    ("grpo", {"entropy_coefficient": 0.3}),
]


@pytest.mark.parametrize(("name", "options"), ON_POLICY, ids=lambda v: str(v))
def test_every_on_policy_preset(name: str, options: dict[str, Any]) -> None:
    spec = choose(name, options)
    assert isinstance(spec, OnPolicy)
    made = with_record(case(name, double=True), **options)
    model, rows = made.model(), made.rows
    metrics = probe(model, 30).update(rows, made.objective)
    if spec.mismatch.endswith("mask"):
        kept = [w != 0 for r in rows if r.trained for w in correction(spec, r)]
        assert 0 < sum(kept) < len(kept)
        assert metrics["mismatch/masked"] == pytest.approx(1 - sum(kept) / len(kept))
    trained = [r for r in rows if isinstance(r, Experience) and r.trained]
    terms = [policy_term(spec, token_logprobs(model, r.tokens, TEMPERATURE), r) for r in trained]
    if spec.entropy_coefficient:
        bonus = spec.entropy_coefficient
        terms = [
            [s - bonus * h for s, h in zip(term, token_entropies(model, r.tokens), strict=True)]
            for term, r in zip(terms, trained, strict=True)
        ]
    tokens = sum(map(len, terms))
    expected = {
        "token_mean": sum(map(sum, terms)) / tokens,
        "sequence_mean": sum(sum(t) / len(t) for t in terms) / len(terms),
        "constant": sum(map(sum, terms)) / (len(terms) * MAX_LENGTH),
    }[spec.aggregate]
    if spec.has_critic:
        squared = sum(value_term(model.critic, r, spec.value_clip) for r in trained)
        expected += spec.value_coefficient * squared / tokens
        assert metrics["value/loss"] == pytest.approx(squared / tokens, rel=1e-7)
    experts = [r for r in rows if isinstance(r, Demonstration)]
    if experts:
        lps = [lp for r in experts for lp in token_logprobs(model, r.tokens)]
        phi = [math.exp(lp) * (1 - math.exp(lp)) if spec.phi != "none" else 1.0 for lp in lps]
        nll = sum(-w * lp for w, lp in zip(phi, lps, strict=True)) / len(lps)
        assert metrics["expert/loss"] == pytest.approx(nll, rel=1e-7)
        assert metrics["expert/phi"] == pytest.approx(sum(phi) / len(phi), rel=1e-7)
        expected += experts[0].weight * nll
    assert metrics["loss"] == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", ["grpo", "grpo_pairs"])
def test_the_kl_that_is_reported_is_not_clamped(name: str) -> None:
    """One answer's reference is 40 nats a token away; the loss may bound that, the metric may not."""
    made = case(name, double=True)
    model = made.model()

    def far(tokens: Tokens) -> np.ndarray:
        return np.asarray(token_logprobs(model, tokens, TEMPERATURE if name == "grpo" else 1.0)) + 40.0

    if name == "grpo":
        rows = [replace(row, ref_logprobs=far(row.tokens)) for row in made.rows]
        answers = [row.tokens for row in rows]
    else:
        rows = [AnswerGroup(tuple(Answer(a.tokens, far(a.tokens)) for a in g.answers), g.scores) for g in made.rows]
        answers = [a.tokens for row in rows for a in row.answers]
    per_response = sum(len(tokens.response) for tokens in answers) / len(answers)
    metrics = probe(model, 30).update(rows, made.objective)
    assert metrics["kl/ref_k1"] == pytest.approx(-40 * per_response, rel=1e-4)
    assert metrics["kl/ref_k3"] == pytest.approx((math.exp(40) - 41) * per_response, rel=1e-3)


@pytest.mark.parametrize("name", ["grpo", "dapo", "gspo"])
def test_the_metrics_of_an_update(name: str) -> None:
    spec = PRESETS[name]
    assert isinstance(spec, OnPolicy)
    metrics, model, rows = loss_of(name)
    sums: dict[str, float] = dict.fromkeys(
        ("k1", "k3", "approx", "mismatch", "mismatch_k3", "entropy", "tokens", "low", "high", "trained"), 0.0
    )
    ratios, gaps = [], []
    for row in rows:
        lp = token_logprobs(model, row.tokens, TEMPERATURE)
        old, ref, sampled = (
            x.astype(np.float64).tolist() for x in (row.old_logprobs, row.ref_logprobs, row.rollout_logprobs)
        )
        mean = math.exp(sum(a - b for a, b in zip(lp, old, strict=True)) / len(lp))
        for t, now in enumerate(lp):
            ratio = mean if spec.ratio == "sequence" else math.exp(now - old[t])
            sums["k1"] += now - ref[t]
            sums["k3"] += math.exp(ref[t] - now) - 1 + now - ref[t]
            sums["approx"] += math.exp(now - old[t]) - 1 + old[t] - now
            sums["mismatch"] += abs(old[t] - sampled[t])
            sums["mismatch_k3"] += math.exp(old[t] - sampled[t]) - 1 + sampled[t] - old[t]
            sums["low"] += row.trained and ratio < 1 - spec.clip_low and row.advantages[t] < 0
            sums["high"] += row.trained and ratio > 1 + spec.clip_high and row.advantages[t] > 0
            ratios.append(ratio)
            gaps.append(abs(old[t] - sampled[t]))
        sums["tokens"] += len(lp)
        sums["trained"] += len(lp) * row.trained
        with torch.no_grad():
            ids = torch.tensor([row.tokens.prompt + row.tokens.response])
            p = (model.lm(input_ids=ids).logits[0] / TEMPERATURE).log_softmax(-1)
        sums["entropy"] += float(-(p.exp() * p).sum(-1)[len(row.tokens.prompt) - 1 : -1].sum())
    assert sums["low"] > 0
    assert sums["high"] > 0
    tokens = sums["tokens"]
    expected = {
        "kl/ref_k1": sums["k1"] / len(rows),
        "kl/ref_k3": sums["k3"] / len(rows),
        "kl/approx": sums["approx"] / tokens,
        "mismatch/mean": sums["mismatch"] / tokens,
        "mismatch/k3": sums["mismatch_k3"] / tokens,
        "mismatch/max": max(gaps),
        "ratio/mean": sum(ratios) / tokens,
        "ratio/min": min(ratios),
        "ratio/max": max(ratios),
        "entropy": sums["entropy"] / tokens,
        "clip/low": sums["low"] / sums["trained"],
        "clip/high": sums["high"] / sums["trained"],
    }
    for metric, value in expected.items():
        assert metrics[metric] == pytest.approx(value, rel=1e-4 if "mismatch" in metric else 1e-6), metric
