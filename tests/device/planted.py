"""Faults that work on a CPU and fail, or wait, on a GPU. The pretend device must notice each of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tests.device.pretend import DEVICE, pretending

Fault = Callable[[Tensor], object]
"""Takes a tensor [4, 3] of the device."""


def _index_on_host(x: Tensor) -> Tensor:
    return x.index_select(0, torch.tensor([0, 2]))


def _mask_on_host(x: Tensor) -> Tensor:
    return torch.where(torch.ones(4, 3, dtype=torch.bool), x, torch.zeros_like(x))


def _joined_with_host(x: Tensor) -> Tensor:
    return torch.cat([x, torch.zeros(1, 3)])


def _target_on_host(x: Tensor) -> Tensor:
    return torch.nn.functional.nll_loss(x.log_softmax(-1), torch.zeros(4, dtype=torch.long))


def _loss_read_in_the_loop(x: Tensor) -> float:
    return sum(float(row.sum()) for row in x)


def _branch_on_a_value(x: Tensor) -> Tensor:
    return x if (x > 0).any() else -x


def _boolean_selection(x: Tensor) -> Tensor:
    return x[x > 0]


def _boolean_assignment(x: Tensor) -> Tensor:
    y = x.clone()
    y[y > 0] = 0
    return y


def _positions(x: Tensor) -> Tensor:
    return (x > 0).nonzero()


def _repeated_by_lengths(x: Tensor) -> Tensor:
    return x.repeat_interleave(torch.tensor([1, 2, 0, 1], device=DEVICE), 0)


def _values_to_the_host(x: Tensor) -> Tensor:
    return x.cpu()


def _one_copy_per_row(x: Tensor) -> Tensor:
    return torch.stack([x[i] * torch.tensor(float(i), device=DEVICE) for i in range(4)])


FAULTS: dict[str, Fault] = {
    "index on the host": _index_on_host,
    "mask on the host": _mask_on_host,
    "joined with the host": _joined_with_host,
    "targets on the host": _target_on_host,
    "loss read in the loop": _loss_read_in_the_loop,
    "branch on a value": _branch_on_a_value,
    "boolean selection": _boolean_selection,
    "boolean assignment": _boolean_assignment,
    "positions of a mask": _positions,
    "repeated by lengths": _repeated_by_lengths,
    "values to the host": _values_to_the_host,
    "one copy per row": _one_copy_per_row,
}


def caught(fault: Fault) -> str:
    """Return how the pretend device noticed a fault: `refused`, `syncs N` or `copies N`; nothing if it did not."""
    with pretending() as counts:
        x = torch.arange(-6.0, 6.0).view(4, 3).to(DEVICE)
        before = counts.copies.total()
        try:
            fault(x)
        except RuntimeError as error:
            if "does not have a deterministic implementation" in str(error):
                return "refused: not deterministic"
            return "refused" if "expected all tensors on one device" in str(error) else f"failed: {error}"
    if counts.syncs:
        return f"syncs {counts.syncs.total()}"
    copies = counts.copies.total() - before
    return f"copies {copies}" if copies > 1 else ""
