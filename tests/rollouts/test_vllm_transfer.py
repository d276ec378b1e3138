"""Weights that servers fetch from the trainer's memory, and servers that sleep while the trainer works."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from posttrain.errors import RolloutError, ServerError, StaleWeightsError
from posttrain.models.lora import Adapter
from posttrain.models.plain import plain_state
from posttrain.rollouts.engine import SamplingSettings
from posttrain.rollouts.vllm.published import Published
from posttrain.rollouts.vllm.sleep import Sleep
from posttrain.settings import LoraSettings
from tests.models import small
from tests.rollouts.served import Setup, requests
from tests.rollouts.test_vllm import gap

SHORT = SamplingSettings(3, 0.8)
WAYS = ["memory", "stream:127.0.0.1:0", "nccl", "ipc"]


@pytest.fixture
def served(start: Callable[..., Setup]) -> Iterator[Callable[..., Setup]]:
    """Servers that fetch their weights."""
    engines = []

    def make(way: str, policy: Any = None, **options: Any) -> Setup:
        setup = start(policy=policy, at_first=small.tied_llama(3) if policy is not None else None)
        setup.engine = setup.new_engine(transfer=way, **options)
        engines.append(setup.engine)
        return setup

    yield make
    for engine in engines:
        engine.close()


@pytest.mark.parametrize("way", WAYS)
def test_servers_fetch_every_version_and_no_weights_are_written(served: Callable[..., Setup], way: str) -> None:
    setup = served(way, small.tied_llama())
    for _ in range(2):
        assert gap(setup.policy, setup.sample(SHORT), 0.8) < 1e-5
        setup.update()
    setup.sample(SHORT)
    assert len(setup.peers[0].fetched) == 3
    assert not list(setup.folder.rglob("*.safetensors"))


@pytest.mark.parametrize("way", WAYS[:2])  # the others: test_vllm_device.py
def test_with_an_adapter_only_the_adapter_travels_again(served: Callable[..., Setup], way: str) -> None:
    lm = small.tied_llama()
    Adapter(lm, LoraSettings(2, 4.0, ("q_proj",)))
    setup = served(way, lm)
    for number in range(2):
        for name, parameter in lm.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.5, generator=torch.Generator().manual_seed(number))
        assert gap(lm, setup.sample(SHORT), 0.8) < 1e-5
        setup.version += 1
    adapter = sum(4 * p.numel() for p in lm.parameters() if p.requires_grad)
    whole = sum(4 * t.numel() for t in plain_state(lm, torch.float32).values())
    # every version is merged from the base, which the worker keeps
    assert setup.peers[0].fetched == [whole + adapter, adapter]


def test_what_is_published_is_a_file_of_safetensors(tmp_path: Path) -> None:
    lm = small.tied_llama()
    published = Published(lm, torch.bfloat16)
    published.take(1)
    content = Path(published.sources(1)[0]["path"]).read_bytes()
    (tmp_path / "copy.safetensors").write_bytes(content)
    expected = plain_state(lm, torch.bfloat16)
    with safe_open(tmp_path / "copy.safetensors", "pt") as file:
        assert set(file.keys()) == set(expected)
        assert all(torch.equal(file.get_tensor(name), expected[name]) for name in expected)
    published.close()


def test_a_snapshot_keeps_its_weights_while_the_policy_moves_on(served: Callable[..., Setup]) -> None:
    setup = served("memory")
    taken = []
    for _ in range(2):
        taken.append(setup.engine.snapshot(SHORT))
        setup.update()
    older, newer = (setup.engine.sample_with(each, requests(1), SHORT) for each in taken)
    assert older != newer
    setup.update(1.2**-2)
    assert gap(setup.policy, older, 0.8) < 1e-4
    setup.update()
    assert gap(setup.policy, newer, 0.8) < 1e-4


def test_a_transfer_that_does_not_arrive_is_caught_by_the_probe(served: Callable[..., Setup]) -> None:
    setup = served("memory")
    setup.sample(SHORT)
    setup.peers[0].loads = False
    setup.update()
    with pytest.raises(StaleWeightsError, match="so the load had no effect"):
        setup.sample(SHORT)
    # the folder to which such a message may refer
    assert (setup.folder / "weights-1" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": "/proc/1/fd/99999"}, "cannot read the weights .*POSTTRAIN_VLLM_TRANSFER=stream:HOST:PORT"),
        ({"mark": "0"}, "holds other weights than the trainer's"),
    ],
)
def test_memory_that_a_server_does_not_reach_is_refused_in_words(
    served: Callable[..., Setup], change: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = served("memory")
    published: Any = setup.engine.published
    own = published.sources
    monkeypatch.setattr(published, "sources", lambda version: [source | change for source in own(version)])
    with pytest.raises(RolloutError, match=message):
        setup.sample(SHORT)


def test_a_process_that_cannot_broadcast_leaves_a_lost_server_to_the_main_process(served: Callable[..., Setup]) -> None:
    setup = served("nccl")
    setup.sample(SHORT)
    # as in the other processes, which get the sources from the main one
    setup.engine.published.close()
    setup.engine.published = None
    with pytest.raises(ServerError, match="only the main process can send it weights by nccl"):
        setup.engine._load(setup.engine.fleet.servers[0])


class Device:
    """A device whose free memory follows its server's sleep."""

    def __init__(self, setup: Setup, held: float = 1.0) -> None:
        self.weights = sum(4 * t.numel() for t in plain_state(setup.policy, torch.float32).values())
        self.free, self.held = 0, held
        setup.peers[0].memory = self.change

    def change(self, sign: int) -> None:
        self.free += int(sign * self.held * self.weights)

    def sleep(self) -> Sleep:
        return Sleep(lambda: self.free, self.weights)


def test_a_server_sleeps_between_the_samples_and_wakes_with_the_weights_of_then(start: Callable[..., Setup]) -> None:
    setup = start()
    device = Device(setup)
    setup.engine = setup.new_engine(sleep=device.sleep())
    for _ in range(2):
        assert gap(setup.policy, setup.sample(SHORT), 0.8) < 1e-5
        assert device.free == device.weights
        setup.update()
    pages = [path for path in setup.peers[0].paths if path != "/v1/completions"]
    load = ["/collective_rpc", "/reset_prefix_cache"]
    assert pages == [*load, "/sleep", "/wake_up", *load, "/wake_up", "/sleep"]


@pytest.mark.parametrize(
    ("sleeps", "held", "message"), [(False, 1.0, "does not sleep: start it on a GPU"), (True, 0.5, "MiB more free")]
)
def test_a_server_that_keeps_its_memory_is_refused_in_words(
    start: Callable[..., Setup], sleeps: bool, held: float, message: str
) -> None:
    setup = start()
    device = Device(setup, held)
    if not sleeps:
        setup.peers[0].memory = None
    setup.engine = setup.new_engine(sleep=device.sleep())
    with pytest.raises(RolloutError, match=message):
        setup.sample(SHORT)


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("memory", r"cannot fetch weights \(.*posttrain_load.*--worker-extension-cls posttrain_receiver.Receiver"),
        ("folder", r"cannot sleep \(.*'cumem' is not supported.*--enable-sleep-mode"),
    ],
)
def test_a_server_of_a_different_kind_is_refused_in_words(served: Callable[..., Setup], way: str, message: str) -> None:
    setup = served(way)
    setup.peers[0].extension = False
    setup.engine.sleep = Sleep(lambda: 0, 1)
    with pytest.raises(RolloutError, match=message):
        setup.sample(SHORT)
