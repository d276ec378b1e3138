"""The plan of a GPU's memory in bfloat16, next to the bytes that autograd saves if a CPU computes as a GPU does."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from posttrain.data.batches import collate
from posttrain.data.offsets import OFFSETS
from posttrain.data.tokens import Tokens
from posttrain.models.packed import hidden_states, prepare
from posttrain.models.varlen import KERNELS
from posttrain.planning import sizes, training
from posttrain.planning_gpu import kept_bytes
from tests.models.varlen_reference import REFERENCE

KINDS = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}
TOKENS = 200


def model(kind: str, layers: int) -> PreTrainedModel:
    config, made = KINDS[kind]
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    return made(config(vocab_size=50, num_hidden_layers=layers, head_dim=16, **shape)).eval()  # type: ignore[no-any-return]


def saved(lm: PreTrainedModel) -> int:
    """Return the bytes that a forward pass in bfloat16 saves, without parameters."""
    assert prepare(lm)
    found = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in lm.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage
        return tensor

    batch = collate([Tokens((3, 4, 5, 6), (7,) * (TOKENS - 4))])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        moved = batch.to(torch.device("cpu"))
        hidden_states(lm, moved, True, moved.predicting())
    return sum(storage.nbytes() for storage in found.values())


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_keeps_the_planned_bytes(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OFFSETS, "cpu", frozenset({torch.bfloat16}))
    monkeypatch.setitem(KERNELS, "cpu", lambda: REFERENCE)
    monkeypatch.setattr("posttrain.models.fused._takes", lambda *_: False)  # a CPU's functions
    planned = []
    for layers in (2, 3):
        lm = model(kind, layers)
        size = sizes(lm.config)
        assert size.head_norms == (kind == "qwen3")
        planned.append((saved(lm), kept_bytes(size, TOKENS, False, size.parameters - size.outside)))
    (few, planned_few), (more, planned_more) = planned
    assert more - few == pytest.approx(planned_more - planned_few, rel=0.03)
    # the head, which keeps 6 x 64 bytes a token of those at the ends, did not run
    assert more + 6 * 64 * TOKENS == pytest.approx(planned_more, rel=0.05)


def test_training_keeps_casts_until_the_backward_pass_has_used_them() -> None:
    size = sizes(model("llama", 2).config)
    layer, ends = 26 * 64 + 8 * 96 + 4 * (64 + 32), 16 * 64 + 4 * 64
    cast = 2 * (size.parameters - size.outside)
    assert training(size, 1000, bf16=True, device="cuda").activations == 1000 * (2 * layer + ends) + cast
    assert training(size, 1000, bf16=True, device="cuda", processes=2).activations == 1000 * (2 * layer + ends)
    recomputed = 1000 * (2 * 4 * 64 + ends) + 1000 * layer
    assert training(size, 1000, bf16=True, device="cuda", recomputes=True).activations == recomputed
    few = training(size, 1, bf16=True, device="cuda", recomputes=True)
    assert few.activations == 2 * 4 * 64 + ends + cast
    # the head's gradient, its cast, and a tile's part of the gradient
    assert training(size, 1000, bf16=True, device="cuda").temporary == 2 * 4 * 50 * 64
