"""The sampler that params.yaml names, with the environment's settings; and the align stage on a server."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from pipelines.config.params import Params, parse_params
from pipelines.config.yaml_files import read_yaml
from pipelines.runtime.context import RunContext
from pipelines.runtime.journal import read
from pipelines.runtime.run import Run
from pipelines.training.on_policy import align
from pipelines.training.rollout_engine import _own_server, _transfer, sampling_engine
from pipelines.training.setup import accelerator
from posttrain.data.tokens import TextEncoder
from posttrain.errors import ConfigError, Interrupted
from posttrain.models.folders import load_policy, save_model
from posttrain.models.tiny import byte_tokenizer
from posttrain.rollouts.groups import Problem
from posttrain.rollouts.native import NativeEngine
from posttrain.rollouts.vllm import VllmEngine
from posttrain.rollouts.vllm.local import LocalServer
from tests.models import small
from tests.rollouts.peer import Peer

MODEL = Path("models/align/grpo-0")
SETTINGS = {
    "steps": 3, "prompts_per_step": 2, "samples_per_prompt": 2, "max_new_tokens": 6, "rollouts": {"engine": "vllm"},
}  # fmt: skip


@pytest.fixture
def params(root: Path) -> Params:
    tree = read_yaml(root / "params.yaml")
    tree["align"]["on_policy"] |= SETTINGS
    tree["align"]["checkpoint"]["every_steps"] = 1
    tree["project"]["algorithms"] = ["grpo"]
    tree["rewards"] = tree["rewards"] | {"short": {"function": "length", "arguments": {"target": 3, "tolerance": 9}}}
    tree["algorithms"] = {"grpo": {"preset": "grpo", "rewards": {"short": 1.0}}}
    return parse_params(tree)


@pytest.fixture
def new_run(tmp_path: Path, params: Params, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    """A run of the align stage in its own project; made again it is the same run, cut off before."""
    monkeypatch.chdir(tmp_path)
    for name in ("URLS", "PYTHON", "ARGS", "DEVICES", "FOLDER", "TRANSFER", "SLEEP"):
        monkeypatch.delenv(f"POSTTRAIN_VLLM_{name}", raising=False)
    save_model(small.language_model(), byte_tokenizer(64), Path("models/sft"), "")
    Path("data/valid").mkdir(parents=True)
    rows = [{"id": i, "prompt": text, "answer": "?"} for i, text in enumerate(["ab", "cde", "f", "gh"])]
    pd.DataFrame(rows).to_parquet("data/valid/problems.parquet")

    def make(**options: Any) -> Run:
        args = argparse.Namespace(algorithm="grpo", seed=0, replay=None)
        context = RunContext(
            stage="align", name="align-grpo-0", args=args, directory=Path("runs/align/grpo-0"), state=tmp_path / "state",
            key="k" * 64, code="c" * 64, **({"params": params} | options),
        )  # fmt: skip
        made = Run.create(context)
        made.recorder.open({"kind": "start"}, {"kind": "params", "values": {}}, {"kind": "start"})
        return made

    return make


@pytest.fixture
def peer() -> Iterator[Peer]:
    made = Peer(small.language_model(seed=9)).start()
    yield made
    made.stop()


def steps_of(run: Run) -> dict[int, dict[str, float]]:
    return {r["step"]: r["values"] for r in read(run.context.state / "journal.jsonl") if r["kind"] == "metrics"}


def test_the_stage_trains_on_what_servers_sample_and_goes_on_after_a_stop(
    new_run: Callable[..., Run], peer: Peer, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POSTTRAIN_VLLM_URLS", f" {peer.url}, ")
    first = new_run(stop_requested=lambda: peer.paths.count("/collective_rpc") == 2)
    device = accelerator(first.context, params.align.compute, 0, Path("models/sft"))
    with pytest.raises(Interrupted):
        align(first, "grpo", 0, device, MODEL)
    assert list(steps_of(first)) == [1, 2]
    # what the servers read is gone, also after an error
    assert not list(first.context.state.glob("vllm-*"))
    second = new_run()
    align(second, "grpo", 0, device, MODEL)
    steps = steps_of(second)
    assert list(steps) == [1, 2, 3]
    kernels = [r for r in read(second.context.state / "measurements.jsonl") if r["kind"] == "kernels"]
    assert [r["attention"] for r in kernels] == ["scaled dot-product attention with masks"] * 2
    assert [r["head"] for r in kernels] == ["single operators"] * 2
    assert all(values["mismatch/max"] < 1e-5 for values in steps.values())
    # exactly on-policy: the ratio is the trainer's own, whatever the sampler said
    assert all(values["ratio/min"] == values["ratio/max"] == 1.0 for values in steps.values())
    # once for every step, each time with the weights of the update before
    assert peer.paths.count("/collective_rpc") == 3
    trained, start = load_policy("models/align/grpo-0"), load_policy("models/sft")
    assert not torch.equal(trained.lm_head.weight, start.lm_head.weight)


def stale(params: Params, staleness: int, engine: str, **options: Any) -> Params:
    tree = params.model_dump(exclude_unset=True)
    tree["align"]["on_policy"]["rollouts"] = {"engine": engine, "staleness": staleness}
    tree["algorithms"]["grpo"]["options"] = {"anchor": "rollout"} | options
    return parse_params(tree)


def test_servers_sample_the_next_step_with_the_weights_before_the_update(
    new_run: Callable[..., Run], peer: Peer, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POSTTRAIN_VLLM_URLS", peer.url)
    chosen = stale(params, 1, "vllm")
    device = accelerator(new_run().context, params.align.compute, 0, Path("models/sft"))
    run = new_run(params=chosen)
    align(run, "grpo", 0, device, MODEL)
    steps = steps_of(run)
    assert [values["staleness/mean"] for values in steps.values()] == [0.0, 1.0, 1.0]
    # the third step's answers are of the weights after the first update, which the server loads once
    assert peer.paths.count("/collective_rpc") == 2
    assert steps[1]["mismatch/max"] < 1e-5 < steps[2]["mismatch/max"]
    assert not list(run.context.state.glob("vllm-*"))


@pytest.mark.slow
def test_a_stage_samples_ahead_in_a_process_and_resumes_to_the_same_numbers(
    new_run: Callable[..., Run], params: Params
) -> None:
    chosen = stale(params, 1, "native")
    device = accelerator(new_run().context, params.align.compute, 0, Path("models/sft"))
    straight = new_run(params=chosen)
    align(straight, "grpo", 0, device, MODEL)
    expected = steps_of(straight)
    assert [values["staleness/max"] for values in expected.values()] == [0.0, 1.0, 1.0]
    shutil.rmtree("state")
    stops = iter([False, True])
    with pytest.raises(Interrupted):
        align(new_run(params=chosen, stop_requested=lambda: next(stops)), "grpo", 0, device, MODEL)
    resumed = new_run(params=chosen)
    align(resumed, "grpo", 0, device, MODEL)
    assert steps_of(resumed) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"anchor": "old"},
            r"algorithms.grpo: rollouts.staleness = 2: .*nothing corrects for that.*Set anchor to 'rollout'",
        ),
        ({"anchor": "old", "mismatch": "truncate"}, ""),
        (
            {"staleness": 3},
            "algorithms.grpo: rollouts.staleness = 3: all answers of the 3 steps would come from .* start.*set a smaller one",
        ),
    ],
)
def test_answers_of_older_weights_need_a_correction(params: Params, options: dict[str, Any], message: str) -> None:
    if message:
        with pytest.raises(ConfigError, match=message):
            stale(params, **({"staleness": 2, "engine": "native"} | options))
    else:
        budget: Any = stale(params, 2, "native", **options).budget("grpo")
        assert budget.rollouts.staleness == 2


def test_an_algorithm_that_starts_from_the_base_model_moves_away_from_it_only(
    new_run: Callable[..., Run], params: Params
) -> None:
    """A first step's KL is to the model before training, so it is 0; a different supervised model would give another one."""
    save_model(small.language_model(seed=5), byte_tokenizer(64), Path("models/base"), "")
    tree = params.model_dump(exclude_unset=True)
    tree["algorithms"]["grpo"]["start"] = "base"
    tree["align"]["on_policy"]["rollouts"] = {"engine": "native"}
    run = new_run(params=parse_params(tree))
    align(run, "grpo", 0, accelerator(run.context, params.align.compute, 0, Path("models/base")), MODEL)
    assert steps_of(run)[1]["kl/ref_k1"] == pytest.approx(0.0, abs=1e-6)
    trained = load_policy("models/align/grpo-0").lm_head.weight
    near, far = ((trained - load_policy(f"models/{name}").lm_head.weight).abs().max() for name in ("base", "sft"))
    assert 0 < near < 0.1 * far


