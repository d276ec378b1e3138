"""Plans for devices that this machine does not have: a GPU, a server next to the trainer, a model of which only config.json is here."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.commands.plan import main, page, phases
from pipelines.commands.server_share import server_lines
from pipelines.config.params import Params, parse_params
from pipelines.config.yaml_files import read_yaml
from pipelines.training.planned_memory import memory_next_to_server, published_bytes
from posttrain.models.lora import Adapter
from posttrain.models.tiny import TinyShape, tiny_config
from posttrain.planning import Sizes, sizes
from posttrain.rollouts.vllm.published import Published
from posttrain.settings import LoraSettings
from tests.models import small

GIB = 2**30


@pytest.fixture
def made(root: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Return the project's parameters with two algorithms and other settings of `align`."""
    for name in ("VLLM_URLS", "VLLM_DEVICES", "VLLM_SLEEP", "VLLM_TRANSFER", "ACCELERATE", "SAMPLER_DEVICES"):
        monkeypatch.delenv(f"POSTTRAIN_{name}", raising=False)

    def tree(engine: str = "vllm", **align: Any) -> dict[str, Any]:
        found: dict[str, Any] = read_yaml(root / "params.yaml")
        found["project"]["algorithms"] = ["ppo", "grpo"]
        found["algorithms"]["ppo"]["rewards"] = {"rm": 1.0}
        found["algorithms"]["grpo"]["rewards"] = {"answer": 1.0}
        found["align"]["on_policy"]["rollouts"] = {"engine": engine}
        found["align"] |= align
        return found

    return tree


def test_a_server_leaves_room_for_all_models_of_its_trainer(made: Callable[..., dict[str, Any]]) -> None:
    config = tiny_config(TinyShape())
    one = 4 * sizes(config).parameters
    params = parse_params(made())
    # PPO: policy, critic, reference and reward model; gradients and two moments of the first two
    asleep = memory_next_to_server(params, "ppo", config, "cuda", sleeps=True)
    assert (asleep.weights, asleep.optimiser, asleep.total) == (4 * one, 2 * 3 * one, 10 * one)
    awake = memory_next_to_server(params, "ppo", config, "cuda")
    assert awake.total > asleep.total + awake.activations > asleep.total
    # GRPO with a rule as its reward: policy and reference; three snapshots for a server that copies them
    assert memory_next_to_server(params, "grpo", config, "cuda", 3, sleeps=True).total == (2 + 3 + 3) * one
    # an adapter of rank 4 on q_proj, 128 to 128, in two layers; the base is the reference
    adapter = 4 * 2 * 4 * (128 + 128)
    lora = parse_params(made(lora={"rank": 4, "alpha": 8, "target_modules": ["q_proj"]}))
    assert memory_next_to_server(lora, "grpo", config, "cuda", 1, sleeps=True).total == one + (1 + 3 + 1) * adapter


