"""Forward passes: the same numbers one by one, in a batch and at any padding, as transformers computes them from the saved folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from posttrain.data.batches import collate
from posttrain.data.tokens import Tokens
from posttrain.errors import ModelError
from posttrain.models import logprobs
from posttrain.models.folders import load_encoder, load_policy, load_tokenizer, save_model
from posttrain.models.inference import scores, token_logprobs
from posttrain.models.policy import Policy, Scorer
from posttrain.models.scorers import load_scorer
from posttrain.models.tiny import byte_tokenizer, tiny_model
from tests.models import small

ROWS = small.rows(8)


def test_scores_are_the_same_alone_in_a_batch_and_at_any_padding() -> None:
    scorer = small.scorer()
    together = scores(scorer, ROWS, 10_000)
    assert scores(scorer, ROWS, 1) == pytest.approx(together, abs=1e-5)
    assert scores(scorer, ROWS[::-1], 25)[::-1] == pytest.approx(together, abs=1e-5)
    padded = scores(scorer, [*ROWS, Tokens((5,) * 50, (2,))], 10_000)[:-1]
    assert padded == pytest.approx(together, abs=1e-5)
    assert max(together) - min(together) > 0.1


def test_the_score_is_read_at_the_last_real_token_even_if_it_looks_like_padding() -> None:
    # token 0 is what padding is filled with, 2 the end of sequence: a row that ends in both is read at its end
    scorer = small.scorer()
    odd = Tokens((7, 8), (2, 0, 0))
    with torch.no_grad():
        hidden = scorer.model.model(torch.tensor([[7, 8, 2, 0, 0]])).last_hidden_state
        expected = float(scorer.model.score(hidden[0, -1]))
    assert scores(scorer, [odd, *ROWS], 1000)[0] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("build", [small.language_model, small.tied_llama], ids=["untied", "tied"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_numbers_are_those_of_the_full_logits(build: Any, temperature: float) -> None:
    model = build()
    rows = small.rows(6, vocabulary=40)
    for row, numbers in zip(rows, token_logprobs(Policy(model), rows, 25, temperature), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([row.prompt + row.response])).logits[0].double() / temperature
        table = logits.log_softmax(-1)[len(row.prompt) - 1 : -1]
        assert numbers.logprobs.tolist() == pytest.approx(
            [table[t, i].item() for t, i in enumerate(row.response)], abs=1e-5
        )
        assert numbers.entropy.tolist() == pytest.approx((-(table.exp() * table).sum(-1)).tolist(), abs=1e-5)


def of_head(dtype: torch.dtype = torch.float64, bias: bool = True) -> tuple[Any, ...]:
    """Hidden states, a head, targets and a temperature for each of 11 tokens."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, offset = (
        torch.randn(*shape, generator=generator, dtype=dtype) for shape in ((11, 8), (30, 8), (30,))
    )
    temperature = torch.rand(11, generator=generator, dtype=torch.float64) + 0.5
    leaves = [t.requires_grad_() for t in (hidden, weight, *([offset] if bias else []))]
    return (*leaves, *([] if bias else [None]), torch.randint(30, (11,), generator=generator), temperature)


