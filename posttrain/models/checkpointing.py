"""Activation checkpointing: each layer keeps only its input, and the backward pass computes the rest a second time.

Example:
    >>> from posttrain.models.tiny import TinyShape, tiny_model
    >>> model, _ = tiny_model(TinyShape(hidden_size=16, intermediate_size=16, layers=2, heads=2, kv_heads=1), seed=0)
    >>> recompute_layers(model)
    >>> len(recomputed_layers(model))
    2
"""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from posttrain.errors import ModelError


def recompute_layers(model: PreTrainedModel) -> None:
    """Make the backward pass recompute every decoder layer of `model`, without dropout: a recomputed layer is in training mode.

    Raises:
        ModelError: the architecture does not support it.
    """
    if not model.supports_gradient_checkpointing:
        raise ModelError(
            f"{type(model).__name__} does not support activation checkpointing; set compute.gradient_checkpointing: false"
        )
    without_dropout(model)
    model.activation_checkpointing_enable({"use_reentrant": False})


def without_dropout(model: nn.Module) -> None:
    """Set every dropout rate to 0: that of dropout modules, and the numbers that functional dropout reads (OPT, BioGPT, XGLM)."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and "drop" in name:
                setattr(module, name, 0.0)


def recomputed_layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers that are recomputed while their own `training` is True; their submodules may stay in evaluation mode."""
    return [
        module
        for module in model.modules()
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing
    ]
