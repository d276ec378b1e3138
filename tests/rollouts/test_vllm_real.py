"""Real vLLM servers on this machine's CPU: `pytest -m vllm`, after infra/vllm/setup.sh or with POSTTRAIN_VLLM_PYTHON. Minutes each."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import psutil
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from posttrain.algorithms.grpo import GRPO
from posttrain.errors import RolloutError, StaleWeightsError
from posttrain.models.lora import Adapter
from posttrain.models.policy import Policy
from posttrain.models.tiny import byte_tokenizer
from posttrain.rollouts.engine import Request, SamplingSettings
from posttrain.rollouts.native import NativeEngine
from posttrain.rollouts.vllm import VllmEngine, engine
from posttrain.rollouts.vllm.local import Launch, LocalServer
from posttrain.rollouts.vllm.probe import sequences
from posttrain.rollouts.vllm.server import VllmServer
from posttrain.rollouts.vllm.sleep import Sleep
from posttrain.settings import LoraSettings, OptimizerSettings
from posttrain.training.trainer import Trainer
from tests.models import small
from tests.pipelines.conftest import wait_for
from tests.rollouts.real import PYTHON, QUICK, REAL, family, gone
from tests.rollouts.test_vllm import PROMPTS, gap, requests
from tests.training.runs import source_of

pytestmark = REAL


def qwen(tied: bool, seed: int = 0) -> Any:
    """vLLM's CPU build has no attention for heads smaller than 32."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=259, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=32, max_position_embeddings=128, tie_word_embeddings=tied, eos_token_id=small.EOS, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    return small.sharpened(Qwen3ForCausalLM(config), by=4.0).eval()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LocalServer]:
    byte_tokenizer(128).save_pretrained(tmp_path / "tokenizer")
    launch = Launch(str(PYTHON), str(tmp_path / "tokenizer"), "float32", context=64, arguments=QUICK, fetches=True)
    made = LocalServer(launch, tmp_path / "vllm.log")
    yield made
    made.close()


def engine_on(server: VllmServer, policy: Any, folder: Path, version: Callable[[], int]) -> VllmEngine:
    probes = sequences(PROMPTS, policy.config.vocab_size, 64)
    return VllmEngine(policy, small.EOS, [server], version=version, folder=folder, probes=probes)


def scaled(policy: Any, by: float) -> None:
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(by)


