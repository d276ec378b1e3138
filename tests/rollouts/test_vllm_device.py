"""Weights that stay on the trainer's device: broadcasts to real workers' processes, and storages that they map."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from threading import Event, Lock
from typing import Any

import pytest
import torch
from torch.multiprocessing import reductions

from posttrain.errors import ConfigError, RolloutError, ServerError
from posttrain.models.lora import Adapter
from posttrain.models.plain import plain_state
from posttrain.rollouts.vllm.broadcast import Sender
from posttrain.rollouts.vllm.local import WORKER
from posttrain.rollouts.vllm.published import Published
from posttrain.rollouts.vllm.worker import posttrain_group as gpu
from posttrain.settings import LoraSettings
from tests.models import small

URL = "http://server"


class Workers:
    """The processes of tests/rollouts/receiving.py."""

    def __init__(self, count: int) -> None:
        command = [sys.executable, str(Path(__file__).with_name("receiving.py")), str(count)]
        self.lock = Lock()
        environment = os.environ | {"PYTHONPATH": str(WORKER)}
        self.process: Any = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
        )

    def call(self, method: str, **arguments: Any) -> list[Any]:
        with self.lock:
            print(json.dumps({"method": method, "kwargs": arguments}), file=self.process.stdin, flush=True)
            results = json.loads(self.process.stdout.readline())
        if results is None:
            raise ServerError("a worker has ended")
        return results

    def take(self, published: Published, version: int) -> list[Any]:
        """Bring a version to all workers."""
        sources = published.sources(version)
        if published.sender is None:
            return self.call("posttrain_load", sources=sources)
        members, load = (
            partial(self.call, "posttrain_groups"),
            lambda announced: self.call("posttrain_load", sources=announced),
        )
        return published.sender.send(URL, sources, members, load)


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    made = Workers(2)
    yield made
    # a worker may still wait for the trainer
    os.killpg(made.process.pid, signal.SIGKILL)
    made.process.wait()


def bits(state: dict[str, torch.Tensor]) -> dict[str, list[int]]:
    return {name: tensor.contiguous().flatten().view(torch.uint8).tolist() for name, tensor in state.items()}


@pytest.mark.parametrize("way", ["nccl", "ipc"])
def test_every_worker_gets_every_version_to_the_bit(
    workers: Workers, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = small.tied_llama()
    published = Published(lm, torch.bfloat16, way)
    for version in range(2):
        published.remove(version)
        published.take(version)
        size = published.size(version)
        assert [found["bytes"] for found in workers.take(published, version)] == [size, size]
        assert workers.call("bits") == [bits(plain_state(lm, torch.bfloat16))] * 2
        with torch.no_grad():
            for parameter in lm.parameters():
                parameter.mul_(1.5)
    # two versions in turn use one piece of memory, and one group
    assert published.versions.keys() == {1}
    assert published.sender is None or len(published.sender.groups) == 1
    published.close()


@pytest.mark.parametrize("way", ["nccl", "ipc"])
def test_the_weights_below_an_adapter_travel_once(workers: Workers, way: str) -> None:
    lm = small.tied_llama()
    Adapter(lm, LoraSettings(2, 4.0, ("q_proj",)))
    published, read = Published(lm, torch.float32, way), []
    for version in range(2):
        for name, parameter in lm.named_parameters():
            if "lora_B" in name:
                parameter.data.fill_(0.5 + version)
        published.take(version)
        read.append([found["bytes"] for found in workers.take(published, version)])
        expected = {
            name: float(tensor.detach().double().sum()) for name, tensor in plain_state(lm, torch.float32).items()
        }
        for sums in workers.call("sums"):
            assert sums == pytest.approx(expected, abs=1e-4)
    adapter = sum(4 * p.numel() for p in lm.parameters() if p.requires_grad)
    whole = sum(4 * t.numel() for t in plain_state(lm, torch.float32).values())
    assert read == [[whole + adapter] * 2, [adapter] * 2]
    published.close()


def test_tensors_are_sent_in_buckets_of_a_limited_size() -> None:
    layout = [
        ("a", torch.int8, [6], 0, 6),
        ("b", torch.int8, [3], 6, 9),
        ("c", torch.int8, [0], 9, 9),
        ("d", torch.int8, [2], 9, 11),
    ]
    assert [[entry[0] for entry in bucket] for bucket in gpu.buckets(layout, 5)] == [["a"], ["b", "c", "d"]]
    assert [[entry[0] for entry in bucket] for bucket in gpu.buckets(layout, 4)] == [["a"], ["b", "c"], ["d"]]


def test_a_worker_that_refuses_ends_the_transfer_at_once(workers: Workers) -> None:
    sender = Sender("", torch.device("cpu"))
    source = {"way": "nccl", "path": sender.address, "mark": "m", "header": '{"__metadata__": {"mark": "other"}}'}

    def load(announced: list[dict[str, str]]) -> list[Any]:
        # the store of a trainer that has ended
        return workers.call("posttrain_load", sources=[each | {"path": "127.0.0.1:1"} for each in announced])

    found = sender.send(URL, [source], partial(workers.call, "posttrain_groups"), load)
    assert "cannot reach the trainer at 127.0.0.1:1" in found[0]["error"]
    assert not sender.groups
    sender.close()


@pytest.mark.parametrize(
    ("ranks", "message"), [([], r"ranks \[\]"), ([0, 0], r"ranks \[0, 0\], .*start one server for each data-parallel")]
)
def test_workers_that_are_no_group_are_refused(ranks: list[int], message: str) -> None:
    sender = Sender("", torch.device("cpu"))
    members = [{"rank": rank, "groups": []} for rank in ranks]
    with pytest.raises(RolloutError, match=message):
        sender.send(URL, [], lambda: members, lambda _: [])
    sender.close()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has all addresses of 127.0.0.0/8")
def test_the_trainer_listens_on_the_given_address_only_and_not_after_its_end() -> None:
    sender = Sender("127.0.0.2:0", torch.device("cpu"))
    port = int(sender.address.removeprefix("127.0.0.2:"))
    socket.create_connection(("127.0.0.2", port)).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
    sender.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port))


@pytest.mark.parametrize("way", ["nccl", "stream"])
@pytest.mark.parametrize("address", ["192.0.2.1:5", "127.0.0.1:99999"])
def test_an_address_that_is_none_of_this_machine_is_refused(way: str, address: str) -> None:
    with pytest.raises(RolloutError, match=f"cannot send weights from '{address}'.*{way}:HOST:PORT"):
        Published(small.tied_llama(), torch.float32, f"{way}:{address}")


def test_the_arguments_of_cuda_are_those_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare with torch.multiprocessing, which rebuilds what it has shared, on a storage that records the calls."""
    values = (3, b"\x01H\xff\x00", 4096, 512, b"/torch_1", 7, b"\x00event\xfe", True)
    shared: Any = type("Shared", (), {"device": torch.device("cuda:3"), "_share_cuda_": lambda self: values})()
    handle = json.loads(json.dumps(gpu.exported(shared)))
    calls: list[tuple[Any, ...]] = []

    def record(*arguments: Any) -> torch.UntypedStorage:
        calls.append(arguments)
        return torch.UntypedStorage(8)

    monkeypatch.setattr(torch.UntypedStorage, "_new_shared_cuda", record)
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    gpu.mapped_storage(handle, torch.device("cuda:1"))
    reductions.rebuild_cuda_tensor(
        torch.Tensor, (2,), (1,), 0, torch.UntypedStorage, torch.float32, *values[:4], False, *values[4:]
    )
    own, theirs = calls
    # the worker's index of the device; and no event, since the trainer has synchronised
    assert own == (1, *theirs[1:-1], False)
    assert theirs == values


