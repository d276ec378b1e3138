"""Tensors in memory that two processes map, so that weights travel between them without a disk.

The memory is an anonymous file (`memfd_create`), which has no name, is not bounded by /dev/shm, and ends with its last process.

Example:
    >>> writer = SharedTensors([Entry("w", "float32", (2,))])
    >>> reader = SharedTensors([Entry("w", "float32", (2,))], descriptor=writer.descriptor)
    >>> _ = writer.tensors["w"].copy_(torch.tensor([1.0, 2.0]))
    >>> reader.tensors["w"]
    tensor([1., 2.])
    >>> writer.close()
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

ALIGNED = 64
"""Every tensor starts at a multiple of this many bytes."""


class Entry(NamedTuple):
    """One tensor: its name, its dtype as torch spells it without `torch.`, and its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Return the bytes of the tensor, rounded up to the next start."""
        exact: int = math.prod(self.shape) * getattr(torch, self.dtype).itemsize
        return -(-exact // ALIGNED) * ALIGNED


def entries(state: Mapping[str, Tensor]) -> list[Entry]:
    """Return the layout of some tensors, sorted by name."""
    return [
        Entry(name, str(state[name].dtype).removeprefix("torch."), tuple(state[name].shape)) for name in sorted(state)
    ]


class SharedTensors:
    """Named CPU tensors in shared memory.

    Attributes:
        tensors: name -> tensor; one process writes it, the other reads it.
        descriptor: the open file, to be inherited by the other process.
    """

    def __init__(self, layout: Sequence[Entry], descriptor: int | None = None) -> None:
        """Create the memory, or map that of another process, which must have the same layout.

        Raises:
            OSError: there is no memory left.
        """
        size = max(ALIGNED, sum(entry.size for entry in layout))
        self.descriptor = anonymous_file(size) if descriptor is None else descriptor
        memory = mmap.mmap(self.descriptor, size)
        self.tensors: dict[str, Tensor] = {}
        start = 0
        for entry in layout:
            count = math.prod(entry.shape)
            dtype = getattr(torch, entry.dtype)
            # torch refuses a buffer of no elements
            flat = (
                torch.frombuffer(memory, dtype=dtype, count=count, offset=start)
                if count
                else torch.empty(0, dtype=dtype)
            )
            self.tensors[entry.name] = flat.reshape(entry.shape)
            start += entry.size

    def close(self) -> None:
        """Close the descriptor. The memory stays until no tensor uses it."""
        os.close(self.descriptor)


def anonymous_file(size: int) -> int:
    """Return the descriptor of a file without a name that occupies `size` bytes of memory, or of a disk outside Linux."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("posttrain-weights")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    # claimed now: without room a later write would end the process
    os.posix_fallocate(descriptor, 0, size) if hasattr(os, "posix_fallocate") else os.truncate(descriptor, size)
    return descriptor
