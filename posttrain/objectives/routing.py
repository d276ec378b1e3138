"""Load balance of a mixture of experts, and the change of its choices between two policies.

Example:
    Two tokens, one layer, one of three experts each:

    >>> chosen = torch.tensor([[[[0]], [[2]]]])
    >>> expert_loads(chosen, torch.ones(1, 2, dtype=torch.bool), experts=3).tolist()
    [[1, 0, 1]]
    >>> changed_choices(chosen, torch.tensor([[[[0]], [[1]]]])).tolist()
    [[0.0, 1.0]]
"""

from __future__ import annotations

import torch
from torch import Tensor


def expert_loads(chosen: Tensor, mask: Tensor, experts: int) -> Tensor:
    """Return how often each expert of each layer was chosen under the mask, [layers, experts].

    Args:
        chosen: [batch, time, layers, experts per token] ids.
        mask: [batch, time].
    """
    layers = chosen.shape[-2]
    # every position is added, with 0 outside the mask: a selection by the mask would make a GPU wait
    within = mask[..., None, None].expand(chosen.shape)
    ids = torch.where(within, chosen, 0).long() + experts * torch.arange(layers, device=chosen.device)[:, None]
    loads = torch.zeros(layers * experts, dtype=torch.long, device=chosen.device)
    return loads.scatter_add_(0, ids.flatten(), within.flatten().long()).view(layers, experts)


def changed_choices(chosen: Tensor, before: Tensor) -> Tensor:
    """Return the share of layers [batch, time] in which a token's set of experts changed; ids must be in ascending order."""
    return (chosen != before).any(-1).float().mean(-1)
