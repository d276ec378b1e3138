"""The decoding step of the plain family: the model's own log-probabilities over all of its options, and no other model is taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from posttrain.models.lora import Adapter
from posttrain.models.packed import prepare
from posttrain.rollouts.decoder import Decoder
from posttrain.rollouts.engine import Request, SamplingSettings
from posttrain.rollouts.native import NativeEngine
from posttrain.rollouts.plain_step import PlainStep, plain_step
from posttrain.settings import LoraSettings

SIZES: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
WINDOW = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
SCALED = {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}
REQUESTS = [Request((5, 6, 7) * 3, ((0,), (1,))), Request((9, 4), ((2,),))]


def model(kind: Any, **options: Any) -> PreTrainedModel:
    """Return a model whose norms and biases are not 1 and 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made: PreTrainedModel = AutoModelForCausalLM.from_config(kind(**{**SIZES, **options}))
        for parameter in made.parameters():
            if parameter.dim() == 1:
                parameter.data += 0.3 * torch.randn_like(parameter)
            else:
                parameter.data *= 5
    return made.eval()


def own_logprobs(lm: PreTrainedModel, prompt: tuple[int, ...], answer: tuple[int, ...]) -> list[float]:
    with torch.no_grad():
        logprobs: Tensor = lm(input_ids=torch.tensor([[*prompt, *answer]])).logits[0].log_softmax(-1)
    found: list[float] = logprobs[len(prompt) - 1 : -1].gather(1, torch.tensor(answer)[:, None])[:, 0].tolist()
    return found


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
        (LlamaConfig, {"hidden_act": "gelu", "num_key_value_heads": 4, "head_dim": 6, "rope_parameters": SCALED}),
        (LlamaConfig, {"tie_word_embeddings": True, "num_key_value_heads": 1}),
        (LlamaConfig, {"rope_parameters": DYNAMIC}),
        (MistralConfig, {"sliding_window": 6}),
        (Qwen2Config, WINDOW),
        (Qwen3Config, {"head_dim": 8, "attention_bias": True}),
        (SmolLM3Config, {"no_rope_layers": [1, 0]}),
    ],
)
@pytest.mark.parametrize("prepared", [False, True])
def test_samples_have_the_log_probabilities_of_the_model(kind: Any, options: dict[str, Any], prepared: bool) -> None:
    lm = model(kind, **options)
    if prepared:
        assert prepare(lm)
    engine = NativeEngine(lm, -1)
    answers = engine.sample(REQUESTS, SamplingSettings(12, 1.0))
    assert isinstance(engine.decoder, Decoder)
    assert isinstance(engine.decoder.plain, PlainStep)
    for request, group in zip(REQUESTS, answers, strict=True):
        for answer in group:
            assert answer.logprobs == pytest.approx(own_logprobs(lm, request.prompt, answer.tokens), abs=1e-5)


def test_rotations_are_computed_once_for_all_positions_in_the_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    # the trial and two calls fit into one table; a longer row needs a larger one
    monkeypatch.setattr("posttrain.rollouts.plain_step.TABLE_STEP", 50)
    lm = model(LlamaConfig)
    engine = NativeEngine(lm, -1)
    for prompt, new, size in (((5, 6, 7), 4, 50), ((9, 4) * 10, 28, 50), ((9, 4) * 12, 30, 100)):
        [[answer]] = engine.sample([Request(prompt, ((0,),))], SamplingSettings(new, 1.0))
        assert isinstance(engine.decoder, Decoder)
        assert isinstance(engine.decoder.plain, PlainStep)
        assert len(engine.decoder.plain.table) == size
        assert answer.logprobs == pytest.approx(own_logprobs(lm, prompt, answer.tokens), abs=1e-5)


def replaced(lm: PreTrainedModel) -> None:
    lm.base_model.layers[1].mlp.up_proj = nn.Sequential(lm.base_model.layers[1].mlp.up_proj)


def hooked(lm: PreTrainedModel) -> None:
    lm.base_model.layers[0].self_attn.v_proj.register_forward_hook(lambda module, given, output: 2 * output)


def adapted(lm: PreTrainedModel) -> None:
    Adapter(lm, LoraSettings(rank=2, alpha=4, target_modules=("q_proj", "down_proj")))
    for name, parameter in lm.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.5


@pytest.mark.parametrize("kind", [GraniteConfig, Olmo2Config])
def test_models_that_compute_otherwise_are_not_taken(kind: Any) -> None:
    assert plain_step(model(kind)) is None


@pytest.mark.parametrize("bf16", [False, True])
def test_adapters_are_part_of_the_step_but_for_autocast(bf16: bool) -> None:
    lm = model(LlamaConfig, attention_bias=True)
    engine, settings = NativeEngine(lm, -1, bf16=bf16), SamplingSettings(6, 1.0)
    engine.sample(REQUESTS, settings)
    adapted(lm)
    for sampler in (engine, NativeEngine(lm, -1, bf16=bf16)):
        [[answer, _], _] = sampler.sample(REQUESTS, settings)
        assert isinstance(sampler.decoder, Decoder)
        assert isinstance(sampler.decoder.plain, PlainStep) is not bf16
        own = own_logprobs(lm, REQUESTS[0].prompt, answer.tokens)
        assert answer.logprobs == pytest.approx(own, abs=0.5 if bf16 else 1e-5)


@pytest.mark.parametrize("change", [replaced, hooked])
def test_changed_modules_are_not_taken(change: Any) -> None:
    lm = model(LlamaConfig)
    engine, settings = NativeEngine(lm, -1), SamplingSettings(6, 1.0)
    engine.sample(REQUESTS, settings)
    assert plain_step(lm) is not None
    change(lm)
    assert plain_step(lm) is None
    # an engine that has sampled before the change notices it
    [[answer, _], _] = engine.sample(REQUESTS, settings)
    assert answer.logprobs == pytest.approx(own_logprobs(lm, REQUESTS[0].prompt, answer.tokens), abs=1e-5)


def test_a_wrong_step_is_refused_by_the_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("posttrain.rollouts.plain_step.rotate", lambda states, cos, sin: states)
    lm = model(LlamaConfig)
    engine = NativeEngine(lm, -1)
    [[answer, _], _] = engine.sample(REQUESTS, SamplingSettings(4, 1.0))
    assert isinstance(engine.decoder, Decoder)
    assert engine.decoder.plain is None
    assert answer.logprobs == pytest.approx(own_logprobs(lm, REQUESTS[0].prompt, answer.tokens), abs=1e-5)
