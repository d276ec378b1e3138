"""Load weights that a trainer holds in memory: from its memory on the same machine, or over HTTP.

vLLM adds `Receiver` to its workers if a server is started with `--worker-extension-cls posttrain_receiver.Receiver` and this folder in
PYTHONPATH. It must work in an environment without the project, so it imports only torch and the standard library.

A source is a file in safetensors' format. Its metadata has a `mark`, by which a worker recognises that it reads the right file.

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
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

PAUSE_SECONDS = 20.0
"""Longest time without a byte from the trainer."""
DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
"""Dtypes as safetensors and torch spell them."""
Weights = Iterator[tuple[str, Tensor]]


class Receiver:
    """The methods that the trainer calls through `/collective_rpc`."""

    def posttrain_load(self, sources: list[dict[str, str]]) -> dict[str, Any]:
        """Load all weights in place.

        Args:
            sources: the weights; or those below an adapter, which stay the same, and the adapter.

        Returns:
            `bytes` and `seconds`; or `error` if a source cannot be read.
        """
        began, read = time.perf_counter(), [0]
        kept: dict[str, tuple[dict[str, Tensor], dict[str, Any]]] = self.__dict__.setdefault("_posttrain_kept", {})
        try:
            if len(sources) == 1:
                weights = opened(sources[0], read)[0]
            else:
                base, adapter = sources
                if base["mark"] not in kept:
                    kept.clear()
                    tensors, about = opened(base, read)
                    kept[base["mark"]] = dict(tensors), about
                weights = merged(kept[base["mark"]][0], *opened(adapter, read))
            # the worker's method, which sets vLLM's configuration around that of its model runner
            cast(Any, self).reload_weights(weights_iterator=weights)
        except (OSError, ValueError) as error:
            return {"error": f"{type(error).__name__}: {error}"}
        return {"bytes": read[0], "seconds": time.perf_counter() - began}


def opened(source: dict[str, str], read: list[int]) -> tuple[Weights, dict[str, Any]]:
    """Return the tensors of a source, and its metadata. `read` counts the bytes that have been read.

    Raises:
        OSError: it cannot be read.
        ValueError: it is a different file, or not whole.
    """
    opener = _memory if source["way"] == "memory" else _stream
    return opener(source, read)


def merged(base: dict[str, Tensor], adapter: Weights, about: dict[str, Any]) -> Weights:
    """Yield all weights, with the adapter's product added to those that have one, as the trainer adds it."""
    parts = dict(adapter)
    scales, dtype = json.loads(about["scales"]), getattr(torch, about["dtype"])
    for name, weight in base.items():
        if name in scales:
            weight = weight + (parts[f"{name}.B"] @ parts[f"{name}.A"]) * scales[name]
        yield name, weight.to(dtype)


def _memory(source: dict[str, str], read: list[int]) -> tuple[Weights, dict[str, Any]]:
    with open(source["path"], "rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    size = int.from_bytes(memory[:8], "little")
    layout, about = _layout(memory[8 : 8 + size], source)

    def tensors() -> Weights:
        for name, dtype, shape, begin, end in layout:
            read[0] += end - begin
            yield name, _tensor(memory, 8 + size + begin, dtype, shape)

    return tensors(), about


def _stream(source: dict[str, str], read: list[int]) -> tuple[Weights, dict[str, Any]]:
    # no proxy: the trainer is named by its address
    reply = urllib.request.build_opener(urllib.request.ProxyHandler({})).open(source["path"], timeout=PAUSE_SECONDS)
    body = cast(BinaryIO, reply)
    layout, about = _layout(_exactly(body, int.from_bytes(_exactly(body, 8), "little")), source)

    def tensors() -> Weights:
        with closing(body):
            for name, dtype, shape, begin, end in layout:
                content = _exactly(body, end - begin)
                read[0] += end - begin
                yield name, _tensor(content, 0, dtype, shape)

    return tensors(), about


def _layout(
    header: bytes | bytearray, source: dict[str, str]
) -> tuple[list[tuple[str, torch.dtype, list[int], int, int]], dict[str, Any]]:
    """Return name, dtype, shape, begin and end of every tensor in the order of the file, and the metadata."""
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
