"""How evenly a mixture of experts is used, and how much of it changed between two policies."""

from __future__ import annotations

import torch
from torch import Tensor


def expert_loads(chosen: Tensor, mask: Tensor, experts: int) -> Tensor:
    """How often each expert of each layer was chosen under the mask, [layers, experts].

    chosen: [batch, time, layers, experts per token] ids. mask: [batch, time].
    """
    layers = chosen.shape[-2]
    ids = chosen[mask].long() + experts * torch.arange(layers, device=chosen.device)[:, None]
    return torch.bincount(ids.flatten(), minlength=layers * experts).view(layers, experts)


def changed_choices(chosen: Tensor, before: Tensor) -> Tensor:
    """Share of layers [batch, time] in which a token's set of experts is another than before; both with ids in ascending order."""
    return (chosen != before).any(-1).float().mean(-1)
