"""Compute with a model whose weights are split over processes: gather them for a block, and keep all processes in step.

Example:
    A model that is not split needs nothing:

    >>> model = nn.Linear(2, 2)
    >>> with gathered(model):
    ...     is_sharded(model), equal_passes(model, [[0], [1]])
    (False, [[0], [1]])
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

KEEPS_LAYERS = "_posttrain_keeps_layers"
"""Attribute of a split layer: True if it stays whole inside `gathered` (fsdp_reshard_after_forward: false)."""
GATHERS_BF16 = "_posttrain_gathers_bf16"
"""Attribute of a split layer: True if its weights are gathered in bfloat16, so that it computes under autocast only."""
_HELD = "_posttrain_held"
"""Attribute of a split module inside `gathered` or `whole`; an inner block leaves it to the outer one."""
_PRODUCTS = {
    functional.linear, functional.layer_norm, functional.rms_norm, functional.conv1d, functional.scaled_dot_product_attention,
    torch.addmm, torch.baddbmm, torch.bmm, torch.matmul, torch.einsum, Tensor.matmul, Tensor.__matmul__,
}  # fmt: skip
"""Functions that refuse operands of different precision."""


def is_sharded(module: nn.Module) -> bool:
    """Return True if weights of `module` are split over processes."""
    return any(isinstance(part, FSDPModule) for part in module.modules())


def is_tensor_parallel(module: nn.Module) -> bool:
    """Return True if layers of `module` are split by transformers' plan, so that all processes compute the same rows together."""
    return any(isinstance(p, DTensor) and "tp" in (p.device_mesh.mesh_dim_names or ()) for p in module.parameters())


def fewest(module: nn.Module, value: int) -> int:
    """Return the smallest of the processes' values if they compute the same rows together, else `value`."""
    if not is_tensor_parallel(module):
        return value
    smallest = torch.tensor([value], device=next(module.parameters()).device)
    torch.distributed.all_reduce(smallest, torch.distributed.ReduceOp.MIN)
    return int(smallest)


def joined(weight: Tensor) -> Tensor:
    """Return the whole weight if tensor-parallel training splits it; its gradient is split again. All processes must call it."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def by_kind(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Return the parameters that processes split and those that each one holds, which one kernel cannot take together; no empty list."""
    kinds = [[p for p in parameters if isinstance(p, DTensor) == split] for split in (True, False)]
    return [kind for kind in kinds if kind]


@contextmanager
def fresh_gradients(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Keep the gradients of earlier micro-batches out of a backward pass, and add them after it.

    In transformers' tensor parallelism some parameters that every process holds, such as the norms of single heads, add up their
    gradients over the processes after each backward pass. They would add those of earlier micro-batches once more.
    """
    earlier = [(p, p.grad) for p in parameters if not isinstance(p, DTensor)]
    for parameter, _ in earlier:
        parameter.grad = None
    yield
    for parameter, gradient in earlier:
        if gradient is not None:
            parameter.grad = gradient if parameter.grad is None else gradient.add_(parameter.grad)


def gathers_layers(module: nn.Module) -> bool:
    """Return True if each pass of a layer gathers its weights, so that all processes must compute the same layers together."""
    return any(isinstance(part, FSDPModule) and not getattr(part, KEEPS_LAYERS, True) for part in module.modules())


def gathers_bf16(module: nn.Module) -> bool:
    """Return True if the layers of `module` compute with weights that are gathered in bfloat16."""
    return any(getattr(part, GATHERS_BF16, False) for part in module.modules())


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Hold the weights outside the layers (embeddings, head, norms) on every process inside the block.

    Layers are gathered one at a time when they compute. With `fsdp_reshard_after_forward: false` all layers are held as well.
    """
    with _held(model, [part for part in model.modules() if getattr(part, KEEPS_LAYERS, True)]):
        yield


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Hold all weights of `model` on every process inside the block, so that it computes without waiting. Costs their memory."""
    with _held(model, list(model.modules())):
        yield


@contextmanager
def _held(model: nn.Module, modules: Sequence[nn.Module]) -> Iterator[None]:
    units = [module for module in modules if isinstance(module, FSDPModule) and not getattr(module, _HELD, False)]
    for unit in units:
        setattr(unit, _HELD, True)
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            setattr(unit, _HELD, False)
            unit.set_reshard_after_forward(not getattr(unit, KEEPS_LAYERS, True), recurse=False)
            unit.reshard()


def most(model: nn.Module, value: int) -> int:
    """Return the largest of the processes' values if they must compute together, else `value`."""
    if not gathers_layers(model):
        return value
    largest = torch.tensor([value], device=next(model.parameters()).device)
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
    return int(largest)


def equal_passes(model: nn.Module, groups: Sequence[list[int]]) -> list[list[int]]:
    """Return the groups of this process, and empty ones until all processes have as many if they must compute together."""
    return [*groups, *([] for _ in range(most(model, len(groups)) - len(groups)))]


@contextmanager
def in_step(model: nn.Module, idle: Callable[[], Any]) -> Iterator[Callable[[], None]]:
    """Yield a function to call before each pass over the layers; at its end the block computes `idle` until no process needs a pass."""
    if not gathers_layers(model):
        yield lambda: None
        return
    yield lambda: cast(None, most(model, 1))
    while most(model, 0):
        idle()


class InFloat32(TorchFunctionMode):
    """Compute products in float32 although the layers' weights are gathered in bfloat16: for trials that compare exactly."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _PRODUCTS:
            args, kwargs = tree_map(_wide, (args, dict(kwargs or {})))
        return func(*args, **(kwargs or {}))


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value
