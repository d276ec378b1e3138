"""Rows and objectives of supervised fine-tuning and the reward model (objectives/sequence.py, objectives/preference.py).

Example:
    >>> SupervisedObjective().counts([Example(Tokens((1,), (2, 3)), weight=2.0), Example(Tokens((1,), (2,)))])
    {'tokens': 3.0, 'weighted_tokens': 5.0}
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Literal

import torch
from torch import nn

from posttrain.data.batches import EpochOrder, collate, pad
from posttrain.data.layout import ending
from posttrain.data.tokens import Tokens
from posttrain.objectives.preference import bradley_terry
from posttrain.objectives.reduce import masked_sum
from posttrain.objectives.sequence import negative_log_likelihood
from posttrain.training.routing import add_routing
from posttrain.training.source import StepData
from posttrain.training.sums import Terms
from posttrain.training.trainer import Row


class EpochSource(Generic[Row]):
    """Rows in shuffled epochs; each step has one batch and so one update."""

    def __init__(self, rows: Sequence[Row], order: EpochOrder) -> None:
        self.rows, self.order = rows, order

    def next(self, step: int) -> StepData[Row]:
        return StepData([[self.rows[i] for i in self.order.indices(step)]])

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Do nothing: the order is a pure function of seed and step."""


class RowSource(EpochSource[Sequence[Row]], Generic[Row]):
    """As EpochSource, of rows that are several examples: a batch has all examples of its rows."""

    def next(self, step: int) -> StepData[Any]:
        return StepData([[example for i in self.order.indices(step) for example in self.rows[i]]])


@dataclass(frozen=True)
class Example:
    """A prompt and the response to imitate.

    Attributes:
        weight: weight of each of its tokens relative to other rows; not negative.
    """

    tokens: Tokens
    weight: float = 1.0


class SupervisedObjective:
    """L = sum of w (-log p) over response tokens / sum of w: weight 2 equals the row twice, and equal weights have no effect.

    Args:
        train_on: `all` also trains on the prompt, after its first token.
    """

    def __init__(self, train_on: Literal["completion", "all"] = "completion") -> None:
        self.train_on = train_on

    def sequences(self, row: Example) -> Sequence[Tokens]:
        return (self._split(row.tokens),)

    def counts(self, rows: Sequence[Example]) -> Mapping[str, float]:
        split = [self._split(row.tokens) for row in rows]
        weighted = sum(row.weight * tokens.loss_weight for row, tokens in zip(rows, split, strict=True))
        return {"tokens": float(sum(tokens.loss_tokens for tokens in split)), "weighted_tokens": weighted}

    def terms(self, model: nn.Module, rows: Sequence[Example]) -> Terms:
        device = next(model.parameters()).device
        split = [self._split(row.tokens) for row in rows]
        laid_out = collate(split)
        columns = {"weight": torch.tensor([row.weight for row in rows], dtype=torch.float64)[:, None]}
        if any(tokens.weights is not None for tokens in split):
            own = [tokens.weights or (1.0,) * len(tokens.response) for tokens in split]
            columns["token_weights"] = pad(own, laid_out.mask.shape[1])
        batch, columns = laid_out.with_columns(columns, device)
        output = model(batch)
        weight = columns["weight"].to(output.logprobs.dtype)
        if "token_weights" in columns:
            weight = weight * columns["token_weights"].to(weight.dtype)
        loss = masked_sum(weight * negative_log_likelihood(output.logprobs), batch.mask)
        entropy = masked_sum(output.entropy, batch.mask)
        terms = Terms(losses={"nll": (loss, "weighted_tokens", 1.0)}, metrics={"entropy": (entropy, "tokens")})
        add_routing(terms, output.routing, batch.mask, "tokens")
        return terms

    def _split(self, tokens: Tokens) -> Tokens:
        if self.train_on == "completion":
            return tokens
        return tokens.with_prompt()


