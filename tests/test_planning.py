"""The plan's numbers against sums by hand, against the tensors that autograd saves, and against the steps' own log lines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.commands.plan import main, page, phases
from pipelines.config.params import Params, load_params, parse_params, read_yaml
from posttrain.data.batches import collate
from posttrain.data.tokens import Tokens
from posttrain.models.policy import Policy
from posttrain.models.tiny import TinyShape, tiny_config, tiny_model
from posttrain.planning import Sizes, sampling, sizes, training
from tests.reliability.workspace import OVERLAY

SIZES = Sizes(parameters=1000, hidden=8, layers=2, query_width=8, key_width=4, intermediate=16, vocabulary=50)


def test_bytes_by_hand() -> None:
    layer = 4 * 16 + 4 * 4 + 4 * 8 + 8 * 8
    assert SIZES.activations_per_token == 4 * (2 * layer + (2 * 8 + 8) + 4 * 8) == 1632
    assert SIZES.cache_per_token == 4 * 2 * 2 * 4
    held = training(SIZES, 100, trained=2, frozen=1)
    assert (held.weights, held.optimiser) == (4 * 1000 * 3, 3 * 4 * 1000 * 2)
    assert (held.activations, held.logits) == (100 * 1632 * 2, 2 * 4 * 100 * 50)
    assert training(SIZES, 100, bf16=True).activations == 75 * 1632
    asked = sampling(SIZES, 10, 20, 10, trained=1)
    assert (asked.weights, asked.optimiser) == (4 * 1000 * 2, 2 * 4 * 1000)
    assert (asked.cache, asked.logits) == (10 * 30 * 64, 10 * 50 * 16)
    assert asked.total == 8000 + 8000 + 19200 + 8000
    # five answers share a prompt; at most 512 answers and 131,072 tokens are under way, and 16,777,216 logits
    assert sampling(SIZES, 10, 20, 10, samples=5).cache == (2 * 20 + 10 * 10) * 64
    assert sampling(SIZES, 9999, 20, 10, samples=4).cache == (128 * 20 + 512 * 10) * 64
    assert sampling(SIZES, 9999, 1000, 1000).cache == 131_072 * 64
    assert sampling(replace(SIZES, vocabulary=151_936), 9999, 20, 10).logits == 16_777_216 * 16


def test_an_adapter_has_gradients_and_moments_and_its_base_has_none() -> None:
    held = training(SIZES, 100, trained=2, frozen=1, adapter=30)
    assert (held.weights, held.optimiser) == (4 * 1000 * 3 + 4 * 30 * 2, 3 * 4 * 30 * 2)
    assert held.activations == training(SIZES, 100, trained=2, frozen=1).activations
    asked = sampling(SIZES, 10, 20, 10, trained=1, frozen=0, adapter=30)
    assert (asked.weights, asked.optimiser) == (4 * 1030, 2 * 4 * 30)


def test_with_lora_the_plan_holds_one_copy_of_the_weights(root: Path) -> None:
    tree = read_yaml(root / "params.yaml")
    tree["align"]["lora"] = {"rank": 4, "alpha": 8}
    tree["project"]["algorithms"] = ["dapo"]
    tree["algorithms"]["dapo"]["rewards"] = {"answer": 1.0}
    apply_training_options = parse_params(tree)
    model = sizes(tiny_config(TinyShape()))
    trained = next(
        p for p in phases(apply_training_options, model) if p.stage == "align@dapo" and p.name == "train"
    ).memory
    # rank (in + out) of q, k, v, o, gate, up, down in two layers of hidden size 128
    adapter = 2 * 4 * ((128 + 128) + (128 + 64) * 2 + (128 + 128) + (128 + 256) * 3)
    assert trained.weights == 4 * (model.parameters + adapter)
    assert trained.optimiser == 3 * 4 * adapter


def test_a_vllm_server_keeps_its_cache_where_it_runs(root: Path) -> None:
    tree = read_yaml(root / "params.yaml")
    tree["algorithms"]["grpo"]["budget"] = {"rollouts": {"engine": "vllm"}}
    params = parse_params(tree)
    planned = {(phase.stage, phase.name): phase.memory for phase in phases(params, SIZES)}
    assert planned["align@grpo", "sample"].cache == planned["align@grpo", "sample"].logits == 0
    assert planned["align@grpo", "sample"].weights == planned["align@gspo", "sample"].weights
    assert planned["align@gspo", "sample"].cache > 0


@pytest.mark.parametrize("shape", [TinyShape(), TinyShape(64, 200, 3, 4, 4), TinyShape(96, 64, 1, 2, 1)])
def test_activations_are_what_autograd_saves(shape: TinyShape) -> None:
    lm, _ = tiny_model(shape, 0)
    policy, batch = Policy(lm), collate([Tokens((3 + i, 4, 5, 6), (7,) * 60) for i in range(8)])
    weights = {p.untyped_storage().data_ptr() for p in lm.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        policy(batch)
    planned = sizes(lm.config)
    assert planned.parameters == sum(p.numel() for p in lm.parameters())
    assert sum(saved.values()) / len(batch.input_ids) == pytest.approx(planned.activations_per_token, rel=0.12)


def test_experts_count_as_many_as_a_token_passes_through() -> None:
    shape = TinyShape(64, 32, 2, 4, 2, experts=8, experts_per_token=2)
    planned = sizes(tiny_config(shape))
    assert planned.intermediate == 2 * 32
    assert planned.parameters == sum(p.numel() for p in tiny_model(shape, 0)[0].parameters())


def tiny(root: Path) -> Params:
    tree = read_yaml(root / "params.yaml")
    _merge(tree, read_yaml(OVERLAY))
    return parse_params(tree)


def _merge(tree: Any, over: Any) -> None:
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            _merge(tree[key], value)
        else:
            tree[key] = value


def test_steps_and_tokens_are_those_that_the_steps_announce(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    planned = {(phase.stage, phase.name): phase for phase in phases(tiny(root), SIZES)}
    # 64 rows in batches of 16 over 2 epochs; 32 of 40 pairs in batches of 8 over 2 epochs
    assert planned["sft", "train"].steps == 8
    assert planned["sft", "train"].tokens == 64 * 2 * (32 + 64)
    assert planned["reward", "train"].steps == planned["align@dpo", "train"].steps == 8
    # 6 steps: of 2 epochs for PPO, of 2 minibatches for this GRPO, of one update for CHORD
    assert [planned[f"align@{name}", "train"].steps for name in ("ppo", "grpo", "chord")] == [12, 12, 6]
    assert planned["align@grpo", "sample"].tokens == 6 * 4 * 4 * 12
    assert planned["align@dapo", "sample"].tokens == 8 * 6 * 4 * 4 * 12
    # policy and critic with their moments; reference and reward model beside them
    assert planned["align@ppo", "train"].memory.weights == 4 * 4 * SIZES.parameters
    assert planned["align@grpo", "train"].memory.weights == 3 * 4 * SIZES.parameters
    assert planned["evaluate", "sample"].tokens == 8 * 3 * 12


def test_what_will_not_fit_is_named_with_what_to_change(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    params = load_params(root / "params.yaml")
    planned = list(phases(params, SIZES))
    assert "does not fit" not in page(params, SIZES, planned, 1 << 40)
    said = page(params, SIZES, planned, 1 << 20)
    assert "sft (train) does not fit: " in said
    assert (
        "most of it for activations; lower compute.micro_batch_tokens, or set compute.gradient_checkpointing." in said
    )
    assert main(["--params", str(root / "params.yaml"), "--memory", "1000"]) == 0
    assert "361,984 parameters (tiny); 1 seed per algorithm; a device has 1000.0 GiB" in capsys.readouterr().out
    assert main(["--params", str(root / "params.yaml"), "--memory", "0.1"]) == 1
    assert main(["--params", str(root / "missing.yaml")]) == 2
    assert "cannot read" in capsys.readouterr().err
