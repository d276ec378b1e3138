"""Compute a model's last layer only for the tokens whose hidden states are read; other tokens need only keys and values there.

Queries, the attention's output projection and the feed-forward network treat each token independently, so they are skipped for tokens
that nothing reads. For a long prompt that is most of a layer; for a reward model, which reads one token a row, nearly all of it.
The result is exact.

Example:
    >>> from posttrain.models.tiny import TinyShape, tiny_model
    >>> model, _ = tiny_model(TinyShape(hidden_size=16, intermediate_size=16, layers=2, heads=2, kv_heads=1), seed=0)
    >>> may_be_narrow(model) is layers_of(model)[1]
    True
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

PER_TOKEN_MODULES = ("q_proj", "o_proj", "mlp")
"""Names, common to most architectures, of the submodules of a layer that treat each token independently."""


class NarrowLayer:
    """Hooks that restrict a layer to the tokens in `reads`, if it is called with `reads`; otherwise it computes every token.

    Attributes:
        keep: if True, the hooks stay after the trial in `narrow_last_layer`.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.keep = False
        self.tokens: Tensor | None = None
        self.count = 0
        self.handles: list[RemovableHandle] = [layer.register_forward_pre_hook(self._enter, with_kwargs=True)]
        self.handles += [
            child.register_forward_pre_hook(self._enter_again, with_kwargs=True) for child in layer.children()
        ]
        for name, module in layer.named_modules():
            if name.rpartition(".")[2] in PER_TOKEN_MODULES:
                self.handles.append(module.register_forward_pre_hook(self._take))
                self.handles.append(module.register_forward_hook(self._put_back))

    def _enter(self, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
        """Note which tokens are read."""
        reads = kwargs.get("reads")
        self.tokens = None if reads is None else reads.tokens
        return args, kwargs if reads is None else {**kwargs, "parts": reads.parts}

    def _enter_again(self, child: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Note it as the layer is recomputed in the backward pass, perhaps after a later batch: only inner modules are called there."""
        reads = kwargs.get("reads")
        if reads is not None:
            self.tokens = reads.tokens

    def _take(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self.tokens is None:
            return args
        if not args or args[0].dim() != 3:
            raise TypeError(f"{type(module).__name__} was not called with one row of tokens")
        self.count = args[0].shape[1]
        return (args[0].index_select(1, self.tokens), *args[1:])

    def _put_back(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """Return the output with 0 for the tokens that were skipped."""
        if self.tokens is None:
            return output
        if not isinstance(output, Tensor):
            raise TypeError(f"{type(module).__name__} returns more than hidden states")
        return output.new_zeros(1, self.count, output.shape[2]).index_copy_(1, self.tokens, output)

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def is_narrow(layer: nn.Module) -> bool:
    """Return True if a layer computes only the tokens that are read when it is called with them."""
    return any(isinstance(getattr(hook, "__self__", None), NarrowLayer) for hook in layer._forward_pre_hooks.values())


def layers_of(model: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    """Return the decoder layers of a model that is built like most are; empty otherwise."""
    return [module for module in model.base_model.modules() if isinstance(module, GradientCheckpointingLayer)]


def may_be_narrow(model: PreTrainedModel) -> nn.Module | None:
    """Return the last layer, or None. A mixture of experts has none: its routers must see every token."""
    layers = layers_of(model)
    return layers[-1] if layers and not routers_of(model) else None


@contextmanager
def narrow_last_layer(model: PreTrainedModel) -> Iterator[NarrowLayer]:
    """Try a narrow last layer; the hooks are removed afterwards unless `keep` has been set."""
    narrowed = NarrowLayer(may_be_narrow(model) or nn.Identity())
    try:
        yield narrowed
    finally:
        if not narrowed.keep:
            narrowed.remove()
        narrowed.handles.clear()  # a model whose hooks hold handles cannot always be copied
