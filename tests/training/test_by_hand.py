"""Whole objectives against sums written out token by token in float64, from the model's full logits."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from posttrain.algorithms import PRESETS, choose
from posttrain.algorithms.specs import OnPolicy, Preference
from posttrain.data.tokens import Tokens
from posttrain.models.policy import Policy
from posttrain.training.onpolicy import Demonstration, Experience
from posttrain.training.preference import Answer, AnswerGroup
from posttrain.training.supervised import prompts_balanced
from tests.training.cases import MAX_LENGTH, case, probe, with_record

TEMPERATURE = 0.8


def token_logprobs(policy: Policy, tokens: Tokens, temperature: float = 1.0) -> list[float]:
    """One row, no padding, no chunks, the model's own logits."""
    with torch.no_grad():
        logits = policy.lm(input_ids=torch.tensor([tokens.prompt + tokens.response])).logits[0] / temperature
    table = logits.log_softmax(-1)
    return [table[len(tokens.prompt) + t - 1, token].item() for t, token in enumerate(tokens.response)]


def token_entropies(policy: Policy, tokens: Tokens) -> list[float]:
    with torch.no_grad():
        logits = policy.lm(input_ids=torch.tensor([tokens.prompt + tokens.response])).logits[0] / TEMPERATURE
    table = logits.log_softmax(-1)[len(tokens.prompt) - 1 : -1]
    return [-sum(lp * math.exp(lp) for lp in row) for row in table.tolist()]


def loss_of(name: str) -> tuple[dict[str, float], Policy, list[Any]]:
    made = case(name, double=True)
    model = made.model()
    return probe(model, 30).update(made.rows, made.objective), model, made.rows


def correction(spec: OnPolicy, row: Experience) -> list[float]:
    """The weight of each token for a sampler that differs from the trainer."""
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


def odds_loss(means: list[float]) -> float:
    """-log sigma(log odds of the chosen - log odds of the rejected), from the mean log-probability of each."""
    chosen, rejected = (math.exp(mean) / (1 - math.exp(mean)) for mean in means)
    return math.log1p(rejected / chosen)


@pytest.mark.parametrize("name", sorted(n for n, r in PRESETS.items() if isinstance(r, Preference)))
def test_every_preference_preset(name: str) -> None:
    spec = PRESETS[name]
    assert isinstance(spec, Preference)
    metrics, model, rows = loss_of(name)
    total, right = 0.0, 0
    for row in rows:
        sides = []
        for answer in (row.chosen, row.rejected):
            lp = token_logprobs(model, answer.tokens)
            log_ratio = sum(lp) - float(answer.ref_logprobs.astype(np.float64).sum())
            sides.append(log_ratio if spec.logit == "sum" else log_ratio / len(lp))
        delta = sides[0] - sides[1]
        right += delta > 0
        x = spec.beta * delta - spec.target_margin
        up, down = math.log1p(math.exp(-x)), math.log1p(math.exp(x))
        target = 1 / (1 + math.exp(-spec.score_scale * row.score_gap))
        total += {
            "dpo": up,
            "dpo_soft": target * up + (1 - target) * down,
            "robust": (0.9 * up - 0.1 * down) / 0.8,
            "ipo": (delta - 1 / (2 * spec.beta)) ** 2,
            "hinge": max(0.0, 1 - x),
            "simpo": up,
            "orpo": 0.1 * odds_loss(sides) - sides[0] if name == "orpo" else 0.0,
        }[name]
    assert metrics["loss"] == pytest.approx(total / len(rows), rel=1e-6)
    assert metrics["preference/accuracy"] == pytest.approx(right / len(rows))


def test_the_nll_of_the_chosen_answer_is_added_to_any_pair_loss() -> None:
    """As in iterative reasoning preference optimisation (2404.19733): DPO plus the mean NLL of the chosen answer."""
    made = case("dpo", double=True)
    plain, added = (
        probe(made.model(), 30).update(made.rows, with_record(made, nll_coefficient=c).objective) for c in (0.0, 0.5)
    )
    model = made.model()
    means = [np.mean(token_logprobs(model, row.chosen.tokens)) for row in made.rows]
    assert added["preference/chosen_nll"] == pytest.approx(-np.mean(means), rel=1e-9)
    assert added["loss"] == pytest.approx(plain["loss"] - 0.5 * np.mean(means), rel=1e-9)


