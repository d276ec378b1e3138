"""The on-policy objective: one function for PPO, GRPO, GSPO, DAPO, CHORD and every point between (objectives/*)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from posttrain.algorithms.specs import OnPolicy
from posttrain.data.batches import collate, pad
from posttrain.data.tokens import Tokens
from posttrain.models.policy import PolicyOutput
from posttrain.objectives.gae import value_loss
from posttrain.objectives.kl import kl_estimate, kl_metric
from posttrain.objectives.policy import policy_loss
from posttrain.objectives.reduce import aggregate, denominator, masked_extremes, masked_sum
from posttrain.objectives.sequence import negative_log_likelihood, token_weight
from posttrain.objectives.surrogate import mismatch_weight
from posttrain.training.routing import add_routing, pad_choices
from posttrain.training.sums import Terms

MISMATCH_LIMIT = 0.5
"""Mean |log p of the trainer - log p of the sampler| per token, in nats. Rounding in bfloat16 gives at most 0.05; a sampler with
other weights gives 1 or more.
"""


@dataclass(frozen=True)
class Experience:
    """A sampled response with the data of its update; arrays are [time] float32.

    Attributes:
        rollout_logprobs: log-probabilities reported by the sampler.
        old_logprobs: the same, recomputed by the trainer; None means "as in this forward pass", for the one exactly on-policy update.
        ref_logprobs: None if the step does not measure the KL to the reference.
        old_routing: [time, layers, experts per token] ids chosen by the old policy, if it is a mixture of experts.
        trained: False keeps the response out of the loss (masked truncation).
        weight: 1 - mu; 1 without an expert stream.
    """

    tokens: Tokens
    advantages: np.ndarray
    rollout_logprobs: np.ndarray
    ref_logprobs: np.ndarray | None
    old_logprobs: np.ndarray | None = None
    old_routing: np.ndarray | None = None
    old_values: np.ndarray | None = None
    returns: np.ndarray | None = None
    trained: bool = True
    weight: float = 1.0


@dataclass(frozen=True)
class Demonstration:
    """An expert's response; weight is mu."""

    tokens: Tokens
    weight: float


OnPolicyRow = Experience | Demonstration


