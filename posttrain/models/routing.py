"""Record which experts a mixture-of-experts model chooses for each token, or replay the choices of an earlier policy.

Recording costs an entropy and a sort per router. It costs nothing for a dense model, which has no routers. A replay (routing replay,
2507.18071) gives each response token the experts of the old policy, weighted by the present router's probabilities of them. Its
gradient is that of those weights.

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
from posttrain.errors import ModelError


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
    # pyrefly: ignore[missing-attribute]
    kind = recorded.get("router_logits")
    kind = getattr(kind, "target_class", kind)
    return tuple(module for module in lm.base_model.modules() if isinstance(kind, type) and isinstance(module, kind))


class Replay:
    """Choices of an earlier policy for the response tokens of a batch's first rows.

    Args:
        chosen: [rows, time, layers, experts per token] ids in ascending order, as in `Routing`.
    """

    def __init__(self, batch: TokenBatch, chosen: Tensor) -> None:
        self.batch, self.chosen = batch, chosen
        self.mask = batch.mask[: len(chosen)]

    def output(self, layer: int, router: nn.Module, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the router's output with the replayed experts and their weights, unchanged for tokens that chose them anyway.

        Raises:
            ModelError: the weights of this router are not its probabilities, so those of other experts cannot be computed.
        """
        if len(output) != 3 or output[1].shape != output[2].shape:
            raise ModelError(_UNKNOWN.format(type(router).__name__))
        logits, weights, ids = output
        index = self._index(packed=len(ids) == len(self.batch.input_ids))[: len(self.chosen)][self.mask]
        wanted = ids.sort(-1).values.index_copy(0, index, self.chosen[self.mask][:, layer].to(ids.dtype))
        differs = (wanted != ids.sort(-1).values).any(-1, keepdim=True)
        probabilities = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
        replayed = _like(probabilities, ids, weights, wanted)
        if replayed is None:
            raise ModelError(_UNKNOWN.format(type(router).__name__))
        return logits, torch.where(differs, replayed.to(weights.dtype), weights), torch.where(differs, wanted, ids)

    def _index(self, packed: bool) -> Tensor:
        """Return [batch, time]: which of the tokens that a router sees predicts each response token.

        In padded rows [batch, length] every row has its own copy of a prompt that rows share.
        """
        source = self.batch.source
        if packed:
            return source
        count, length = self.batch.rows.shape
        return length * torch.arange(count, device=source.device)[:, None] + self.batch.positions[source]


_UNKNOWN = (
    "{}: its weights are not its probabilities of the chosen experts, so router_replay cannot compute those of others; set router_replay:"
    " false"
)


def _like(probabilities: Tensor, ids: Tensor, weights: Tensor, wanted: Tensor) -> Tensor | None:
    """Return the weights of the experts `wanted`, computed as the router computed those of `ids`; None if it did in another way."""
    tolerance = 1e-5 if weights.dtype in (torch.float32, torch.float64) else 1e-2
    for own, theirs in (
        (_normalised(probabilities.gather(-1, ids)), _normalised(probabilities.gather(-1, wanted))),
        (probabilities.gather(-1, ids), probabilities.gather(-1, wanted)),
    ):
        if torch.allclose(own.to(weights.dtype), weights, atol=tolerance, rtol=tolerance):
            return theirs
    return None


def _normalised(values: Tensor) -> Tensor:
    return values / values.sum(-1, keepdim=True)


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
def reading(routers: Sequence[nn.Module], replay: Replay | None = None) -> Iterator[Reading]:
    """Collect the routers' own outputs inside the block. With `replay` the model computes with the replayed choices."""
    read = Reading([], [])

    def note(router: nn.Module, inputs: Any, output: Any) -> Any:
        ids = [part for part in output if not part.is_floating_point()] if isinstance(output, tuple) else []
        if len(ids) != 1:
            return None
        read.logits.append(output[0].detach())
        read.chosen.append(ids[0])
        return None if replay is None else replay.output(len(read.chosen) - 1, router, output)

    handles = [router.register_forward_hook(note) for router in routers]
    try:
        yield read
    finally:
        for handle in handles:
            handle.remove()


def _entropy(logits: Tensor) -> Tensor:
    logprobs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)
