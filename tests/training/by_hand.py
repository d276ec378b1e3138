"""Helpers of the tests that compute losses by hand."""

from __future__ import annotations

from typing import Any

import torch

from posttrain.data.tokens import Tokens
from posttrain.models.policy import Policy
from tests.training.cases import case, probe


def token_logprobs(policy: Policy, tokens: Tokens, temperature: float = 1.0) -> list[float]:
    """One row, no padding, no chunks, the model's own logits."""
    with torch.no_grad():
        logits = policy.lm(input_ids=torch.tensor([tokens.prompt + tokens.response])).logits[0] / temperature
    table = logits.log_softmax(-1)
    return [table[len(tokens.prompt) + t - 1, token].item() for t, token in enumerate(tokens.response)]


def loss_of(name: str) -> tuple[dict[str, float], Policy, list[Any]]:
    made = case(name, double=True)
    model = made.model()
    return probe(model, 30).update(made.rows, made.objective), model, made.rows
