"""AdamW whose moments, and a second copy of the trained weights, are in main memory; the CPU computes the step.

A device then holds 8 bytes a trained weight, for the weight and its gradient, in place of 16. Each step sends a gradient to main memory and
a weight back, 8 bytes together. The numbers are those of AdamW on a CPU.

Example:
    >>> weight = nn.Parameter(torch.zeros(3))
    >>> optimizer = HostAdamW([{"params": [weight], "lr": 0.1}], betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    >>> weight.grad = torch.tensor([1.0, -1.0, 2.0])
    >>> optimizer.step()
    >>> [round(value, 4) for value in weight.tolist()]
    [-0.1, 0.1, -0.1]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class HostAdamW(torch.optim.Optimizer):
    """Take AdamW's step in main memory, for parameters on any one device."""

    def __init__(self, groups: Sequence[Mapping[str, Any]], **arguments: Any) -> None:
        """Copy the weights of all groups to main memory."""
        super().__init__([dict(group) for group in groups], {"lr": 1e-3, **arguments})
        self.pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
        copied = []
        for group in self.param_groups:
            copies = [nn.Parameter(_host_copy(parameter)) for parameter in group["params"]]
            self.pairs += zip(group["params"], copies, strict=True)
            copied.append({**group, "params": copies})
        self.inner = torch.optim.AdamW(copied, **arguments, fused=True)

    @torch.no_grad()
    # pyrefly: ignore[bad-override]
    def step(self, closure: Any = None) -> None:
        """Take a step with the gradients of the parameters, and the learning rates of their groups."""
        assert closure is None, "a closure would compute the loss again"
        for group, own in zip(self.param_groups, self.inner.param_groups, strict=True):
            own.update({name: value for name, value in group.items() if name != "params"})
        for parameter, copy in self.pairs:
            if parameter.grad is None:
                copy.grad = None
                continue
            if copy.grad is None:
                copy.grad = _buffer(parameter.grad)
            copy.grad.copy_(parameter.grad, non_blocking=True)
        self._wait()
        self.inner.step()
        for parameter, copy in self.pairs:
            if copy.grad is not None:
                parameter.copy_(copy, non_blocking=True)
        # the next step writes into the buffers that these copies read
        self._wait()

    def state_dict(self) -> dict[str, Any]:
        """Return the state as AdamW's, so that a run may resume with or without its moments on the device."""
        state: dict[str, Any] = self.inner.state_dict()
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state of AdamW, and copy the weights, which were loaded before, to main memory once more."""
        self.inner.load_state_dict(dict(state_dict))
        for group, own in zip(self.param_groups, self.inner.param_groups, strict=True):
            group.update({name: value for name, value in own.items() if name != "params"})
        for parameter, copy in self.pairs:
            copy.copy_(parameter)

    def _wait(self) -> None:
        """Wait until the device's copies from and to main memory are done."""
        kind = self.pairs[0][0].device
        if kind.type != "cpu":
            torch.get_device_module(kind).synchronize(kind)


def _host_copy(parameter: Tensor) -> Tensor:
    copy = _buffer(parameter)
    copy.copy_(parameter.detach())
    return copy


def _buffer(like: Tensor) -> Tensor:
    """Return an empty tensor in main memory, pinned for CUDA, to which copies need no wait."""
    return torch.empty(like.shape, dtype=like.dtype, pin_memory=like.device.type == "cuda")
