"""Load weights that a trainer holds in memory: from its memory on the same machine or GPU, over HTTP, or by its broadcast.

vLLM adds `Receiver` to its workers if a server is started with `--worker-extension-cls posttrain_receiver.Receiver` and this folder in
PYTHONPATH. It must work in an environment without the project, so it imports only torch, the standard library and its neighbour.

A source is a file in safetensors' format. Its metadata has a `mark`, by which a worker recognises that it reads the right file. On a GPU
(`ipc`, `nccl`) the header travels with the source, as text, and only the tensors' bytes are on the device.

    >>> adapter = iter([("w.A", torch.tensor([[1.0]])), ("w.B", torch.tensor([[2.0]]))])
    >>> about = {"scales": '{"w": 0.5}', "dtype": "float32"}
    >>> dict(merged({"w": torch.tensor([[3.0]])}, adapter, about))  # 3 + 2 * 1 * 0.5
    {'w': tensor([[4.]])}
"""

from __future__ import annotations

import json
import mmap
import time
import urllib.request
from collections.abc import Callable
from contextlib import closing
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

if __package__:  # the trainer's side, which has the project
    from posttrain.rollouts.vllm.worker import posttrain_group as gpu
else:
    import posttrain_group as gpu  # pyrefly: ignore[missing-import]

DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
"""Dtypes as safetensors and torch spell them."""


class Receiver:
    """The methods that the trainer calls through `/collective_rpc`."""

    def posttrain_groups(self) -> dict[str, Any]:
        """Return the worker's rank in its server, and the names of the groups that it has joined."""
        groups: dict[str, gpu.Group] = self.__dict__.get("_posttrain_groups", {})
        return {"rank": getattr(self, "rank", 0), "groups": sorted(groups)}

    def posttrain_load(self, sources: list[dict[str, str]]) -> dict[str, Any]:
        """Load all weights in place.

        Args:
            sources: the weights; or those below an adapter, which stay the same, and the adapter.

        Returns:
            `bytes` and `seconds`; or `error` if a source cannot be read.
        """
        began, read, whole = time.perf_counter(), [0], False
        kept: dict[str, tuple[dict[str, Tensor], dict[str, Any]]] = self.__dict__.setdefault("_posttrain_kept", {})
        groups: dict[str, gpu.Group] = self.__dict__.setdefault("_posttrain_groups", {})
        device = getattr(self, "device", None) or torch.device("cpu")
        missing = [source["mark"] for source in sources if source is sources[-1] or source["mark"] not in kept]
        try:
            group = None
            if sources[-1]["way"] == "nccl":
                group = gpu.joined(groups, sources[-1], getattr(self, "rank", 0), device)
                missing = group.agree(sources[-1]["load"], missing)
            if len(sources) == 1:
                weights = opened(sources[0], read, device, group)[0]
            else:
                base, adapter = sources
                if base["mark"] in missing:
                    kept.clear()
                    tensors, about = opened(base, read, device, group)
                    kept[base["mark"]] = {name: tensor.to("cpu") for name, tensor in tensors}, about
                weights = merged(kept[base["mark"]][0], *opened(adapter, read, device, group))
            # the worker's method, which sets vLLM's configuration around that of its model runner
            cast(Any, self).reload_weights(weights_iterator=weights)
            whole = True
        except (OSError, ValueError) as error:
            return {"error": f"{type(error).__name__}: {error}"}
        finally:
            if not whole:
                gpu.leave(groups)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # the trainer may change its memory after the answer
        return {"bytes": read[0], "seconds": time.perf_counter() - began}


def opened(
    source: dict[str, str], read: list[int], device: torch.device, group: gpu.Group | None = None
) -> tuple[gpu.Weights, dict[str, Any]]:
    """Return the tensors of a source, and its metadata. `read` counts the bytes that have been read.

    Args:
        device: computes the answers.
        group: receives the trainer's broadcasts.

    Raises:
        OSError: it cannot be read.
        ValueError: it is a different file, or not whole, or on a different device.
    """
    if source["way"] in ("memory", "stream"):
        return (_memory if source["way"] == "memory" else _stream)(source, read)
    layout, about = layout_of(source["header"].encode(), source)
    if group is not None:
        return group.receive(layout, read), about
    return _shared(source, layout, read, device), about


