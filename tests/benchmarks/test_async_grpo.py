"""The comparison with AsyncGRPOTrainer: the attention in the kernel's place is exact, and a job's log-probabilities are a policy's."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.async_grpo import BY_NAME, given_job
from benchmarks.peers.varlen_cpu import varlen_attention
from benchmarks.training import saved_model
from posttrain.models.tiny import TinyShape, byte_tokenizer


def test_the_attention_by_offsets_is_that_of_each_segment() -> None:
    # a prompt of 3 that attends to itself, two answers of 2 after it, and one of 4
    queries, keys = [0, 3, 5, 7, 11], [0, 3, 8, 13, 20]
    drawn = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(length, heads, 8, dtype=torch.float64, generator=drawn, requires_grad=True)
        for length, heads in ((11, 4), (20, 2), (20, 2))
    )
    found = varlen_attention(
        query, key, value, torch.tensor(queries), torch.tensor(keys), 4, 7,
        softmax_scale=0.5, causal=True, window_size=(-1, -1),
    )  # fmt: skip
    by_hand = []
    for (first, last), (start, stop) in zip(pairwise(queries), pairwise(keys), strict=True):
        for row in range(first, last):
            seen = slice(start, stop - (last - 1 - row))
            for head in range(4):
                scores = 0.5 * (key[seen, head // 2] @ query[row, head])
                by_hand.append(scores.softmax(0) @ value[seen, head // 2])
    expected = torch.stack(by_hand).view(11, 4, 8)
    assert torch.allclose(found, expected, atol=1e-12)
    weights = torch.randn(11, 4, 8, dtype=torch.float64, generator=drawn)
    gradients = [torch.autograd.grad((each * weights).sum(), (query, key, value)) for each in (found, expected)]
    assert all(torch.allclose(ours, theirs, atol=1e-12) for ours, theirs in zip(*gradients, strict=True))


def test_windows_are_refused() -> None:
    states, offsets = torch.zeros(2, 1, 1), torch.tensor([0, 2])
    with pytest.raises(ValueError, match=r"window_size=\(3, 0\)"):
        varlen_attention(
            states, states, states, offsets, offsets, 2, 2, softmax_scale=1.0, causal=True, window_size=(3, 0)
        )


def test_log_probabilities_of_a_job_are_the_models_with_an_error_of_a_tenth(tmp_path: Path) -> None:
    shape = TinyShape(hidden_size=16, intermediate_size=16, layers=1, heads=2, kv_heads=1)
    case = replace(BY_NAME["async-uneven"], shape=shape, batch=2, steps=3, answer=(16, 40), samples=2)
    folder = saved_model(case, tmp_path)
    work = given_job(case, folder, seed=1, given=True)
    assert len(work["rows"]) == 2, "the first step only"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    errors: list[float] = []
    for text in work["rows"]:
        prompt = byte_tokenizer(256)(text)["input_ids"]
        for answer, given in zip(work["answers"][text], work["logprobs"][text], strict=True):
            with torch.no_grad():
                table = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            exact = [float(table[len(prompt) - 1 + i, token]) for i, token in enumerate(answer)]
            errors += (np.array(given) - np.array(exact)).tolist()
    first = np.random.Generator(np.random.PCG64(1)).normal(0, 0.1, 5)
    assert errors[:5] == pytest.approx(first.tolist(), abs=1e-5)
    assert np.std(errors) == pytest.approx(0.1, rel=4 / math.sqrt(2 * len(errors)))
