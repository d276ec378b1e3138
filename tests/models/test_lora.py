"""A low-rank adapter: its start, its trained weights, the weights it leaves unchanged, and the settings it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from posttrain.data.batches import collate
from posttrain.errors import ConfigError, ModelError
from posttrain.models.folders import save_model
from posttrain.models.lora import Adapter, BasePolicy, adapter_parameters
from posttrain.models.plain import plain_state, trained_names
from posttrain.models.policy import Policy, Scorer
from posttrain.models.tiny import byte_tokenizer, tiny_config
from posttrain.settings import LoraSettings
from tests.models import small

SETTINGS = LoraSettings(rank=4, alpha=8.0)
BATCH = collate(small.rows(6))


def shaken(module: torch.nn.Module, seed: int = 0) -> None:
    """Numbers for B, as if it had been trained, and for a scalar head."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and "lora_A" not in name:
                parameter.normal_(0, 0.3, generator=generator)


def test_it_starts_as_the_base_to_the_last_bit() -> None:
    """In float64: layers without an adapter are one function in float32 (`plain_layer`), so there the last bits differ."""
    lm, trunk = small.language_model().double(), small.trunk_with_score().double()
    policy, scorer = Policy(small.language_model().double()), Scorer(small.trunk_with_score().double())
    Adapter(lm, SETTINGS)
    Adapter(trunk, SETTINGS)
    assert torch.equal(Policy(lm)(BATCH).logprobs, policy(BATCH).logprobs)
    assert torch.equal(Scorer(trunk)(BATCH), scorer(BATCH))


def test_trained_parameters_by_hand() -> None:
    """rank (in + out) each of q, k, v, o, gate, up, down, in two layers; a scalar head is trained whole."""
    layer = 4 * ((16 + 16) + (16 + 8) + (16 + 8) + (16 + 16) + (16 + 32) + (16 + 32) + (32 + 16))
    lm, trunk = small.language_model(), small.trunk_with_score()
    assert Adapter(lm, SETTINGS).parameters == 2 * layer == 2048
    assert Adapter(trunk, SETTINGS).parameters == 2 * layer + 16
    assert adapter_parameters(tiny_config(small.SHAPE), SETTINGS) == (2 * layer, 0)
    two = Adapter(small.language_model(), LoraSettings(2, 8.0, ("q_proj", "v_proj")))
    assert two.parameters == 2 * 2 * ((16 + 16) + (16 + 8))


def test_the_reference_is_the_base_on_the_same_weights() -> None:
    lm, before = small.language_model().double(), Policy(small.language_model().double())
    adapter = Adapter(lm, SETTINGS)
    policy, reference = Policy(lm), BasePolicy(lm, adapter)
    shaken(policy)
    expected = before(BATCH).logprobs.detach()
    assert torch.equal(reference(BATCH).logprobs, expected)
    assert float((policy(BATCH).logprobs.detach() - expected).abs().max()) > 0.1
    assert {p.data_ptr() for p in reference.parameters()} == {p.data_ptr() for p in policy.parameters()}
    assert all(p.requires_grad == ("lora_" in name) for name, p in policy.named_parameters())


def test_the_merged_model_is_a_plain_one_and_the_adapter_stands_beside_it(tmp_path: Path) -> None:
    base, lm = small.language_model(), small.language_model()
    base.save_pretrained(tmp_path / "base")
    adapter = Adapter(lm, SETTINGS)
    policy = Policy(lm)
    shaken(policy)
    projection = lm.model.layers[1].mlp.down_proj
    a, b = (getattr(projection, f"lora_{side}").default.weight.detach() for side in "AB")
    ids = BATCH.input_ids[None, :20]
    expected = lm(ids).logits
    adapter.merge()
    save_model(lm, byte_tokenizer(64), tmp_path / "merged", "# card", adapter=adapter)

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.allclose(merged(ids).logits, expected, atol=1e-5)
    weight = base.model.layers[1].mlp.down_proj.weight + 8 / 4 * b @ a
    assert torch.allclose(merged.model.layers[1].mlp.down_proj.weight, weight, atol=1e-6)
    assert set(load_file(tmp_path / "merged" / "model.safetensors")) == set(
        load_file(tmp_path / "base" / "model.safetensors")
    )
    start = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    apart = PeftModel.from_pretrained(start, tmp_path / "merged" / "adapter").eval()
    assert torch.allclose(apart(ids).logits, expected, atol=1e-5)
    # in an order that is the same in every process
    modules = json.loads((tmp_path / "merged" / "adapter" / "adapter_config.json").read_text())["target_modules"]
    assert modules == sorted(modules)
    assert len(modules) == 14


