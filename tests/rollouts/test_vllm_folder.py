"""The weights that are written for a vLLM server."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from posttrain.errors import RolloutError
from posttrain.models.lora import Adapter
from posttrain.models.plain import plain_state
from posttrain.rollouts.vllm.folder import write_config, write_weights
from posttrain.settings import LoraSettings
from tests.models import small


def test_what_is_written_is_the_model_with_its_adapter(tmp_path: Path) -> None:
    model = small.language_model()
    adapter = Adapter(model, LoraSettings(rank=2, alpha=4.0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    write_weights(model, plain_state(model, torch.float32), tmp_path / "served")
    adapter.merge()
    served = AutoModelForCausalLM.from_pretrained(tmp_path / "served")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(served(ids).logits, model(ids).logits)
    assert not torch.equal(
        served.model.layers[0].mlp.up_proj.weight, small.language_model().model.layers[0].mlp.up_proj.weight
    )


@pytest.mark.parametrize(
    "model", [small.tied_llama, lambda: small.language_model(shape=small.MOE)], ids=["tied", "experts"]
)
def test_what_is_written_loads_as_the_policy(tmp_path: Path, model: Callable[[], Any]) -> None:
    lm = model()
    write_weights(lm, plain_state(lm, torch.float32), tmp_path / "served")
    served = AutoModelForCausalLM.from_pretrained(tmp_path / "served")
    assert served.config.tie_word_embeddings is False
    assert [path.name for path in (tmp_path / "served").glob("*.safetensors")] == ["model.safetensors"]
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert torch.equal(served(ids).logits, lm(ids).logits)
    # a server that starts without weights reads the same configuration
    write_config(lm, tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").read_text() == (tmp_path / "served" / "config.json").read_text()
    # the policy itself is as it was
    assert lm.config.tie_word_embeddings is (lm.get_output_embeddings().weight is lm.get_input_embeddings().weight)


@pytest.mark.parametrize(
    "model", [small.tied_llama, lambda: small.language_model(shape=small.MOE)], ids=["tied", "experts"]
)
def test_the_weights_are_those_of_the_state_dict(model: Callable[[], Any]) -> None:
    lm = model()
    lm.register_buffer("kept", torch.ones(2))
    state, own = plain_state(lm, torch.float32), lm.state_dict()
    assert sorted(state) == sorted(own)
    assert all(torch.equal(state[name], own[name]) for name in own)
    assert {tensor.dtype for tensor in plain_state(lm, torch.bfloat16).values()} == {torch.bfloat16}


def test_a_disk_that_refuses_is_said_in_one_paragraph(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    lm = small.language_model()
    with pytest.raises(RolloutError, match="cannot write the weights for the vLLM server"):
        write_weights(lm, plain_state(lm, torch.float32), tmp_path / "file" / "served")
