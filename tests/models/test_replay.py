"""Replayed routing against a forward pass whose routers are given their experts token by token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from posttrain.data.batches import collate
from posttrain.data.tokens import Tokens
from posttrain.errors import ConfigError, ModelError
from posttrain.models.checkpointing import recompute_layers
from posttrain.models.policy import Policy
from posttrain.training.routing import require_replay
from tests.models import moe, small

ROWS = [*small.rows(6), *small.answers(small.rows(6), seed=3)]


@contextmanager
def forced(rows: list[list[list[int]]]) -> Iterator[None]:
    """Make the routers of one row choose `rows[layer][token]`, by their formula: softmax, the given experts, divided by their sum."""
    calls = iter(rows)

    def forward(router: Qwen3MoeTopKRouter, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = nn.functional.linear(hidden.reshape(-1, router.hidden_dim), router.weight)
        ids = torch.tensor(next(calls))
        weights = logits.softmax(-1).gather(-1, ids)
        return logits, weights / weights.sum(-1, keepdim=True), ids

    with patch.object(Qwen3MoeTopKRouter, "forward", forward):
        yield


def by_hand(policy: Policy, row: Tokens, chosen: Tensor) -> Tensor:
    """Return the log-probabilities of one row's response with the experts [time, layers, 2] for the tokens that predict it."""
    ids = torch.tensor([row.prompt + row.response])
    layers = policy.lm.base_model(input_ids=ids, output_router_logits=True).router_logits
    start, time = len(row.prompt) - 1, len(row.response)
    # the first layer's choices outside the response are its own; the second layer's depend on the first one's, so go layer by layer
    choices: list[list[list[int]]] = []
    for layer in range(len(layers)):
        with forced([*choices, *([[[0, 1]] * ids.shape[1]] * (len(layers) - layer))]):
            seen = policy.lm.base_model(input_ids=ids, output_router_logits=True).router_logits[layer]
        own = seen.topk(2).indices.tolist()
        own[start : start + time] = chosen[:time, layer].tolist()
        choices.append(own)
    with forced(choices):
        logprobs = policy.lm(input_ids=ids).logits.log_softmax(-1)
    return logprobs[0, start : start + time].gather(-1, torch.tensor(row.response)[:, None]).squeeze(-1)


def test_replaying_its_own_choices_changes_no_bit() -> None:
    policy, batch = Policy(moe.language_model()), collate(ROWS)
    plain = policy(batch)
    assert plain.routing is not None
    again = policy(batch, 1.0, plain.routing.chosen)
    assert torch.equal(again.logprobs, plain.logprobs)


@pytest.mark.parametrize("packs", [True, False])
def test_an_other_policy_with_replayed_choices_is_the_model_told_those_experts(packs: bool) -> None:
    batch, old = collate(ROWS), Policy(moe.language_model(seed=1))
    with torch.no_grad():
        routing = old(batch).routing
    assert routing is not None
    policy = Policy(moe.language_model())
    policy.packs = packs
    output = policy(batch, 1.0, routing.chosen)
    # the routing that is reported is the policy's own, so that the share of changed choices stays visible
    assert output.routing is not None
    assert not torch.equal(output.routing.chosen[batch.mask], routing.chosen[batch.mask])
    expected = [by_hand(policy, row, routing.chosen[i].long()) for i, row in enumerate(ROWS)]
    for i, values in enumerate(expected):
        assert output.logprobs[i, : len(values)].tolist() == pytest.approx(values.tolist(), abs=2e-5)
    parameters = [p for p in policy.parameters() if p.requires_grad]
    ours = torch.autograd.grad(output.logprobs.sum(), parameters, allow_unused=True)
    theirs = torch.autograd.grad(torch.cat(expected).sum(), parameters, allow_unused=True)
    for mine, reference in zip(ours, theirs, strict=True):
        assert (mine is None) == (reference is None)
        if mine is not None and reference is not None:
            assert torch.allclose(mine, reference, atol=1e-4 * float(reference.abs().max()) + 1e-6)


def test_rows_after_the_replayed_ones_route_by_themselves() -> None:
    policy, old, batch = Policy(moe.language_model()), Policy(moe.language_model(seed=1)), collate(ROWS)
    routing, plain = old(batch).routing, policy(batch)
    assert routing is not None
    output = policy(batch, 1.0, routing.chosen[:3])
    shared = {row.prompt for row in ROWS[:3]}
    free = [i for i, row in enumerate(ROWS) if i >= 3 and row.prompt not in shared]
    assert torch.allclose(output.logprobs[free], plain.logprobs[free], atol=1e-5)
    assert not torch.allclose(output.logprobs[:3], plain.logprobs[:3], atol=1e-3)


def test_what_cannot_be_replayed_is_refused_in_words() -> None:
    with pytest.raises(ConfigError, match="no effect on a dense model"):
        require_replay(small.policy())
    policy = Policy(moe.language_model())
    require_replay(policy)
    recompute_layers(policy.lm)
    with pytest.raises(ConfigError, match="Turn one of them off"):
        require_replay(policy)
    batch = collate(ROWS)
    routing = Policy(moe.language_model(seed=1))(batch).routing
    assert routing is not None
    own = Qwen3MoeTopKRouter.forward

    def squared(router: Qwen3MoeTopKRouter, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, weights, ids = own(router, hidden)
        return logits, weights**2, ids

    with patch.object(Qwen3MoeTopKRouter, "forward", squared), pytest.raises(ModelError, match="router_replay: false"):
        Policy(moe.language_model())(batch, 1.0, routing.chosen)
