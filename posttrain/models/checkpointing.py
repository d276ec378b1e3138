"""Activation checkpointing: a layer keeps its input alone, and the backward pass computes the rest a second time."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from posttrain.errors import ModelError


def recompute_layers(model: PreTrainedModel) -> None:
    """Let every decoder layer of `model` be computed again in the backward pass. Raises ModelError where that cannot be."""
    if not model.supports_gradient_checkpointing:
        raise ModelError(
            f"{type(model).__name__} cannot compute its layers a second time; set compute.gradient_checkpointing: false"
        )
    model.activation_checkpointing_enable({"use_reentrant": False})


def recomputed_layers(model: nn.Module) -> list[nn.Module]:
    """Those that are computed again while their own `training` says so; what is inside them may stay without dropout."""
    return [
        module
        for module in model.modules()
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing
    ]