def test_a_reward_model_keeps_its_head_in_both(tmp_path: Path) -> None:
    trunk = small.trunk_with_score()
    trunk.save_pretrained(tmp_path / "base")
    adapter, scorer = Adapter(trunk, SETTINGS), Scorer(trunk)
    shaken(scorer)
    expected = scorer(BATCH)
    adapter.merge()
    save_model(trunk, byte_tokenizer(64), tmp_path / "merged", "# card", adapter=adapter)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", num_labels=1).eval()
    assert torch.allclose(Scorer(merged)(BATCH), expected, atol=1e-5)
    start = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
    apart = PeftModel.from_pretrained(start, tmp_path / "merged" / "adapter").eval()
    assert torch.allclose(Scorer(apart.get_base_model())(BATCH), expected, atol=1e-5)


def test_names_that_no_layer_has_are_refused() -> None:
    with pytest.raises(
        ModelError, match=r"\['query'\].*: down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    ):
        Adapter(small.language_model(), LoraSettings(4, 8.0, ("query",)))
    with pytest.raises(
        ModelError, match=r"lora\.rank = 4000: the adapted layers of Qwen3ForCausalLM have at most \d+ ranks"
    ):
        Adapter(small.language_model(), LoraSettings(4000, 8.0, ("q_proj",)))


@pytest.mark.parametrize("place", ["lm_head", "embed_tokens"])
def test_the_vocabulary_is_refused(place: str) -> None:
    with pytest.raises(ConfigError, match="cannot have an adapter"):
        Adapter(small.language_model(), LoraSettings(4, 8.0, (place,)))


def test_without_peft_the_message_says_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match="pip install peft"):
        Adapter(small.language_model(), SETTINGS)


def test_an_adapter_that_changes_the_model_before_training_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some layers look linear and are more, such as the grouped projections of DeepSeek V4."""
    other = small.language_model()
    layer = other.model.layers[0].mlp.down_proj
    layer.forward = lambda x: torch.nn.functional.linear(x, layer.weight) * (2 if hasattr(other, "peft_config") else 1)
    with pytest.raises(
        ModelError, match=r"changes the outputs of Qwen3ForCausalLM before training by .*\[q_proj, v_proj\]"
    ):
        Adapter(other, SETTINGS)


def mixture(kind: str, **settings: Any) -> Any:
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes | settings))


DEEPSEEK = {
    "intermediate_size": 16, "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}  # fmt: skip
DBRX = {
    "d_model": 16, "n_heads": 2, "n_layers": 1, "attn_config": {"kv_n_heads": 1, "clip_qkv": 8.0, "rope_theta": 1e4},
    "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
}  # fmt: skip
NO_LINEAR = "that are no linear layers get no adapter and stay as they are"


def test_what_an_adapter_does_not_reach_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    Adapter(small.language_model(), SETTINGS)
    Adapter(small.trunk_with_score(), SETTINGS)  # its head is trained whole
    assert capsys.readouterr().err == ""
    Adapter(mixture("dbrx", **DBRX), SETTINGS)
    assert f"DbrxForCausalLM {NO_LINEAR}: experts.mlp.v1, experts.mlp.w1, experts.mlp.w2\n" in capsys.readouterr().err
    # peft reads the names of its shared experts' linear layers as those of the experts
    Adapter(mixture("deepseek_v3", **DEEPSEEK), SETTINGS)
    said = capsys.readouterr().err
    assert "that are no linear layers get an adapter, too: mlp.experts.down_proj, mlp.experts.gate_up_proj" in said
    assert "linear layers of DeepseekV3ForCausalLM get no adapter" in said
    assert "shared_experts.up_proj\n" in said
    assert NO_LINEAR not in said
    dense = mixture("deepseek_v3", **DEEPSEEK | {"first_k_dense_replace": 2})
    with pytest.raises(ModelError, match="'gate_proj' matches no linear layer of DeepseekV3ForCausalLM that can be"):
        Adapter(dense, LoraSettings(2, 4, ("q_a_proj", "gate_proj", "up_proj", "down_proj")))


def test_weights_for_a_sampler_have_the_adapters_of_experts() -> None:
    """Before, the experts had other names, and none of their adapters."""
    lm = small.language_model(shape=small.MOE)
    adapter = Adapter(lm, SETTINGS)
    shaken(lm)
    state, trained = plain_state(lm, torch.float32), trained_names(lm)
    base = small.language_model(shape=small.MOE).state_dict()
    adapter.merge()
    merged = lm.state_dict()
    assert state.keys() == merged.keys()
    assert all(torch.allclose(state[name], weight, atol=1e-6) for name, weight in merged.items())
    assert trained == {name for name, weight in merged.items() if not torch.equal(weight, base[name])}
    assert {name.rpartition(".")[2] for name in trained} > {"gate_up_proj", "down_proj"}
