"""Continuous batching: whatever fits under way at once, and however answers and prompts vary in length, the tokens are the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.models.tiny import TinyShape
from posttrain.rollouts import budget as limits
from posttrain.rollouts import native
from posttrain.rollouts.decoder import Decoder, decoder_of
from posttrain.rollouts.engine import Completion, Request, SamplingSettings
from posttrain.rollouts.native import NativeEngine
from posttrain.rollouts.segments import Segment, segments
from tests.models import small

LONG = TinyShape(hidden_size=16, intermediate_size=32, layers=2, heads=4, kv_heads=2, max_length=320)
WAYS = {"prompts shared": True, "padded copies": False}
NEW_TOKENS = 70
SETTINGS = SamplingSettings(NEW_TOKENS, 1.0)


@pytest.fixture(scope="module")
def model() -> Any:
    return small.language_model(shape=LONG)


@dataclass(frozen=True)
class Uneven:
    """Prompts of 1 to 200 tokens with 1 to 6 answers; the end of sequence comes early for some and never for others."""

    asked: list[Request]
    eos: int
    alone: list[list[Completion]]


@pytest.fixture(scope="module")
def uneven(model: Any) -> Uneven:
    generator = np.random.default_rng(0)
    lengths = [200, 3, 90, 1, 40, 7, 7, 120, 15, 2]
    asked = [
        Request(tuple(map(int, generator.integers(3, 250, n))), tuple((0, i, j) for j in range(1 + i % 6)))
        for i, n in enumerate(lengths)
    ]
    free = NativeEngine(model, -1).sample(asked, SETTINGS)
    counts = np.bincount([t for group in free for c in group for t in c.tokens])
    # a token that one in thirty or so is
    eos = int(np.abs(counts / counts.sum() - 1 / 30).argmin())
    return Uneven(asked, eos, [engine(model, eos).sample([request], SETTINGS)[0] for request in asked])


def engine(model: Any, eos: int, shared: bool = True, **budget: int) -> NativeEngine:
    made = NativeEngine(model, eos, **budget)
    made.decoder = Decoder(model, shared)
    return made


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("budget", [{}, {"max_rows": 3}, {"max_tokens": 600}, {"max_rows": 9, "max_tokens": 1200}])
def test_any_budget_gives_the_same_answers(model: Any, uneven: Uneven, budget: dict[str, int], way: str) -> None:
    lengths = [len(c.tokens) for group in uneven.alone for c in group]
    assert min(lengths) < 10
    assert max(lengths) == NEW_TOKENS
    answers = engine(model, uneven.eos, WAYS[way], **budget).sample(uneven.asked, SETTINGS)
    for group, alone in zip(answers, uneven.alone, strict=True):
        assert [(c.tokens, c.finished) for c in group] == [(c.tokens, c.finished) for c in alone]
        for left, right in zip(group, alone, strict=True):
            assert left.logprobs == pytest.approx(right.logprobs, abs=2e-5)


@pytest.mark.parametrize("budget", [{}, {"max_rows": 9, "max_tokens": 1200}])
def test_answers_are_the_same_if_their_ends_are_read_at_every_eighth_token(
    model: Any, uneven: Uneven, budget: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU does this; here the CPU does."""
    made = native._Sampling.__init__

    def seldom(self: Any, *args: Any) -> None:
        made(self, *args)
        self.read_every = native.READ_EVERY

    monkeypatch.setattr(native._Sampling, "__init__", seldom)
    answers = engine(model, uneven.eos, **budget).sample(uneven.asked, SETTINGS)
    found = [[(c.tokens, c.finished) for c in group] for group in answers]
    assert found == [[(c.tokens, c.finished) for c in group] for group in uneven.alone]


