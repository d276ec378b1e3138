"""Layers with a low-rank adapter as one function: states and gradients of transformers' and peft's own code in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from posttrain.data.batches import collate
from posttrain.models import plain_layer
from posttrain.models.lora import Adapter
from posttrain.models.packed import hidden_states, prepare
from posttrain.models.plain_weights import LINEARS, PLACES, WEIGHTS, Linear, linear_of
from posttrain.models.trunk import read_states
from posttrain.settings import LoraSettings
from tests.models.test_plain_layer import CONFIGS, ROWS, assert_as_exact, drawn_model

pytest.importorskip("peft")
EVERY = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def adapted_model(name: str, places: tuple[str, ...]) -> tuple[Any, Adapter]:
    """Return a model whose adapter is not zero."""
    model = drawn_model(CONFIGS[name])
    adapter = Adapter(model, LoraSettings(rank=3, alpha=6.0, target_modules=places))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for part, value in model.named_parameters():
            if "lora" in part:
                value.normal_(0.0, 0.1, generator=generator)
    return model, adapter


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Get an entry for each layer that is computed as one function."""
    calls: list[int] = []
    own = plain_layer._forward
    monkeypatch.setattr(plain_layer, "_forward", lambda *given: (calls.append(1), own(*given))[1])
    return calls


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("qwen3", EVERY),
        ("qwen2", EVERY),
        ("llama", ("q_proj", "v_proj")),
        ("smollm3", ("k_proj", "o_proj", "up_proj")),
        ("llama", ("down_proj",)),
    ],
)
@pytest.mark.parametrize("reads", ["predicting", "ending"])
def test_states_and_gradients_are_those_of_the_adapter_in_float64(
    name: str, places: tuple[str, ...], reads: str, joined: list[int]
) -> None:
    model, _ = adapted_model(name, places)
    ours = assert_as_exact(model, reads, joined)
    assert sum("lora" in key for key in ours) == 2 * 2 * len(places), "A and B of each module of two layers"
    assert len(ours) == 1 + 4 * len(places), "states, and no frozen weight"


def test_without_its_adapter_a_layer_is_the_base_to_the_last_bit(joined: list[int]) -> None:
    model, adapter = adapted_model("qwen3", EVERY)
    base, batch = drawn_model(copy.deepcopy(CONFIGS["qwen3"])), collate(ROWS)
    reads = batch.predicting()
    with torch.no_grad():
        states = [read_states(base, batch, prepare(base), reads, reads.tokens)]
        prepare(model)
        joined.clear()
        with adapter.disabled():
            states.append(read_states(model, batch, True, reads, reads.tokens))
        states.append(read_states(model, batch, True, reads, reads.tokens))
    assert len(joined) == 4
    assert torch.equal(states[0], states[1])
    assert not torch.allclose(states[0], states[2], rtol=0.01)


def drops(layer: Any) -> None:
    layer.mlp.up_proj.lora_dropout["default"] = nn.Dropout(0.5).eval()


def has_two(layer: Any) -> None:
    module = layer.self_attn.q_proj
    module.update_layer("second", 2, 4, config=layer_config())
    module.set_adapter(["default", "second"])


def is_merged(layer: Any) -> None:
    layer.self_attn.o_proj.merge()


def is_hooked(layer: Any) -> None:
    layer.mlp.down_proj.lora_B["default"].register_forward_hook(lambda module, args, output: 2 * output)


def drops_by_a_hook(layer: Any) -> None:
    layer.self_attn.v_proj.lora_dropout["default"].register_forward_hook(lambda module, args, output: 2 * output)


def has_bias(layer: Any) -> None:
    layer.self_attn.k_proj.lora_B["default"].bias = nn.Parameter(torch.ones(16))


def layer_config() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=2, lora_alpha=4)


@pytest.mark.parametrize("change", [drops, has_two, is_merged, is_hooked, drops_by_a_hook, has_bias])
def test_other_adapters_keep_their_own_code(change: Callable[[Any], None], joined: list[int]) -> None:
    model, _ = adapted_model("llama", EVERY)
    batch = collate(ROWS)
    prepare(model)
    change(model.base_model.layers[0])
    joined.clear()
    reads = batch.predicting()
    with torch.no_grad():
        states = hidden_states(model, batch, True, reads)[reads.tokens]
        assert len(joined) == 1, "the last layer"
        torch.testing.assert_close(
            states, hidden_states(model, batch, False, reads)[reads.tokens], rtol=1e-4, atol=1e-5
        )


def test_variants_of_adapters_are_not_taken() -> None:
    from peft import LoraConfig, get_peft_model

    model = drawn_model(CONFIGS["llama"])
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    layer: Any = model.base_model.layers[0]
    assert linear_of(layer.self_attn.q_proj) is None
    assert linear_of(layer.self_attn.k_proj) == Linear(layer.self_attn.k_proj.weight, None)


def test_each_parameter_has_one_place() -> None:
    assert sorted([*PLACES.values(), *(place + 1 for place in PLACES.values())]) == [*range(14, WEIGHTS)]
    assert len({*LINEARS}) == 7