def test_kto() -> None:
    made = case("kto", double=True)
    weighted = with_record(made, desirable_weight=1.5, undesirable_weight=0.7)
    metrics, model = probe(made.model(), 30).update(made.rows, weighted.objective), made.model()
    total, rewards = 0.0, {True: [], False: []}
    for row in made.rows:
        log_ratio = sum(token_logprobs(model, row.answer.tokens)) - float(row.answer.ref_logprobs.astype(float).sum())
        gain = 0.1 * (log_ratio - 0.3) * (1 if row.desirable else -1)
        total += (1.5 if row.desirable else 0.7) * (1 - 1 / (1 + math.exp(-gain)))
        rewards[row.desirable].append(0.1 * log_ratio)
    assert metrics["loss"] == pytest.approx(total / len(made.rows), rel=1e-6)
    assert metrics["unpaired/desirable_reward"] == pytest.approx(np.mean(rewards[True]), rel=1e-6)
    assert metrics["unpaired/undesirable_reward"] == pytest.approx(np.mean(rewards[False]), rel=1e-6)


def test_weighted_pairs_are_normalised_over_the_step() -> None:
    made = case("dpo", double=True)
    weighted = with_record(made, score_weighting="weight")
    singles = [probe(made.model(), 99).update([row], made.objective)["loss"] for row in made.rows]
    gaps = [abs(row.score_gap) for row in made.rows]
    expected = sum(g * loss for g, loss in zip(gaps, singles, strict=True)) / sum(gaps)
    assert probe(made.model(), 30).update(made.rows, weighted.objective)["loss"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "start"), [("dpo", math.log(2)), ("ipo", 1 / (4 * 0.1**2)), ("robust", math.log(2)), ("hinge", 1.0)]
)
def test_preferences_start_at_their_reference(name: str, start: float) -> None:
    made = case(name, double=True)
    model = made.model()

    def at_reference(answer: Answer) -> Answer:
        return replace(answer, ref_logprobs=np.array(token_logprobs(model, answer.tokens)))

    rows = [replace(r, chosen=at_reference(r.chosen), rejected=at_reference(r.rejected)) for r in made.rows]
    assert probe(model, 30).update(rows, made.objective)["loss"] == pytest.approx(start, abs=1e-5 * max(1, start))


def test_logged_groups_start_with_a_loss_of_zero_and_the_gradient_of_the_mean_log_probabilities() -> None:
    """At the reference the ratio is 1 and the KL has no slope: L = -mean(A mean lp) up to a constant."""
    made = case("grpo_pairs", double=True)
    model = made.model()
    assert isinstance(model, Policy)
    answers = [
        (a, s - sum(g.scores) / len(g.scores)) for g in made.rows for a, s in zip(g.answers, g.scores, strict=True)
    ]
    rows = [
        AnswerGroup(
            tuple(Answer(a.tokens, np.array(token_logprobs(model, a.tokens), dtype=np.float32)) for a in g.answers),
            g.scores,
        )
        for g in made.rows
    ]
    trainer = probe(model, 30)
    metrics = trainer.update(rows, made.objective)
    assert metrics["loss"] == pytest.approx(0.0, abs=1e-6)
    expected = torch.zeros((), dtype=torch.float64)
    for answer, advantage in answers:
        ids = torch.tensor([answer.tokens.prompt + answer.tokens.response])
        table = model.lm(input_ids=ids).logits[0].log_softmax(-1)[len(answer.tokens.prompt) - 1 : -1]
        expected = expected - advantage * table.gather(-1, torch.tensor(answer.tokens.response)[:, None]).mean()
    (expected / len(answers)).backward()
    for parameter, value in model.named_parameters():
        assert torch.allclose(trainer.gradient[parameter], value.grad, atol=1e-6), parameter