def plain(hidden: Any, weight: Any, bias: Any, targets: Any, temperature: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the same by autograd over the whole [tokens, vocabulary] table."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    table = (logits / (temperature if isinstance(temperature, float) else temperature[:, None])).log_softmax(-1)
    return table[torch.arange(len(targets)), targets], -(table.exp() * table).sum(-1)


@pytest.mark.parametrize("tile", [(1, 1), (4, 30), (7, 4), (1000, 1000)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("uniform", [None, 1.0, 0.7])
def test_fused_log_probabilities_are_those_of_the_whole_table(
    tile: tuple[int, int], bias: bool, uniform: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, words = tile
    monkeypatch.setattr(logprobs, "TILE_ELEMENTS", rows * min(words, 30))
    monkeypatch.setattr(logprobs, "TILE_WORDS", words)
    monkeypatch.setattr(logprobs, "ROW_ELEMENTS", rows * 30)
    monkeypatch.setattr(logprobs, "KEPT_ELEMENTS", 0 if rows == 4 else 1000)
    hidden, weight, offset, targets, temperature = of_head(bias=bias)
    temperature = temperature if uniform is None else uniform
    leaves = [hidden, weight, *([offset] if bias else [])]

    def run(function: Any) -> tuple[torch.Tensor, ...]:
        values, entropy = function(hidden, weight, offset, targets, temperature)
        one, both = (values * torch.arange(11)).sum(), ((values - 3 * entropy) * torch.arange(11)).sum()
        gradients = [torch.autograd.grad(total, leaves, retain_graph=True) for total in (one, both, entropy.sum())]
        return (values, entropy, *(gradient for group in gradients for gradient in group))

    for fused, expected in zip(run(logprobs.selected_logprobs), run(plain), strict=True):
        assert torch.allclose(fused, expected, atol=1e-12)


def test_the_fused_gradient_is_that_of_finite_differences() -> None:
    hidden, weight, offset, targets, temperature = of_head()

    def values(*leaves: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return logprobs.selected_logprobs(*leaves, targets, temperature)

    assert torch.autograd.gradcheck(values, (hidden, weight, offset))


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, weight, offset, targets, temperature = of_head()
    weight.requires_grad_(False)
    values, _ = logprobs.selected_logprobs(hidden, weight, offset, targets, temperature)
    values.sum().backward()
    assert weight.grad is None
    assert float(hidden.grad.abs().sum()) > 0


def test_under_autocast_the_product_is_bfloat16_and_the_softmax_float32() -> None:
    hidden, weight, _, targets, _ = of_head(torch.float32, bias=False)
    with torch.autocast("cpu", torch.bfloat16):
        values, entropy = logprobs.selected_logprobs(hidden, weight, None, targets, 1.0)
    assert values.dtype == entropy.dtype == torch.float32
    rounded = (hidden.bfloat16() @ weight.bfloat16().T).float().log_softmax(-1)
    assert torch.allclose(values, rounded[torch.arange(11), targets], atol=1e-6)
    values.sum().backward()
    expected, *_ = torch.autograd.grad(plain(hidden, weight, None, targets, 1.0)[0].sum(), [hidden])
    assert torch.allclose(hidden.grad, expected, atol=0.05)
    assert weight.grad.dtype == torch.float32


def test_log_softmax_runs_in_float32_whatever_the_model_is_in() -> None:
    output = Policy(small.language_model().bfloat16())(collate(ROWS[:3]))
    assert output.logprobs.dtype == output.entropy.dtype == torch.float32


@pytest.mark.parametrize("double", [False, True])
def test_a_shared_value_head_starts_at_zero_and_learns_through_the_trunk(double: bool) -> None:
    policy = Policy(small.language_model(), shared_value_head=True)
    policy = policy.double() if double else policy
    batch = collate(ROWS[:4])
    values = policy(batch).values
    assert values.dtype == (torch.float64 if double else torch.float32)
    assert not values.any()
    torch.nn.init.ones_(policy.value_head.weight)
    policy(batch).values[batch.mask].sum().backward()
    assert policy.lm.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


def test_a_saved_policy_is_an_ordinary_model_folder(tmp_path: Path) -> None:
    model, tokenizer = tiny_model(small.SHAPE, 3)
    save_model(model, tokenizer, tmp_path / "model", "# card", {"reward_mean": 1.5})
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(again(ids).logits, model.eval()(ids).logits)
    assert again.config.reward_mean == 1.5
    assert again.generation_config.eos_token_id == tokenizer.eos_token_id
    assert (tmp_path / "model" / "README.md").read_text() == "# card"
    assert not list(tmp_path.glob("*.partial"))
    other = AutoTokenizer.from_pretrained(tmp_path / "model")
    text = "é 2+2=4\n"
    assert other(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert other.decode(other(text)["input_ids"]) == text
    assert (other.eos_token_id, other.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert other.chat_template == tokenizer.chat_template
    assert token_logprobs(Policy(load_policy(tmp_path / "model")), ROWS, 99)[3].logprobs.tolist() == pytest.approx(
        token_logprobs(Policy(model), ROWS, 99)[3].logprobs.tolist()
    )


def test_a_saved_reward_model_scores_alike_in_transformers(tmp_path: Path) -> None:
    scorer = small.scorer()
    save_model(scorer.model, byte_tokenizer(64), tmp_path / "reward", "# card")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward").eval()
    ours = scores(Scorer(load_scorer(tmp_path / "reward")), ROWS, 99)
    with torch.no_grad():
        theirs = [float(again(torch.tensor([t.prompt + t.response])).logits) for t in ROWS]
    assert ours == pytest.approx(theirs, abs=1e-5)
    assert ours == pytest.approx(scores(scorer, ROWS, 99), abs=1e-6)
    # and in a batch that transformers pads by its own pad token
    longest = max(map(len, ROWS))
    padded = torch.tensor([[*t.prompt, *t.response, *[again.config.pad_token_id] * (longest - len(t))] for t in ROWS])
    with torch.no_grad():
        batch = again(padded, attention_mask=(padded != again.config.pad_token_id).long()).logits[:, 0].tolist()
    assert batch == pytest.approx(ours, abs=1e-5)


def test_saving_again_replaces_the_folder_whole(tmp_path: Path) -> None:
    model, tokenizer = tiny_model(small.SHAPE, 0)
    save_model(model, tokenizer, tmp_path / "m", "one")
    (tmp_path / "m" / "stale.txt").write_text("old")
    save_model(tiny_model(small.SHAPE, 1)[0], tokenizer, tmp_path / "m", "two")
    assert not (tmp_path / "m" / "stale.txt").exists()
    assert (tmp_path / "m" / "README.md").read_text() == "two"


def test_loading_switches_dropout_off(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=300, n_positions=32, n_embd=8, n_layer=1, n_head=1, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5
    )
    save_model(GPT2LMHeadModel(config), byte_tokenizer(32), tmp_path / "gpt2", "")
    model = load_policy(tmp_path / "gpt2").train()
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(model(ids).logits, model(ids).logits)


SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MAMBA = {
    "mamba_d_ssm": 32,
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "head_dim": 8,
}


def saved(kind: str, settings: dict[str, Any], folder: Path) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6.0 if parameter.dim() > 1 else 1.0)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("gemma2", SIZES | {"head_dim": 8, "final_logit_softcapping": 2.0}),
        ("cohere", SIZES | {"logit_scale": 0.06}),
        ("granite", SIZES | {"logits_scaling": 8.0}),
        ("falcon_h1", SIZES | MAMBA | {"lm_head_multiplier": 0.3}),
        ("recurrent_gemma", SIZES | {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 16}),
        ("modernbert-decoder", SIZES),
    ],
)
def test_a_model_that_transforms_its_logits_is_refused(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not the plain output of its head"):
        load_policy(saved(kind, settings, tmp_path / "model"))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("gemma3_text", SIZES | {"head_dim": 8}),
        ("granite", SIZES),
        ("opt", SIZES | {"word_embed_proj_dim": 32, "ffn_dim": 48}),
        ("phi", SIZES),  # its head has a bias
        (
            "bloom",
            {"vocab_size": 64, "hidden_size": 32, "n_head": 4, "n_layer": 2},
        ),  # no kernel of PyTorch's attends for it
    ],
)
def test_a_model_whose_logits_are_plain_is_loaded(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    model = load_policy(saved(kind, settings, tmp_path / "model"))
    row = Tokens((3, 4, 5), (6, 7, 2))
    table = model(torch.tensor([row.prompt + row.response])).logits[0].log_softmax(-1)
    expected = [float(table[2 + i, token].detach()) for i, token in enumerate(row.response)]
    assert Policy(model)(collate([row])).logprobs[0].tolist() == pytest.approx(expected, abs=1e-5)


def test_model_folders_that_cannot_be_used_say_why(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no model folder"):
        load_policy(tmp_path / "nothing")
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_policy(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        ModelError, match=r"\(found config.json\), so there is nothing to train; copy the model's \*\.safe"
    ):
        load_policy(tmp_path)
    (tmp_path / "pytorch_model.bin").write_text("pickle")
    with pytest.raises(ModelError, match=r"no safetensors weights \(found config.json, pytorch_model.bin\); convert"):
        load_policy(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "of-tomorrow"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="transformers cannot load this folder"):
        load_policy(tmp_path)


def test_tokenizers_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model, tokenizer = tiny_model(small.SHAPE, 0)
    save_model(model, tokenizer, tmp_path / "m", "")
    assert load_encoder(tmp_path / "m").max_length == small.SHAPE.max_length
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 100}))
    with pytest.raises(ModelError, match=r"the tokenizer has 259 tokens, .* embedding has 100 rows"):
        load_encoder(tmp_path / "m")
    path = tmp_path / "m" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": "x"}))
    with pytest.raises(ModelError, match=r"model_max_length of tokenizer_config\.json is 'x'"):
        load_encoder(tmp_path / "m")
    bare = byte_tokenizer(64)
    bare.eos_token = None
    bare.save_pretrained(tmp_path / "m")
    with pytest.raises(ModelError, match="no eos token"):
        load_tokenizer(tmp_path / "m")


def test_tiny_models_depend_on_their_seed_alone() -> None:
    torch.manual_seed(1)
    first = tiny_model(small.SHAPE, 7)[0].state_dict()
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = tiny_model(small.SHAPE, 7)[0].state_dict()
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())
    assert not torch.equal(first["lm_head.weight"], tiny_model(small.SHAPE, 8)[0].state_dict()["lm_head.weight"])
