"""Reward models with several heads: loss by hand, disagreement as a penalty, folders, and the critic made of one."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from pipelines.config.params import load_params
from pipelines.config.schema import RewardParams
from pipelines.training.answer_scores import reward_scores, reward_spreads
from posttrain.data.batches import collate
from posttrain.data.tokens import Tokens
from posttrain.errors import DataError, ModelError
from posttrain.models.folders import load_encoder, save_model
from posttrain.models.inference import scores, scores_and_spreads
from posttrain.models.policy import Scorer, token_values
from posttrain.models.scorers import HEADS, PENALTY, load_scorer, mean_head, start_scorer
from posttrain.models.tiny import TinyShape, tiny_model
from posttrain.rewards.sources import ModelReward, RewardBatch
from posttrain.training.supervised import RewardObjective, RewardPair, heads_bootstrapped
from posttrain.training.trainer import OptimizerSettings, Trainer

SHAPE = TinyShape(hidden_size=16, intermediate_size=16, layers=1, heads=2, kv_heads=1)
ROWS = [Tokens((5, 6, 7), (8, 2)), Tokens((5,), (9, 9, 2)), Tokens((6, 6), (3, 2))]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return the folder of an ensemble of three untrained heads with the penalty 2."""
    model, tokenizer = tiny_model(SHAPE, seed=0)
    save_model(model, tokenizer, tmp_path / "lm", "")
    torch.manual_seed(1)
    save_model(start_scorer(tmp_path / "lm", heads=3), tokenizer, tmp_path / "rm", "", {PENALTY: 2.0})
    return tmp_path / "rm"


def test_the_score_is_the_mean_of_the_heads_minus_their_deviation(folder: Path) -> None:
    scorer = Scorer(load_scorer(folder))
    assert (scorer.heads, scorer.penalty) == (3, 2.0)
    with torch.no_grad():
        by_head = scorer(collate(ROWS)).tolist()
        theirs = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        plain = [theirs(torch.tensor([row.prompt + row.response])).logits[0].tolist() for row in ROWS]
    for ours, other, (score, spread) in zip(by_head, plain, scores_and_spreads(scorer, ROWS, 99), strict=True):
        assert ours == pytest.approx(other, abs=1e-6)
        mean = sum(ours) / 3
        deviation = math.sqrt(sum((value - mean) ** 2 for value in ours) / 3)
        assert (score, spread) == pytest.approx((mean - 2 * deviation, deviation), abs=1e-6)
        assert spread > 1e-3
    assert scores(scorer, ROWS, 6) == pytest.approx(scores(scorer, ROWS, 99), abs=1e-6)


def test_texts_are_scored_and_the_heads_differences_are_given_for_ensembles_only(folder: Path) -> None:
    answers = [("1+1=", "2"), ("1+1=", "3" * 300)]
    scorer, encoder = Scorer(load_scorer(folder)), load_encoder(folder)
    ((score, spread),) = scores_and_spreads(scorer, [encoder.pair("1+1=", "2")], 99)
    assert reward_scores(folder, skip_long=True)(answers) == pytest.approx([score])
    assert reward_spreads(folder)(answers[:1]) == pytest.approx([spread])
    with pytest.raises(DataError, match=r"tokens exceed the model's context"):
        reward_scores(folder)(answers)
    language_model = folder.parent / "lm"
    save_model(start_scorer(language_model, heads=1), encoder.tokenizer, folder.parent / "one", "")
    with pytest.raises(DataError, match=r"one head, which cannot disagree; type `posttrain configure reward\.heads=4`"):
        reward_spreads(folder.parent / "one")


def test_an_ensemble_reports_its_disagreement_on_the_answers_that_it_scored(folder: Path) -> None:
    scorer = Scorer(load_scorer(folder))
    source = ModelReward("rm", scorer, mean=0.5, micro_batch_tokens=99)
    assert source.used() == {}
    expected = scores_and_spreads(scorer, ROWS, 99)
    batch = RewardBatch(["p"] * 3, ["a"] * 3, ROWS, {})
    assert source.score(batch) == pytest.approx([score - 0.5 for score, _ in expected])
    assert source.used() == {"disagreement": pytest.approx(sum(spread for _, spread in expected) / 3)}
    assert source.used() == {}


def test_several_labels_without_the_note_of_an_ensemble_are_refused(folder: Path) -> None:
    import json

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config.pop(HEADS) == 3
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ModelError, match="this one has 3 labels"):
        load_scorer(folder)


def test_a_critic_starts_from_the_mean_of_the_heads(folder: Path) -> None:
    scorer = Scorer(load_scorer(folder))
    batch = collate([ROWS[0]])
    with torch.no_grad():
        wanted = float(scorer(batch).mean())
        critic = mean_head(load_scorer(folder))
        assert float(Scorer(critic)(batch)[0]) == pytest.approx(wanted, abs=1e-6)
        assert token_values(critic, batch, packs=False).shape == batch.mask.shape
    assert critic.config.num_labels == 1


