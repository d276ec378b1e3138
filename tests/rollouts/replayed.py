"""A recording of a step on the CPU that behaves as a CUDA graph: the same operators on the same memory, with the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
WAITS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default}


class _Recording(TorchDispatchMode):
    """Keeps every operator with its arguments and its results, and undoes what it changes."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in WAITS:
            raise RuntimeError(f"{func}: operation not permitted when stream is capturing")
        kwargs = kwargs or {}
        for tensor in changed(func, args, kwargs):
            self.before.setdefault(id(tensor), (tensor, tensor.clone()))
        result = func(*args, **kwargs)
        if not func.is_view:
            made = [] if func._schema.is_mutable else [t for t in tree_leaves(result) if isinstance(t, Tensor)]
            self.operators.append((func, args, kwargs, made))
        return result


def changed(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """Return the tensors that the operator writes to."""
    given = {
        argument.name: args[i] if i < len(args) else kwargs.get(argument.name)
        for i, argument in enumerate(func._schema.arguments)
    }
    return [given[a.name] for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]


def replayed(step: Callable[[], object]) -> Callable[[], None]:
    """Record `step` and return its replay. The tensors that the step changes keep their values meanwhile."""
    with _Recording() as recording:
        step()
    for tensor, value in reversed(recording.before.values()):
        tensor.copy_(value)

    def replay() -> None:
        # the operators were recorded below autocast
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            for func, args, kwargs, made in recording.operators:
                again = [t for t in tree_leaves(func(*args, **kwargs)) if isinstance(t, Tensor)]
                for tensor, value in zip(made, again, strict=False):
                    tensor.copy_(value)

    return replay
