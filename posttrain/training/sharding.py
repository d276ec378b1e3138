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
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import register_dataclass
from transformers import PreTrainedModel

from posttrain.combinations import Setup, require
from posttrain.data.batches import collate
from posttrain.distributed import splits_layers
from posttrain.models.deferred import fill, is_deferred, run_checks
from posttrain.models.packed import PROBE
from posttrain.models.policy import PolicyOutput
from posttrain.models.routing import Routing
from posttrain.models.shards import GATHERS_BF16, KEEPS_LAYERS, InFloat32, gathered
from posttrain.training.low_bit import parts_like, restored
from posttrain.training.sharded_checkpoint import read_like
from posttrain.training.tensor_parallel import split_layers

Module = TypeVar("Module", bound=nn.Module)

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
    version = os.environ.get("FSDP_VERSION", "1")
    require(Setup(accelerator.num_processes, fsdp=2 if version == "2" else 1))
    return True


def place(model: Module, accelerator: Accelerator) -> Module:
    """Move the model to the process's device; under FSDP2 and tensor parallelism only this process's share of it."""
    if splits_layers(accelerator):
        split_layers(model, accelerator)
        return model
    if not shards(accelerator):
        return model.to(accelerator.device)
    shard(model, accelerator)
    return model


def shard(model: nn.Module, accelerator: Accelerator) -> None:
    """Split every decoder layer, and the rest of the model, over all processes; the module stays the same object.

    The weights of a deferred model are read layer by layer, so that a process holds its share and one layer. Under bfloat16 layers are
    gathered in bfloat16, and their gradients are added in float32.
    """
    # no code here changes an output in place
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    keeps = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "false"
    bf16, deferred = accelerator.mixed_precision == "bf16", is_deferred(model)
    # inputs stay in float32 as under autocast, which casts them for products
    precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    trunks = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    layers = {name for trunk in trunks for name in trunk._no_split_modules or ()}
    for module in list(model.modules()):
        if type(module).__name__ in layers:
            fill(module)
            module.to(accelerator.device)
            options: dict[str, Any] = {"mp_policy": precision} if bf16 else {}
            fully_shard(module, mesh=mesh, reshard_after_forward=not keeps, **options)
            setattr(module, KEEPS_LAYERS, keeps)
            setattr(module, GATHERS_BF16, bf16)
    fill(model)
    model.to(accelerator.device)
    outermost = fully_shard(model, mesh=mesh)
    # FSDP initialises at the first forward of the outermost module; sampling would call the layers first
    with torch.no_grad(), torch.autocast(accelerator.device.type, torch.bfloat16, enabled=bf16):
        model(collate(PROBE).to(accelerator.device))
    outermost.reshard()
    if deferred:
        with gathered(model), InFloat32():
            cast(Any, model).prepare()
            run_checks(model)


def full(tree: Any, keep: bool = True) -> Any:
    """Gather every split tensor of the tree on the CPU, one at a time. All processes must call it.

    Args:
        keep: False puts None in place of each split tensor, on the processes that only take part.
    """
    if isinstance(tree, DTensor):
        whole = tree.full_tensor()
        return whole.cpu() if keep else None
    if isinstance(tree, Mapping):
        return {key: full(value, keep) for key, value in tree.items()}
    return [full(value, keep) for value in tree] if isinstance(tree, list) else tree


def placed_state(
    weights: Mapping[str, Any], state: Mapping[str, Any], held: Mapping[str, Tensor], parameters: Sequence[Tensor]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a checkpoint's weights and optimiser state as this process holds them.

    Args:
        weights: each whole, this process's part, or still in the checkpoint's files.
        state: the optimiser's state; its entries follow `parameters`.
        held: the model's state dict.
    """
    names = list(weights)
    whole = [(i, name) for i, entry in state["state"].items() for name, value in entry.items() if not _in_8_bits(value)]
    parts = [
        (i, name, part)
        for i, entry in state["state"].items()
        for name, value in entry.items()
        if _in_8_bits(value)
        for part in value
    ]
    of_parts = {i: parts_like(parameters[i]) for i, _, _ in parts}
    stored = [*weights.values(), *(state["state"][i][name] for i, name in whole)]
    stored += [state["state"][i][name][part] for i, name, part in parts]
    like = [*(held[name] for name in names), *(parameters[i] for i, _ in whole), *(of_parts[i][p] for i, _, p in parts)]
    placed = [split_like(value, tensor) for value, tensor in zip(read_like(stored, like), like, strict=True)]
    entries: dict[int, dict[str, Any]] = {i: {} for i in state["state"]}
    for (i, name), value in zip(whole, placed[len(names) :], strict=False):
        entries[i][name] = value
    for (i, name, part), value in zip(parts, placed[len(names) + len(whole) :], strict=True):
        entries[i].setdefault(name, {})[part] = value
    for i, name in dict.fromkeys((i, name) for i, name, _ in parts):
        entries[i][name] = split_like(restored(name, entries[i][name], parameters[i]), parameters[i])
    return dict(zip(names, placed, strict=False)), {**state, "state": entries}


def _in_8_bits(value: Any) -> bool:
    return isinstance(value, Mapping) and "codes" in value


def split_like(value: Any, held: Tensor) -> Any:
    """Return a whole `value` split like `held`; unchanged if it is split already, or has a different shape, or `held` is whole."""
    if not isinstance(held, DTensor) or isinstance(value, DTensor) or getattr(value, "shape", None) != held.shape:
        return value
    return distribute_tensor(value.to(held.device), held.device_mesh, held.placements, src_data_rank=None)
