"""Collective operations of the processes of one run. With one process they return at once and import nothing.

Example:
    >>> gather_all(Accelerator(), [1, 2, 3], lambda own: [10 * x for x in own], round_robin(3))
    [10, 20, 30]
    >>> list(round_robin(5)(1, 2))
    [1, 3]
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from accelerate import Accelerator

from posttrain.choices import follow, made
from posttrain.combinations import Setup, require
from posttrain.errors import PosttrainError
from posttrain.settings import layer_processes

Item = TypeVar("Item")
Result = TypeVar("Result")
PIECE_BYTES = 64 << 20


def splits_layers(accelerator: Accelerator) -> bool:
    """Return True if all processes split each layer, and so compute the same rows (tensor parallelism).

    Raises:
        ConfigError: the environment names a number other than 1 and that of all processes.
    """
    given = layer_processes()
    require(Setup(accelerator.num_processes, layers=given))
    return given > 1


def row_share(accelerator: Accelerator) -> tuple[int, int]:
    """Return which share of the rows is this process's, and the number of shares."""
    return (0, 1) if splits_layers(accelerator) else (accelerator.process_index, accelerator.num_processes)


def gather_all(
    accelerator: Accelerator,
    items: Sequence[Item],
    work: Callable[[Sequence[Item]], list[Result]],
    share: Callable[[int, int], Sequence[int]],
) -> list[Result]:
    """Apply `work` to all items, split over processes; every process returns all results, in order.

    A process without items also calls `work`, which may itself be collective.

    Args:
        share: returns the indices for (process, number of processes).
    """
    number, world = row_share(accelerator)
    if world == 1:
        return work(items)
    from accelerate.utils import gather_object

    own = [items[i] for i in share(number, world)]
    results: dict[int, Result] = {}
    for process, done in enumerate(gather_object([work(own)])):
        results |= zip(share(process, world), done, strict=True)
    return [results[i] for i in range(len(items))]


def round_robin(count: int) -> Callable[[int, int], Sequence[int]]:
    """Return a share for `gather_all`: every n-th item."""
    return lambda process, processes: range(process, count, processes)


def on_main_process(accelerator: Accelerator, work: Callable[[], Result]) -> Result:
    """Return the result of `work` on every process, although only rank 0 calls it; all raise the PosttrainError that it raises there."""
    if accelerator.num_processes == 1:
        return work()
    from accelerate.utils import broadcast_object_list

    made: list[Result | PosttrainError | None] = [None]
    if accelerator.is_main_process:
        try:
            made = [work()]
        except PosttrainError as error:
            made = [error]
    broadcast_object_list(made)
    if isinstance(made[0], PosttrainError):
        raise made[0]
    result: Result = made[0]  # type: ignore[assignment]
    return result


def all_reduce_max(accelerator: Accelerator, value: int) -> int:
    """Return the largest of the processes' values."""
    if accelerator.num_processes == 1:
        return value
    largest = torch.tensor([value], device=accelerator.device)
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
    return int(largest)


def any_rank(accelerator: Accelerator, flag: bool) -> bool:
    """Return True if `flag` is True on any process."""
    return bool(all_reduce_max(accelerator, int(flag)))


def gather_texts(accelerator: Accelerator, text: str) -> list[str]:
    """Return every process's text, by rank."""
    if accelerator.num_processes == 1:
        return [text]
    from accelerate.utils import gather_object

    found: list[str] = gather_object([text])
    return found


def agree_on_choices(accelerator: Accelerator) -> None:
    """Let all processes choose alike (posttrain/choices.py): the lowest rank that has made a choice decides it."""
    for found in reversed(gather_texts(accelerator, json.dumps(made()))):
        follow(json.loads(found))


def on_one_host(accelerator: Accelerator) -> bool:
    """Return True if all processes run on one host, as the launcher says, and so share its disk."""
    world: int = accelerator.num_processes
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) >= world


def broadcast_state(accelerator: Accelerator, state: Result) -> Result:
    """Return rank 0's tree of tensors and plain values on every process; the values that other ranks pass are ignored.

    It travels in pieces, of which a GPU holds one at a time, and is read as weights only, so it cannot run code.
    """
    if accelerator.num_processes == 1:
        return state
    file = io.BytesIO()
    if accelerator.is_main_process:
        torch.save(state, file)
    size = all_reduce_max(accelerator, file.getbuffer().nbytes)
    received = (
        torch.frombuffer(file.getbuffer(), dtype=torch.uint8)
        if accelerator.is_main_process
        else torch.empty(size, dtype=torch.uint8)
    )
    for piece in received.split(PIECE_BYTES):
        moved = piece.to(accelerator.device)
        torch.distributed.broadcast(moved, src=0)
        piece.copy_(moved)
    if accelerator.is_main_process:
        return state
    found: Result = torch.load(io.BytesIO(received.numpy().tobytes()), map_location="cpu", weights_only=True)
    return found


def destroy_group() -> None:
    """Leave the process group while all processes still exist; at interpreter exit it would be too late."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
