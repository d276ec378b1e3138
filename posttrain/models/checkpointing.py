"""Activation checkpointing: each layer keeps only its input, and the backward pass computes the rest a second time.

Example:
    >>> from posttrain.models.tiny import TinyShape, tiny_model
    >>> model, _ = tiny_model(TinyShape(hidden_size=16, intermediate_size=16, layers=2, heads=2, kv_heads=1), seed=0)
    >>> recompute_layers(model)
    >>> len(recomputed_layers(model))
    2
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from posttrain.errors import ModelError

RATES = "_posttrain_dropout_rates"
"""Attribute of a model that recomputes its layers: its configuration's own dropout rates."""


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
    setattr(model, RATES, _zeroed_rates(model.config) | getattr(model, RATES, {}))
    # transformers 5.17, which a GPU box may have, knows only the second name; newer versions call it deprecated
    enable: Any = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _zeroed_rates(config: PreTrainedConfig) -> dict[str, float]:
    """Set every dropout rate of the configuration to 0, which some layers read in each call (Falcon, Bloom); return the former rates."""
    text = config.get_text_config()
    rates = {name: value for name, value in vars(text).items() if isinstance(value, float) and "drop" in name and value}
    for name in rates:
        setattr(text, name, 0.0)
    return rates


@contextmanager
def own_dropout_rates(model: PreTrainedModel) -> Iterator[None]:
    """Give the configuration its own dropout rates inside the block, to save it as it was loaded."""
    text, rates = model.config.get_text_config(), getattr(model, RATES, {})
    for name, value in rates.items():
        setattr(text, name, value)
    try:
        yield
    finally:
        for name in rates:
            setattr(text, name, 0.0)


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