def test_an_adapter_is_served_with_its_base(
    new_run: Callable[..., Run], peer: Peer, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POSTTRAIN_VLLM_URLS", peer.url)
    tree = params.model_dump(exclude_unset=True)
    tree["align"]["lora"] = {"rank": 2, "alpha": 8.0}
    tree["align"]["on_policy"]["optimizer"]["learning_rate"] = 0.05
    run = new_run(params=parse_params(tree))
    align(run, "grpo", 0, accelerator(run.context, params.align.compute, 0, Path("models/sft")), MODEL)
    assert all(values["mismatch/max"] < 1e-4 for values in steps_of(run).values())
    served, start = peer.model, load_policy("models/sft")
    with torch.no_grad():
        moved = served(torch.tensor([[5, 6, 7]])).logits - start(torch.tensor([[5, 6, 7]])).logits
    assert moved.abs().max() > 0.1


def test_the_seeds_of_a_resumed_run_are_those_of_an_undisturbed_one(
    new_run: Callable[..., Run], peer: Peer, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POSTTRAIN_VLLM_URLS", peer.url)
    device = accelerator(new_run().context, params.align.compute, 0, Path("models/sft"))

    def asked() -> list[tuple[Any, ...]]:
        return [(tuple(b["prompt"]), b["seed"]) for b in peer.asked if "stop_token_ids" in b]

    align(new_run(), "grpo", 0, device, MODEL)
    undisturbed = sorted(asked())
    shutil.rmtree("state")
    peer.asked = []
    with pytest.raises(Interrupted):
        align(new_run(stop_requested=lambda: bool(asked())), "grpo", 0, device, MODEL)
    align(new_run(), "grpo", 0, device, MODEL)
    assert sorted(asked()) == undisturbed
    assert len(undisturbed) == 3 * 2 * 2


def engine(run: Run, params: Params) -> Any:
    encoder = TextEncoder(byte_tokenizer(64), 64)
    problems = [Problem("ab", (5, 6, 7), {}), Problem("c", (9,), {})]
    device = accelerator(run.context, params.align.compute, 0, Path("models/sft"))
    return sampling_engine(
        run.context, "grpo", small.language_model(), encoder, "models/sft", problems, device, lambda: 0
    )


def test_without_a_server_or_an_environment_for_one_it_says_what_to_type(
    new_run: Callable[..., Run], params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_run()
    with pytest.raises(ConfigError, match=r"no server is named\. .*infra/vllm/setup\.sh"):
        engine(run, params)
    monkeypatch.setenv("POSTTRAIN_VLLM_PYTHON", "nowhere/python")
    with pytest.raises(ConfigError, match="POSTTRAIN_VLLM_PYTHON: nowhere/python does not exist"):
        engine(run, params)
    monkeypatch.setenv("POSTTRAIN_VLLM_URLS", "127.0.0.1:8000")
    with pytest.raises(ConfigError, match=r"'127\.0\.0\.1:8000' is not the address of a server; write e\.g\. http://"):
        engine(run, params)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("TRANSFER", "rdma", "POSTTRAIN_VLLM_TRANSFER = 'rdma' is no way to bring weights to servers; set memory"),
        ("TRANSFER", "nccl:host", "nccl:HOST:PORT or stream:HOST:PORT with an address of this machine"),
        (
            "TRANSFER",
            "ipc",
            "ipc, and the trainer is on a CPU: CUDA IPC needs a GPU that trainer and server share; set memory",
        ),
        ("TRANSFER", "stream:host", "stream:HOST:PORT with an address of this machine"),
        ("SLEEP", "1", "POSTTRAIN_VLLM_SLEEP is set, and the trainer is on a CPU"),
    ],
)
def test_a_way_that_does_not_exist_here_is_refused(
    new_run: Callable[..., Run],
    params: Params,
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    value: str,
    message: str,
) -> None:
    monkeypatch.setenv("POSTTRAIN_VLLM_URLS", "http://one:8000")
    monkeypatch.setenv(f"POSTTRAIN_VLLM_{variable}", value)
    with pytest.raises(ConfigError, match=message):
        engine(new_run(), params)


@pytest.mark.parametrize(
    ("way", "visible", "devices", "message"),
    [
        ("ipc", "4,5", "", None),
        ("ipc", "4,5", "5", None),
        ("ipc", "4,5", "4", r"DEVICES = 4 is not the trainer's GPU \(5\): .*set nccl"),
        ("ipc", "", "0,2", r"DEVICES = 0,2 is not the trainer's GPU \(1\)"),
        ("nccl", "4,5", "6,7", None),
        ("nccl:10.0.0.1:5000", "4,5", "", r"on the trainer's GPU \(5\), which NCCL refuses; set ipc"),
        ("nccl", "GPU-a,GPU-b", "GPU-c, GPU-b", r"on the trainer's GPU \(GPU-b\)"),
        # only the worker knows whether an index and a UUID are one device
        ("nccl", "GPU-a,GPU-b", "1", None),
    ],
)
def test_ways_that_the_devices_do_not_allow_are_refused(
    monkeypatch: pytest.MonkeyPatch, way: str, visible: str, devices: str, message: str | None
) -> None:
    for name, value in [
        ("POSTTRAIN_VLLM_TRANSFER", way),
        ("CUDA_VISIBLE_DEVICES", visible),
        ("POSTTRAIN_VLLM_DEVICES", devices),
        ("POSTTRAIN_VLLM_URLS", ""),
    ]:
        monkeypatch.setenv(name, value)
    lm: Any = argparse.Namespace(device=torch.device("cuda:1"))
    if message is None:
        assert _transfer(lm) == way
    else:
        with pytest.raises(ConfigError, match=message):
            _transfer(lm)
    # servers of your own report their devices themselves
    monkeypatch.setenv("POSTTRAIN_VLLM_URLS", "http://one:8000")
    assert _transfer(lm) == way


@pytest.mark.parametrize("urls", ["", "http://one:8000 unix:/run/vllm.sock"])
def test_a_stage_on_several_hosts_needs_servers_that_all_can_reach(
    new_run: Callable[..., Run], params: Params, monkeypatch: pytest.MonkeyPatch, urls: str
) -> None:
    monkeypatch.setenv("POSTTRAIN_VLLM_URLS", urls)
    monkeypatch.setattr("pipelines.training.rollout_engine.on_one_host", lambda _: False)
    with pytest.raises(ConfigError, match=r"several hosts: .*POSTTRAIN_VLLM_URLS=http://HOST:8000"):
        engine(new_run(), params)
    monkeypatch.setenv("POSTTRAIN_VLLM_URLS", "http://one:8000,https://two")
    assert [server.url for server in engine(new_run(), params).fleet.servers] == ["http://one:8000", "https://two"]


def test_a_server_is_started_as_the_environment_says(
    new_run: Callable[..., Run], params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_run()
    python = Path(".venv-vllm/bin/python")
    python.parent.mkdir(parents=True)
    python.symlink_to("/bin/sh")
    monkeypatch.setenv("POSTTRAIN_VLLM_ARGS", "--enforce-eager --max-num-seqs 8")
    monkeypatch.setenv("POSTTRAIN_VLLM_DEVICES", "1")
    made = engine(run, params)
    assert isinstance(made, VllmEngine)
    (server,) = made.fleet.servers
    assert isinstance(server, LocalServer)
    command = server.launch.command(Path("weights"), Path("/private/vllm.sock"))
    assert made.published is None
    assert "--worker-extension-cls" not in command
    monkeypatch.setenv("POSTTRAIN_VLLM_TRANSFER", "memory")
    fetching = engine(run, params)
    assert fetching.published.stream is None
    fetched = fetching.fleet.servers[0].launch.command(Path("weights"), Path("/private/vllm.sock"), empty=True)
    assert {("--worker-extension-cls", "posttrain_receiver.Receiver"), ("--load-format", "dummy")} <= set(
        pairwise(fetched)
    )
    # the server has another working directory
    assert command[0] == str(python.absolute())
    monkeypatch.setenv("POSTTRAIN_VLLM_PYTHON", str(python))
    assert engine(run, params).fleet.servers[0].launch.python == str(python.absolute())
    assert command[-3:] == ["--enforce-eager", "--max-num-seqs", "8"]
    pairs = set(pairwise(command))
    # prompt and answer have 9 tokens at most, and a probe of 48 must fit as well
    assert {("--uds", "/private/vllm.sock"), ("--max-model-len", "49"), ("--dtype", "float32")} <= pairs
    assert server.launch.environment == {"CUDA_VISIBLE_DEVICES": "1"}
    # deterministic mode on a GPU
    invariant = _own_server(Path("log"), "models/sft", 49, bf16=False, invariant=True)
    assert isinstance(invariant, LocalServer)
    assert invariant.launch.environment == {"CUDA_VISIBLE_DEVICES": "1", "VLLM_BATCH_INVARIANT": "1"}
    assert invariant.launch.memory_share is None
    monkeypatch.delenv("POSTTRAIN_VLLM_DEVICES")
    sharing = _own_server(Path("log"), "models/sft", 49, bf16=False, share=lambda: 0.4)
    assert isinstance(sharing, LocalServer)
    assert (sharing.launch.memory_share, sharing.launch.environment) == (0.4, {})
    monkeypatch.setenv("POSTTRAIN_TENSOR_PARALLEL", "2")
    with pytest.raises(ConfigError, match=r"POSTTRAIN_TENSOR_PARALLEL = 2 splits each layer.*engine: vllm"):
        engine(run, params)


def test_the_native_engine_is_the_default(root: Path, new_run: Callable[..., Run], params: Params) -> None:
    plain = parse_params(read_yaml(root / "params.yaml"))
    assert isinstance(engine(new_run(params=plain), plain), NativeEngine)
    tree = params.model_dump(exclude_unset=True)
    tree["align"]["on_policy"]["rollouts"] = {"engine": "vlm"}
    with pytest.raises(ConfigError, match=r"align.on_policy.rollouts.engine = 'vlm': .*'native' or 'vllm'"):
        parse_params(tree)


@pytest.mark.parametrize("deterministic", [True, False])
def test_deterministic_kernels_are_a_setting(
    deterministic: bool, new_run: Callable[..., Run], params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    compute = params.align.compute.model_copy(update={"deterministic": deterministic})
    try:
        accelerator(new_run().context, compute, 0, Path("models/sft"))
        assert torch.are_deterministic_algorithms_enabled() == deterministic
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if deterministic else None)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cuda.enable_cudnn_sdp(True)
