"""Weights that servers fetch from the trainer's memory: a file without a name or a disk, in safetensors' format.

Servers on this machine map it; others read it over HTTP under a path that cannot be guessed. With an adapter the weights below it are
published once, and every version is only the adapter.

Example:
    >>> from posttrain.models.tiny import TinyShape, tiny_model
    >>> lm, _ = tiny_model(TinyShape(hidden_size=16, intermediate_size=16, layers=1, heads=2, kv_heads=1), seed=0)
    >>> published = Published(lm, torch.float32)
    >>> published.take(version=3)
    >>> [source["way"] for source in published.sources(3)]
    ['memory']
    >>> published.close()
"""

from __future__ import annotations

import json
import mmap
import os
import secrets
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from posttrain.errors import RolloutError
from posttrain.models.plain import plain_state
from posttrain.rollouts.shared_memory import anonymous_file
from posttrain.rollouts.vllm.worker.posttrain_receiver import DTYPES, PAUSE_SECONDS, merged

NAMES = {getattr(torch, torch_name): name for name, torch_name in DTYPES.items()}
PIECE = 2**24
"""Bytes that are sent at once."""


class MemoryFile:
    """Tensors in the format of safetensors, in memory that other processes of this user can map."""

    def __init__(self, state: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
        """Claim the memory.

        Raises:
            OSError: there is none left.
        """
        self.mark, self.about = secrets.token_hex(16), dict(about)
        # large items first, so that every tensor is aligned
        names = sorted(state, key=lambda name: (-state[name].dtype.itemsize, name))
        entries: dict[str, Any] = {"__metadata__": {**about, "mark": self.mark}}
        end = 0
        for name in names:
            begin, end = end, end + state[name].numel() * state[name].dtype.itemsize
            entries[name] = {
                "dtype": NAMES[state[name].dtype],
                "shape": list(state[name].shape),
                "data_offsets": [begin, end],
            }
        header = json.dumps(entries).encode()
        header += b" " * (-len(header) % 8)
        self.size = 8 + len(header) + end
        self.descriptor = anonymous_file(self.size)
        self.memory = mmap.mmap(self.descriptor, self.size)
        self.memory[: 8 + len(header)] = len(header).to_bytes(8, "little") + header
        self.tensors: dict[str, Tensor] = {}
        for name in names:
            begin = 8 + len(header) + entries[name]["data_offsets"][0]
            count = state[name].numel()
            if count:
                flat = torch.frombuffer(self.memory, dtype=state[name].dtype, count=count, offset=begin)
                self.tensors[name] = flat.reshape(state[name].shape)
        self.fill(state)

    def fill(self, state: Mapping[str, Tensor]) -> None:
        """Replace the values of the tensors."""
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                tensor.copy_(state[name])

    def close(self) -> None:
        """Close the file. The memory is freed when no process maps it."""
        os.close(self.descriptor)


class Published:
    """The policy's weights at some versions.

    Args:
        address: HOST:PORT of this machine, where servers on other hosts fetch the weights; empty: they are on this machine and map them.
    """

    def __init__(self, lm: PreTrainedModel, dtype: torch.dtype, address: str = "") -> None:
        self.lm, self.dtype = lm, dtype
        self.adapters = _adapters(lm)
        self.base: MemoryFile | None = None
        self.versions: dict[int, MemoryFile] = {}
        self.spare: list[MemoryFile] = []
        self.stream = Stream(address) if address else None

    def take(self, version: int, state: Mapping[str, Tensor] | None = None) -> None:
        """Copy the present weights. `state` is the result of `plain_state`, if it is known.

        Raises:
            RolloutError: there is no memory left.
        """
        if version in self.versions:
            return
        try:
            if self.adapters is None:
                self._put(version, plain_state(self.lm, self.dtype) if state is None else state, {})
                return
            if self.base is None:
                self.base = MemoryFile(_below(self.lm), {})
            about = {
                "scales": json.dumps({name: scale for name, (_, _, scale) in self.adapters.items()}),
                "dtype": str(self.dtype).removeprefix("torch."),
            }
            parts = {}
            for name, (a, b, _) in self.adapters.items():
                parts |= {f"{name}.A": a.detach(), f"{name}.B": b.detach()}
            self._put(version, parts, about)
        except OSError as error:
            raise RolloutError(
                f"no memory for the weights that vLLM servers fetch ({error}); free some, or set POSTTRAIN_VLLM_TRANSFER=folder"
            ) from error

    def sources(self, version: int) -> list[dict[str, str]]:
        """Return what a worker needs in order to read the weights of a version."""
        files = [*([self.base] if self.base else []), self.versions[version]]
        if self.stream is None:
            return [
                {"way": "memory", "path": f"/proc/{os.getpid()}/fd/{file.descriptor}", "mark": file.mark}
                for file in files
            ]
        self.stream.files = {file.mark: file for file in files}
        return [{"way": "stream", "path": self.stream.url(file.mark), "mark": file.mark} for file in files]

    def size(self, version: int) -> int:
        """Return the bytes that a worker reads for a version, at most."""
        return self.versions[version].size + (self.base.size if self.base else 0)

    def whole(self, version: int) -> dict[str, Tensor]:
        """Return the weights of a version, the adapter added."""
        if self.base is None:
            return self.versions[version].tensors
        return dict(
            merged(self.base.tensors, iter(self.versions[version].tensors.items()), self.versions[version].about)
        )

    def remove(self, before: int) -> None:
        """Reuse the memory of older versions."""
        for version in [v for v in self.versions if v < before]:
            self.spare.append(self.versions.pop(version))

    def close(self) -> None:
        """Give all memory back."""
        if self.stream is not None:
            self.stream.close()
        for file in [*([self.base] if self.base else []), *self.versions.values(), *self.spare]:
            file.close()
        self.base, self.versions, self.spare = None, {}, []

    def _put(self, version: int, state: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
        if self.spare:
            file = self.spare.pop()
            file.fill(state)
        else:
            file = MemoryFile(state, about)
        self.versions[version] = file


class Stream:
    """Sends files of memory over HTTP to whoever knows their mark."""

    def __init__(self, address: str) -> None:
        """Listen at HOST:PORT.

        Raises:
            RolloutError: the address is not one of this machine, or is in use.
        """
        self.files: dict[str, MemoryFile] = {}
        stream = self

        class Handler(BaseHTTPRequestHandler):
            timeout = PAUSE_SECONDS

            def do_GET(self) -> None:
                file = stream.files.get(self.path[1:])
                if file is None:
                    self.send_error(404)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(file.size))
                self.end_headers()
                with memoryview(file.memory) as whole:
                    for begin in range(0, file.size, PIECE):
                        self.connection.sendall(whole[begin : begin + PIECE])

            def log_message(self, format: str, *args: Any) -> None:
                pass

        host, _, port = address.rpartition(":")
        try:
            self.host = host
            self.server = ThreadingHTTPServer((host.strip("[]"), int(port)), Handler)
        except (OSError, ValueError) as error:
            raise RolloutError(
                f"cannot send weights from {address!r} ({error}): set POSTTRAIN_VLLM_TRANSFER to stream:HOST:PORT, an address of this"
                " machine that the servers reach"
            ) from error
        self.server.daemon_threads = True
        Thread(target=self.server.serve_forever, args=(0.1,), daemon=True).start()

    def url(self, mark: str) -> str:
        """Return the address of a file."""
        return f"http://{self.host}:{self.server.server_address[1]}/{mark}"

    def close(self) -> None:
        """Stop listening."""
        self.server.shutdown()
        self.server.server_close()


def _adapters(lm: PreTrainedModel) -> dict[str, tuple[Tensor, Tensor, float]] | None:
    """Return A, B and the scale of every layer with an adapter; None if other weights are trained or an adapter has a different form."""
    found: dict[str, tuple[Tensor, Tensor, float]] = {}
    covered = set()
    for path, module in lm.named_modules():
        layer: Any = module
        if not hasattr(layer, "get_delta_weight"):
            continue
        active = list(layer.active_adapters)
        plain = len(active) == 1 and active[0] in layer.lora_A and not getattr(layer, "fan_in_fan_out", False)
        weight = layer.base_layer.weight
        if hasattr(weight, "full_tensor") or not weight.dtype.is_floating_point:
            return None
        if not plain or getattr(layer, "lora_variant", {}) or layer.lora_B[active[0]].bias is not None:
            return None
        a, b = layer.lora_A[active[0]].weight, layer.lora_B[active[0]].weight
        found[f"{path}.weight"] = a, b, float(layer.scaling[active[0]])
        covered |= {id(a), id(b)}
    trained = {id(parameter) for parameter in lm.parameters() if parameter.requires_grad}
    return found if found and trained <= covered else None


def _below(lm: PreTrainedModel) -> dict[str, Tensor]:
    """Return the weights without the adapter, by the names that an ordinary model has."""
    state = {}
    for name, tensor in [*lm.named_parameters(remove_duplicate=False), *lm.named_buffers(remove_duplicate=False)]:
        owner, _, leaf = name.rpartition(".")
        if ".lora_" in name or leaf in lm.get_submodule(owner)._non_persistent_buffers_set:
            continue
        state[name.replace("base_layer.", "")] = tensor.detach()
    return state
