"""A model's last layer for those tokens alone whose hidden states are read: of the others it needs keys and values, and no more.

What a layer does to each token by itself, its queries, the projection of its attention and its feed-forward network, is left out where
nobody looks: most of a layer for a long prompt, nearly all of it for a reward model, which reads one token a row. Exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from posttrain.models.routing import routers_of

ALONE = ("q_proj", "o_proj", "mlp")
"""Parts of a layer, by the names that most architectures give them, that compute each token by itself."""


class NarrowLayer:
    """Hooks on a layer that is handed `reads`; without, it computes every token. keep: whether they stay."""

    def __init__(self, layer: nn.Module) -> None:
        self.keep = False
        self.tokens: Tensor | None = None
        self.count = 0
        self.handles: list[RemovableHandle] = [layer.register_forward_pre_hook(self._enter, with_kwargs=True)]
        for name, module in layer.named_modules():
            if name.rpartition(".")[2] in ALONE:
                self.handles.append(module.register_forward_pre_hook(self._take))
                self.handles.append(module.register_forward_hook(self._put_back))

    def _enter(self, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
        """A layer that is computed again in the backward pass comes by here again."""
        reads = kwargs.get("reads")
        self.tokens = None if reads is None else reads.tokens
        return args, kwargs if reads is None else {**kwargs, "parts": reads.parts}

    def _take(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self.tokens is None:
            return args
        if not args or args[0].dim() != 3:
            raise TypeError(f"{type(module).__name__} is not handed one row of tokens")
        self.count = args[0].shape[1]
        return (args[0].index_select(1, self.tokens), *args[1:])

    def _put_back(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """0 for tokens that were left out."""
        if self.tokens is None:
            return output
        if not isinstance(output, Tensor):
            raise TypeError(f"{type(module).__name__} makes more of its tokens than states")
        return output.new_zeros(1, self.count, output.shape[2]).index_copy(1, self.tokens, output)

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def layers_of(model: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    """The decoder layers of a model that is made as most are; none otherwise."""
    return [module for module in model.base_model.modules() if isinstance(module, GradientCheckpointingLayer)]


def may_be_narrow(model: PreTrainedModel) -> nn.Module | None:
    """The last layer. A mixture of experts has none that could be: its routers are asked about every token."""
    layers = layers_of(model)
    return layers[-1] if layers and not routers_of(model) else None


@contextmanager
def narrow_last_layer(model: PreTrainedModel) -> Iterator[NarrowLayer]:
    """A narrow last layer to be tried; afterwards it is as it was, unless `keep` has been set."""
    narrowed = NarrowLayer(may_be_narrow(model) or nn.Identity())
    try:
        yield narrowed
    finally:
        if not narrowed.keep:
            narrowed.remove()
