"""Models that keep something else than keys and values of every token are sampled by `generate`, with the same seeds and numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from posttrain.rollouts import slots
from posttrain.rollouts.decoder import Decoder, decoder_of
from posttrain.rollouts.engine import Completion, Request, SamplingSettings
from posttrain.rollouts.generate import GenerateEngine
from posttrain.rollouts.native import NativeEngine, _report_once
from posttrain.rollouts.steps import RECORDERS
from tests.models import small
from tests.models.test_reach import gpt_neo
from tests.rollouts.replayed import replayed

EOS = small.EOS
COMMON: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": EOS,
}  # fmt: skip
ATTENTION: dict[str, Any] = {
    "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
}  # fmt: skip


def mamba() -> Any:
    return sharpened(MambaForCausalLM, MambaConfig(**COMMON, state_size=4))


def windowed() -> Any:
    return sharpened(MistralForCausalLM, MistralConfig(**COMMON, **ATTENTION, sliding_window=8))


def capped() -> Any:
    """Its logits are changed after the head, so hidden state and head do not say all."""
    config = Gemma2Config(**COMMON, **ATTENTION, head_dim=8, final_logit_softcapping=2.0, sliding_window=64)
    return sharpened(Gemma2ForCausalLM, config)


def sharpened(kind: Any, config: Any) -> Any:
    torch.manual_seed(0)
    return small.sharpened(kind(config)).eval()


def requests(samples: int) -> list[Request]:
    prompts = [(5, 6, 7), (9,), (11, 3, 4, 8, 20, 30), (12, 13, 14)]
    return [Request(p, tuple((0, i, j) for j in range(samples))) for i, p in enumerate(prompts)]


def assert_right(model: Any, asked: list[Request], answers: list[list[Completion]], limit: int, heat: float) -> None:
    """Log-probabilities against a plain forward pass over prompt and answer; the end, once, at the end or not at all."""
    for request, group in zip(asked, answers, strict=True):
        assert len(group) == len(request.seeds)
        for answer in group:
            with torch.no_grad():
                logits = model(torch.tensor([request.prompt + answer.tokens])).logits[0, len(request.prompt) - 1 : -1]
            taken = (logits / heat).log_softmax(-1).gather(-1, torch.tensor(answer.tokens)[:, None])[:, 0]
            assert answer.logprobs == pytest.approx(taken.tolist(), abs=2e-4)
            assert EOS not in answer.tokens[:-1]
            assert answer.finished == (answer.tokens[-1] == EOS)
            assert answer.finished or len(answer.tokens) == limit


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (mamba, "has a recurrent state"),
        (gpt_neo, "limited beyond 8 tokens, as by a window"),
        (capped, "logits by slots differ"),
    ],
)
def test_it_falls_back_and_says_so_once(make: Any, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    _report_once.cache_clear()
    model, asked = make(), requests(6)
    engine = NativeEngine(model, EOS)
    answers = engine.sample(asked, SamplingSettings(12, 1.3))
    assert_right(model, asked, answers, 12, 1.3)
    assert {c.finished for group in answers for c in group} == {True, False}
    said = capsys.readouterr().err
    assert f"{type(model).__name__} is sampled by transformers' generate" in said
    assert reason in said
    again = NativeEngine(model, EOS, max_rows=2).sample(asked, SamplingSettings(12, 1.3))
    assert [[c.tokens for c in group] for group in again] == [[c.tokens for c in group] for group in answers]
    assert capsys.readouterr().err == ""


def test_a_window_is_no_matter_while_it_is_not_left() -> None:
    model = gpt_neo()
    short = [Request((5, 6), ((0, 0), (0, 1)))]
    engine = NativeEngine(model, EOS)
    answers = engine.sample(short, SamplingSettings(6, 1.0))
    assert isinstance(engine.decoder, Decoder)
    assert_right(model, short, answers, 6, 1.0)


def capped_scores() -> Any:
    config = Gemma2Config(
        **COMMON, **ATTENTION, head_dim=8, attn_logit_softcapping=0.7, final_logit_softcapping=None, sliding_window=8
    )
    return sharpened(Gemma2ForCausalLM, config)


def with_sinks() -> Any:
    config = GptOssConfig(
        **COMMON | ATTENTION, head_dim=8, sliding_window=5, num_local_experts=4, num_experts_per_tok=2
    )
    return sharpened(GptOssForCausalLM, config)


@pytest.mark.parametrize("make", [windowed, capped_scores, with_sinks])
@pytest.mark.parametrize("recorded", [False, True])
def test_windows_soft_caps_and_sinks_share_prompts(
    make: Any, recorded: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if recorded and make is not with_sinks:
        monkeypatch.setitem(RECORDERS, "cpu", replayed)
        monkeypatch.setattr(slots, "ROOM", 4)
    model, asked = make(), requests(4)
    engine = NativeEngine(model, EOS)
    answers = engine.sample(asked, SamplingSettings(18, 1.3))
    assert isinstance(engine.decoder, Decoder)
    assert engine.decoder.shared
    assert engine.decoder.reach is None
    model.set_attn_implementation("eager")
    assert_right(model, asked, answers, 18, 1.3)
    assert max(len(answer.tokens) for group in answers for answer in group) > 8, "longer than the window"
    assert capsys.readouterr().err == ""


def test_a_long_window_is_tried_with_a_short_one(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = COMMON | ATTENTION | {"max_position_embeddings": 4096, "sliding_window": 1024}
    for reach in (None, 1024):
        decoder = decoder_of(sharpened(MistralForCausalLM, MistralConfig(**sizes)), bf16=False)
        assert isinstance(decoder, Decoder)
        assert decoder.reach == reach
        assert decoder.shared
        assert not decoder.continues()
        # attention that ignores windows
        monkeypatch.setattr(slots.Slots, "within", lambda own, window: own.layout)


def test_a_model_with_a_position_bias_keeps_its_own_attention() -> None:
    model = sharpened(BloomForCausalLM, BloomConfig(**COMMON, n_head=2))
    decoder = decoder_of(model, bf16=False)
    assert isinstance(decoder, Decoder)
    assert not decoder.shared
    asked = requests(5)
    assert_right(model, asked, NativeEngine(model, EOS).sample(asked, SamplingSettings(12, 1.0)), 12, 1.0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_both_ways_draw_the_same_tokens(temperature: float) -> None:
    model, settings = small.language_model(), SamplingSettings(12, temperature)
    model.generation_config.repetition_penalty = 5.0  # which must not matter
    native, generated = (kind(model, EOS).sample(requests(5), settings) for kind in (NativeEngine, GenerateEngine))
    assert [[c.tokens for c in group] for group in generated] == [[c.tokens for c in group] for group in native]
    assert_right(model, requests(5), generated, 12, temperature or 1.0)


def chaotic(strength: float) -> Any:
    """Return a model whose last hidden states depend on rounding: where training has made attention sinks, real models do so."""
    from posttrain.models.tiny import tiny_model

    model, _ = tiny_model(small.SHAPE, 0)
    model.base_model.norm.register_forward_hook(
        lambda module, given, output: output + strength * torch.sin(1e5 * output)
    )
    return model


def test_a_model_that_amplifies_rounding_is_not_taken_for_one_with_a_wrong_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = chaotic(0.2)
    decoder, row = decoder_of(model, bf16=False), torch.tensor([[5, 6, 7]])
    assert isinstance(decoder, Decoder)
    with decoder.decoding():
        assert bool((decoder._rounding(row) > 1e-3).all())
        assert bool((Decoder(chaotic(0.0), True)._rounding(row) < 1e-3).all())
    monkeypatch.setattr(Decoder, "_rounding", lambda self, row: torch.zeros(row.shape[1]))
    assert "logits by slots differ" in str(decoder_of(model, bf16=False))
