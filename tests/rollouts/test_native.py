"""The sampler against transformers, against a teacher-forced forward, and against the distribution it must draw from."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from posttrain.data.tokens import Tokens
from posttrain.errors import RolloutError
from posttrain.models.inference import token_logprobs
from posttrain.models.policy import Policy
from posttrain.rollouts.drawing import _shifted_sums
from posttrain.rollouts.engine import Request, SamplingSettings, uniforms
from posttrain.rollouts.native import NativeEngine
from tests.models import small

EOS = small.EOS
MODELS = {
    "qwen3": lambda: small.language_model(),
    "qwen3_moe": lambda: small.language_model(shape=small.MOE),
    "llama_tied": lambda: small.tied_llama(),
}
PROMPTS = [(5, 6, 7), (9,), (11, 3, 4, 8, 20, 30, 21), (12, 13), (9,)]


@pytest.fixture(params=sorted(MODELS))
def model(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]()


def requests(samples: int, prompts: list[tuple[int, ...]] = PROMPTS) -> list[Request]:
    return [Request(p, tuple((0, i, j) for j in range(samples))) for i, p in enumerate(prompts)]


def test_samples_do_not_depend_on_the_batch_they_are_in(model: Any) -> None:
    engine, settings = NativeEngine(model, EOS), SamplingSettings(10, 1.0)
    together = engine.sample(requests(3), settings)
    assert [len(group) for group in together] == [3] * 5
    backwards = engine.sample(requests(3)[::-1], settings)[::-1]
    split = NativeEngine(model, EOS, max_rows=4).sample(requests(3), settings)
    for i, request in enumerate(requests(3)):
        alone = [engine.sample([Request(request.prompt, (seed,))], settings)[0][0] for seed in request.seeds]
        for others in (backwards[i], split[i], alone):
            assert [c.tokens for c in others] == [c.tokens for c in together[i]]
            for left, right in zip(others, together[i], strict=True):
                assert left.logprobs == pytest.approx(right.logprobs, abs=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.6])
def test_log_probabilities_are_those_of_a_teacher_forced_forward(model: Any, temperature: float) -> None:
    answers = NativeEngine(model, EOS).sample(requests(4), SamplingSettings(12, temperature))
    flat = [(p, c) for p, group in zip(PROMPTS, answers, strict=True) for c in group]
    forced = token_logprobs(Policy(model), [Tokens(p, c.tokens) for p, c in flat], 60, temperature)
    for (_, completion), numbers in zip(flat, forced, strict=True):
        assert completion.logprobs == pytest.approx(numbers.logprobs.tolist(), abs=1e-5)


def test_greedy_is_what_transformers_generates(model: Any) -> None:
    greedy = NativeEngine(model, EOS).sample(requests(1), SamplingSettings(12, 0.0))
    for prompt, (completion,) in zip(PROMPTS, greedy, strict=True):
        generated = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            do_sample=False,
            max_new_tokens=12,
            eos_token_id=EOS,
            pad_token_id=0,
        )
        assert completion.tokens == tuple(generated[0, len(prompt) :].tolist())


def exact_first(model: Any, prompt: tuple[int, ...], temperature: float) -> np.ndarray:
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1].double() / temperature
    return logits.softmax(-1).numpy()


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_first_tokens_have_the_frequencies_of_the_softmax(temperature: float) -> None:
    model, draws = small.tied_llama(), 4000
    seeds = tuple((1, i) for i in range(draws))
    answers = NativeEngine(model, EOS, max_rows=draws).sample(
        [Request((5, 6), seeds)], SamplingSettings(1, temperature)
    )[0]
    counts = np.bincount([c.tokens[0] for c in answers], minlength=40).astype(float)
    assert goodness(counts, exact_first(model, (5, 6), temperature)) > 1e-3
    # and the test can tell temperatures apart
    assert goodness(counts, exact_first(model, (5, 6), 1.5 - temperature)) < 1e-6


def goodness(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """Return the chi-square test's p, tokens that are expected less than five times taken together."""
    expected = probabilities * counts.sum()
    rare = expected < 5
    observed, wanted = [*counts[~rare]], [*expected[~rare]]
    if rare.any():
        observed, wanted = [*observed, counts[rare].sum()], [*wanted, expected[rare].sum()]
    return float(chisquare(observed, wanted).pvalue)