@dataclass(frozen=True)
class RewardPair:
    """Two responses to one prompt.

    Attributes:
        margin: score difference that the chosen response should have.
        target: probability that the chosen response is the better one.
        weight: weight of the pair relative to others; above 0.
        heads: weight of the pair for each head of an ensemble, times `weight`; () is 1 for all.
    """

    chosen: Tokens
    rejected: Tokens
    margin: float = 0.0
    target: float = 1.0
    weight: float = 1.0
    heads: tuple[float, ...] = ()

    @property
    def loss_weight(self) -> float:
        """Return the weight of the pair, averaged over the heads."""
        return self.weight * (sum(self.heads) / len(self.heads) if self.heads else 1.0)


def prompts_balanced(pairs: Sequence[RewardPair]) -> list[RewardPair]:
    """Return the pairs with weight 1 / (pairs of the same prompt), so that every prompt counts once (2203.02155, eq. 1)."""
    count = Counter(pair.chosen.prompt for pair in pairs)
    return [replace(pair, weight=1 / count[pair.chosen.prompt]) for pair in pairs]


def heads_bootstrapped(pairs: Sequence[RewardPair], heads: int, seed: int) -> list[RewardPair]:
    """Return the pairs with a weight of 0 or 2 for each head, drawn by prompt, so that heads learn from different halves of the prompts.

    Every prompt is learnt by some head, and every head learns from some prompt.
    """
    rng = random.Random(f"heads/{seed}")
    weights: dict[tuple[int, ...], tuple[float, ...]] = {}
    for place, prompt in enumerate(dict.fromkeys(pair.chosen.prompt for pair in pairs)):
        drawn = [rng.choice((0.0, 2.0)) for _ in range(heads)]
        drawn[place % heads] = 2.0
        weights[prompt] = tuple(drawn)
    return [replace(pair, heads=weights[pair.chosen.prompt]) for pair in pairs]


class RewardObjective:
    """Bradley-Terry loss, a weighted mean over pairs, with the sum of scores held near zero by `center`.

    Chosen and rejected share one forward pass. An ensemble's loss is the mean of its heads' losses.
    """

    def __init__(self, center: float = 0.01) -> None:
        self.center = center

    def sequences(self, row: RewardPair) -> Sequence[Tokens]:
        return (row.chosen, row.rejected)

    def counts(self, rows: Sequence[RewardPair]) -> Mapping[str, float]:
        return {"pairs": float(len(rows)), "pair_weight": sum(row.loss_weight for row in rows)}

    def terms(self, model: nn.Module, rows: Sequence[RewardPair]) -> Terms:
        device = next(model.parameters()).device
        laid_out = collate([r.chosen for r in rows] + [r.rejected for r in rows])
        heads = max(len(r.heads or (1.0,)) for r in rows)
        columns = {
            "margin": torch.tensor([[r.margin] for r in rows], dtype=torch.float64),
            "target": torch.tensor([[r.target] for r in rows], dtype=torch.float64),
            "weight": torch.tensor(
                [[r.weight * head for head in r.heads or (1.0,) * heads] for r in rows], dtype=torch.float64
            ),
        }
        batch, columns = laid_out.with_columns(columns, device, ending)
        scores = model(batch)
        scores = scores.view(len(scores), -1)
        chosen, rejected = scores[: len(rows)], scores[len(rows) :]  # [pairs, heads]
        margin, target, weight = (columns[name].to(scores.dtype) for name in ("margin", "target", "weight"))
        loss = (weight * bradley_terry(chosen, rejected, margin, target, self.center)).mean(-1).sum()
        chosen, rejected = chosen.mean(-1), rejected.mean(-1)
        return Terms(
            losses={"pairs": (loss, "pair_weight", 1.0)},
            metrics={
                "preference/accuracy": ((chosen > rejected).float().sum(), "pairs"),
                "preference/margin": ((chosen - rejected).sum(), "pairs"),
                "preference/chosen_reward": (chosen.sum(), "pairs"),
                "preference/rejected_reward": (rejected.sum(), "pairs"),
            },
        )
