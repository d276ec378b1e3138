"""Router metrics of a mixture-of-experts policy, for any objective.

Example:
    >>> pad_choices([torch.ones(1, 1, 1), torch.ones(2, 1, 1)], time=2).flatten().tolist()
    [1.0, 0.0, 1.0, 1.0]
"""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.errors import ConfigError
from posttrain.models.checkpointing import recomputed_layers
from posttrain.models.policy import Policy
from posttrain.models.routing import Routing
from posttrain.objectives.reduce import masked_sum
from posttrain.objectives.routing import changed_choices, expert_loads
from posttrain.training.sums import Terms


def add_routing(terms: Terms, routing: Routing | None, mask: Tensor, count: str, before: Tensor | None = None) -> None:
    """Add router metrics over the tokens under `mask`; the count named `count` is their number in the step.

    Args:
        before: [batch, time, layers, experts per token] choices of the old policy, if available.
    """
    if routing is None:
        return
    terms.metrics["router/entropy"] = (masked_sum(routing.entropy, mask), count)
    terms.histograms["router/load_max"] = expert_loads(routing.chosen, mask, routing.experts)
    if before is not None:
        terms.metrics["router/changed"] = (masked_sum(changed_choices(routing.chosen, before), mask), count)


def require_replay(policy: Policy) -> None:
    """Raise ConfigError if routing cannot be replayed: in a dense model, or if the backward pass routes again by itself."""
    if not policy.routers:
        raise ConfigError("options.router_replay: has no effect on a dense model, which has no routers. Remove it.")
    if recomputed_layers(policy.lm):
        raise ConfigError(
            "options.router_replay: the backward pass of compute.gradient_checkpointing would route without it. Turn one of them off."
        )


def pad_choices(rows: list[Tensor], time: int) -> Tensor:
    """Pad choices [time, layers, experts per token] of uneven length to [batch, time, layers, experts per token]."""
    padded = torch.zeros(len(rows), time, *rows[0].shape[1:], dtype=rows[0].dtype)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return padded
