"""Weights packed into one piece of memory in safetensors' layout: on the host, for other processes to map or fetch, or on a device.

Example:
    >>> packed = DeviceBuffer({"w": torch.ones(2), "v": torch.zeros(3)}, {}, torch.device("cpu"))
    >>> packed.size, packed.tensors["w"]
    (20, tensor([1., 1.]))
"""

from __future__ import annotations

import json
import mmap
import os
import secrets
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from posttrain.rollouts.shared_memory import anonymous_file
from posttrain.rollouts.vllm.worker.posttrain_group import Layout, viewed
from posttrain.rollouts.vllm.worker.posttrain_receiver import DTYPES, layout_of

NAMES = {getattr(torch, torch_name): name for name, torch_name in DTYPES.items()}


class Packed:
    """Tensors in one piece of memory.

    Attributes:
        mark: a random name, by which a reader recognises the weights.
        about: metadata.
        header: names, dtypes, shapes and offsets as safetensors writes them, with the metadata.
        size: bytes of the whole.
        content: the tensors' bytes.
        tensors: views of the content.
    """

    content: Tensor
    size: int

    def __init__(self, state: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
        """Lay the tensors out; subclasses claim the memory."""
        self.mark, self.about = secrets.token_hex(16), dict(about)
        entries: dict[str, Any] = {"__metadata__": {**about, "mark": self.mark}}
        end = 0
        # large items first, so that every tensor is aligned
        for name in sorted(state, key=lambda name: (-state[name].dtype.itemsize, name)):
            tensor = state[name]
            begin, end = end, end + tensor.numel() * tensor.dtype.itemsize
            entries[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        self.header = json.dumps(entries)
        self.header += " " * (-len(self.header) % 8)
        self.bytes = end
        self.layout: Layout = layout_of(self.header.encode(), {"mark": self.mark, "path": ""})[0]

    def fill(self, state: Mapping[str, Tensor]) -> None:
        """Replace the values of the tensors."""
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                tensor.copy_(state[name])

    def close(self) -> None:
        """Give the memory back."""

    def _view(self) -> None:
        self.tensors = {
            name: viewed(self.content, begin, end, dtype, shape) for name, dtype, shape, begin, end in self.layout
        }


class MemoryFile(Packed):
    """Tensors in a file of safetensors' format without a name, in memory that other processes of this user can map."""

    def __init__(self, state: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
        """Claim the memory.

        Raises:
            OSError: there is none left.
        """
        super().__init__(state, about)
        header = self.header.encode()
        self.size = 8 + len(header) + self.bytes
        self.descriptor = anonymous_file(self.size)
        self.memory = mmap.mmap(self.descriptor, self.size)
        self.memory[: 8 + len(header)] = len(header).to_bytes(8, "little") + header
        self.content = torch.frombuffer(self.memory, dtype=torch.uint8)[8 + len(header) :]
        self._view()
        self.fill(state)

    def close(self) -> None:
        """Close the file. The memory is freed when no process maps it."""
        os.close(self.descriptor)


class DeviceBuffer(Packed):
    """Tensors in the memory of a device, from which other processes copy or receive them."""

    def __init__(self, state: Mapping[str, Tensor], about: Mapping[str, str], device: torch.device) -> None:
        """Claim the memory.

        Raises:
            torch.OutOfMemoryError: there is none left.
        """
        super().__init__(state, about)
        self.size = self.bytes
        self.content = torch.empty(self.bytes, dtype=torch.uint8, device=device)
        self._view()
        self.fill(state)

    def fill(self, state: Mapping[str, Tensor]) -> None:
        """Replace the values of the tensors, and wait until they are there."""
        super().fill(state)
        if self.content.device.type == "cuda":
            torch.cuda.synchronize(self.content.device)
