"""Record which experts a mixture-of-experts model chooses for each token, from its routers during the forward pass.

Recording costs an entropy and a sort per router. It costs nothing for a dense model, which has no routers.

Example:
    >>> from posttrain.models.tiny import TinyShape, tiny_model
    >>> shape = TinyShape(hidden_size=16, intermediate_size=16, layers=1, heads=2, kv_heads=1, experts=4)
    >>> model, _ = tiny_model(shape, seed=0)
    >>> with reading(routers_of(model)) as read:
    ...     _ = model(torch.tensor([[5, 6, 7]]))
    >>> read.logits[0].shape, read.chosen[0].shape
    (torch.Size([3, 4]), torch.Size([3, 2]))
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from posttrain.data.batches import TokenBatch


@dataclass(frozen=True)
class Routing:
    """Routing of every response token; positions outside the batch's mask are undefined.

    Attributes:
        entropy: [batch, time] entropy of the routers' distributions over `experts` experts, in nats, averaged over layers.
        chosen: [batch, time, layers, experts per token] int16 ids in ascending order.
    """

    entropy: Tensor
    chosen: Tensor
    experts: int

    def __getitem__(self, rows: slice) -> Routing:
        return Routing(self.entropy[rows], self.chosen[rows], self.experts)


def routers_of(lm: PreTrainedModel) -> tuple[nn.Module, ...]:
    """Return the routers whose outputs transformers records for this architecture, in order of layers; empty for a dense model."""
    recorded = getattr(lm.base_model, "_can_record_outputs", None) or {}
    kind = recorded.get("router_logits")
    kind = getattr(kind, "target_class", kind)
    return tuple(module for module in lm.base_model.modules() if isinstance(kind, type) and isinstance(module, kind))


@dataclass
class Reading:
    """Router outputs of one forward pass, one entry per layer: logits [tokens, experts], chosen ids [tokens, experts per token]."""

    logits: list[Tensor]
    chosen: list[Tensor]

    def at(self, batch: TokenBatch) -> Routing | None:
        """Return the routing of the tokens that predict the batch's responses. None without routers, or if they do not name experts."""
        if not self.chosen:
            return None
        packed = len(self.chosen[0]) == len(batch.input_ids)
        index = batch.source if packed else batch.place[batch.source]
        entropies = [_entropy(logits[index]) for logits in self.logits]
        chosen = [ids[index].sort(-1).values.to(torch.int16) for ids in self.chosen]
        return Routing(torch.stack(entropies).mean(0), torch.stack(chosen, -2), self.logits[0].shape[-1])


@contextmanager
def reading(routers: Sequence[nn.Module]) -> Iterator[Reading]:
    """Collect the outputs of `routers` inside the block."""
    read = Reading([], [])

    def note(router: nn.Module, inputs: Any, output: Any) -> None:
        ids = [part for part in output if not part.is_floating_point()] if isinstance(output, tuple) else []
        if len(ids) == 1:
            read.logits.append(output[0].detach())
            read.chosen.append(ids[0])

    handles = [router.register_forward_hook(note) for router in routers]
    try:
        yield read
    finally:
        for handle in handles:
            handle.remove()


def _entropy(logits: Tensor) -> Tensor:
    logprobs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)
