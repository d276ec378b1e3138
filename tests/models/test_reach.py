"""Windows are found by trying: log-probabilities and samples of long rows are those of transformers, or the model is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from posttrain.data.batches import collate
from posttrain.data.layout import Attended
from posttrain.data.tokens import Tokens
from posttrain.errors import ModelError, RolloutError
from posttrain.models.causal import check_policy
from posttrain.models.folders import load_policy
from posttrain.models.lora import Adapter
from posttrain.models.packed import REACH, prepare
from posttrain.models.policy import Policy
from posttrain.models.reach import find_reach, probe_ids
from posttrain.objectives.kl import kl_estimate
from posttrain.planning import sizes
from posttrain.rollouts.engine import Request, SamplingSettings
from posttrain.rollouts.generate import confirm_generate
from posttrain.rollouts.native import NativeEngine
from posttrain.settings import LoraSettings
from tests.models import small

CASES = Path(__file__).parents[2] / ".." / "shared" / "cases" / "models"
with_cases = pytest.mark.skipif(not CASES.is_dir(), reason="the small cases are not next to the project")
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def model(kind: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES | settings))
    return small.sharpened(made).eval()


def gpt_neo() -> Any:
    return model("gpt_neo", num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=8)


def transformers_logprobs(lm: Any, row: Tokens) -> list[float]:
    with torch.no_grad():
        table = lm(torch.tensor([row.prompt + row.response]), use_cache=False).logits[0].log_softmax(-1)
    return [float(table[len(row.prompt) - 1 + i, token]) for i, token in enumerate(row.response)]


def assert_agrees(lm: Any, length: int = 100) -> None:
    ids = probe_ids(length, lm.config.get_text_config().vocab_size)
    row = Tokens(ids[:20], ids[20:])
    expected = transformers_logprobs(lm, row)
    with torch.no_grad():
        assert Policy(lm)(collate([row])).logprobs[0].tolist() == pytest.approx(expected, abs=1e-4)
    requests = [Request(ids[:40], ((0,), (1,))), Request(ids[:9], ((2,),))]
    answers = NativeEngine(lm, ()).sample(requests, SamplingSettings(12, 1.0))
    for request, group in zip(requests, answers, strict=True):
        for answer in group:
            again = transformers_logprobs(lm, Tokens(request.prompt, answer.tokens))
            assert answer.logprobs == pytest.approx(again, abs=1e-4)


@with_cases
def test_a_window_in_a_nested_configuration() -> None:
    assert_agrees(load_policy(CASES / "gemma3_composite"))


def test_windows_of_any_name() -> None:
    assert_agrees(gpt_neo())
    assert_agrees(model("mistral", sliding_window=8))


def test_the_reach_is_where_agreement_ends() -> None:
    config = AutoConfig.for_model("mistral", **SIZES | {"sliding_window": 8})
    assert find_reach(config, lambda length: length <= 8) == 8
    assert find_reach(config, lambda length: True) is None
    assert find_reach(config, lambda length: False) == 0
    # a smaller number of another meaning, here that of the experts, does not hide the window
    experts = AutoConfig.for_model("mixtral", **SIZES | {"sliding_window": 8, "num_local_experts": 4})
    assert find_reach(experts, lambda length: length <= 8) == 8
    # rates of compressed keys are in a mapping; at the rate itself, the last token of the longest row sees the first key
    compressed = AutoConfig.for_model("llama", **SIZES | {"compress_rates": {"heavily": 128}})
    assert find_reach(compressed, lambda length: length < 128) == 0
    # a longer window than is tried is believed
    far = AutoConfig.for_model("mistral", **SIZES | {"sliding_window": 1024, "max_position_embeddings": 4096})
    assert find_reach(far, lambda length: True) == 1024
    full = AutoConfig.for_model("qwen2", **SIZES | {"sliding_window": 1024, "max_position_embeddings": 4096})
    assert find_reach(full, lambda length: True) is None


LONG = {"sliding_window": 1024, "max_position_embeddings": 4096}


@pytest.mark.parametrize("kind", ["mistral", "gemma2", "gpt_oss"])
def test_a_long_window_is_tried_with_a_short_one(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    more = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8} if kind == "gpt_oss" else {}
    lm = model(kind, **LONG | more)
    assert prepare(lm)
    assert getattr(lm, REACH) is None
    assert lm.config.sliding_window == 1024
    # attention that ignores the window is found out, and computes padded rows beyond it
    monkeypatch.setattr(Attended, "within", lambda part, _: part.mask)
    faulty = model(kind, **LONG | more)
    assert prepare(faulty)
    assert getattr(faulty, REACH) == 1024


def test_a_cache_that_disagrees_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = model("llama")
    confirm_generate(lm)
    forward = lm.forward

    def forgetful(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        if kwargs.get("past_key_values") is not None:
            output.logits = output.logits + torch.arange(64)
        return output

    monkeypatch.setattr(lm, "forward", forgetful)
    with pytest.raises(RolloutError, match="LlamaForCausalLM samples from other distributions"):
        confirm_generate(lm)


def test_a_lora_name_without_a_layer_is_refused() -> None:
    with pytest.raises(ModelError, match=r"'qproj' matches no linear layer of LlamaForCausalLM.*matched: v_proj"):
        Adapter(model("llama"), LoraSettings(2, 4, ("v_proj", "qproj")))


def test_a_merge_that_changes_the_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = model("llama")
    adapter = Adapter(lm, LoraSettings(2, 4, ("v_proj",)))
    layer = lm.model.layers[0].self_attn.v_proj
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    monkeypatch.setattr(type(layer), "merge", lambda *_, **__: None)
    with pytest.raises(ModelError, match="merging the adapter into LlamaForCausalLM changes its outputs"):
        adapter.merge()


@pytest.mark.parametrize(
    ("kind", "settings", "expected"),
    [
        ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4}, (32, 2, 32, 32, 128)),
        ("gpt_neo", {"num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]]}, (32, 2, 32, 32, 128)),
        ("bloom", {"n_head": 4, "n_layer": 2}, (32, 2, 32, 32, 128)),
        ("mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4}, (32, 2, 32, 32, 128)),
        ("opt", {"num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48}, (32, 2, 32, 32, 48)),
    ],
)
def test_the_plan_reads_every_spelling(kind: str, settings: dict[str, Any], expected: tuple[int, ...]) -> None:
    found = sizes(AutoConfig.for_model(kind, **{"vocab_size": 64, "hidden_size": 32} | settings))
    assert (found.hidden, found.layers, found.query_width, found.key_width, found.intermediate) == expected


@pytest.mark.parametrize("kind", ["mamba", "xglm", "falcon", "codegen", "gptj", "gpt_bigcode"])
def test_the_plan_never_ends_in_a_traceback(kind: str) -> None:
    assert sizes(AutoConfig.for_model(kind)).parameters > 1000


def test_k3_keeps_its_gradient_where_the_reference_finds_a_token_likely_not() -> None:
    logprob = torch.tensor([-1.0], requires_grad=True)
    kl_estimate(logprob, torch.tensor([-31.0]), "k3").sum().backward()
    # d = 30: k3 = exp(-30) - 1 + 30, its derivative 1 - exp(-30)
    assert logprob.grad is not None
    assert float(logprob.grad) == pytest.approx(1.0)
    far = torch.tensor([-100.0], requires_grad=True)
    kl_estimate(far, torch.tensor([-1.0]), "k3").sum().backward()
    assert far.grad is not None
    assert torch.isfinite(far.grad).all()


def attending_to_all(lm: Any) -> Any:
    for layer in lm.model.layers:
        layer.self_attn.is_causal = False
    return lm


def test_a_model_that_is_not_causal_is_refused() -> None:
    lm = model("llama")
    check_policy(lm, "m")
    with pytest.raises(
        ModelError, match=r"m: LlamaForCausalLM is not causal: later tokens change the states of earlier ones"
    ):
        check_policy(attending_to_all(lm), "m")
    with pytest.raises(ModelError, match=r"BertLMHeadModel is not causal.*is_decoder: true"):
        check_policy(model("bert"), "m")


def test_a_model_that_computes_no_logits_from_ids_is_refused_by_name() -> None:
    broken = model("llama")
    del broken.model.norm
    with pytest.raises(
        ModelError, match=r"LlamaForCausalLM does not compute logits from a row of token ids \(AttributeError"
    ):
        check_policy(broken, "m")


@pytest.mark.parametrize("kind", ["mamba", "falcon_mamba"])
def test_state_spaces_are_padded_and_sampled_by_generate(kind: str) -> None:
    assert_agrees(model(kind, state_size=8), length=30)


def test_a_state_that_is_wrong_in_a_batch_is_refused() -> None:
    """RWKV of transformers mixes up the states of several rows."""
    rwkv = model("rwkv", attention_hidden_size=32, context_length=128)
    with pytest.raises(RolloutError, match="RwkvForCausalLM samples from other distributions"):
        NativeEngine(rwkv, ()).sample([Request((5, 6, 7), ((0,), (1,)))], SamplingSettings(4, 1.0))


def test_a_long_window_that_no_short_one_stands_for_is_tried_once_rows_exceed_it() -> None:
    """GPT-Neo keeps its window as a mask; its cache also forgets beyond a window that only the configuration names."""
    layers = {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}
    engine = NativeEngine(
        model("gpt_neo", **layers, window_size=600, sliding_window=600, max_position_embeddings=1024), ()
    )
    ids = probe_ids(610, 64)
    assert len(engine.sample([Request(ids[:20], ((0,),))], SamplingSettings(4, 1.0))[0][0].tokens) == 4
    with pytest.raises(RolloutError, match="GPTNeoForCausalLM samples from other distributions"):
        engine.sample([Request(ids, ((0,),))], SamplingSettings(4, 1.0))


def test_hidden_states_of_another_width_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="the logits of RemBertForCausalLM are not the plain output"):
        check_policy(model("rembert", is_decoder=True, input_embedding_size=16, output_embedding_size=24), "m")
