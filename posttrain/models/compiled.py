"""Compile the layers of a model with `torch.compile` for training on flat batches; sampling is not compiled."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from posttrain.errors import ModelError
from posttrain.models.last_layer import layers_of, may_be_narrow
from posttrain.models.packed import NAME, Opaque, packed_attention


def compile_layers(model: PreTrainedModel) -> None:
    """Compile each decoder layer for any number of tokens, except a last layer that computes only some of them.

    The packed attention is not compiled, because its parts differ in each batch.

    Raises:
        ModelError: the architecture has no decoder layers of the usual kind.
    """
    layers = layers_of(model)
    if not layers:
        raise ModelError(f"{type(model).__name__} has no decoder layers to compile; set compute.compile: false")
    if torch.are_deterministic_algorithms_enabled():
        _compile_without_clock()
    AttentionInterface.register(NAME, torch.compiler.disable(packed_attention))
    for layer in layers:
        if layer is may_be_narrow(model):
            continue
        layer.forward = _compiled_for_flat_batches(layer.forward)


def _compile_without_clock() -> None:
    """Let the compiler time no candidates on the device where the choice changes numbers; its own switch for it is a different one."""
    config: Any = import_module("torch._inductor.config")
    if hasattr(config, "deterministic"):
        config.deterministic = True


def _compiled_for_flat_batches(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    compiled = torch.compile(forward, dynamic=True)

    def chosen(*args: Any, **kwargs: Any) -> Tensor:
        if kwargs.get("parts") is None:
            return forward(*args, **kwargs)
        # the compiler would compile again for each number of parts, and give up after eight
        hidden = {name: Opaque(kwargs[name]) for name in ("parts", "reads")}
        return compiled(*args, **kwargs | hidden)

    return chosen