def test_logged_groups() -> None:
    metrics, model, rows = loss_of("grpo_pairs")
    total, answers, ratios = 0.0, 0, []
    for row in rows:
        mean = sum(row.scores) / len(row.scores)
        for answer, score in zip(row.answers, row.scores, strict=True):
            lp = token_logprobs(model, answer.tokens)
            difference = [a - float(b) for a, b in zip(lp, answer.ref_logprobs, strict=True)]
            ratio, a = math.exp(sum(difference) / len(lp)), score - mean
            ratios.append(ratio)
            surrogate = max(-a * ratio, -a * min(max(ratio, 0.8), 1.2))
            total += surrogate + 0.04 * sum(math.exp(-d) - 1 + d for d in difference) / len(lp)
            answers += 1
    assert metrics["loss"] == pytest.approx(total / answers, rel=1e-6)
    assert [metrics["ratio/min"], metrics["ratio/max"]] == pytest.approx([min(ratios), max(ratios)], rel=1e-6)


def test_a_row_of_weight_2_is_the_row_twice_and_one_weight_for_all_is_none() -> None:
    made = case("sft", double=True)
    first, *others = [replace(row, weight=1.0) for row in made.rows]

    def outcome(rows: list[Any]) -> tuple[float, dict[str, torch.Tensor]]:
        trainer = probe(made.model(), 30)
        return trainer.update(rows, made.objective)["loss"], trainer.gradient

    plain = outcome([first, *others])
    for one, other in [
        (outcome([replace(first, weight=2.0), *others]), outcome([first, first, *others])),
        (outcome([replace(row, weight=0.3) for row in (first, *others)]), plain),
        (outcome([replace(first, weight=0.0), *others]), outcome(others)),
    ]:
        assert one[0] == pytest.approx(other[0], abs=1e-10)
        assert all(torch.allclose(g, other[1][name], atol=1e-10) for name, g in one[1].items())
    assert outcome([replace(first, weight=2.0), *others])[0] != pytest.approx(plain[0], abs=1e-4)


def test_supervised_and_reward() -> None:
    metrics, model, rows = loss_of("sft")
    lps = [(row.weight, lp) for row in rows for lp in token_logprobs(model, row.tokens)]
    assert metrics["loss"] == pytest.approx(-sum(w * lp for w, lp in lps) / sum(w for w, _ in lps), rel=1e-9)

    metrics, model, rows = loss_of("sft_all")
    every = []
    for row in rows:
        whole = Tokens(row.tokens.prompt[:1], row.tokens.prompt[1:] + row.tokens.response)
        every += [(row.weight, lp) for lp in token_logprobs(model, whole)]
    assert len(every) == sum(len(row.tokens) - 1 for row in rows)
    assert metrics["loss"] == pytest.approx(-sum(w * lp for w, lp in every) / sum(w for w, _ in every), rel=1e-9)

    metrics, model, rows = loss_of("reward")

    def score(tokens: Tokens) -> float:
        with torch.no_grad():
            hidden = model.model.model(input_ids=torch.tensor([tokens.prompt + tokens.response])).last_hidden_state
            return float(model.model.score(hidden[0, -1]))

    pairs = [(score(r.chosen), score(r.rejected), r) for r in rows]
    expected = []
    for w, lo, row in pairs:
        x = w - lo - row.margin
        expected.append(row.target * math.log1p(math.exp(-x)) + (1 - row.target) * math.log1p(math.exp(x)))
        expected[-1] += 0.05 * (w + lo) ** 2
    assert metrics["loss"] == pytest.approx(sum(expected) / len(expected), rel=1e-6)
    assert metrics["preference/margin"] == pytest.approx(sum(w - lo for w, lo, _ in pairs) / len(pairs), rel=1e-6)


def test_a_prompt_with_many_pairs_counts_once() -> None:
    made = case("reward", double=True)
    many = [replace(row, chosen=replace(row.chosen, prompt=(9, 9)), rejected=replace(row.rejected, prompt=(9, 9)))
            for row in made.rows[:3]]  # fmt: skip
    rows = prompts_balanced([*many, *made.rows[5:]])
    assert [row.weight for row in rows] == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1.0, 1.0])
    singles = [probe(made.model(), 99).update([replace(row, weight=1.0)], made.objective)["loss"] for row in rows]
    expected = (sum(singles[:3]) / 3 + singles[3] + singles[4]) / 3
    assert probe(made.model(), 12).update(rows, made.objective)["loss"] == pytest.approx(expected, rel=1e-9)