def test_processes_that_share_weights_leave_a_server_more(
    root: Path, made: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, params = tiny_config(TinyShape()), parse_params(made())
    whole = memory_next_to_server(params, "grpo", config, "cuda", sleeps=True)
    monkeypatch.setenv("POSTTRAIN_ACCELERATE", str(root / "infra/accelerate/fsdp2_cpu.yaml"))
    assert memory_next_to_server(params, "grpo", config, "cuda", sleeps=True).optimiser * 2 == whole.optimiser


@pytest.mark.parametrize("kind", ["ddp_cpu", "fsdp2_cpu"])
def test_processes_divide_the_answers_of_a_step(
    kind: str, root: Path, made: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    params, model = parse_params(made("native")), sizes(tiny_config(TinyShape()))

    def caches() -> list[int]:
        return [
            p.memory.cache
            for p in phases(params, model)
            if p.stage in ("align@grpo", "evaluate") and p.name == "sample"
        ]

    (step, evaluation) = caches()
    monkeypatch.setenv("POSTTRAIN_ACCELERATE", str(root / f"infra/accelerate/{kind}.yaml"))
    # 32 prompts of a step over two processes; 400 of an evaluation fill the sampler on each of them
    assert caches() == [step // 2, evaluation]


def lines(params: Params, limit: float, device: str = "cuda") -> list[tuple[str, bool]]:
    config = tiny_config(TinyShape())
    return [(line.text, line.fits) for line in server_lines(params, config, device, int(limit * GIB))]


def test_the_plan_names_a_servers_share(made: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    params = parse_params(made())
    (ppo, _), (grpo, _) = lines(params, 100)
    assert ppo.startswith("align@ppo: a vLLM server on the same GPU gets 9")
    assert grpo.endswith("of its memory, 94.0 GiB, of which its weights take 0.0 GiB")
    ((refused, fits), _) = lines(params, 0.1)
    assert refused.startswith("align@ppo would stop: training needs ")
    assert not fits
    assert lines(params, 100, "cpu") == lines(parse_params(made("native")), 100) == []
    monkeypatch.setenv("POSTTRAIN_VLLM_SLEEP", "1")
    assert lines(params, 100)[1][0].endswith("it sleeps during updates")
    monkeypatch.setenv("POSTTRAIN_VLLM_DEVICES", "1")
    assert lines(params, 100) == []


def test_an_evaluation_that_does_not_fit_is_not_advised_to_shard(made: Callable[..., dict[str, Any]]) -> None:
    params, big = parse_params(made()), sizes(tiny_config(TinyShape(hidden_size=1024, intermediate_size=4096)))
    (phase,) = (one for one in phases(params, big) if one.stage == "evaluate")
    assert "evaluate (sample) does not fit" in (text := page(params, big, [phase], 1 << 20))
    assert text.endswith("most of it for weights; use a smaller model.")


def test_a_process_that_samples_ahead_has_its_snapshots_in_main_memory(
    made: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Sizes(parameters=1000, hidden=8, layers=2, query_width=8, key_width=4, intermediate=16, vocabulary=50)
    ahead = made("native")
    ahead["algorithms"]["grpo"] |= {"budget": {"rollouts": {"staleness": 2}}, "options": {"anchor": "rollout"}}

    def held(tree: dict[str, Any], device: str) -> int:
        planned = {(p.stage, p.name): p.memory for p in phases(parse_params(tree), model, device=device)}
        return planned["align@grpo", "train"].weights

    now = held(made("native"), "cuda")
    assert held(ahead, "cpu") - now == 3 * 4000
    assert held(ahead, "cuda") - now == 4000
    monkeypatch.setenv("POSTTRAIN_SAMPLER_DEVICES", "1")
    assert held(ahead, "cuda") == now


def test_a_plan_for_a_gpu_needs_no_gpu_no_weights_and_no_package(
    made: Callable[..., dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("posttrain.extras.find_spec", lambda name: None)
    tree = made("native", lora={"rank": 4, "alpha": 8, "base_bits": 4})
    folder = tmp_path / "model"
    folder.mkdir()
    config = {**tiny_config(TinyShape()).to_dict(), "architectures": ["Qwen3ForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    tree["model"]["source"] = str(folder)
    tree["align"]["compute"]["gradient_checkpointing"] = True
    (tmp_path / "params.yaml").write_text(json.dumps(tree))
    command = ["--params", str(tmp_path / "params.yaml"), "--device", "cuda"]
    assert main([*command, "--memory", "80"]) == 0
    printed = capsys.readouterr().out
    assert "a GPU has 80.0 GiB" in printed
    assert "align.lora.base_bits = 4 needs the package bitsandbytes; install it" in printed
    assert main([*command, "--memory", "0.01"]) == 1
    printed = capsys.readouterr().out
    assert "for activations; lower compute.micro_batch_tokens, or set compute.gradient_checkpointing." in printed
    assert "for activations; lower compute.micro_batch_tokens.\n" in printed
    with pytest.raises(SystemExit):
        main(command)
    assert "--device cuda needs --memory GIB" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("way", "device", "staleness", "bf16", "lora", "bytes_held"),
    [
        # 5,840 parameters, and the head of 640 that is tied to the embeddings travels, too
        ("ipc", "cuda", 0, False, False, 4 * 6480),
        ("nccl:10.0.0.1:5", "cuda", 2, True, False, 3 * 2 * 6480),
        ("memory", "cpu", 1, True, False, 2 * 2 * 6480),
        ("stream:127.0.0.1:0", "cuda", 1, False, False, 0),
        ("folder", "cpu", 1, False, False, 0),
        ("", "cuda", 0, False, False, 0),
        # two layers of a rank-2 adapter, 16 to 16 numbers each: 128; on a CPU the weights below it are there once
        ("ipc", "cuda", 1, True, True, 2 * 4 * 128),
        ("memory", "cpu", 1, True, True, 2 * 4 * 128 + 4 * 6480),
    ],
)
def test_copies_for_servers_are_on_the_trainers_device(
    way: str, device: str, staleness: int, bf16: bool, lora: bool, bytes_held: int,
    made: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("POSTTRAIN_VLLM_TRANSFER", way)
    lm = small.tied_llama()
    tree = made()
    tree["algorithms"]["grpo"] |= {"budget": {"rollouts": {"staleness": staleness}}, "options": {"anchor": "rollout"}}
    params, options = (
        parse_params(tree),
        {"adapter": 128 if lora else None, "quantised": 0, "bf16": bf16, "device": device, "processes": 1},
    )
    assert published_bytes(params, "grpo", sizes(lm.config), options) == bytes_held
    if not bytes_held:
        return
    if lora:
        Adapter(lm, LoraSettings(2, 4.0, ("q_proj",)))
    with closing(Published(lm, torch.bfloat16 if bf16 else torch.float32, "memory")) as published:
        for version in range(1 + staleness):
            published.take(version)
        below = published.base.bytes if published.base and device == "cpu" else 0
        assert sum(file.bytes for file in published.versions.values()) + below == bytes_held


def test_the_plan_counts_the_copies_for_servers(
    made: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(TinyShape())
    params, model = parse_params(made()), sizes(config)

    def held() -> dict[tuple[str, str], int]:
        found = phases(params, model, device="cuda")
        return {(phase.stage, phase.name): phase.memory.weights for phase in found if phase.stage == "align@grpo"}

    before = held()
    monkeypatch.setenv("POSTTRAIN_VLLM_TRANSFER", "ipc")
    assert {key: value - before[key] for key, value in held().items()} == dict.fromkeys(before, 4 * model.parameters)
    assert set(before) == {("align@grpo", "sample"), ("align@grpo", "train")}
