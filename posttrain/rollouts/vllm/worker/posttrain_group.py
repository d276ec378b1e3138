"""Reach a trainer's GPU: map its memory on the same device (CUDA IPC), or receive its broadcasts (NCCL; Gloo on CPUs).

Used by vLLM's workers, in an environment without the project, and by the trainer.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from threading import Event, Lock, Thread
from typing import Any

import torch
from torch import Tensor, distributed

PAUSE_SECONDS = 20.0
"""Longest time without a byte from the trainer, and of one bucket's broadcast."""
POLL_SECONDS = 0.0005
GIVEN_UP = "-"
"""Sent in place of the marks of weights."""
BUCKET = 2**28
"""Bytes that are broadcast at once; a larger tensor is a bucket."""
Weights = Iterator[tuple[str, Tensor]]
Layout = list[tuple[str, torch.dtype, list[int], int, int]]
"""Name, dtype, shape, begin and end of every tensor, in the order of the file."""


def mapped_storage(handle: list[Any], device: torch.device) -> torch.UntypedStorage:
    """Return the storage of a different process, as `exported` describes it.

    Raises:
        OSError: the process has ended, or cannot be reached.
    """
    kind: Any = torch.UntypedStorage
    try:
        if device.type == "cpu":
            manager, name, size = handle
            return kind._new_shared_filename_cpu(bytes.fromhex(manager), bytes.fromhex(name), size)
        memory, size, offset, counter, counter_offset, event, waits = handle
        index = torch.cuda.current_device() if device.index is None else device.index
        return kind._new_shared_cuda(
            index,
            bytes.fromhex(memory),
            size,
            offset,
            bytes.fromhex(counter),
            counter_offset,
            bytes.fromhex(event),
            waits,
        )
    except RuntimeError as error:
        raise OSError(f"cannot map the trainer's memory on {device}: {first_line(error)}") from error


def exported(storage: torch.UntypedStorage) -> list[Any]:
    """Return the numbers and hexadecimal texts by which a different process maps a storage.

    The values are those of torch.multiprocessing for the same purpose, without the index of the device, which differs between processes.
    The last one, whether to wait for an event, is False: the owner must have synchronised.
    """
    shared: Any = storage
    values = shared._share_filename_cpu_() if storage.device.type == "cpu" else (*shared._share_cuda_()[1:-1], False)
    return [value.hex() if isinstance(value, bytes) else value for value in values]


def device_name(device: torch.device) -> str:
    """Return a name of the device that is the same in every process."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else device.type


class Group:
    """The trainer, of rank 0, and the workers of one server, which receive its broadcasts: by NCCL on GPUs, by Gloo on CPUs.

    It is next to the default process group and independent of it.

    Args:
        store: through which the processes find each other.
        about: name (`group`), `host`, `size` and `backend` of the group, and the longest wait for the other processes in `seconds`.
        device: holds the tensors.

    Raises OSError if a process does not come, or is lost.
    """

    def __init__(self, store: distributed.Store, about: dict[str, str], rank: int, device: torch.device) -> None:
        self.store = distributed.PrefixStore(about["group"], store)
        self.about, self.rank, self.device = about, rank, torch.device("cpu") if about["backend"] == "gloo" else device
        self.size, self.seconds = int(about["size"]), float(about["seconds"])
        self.processes: Any = None

    def agree(self, load: str, missing: list[str]) -> list[str]:
        """Report which files this worker lacks; return those that the trainer will broadcast."""
        try:
            self.store.set(f"{load}/lacks/{self.rank}", " ".join(missing))
            self.store.wait([f"{load}/sends"], timedelta(seconds=self.seconds))
            sends = self.store.get(f"{load}/sends").decode().split()
        except RuntimeError as error:
            raise OSError(f"the trainer at {self.about['path']} does not send: {first_line(error)}") from error
        if sends == [GIVEN_UP]:
            raise OSError("the trainer waited for a different worker, and gave up")
        self.connect()
        return sends

    def connect(self, check: Callable[[], None] = lambda: None) -> None:
        """Create the process group, and wait until all processes have. `check` is called meanwhile, and raises to give up."""
        if self.processes is not None:
            return
        joining = Joining(self)
        deadline = time.monotonic() + self.seconds
        try:
            while not joining.over.wait(POLL_SECONDS):
                check()
                if time.monotonic() > deadline:
                    raise TimeoutError(
                        f"the trainer and the {self.size - 1} workers have not connected within {self.seconds:g} s: a worker has ended,"
                        " or does not reach the others. Set POSTTRAIN_VLLM_JOIN_SECONDS for the trainer if they only need longer"
                    )
        except BaseException:
            joining.give_up()
            raise
        if joining.error is not None:
            raise OSError(
                f"the trainer and the workers do not find each other: {first_line(joining.error)}"
            ) from joining.error
        self.processes = joining.processes

    def broadcast(self, content: Tensor, check: Callable[[], None] = lambda: None) -> None:
        """Send or receive bytes. `check` is called meanwhile, and raises to give up."""
        deadline = time.monotonic() + PAUSE_SECONDS
        try:
            work = self.processes.broadcast([content], _from_trainer())
            while not work.is_completed():
                check()
                if time.monotonic() > deadline:
                    raise TimeoutError(f"a broadcast of {len(content)} bytes took more than {PAUSE_SECONDS:g} s")
                time.sleep(POLL_SECONDS)
            work.wait()
        except RuntimeError as error:
            raise OSError(f"a process of the group is lost: {first_line(error)}") from error

    def receive(self, layout: Layout, read: list[int]) -> Weights:
        """Yield the tensors that the trainer broadcasts."""
        for bucket in buckets(layout, BUCKET):
            begin, end = bucket[0][3], bucket[-1][4]
            content = torch.empty(end - begin, dtype=torch.uint8, device=self.device)
            if end > begin:
                self.broadcast(content)
            read[0] += end - begin
            for name, dtype, shape, first, last in bucket:
                yield name, viewed(content, first - begin, last - begin, dtype, shape)

    def close(self) -> None:
        """Leave the group; the other processes' broadcasts end with an error."""
        if self.processes is not None:
            self.processes.abort()
            self.processes = None


