"""The starting model of the align step."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.training.on_policy import _policy, check_critic
from posttrain.algorithms.ppo import PPO
from posttrain.data.batches import collate
from posttrain.errors import ConfigError
from posttrain.models.folders import load_encoder, save_model
from posttrain.models.inference import token_logprobs
from posttrain.models.tiny import byte_tokenizer, tiny_model
from tests.models import small


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return the folders models/sft and models/reward, with trunks that differ."""
    monkeypatch.chdir(tmp_path)
    made = {"sft": tiny_model(small.SHAPE, 3)[0], "reward": small.trunk_with_score(seed=8)}
    for name, model in made.items():
        save_model(model, byte_tokenizer(64), Path("models", name), "")
    return made


def test_a_critic_starts_from_the_reward_model_or_from_the_supervised_one_with_a_head_of_zeros(
    models: dict[str, Any],
) -> None:
    from_reward, from_sft = (
        _policy(replace(PPO, critic_start=start), "models/sft", deferred=False) for start in ("reward", "sft")
    )
    assert from_reward.critic is not None
    assert from_sft.critic is not None
    assert torch.equal(from_reward.critic.score.weight, models["reward"].score.weight)
    trunk = models["sft"].model.state_dict()
    assert all(torch.equal(weight, trunk[name]) for name, weight in from_sft.critic.model.state_dict().items())
    values = [n.values for n in token_logprobs(from_sft, small.rows(5), 40)]
    assert [len(v) for v in values] == [len(row.response) for row in small.rows(5)]
    assert not any(v.any() for v in values)
    assert any(n.values.any() for n in token_logprobs(from_reward, small.rows(5), 40))
    # zeros are a start and no trap: the head's gradient is made of hidden states
    values_with_graph = from_sft(collate(small.rows(5))).values
    assert values_with_graph is not None
    (values_with_graph - 1.0).square().sum().backward()
    assert from_sft.critic.score.weight.grad.abs().min() > 0


def test_a_critic_that_cannot_read_the_longest_answer_is_refused(models: dict[str, Any]) -> None:
    config = Path("models/reward/config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 16}))
    own = load_encoder("models/sft")
    for spec in (replace(PPO, critic_start="sft"), replace(PPO, critic="shared", critic_start="reward")):
        check_critic(spec, own, 17)
    check_critic(replace(PPO, critic_start="reward"), own, 16)
    with pytest.raises(
        ConfigError, match="the reward model, reads at most 16 tokens, and prompt and answer have up to 17"
    ):
        check_critic(replace(PPO, critic_start="reward"), own, 17)
