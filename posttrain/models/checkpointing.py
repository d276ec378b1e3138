"""Activation checkpointing: each layer keeps only its input, and the backward pass computes the rest a second time."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from posttrain.errors import ModelError


def recompute_layers(model: PreTrainedModel) -> None:
    """Make the backward pass recompute every decoder layer of `model`.

    Raises:
        ModelError: the architecture does not support it.
    """
    if not model.supports_gradient_checkpointing:
        raise ModelError(
            f"{type(model).__name__} does not support activation checkpointing; set compute.gradient_checkpointing: false"
        )
    model.activation_checkpointing_enable({"use_reentrant": False})


def recomputed_layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers that are recomputed while their own `training` is True; their submodules may stay in evaluation mode."""
    return [
        module
        for module in model.modules()
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing
    ]
