"""Layers as one function: states and gradients of transformers' own layers in float64, only for layers with the same function."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from posttrain.data.batches import TokenBatch, collate
from posttrain.data.layout import Reads
from posttrain.data.tokens import Tokens
from posttrain.models import head_rows, plain_backward, plain_layer, trunk
from posttrain.models.packed import hidden_states, prepare
from posttrain.models.plain_family import is_plain_layer
from posttrain.models.trunk import read_states

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CONFIGS = {
    "qwen3": Qwen3Config(**SIZES),
    "qwen3-window": Qwen3Config(**SIZES, sliding_window=3, use_sliding_window=True, max_window_layers=1),
    "llama": LlamaConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES),
    "mistral-window": MistralConfig(**SIZES, sliding_window=4),
    "smollm3": SmolLM3Config(**SIZES, no_rope_layers=[1, 0]),
}
ROWS = [
    Tokens((3, 4, 5, 6, 7), (8, 9, 10)),
    Tokens((3, 4, 5, 6, 7), (11,)),
    Tokens((5,), (3, 4)),
    # beyond 16 keys PyTorch's kernel computes heads of 8 numbers
    Tokens((9,), tuple(range(3, 33))),
    Tokens(tuple(range(20, 60)), (20, 21, 22)),
    # twice as many keys as queries, as there are heads of queries
    Tokens(tuple(range(3, 23)), tuple(range(30, 50))),
    Tokens(tuple(range(3, 23)), tuple(range(40, 60))),
]


def drawn_model(config: Any) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(float(parameter.dim() == 1), 0.2, generator=generator)
    return model


def found(model: PreTrainedModel, batch: TokenBatch, reads: Reads, packs: bool) -> dict[str, torch.Tensor]:
    """Return the hidden states that are read and the gradients of all weights, in float64."""
    states = hidden_states(model, batch, packs, reads)[reads.tokens]
    gradient = torch.randn(states.shape, generator=torch.Generator().manual_seed(1)).to(states.dtype)
    model.zero_grad()
    states.backward(gradient)
    named = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {name: value.detach().double() for name, value in {**named, "states": states}.items()}


def assert_as_exact(model: PreTrainedModel, asked: str, joined: list[int]) -> dict[str, torch.Tensor]:
    """Require the states and gradients of the model in float64, to the rounding of transformers' code in float32. Return those found."""
    batch, own, wide = collate(ROWS), copy.deepcopy(model), copy.deepcopy(model).double()
    assert prepare(model)
    joined.clear()
    reads = getattr(batch, asked)()
    ours = found(model, batch, reads, packs=True)
    assert len(joined) == 2
    exact, theirs = found(wide, batch, reads, packs=False), found(own, batch, reads, packs=False)
    assert ours.keys() == exact.keys()
    for key, wanted in exact.items():
        rounding = (theirs[key] - wanted).norm()
        assert (ours[key] - wanted).norm() <= 3 * rounding + 1e-6 * wanted.norm(), key
    return ours


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Get an entry for each layer that is computed as one function."""
    calls: list[int] = []
    own = plain_layer._forward
    monkeypatch.setattr(plain_layer, "_forward", lambda *given: (calls.append(1), own(*given))[1])
    return calls


@pytest.mark.parametrize("reads", ["predicting", "ending"])
@pytest.mark.parametrize(("name", "tile"), [*((name, 2048) for name in CONFIGS), ("qwen3", 10)])
def test_states_and_gradients_are_those_of_transformers_in_float64(
    name: str, tile: int, reads: str, joined: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain_backward, "TILE_TOKENS", tile)
    assert_as_exact(drawn_model(CONFIGS[name]), reads, joined)


@pytest.mark.parametrize("name", CONFIGS)
def test_read_states_are_those_of_the_whole_loop_in_any_order_and_more_than_once(name: str, joined: list[int]) -> None:
    model, batch = drawn_model(CONFIGS[name]), collate(ROWS)
    assert prepare(model)
    reads = batch.predicting()
    index = torch.stack([reads.tokens, reads.tokens.flip(0)])
    gradient = torch.randn(*index.shape, 32, generator=torch.Generator().manual_seed(1))
    results = []
    for states in (hidden_states(model, batch, True, reads)[index], read_states(model, batch, True, reads, index)):
        model.zero_grad()
        states.backward(gradient)
        results.append([states.detach(), *(p.grad for p in model.base_model.parameters())])
    for own, found in zip(*results, strict=True):
        assert found is not None
        assert own is not None
        torch.testing.assert_close(found, own, rtol=1e-5, atol=1e-6 * float(own.abs().max()))
    with torch.no_grad():
        assert torch.equal(read_states(model, batch, True, reads, reads.tokens), results[1][0][0])


def with_hook_on_the_norm(model: Any) -> None:
    model.base_model.norm.register_forward_hook(lambda module, args, output: 2 * output)


def wrapped(model: Any) -> None:
    layer = model.base_model.layers[1]
    layer.forward = partial(type(layer).forward, layer)


@pytest.mark.parametrize("change", [with_hook_on_the_norm, wrapped])
def test_a_changed_loop_is_computed_by_the_model(change: Any) -> None:
    model, batch = drawn_model(CONFIGS["llama"]), collate(ROWS)
    prepare(model)
    change(model)
    reads = batch.predicting()
    assert trunk._plain_states(model, batch, reads) is None
    wanted = hidden_states(model, batch, True, reads)[reads.tokens]
    assert torch.equal(read_states(model, batch, True, reads, reads.tokens), wanted)


def test_weights_that_are_frozen_get_no_gradient_and_the_others_the_same(joined: list[int]) -> None:
    model, batch = drawn_model(CONFIGS["qwen2"]), collate(ROWS)
    prepare(model)
    reads = batch.predicting()
    every = found(model, batch, reads, packs=True)
    kept = ("k_proj", "input_layernorm.weight", "down_proj")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in kept))
    some = found(model, batch, reads, packs=True)
    assert len(some) == 2 * 4 + 1
    assert all(torch.equal(some[name], every[name]) for name in some)
    with torch.no_grad():
        states = hidden_states(model, batch, True, reads)[reads.tokens]
    assert torch.equal(states.double(), every["states"])


def test_keys_that_are_gathered_again_are_those_that_were_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model = drawn_model(CONFIGS["qwen3"])
    results = []
    for most in (0.0, 99.0):
        monkeypatch.setattr(head_rows, "SHARED", most)
        monkeypatch.setattr(head_rows, "WIDE", 0)
        batch = collate(ROWS)
        results.append(found(model, batch, batch.predicting(), packs=prepare(model)))
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


def test_tiles_cover_all_tokens_once() -> None:
    for tokens in (0, 1, 3071, 3072, 11520):
        tiles = plain_backward.tiles(tokens)
        assert [i for tile in tiles for i in range(tokens)[tile]] == [*range(tokens)]
        assert len(tiles) == {3072: 2, 11520: 6}.get(tokens, 1)


def hooked(layer: Any) -> None:
    layer.mlp.register_forward_hook(lambda module, args, output: 2 * output)


def with_hook_on_gradients(layer: Any) -> None:
    layer.self_attn.o_proj.register_full_backward_hook(lambda module, given, taken: None)


def with_other_activation(layer: Any) -> None:
    layer.mlp.act_fn = nn.ReLU()


def with_bias(layer: Any) -> None:
    layer.mlp.down_proj.bias = nn.Parameter(torch.ones(32))


def replaced(layer: Any) -> None:
    layer.self_attn.q_proj = nn.Sequential(layer.self_attn.q_proj)
    layer.self_attn.q_proj.out_features = 32  # type: ignore[assignment]


@pytest.mark.parametrize("change", [hooked, with_hook_on_gradients, with_other_activation, with_bias, replaced])
def test_a_changed_layer_keeps_its_own_code(change: Any, joined: list[int]) -> None:
    model, batch = drawn_model(CONFIGS["llama"]), collate(ROWS)
    prepare(model)
    joined.clear()
    change(model.base_model.layers[0])
    other = copy.deepcopy(model)
    plain_layer_of_other = other.base_model.layers[0]
    plain_layer_of_other.__class__ = type(plain_layer_of_other).__mro__[1]
    reads = batch.predicting()
    with torch.no_grad():
        ours, theirs = (hidden_states(each, batch, True, reads)[reads.tokens] for each in (model, other))
    assert len(joined) == 2, "the last layer of each"
    assert torch.equal(ours, theirs)


def test_other_dtypes_autocast_and_padded_rows_keep_their_own_code(joined: list[int]) -> None:
    model, batch = drawn_model(CONFIGS["llama"]), collate(ROWS)
    prepare(model)
    reads = batch.predicting()
    joined.clear()
    with torch.autocast("cpu", torch.bfloat16):
        hidden_states(model, batch, True, reads)
    model(input_ids=torch.tensor([[3, 4, 5]]))
    hidden_states(model.double(), batch, True, reads)
    assert not joined


def test_layers_are_recognised_by_their_code() -> None:
    layer: Any = drawn_model(CONFIGS["llama"]).base_model.layers[0]
    assert is_plain_layer(layer)
    assert plain_layer.join_layers(layer) == 1
    assert plain_layer.join_layers(layer) == 0
    assert is_plain_layer(layer)
    assert type(layer).__name__ == "LlamaDecoderLayer"
    assert not is_plain_layer(layer.mlp)
