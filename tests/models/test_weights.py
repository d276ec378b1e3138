"""A model folder is loaded whole or refused in one paragraph that names the weights."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from pipelines.config.context import context_of
from posttrain.data.batches import collate
from posttrain.data.tokens import Tokens
from posttrain.errors import ModelError
from posttrain.models.checkpointing import recompute_layers
from posttrain.models.folders import (
    count_parameters,
    load_encoder,
    load_policy,
    load_tokenizer,
    save_model,
)
from posttrain.models.inference import scores
from posttrain.models.policy import Policy, Scorer
from posttrain.models.scorers import load_scorer, scoring_pad, start_scorer
from posttrain.models.tiny import byte_tokenizer, tiny_model
from posttrain.models.weights import broken_weights, check_folder
from tests.models import small

CASES = Path(__file__).parents[2] / ".." / "shared" / "cases" / "models"
with_cases = pytest.mark.skipif(not CASES.is_dir(), reason="the small cases are not next to the project")
SIZES = {
    "vocab_size": 259, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model, tokenizer = tiny_model(small.SHAPE, 3)
    save_model(model, tokenizer, tmp_path / "m", "")
    return tmp_path / "m"


def rewrite(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def reconfigure(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model.", "module._orig_mod."])
def test_a_known_prefix_is_stripped_and_reported(folder: Path, prefix: str, capsys: pytest.CaptureFixture[str]) -> None:
    expected = load_policy(folder).state_dict()
    assert "prefix" not in capsys.readouterr().err
    rewrite(folder, lambda weights: {prefix + name: weight for name, weight in weights.items()})
    loaded = load_policy(folder).state_dict()
    assert all(torch.equal(weight, loaded[name]) for name, weight in expected.items())
    assert "read the weights without the prefix" in capsys.readouterr().err
    again = folder.with_name("again")
    save_model(load_policy(folder), byte_tokenizer(64), again, "")
    assert set(load_file(again / "model.safetensors")) == set(expected)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: {n: t for n, t in w.items() if n != "lm_head.weight"}, "lm_head.weight is missing"),
        (lambda w: {n: t for n, t in w.items() if "layers.1" not in n}, r"model\.layers\.1\..* and 7 more are missing"),
        (
            lambda w: {f"strange.{n}": t for n, t in w.items()},
            "are missing; strange.lm_head.weight, .* are not part of it",
        ),
        (lambda w: w | {"model.extra": torch.zeros(2)}, "model.extra is not part of it"),
        (lambda w: w | {f"module.{n}": t + 1 for n, t in w.items()}, r"module\.lm_head\.weight, .* are not part of it"),
        (lambda w: w | {"lm_head.weight": (w["lm_head.weight"] * 9).to(torch.int8)}, "lm_head.weight is stored as I8"),
        (
            lambda w: {n: t.to(torch.float8_e4m3fn) for n, t in w.items()},
            r"stored as F8_E4M3, so the weights are quantised",
        ),
        (
            lambda w: w | {"lm_head.weight": torch.zeros(250, 16)},
            "lm_head.weight 250x16 instead of 259x16 is of a different shape",
        ),
        (
            lambda w: w | {"model.norm.weight": torch.full((16,), float("nan"))},
            "model.norm.weight holds NaN or infinity",
        ),
    ],
)
def test_weights_that_are_not_whole_are_named(folder: Path, change: Any, words: str) -> None:
    rewrite(folder, change)
    with pytest.raises(ModelError, match=words):
        load_policy(folder)


def test_a_prefix_of_some_experts_alone_is_refused(tmp_path: Path) -> None:
    """transformers joins experts in the order of their names in the file, so that these would change places."""
    folder = tmp_path / "m"
    save_model(small.language_model(shape=small.MOE), byte_tokenizer(64), folder, "")
    rewrite(folder, lambda w: {n if "experts.2." in n else f"module.{n}": t for n, t in w.items()})
    with pytest.raises(
        ModelError, match=r"layers\.0\.mlp\.experts\.0\.down_proj\.weight and .* have different prefixes"
    ):
        load_policy(folder)


def test_a_buffer_of_the_files_is_checked_like_a_weight() -> None:
    layer = torch.nn.BatchNorm1d(2)
    layer.register_buffer("mask", torch.tensor([-torch.inf]), persistent=False)
    assert broken_weights(layer) == ""
    layer.running_mean.fill_(torch.nan)  # type: ignore[union-attr, operator]
    assert broken_weights(layer) == "running_mean holds NaN or infinity"


def test_files_that_are_not_whole_say_what_they_are(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(ModelError, match="damaged or cut short"):
        load_policy(folder)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    with pytest.raises(ModelError, match="git lfs pull"):
        load_policy(folder)
    path.unlink()
    path.symlink_to("nowhere")
    with pytest.raises(ModelError, match=r"cannot be read .No such file or directory.; copy the model again"):
        load_policy(folder)
    path.unlink()
    path.write_bytes(whole)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"holds an adapter, .* merge it into its base model"):
        load_policy(folder)
    (folder / "adapter_config.json").unlink()
    for method in ("gptq", "awq", "bitsandbytes", "compressed-tensors"):
        reconfigure(folder, quantization_config={"quant_method": method, "bits": 4})
        with pytest.raises(ModelError, match=f"quantised \\({method}\\)"):
            load_policy(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match="not valid JSON"):
        load_policy(folder)


@with_cases
@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("trunk", "Qwen3Model is a trunk without a language model's head"),
        ("reward_model", "Qwen3ForSequenceClassification is no language model"),
        ("gptq", r"quantised \(gptq\)"),
    ],
)
def test_cases_that_are_refused(case: str, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        load_policy(CASES / case)


@with_cases
def test_cases_of_tokenizers_and_contexts() -> None:
    with pytest.raises(ModelError, match="there is no tokenizer"):
        load_encoder(CASES / "no_tokenizer")
    assert load_encoder(CASES / "gpt2_48").max_length == 48
    assert load_encoder(CASES / "gemma3_composite").max_length == 128


def test_a_context_of_null_is_a_paragraph(folder: Path) -> None:
    reconfigure(folder, max_position_embeddings=None)
    with pytest.raises(ModelError, match=r"max_position_embeddings.*expected int, got NoneType"):
        load_encoder(folder)


def test_a_tokenizer_without_pad_saves_its_end_as_pad(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = byte_tokenizer(64)
    bare.pad_token = None
    bare.save_pretrained(folder)
    assert load_tokenizer(folder).pad_token == "<|im_end|>"
    assert "has no pad token" in capsys.readouterr().err


@with_cases
def test_a_finished_reward_model_is_loaded_whole_or_refused(tmp_path: Path) -> None:
    row = Tokens((5, 6, 7), (8, 2))
    theirs = AutoModelForSequenceClassification.from_pretrained(CASES / "reward_model").eval()
    with torch.no_grad():
        expected = float(theirs(torch.tensor([row.prompt + row.response])).logits)
    assert scores(Scorer(load_scorer(CASES / "reward_model")), [row], 99) == pytest.approx([expected], abs=1e-6)
    shutil.copytree(CASES / "reward_model", tmp_path / "m")
    rewrite(tmp_path / "m", lambda w: {n: t for n, t in w.items() if n != "score.weight"})
    with pytest.raises(ModelError, match=r"score\.weight is missing"):
        load_scorer(tmp_path / "m")
    reconfigure(tmp_path / "m", id2label={"0": "a", "1": "b"}, label2id={"a": 0, "b": 1})
    with pytest.raises(ModelError, match="this one has 2 labels"):
        load_scorer(tmp_path / "m")


@pytest.mark.parametrize("kind", ["qwen3", "olmo3", "gpt2", "opt"])
def test_any_decoder_gets_a_scalar_head_that_is_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    extra = {"word_embed_proj_dim": 32, "ffn_dim": 48} if kind == "opt" else {}
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES | extra))
    save_model(lm, byte_tokenizer(64), tmp_path / "lm", "")
    scorer = start_scorer(tmp_path / "lm")
    row = Tokens((5, 6, 7), (8, 2))
    with torch.no_grad():
        hidden = load_policy(tmp_path / "lm").base_model(torch.tensor([[5, 6, 7, 8, 2]])).last_hidden_state[0, -1]
    expected = [float(hidden @ scorer.score.weight[0].detach())]
    assert scores(Scorer(scorer), [row], 99) == pytest.approx(expected, abs=1e-5)
    save_model(scorer, byte_tokenizer(64), tmp_path / "rm", "")
    assert scores(Scorer(load_scorer(tmp_path / "rm")), [row], 99) == pytest.approx(expected, abs=1e-5)


def test_a_reward_folder_of_pad_equal_eos_scores_alike_in_transformers(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(64)
    tokenizer.pad_token = tokenizer.eos_token
    scorer = small.scorer()
    tokenizer.pad_token = scoring_pad(tokenizer)
    assert tokenizer.pad_token != tokenizer.eos_token
    save_model(scorer.model, tokenizer, tmp_path / "rm", "", {"pad_token_id": tokenizer.pad_token_id})
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm").eval()
    rows = small.rows(6)
    padded = tokenizer.pad({"input_ids": [list(t.prompt + t.response) for t in rows]}, return_tensors="pt")
    with torch.no_grad():
        found = theirs(**{name: padded[name] for name in ("input_ids", "attention_mask")}).logits[:, 0].tolist()
    assert found == pytest.approx(scores(scorer, rows, 999), abs=1e-5)


@pytest.mark.parametrize("kind", ["opt", "biogpt", "xglm"])
def test_recomputed_layers_have_no_dropout(kind: str) -> None:
    """Functional dropout reads a number of its layer, and recomputed layers are in training mode."""
    rate = {"dropout": 0.5, "attention_dropout": 0.5, "activation_dropout": 0.5, "hidden_dropout_prob": 0.5}
    names = {
        "opt": {"word_embed_proj_dim": 32, "ffn_dim": 48},
        "xglm": {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48},
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES | rate | names.get(kind, {}))).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = model(ids).logits
        recompute_layers(model)
        assert torch.equal(model.train()(ids).logits, expected)


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({"weight_map": {"a": "pytorch_model.bin"}}, r"names 'pytorch_model\.bin' as a file of weights"),
        ({"weight_map": {"a": "../model.safetensors"}}, r"names '\.\./model\.safetensors' as a file of weights"),
        ({"weight_map": {"a": "model-2.safetensors"}}, r"names 'model-2\.safetensors', and there is no such file"),
        ({"weights": {}}, "not an index of weight files"),
        ([], "not an index of weight files"),
    ],
)
def test_an_index_may_name_only_safetensors_files_of_its_folder(tmp_path: Path, index: object, words: str) -> None:
    model, tokenizer = tiny_model(small.SHAPE, 3)
    save_model(model, tokenizer, tmp_path / "model", card="")
    check_folder(tmp_path / "model")
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"pickle")
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=words):
        load_policy(tmp_path / "model")


def test_the_way_a_tokenizer_was_loaded_is_not_saved(tmp_path: Path) -> None:
    """With HF_HUB_OFFLINE transformers puts local_files_only into the configuration that it saves."""
    model, tokenizer = tiny_model(small.SHAPE, 3)
    save_model(model, tokenizer, tmp_path / "online", card="")
    tokenizer.init_kwargs["local_files_only"] = True
    save_model(model, tokenizer, tmp_path / "offline", card="")
    saved = (tmp_path / "offline" / "tokenizer_config.json").read_bytes()
    assert saved == (tmp_path / "online" / "tokenizer_config.json").read_bytes()
    assert b"local_files_only" not in saved


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", r"generation_config\.json: is not valid JSON"),
        ('{"eos_token_id": {"a": 1}}', "eos_token_id is {'a': 1}, and must be"),
        ('{"eos_token_id": "</s>"}', "eos_token_id is '</s>', and must be the id of a token"),
        ('{"eos_token_id": [[1], 2]}', "must be the id of a token, or a list of ids"),
    ],
)
def test_damaged_generation_settings_are_not_passed_over(folder: Path, text: str, words: str) -> None:
    (folder / "generation_config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ModelError, match=words):
        load_encoder(folder)


def test_with_longrope_the_original_context_is_the_limit(tmp_path: Path) -> None:
    rope = {
        "rope_type": "longrope",
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 40,
    }
    config = AutoConfig.for_model(
        "qwen3", **SIZES, head_dim=8, rope_parameters=rope | {"factor": 1.6, "rope_theta": 10000.0}
    )
    torch.manual_seed(0)
    save_model(AutoModelForCausalLM.from_config(config), byte_tokenizer(64), tmp_path / "m", "")
    lm = load_policy(tmp_path / "m")
    assert load_encoder(tmp_path / "m").max_length == context_of(str(tmp_path / "m")) == 40
    long, short = Tokens(tuple(range(5, 35)), tuple(range(40, 50))), Tokens((5, 6), (7, 8))
    with torch.no_grad():
        together, alone = (Policy(lm)(collate(rows)).logprobs for rows in ([long, short], [short]))
    assert together[1, :2].tolist() == pytest.approx(alone[0].tolist(), abs=1e-5)


@pytest.mark.parametrize(
    "change", [{"return_dict": False}, {"output_attentions": True}, {"output_hidden_states": True}]
)
def test_the_form_of_outputs_changes_no_value_and_can_be_saved(
    folder: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    ids = torch.tensor([[5, 6, 7]])
    expected = load_policy(folder)(ids).logits
    reconfigure(folder, **change)
    model = load_policy(folder)
    assert torch.equal(model(ids).logits, expected)
    save_model(model, load_tokenizer(folder), tmp_path / "again", "")
    assert torch.equal(load_policy(tmp_path / "again")(ids).logits, expected)


def test_files_that_cannot_be_read_are_named(folder: Path) -> None:
    good = (folder / "tokenizer.json").read_bytes()
    (folder / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ModelError, match=r"tokenizer.json: a git-lfs pointer instead of the file; type: git lfs pull"):
        load_tokenizer(folder)
    (folder / "tokenizer.json").write_bytes(good)
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text('{"a":' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(ModelError, match=r"config.json is not valid JSON"):
        check_folder(folder)
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    with pytest.raises(ModelError, match=r"config.json cannot be read \(Is a directory\)"):
        check_folder(folder)
    (folder / "config.json").rmdir()
    (folder / "config.json").write_text(text)
    check_folder(folder)


def test_two_sets_of_weights_in_one_folder_are_refused(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(weights, folder / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        ModelError,
        match=r"holds two sets of weights: model.safetensors, and the files that model.safetensors.index.json",
    ):
        load_policy(folder)
    expected = count_parameters(folder)
    (folder / "model.safetensors").unlink()
    assert count_parameters(folder) == expected == sum(p.numel() for p in load_policy(folder).parameters())
    name = min(weights)
    save_file({name: weights[name]}, folder / "model-00002-of-00002.safetensors", metadata={"format": "pt"})
    index["weight_map"] |= {name: "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    check_folder(folder)  # the same values twice
    save_file({name: weights[name] + 1}, folder / "model-00002-of-00002.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=rf"-00001-of-.* and .*-00002-of-.* hold different values of {re.escape(name)}"
    ):
        load_policy(folder)


def test_generation_settings_that_distort_sampling_are_reported(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"repetition_penalty": 1.5, "suppress_tokens": [5]}))
    assert load_encoder(folder).ends == (2,)
    assert "asks for repetition_penalty 1.5, suppress_tokens [5]. Answers here are sampled" in capsys.readouterr().err
    path.write_text(json.dumps({"eos_token_id": [True]}))
    with pytest.raises(ModelError, match=r"eos_token_id is \[True\], and must be the id of a token"):
        load_encoder(folder)


def test_a_tokenizer_that_changes_texts_is_reported(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load_encoder(folder)
    assert "changes texts" not in capsys.readouterr().err
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"normalizer": {"type": "Lowercase"}}))
    load_encoder(folder)
    assert r"changes texts: 'It is 5 ,\n\n  so B.' becomes 'it is 5 ,\n\n  so b.'" in capsys.readouterr().err
