"""FSDP2: weights, gradients and moments are split over processes and gathered layer by layer during the forward pass.

This is torch's own `fully_shard`, enabled by the environment that `accelerate launch` sets for `distributed_type: FSDP`. It also runs
on CPUs, where accelerate itself does not shard.

Example:
    Without shards every function returns its input:

    >>> full({"weight": [torch.tensor(1.0)]})
    {'weight': [tensor(1.)]}
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import register_dataclass
from transformers import PreTrainedModel

from posttrain.data.batches import collate
from posttrain.errors import ConfigError
from posttrain.models.packed import PROBE
from posttrain.models.policy import PolicyOutput
from posttrain.models.routing import Routing

# fully_shard searches a module's output for tensors whose gradient triggers the next gather
register_dataclass(PolicyOutput)
register_dataclass(Routing, drop_field_names=["experts"])


def shards(accelerator: Accelerator) -> bool:
    """Return True if the environment asks for FSDP2 over several processes.

    Raises:
        ConfigError: it asks for FSDP version 1.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true" or accelerator.num_processes == 1:
        return False
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ConfigError(
            "the environment asks for FSDP version 1; set `fsdp_version: 2` in the accelerate configuration"
        )
    return True


def shard(model: nn.Module, accelerator: Accelerator) -> None:
    """Split every decoder layer, and the rest of the model, over all processes; the module stays the same object."""
    # no code here changes an output in place
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    model.to(accelerator.device)
    trunks = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    layers = {name for trunk in trunks for name in trunk._no_split_modules or ()}
    for module in list(model.modules()):
        if type(module).__name__ in layers:
            fully_shard(module, mesh=mesh)
    outermost = fully_shard(model, mesh=mesh)
    # FSDP initialises at the first forward of the outermost module; sampling would call the layers first
    with torch.no_grad():
        model(collate(PROBE).to(accelerator.device))
    outermost.reshard()


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Hold all weights of `model` on every process inside the block, so that it computes without waiting. Costs their memory."""
    units: list[FSDPModule] = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(cast(object, unit) is not model, recurse=False)
            unit.reshard()


def full(tree: Any) -> Any:
    """Gather every split tensor of the tree on the CPU. All processes must call it."""
    if isinstance(tree, DTensor):
        return tree.full_tensor().cpu()
    if isinstance(tree, Mapping):
        return {key: full(value) for key, value in tree.items()}
    return [full(value) for value in tree] if isinstance(tree, list) else tree


def split_weights(weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return the weights as `model` holds them: this process's part of each split weight."""
    held = model.state_dict()
    return {name: split_like(value, held[name]) for name, value in weights.items()}


def split_moments(state: Mapping[str, Any], parameters: Sequence[Tensor]) -> dict[str, Any]:
    """Return an optimiser's state with each moment split like its parameter."""
    moments = {
        index: {
            name: split_like(value, parameters[index]) if value.shape == parameters[index].shape else value
            for name, value in entry.items()
        }
        for index, entry in state["state"].items()
    }
    return {**state, "state": moments}


def split_like(value: Tensor, held: Tensor) -> Tensor:
    """Return `value` split like `held`, or unchanged if `held` is not split."""
    if not isinstance(held, DTensor):
        return value
    return distribute_tensor(value.to(held.device), held.device_mesh, held.placements, src_data_rank=None)
