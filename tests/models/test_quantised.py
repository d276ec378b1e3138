"""A base in 4 bits: its products and gradients are those of the dequantised weights, and the merged model is the trained one."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from posttrain.data.batches import collate
from posttrain.errors import ConfigError
from posttrain.models.folders import save_model
from posttrain.models.lora import Adapter, BasePolicy, adapter_parameters
from posttrain.models.plain import plain_state
from posttrain.models.policy import Policy
from posttrain.models.quantised import QuantisedLinear, quantise_base
from posttrain.models.tiny import byte_tokenizer, tiny_config
from posttrain.rollouts.engine import Request, SamplingSettings
from posttrain.rollouts.native import NativeEngine
from posttrain.settings import LoraSettings
from tests.models import nf4, small
from tests.models.test_lora import shaken
from tests.training.runs import Killed, Memory, start
from tests.training.test_resume import disturb, same_weights

SETTINGS = LoraSettings(rank=4, alpha=8.0, base_bits=4)
BATCH = collate(small.rows(6))


@pytest.fixture(params=["reference", "bitsandbytes"])
def operators(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a test with NF4 in plain PyTorch, and with bitsandbytes if it is installed."""
    if request.param == "bitsandbytes":
        pytest.importorskip("bitsandbytes", reason="the extra qlora is not installed")
        return
    monkeypatch.setattr("posttrain.extras.find_spec", lambda name: name)
    monkeypatch.setattr("posttrain.models.quantised._operators", lambda: nf4)


@pytest.mark.usefixtures("operators")
def test_a_layer_multiplies_by_the_dequantised_weight_and_keeps_none() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(32, 16)
    made = QuantisedLinear(layer)
    assert (made.codes.numel(), made.scales.numel()) == (32 * 16 // 2, 32 * 16 // 64)
    # half of the widest gap between two codes, times the block's largest number
    gap = float(nf4.CODES.diff().max()) / 2
    error = (made.weight - layer.weight.detach()).view(-1, 64).abs().amax(1)
    assert bool((error <= gap * made.scales * 1.0001).all())
    inputs, other = (torch.randn(5, 32, generator=torch.Generator().manual_seed(1), requires_grad=True) for _ in "ab")
    weight = torch.randn(5, 16)
    (made(inputs) * weight).sum().backward()
    (functional.linear(other, made.weight, layer.bias) * weight).sum().backward()
    assert torch.allclose(made(inputs), functional.linear(other, made.weight, layer.bias), atol=1e-6)
    assert inputs.grad is not None
    assert other.grad is not None
    assert torch.allclose(inputs.grad, other.grad, atol=1e-6)
    assert list(made.state_dict()) == ["bias"]
    assert [name for name, _ in made.named_parameters()] == ["bias"]
    assert torch.equal(copy.deepcopy(made).weight, made.weight)
    assert torch.equal(made.plain().weight, made.weight)


@pytest.mark.usefixtures("operators")
def test_the_merged_model_is_the_trained_one_in_ordinary_layers(tmp_path: Path) -> None:
    lm, base = small.language_model(), small.language_model()
    adapter = Adapter(lm, SETTINGS)
    policy, reference = Policy(lm), BasePolicy(lm, adapter)
    quantise_base(base)
    assert torch.equal(reference(BATCH).logprobs, Policy(base)(BATCH).logprobs)
    assert adapter.base_change is not None
    assert 0 < adapter.base_change < 0.5
    shaken(policy)
    assert all(p.requires_grad == ("lora_" in name) for name, p in policy.named_parameters())
    expected, state = policy(BATCH).logprobs.detach(), plain_state(lm, torch.float32)
    request, settings = [Request((5, 6, 7), ((1,), (2,)))], SamplingSettings(8, 1.0)
    answers = NativeEngine(lm, small.EOS).sample(request, settings)
    adapter.merge()
    assert not any(isinstance(module, QuantisedLinear) for module in lm.modules())
    save_model(lm, byte_tokenizer(64), tmp_path / "merged", "# card", adapter=adapter)
    merged: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.allclose(Policy(merged)(BATCH).logprobs, expected, atol=1e-5)
    assert state.keys() == merged.state_dict().keys()
    assert all(torch.allclose(state[name], value, atol=1e-6) for name, value in merged.state_dict().items())
    again = NativeEngine(merged, small.EOS).sample(request, settings)
    assert [a.tokens for group in answers for a in group] == [a.tokens for group in again for a in group]


@pytest.mark.usefixtures("operators")
def test_resumed_is_bit_identical_and_a_checkpoint_holds_only_the_adapter(tmp_path: Path) -> None:
    straight, recorder = Memory(), Memory(kill_at=5)
    trained = start("dpo", tmp_path / "straight", straight, lora=SETTINGS)
    with pytest.raises(Killed):
        start("dpo", tmp_path / "killed", recorder, lora=SETTINGS)
    state = torch.load(tmp_path / "killed" / "step-00000004" / "state.pt", weights_only=True)
    assert all("lora_" in name for name in state["trainer"]["model"])
    disturb(1)
    recorder.kill_at = None
    resumed = start("dpo", tmp_path / "killed", recorder, lora=SETTINGS)
    same_weights(trained, resumed)
    assert recorder.steps == straight.steps
    assert straight.steps[1]["loss"] == pytest.approx(torch.log(torch.tensor(2.0)).item(), abs=0.2)


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="the extra qlora is not installed")
def test_bitsandbytes_has_the_codes_of_the_reference() -> None:
    layer = nn.Linear(128, 64)
    made = QuantisedLinear(layer)
    codes, scales = nf4.quantize_4bit(layer.weight.detach(), 64, "nf4", torch.uint8)
    assert torch.equal(made.scales, scales)
    assert (
        float((made.codes.flatten() == codes.flatten()).float().mean()) > 0.999
    )  # a number between two codes may go either way
    assert torch.allclose(made.weight, nf4.dequantize_4bit(made.codes, scales, 64, "nf4", (64, 128), torch.float32))


def test_a_missing_package_is_a_command_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("posttrain.extras.find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"base_bits = 4 needs the package bitsandbytes; .*pip install .*'\.\[qlora\]'"
    ):
        Adapter(small.language_model(), SETTINGS)


def test_heads_and_embeddings_are_not_quantised() -> None:
    layer = (16 * 16) + (16 * 8) * 2 + (16 * 16) + (16 * 32) * 3
    assert adapter_parameters(tiny_config(small.SHAPE), SETTINGS) == (2048, 2 * layer)
