"""Faults that work on a CPU and fail, or wait, on a GPU. The pretend device must notice each of them."""

from __future__ import annotations

import copy
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


def _copied_with_a_wait(x: Tensor) -> Tensor:
    return x + torch.ones(4, 3).to(DEVICE)


def _copied_from_memory_that_is_not_pinned(x: Tensor) -> Tensor:
    return x + torch.ones(4, 3).to(DEVICE, non_blocking=True)


def _written_with_a_wait(x: Tensor) -> Tensor:
    return x.clone().copy_(torch.ones(4, 3))


def _numbers_as_a_tensor(x: Tensor) -> Tensor:
    return x + torch.tensor([1.0, 2.0, 3.0], device=DEVICE)


def _index_as_a_list(x: Tensor) -> Tensor:
    return x[[0, 2]]


def _read_before_it_arrived(x: Tensor) -> Tensor:
    return x.to("cpu", non_blocking=True) + 1


def _generator_of_the_host(x: Tensor) -> Tensor:
    return x + torch.rand(4, 3, device=DEVICE, generator=torch.Generator())


def _product_of_whole_numbers(x: Tensor) -> Tensor:
    return x.long() @ x.long().T


def _kernel_of_the_cpu(x: Tensor) -> Tensor:
    states = x[None, None]
    found: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(states, states, states)[0]
    return found


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
    "copied with a wait": _copied_with_a_wait,
    "copied from memory that is not pinned": _copied_from_memory_that_is_not_pinned,
    "written with a wait": _written_with_a_wait,
    "numbers as a tensor": _numbers_as_a_tensor,
    "index as a list": _index_as_a_list,
    "counts without a size": lambda x: x.long().abs().flatten().bincount(),
    "rows without repetition": lambda x: x.unique(dim=0),
    "neighbours without repetition": lambda x: x.flatten().unique_consecutive(),
    "a check that all are near": lambda x: torch.allclose(x, x),
    "drawn by torch": lambda x: x.softmax(-1).multinomial(1),
    "a matrix that may not be invertible": lambda x: torch.linalg.inv(x[:3] + 9 * torch.eye(3, device=DEVICE)),
    "read before it arrived": _read_before_it_arrived,
    "generator of the host": _generator_of_the_host,
    "product of whole numbers": _product_of_whole_numbers,
    "kernel of the CPU": _kernel_of_the_cpu,
    "histogram": lambda x: torch.histogram(x, 3),
}


REFUSALS = {
    "expected all tensors on one device": "refused",
    "does not have a deterministic implementation": "refused: not deterministic",
    "may be read before it has arrived": "refused: no wait",
    "expected a generator of": "refused: generator",
    "is not implemented for": "refused: no kernel",
}


def caught(fault: Fault) -> str:
    """Return how the pretend device noticed a fault: `refused`, `syncs N` or `copies N`; nothing if it did not."""
    with pretending() as counts:
        x = torch.arange(-6.0, 6.0).view(4, 3).to(DEVICE)
        before = copy.deepcopy(counts)
        try:
            fault(x)
        except RuntimeError as error:
            return next((found for words, found in REFUSALS.items() if words in str(error)), f"failed: {error}")
    syncs, copies = (counts.since(before).syncs.total(), counts.since(before).copies.total())
    return f"syncs {syncs}" if syncs else f"copies {copies}" if copies > 1 else ""
