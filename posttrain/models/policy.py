"""Modules that a trainer optimises: a policy with an optional critic, and a scorer. Forward reads only response tokens.

Example:
    >>> from posttrain.data.batches import collate
    >>> from posttrain.data.tokens import Tokens
    >>> from posttrain.models.tiny import TinyShape, tiny_model
    >>> model, _ = tiny_model(TinyShape(hidden_size=16, intermediate_size=16, layers=1, heads=2, kv_heads=1), seed=0)
    >>> output = Policy(model)(collate([Tokens((5, 6), (7, 8, 9)), Tokens((5,), (7,))]))
    >>> output.logprobs.shape, output.logprobs[1, 1:].tolist()
    (torch.Size([2, 3]), [0.0, 0.0])
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from posttrain.combinations import Setup, require
from posttrain.data.batches import TokenBatch
from posttrain.models.context import ContextGroup, active, joined_slices, own_indices
from posttrain.models.deferred import is_deferred
from posttrain.models.head_trial import choice
from posttrain.models.logprobs import product_dtype, selected_logprobs
from posttrain.models.packed import prepare
from posttrain.models.routing import Replay, Routing, reading, routers_of
from posttrain.models.shards import joined
from posttrain.models.trunk import read_states


@dataclass(frozen=True)
class PolicyOutput:
    """Outputs for every response token, [batch, time]; 0 outside the batch's mask.

    Attributes:
        values: None without a critic.
        routing: None unless the policy is a mixture of experts.
    """

    logprobs: Tensor
    entropy: Tensor
    values: Tensor | None = None
    routing: Routing | None = None

    def __getitem__(self, rows: slice) -> PolicyOutput:
        values = None if self.values is None else self.values[rows]
        routing = None if self.routing is None else self.routing[rows]
        return PolicyOutput(self.logprobs[rows], self.entropy[rows], values, routing)


class Policy(nn.Module):
    """A causal language model with an optional critic: its own trunk ("separate") or a value head on the policy ("shared")."""

    def __init__(
        self, lm: PreTrainedModel, critic: PreTrainedModel | None = None, shared_value_head: bool = False
    ) -> None:
        super().__init__()
        self.lm = lm
        self.critic = critic
        self.packs = False
        if not is_deferred(self):
            self.prepare()
        self.routers = routers_of(lm)
        self.value_head: nn.Linear | None = None
        if shared_value_head:
            self.value_head = nn.Linear(lm.config.hidden_size, 1, bias=False)
            nn.init.zeros_(self.value_head.weight)

    def prepare(self) -> None:
        """Try if flat batches give the model's own numbers; padded rows are computed otherwise."""
        self.packs = prepare(self.lm) and (self.critic is None or prepare(self.critic))

    def forward(
        self, batch: TokenBatch, temperature: float | Tensor = 1.0, replayed: Tensor | None = None
    ) -> PolicyOutput:
        """Return log-probabilities, entropy and values of the response tokens.

        Args:
            temperature: one number for all rows, or [batch].
            replayed: [rows, time, layers, experts per token] choices of experts that replace those of the first rows' response tokens.
        """
        replay = None if replayed is None else Replay(batch, replayed)
        trained, group = batch.trained, self._group(batch)
        if group is not None:
            trained = own_indices(trained, group)
        source, targets = (numbers.flatten().index_select(0, trained) for numbers in (batch.source, batch.targets))
        # a shared value head reads the states of all rows, padding included
        index = source if self.value_head is None else torch.cat([source, batch.source.flatten()])
        with reading(self.routers, replay) as routers:
            hidden = read_states(self.lm, batch, self.packs, batch.predicting(), index)
        head: Any = self.lm.get_output_embeddings()
        if isinstance(temperature, Tensor):
            temperature = temperature.index_select(0, trained // batch.mask.shape[1])
        logprobs, entropy = selected_logprobs(
            hidden if self.value_head is None else hidden[: len(source)],
            joined(head.weight),
            head.bias,
            targets,
            temperature,
        )
        if group is not None:
            logprobs, entropy = (joined_slices(each, group, len(batch.trained)) for each in (logprobs, entropy))
        values = None
        if self.critic is not None:
            values = token_values(self.critic, batch, self.packs)
        elif self.value_head is not None:
            own = hidden[len(source) :].unflatten(0, batch.source.shape)
            values = _wide(self.value_head(own.to(self.value_head.weight.dtype)).squeeze(-1))
        return PolicyOutput(scatter(logprobs, batch), scatter(entropy, batch), values, routers.at(batch))

    def _group(self, batch: TokenBatch) -> ContextGroup | None:
        """Return the processes that share the head's work. Raises ConfigError for a mixture of experts, whose routers see one slice."""
        group = active()
        if group is not None and self.routers:
            require(Setup(group.size, context=group.size, experts=True))
        return group if len(batch.trained) else None


def head_name(module: nn.Module, device: torch.device) -> str:
    """Return the name of the functions that compute a policy's head under autocast's dtype; empty for other modules."""
    if not isinstance(module, Policy):
        return ""
    weight: Tensor = cast(nn.Linear, module.lm.get_output_embeddings()).weight
    vocabulary, hidden = weight.shape
    return choice(device, product_dtype(device.type, weight), hidden, vocabulary).name


def token_values(critic: PreTrainedModel, batch: TokenBatch, packs: bool) -> Tensor:
    """Return the value [batch, time] before each response token, from a trunk with one scalar head."""
    hidden = read_states(critic, batch, packs, batch.predicting(), batch.source)
    return _wide(cast(nn.Module, critic.score)(hidden).squeeze(-1))


class Scorer(nn.Module):
    """A reward model: one score per row, read at the last real token and independent of padding.

    Attributes:
        penalty: an ensemble's score is the mean of its heads minus `penalty` times their standard deviation (2310.02743).
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.packs = False
        if not is_deferred(self):
            self.prepare()
        self.penalty = float(getattr(model.config, "reward_disagreement", 0.0))

    def prepare(self) -> None:
        """Try if flat batches give the model's own numbers; padded rows are computed otherwise."""
        self.packs = prepare(self.model)

    def forward(self, batch: TokenBatch) -> Tensor:
        """Return the scores [batch], or [batch, heads] of an ensemble."""
        hidden = read_states(self.model, batch, self.packs, batch.ending(), batch.last)
        return _wide(cast(nn.Module, self.model.score)(hidden).squeeze(-1))

    @property
    def heads(self) -> int:
        """Return the number of heads."""
        return int(cast(nn.Linear, self.model.score).weight.shape[0])

    def combined(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Return one score per row, and the standard deviation of its heads (over n, 0 for one head); both [batch].

        Args:
            scores: as `forward` returns them.
        """
        if scores.dim() == 1:
            return scores, torch.zeros_like(scores)
        spread = scores.std(-1, correction=0)
        return scores.mean(-1) - self.penalty * spread, spread


def _wide(values: Tensor) -> Tensor:
    """Return at least float32; float64 is kept so that identities can be tested to 1e-10."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def scatter(values: Tensor, batch: TokenBatch) -> Tensor:
    """Return the values of the trained tokens as [batch, time], 0 elsewhere."""
    return values.new_zeros(batch.mask.numel()).index_copy_(0, batch.trained, values).view(batch.mask.shape)