class Joining:
    """Creates the processes' group in a thread, and sends a byte through it.

    NCCL connects in its first operation, inside a call without a time limit, which waits for ever if a process has ended. The thread is
    left there then.

    Attributes:
        over: set when the thread has ended.
    """

    def __init__(self, group: Group) -> None:
        self.group, self.over = group, Event()
        self.processes: Any = None
        self.error: Exception | None = None
        self._lock, self._given_up = Lock(), False
        Thread(target=self._run, daemon=True).start()

    def give_up(self) -> None:
        """Close the group, or let the thread close it when its call returns."""
        with self._lock:
            self._given_up = True
            if self.over.is_set() and self.processes is not None:
                self.processes.abort()

    def _run(self) -> None:
        about, device = self.group.about, self.group.device
        make, processes = _gloo if about["backend"] == "gloo" else _nccl, None
        try:
            # the device that is current belongs to a thread
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                processes = make(self.group.store, self.group.rank, self.group.size, about["host"])
                processes.broadcast([torch.zeros(1, dtype=torch.uint8, device=device)], _from_trainer()).wait()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
        except Exception as error:
            self.error = error
        with self._lock:
            self.processes = processes
            self.over.set()
            if self._given_up and processes is not None:
                processes.abort()


def _from_trainer() -> Any:
    options = distributed.BroadcastOptions()
    options.rootRank = 0
    return options


def joined(groups: dict[str, Group], source: dict[str, str], rank: int, device: torch.device) -> Group:
    """Return the group that a source names, in place of older ones.

    Raises:
        OSError: its store cannot be reached.
        ValueError: NCCL cannot connect the two devices.
    """
    if source["group"] not in groups:
        leave(groups)
        if source["backend"] == "nccl" and device.type != "cuda":
            raise ValueError(f"the trainer sends by NCCL from a GPU, and this worker computes on {device.type}")
        if source["backend"] == "nccl" and device_name(device) == source["device"]:
            raise ValueError(
                f"trainer and worker share {source['device']}, which NCCL refuses: set POSTTRAIN_VLLM_TRANSFER=ipc"
            )
        host, _, port = source["path"].rpartition(":")
        seconds = float(source["seconds"])
        try:
            # the store would try again and again where nothing listens
            socket.create_connection((host.strip("[]"), int(port)), seconds).close()
            store = distributed.TCPStore(
                host.strip("[]"), int(port), None, False, timedelta(seconds=seconds), wait_for_workers=False
            )
        except (OSError, RuntimeError) as error:
            raise OSError(f"cannot reach the trainer at {source['path']}: {first_line(error)}") from error
        groups[source["group"]] = Group(store, source, rank + 1, device)
    return groups[source["group"]]


def first_line(error: Exception) -> str:
    """Return an error's message without the stack of C++ that torch adds."""
    return str(error).partition("\n")[0]


def leave(groups: dict[str, Group]) -> None:
    """Close all groups and forget them."""
    for group in groups.values():
        group.close()
    groups.clear()


def _gloo(store: distributed.Store, rank: int, size: int, host: str) -> Any:
    kind: Any = distributed.ProcessGroupGloo
    limit = timedelta(seconds=PAUSE_SECONDS)
    if not host.startswith("127."):
        return kind(store, rank, size, limit)  # listens as GLOO_SOCKET_IFNAME says
    options = kind._Options()
    options._timeout, options._devices = limit, [kind.create_device(hostname=host)]
    return kind(store, rank, size, options)


def _nccl(store: distributed.Store, rank: int, size: int, host: str) -> Any:
    kind: Any = distributed.ProcessGroupNCCL
    options = kind.Options()
    # `broadcast` gives up earlier
    options._timeout = timedelta(seconds=2 * PAUSE_SECONDS)
    with quiet_watchdog():
        return kind(store, rank, size, options)


@contextmanager
def quiet_watchdog() -> Iterator[None]:
    """Create groups of NCCL inside the block that leave this process alive if a different one is lost, or is late.

    By default NCCL's watchdog ends the process, and so does the thread that monitors it after it has written a report. The variables are
    read by the group's constructor.
    """
    names = "TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCH_NCCL_ENABLE_MONITORING", "TORCH_NCCL_DUMP_ON_TIMEOUT"
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "0"))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def buckets(layout: Layout, limit: int) -> list[Layout]:
    """Split tensors into runs of at most `limit` bytes; a larger tensor is a run.

    Example:
        >>> layout = [(name, torch.int8, [3], i * 3, i * 3 + 3) for i, name in enumerate("abcd")]
        >>> [[entry[0] for entry in bucket] for bucket in buckets(layout, limit=7)]
        [['a', 'b'], ['c', 'd']]
    """
    found: list[Layout] = []
    for entry in layout:
        if not found or entry[4] - found[-1][0][3] > limit:
            found.append([])
        found[-1].append(entry)
    return found


def viewed(content: Tensor, begin: int, end: int, dtype: torch.dtype, shape: list[int]) -> Tensor:
    """Return some bytes as a tensor without a copy."""
    return content[begin:end].view(dtype).reshape(shape)
