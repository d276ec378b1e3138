"""Weights that servers fetch from the trainer's memory: a file without a name or a disk, in safetensors' format.

Servers on this machine map it; others read it over HTTP under a path that cannot be guessed. On a GPU the weights may stay on it: servers
copy them there (CUDA IPC), or receive them by broadcast (NCCL). With an adapter the weights below it are published once, and every version
is only the adapter.

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
import os
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from posttrain.errors import RolloutError
from posttrain.models.plain import plain_state
from posttrain.rollouts.vllm.broadcast import Sender
from posttrain.rollouts.vllm.packed import DeviceBuffer, MemoryFile
from posttrain.rollouts.vllm.worker.posttrain_group import PAUSE_SECONDS, device_name, exported
from posttrain.rollouts.vllm.worker.posttrain_receiver import merged

PIECE = 2**24
"""Bytes that are sent at once."""


class Published:
    """The policy's weights at some versions.

    Args:
        way: `memory`: servers are on this machine and map them; `stream:HOST:PORT`: they fetch them at this address; `ipc`: they copy
            them on the policy's device; `nccl` or `nccl:HOST:PORT`: they receive broadcasts, and meet the trainer at this address.
    """

    def __init__(self, lm: PreTrainedModel, dtype: torch.dtype, way: str = "memory") -> None:
        self.lm, self.dtype = lm, dtype
        self.way, _, address = way.partition(":")
        self.adapters = _adapters(lm)
        self.base: MemoryFile | None = None
        self.versions: dict[int, MemoryFile | DeviceBuffer] = {}
        self.spare: list[MemoryFile | DeviceBuffer] = []
        self._handles: dict[str, str] = {}
        self.stream = Stream(address) if self.way == "stream" else None
        self.sender = Sender(address, lm.device) if self.way == "nccl" else None

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
        except (OSError, torch.OutOfMemoryError) as error:
            raise RolloutError(
                f"no memory for the weights that vLLM servers fetch ({error}); free some, or set POSTTRAIN_VLLM_TRANSFER=folder"
            ) from error

    def sources(self, version: int) -> list[dict[str, str]]:
        """Return what a worker needs in order to read the weights of a version."""
        files = [*([self.base] if self.base else []), self.versions[version]]
        if self.stream is not None:
            self.stream.files = {file.mark: file for file in files if isinstance(file, MemoryFile)}
        if self.sender is not None:
            self.sender.files = {file.mark: file for file in files}
        return [self._source(file) for file in files]

    def _source(self, file: MemoryFile | DeviceBuffer) -> dict[str, str]:
        if self.stream is not None:
            return {"way": "stream", "path": self.stream.url(file.mark), "mark": file.mark}
        if self.sender is not None:
            return {"way": "nccl", "path": self.sender.address, "mark": file.mark, "header": file.header}
        if isinstance(file, MemoryFile):
            return {"way": "memory", "path": f"/proc/{os.getpid()}/fd/{file.descriptor}", "mark": file.mark}
        if file.mark not in self._handles:
            self._handles[file.mark] = json.dumps(exported(file.content.untyped_storage()))
        device = device_name(file.content.device)
        handle = self._handles[file.mark]
        return {
            "way": "ipc",
            "path": device,
            "mark": file.mark,
            "header": file.header,
            "device": device,
            "handle": handle,
        }

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
        if self.sender is not None:
            self.sender.close()
        for file in [*([self.base] if self.base else []), *self.versions.values(), *self.spare]:
            file.close()
        self.base, self.versions, self.spare = None, {}, []

    def _put(self, version: int, state: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
        if self.spare:
            file = self.spare.pop()
            file.fill(state)
        else:
            on_device = self.way in ("ipc", "nccl")
            file = DeviceBuffer(state, about, self.lm.device) if on_device else MemoryFile(state, about)
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
        except (OSError, ValueError, OverflowError) as error:
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
