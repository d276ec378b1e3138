"""The folder that servers load: the policy's weights at one version, complete or absent.

Example:
    >>> from posttrain.models.tiny import TinyShape, tiny_model
    >>> model, _ = tiny_model(TinyShape(hidden_size=16, intermediate_size=16, layers=1, heads=2, kv_heads=1), seed=0)
    >>> head_name(model), plain_state(model, torch.bfloat16)["lm_head.weight"].dtype
    ('lm_head.weight', torch.bfloat16)
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from posttrain.errors import RolloutError
from posttrain.files import replace


def write_weights(lm: PreTrainedModel, state: Mapping[str, Tensor], folder: Path) -> None:
    """Write `state`, the result of `plain_state`, and the model's configuration.

    An output head that is tied to the input embeddings is written as a separate weight, and the configuration sets it untied: vLLM (0.32)
    stores the head of a tied model in a different layout, and `reload_weights` does not renew that copy.

    Raises:
        RolloutError: the disk is full or read-only.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    weights, head = dict(state), head_name(lm)
    # save_pretrained leaves out weights that share memory, so the head must be a clone
    weights[head] = weights[head].clone()
    try:
        lm.save_pretrained(partial, state_dict=weights, max_shard_size="1000TB")
        _untie(partial / "config.json")
        replace(partial, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise RolloutError(
            f"cannot write the weights for the vLLM server to {folder}: {error}. Free space or give the right to write"
            " there, then run again."
        ) from error


def plain_state(lm: PreTrainedModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return `lm.state_dict()` without adapters: those of peft are added to their layers.

    Every process of a sharded model must call it. Gathered weights are not split again, as `state_dict` would do.
    """
    modules = dict(lm.named_modules())
    state = {}
    for name, tensor in _tensors(lm):
        if ".lora_" in name:
            continue
        path, base, leaf = name.rpartition("base_layer.")
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        if base and leaf == "weight":
            layer: Any = modules[path[:-1]]
            whole = whole + sum(layer.get_delta_weight(adapter) for adapter in layer.active_adapters)
        state[path + leaf] = whole.to(dtype)
    return state


def _tensors(lm: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in lm.named_parameters(remove_duplicate=False):
        yield name, parameter.detach()
    for path, module in lm.named_modules():
        for name, buffer in module.named_buffers(path, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                yield name, buffer


def head_name(lm: PreTrainedModel) -> str:
    """Return the name of the output head's weight in the state dict."""
    head = lm.get_output_embeddings()
    return next(f"{name}.weight" for name, module in lm.named_modules() if module is head)


def _untie(config: Path) -> None:
    values = json.loads(config.read_text(encoding="utf-8"))
    values["tie_word_embeddings"] = False
    config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