def test_prompts_enter_while_others_are_answered_and_the_budget_holds(
    model: Any, uneven: Uneven, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int, int]] = []
    step = Decoder.step

    def watched(self: Decoder, slots: Any, tokens: torch.Tensor) -> torch.Tensor:
        held = sum(states[0].numel() for layer in slots.layers for states in (layer.prompts, layer.answers))
        seen.append((sum(slots.counts), held // (2 * 2 * 4), len(set(slots.ages))))
        return step(self, slots, tokens)

    monkeypatch.setattr(Decoder, "step", watched)
    answers = engine(model, uneven.eos, max_rows=8, max_tokens=1200).sample(uneven.asked, SETTINGS)
    rows, tokens, ages = (max(column) for column in zip(*seen, strict=True))
    assert rows <= 8
    # keys of 2 layers x 2 heads x 4 numbers a token
    assert 900 < tokens <= 1200
    assert ages >= 3
    # one batch after the other would take the longest answer of each as many steps
    longest = [max(len(c.tokens) for c in group) for group in answers]
    assert len(seen) < 0.8 * sum(longest)


def test_a_prompt_is_computed_once_for_its_answers(model: Any, uneven: Uneven, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []
    parts: list[int] = []
    prefill = Decoder._prefill

    def watched(self: Decoder, prompts: Any, layers: Any) -> Any:
        computed.extend(len(prompt) for prompt in prompts)
        parts.append(len(prompts))
        return prefill(self, prompts, layers)

    monkeypatch.setattr(Decoder, "_prefill", watched)
    monkeypatch.setattr(limits, "CPU_PREFILL_TOKENS", 420)
    answers = engine(model, uneven.eos, max_rows=16).sample(uneven.asked, SamplingSettings(4, 1.0))
    assert computed == sorted((len(request.prompt) for request in uneven.asked), reverse=True)
    # at most 420 tokens of prompts at once: two of up to 200 tokens
    assert parts[0] == 2
    found = [[c.tokens for c in group] for group in answers]
    assert found == [[c.tokens[:4] for c in group] for group in uneven.alone]


def test_the_layout_by_hand() -> None:
    one, other = segments([100, 90, 40], [70, 70, 9], [2, 1, 2], torch.device("cpu"))
    # 40 is less than half of 100, and 32 or more below it
    assert (one.groups, one.rows, one.prompt, one.own, one.most) == (slice(0, 2), slice(0, 3), 100, 71, 2)
    assert (other.groups, other.rows, other.prompt, other.own, other.most) == (slice(2, 3), slice(3, 5), 40, 10, 2)
    assert one.cells is not None
    assert one.cells.tolist() == [0, 1, 2]
    assert one.prompt_mask is not None
    assert (one.prompt_mask == 0).sum(-1).flatten().tolist() == [100, 90]
    assert one.own_mask is other.cells is other.prompt_mask is other.own_mask is None
    (together,) = segments([30, 8], [20, 3], [1, 1], torch.device("cpu"))
    assert together.own_mask is not None
    assert (together.own_mask == 0).sum(-1).flatten().tolist() == [21, 4]


group = st.tuples(st.integers(1, 70), st.integers(0, 70), st.integers(1, 4))


@settings(max_examples=40, deadline=None)
@given(st.lists(group, min_size=1, max_size=6), st.integers(1, 2), st.integers(1, 3), st.integers(0, 99))
def test_shared_attention_is_attention(groups: list[tuple[int, int, int]], heads: int, repeats: int, seed: int) -> None:
    lengths, ages, counts = (list(column) for column in zip(*sorted(groups, reverse=True), strict=True))
    ages = sorted(ages, reverse=True)
    torch.manual_seed(seed)
    prompts = [torch.randn(len(groups), heads, 80, 4, dtype=torch.double) for _ in range(2)]
    answers = [torch.randn(sum(counts), heads, 80, 4, dtype=torch.double) for _ in range(2)]
    query = torch.randn(sum(counts), heads, repeats, 4, dtype=torch.double)
    parts = segments(lengths, ages, counts, torch.device("cpu"))
    found = torch.cat([attended(part, query, prompts, answers) for part in parts])
    rows = [g for g, count in enumerate(counts) for _ in range(count)]
    for row, g in enumerate(rows):
        keys, values = (
            torch.cat([prompt[g, :, : lengths[g]], own[row, :, : ages[g] + 1]], 1)
            for prompt, own in zip(prompts, answers, strict=True)
        )
        expected = (query[row] @ keys.mT).softmax(-1) @ values
        assert torch.allclose(found[row], expected, atol=1e-6)


def attended(part: Segment, query: torch.Tensor, prompts: Any, answers: Any) -> torch.Tensor:
    return part.attend(query[part.rows], prompts, answers)


@pytest.mark.parametrize(
    "make", [small.language_model, small.tied_llama, lambda: small.language_model(shape=small.MOE)]
)
def test_usual_models_share_prompts(make: Any) -> None:
    decoder = decoder_of(make(), bf16=False)
    assert isinstance(decoder, Decoder)
    assert decoder.shared


def test_sampling_leaves_the_attention_as_it_was(model: Any) -> None:
    before = model.config._attn_implementation
    NativeEngine(model, -1).sample([Request((5, 6), ((0,),))], SamplingSettings(3, 1.0))
    assert model.config._attn_implementation == before != "posttrain_shared_prompts"