def test_a_tied_model_is_served_rightly_and_a_stale_head_is_caught(
    server: LocalServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, version = qwen(tied=True), [0]
    # somebody's own server, on a folder as save_pretrained writes it
    policy.save_pretrained(tmp_path / "tied")
    server.update(tmp_path / "tied")
    ours = engine_on(VllmServer(server.url), policy, tmp_path / "ours", lambda: version[0])
    for temperature in (1.0, 0.7):
        answers = ours.sample(requests(), SamplingSettings(20, temperature))
        assert gap(policy, answers, temperature) < 1e-4
        assert {c.finished for group in answers for c in group} <= {True, False}
        version[0] += 1
        scaled(policy, 1.05)
    greedy = ours.sample(requests(1), SamplingSettings(20, 0.0))
    native = NativeEngine(policy, small.EOS).sample(requests(1), SamplingSettings(20, 0.0))
    assert [g[0].tokens for g in greedy] == [g[0].tokens for g in native]

    # the folder without a head of its own, which the server reports to have loaded
    monkeypatch.setattr(engine, "write_weights", lambda lm, state, folder: lm.save_pretrained(folder))
    scaled(policy, 1.05)
    version[0] += 1
    with pytest.raises(StaleWeightsError, match="tied embeddings keeps its old output head"):
        ours.sample(requests(), SamplingSettings(20, 1.0))

    # and weights of another training
    monkeypatch.setattr(engine, "write_weights", lambda lm, state, folder: qwen(True, seed=5).save_pretrained(folder))
    version[0] += 1
    with pytest.raises(StaleWeightsError, match=r"differs by \d"):
        ours.sample(requests(), SamplingSettings(20, 1.0))


def test_weights_travel_through_memory_and_over_http_and_a_cpu_does_not_sleep(
    server: LocalServer, tmp_path: Path
) -> None:
    policy, version = qwen(tied=True), [0]
    Adapter(policy, LoraSettings(2, 4.0, ("q_proj", "up_proj")))
    settings = SamplingSettings(20, 1.0)

    def on(way: str, **options: Any) -> VllmEngine:
        # one server for all; the first engine starts it
        probes = sequences(PROMPTS, policy.config.vocab_size, 64)
        folder = tmp_path / way.partition(":")[0]
        return VllmEngine(
            policy,
            small.EOS,
            [server],
            version=lambda: version[0],
            folder=folder,
            probes=probes,
            transfer=way,
            **options,
        )

    for way in ("memory", "stream:127.0.0.1:0", "nccl", "ipc"):
        engine = on(way)
        for number in range(3):
            for name, parameter in policy.named_parameters():
                if "lora_B" in name:
                    parameter.data.normal_(std=0.3, generator=torch.Generator().manual_seed(number))
            assert gap(policy, engine.sample(requests(), settings), 1.0) < 1e-4
            version[0] += 1
        assert not list(engine.folder.rglob("*.safetensors"))
    plain = qwen(tied=True, seed=3)
    whole = VllmEngine(
        plain,
        small.EOS,
        [server],
        version=lambda: 0,
        folder=tmp_path / "plain",
        probes=engine.probes,
        transfer="memory",
    )
    assert gap(plain, whole.sample(requests(), settings), 1.0) < 1e-4
    version[0] += 1
    # vLLM's CPU build reports that it sleeps, and keeps its memory
    asleep = on("memory", sleep=Sleep(lambda: psutil.virtual_memory().available, 2**40))
    with pytest.raises(RolloutError, match=r"does not sleep|MiB more free memory"):
        asleep.sample(requests(), settings)


def test_each_worker_of_a_tensor_parallel_server_receives_whole_tensors_and_keeps_its_part(
    server: LocalServer, tmp_path: Path
) -> None:
    server.launch = replace(server.launch, arguments=(*QUICK, "--tensor-parallel-size", "2"))
    policy, version = qwen(tied=True), [0]
    probes = sequences(PROMPTS, policy.config.vocab_size, 64)
    ours = VllmEngine(
        policy,
        small.EOS,
        [server],
        version=lambda: version[0],
        folder=tmp_path / "served",
        probes=probes,
        transfer="nccl",
    )
    for _ in range(2):
        assert gap(policy, ours.sample(requests(), SamplingSettings(20, 1.0)), 1.0) < 1e-4
        scaled(policy, 1.05)
        version[0] += 1
    assert ours.published is not None
    assert ours.published.sender is not None
    assert [group.size for group in ours.published.sender.groups.values()] == [3]


def test_grpo_goes_on_through_the_death_of_its_server(server: LocalServer, tmp_path: Path) -> None:
    policy, reference = Policy(qwen(tied=False)), Policy(qwen(tied=False))
    spec = replace(GRPO, minibatches=1)
    source, objective = source_of(spec, policy, reference)
    trainer: Trainer[Any] = Trainer(policy, OptimizerSettings(3e-3), total_steps=4, micro_batch_tokens=400)
    sampler = engine_on(server, policy.lm, tmp_path / "served", lambda: trainer.updates)
    source.sampler.engine = sampler
    pids = []
    for step in range(3):
        if step == 2:
            killed = family(server._process.pid)  # type: ignore[union-attr]
            Thread(target=kill_under_load, args=(server, killed)).start()
            # more than the server has answered by then
            many = [Request(p, tuple((7, i) for i in range(40))) for p in PROMPTS]
            answers = sampler.sample(many, SamplingSettings(50, 1.0))
            assert [len(group) for group in answers] == [40] * 3
            assert gap(policy.lm, [group[:3] for group in answers], 1.0) < 1e-4
            assert gone(killed)
        (batch,) = source.next(step).batches
        metrics = trainer.update(batch, objective)
        assert metrics["mismatch/max"] < 1e-4
        assert metrics["ratio/max"] == 1.0
        pids.append(server._process.pid)  # type: ignore[union-attr]
    assert pids[0] == pids[1] != pids[2]
    last = family(pids[2])
    # the guard, the API server, its engine core and worker
    assert len(last) >= 4
    sampler.close()
    assert gone(last)


def kill_under_load(server: LocalServer, processes: list[psutil.Process]) -> None:
    wait_for(lambda: len(server._open) > 10)
    time.sleep(0.3)
    (serving,) = [p for p in processes if p.ppid() == processes[0].pid]
    serving.send_signal(signal.SIGKILL)
