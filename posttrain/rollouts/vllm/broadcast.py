"""Send weights to the workers of vLLM servers by broadcast: NCCL between GPUs, Gloo between CPUs.

The trainer is rank 0 of one group for each server. The workers join it while they answer the request to load: they meet the trainer at its
store, report which weights they lack, and receive those in buckets.

Example:
    >>> sender = Sender("127.0.0.1:0", torch.device("cpu"))
    >>> sender.address.startswith("127.0.0.1:"), sender.backend
    (True, 'gloo')
    >>> sender.close()
"""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from threading import Thread
from typing import Any

import torch
from torch import Tensor, distributed

from posttrain.errors import RolloutError, ServerError
from posttrain.rollouts.vllm.packed import Packed
from posttrain.rollouts.vllm.worker import posttrain_group as gpu
from posttrain.settings import join_seconds

LOOPBACK = "127.0.0.1:0"
POLL_SECONDS = 0.002
Load = Callable[[list[dict[str, str]]], list[Any]]
"""Asks the workers of a server to load some sources, and returns their results."""


class Sender:
    """Broadcasts packed weights.

    Args:
        address: HOST:PORT of this machine, where workers meet the trainer; port 0: any. Empty: servers are on this machine.
        device: holds the weights.

    Attributes:
        files: the weights to send, by their marks.
    """

    def __init__(self, address: str, device: torch.device) -> None:
        """Listen at the address.

        Raises:
            RolloutError: it is not one of this machine, or is in use.
            ConfigError: the environment has a wrong time limit.
        """
        self.device, self.backend = device, "nccl" if device.type == "cuda" else "gloo"
        self.files: Mapping[str, Packed] = {}
        self.groups: dict[str, gpu.Group] = {}
        self.loads, self.seconds = 0, join_seconds()
        self.host, _, port = (address or LOOPBACK).rpartition(":")
        try:
            # a store that opens its port by itself would listen on all addresses
            host = self.host.strip("[]")
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            listener = socket.create_server((host, int(port)), family=family)
        except (OSError, ValueError, OverflowError) as error:
            raise RolloutError(
                f"cannot send weights from {address!r} ({error}): set POSTTRAIN_VLLM_TRANSFER to nccl:HOST:PORT, an address of this"
                " machine that the servers reach, or to nccl if they are on this machine"
            ) from error
        port = str(listener.getsockname()[1])
        limit = timedelta(seconds=self.seconds)
        self.store: distributed.Store | None = distributed.TCPStore(
            self.host.strip("[]"),
            int(port),
            None,
            True,
            limit,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
        self.address = f"{self.host}:{port}"

    def send(
        self, url: str, sources: Sequence[Mapping[str, str]], members: Callable[[], list[Any]], load: Load
    ) -> list[Any]:
        """Bring the sources to all workers of the server at `url`; return the results of `load`.

        Args:
            members: asks every worker for its rank and groups.

        Raises:
            ServerError: a worker is lost or hangs.
            RolloutError: the server's workers cannot form a group.
        """
        group = self._group(url, members())
        self.loads += 1
        announced = [{**source, **group.about, "load": str(self.loads)} for source in sources]
        call = Call(partial(load, announced))
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            try:
                self._broadcast(group, announced, call)
                return call.result(None)
            except Ended:  # the server refuses, or has ended
                self._forget(url)
                return call.result(None)
            except ServerError:
                self._forget(url)
                raise
            except OSError as error:
                self._forget(url)
                if not group.store.check([f"{self.loads}/sends"]):
                    group.store.set(f"{self.loads}/sends", gpu.GIVEN_UP)  # else the other workers would wait
                call.result(gpu.PAUSE_SECONDS)  # its error is more exact
                raise ServerError(
                    f"{url} does not take the weights that are sent by {self.backend}: {error}"
                ) from error

    def close(self) -> None:
        """Leave all groups and stop listening."""
        gpu.leave(self.groups)
        self.store = None

    def _broadcast(self, group: gpu.Group, sources: Sequence[Mapping[str, str]], call: Call) -> None:
        load, check = sources[0]["load"], call.check
        lacking: set[str] = set()
        deadline = time.monotonic() + 2 * self.seconds
        for rank in range(1, group.size):
            key = f"{load}/lacks/{rank}"
            while not group.store.check([key]):
                check()
                if time.monotonic() > deadline:
                    raise TimeoutError(f"worker {rank - 1} has not come within {2 * self.seconds:g} s")
                time.sleep(POLL_SECONDS)
            lacking |= set(group.store.get(key).decode().split())
        sent = [source["mark"] for source in sources if source["mark"] in lacking]
        group.store.set(f"{load}/sends", " ".join(sent))
        group.connect(check)
        for mark in sent:
            for content in pieces(self.files[mark]):
                group.broadcast(content.to(group.device), check)

    def _group(self, url: str, members: Sequence[Any]) -> gpu.Group:
        """Return the group of a server, a new one if a worker does not know it."""
        ranks = [found.get("rank") if isinstance(found, dict) else None for found in members]
        if ranks != list(range(len(ranks))) or not ranks:
            raise RolloutError(
                f"the workers of {url} report the ranks {ranks}, and a broadcast needs 0, 1, …: start one server for each data-parallel"
                " replica, or set POSTTRAIN_VLLM_TRANSFER=stream:HOST:PORT"
            )
        group = self.groups.get(url)
        if group is not None and all(group.about["group"] in found["groups"] for found in members):
            return group
        self._forget(url)
        about = {
            "group": secrets.token_hex(16),
            "path": self.address,
            "host": self.host.strip("[]"),
            "size": str(len(ranks) + 1),
            "seconds": str(self.seconds),
            "backend": self.backend,
            "device": gpu.device_name(self.device),
        }
        assert self.store is not None, "the sender is closed"
        self.groups[url] = gpu.Group(self.store, about, 0, self.device)
        return self.groups[url]

    def _forget(self, url: str) -> None:
        group = self.groups.pop(url, None)
        if group is not None:
            group.close()


class Ended(Exception):
    """The server has answered before it had the weights."""


class Call:
    """A request to a server that runs while the weights are sent."""

    def __init__(self, ask: Callable[[], list[Any]]) -> None:
        self.found: list[Any] | None = None
        self.error: Exception | None = None
        self.thread = Thread(target=self._run, args=(ask,), daemon=True)
        self.thread.start()

    def check(self) -> None:
        """Raise Ended if the server has refused or is lost."""
        refused = self.found is not None and any(not isinstance(each, dict) or "error" in each for each in self.found)
        if self.error is not None or refused:
            raise Ended

    def result(self, seconds: float | None) -> list[Any]:
        """Return the answer, an empty one after `seconds`; raise the request's error."""
        self.thread.join(seconds)
        if self.error is not None:
            raise self.error
        return self.found or []

    def _run(self, ask: Callable[[], list[Any]]) -> None:
        try:
            self.found = ask()
        except Exception as error:
            self.error = error


def pieces(packed: Packed) -> list[Tensor]:
    """Return the bytes of the buckets in which a receiver expects them."""
    found = []
    for bucket in gpu.buckets(packed.layout, gpu.BUCKET):
        begin, end = bucket[0][3], bucket[-1][4]
        if end > begin:
            found.append(packed.content[begin:end])
    return found
