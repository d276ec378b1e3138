"""Write the tensors that processes share from the process that holds them, while training goes on; any number of processes reads them.

The files are safetensors, written and read by `torch.distributed.checkpoint`: no pickle. A tensor's place in the state is marked.

Example:
    A state without shared tensors has nothing to write here:

    >>> split({"step": 1, "weights": [torch.tensor(2.0)]})
    ({'step': 1, 'weights': [tensor(2.)]}, {})
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.tensor import DTensor

from posttrain.errors import CheckpointError
from posttrain.files import sync

FOLDER = "shards"
"""Subfolder of a checkpoint with the files of all processes."""
MARK = "sharded tensor"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in the files of a checkpoint, which each process reads in part."""

    folder: Path
    name: str


def split(state: Any, name: str = "") -> tuple[Any, dict[str, Tensor]]:
    """Return the state with a mark for each tensor that is split over processes, and these tensors by their path in the state."""
    if isinstance(state, DTensor):
        return {MARK: name}, {name: state}
    if not isinstance(state, Mapping | list):
        return state, {}
    shared: dict[str, Tensor] = {}
    plain = []
    for key, value in state.items() if isinstance(state, Mapping) else enumerate(state):
        kept, found = split(value, f"{name}/{key}" if name else str(key))
        plain.append((key, kept))
        shared |= found
    return (dict(plain) if isinstance(state, Mapping) else [kept for _, kept in plain]), shared


def marked(state: Any, folder: Path) -> Any:
    """Return the state that `split` returned with a `StoredTensor` for each mark; `folder` is the checkpoint's."""
    if isinstance(state, Mapping):
        if state.keys() == {MARK}:
            return StoredTensor(folder / FOLDER, state[MARK])
        return {key: marked(value, folder) for key, value in state.items()}
    return [marked(value, folder) for value in state] if isinstance(state, list) else state


def read_like(stored: Sequence[Any], held: Sequence[Tensor]) -> list[Any]:
    """Return each stored tensor split as the tensor next to it is held, read once; whole if that one is whole. Others are unchanged.

    Raises:
        CheckpointError: the files hold other shapes.
    """
    result = list(stored)
    places = [i for i, value in enumerate(stored) if isinstance(value, StoredTensor)]
    wanted: dict[str, Tensor] = {stored[i].name: torch.empty_like(held[i], requires_grad=False) for i in places}
    if not wanted:
        return result
    folder = stored[places[0]].folder
    try:
        load(dict(wanted), storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    except (CheckpointException, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{folder}: cannot be read as this model's state ({error})") from error
    for i in places:
        result[i] = wanted[stored[i].name]
    return result


def write(tensors: Mapping[str, Tensor], checkpoint: Path) -> Future[dict[str, str]]:
    """Copy this process's parts and write them in the background. Return the checksums of its files by name, to wait for.

    All processes must call it. An error of one process is raised by the result of each.
    """
    group, _, rank = background_group(), main_group(), dist.get_rank()
    writer = HuggingFaceStorageWriter(str(checkpoint / FOLDER), save_distributed=True)
    written: Any = async_save(dict(tensors), storage_writer=writer, process_group=group)
    return _threads().submit(_finish, written, checkpoint / FOLDER, f"shard-{rank + 1:05d}-")


def _finish(written: Future[Any], folder: Path, prefix: str) -> dict[str, str]:
    try:
        written.result()
    except CheckpointException as error:  # no Exception, so a thread would lose it
        raise CheckpointError(str(next(iter(error.failures.values()))[0])) from error
    own = sorted(folder.glob(f"{prefix}*"))
    for path in own:
        sync(path)
    return {path.name: file_digest(path) for path in own}


def outcomes(digests: Future[dict[str, str]]) -> tuple[dict[str, str], list[str]]:
    """Wait for the files of all processes; return all checksums and all errors. All processes must call it."""
    try:
        own: dict[str, str] | str = digests.result()
    except (CheckpointError, OSError) as error:
        own = str(error)
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, own, group=main_group())
    files = {name: digest for found in every if isinstance(found, dict) for name, digest in found.items()}
    return files, [found for found in every if isinstance(found, str)]


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache
def background_group() -> Any:
    """Return the group that only the writing thread uses: if two threads of a process share one, processes may take their operations in
    different orders, and then wait for each other without end."""
    return dist.new_group(backend="gloo")


@cache
def main_group() -> Any:
    """Return a group of the processes' CPUs for the main thread, whatever device the training's own group is for."""
    return dist.new_group(backend="gloo")


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
