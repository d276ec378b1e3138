"""Losses of preferences, logged groups, SFT and the reward model against values computed by hand in float64."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from posttrain.algorithms import PRESETS
from posttrain.algorithms.specs import Preference
from posttrain.data.tokens import Tokens
from posttrain.models.policy import Policy
from posttrain.training.preference import Answer, AnswerGroup
from posttrain.training.supervised import prompts_balanced
from tests.training.by_hand import loss_of, token_logprobs
from tests.training.cases import case, probe, with_record


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