class OnPolicyObjective:
    """L = (1-mu) Agg[w S(rho, A) + beta KL] + value_coefficient * value loss + mu mean_expert[phi(p) (-log p)].

    Example:
        >>> from posttrain.algorithms.grpo import GRPO
        >>> objective = OnPolicyObjective(GRPO, max_length=8, temperature=1.0)
        >>> row = Experience(Tokens((1,), (2, 3)), np.ones(2), rollout_logprobs=np.zeros(2), ref_logprobs=np.zeros(2))
        >>> objective.counts([row, row])["tokens"], objective.kl_coefficient
        (4.0, 0.04)
    """

    def __init__(
        self,
        spec: OnPolicy,
        max_length: int,
        temperature: float,
        kl_coefficient: float | None = None,
        staleness: int = 0,
    ) -> None:
        """Create the objective.

        Args:
            max_length: most tokens of an answer.
            temperature: of the sampler.
            staleness: most steps between the weights that sampled an answer and those that it trains. Above 0 the mismatch has no limit,
                because older weights are meant to differ.
        """
        self.staleness = staleness
        self.spec, self.max_length, self.temperature = spec, max_length, temperature
        self.kl_coefficient = spec.kl_coefficient if kl_coefficient is None else kl_coefficient

    def sequences(self, row: OnPolicyRow) -> Sequence[Tokens]:
        return (row.tokens,)

    def counts(self, rows: Sequence[OnPolicyRow]) -> Mapping[str, float]:
        trained = [r for r in rows if isinstance(r, Experience) and r.trained]
        every = [r for r in rows if isinstance(r, Experience)]
        return {
            "tokens": float(sum(r.tokens.loss_tokens for r in trained)),
            "sequences": float(len(trained)),
            "sampled_tokens": float(sum(r.tokens.loss_tokens for r in every)),
            "sampled_sequences": float(len(every)),
            "expert_tokens": float(sum(r.tokens.loss_tokens for r in rows if isinstance(r, Demonstration))),
        }

    def terms(self, model: nn.Module, rows: Sequence[OnPolicyRow]) -> Terms:
        device = next(model.parameters()).device
        sampled = [r for r in rows if isinstance(r, Experience)]
        experts = [r for r in rows if isinstance(r, Demonstration)]
        laid_out = collate([*(r.tokens for r in sampled), *(r.tokens for r in experts)])
        terms, split = Terms(), len(sampled)
        given = _columns(sampled, laid_out.mask.shape[1])
        if experts:
            # the expert stream imitates text, so it is trained at temperature 1 as in SFT
            given["temperature"] = torch.tensor([self.temperature] * split + [1.0] * len(experts), dtype=torch.float64)
        batch, moved = laid_out.with_columns(given, device)
        columns = _Columns(sampled, batch.mask[:split], moved)
        replayed = columns.old_routing if self.spec.router_replay else None
        output = model(batch, moved.get("temperature", self.temperature), replayed)
        # without a sampled row these are zeros with a graph, because all-reduce needs a gradient of every parameter on every rank
        self._policy_terms(terms, output[:split], columns)
        if experts:
            self._expert_terms(terms, output[split:].logprobs, batch.mask[split:], experts[0].weight)
        return terms

    def _policy_terms(self, terms: Terms, output: PolicyOutput, columns: _Columns) -> None:
        spec, logprobs, mask = self.spec, output.logprobs, columns.mask
        old = logprobs.detach() if columns.old_logprobs is None else columns.old_logprobs
        anchor = columns.rollout_logprobs if spec.anchor == "rollout" else old
        surrogate, ratio = policy_loss(spec, logprobs, anchor, columns.advantages, mask)
        correction = mismatch_weight(old, columns.rollout_logprobs, mask, spec.mismatch, spec.mismatch_cap)
        loss = correction * surrogate.loss
        if spec.entropy_coefficient:
            loss = loss - spec.entropy_coefficient * output.entropy
        if spec.kl == "loss":
            assert columns.ref_logprobs is not None
            loss = loss + self.kl_coefficient * kl_estimate(logprobs, columns.ref_logprobs, spec.kl_estimator)
        trained = mask & columns.trained[:, None]
        numerator = aggregate(columns.weight * loss, trained, spec.aggregate, self.max_length)
        terms.losses["policy"] = (numerator, denominator(spec.aggregate), 1.0)
        if output.values is not None and columns.returns is not None and columns.old_values is not None:
            error = value_loss(output.values, columns.old_values, columns.returns, spec.value_clip)
            terms.losses["value"] = (masked_sum(error, trained), "tokens", spec.value_coefficient)
            terms.metrics["value/loss"] = (masked_sum(error, trained), "tokens")
        terms.metrics["clip/low"] = (masked_sum(surrogate.clipped_low.float(), trained), "tokens")
        terms.metrics["clip/high"] = (masked_sum(surrogate.clipped_high.float(), trained), "tokens")
        if spec.mismatch in ("mask", "seq_mask"):
            terms.metrics["mismatch/masked"] = (masked_sum((correction == 0).float(), trained), "tokens")
        self._diagnostics(terms, output, columns, old, ratio.detach())
        add_routing(terms, output.routing, mask, "sampled_tokens", columns.old_routing)

    def _diagnostics(self, terms: Terms, output: PolicyOutput, columns: _Columns, old: Tensor, ratio: Tensor) -> None:
        mask, logprobs = columns.mask, output.logprobs.detach()
        mismatch = old - columns.rollout_logprobs
        terms.metrics |= {
            "entropy": (masked_sum(output.entropy, mask), "sampled_tokens"),
            "kl/approx": (masked_sum(kl_metric(old, logprobs), mask), "sampled_tokens"),
            "ratio/mean": (masked_sum(ratio, mask), "sampled_tokens"),
            "mismatch/mean": (masked_sum(mismatch.abs(), mask), "sampled_tokens"),
            "mismatch/k3": (masked_sum(kl_metric(columns.rollout_logprobs, old), mask), "sampled_tokens"),
        }
        if columns.ref_logprobs is not None:
            terms.metrics |= {
                "kl/ref_k1": (masked_sum(logprobs - columns.ref_logprobs, mask), "sampled_sequences"),
                "kl/ref_k3": (masked_sum(kl_metric(logprobs, columns.ref_logprobs), mask), "sampled_sequences"),
            }
        if not self.staleness:
            terms.limits["mismatch/mean"] = (MISMATCH_LIMIT, "the sampler uses other weights than the trainer")
        if columns.tokens:
            smallest, largest = masked_extremes(ratio, mask)
            terms.extremes |= {
                "ratio/min": smallest,
                "ratio/max": largest,
                "mismatch/max": masked_extremes(mismatch.abs(), mask)[1],
            }

    def _expert_terms(self, terms: Terms, logprobs: Tensor, mask: Tensor, mu: float) -> None:
        loss = masked_sum(negative_log_likelihood(logprobs, self.spec.phi), mask)
        terms.losses["expert"] = (loss, "expert_tokens", mu)
        terms.metrics["expert/loss"] = (loss, "expert_tokens")
        terms.metrics["expert/phi"] = (masked_sum(token_weight(logprobs, self.spec.phi), mask), "expert_tokens")


def _columns(rows: Sequence[Experience], time: int) -> dict[str, Tensor]:
    """Return the rows' data as padded tensors [batch, time], without those that the rows do not have."""

    def padded(arrays: Sequence[np.ndarray | None]) -> Tensor | None:
        given = [a for a in arrays if a is not None]
        return pad(given, time) if len(given) == len(rows) else None

    routing = [torch.from_numpy(r.old_routing) for r in rows if r.old_routing is not None]
    columns = {
        "advantages": pad([r.advantages for r in rows], time),
        "rollout_logprobs": pad([r.rollout_logprobs for r in rows], time),
        "ref_logprobs": padded([r.ref_logprobs for r in rows]),
        "old_logprobs": padded([r.old_logprobs for r in rows]),
        "old_routing": pad_choices(routing, time) if routing and len(routing) == len(rows) else None,
        "old_values": padded([r.old_values for r in rows]),
        "returns": padded([r.returns for r in rows]),
        "trained": torch.tensor([r.trained for r in rows], dtype=torch.bool),
        "weight": torch.tensor([r.weight for r in rows])[:, None],
    }
    return {name: column for name, column in columns.items() if column is not None}


class _Columns:
    """The rows' data as padded tensors [batch, time] on the device of their mask.

    Attributes:
        tokens: number of tokens under the mask.
    """

    def __init__(self, rows: Sequence[Experience], mask: Tensor, moved: Mapping[str, Tensor]) -> None:
        self.mask, self.tokens = mask, sum(r.tokens.loss_tokens for r in rows)
        self.advantages, self.rollout_logprobs = moved["advantages"], moved["rollout_logprobs"]
        self.trained, self.weight = moved["trained"], moved["weight"]
        self.ref_logprobs, self.old_logprobs = moved.get("ref_logprobs"), moved.get("old_logprobs")
        self.old_values, self.returns, self.old_routing = map(moved.get, ("old_values", "returns", "old_routing"))