class Fixed(nn.Module):
    """Scores of four answers by two heads; the parameter keeps a gradient."""

    def __init__(self, values: list[list[float]]) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.tensor(values, dtype=torch.float64))

    def forward(self, batch: object) -> torch.Tensor:
        return self.values


def test_the_loss_is_the_mean_over_heads_of_each_heads_weighted_loss() -> None:
    def pair(weight: float, *heads: float) -> RewardPair:
        return RewardPair(ROWS[0], ROWS[1], margin=0.25, weight=weight, heads=heads)

    rows = [pair(1.0, 2.0, 0.0), pair(0.5, 2.0, 2.0)]
    # chosen of both pairs, then rejected of both; one column per head
    model = Fixed([[1.0, 0.2], [0.3, -0.4], [0.5, 0.9], [-0.1, 0.6]])
    objective = RewardObjective(center=0.1)
    assert objective.counts(rows) == {"pairs": 2.0, "pair_weight": 1.0 * 1 + 0.5 * 2}
    terms = objective.terms(model, rows)

    def loss(chosen: float, rejected: float) -> float:
        return math.log1p(math.exp(-(chosen - rejected - 0.25))) + 0.1 * (chosen + rejected) ** 2

    by_hand = (2 * loss(1.0, 0.5) + 0.5 * 2 * (loss(0.3, -0.1) + loss(-0.4, 0.6))) / 2
    assert float(terms.losses["pairs"][0].detach()) == pytest.approx(by_hand, abs=1e-12)
    # the second head never sees the first pair
    terms.losses["pairs"][0].backward()
    assert model.values.grad is not None
    assert model.values.grad[0, 1] == model.values.grad[2, 1] == 0
    # accuracy is that of the mean of the heads: .6 against .7, -.05 against .25
    assert float(terms.metrics["preference/accuracy"][0]) == 0.0


def test_equal_weights_of_all_heads_change_nothing_against_none() -> None:
    values = [[1.0, 0.2], [0.3, -0.4], [0.5, 0.9], [-0.1, 0.6]]
    plain = [RewardPair(ROWS[0], ROWS[1], weight=w) for w in (1.0, 0.5)]
    even = [replace(row, heads=(3.0, 3.0)) for row in plain]
    objective = RewardObjective()
    means = []
    for rows in (plain, even):
        total = float(objective.terms(Fixed(values), rows).losses["pairs"][0].detach())
        means.append(total / objective.counts(rows)["pair_weight"])
    assert means[0] == pytest.approx(means[1], abs=1e-12)


def test_heads_learn_from_different_prompts_and_no_prompt_is_left_out() -> None:
    pairs = [RewardPair(Tokens((n,), (a,)), Tokens((n,), (9,))) for n in range(100) for a in (7, 8)]
    drawn = heads_bootstrapped(pairs, 3, seed=0)
    assert drawn == heads_bootstrapped(pairs, 3, seed=0) != heads_bootstrapped(pairs, 3, seed=1)
    assert {weight for pair in drawn for weight in pair.heads} == {0.0, 2.0}
    assert all(any(pair.heads) for pair in drawn)
    assert all(drawn[i].heads == drawn[i + 1].heads for i in range(0, 200, 2))
    columns = list(zip(*(pair.heads for pair in drawn), strict=True))
    # a third of the prompts are certain, the others are drawn at one half: 2/3 of 100 prompts, four standard deviations are 16
    assert all(abs(sum(column) / 4 - 100 * 2 / 3) < 17 for column in columns)
    assert len(set(columns)) == 3


def test_trained_heads_rank_the_pairs_and_stay_different(folder: Path) -> None:
    pairs = [
        RewardPair(Tokens((n, n + 1), (3, 2)), Tokens((n, n + 1), (4, 2))) for n in range(10, 40) for _ in range(2)
    ]
    scorer = Scorer(load_scorer(folder))
    trainer: Trainer[RewardPair] = Trainer(scorer, OptimizerSettings(1e-2), total_steps=30, micro_batch_tokens=999)
    for _ in range(30):
        trainer.update(heads_bootstrapped(pairs, 3, seed=0), RewardObjective())
    gaps = [
        chosen - rejected
        for chosen, rejected in zip(
            scores(scorer, [pair.chosen for pair in pairs], 999),
            scores(scorer, [pair.rejected for pair in pairs], 999),
            strict=True,
        )
    ]
    assert min(gaps) > 0
    with torch.no_grad():
        by_head = scorer(collate([pair.chosen for pair in pairs])) - scorer(collate([pair.rejected for pair in pairs]))
    assert bool((by_head > 0).all())
    assert float(by_head.std(-1).min()) > 1e-3


def test_params_refuse_a_penalty_without_heads(root: Path) -> None:
    given = load_params(root / "params.yaml").reward.model_dump()
    RewardParams(**given | {"heads": 3, "disagreement": 0.5})
    with pytest.raises(ValueError, match="one head never disagrees with itself"):
        RewardParams(**given | {"disagreement": 0.5})
    with pytest.raises(ValueError, match="heads would have no effect"):
        RewardParams(**given | {"heads": 2, "source": "folder"})