def test_second_tokens_follow_the_first() -> None:
    # the joint probability of two tokens is the product of the exact conditionals
    model = small.tied_llama()
    answers = NativeEngine(model, -1).sample(
        [Request((5,), tuple((2, i) for i in range(50)))], SamplingSettings(2, 1.0)
    )[0]
    for completion in answers:
        first = exact_first(model, (5,), 1.0)[completion.tokens[0]]
        second = exact_first(model, (5, completion.tokens[0]), 1.0)[completion.tokens[1]]
        assert completion.logprobs == pytest.approx([np.log(first), np.log(second)], abs=1e-5)


def test_an_answer_ends_with_its_end_of_sequence_or_at_the_limit(model: Any) -> None:
    answers = [c for group in NativeEngine(model, EOS).sample(requests(30), SamplingSettings(12, 1.5)) for c in group]
    assert {c.finished for c in answers} == {True, False}
    for completion in answers:
        assert len(completion.tokens) == len(completion.logprobs)
        assert EOS not in completion.tokens[:-1]
        assert completion.finished == (completion.tokens[-1] == EOS)
        assert completion.finished or len(completion.tokens) == 12


def test_what_exceeds_the_context_is_refused_with_numbers(model: Any) -> None:
    engine = NativeEngine(model, EOS)
    prompt = tuple(range(3, 33))
    assert len(engine.sample([Request(prompt, ((0,),))], SamplingSettings(34, 1.0))[0]) == 1
    with pytest.raises(RolloutError, match="30 tokens and 35 new ones exceed the model's context of 64"):
        engine.sample([Request(prompt, ((0,),))], SamplingSettings(35, 1.0))


def test_no_request_has_no_answer_and_an_empty_prompt_is_refused() -> None:
    engine = NativeEngine(small.tied_llama(), EOS)
    assert engine.sample([], SamplingSettings(4, 1.0)) == []
    with pytest.raises(RolloutError, match="no tokens"):
        engine.sample([Request((), ((0,),))], SamplingSettings(4, 1.0))


def test_sampling_leaves_weights_mode_and_generators_alone() -> None:
    model = small.tied_llama().train()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    state = torch.get_rng_state()
    NativeEngine(model, EOS).sample(requests(2), SamplingSettings(5, 1.0))
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_it_samples_from_the_weights_of_now() -> None:
    model = small.tied_llama()
    engine, settings = NativeEngine(model, EOS), SamplingSettings(8, 0.0)
    before = engine.sample(requests(1), settings)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.flip(0))
    assert engine.sample(requests(1), settings) != before


def test_noise_depends_on_the_seed_alone() -> None:
    assert uniforms((1, 2, 3), 4).tolist() == uniforms((1, 2, 3), 4).tolist()
    assert uniforms((1, 2, 3), 6)[:4].tolist() == uniforms((1, 2, 3), 4).tolist()
    many = np.concatenate([uniforms((0, i, j), 20) for i in range(20) for j in range(20)])
    assert len(np.unique(many)) == len(many)
    assert many.min() > 0
    assert many.max() <= 1
    assert abs(many.mean() - 0.5) < 0.02


def test_rows_that_finish_early_leave_the_others_as_they_are(model: Any) -> None:
    settings = SamplingSettings(16, 1.2)
    free = NativeEngine(model, -1).sample(requests(12), settings)
    # an end of sequence that is common, so that the batch shrinks again and again
    common = int(np.bincount([t for group in free for c in group for t in c.tokens]).argmax())
    answers = NativeEngine(model, common).sample(requests(12), settings)
    lengths = [len(c.tokens) for group in answers for c in group]
    assert min(lengths) < 6
    assert max(lengths) > 10
    for group, endless in zip(answers, free, strict=True):
        for cut, whole in zip(group, endless, strict=True):
            assert cut.tokens == whole.tokens[: len(cut.tokens)]
            assert cut.logprobs == pytest.approx(whole.logprobs[: len(cut.tokens)], abs=1e-5)
            assert cut.finished == (common in whole.tokens)


def test_running_sums_of_a_fixed_order_are_the_cumulated_probabilities() -> None:
    for size in (1, 2, 7, 64, 1000):
        rows = torch.rand(3, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
        assert torch.allclose(_shifted_sums(rows), rows.cumsum(-1), rtol=1e-14, atol=0)
