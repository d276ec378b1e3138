"""A model's weights as an ordinary transformers model holds them: adapters added to their layers, shards gathered.

Example:
    >>> from posttrain.models.tiny import TinyShape, tiny_model
    >>> model, _ = tiny_model(TinyShape(hidden_size=16, intermediate_size=16, layers=1, heads=2, kv_heads=1), seed=0)
    >>> head_name(model), plain_state(model, torch.bfloat16)["lm_head.weight"].dtype
    ('lm_head.weight', torch.bfloat16)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from posttrain.models.quantised import QuantisedLinear


def plain_state(lm: PreTrainedModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return `lm.state_dict()` without adapters: those of peft are added to their weights.

    Every process of a sharded model must call it. Gathered weights are not split again, as `state_dict` would do.
    """
    adapted = {adapted_weight(path, module): module for path, module in adapted_modules(lm)}
    state = {}
    for name, tensor in _tensors(lm):
        if ".lora_" in name:
            continue
        plain = name.replace("base_layer.", "")
        whole = _whole(tensor)
        if plain in adapted:
            layer: Any = adapted[plain]
            whole = whole + sum(_whole(layer.get_delta_weight(adapter)) for adapter in layer.active_adapters)
        state[plain] = whole.to(dtype)
    return state


def adapted_modules(lm: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield path and module of every weight's adapter; those of several weights of one module are nested."""
    for path, module in lm.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "get_delta_weight"):
            yield path, module


def adapted_weight(path: str, module: Any) -> str:
    """Return the name that the weight of an adapter has in a model without adapters."""
    return f"{path}.".replace("base_layer.", "") + getattr(module, "parameter_name", "weight")


def _whole(tensor: Any) -> Tensor:
    gathered: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return gathered


def _tensors(lm: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in lm.named_parameters(remove_duplicate=False):
        yield name, parameter.detach()
    for path, module in lm.named_modules():
        if isinstance(module, QuantisedLinear):
            yield f"{path}.weight", module.weight.detach()
        for name, buffer in module.named_buffers(path, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                yield name, buffer


def head_name(lm: PreTrainedModel) -> str:
    """Return the name of the output head's weight in the state dict."""
    head = lm.get_output_embeddings()
    return next(f"{name}.weight" for name, module in lm.named_modules() if module is head)


def trained_names(lm: PreTrainedModel) -> set[str]:
    """Return the names in `plain_state` whose values training changes.

    Example:
        >>> from posttrain.models.tiny import TinyShape, tiny_model
        >>> model, _ = tiny_model(TinyShape(hidden_size=16, intermediate_size=16, layers=1, heads=2, kv_heads=1), seed=0)
        >>> for name, parameter in model.named_parameters():
        ...     parameter.requires_grad_(name.endswith("q_proj.weight"))  # doctest: +ELLIPSIS
        Parameter...
        >>> trained_names(model)
        {'model.layers.0.self_attn.q_proj.weight'}
    """
    modules = dict(lm.named_modules())
    names = set()
    for name, parameter in lm.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            layer, adapter, _ = name.partition(".lora_")
            names.add(adapted_weight(layer, modules[layer]) if adapter else name.replace("base_layer.", ""))
    return names
