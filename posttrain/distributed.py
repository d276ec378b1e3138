"""What the processes of one run tell each other. With one process nothing is told, and nothing is imported for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from accelerate import Accelerator

Item = TypeVar("Item")
Result = TypeVar("Result")


def gather_all(
    accelerator: Accelerator,
    items: Sequence[Item],
    work: Callable[[Sequence[Item]], list[Result]],
    share: Callable[[int, int], Sequence[int]],
) -> list[Result]:
    """`work` on all items, each process on the indices that `share` of (process, processes) gives it; all get all, in order.

    A process without items works as well: it may be something that takes all of them.
    """
    world = accelerator.num_processes
    if world == 1:
        return work(items)
    from accelerate.utils import gather_object

    own = [items[i] for i in share(accelerator.process_index, world)]
    results: dict[int, Result] = {}
    for process, done in enumerate(gather_object([work(own)])):
        results |= zip(share(process, world), done, strict=True)
    return [results[i] for i in range(len(items))]


def round_robin(count: int) -> Callable[[int, int], Sequence[int]]:
    """A share for `everywhere`: every n-th item."""
    return lambda process, processes: range(process, count, processes)


def all_reduce_max(accelerator: Accelerator, value: int) -> int:
    """The greatest of the processes' values."""
    if accelerator.num_processes == 1:
        return value
    told = torch.tensor([value], device=accelerator.device)
    torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)
    return int(told)


def any_rank(accelerator: Accelerator, flag: bool) -> bool:
    """Whether any process says so."""
    return bool(all_reduce_max(accelerator, int(flag)))


def destroy_group() -> None:
    """End this process's part of the group while everything is still there; at interpreter exit it would be too late."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
