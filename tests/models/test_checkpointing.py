"""Recomputing a layer changes only the stored activations; compiling it changes only rounding."""

from __future__ import annotations

import json
import shutil
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from posttrain.data.batches import collate
from posttrain.data.tokens import Tokens
from posttrain.models.checkpointing import recompute_layers, recomputed_layers
from posttrain.models.compiled import compile_layers
from posttrain.models.folders import save_model
from posttrain.models.packed import NAME, packed_attention
from posttrain.models.policy import Policy
from posttrain.models.tiny import TinyShape, byte_tokenizer, tiny_model
from posttrain.planning import sizes
from posttrain.rollouts.engine import Request, SamplingSettings
from posttrain.rollouts.native import NativeEngine
from tests.models import small
from tests.training.cases import case, probe


def gradients(name: str, change: Any) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    made = case(name)
    model: Any = made.model()
    for part in (getattr(model, each, None) for each in ("lm", "critic", "model")):
        if part is not None:
            change(part)
    trainer = probe(model, 40)
    return trainer.update(made.rows, made.objective), trainer.gradient


@pytest.mark.parametrize("name", ["sft", "reward", "ppo", "dpo"])
def test_recomputed_is_computed_to_the_last_bit(name: str) -> None:
    plain, recomputed = gradients(name, lambda _: None), gradients(name, recompute_layers)
    assert plain[0] == recomputed[0]
    assert all(torch.equal(value, recomputed[1][parameter]) for parameter, value in plain[1].items())


def test_what_is_kept_is_what_the_plan_says() -> None:
    """A layer's input each, and one layer at a time."""
    lm, _ = tiny_model(TinyShape(64, 200, 6, 4, 4), 0)
    recompute_layers(lm)
    policy, batch = Policy(lm), collate([Tokens((3 + i, 4, 5, 6), (7,) * 60) for i in range(8)])
    for layer in lm.model.layers:
        layer.training = True
    weights = {p.untyped_storage().data_ptr() for p in lm.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        policy(batch)
    planned = sizes(lm.config)
    one_layer = (planned.activations_per_token - 4 * 4 * 64) / 6
    measured = sum(kept.values()) / len(batch.input_ids) + one_layer
    assert measured == pytest.approx(planned.recomputed_per_token, rel=0.12)
    assert measured < planned.activations_per_token / 3


def test_a_model_that_recomputes_samples_as_before() -> None:
    asked = [Request((5, 6, 7), ((0,), (1,)))]
    plain, other = small.language_model(), small.language_model()
    recompute_layers(other)
    answers = [NativeEngine(lm, small.EOS).sample(asked, SamplingSettings(8, 1.0)) for lm in (plain, other)]
    assert answers[0] == answers[1]


def test_two_batches_in_one_backward_pass_are_recomputed_each_with_its_own_tokens() -> None:
    """A recomputed layer calls its inner modules again, but no hook on the layer."""
    lm, rows = small.language_model(), small.rows(6)
    recompute_layers(lm)
    policy = Policy(lm).eval()
    for layer in recomputed_layers(lm):
        layer.training = True
    parts = [collate(rows[:2]), collate(rows[2:])]
    found = []
    for together in (True, False):
        lm.zero_grad()
        losses = [policy(part).logprobs.sum() for part in parts] if together else []
        for loss in [sum(losses)] if together else (policy(part).logprobs.sum() for part in parts):
            loss.backward()  # type: ignore[union-attr]
        found.append({name: weight.grad.clone() for name, weight in lm.named_parameters() if weight.grad is not None})
    assert all(torch.allclose(found[0][name], gradient, atol=1e-6) for name, gradient in found[1].items())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("change", [compile_layers, lambda lm: (recompute_layers(lm), compile_layers(lm))])
def test_compiled_agrees_with_what_it_was_compiled_from(change: Any) -> None:
    plain, compiled = gradients("sft", lambda _: None), gradients("sft", change)
    assert compiled[0] == pytest.approx(plain[0], abs=1e-5)
    for parameter, value in plain[1].items():
        assert torch.allclose(value, compiled[1][parameter], atol=1e-5), parameter


@pytest.mark.parametrize("deterministic", [True, False])
def test_in_deterministic_mode_the_compiler_times_nothing(deterministic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    config: Any = import_module("torch._inductor.config")
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    with config.patch(deterministic=False):
        compile_layers(small.language_model())
        found = config.deterministic
    AttentionInterface.register(NAME, packed_attention)
    assert found is deterministic


def test_layouts_of_batches_do_not_compile_again(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def count(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=count))
    lm, shared = small.language_model(), (5, 6, 7, 8, 9)
    policy = Policy(lm)
    compile_layers(lm)
    layouts = [[Tokens((3, 4 + i), (5,) * 2**j) for j in range(i)] for i in range(1, 8)]
    layouts += [[Tokens(shared, (5,) * 2**j) for j in range(i)] for i in range(2, 8)]
    assert len({len(collate(rows).parts) for rows in layouts}) > 5
    counts = []
    try:
        for rows in layouts:
            policy(collate(rows))
            counts.append(len(compiled))
    finally:
        torch.compiler.reset()
        AttentionInterface.register(NAME, packed_attention)
    assert counts[0] > 0
    assert counts[1:] == [counts[1]] * len(counts[1:])


def test_rates_that_a_layer_reads_from_the_configuration_have_no_effect_and_are_saved(tmp_path: Path) -> None:
    """Falcon's layers read `config.hidden_dropout` in each call while they are in training mode."""
    sizes_of = {"vocab_size": 272, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model("falcon", **sizes_of, hidden_dropout=0.5)).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = lm(ids).logits
        recompute_layers(lm)
        for layer in recomputed_layers(lm):
            layer.training = True
        assert torch.equal(lm(ids).logits, expected)
    save_model(lm, byte_tokenizer(64), tmp_path / "m", "")
    assert json.loads((tmp_path / "m" / "config.json").read_text())["hidden_dropout"] == 0.5
