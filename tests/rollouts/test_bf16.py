"""Sampling under autocast: the numbers of the trainer's own forward pass under autocast, from unchanged weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from posttrain.data.tokens import Tokens
from posttrain.models.inference import token_logprobs
from posttrain.models.policy import Policy
from posttrain.rollouts import decoder
from posttrain.rollouts.decoder import Decoder, decoder_of
from posttrain.rollouts.engine import Request, SamplingSettings
from posttrain.rollouts.native import NativeEngine
from tests.models import small

PROMPTS = [(5, 6, 7), (9,), (11, 3, 4, 8, 20, 30, 21), (12, 13)]
REQUESTS = [Request(p, tuple((0, i, j) for j in range(4))) for i, p in enumerate(PROMPTS)]
SETTINGS = SamplingSettings(12, 1.0)


def test_log_probabilities_are_as_near_to_the_trainers_as_its_own_rounding() -> None:
    model = small.language_model()
    answers = NativeEngine(model, small.EOS, bf16=True).sample(REQUESTS, SETTINGS)
    rows = [Tokens(p, c.tokens) for p, group in zip(PROMPTS, answers, strict=True) for c in group]
    ours = np.concatenate([c.logprobs for group in answers for c in group])
    rounded, exact = (
        np.concatenate([n.logprobs for n in token_logprobs(Policy(model), rows, 200, bf16=bf16)])
        for bf16 in (True, False)
    )
    rounding = np.abs(rounded - exact).mean()
    assert rounding > 1e-3
    assert np.abs(ours - rounded).mean() < 1.5 * rounding
    # and not because it was not rounded at all
    assert np.abs(ours - exact).mean() > 0.3 * rounding


@pytest.mark.parametrize("trainable", [True, False])
def test_weights_are_cast_once_a_call_and_stay_as_they_are(trainable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small.tied_llama().requires_grad_(trainable)
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    cast: list[list[str]] = []
    matrices = decoder._matrices

    def watched(module: torch.nn.Module) -> Any:
        made = matrices(module)
        cast.append(sorted(made))
        return made

    monkeypatch.setattr(decoder, "_matrices", watched)
    engine = NativeEngine(model, small.EOS, bf16=True)
    first, second = (engine.sample(REQUESTS, SETTINGS) for _ in range(2))
    assert first == second
    # 7 matrices in each of 2 layers, and the head, though it is the embedding's weight as well; no norm, no embedding
    assert [len(names) for names in cast] == [14, 1] * 2
    assert isinstance(engine.decoder, decoder.Decoder)
    assert engine.decoder.casts == {}
    assert all(torch.equal(p, weights[name]) and p.requires_grad == trainable for name, p in model.named_parameters())


def test_what_is_sampled_next_comes_from_the_weights_of_then() -> None:
    model = small.tied_llama()
    engine, greedy = NativeEngine(model, -1, bf16=True), SamplingSettings(8, 0.0)
    before = engine.sample(REQUESTS, greedy)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.flip(0))
    assert engine.sample(REQUESTS, greedy) != before


def test_keys_and_values_are_stored_in_bfloat16() -> None:
    """Rotary embeddings and transformers' cache widen them: two layers of one head with 8 numbers, keys and values, two bytes each."""
    for bf16, size in ((False, 4), (True, 2)):
        decoder = decoder_of(small.language_model(), bf16)
        assert isinstance(decoder, Decoder)
        with decoder.decoding():
            assert decoder.token_bytes() == 2 * 2 * 8 * size
