"""Values read from the routers of a mixture of experts, against those that transformers reports."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from posttrain.data.batches import collate
from posttrain.models.folders import load_policy, save_model
from posttrain.models.inference import token_logprobs
from posttrain.models.policy import Policy
from posttrain.models.routing import routers_of
from posttrain.models.tiny import byte_tokenizer
from posttrain.objectives.routing import changed_choices, expert_loads
from tests.models import moe, small

ROWS = small.rows(6)


def test_entropy_and_choices_are_those_of_the_tokens_that_predict_the_response() -> None:
    policy = Policy(moe.language_model())
    output = policy(collate(ROWS))
    assert output.routing is not None
    assert output.routing.experts == 4
    numbers = token_logprobs(policy, ROWS, 30)
    for i, row in enumerate(ROWS):
        ids = torch.tensor([row.prompt + row.response])
        with torch.no_grad():
            layers = policy.lm.base_model(input_ids=ids, output_router_logits=True).router_logits
        at = slice(len(row.prompt) - 1, len(row.prompt) - 1 + len(row.response))
        expected = torch.stack([logits[at].topk(2).indices.sort(-1).values for logits in layers], 1)
        probabilities = [logits[at].double().softmax(-1) for logits in layers]
        entropy = torch.stack([-(p * p.log()).sum(-1) for p in probabilities]).mean(0)
        n = len(row.response)
        assert output.routing.chosen[i, :n].tolist() == expected.tolist()
        assert output.routing.entropy[i, :n].tolist() == pytest.approx(entropy.tolist(), abs=1e-5)
        experts = numbers[i].experts
        assert experts is not None
        assert experts.tolist() == expected.tolist()
        assert experts.itemsize == 2


def test_padded_and_packed_say_the_same_of_every_token() -> None:
    packed, padded = Policy(moe.language_model()), Policy(moe.language_model())
    assert packed.packs
    padded.packs = False
    batch = collate([*ROWS, *small.answers(ROWS, seed=3)])
    one, other = packed(batch).routing, padded(batch).routing
    assert one is not None
    assert other is not None
    assert one.chosen[batch.mask].tolist() == other.chosen[batch.mask].tolist()
    assert torch.allclose(one.entropy[batch.mask], other.entropy[batch.mask], atol=1e-5)


def test_nothing_is_read_from_a_dense_model_and_nothing_stays_on_a_router() -> None:
    policy = small.policy()
    assert policy.routers == ()
    assert policy(collate(ROWS)).routing is None
    assert token_logprobs(policy, ROWS, 30)[0].experts is None
    experts = Policy(moe.language_model())
    experts(collate(ROWS))
    assert len(experts.routers) == len(routers_of(experts.lm)) == 2
    assert not any(router._forward_hooks for router in experts.routers)
    assert not any("router" in name for name, _ in experts.named_parameters())


# two rows of two tokens in two layers, two of three experts each
CHOSEN = torch.tensor([[[[0, 1], [0, 2]], [[0, 1], [1, 2]]], [[[0, 2], [1, 2]], [[0, 0], [0, 0]]]], dtype=torch.int16)
MASK = torch.tensor([[True, True], [True, False]])


def test_loads_are_counted_under_the_mask_by_layer() -> None:
    assert expert_loads(CHOSEN, MASK, 3).tolist() == [[3, 2, 1], [1, 2, 3]]


def test_a_choice_has_changed_when_its_set_has() -> None:
    before = CHOSEN.clone()
    assert changed_choices(CHOSEN, before).tolist() == [[0, 0], [0, 0]]
    before[0, 1, 0] = torch.tensor([1, 2])
    before[1, 0] = torch.tensor([[0, 1], [0, 1]])
    assert changed_choices(CHOSEN, before).tolist() == [[0, 0.5], [1, 0]]


def test_a_folder_that_asks_for_the_routers_loss_is_told_that_there_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lm = small.language_model(shape=small.MOE)
    lm.config.output_router_logits = True
    save_model(lm, byte_tokenizer(64), tmp_path / "m", "")
    load_policy(tmp_path / "m")
    load_policy(tmp_path / "m")
    said = capsys.readouterr().err
    assert said.count("no objective here adds the routers' auxiliary loss") == 1
