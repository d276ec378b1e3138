"""Every preset takes two steps on a tiny model through `posttrain.train`, and moves its weights."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from posttrain.algorithms import PRESETS, LoggedGroups, OnPolicy, Preference, Unpaired, choose
from posttrain.api import Model, tiny
from posttrain.api_training import train

PROMPTS = ["1+1=", "2+3=", "10+4=", "7+7="]
PAIRS = [
    {"prompt": prompt, "chosen": "yes", "rejected": "perhaps", "chosen_score": 1.0, "rejected_score": 0.25}
    for prompt in PROMPTS
]
LABELLED = [{"prompt": p, "completion": f"{i}", "label": i % 2 == 0} for i, p in enumerate(PROMPTS)]
DEMONSTRATIONS = [{"prompt": p, "completion": "2"} for p in PROMPTS]
# an untrained model hardly ever ends an answer, so without its truncated answers DAPO would have none
OPTIONS: dict[str, dict[str, Any]] = {
    "ppo": {"critic": "shared"},
    "dapo": {"refill_partial": True, "mask_truncated": False},
}


@pytest.fixture(scope="module")
def start() -> tuple[Model, dict[str, torch.Tensor]]:
    model = tiny(seed=0, hidden_size=16, intermediate_size=16, layers=1, heads=2, kv_heads=1)
    return model, {name: value.clone() for name, value in model.lm.state_dict().items()}


def even(prompts: Any, completions: list[str], **columns: Any) -> list[float]:
    return [float(len(text) % 2) + 0.1 * (len(text) % 5) for text in completions]


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_trains(name: str, start: tuple[Model, dict[str, torch.Tensor]]) -> None:
    model, weights = start
    model.lm.load_state_dict(weights)
    spec = choose(name, OPTIONS.get(name))
    rows: Any = {OnPolicy: PROMPTS, Preference: PAIRS, LoggedGroups: PAIRS, Unpaired: LABELLED}[type(spec)]
    sampling = {"reward": even, "samples": 4, "max_new_tokens": 6} if isinstance(spec, OnPolicy) else {}
    if isinstance(spec, OnPolicy) and spec.has_expert:
        sampling["demonstrations"] = DEMONSTRATIONS
    if isinstance(spec, OnPolicy) and spec.needs_teacher:
        sampling["teacher"] = tiny(seed=1, hidden_size=16, intermediate_size=16, layers=1, heads=2, kv_heads=1)
    prompts = 2 * getattr(spec, "minibatches", 1)  # each update of a step has its own
    history = train(model, spec, rows, steps=2, learning_rate=1e-2, batch_size=prompts, **sampling)
    assert len(history) == 2
    assert all(math.isfinite(step["loss"]) and step["grad_norm"] > 0 for step in history)
    assert any(not torch.equal(value, weights[key]) for key, value in model.lm.state_dict().items())
