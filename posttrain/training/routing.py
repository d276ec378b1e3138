"""What a mixture-of-experts policy adds to a step's metrics, whatever the objective."""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.models.routing import Routing
from posttrain.objectives.reduce import masked_sum
from posttrain.objectives.routing import changed_choices, expert_loads
from posttrain.training.trainer import Terms


def add_routing(terms: Terms, routing: Routing | None, mask: Tensor, count: str, before: Tensor | None = None) -> None:
    """Router metrics over the tokens under `mask`, of which the step has as many as the count named `count`.

    before: [batch, time, layers, experts per token] the old policy's choices, where there is one.
    """
    if routing is None:
        return
    terms.metrics["router/entropy"] = (masked_sum(routing.entropy, mask), count)
    terms.histograms["router/load_max"] = expert_loads(routing.chosen, mask, routing.experts)
    if before is not None:
        terms.metrics["router/changed"] = (masked_sum(changed_choices(routing.chosen, before), mask), count)


def pad_choices(rows: list[Tensor], time: int) -> Tensor:
    """Choices [time, layers, experts per token] of rows of uneven length as [batch, time, layers, experts per token]."""
    padded = torch.zeros(len(rows), time, *rows[0].shape[1:], dtype=rows[0].dtype)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return padded