def test_memory_of_a_trainer_that_has_ended_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = gpu.exported(torch.UntypedStorage(8))
    with pytest.raises(OSError, match="cannot map the trainer's memory on cpu"):
        gpu.mapped_storage([handle[0], b"/torch_gone".hex(), 8], torch.device("cpu"))


def test_a_worker_that_hangs_is_noticed_and_may_come_back(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    published = Published(small.tied_llama(), torch.float32, "nccl")
    published.take(0)
    workers.take(published, 0)
    hung = workers.call("pid")[1]
    monkeypatch.setattr(gpu, "PAUSE_SECONDS", 0.1)
    sources, sender = published.sources(0), published.sender
    assert sender is not None
    monkeypatch.setattr(sender, "seconds", 0.1)
    groups = workers.call("posttrain_groups")
    os.kill(hung, signal.SIGSTOP)
    try:
        with pytest.raises(ServerError, match="does not take the weights that are sent by gloo: worker 1 has not come"):
            sender.send(
                URL, sources, lambda: groups, lambda announced: workers.call("posttrain_load", sources=announced)
            )
    finally:
        os.kill(hung, signal.SIGCONT)
    monkeypatch.undo()
    assert [found["bytes"] for found in workers.take(published, 0)] == [published.size(0)] * 2
    published.close()


def test_a_worker_that_dies_is_noticed(workers: Workers) -> None:
    lm = small.tied_llama()
    published = Published(lm, torch.float32, "nccl")
    published.take(0)
    workers.take(published, 0)
    # the last test of these processes
    os.kill(workers.call("pid")[1], signal.SIGKILL)
    published.take(1)
    sources, sender = published.sources(1), published.sender
    assert sender is not None
    groups = [{"rank": rank, "groups": [sender.groups[URL].about["group"]]} for rank in range(2)]
    with pytest.raises(ServerError, match=r"a worker has ended|is lost"):
        sender.send(URL, sources, lambda: groups, lambda announced: workers.call("posttrain_load", sources=announced))
    assert not sender.groups
    published.close()


class Silent:
    """A group whose first operation never ends, as NCCL's does without one of its processes."""

    def __init__(self) -> None:
        self.asked, self.goes_on, self.aborted = Event(), Event(), Event()

    def broadcast(self, *_: Any) -> Silent:
        self.asked.set()
        self.goes_on.wait(60)
        return self

    def wait(self) -> None:
        pass

    def abort(self) -> None:
        self.aborted.set()


@pytest.mark.parametrize("ended", [False, True], ids=["hangs", "server ended"])
def test_a_first_operation_that_never_ends_is_left(ended: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    silent = Silent()
    monkeypatch.setattr(gpu, "_nccl", lambda *_: silent)
    monkeypatch.setattr(Sender, "_group", lambda sender, *_: sender.groups[URL])
    monkeypatch.setenv("POSTTRAIN_VLLM_JOIN_SECONDS", "30" if ended else "0.2")
    sender = Sender("", torch.device("cpu"))
    about = {"group": "g", "size": "2", "backend": "nccl", "host": "127.0.0.1", "seconds": str(sender.seconds)}
    sender.groups[URL] = gpu.Group(sender.store, about, 0, torch.device("cpu"))
    # the only worker has reported, and ends now
    sender.groups[URL].store.set("1/lacks/1", "m")

    def load(_: Any) -> list[Any]:
        silent.asked.wait(60)
        if ended:
            raise ServerError("a worker has ended")
        return [{"error": "TimeoutError: the trainer and the 1 workers have not connected"}] * (
            not silent.goes_on.wait(1)
        )

    words = "a worker has ended" if ended else r"by gloo: .*1 workers have not connected within 0\.2 s.*JOIN_SECONDS"
    monkeypatch.setattr(gpu, "PAUSE_SECONDS", 0.1)
    with pytest.raises(ServerError, match=words):
        sender.send(URL, [{"mark": "m"}], list, load)
    assert not sender.groups
    assert not silent.aborted.is_set()
    silent.goes_on.set()
    assert silent.aborted.wait(60)
    sender.close()


def test_a_worker_that_ends_before_the_first_broadcast_is_noticed_with_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    over = Event()
    monkeypatch.setattr(gpu, "PAUSE_SECONDS", 1.0)
    monkeypatch.setenv("POSTTRAIN_VLLM_JOIN_SECONDS", "0.2")
    sender = Sender("", torch.device("cpu"))

    def load(announced: list[dict[str, str]]) -> list[Any]:
        sender.groups[URL].store.set(f"{announced[0]['load']}/lacks/1", "m")
        over.wait(60)
        return []

    with pytest.raises(ServerError, match=r"have not connected within 0\.2 s"):
        sender.send(URL, [{"mark": "m"}], lambda: [{"rank": 0, "groups": []}], load)
    assert not sender.groups
    over.set()
    sender.close()


@pytest.mark.parametrize("given", ["0", "soon", "-1", "nan", "inf"])
def test_a_wrong_time_limit_is_refused(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTTRAIN_VLLM_JOIN_SECONDS", given)
    with pytest.raises(ConfigError, match=f"POSTTRAIN_VLLM_JOIN_SECONDS = '{given}'.*above 0"):
        Sender("", torch.device("cpu"))


def test_a_lost_worker_does_not_end_its_trainer_by_nccls_watchdog(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL's constructor reads these variables in a process with GPUs, which is not here."""
    names = ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCH_NCCL_ENABLE_MONITORING", "TORCH_NCCL_DUMP_ON_TIMEOUT")
    for name, value in zip(names, ("1", None, "1"), strict=True):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    with gpu.quiet_watchdog():
        assert [os.environ.get(name) for name in names] == ["0", "0", "0"]
    assert [os.environ.get(name) for name in names] == ["1", None, "1"]
