"""The last layer for only the tokens that are read: the same numbers and gradients, for less work."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from posttrain.data.batches import TokenBatch, collate
from posttrain.data.tokens import Tokens
from posttrain.models.checkpointing import recompute_layers
from posttrain.models.last_layer import layers_of
from posttrain.models.packed import prepare
from posttrain.models.policy import Policy, Scorer
from tests.models import moe, small

ROWS = [Tokens((7,) * 20, (3, i + 4, 2)) for i in range(4)] + [Tokens((5, 6, 8), (9, 2)), Tokens((5,) * 30, (3, 4))]


def whole(model: PreTrainedModel) -> PreTrainedModel:
    """Prepared, and the last layer without its hooks."""
    assert prepare(model)
    for module in layers_of(model)[-1].modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return model


def computed(model: PreTrainedModel) -> list[list[int]]:
    """Return the tokens that each layer's feed-forward network and projections are handed, in order, filled as the model computes."""
    seen: list[list[int]] = []
    for layer in layers_of(model):
        counts: list[int] = []
        for part in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.o_proj, layer.mlp.gate_proj):
            part.register_forward_pre_hook(lambda _, inputs, counts=counts: counts.append(inputs[0].shape[1]))
        seen.append(counts)
    return seen


def test_a_policy_computes_the_last_layer_of_what_predicts() -> None:
    lm = small.language_model()
    policy, seen = Policy(lm), computed(lm)
    policy(collate(ROWS))
    every, read = 20 + 4 * 3 + 5 + 32, (1 + 4 * 2) + 2 + 2
    assert seen == [[every] * 4, [read, every, read, read]]


def test_a_scorer_computes_the_last_layer_of_one_token_a_row() -> None:
    model = small.trunk_with_score()
    scorer, seen = Scorer(model), computed(model)
    scorer(collate(ROWS))
    every = 20 + 4 * 3 + 5 + 32
    assert seen == [[every] * 4, [6, every, 6, 6]]


@pytest.mark.parametrize("error", [TypeError, RuntimeError, IndexError])
def test_a_layer_that_needs_every_token_is_left_unchanged(error: type[Exception]) -> None:
    lm = small.language_model()
    probe = 11

    def needs_all(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].shape[1] < probe and inputs[0].shape[0] == 1:
            raise error("the router reads every token")

    layers_of(lm)[-1].mlp.gate_proj.register_forward_pre_hook(needs_all)
    policy, seen = Policy(lm), computed(lm)
    policy(collate(ROWS))
    every = 20 + 4 * 3 + 5 + 32
    assert seen == [[every] * 4] * 2


def gradients(module: nn.Module, output: Tensor) -> dict[str, Tensor]:
    (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)).sum().backward()
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("change", [lambda _: None, recompute_layers])
def test_numbers_and_gradients_are_those_of_the_whole_layer(change: Any) -> None:
    batch = collate(ROWS)
    found = []
    for made in (lambda lm: lm, whole):
        lm = made(small.language_model().double())
        change(lm)
        policy = Policy(lm, shared_value_head=True).double().train()
        torch.nn.init.ones_(policy.value_head.weight)  # type: ignore[union-attr]
        output = policy(batch)
        values = output.values * batch.mask
        found.append((output.logprobs, gradients(policy, torch.stack([output.logprobs, values]))))
    (narrow, of_narrow), (plain, of_plain) = found
    assert torch.allclose(narrow, plain, atol=1e-12)
    assert of_narrow.keys() == of_plain.keys()
    assert all(torch.allclose(of_narrow[name], value, atol=1e-10) for name, value in of_plain.items())
    assert max(float(value.abs().max()) for value in of_plain.values()) > 0.1


def test_scores_and_their_gradients_are_those_of_the_whole_layer() -> None:
    found = []
    for made in (lambda model: model, whole):
        scorer = Scorer(made(small.trunk_with_score().double()))
        scores = scorer(collate(ROWS))
        found.append((scores, gradients(scorer, scores)))
    (narrow, of_narrow), (plain, of_plain) = found
    assert torch.allclose(narrow, plain, atol=1e-12)
    assert len({round(float(score), 6) for score in plain.detach()}) == len(ROWS)
    assert all(torch.allclose(of_narrow[name], value, atol=1e-10) for name, value in of_plain.items())


def test_without_reads_every_token_is_computed() -> None:
    lm = small.language_model()
    ids = torch.tensor([ROWS[0].prompt])
    before = lm(ids).logits
    Policy(lm)(collate(ROWS))
    assert torch.allclose(lm(ids).logits, before, atol=1e-5)


class Flat(nn.Module):
    """A feed-forward network with a part of a known name inside that is not handed a row of tokens."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, states: Tensor) -> Tensor:
        return self.mlp(states.flatten(0, 1)).view(states.shape)  # type: ignore[no-any-return]


def test_a_layer_that_is_made_otherwise_stays_whole() -> None:
    expected = Policy(small.language_model())(collate(ROWS)).logprobs
    lm = small.language_model()
    last = layers_of(lm)[-1]
    last.mlp = Flat(last.mlp)
    policy, seen = Policy(lm), []
    assert policy.packs
    last.mlp.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    assert torch.allclose(policy(collate(ROWS)).logprobs, expected, atol=1e-5)
    assert seen == [20 + 4 * 3 + 5 + 32]


def test_a_mixture_of_experts_asks_its_routers_about_every_token() -> None:
    lm = moe.language_model()
    policy = Policy(lm)
    assert policy.packs
    assert not any(module._forward_pre_hooks for module in layers_of(lm)[-1].modules())


def test_the_batch_that_moves_takes_its_reads_along() -> None:
    batch: TokenBatch = collate(ROWS)
    assert batch.to(torch.device("cpu")).predicting().tokens.tolist() == batch.predicting().tokens.tolist()
