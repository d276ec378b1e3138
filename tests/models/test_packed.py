"""A flat batch gives every row the log-probabilities that it has in its own batch, for every architecture."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from posttrain.data.batches import TokenBatch, collate
from posttrain.data.offsets import OFFSETS
from posttrain.data.tokens import Tokens
from posttrain.models.packed import NAME, REACH
from posttrain.models.policy import Policy
from posttrain.models.varlen import KERNELS
from tests.models import small
from tests.models.varlen_reference import REFERENCE

PROMPT = (5, 9, 11, 4, 7)
ROWS = [
    Tokens(PROMPT, (6, 7, 8, 2)),
    Tokens((3, 4), (5, 2)),
    Tokens(PROMPT, (2,)),
    Tokens((8,) * 7, (9,) * 11),
    Tokens(PROMPT, (3,) * 9),
    Tokens((8,) * 7, (4, 2)),
]
COMMON = {
    "vocab_size": 20, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "head_dim": 8, "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 1,
}  # fmt: skip
PACKING: dict[str, dict[str, Any]] = {
    "llama": COMMON,
    "qwen2": COMMON,
    "qwen3": COMMON,
    "qwen3_moe": COMMON | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "mistral": COMMON | {"sliding_window": None},
    "phi3": COMMON,
    "deepseek_v3": COMMON
    | {
        "num_key_value_heads": 2,
        "head_dim": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 16,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 6,
        "first_k_dense_replace": 1,
    },
    "gemma2": COMMON
    | {"attn_logit_softcapping": 1.5, "final_logit_softcapping": None, "query_pre_attn_scalar": 8, "sliding_window": 6},
    "gpt_oss": COMMON
    | {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gpt2": {"vocab_size": 20, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
}
PADDED: dict[str, dict[str, Any]] = {
    "lfm2": COMMON | {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "bloom": {"vocab_size": 20, "hidden_size": 16, "n_layer": 2, "n_head": 2},
}


def model(kind: str, settings: dict[str, Any]) -> PreTrainedModel:
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**settings)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 2:
                parameter.mul_(6.0)
    assert isinstance(made, PreTrainedModel)
    return made


@torch.no_grad()
def alone(lm: PreTrainedModel, row: Tokens) -> list[float]:
    """Log-probabilities of the response by transformers' own forward over this row and nothing else."""
    table = lm(torch.tensor([row.prompt + row.response])).logits[0].float().log_softmax(-1)
    return [float(table[len(row.prompt) - 1 + i, token]) for i, token in enumerate(row.response)]


def agree(policy: Policy, expected: list[list[float]]) -> None:
    with torch.no_grad():
        output = policy(collate(ROWS))
    for row, mask, values in zip(output.logprobs, collate(ROWS).mask, expected, strict=True):
        assert row[mask].tolist() == pytest.approx(values, abs=2e-5)


@pytest.mark.parametrize("kind", sorted(PACKING | PADDED))
def test_every_row_has_the_log_probabilities_that_it_has_alone(kind: str) -> None:
    lm = model(kind, (PACKING | PADDED)[kind])
    expected = [alone(lm, row) for row in ROWS]
    assert len({round(value, 4) for row in expected for value in row}) > 20, "a model that tells tokens apart"
    policy = Policy(lm)
    assert policy.packs == (kind in PACKING)
    agree(policy, expected)
    # transformers computes the same as before with the model that packs
    assert [alone(lm, row) for row in ROWS] == [pytest.approx(values, abs=2e-5) for values in expected]


def test_a_window_shorter_than_a_row_is_packed() -> None:
    lm = model("mistral", COMMON | {"sliding_window": 8})
    expected = [alone(lm, row) for row in ROWS]
    policy = Policy(lm)
    assert policy.packs
    assert getattr(lm, REACH) is None
    agree(policy, expected)
    without = model("mistral", COMMON | {"sliding_window": None})
    longest = max(range(len(ROWS)), key=lambda i: len(ROWS[i]))
    assert expected[longest] != pytest.approx(alone(without, ROWS[longest]), abs=1e-3), "the window must matter here"


@pytest.mark.parametrize("kind", ["mistral", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("offsets", [False, True])
def test_windows_soft_caps_and_sinks_have_the_gradient_of_transformers(
    kind: str, offsets: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if offsets:
        monkeypatch.setitem(KERNELS, "cpu", lambda: REFERENCE)
        monkeypatch.setitem(OFFSETS, "cpu", frozenset({torch.float32}))
    settings = COMMON | {"sliding_window": 4} if kind == "mistral" else PACKING[kind]
    gradients = []
    for ours in (True, False):
        lm = model(kind, settings)
        # the trial that turns packing on is run first, as in training
        policy = Policy(lm) if ours else None
        torch.manual_seed(1)
        for name, parameter in lm.named_parameters():
            if name.endswith("sinks"):
                torch.nn.init.normal_(parameter)
        if policy is not None:
            batch = collate(ROWS)
            total = policy(batch).logprobs[batch.mask].sum()
        else:
            lm.set_attn_implementation("eager")
            total = torch.stack([sum_of_response(lm, row) for row in ROWS]).sum()
        total.backward()
        gradients.append({name: p.grad for name, p in lm.named_parameters() if p.grad is not None})
    assert len(gradients[0]) == len(gradients[1])
    for name, expected in gradients[1].items():
        assert torch.allclose(gradients[0][name], expected, atol=1e-5 * float(expected.abs().max()) + 1e-6, rtol=0), (
            name
        )


def sum_of_response(lm: PreTrainedModel, row: Tokens) -> torch.Tensor:
    table = lm(torch.tensor([row.prompt + row.response])).logits[0].log_softmax(-1)
    return torch.stack([table[len(row.prompt) - 1 + i, token] for i, token in enumerate(row.response)]).sum()


def test_a_model_that_ignores_the_parts_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = small.language_model()
    inner = lm.base_model.forward

    def dropping(*args: Any, **kwargs: Any) -> Any:
        return inner(*args, **{name: value for name, value in kwargs.items() if name != "parts"})

    monkeypatch.setattr(lm.base_model, "forward", dropping)
    assert not Policy(lm).packs
    assert lm.config._attn_implementation != NAME


def test_a_prompt_is_computed_once_for_all_its_answers() -> None:
    lm = small.language_model()
    policy, seen = Policy(lm), []
    lm.model.embed_tokens.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0].numel()))
    batch: TokenBatch = collate([Tokens((7,) * 20, (3, i + 4, 2)) for i in range(8)])
    policy(batch)
    assert seen == [20 + 8 * 3]