def merged(base: dict[str, Tensor], adapter: gpu.Weights, about: dict[str, Any]) -> gpu.Weights:
    """Yield all weights, with the adapter's product added to those that have one, as the trainer adds it."""
    parts = dict(adapter)
    scales, dtype = json.loads(about["scales"]), getattr(torch, about["dtype"])
    for name, weight in base.items():
        if name in scales:
            product = (parts[f"{name}.B"] @ parts[f"{name}.A"]) * scales[name]
            weight = weight.to(product.device) + product
        yield name, weight.to(dtype)


def _memory(source: dict[str, str], read: list[int]) -> tuple[gpu.Weights, dict[str, Any]]:
    with open(source["path"], "rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    size = int.from_bytes(memory[:8], "little")
    layout, about = layout_of(memory[8 : 8 + size], source)

    def tensors() -> gpu.Weights:
        for name, dtype, shape, begin, end in layout:
            read[0] += end - begin
            yield name, _tensor(memory, 8 + size + begin, dtype, shape)

    return tensors(), about


def _stream(source: dict[str, str], read: list[int]) -> tuple[gpu.Weights, dict[str, Any]]:
    # no proxy: the trainer is named by its address
    reply = urllib.request.build_opener(urllib.request.ProxyHandler({})).open(source["path"], timeout=gpu.PAUSE_SECONDS)
    body = cast(BinaryIO, reply)
    layout, about = layout_of(_exactly(body, int.from_bytes(_exactly(body, 8), "little")), source)

    def tensors() -> gpu.Weights:
        with closing(body):
            for name, dtype, shape, begin, end in layout:
                content = _exactly(body, end - begin)
                read[0] += end - begin
                yield name, _tensor(content, 0, dtype, shape)

    return tensors(), about


def _shared(source: dict[str, str], layout: gpu.Layout, read: list[int], device: torch.device) -> gpu.Weights:
    """Yield copies of tensors in the trainer's memory on the device that both use."""
    if source["device"] != gpu.device_name(device):
        raise ValueError(
            f"the weights are on {source['device']} and this worker computes on {gpu.device_name(device)}: ipc needs one device,"
            " so set POSTTRAIN_VLLM_TRANSFER=nccl"
        )
    content = torch.empty(0, dtype=torch.uint8, device=device)
    content.set_(gpu.mapped_storage(json.loads(source["handle"]), device))
    for name, dtype, shape, begin, end in layout:
        read[0] += end - begin
        yield name, gpu.viewed(content, begin, end, dtype, shape).clone()


def layout_of(header: bytes | bytearray, source: dict[str, str]) -> tuple[gpu.Layout, dict[str, Any]]:
    """Return the tensors that a header of safetensors' format lists, and its metadata.

    Raises:
        ValueError: it is the header of a different file.
    """
    values = json.loads(header)
    about = values.pop("__metadata__", {})
    if about.get("mark") != source["mark"]:
        raise ValueError(f"{source['path']} holds other weights than the trainer's")
    found = [
        (name, getattr(torch, DTYPES[entry["dtype"]]), entry["shape"], *entry["data_offsets"])
        for name, entry in values.items()
    ]
    return sorted(found, key=lambda entry: entry[3]), about


def _tensor(content: Any, offset: int, dtype: torch.dtype, shape: list[int]) -> Tensor:
    count = 1
    for length in shape:
        count *= length
    if not count:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(content, dtype=dtype, count=count, offset=offset).reshape(shape)


def _exactly(body: BinaryIO, size: int) -> bytearray:
    content, filled = bytearray(size), 0
    view = memoryview(content)
    into = cast(Callable[[memoryview], int], getattr(body, "readinto"))  # noqa: B009
    while filled < size:
        count = into(view[filled:])
        if not count:
            raise ValueError(f"the trainer closed the stream after {filled} of {size} bytes")
        filled += count
    return content
