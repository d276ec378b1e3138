"""Exports: read back by transformers and peft, and refused if they give other log-probabilities than what was trained."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from pipelines.commands.export import main
from posttrain.errors import ModelError
from posttrain.models import export, gguf_writing
from posttrain.models.export import export_adapter, export_gguf, export_merged, probe, trained_on
from posttrain.models.folders import load_encoder, load_policy, load_tokenizer, save_model
from posttrain.models.gguf import convert
from posttrain.models.gguf_writing import _splitting, halved, paired
from posttrain.models.lora import Adapter
from posttrain.models.tiny import byte_tokenizer
from posttrain.settings import LoraSettings
from tests.models import moe, small


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer with merges, as GPT-2's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["Tom has twelve apples and finds seven more."] * 4, trainer)
    template = "{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>", chat_template=template
    )


TOKENIZER = merging_tokenizer()
SIZES: dict[str, Any] = {
    "vocab_size": len(TOKENIZER) + 8, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "eos_token_id": TOKENIZER.eos_token_id, "bos_token_id": None,
    "pad_token_id": None,
}  # fmt: skip


def made(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if kind == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=False))
    if kind == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True))
    tied = kind == "tied"
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied, attention_bias=tied))


@pytest.fixture(params=["llama", "tied", "qwen2", "qwen3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    model = made(request.param)
    for parameter in model.parameters():
        # norms of ones and biases of zeros would hide a lost tensor
        parameter.data += 0.2 * torch.randn_like(parameter)
    save_model(model, TOKENIZER, tmp_path / "model", card="# A model")
    return tmp_path / "model"


def test_a_gguf_file_gives_the_trained_log_probabilities(folder: Path, tmp_path: Path) -> None:
    exact = export_gguf(folder, tmp_path / "a.gguf", "f32")
    half = export_gguf(folder, tmp_path / "b.gguf", "f16")
    eighth = export_gguf(folder, tmp_path / "c.gguf", "q8_0")
    assert exact.largest < 1e-4
    assert exact.mean < half.mean < 5e-3
    assert half.mean < eighth.mean < 0.2
    assert (
        (tmp_path / "c.gguf").stat().st_size
        < (tmp_path / "b.gguf").stat().st_size
        < (tmp_path / "a.gguf").stat().st_size
    )


@pytest.mark.parametrize("unused", [0, 8])
def test_a_file_that_this_project_wrote_is_read_back_as_the_same_model(unused: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES | {"vocab_size": len(TOKENIZER) + unused}))
    save_model(model, TOKENIZER, tmp_path / "model", card="# A model")
    export_gguf(tmp_path / "model", tmp_path / "a.gguf", "f32")
    convert(tmp_path / "a.gguf", tmp_path / "back")
    first, second = load_encoder(tmp_path / "model"), load_encoder(tmp_path / "back")
    for text in ("Tom has 12 + 7 = 19 apples, \u4e2d \U0001f642\n", "a<|end|>b<|endoftext|>"):
        assert first.prompt(text) == second.prompt(text)
    assert (first.ends, first.tokenizer.chat_template) == (second.ends, second.tokenizer.chat_template)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(load_policy(tmp_path / "model")(ids).logits, load_policy(tmp_path / "back")(ids).logits)


def test_transformers_reads_the_tokenizer_and_the_template_of_a_file(tmp_path: Path) -> None:
    save_model(made("llama"), TOKENIZER, tmp_path / "model", card="# A model")
    export_gguf(tmp_path / "model", tmp_path / "a.gguf", "f16")
    read = AutoTokenizer.from_pretrained(tmp_path, gguf_file="a.gguf")
    text = "Tom has 12 + 7 = 19 apples, \u00e9\u4e2d\n"
    assert read(text)["input_ids"] == TOKENIZER(text)["input_ids"]
    assert read.eos_token_id == TOKENIZER.eos_token_id
    assert read.chat_template == TOKENIZER.chat_template


@pytest.mark.parametrize("begins", [False, True])
def test_a_file_says_which_tokens_were_added_what_begins_a_text_and_what_ends_an_answer(
    begins: bool, tmp_path: Path
) -> None:
    tokenizer = merging_tokenizer()
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("<|im_end|>", special=True)])
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
    if begins:
        tokenizer.bos_token = "<|im_end|>"
        own = (("<|im_end|>", tokenizer.convert_tokens_to_ids("<|im_end|>")),)
        post = processors.TemplateProcessing(single="<|im_end|> $A", special_tokens=list(own))
        tokenizer.backend_tokenizer.post_processor = post
    save_model(made("llama"), tokenizer, tmp_path / "model", card="# A model")
    export_gguf(tmp_path / "model", tmp_path / "a.gguf", "f32")
    fields = gguf.GGUFReader(tmp_path / "a.gguf").fields
    think, end = tokenizer.convert_tokens_to_ids(["<think>", "<|im_end|>"])
    kinds = fields["tokenizer.ggml.token_type"].contents()
    assert (kinds[think], kinds[end], kinds[5]) == (gguf.TokenType.USER_DEFINED, gguf.TokenType.CONTROL, 1)
    # absent, llama.cpp would decide by the name of the splitting rule
    assert fields["tokenizer.ggml.add_bos_token"].contents() is begins
    assert fields["tokenizer.ggml.eos_token_id"].contents() == tokenizer.eos_token_id
    assert fields["tokenizer.ggml.eot_token_id"].contents() == end
    read = AutoTokenizer.from_pretrained(tmp_path, gguf_file="a.gguf")
    assert read("<think>Tom")["input_ids"] == tokenizer("<think>Tom")["input_ids"]


def test_an_export_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    source = tmp_path / "model"
    save_model(small.language_model(), byte_tokenizer(64), source, card="# Tiny")
    (tmp_path / "notes").touch()
    with pytest.raises(ModelError, match=r"cannot write .*notes/out: .*File exists"):
        export_merged(source, tmp_path / "notes" / "out")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(ModelError, match=r"cannot write .*out: \[Errno 27\] File too large"):
            export_merged(source, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ModelError, match="would hold a copy of itself"):
        export_merged(source, source / "inner")


def test_an_export_with_other_log_probabilities_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(made("llama"), TOKENIZER, tmp_path / "model", card="# A model")
    monkeypatch.setattr(gguf_writing, "paired", lambda weights, heads: weights)
    monkeypatch.setattr(export, "LIMITS", export.LIMITS | {"f16": 1e-5})
    with pytest.raises(
        ModelError, match=r"a\.gguf gives other log-probabilities than the trained model .* so it was removed"
    ):
        export_gguf(tmp_path / "model", tmp_path / "a.gguf", "f16")
    assert not (tmp_path / "a.gguf").exists()


def test_a_tokenizer_without_merges_and_other_architectures_are_refused(tmp_path: Path) -> None:
    save_model(small.language_model(), byte_tokenizer(64), tmp_path / "tiny", card="# Tiny")
    with pytest.raises(ModelError, match="no merges"):
        export_gguf(tmp_path / "tiny", tmp_path / "a.gguf", "f16")
    save_model(moe.language_model(), byte_tokenizer(64), tmp_path / "experts", card="# A mixture")
    with pytest.raises(ModelError, match="type 'qwen3_moe' cannot be written as GGUF here, only llama, qwen2, qwen3"):
        export_gguf(tmp_path / "experts", tmp_path / "a.gguf", "f16")
    assert not (tmp_path / "a.gguf").exists()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (LlamaConfig(**SIZES, hidden_act="gelu"), "with hidden_act 'gelu'"),
        (Qwen3Config(**SIZES, attention_bias=True), "with attention_bias cannot"),
        (Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=0), "window of 8 tokens"),
        (Qwen2Config(**SIZES | {"vocab_size": len(TOKENIZER) - 1}), "they do not match"),
    ],
    ids=["activation", "bias", "window", "vocabulary"],
)
def test_what_a_gguf_file_cannot_hold_is_refused(config: Any, words: str, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match=words):
        export_gguf(tmp_path / "model", tmp_path / "a.gguf", "f32")
    assert not (tmp_path / "a.gguf").exists()


def test_the_rule_of_a_hub_models_file_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "models--own--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    made("qwen2").config.save_pretrained(repository / "snapshots" / ("a" * 40))
    written = counting_tokenizer(pre_tokenizers.ByteLevel(False))
    written.save_pretrained(repository / "snapshots" / ("a" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert load_tokenizer("own/model")("1234 12")["input_ids"] == written("1234 12")["input_ids"]


def counting_tokenizer(rule: Any) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer that has learnt numbers as words, with GPT-2's or a different rule of splitting."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = rule
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=264,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["12 1234"] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", chat_template="{{ messages }}")


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_the_files_rule_of_splitting_is_kept_from_loading_to_saving(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """AutoTokenizer gives the rule of Qwen 2 to every tokenizer of a Qwen 2 model: digits one by one."""
    written, model = counting_tokenizer(pre_tokenizers.ByteLevel(False)), made(kind)
    model.save_pretrained(tmp_path / "model")
    written.save_pretrained(tmp_path / "model")
    folder = tmp_path / "model"
    for again in ("once", "twice"):
        loaded = load_tokenizer(folder)
        for text in ("1234 12", "cafe\u0301"):
            assert loaded(text)["input_ids"] == written(text)["input_ids"]
        assert (loaded.eos_token, loaded.chat_template) == ("<|end|>", "{{ messages }}")
        save_model(model, loaded, tmp_path / again, card="")
        folder = tmp_path / again
    replaced = (
        AutoTokenizer.from_pretrained(tmp_path / "model")("1234 12")["input_ids"] != written("1234 12")["input_ids"]
    )
    said = capsys.readouterr().err
    assert replaced == ("probe texts as other tokens than its tokenizer.json" in said) == (kind == "qwen2")


BYTES = pre_tokenizers.ByteLevel(False)


@pytest.mark.parametrize(
    ("kind", "rule", "digits"),
    [("qwen2", BYTES, False), ("qwen3", BYTES, False), ("llama", pre_tokenizers.Sequence([pre_tokenizers.Digits(True), BYTES]), True)],
)  # fmt: skip
def test_a_gguf_file_is_read_with_the_rule_that_it_names(kind: str, rule: Any, digits: bool, tmp_path: Path) -> None:
    written = counting_tokenizer(pre_tokenizers.ByteLevel(False))
    written.backend_tokenizer.pre_tokenizer = rule
    assert (len(written("1234 12")["input_ids"]) == 7) == digits
    save_model(made(kind), written, tmp_path / "model", card="")
    export_gguf(tmp_path / "model", tmp_path / "a.gguf", "f32")
    convert(tmp_path / "a.gguf", tmp_path / "back")
    assert load_tokenizer(tmp_path / "back")("1234 12")["input_ids"] == written("1234 12")["input_ids"]


def test_a_rule_of_splitting_that_is_not_known_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(made("llama"), TOKENIZER, tmp_path / "model", card="")
    monkeypatch.setattr(gguf_writing, "_splitting", lambda state: "viking")
    export_gguf(tmp_path / "model", tmp_path / "a.gguf", "f32")
    with pytest.raises(ModelError, match=r"llama\.cpp's rule 'viking', which is not known here"):
        convert(tmp_path / "a.gguf", tmp_path / "back")
    backend = counting_tokenizer(pre_tokenizers.ByteLevel(False)).backend_tokenizer
    assert all(gguf_writing.apply_rule(name, backend) for name in ("olmo", "starcoder", "hunyuan", "llama3", "tekken"))


QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@pytest.mark.parametrize(
    ("steps", "whole", "name"),
    [
        ([pre_tokenizers.ByteLevel(False)], False, "gpt-2"),
        ([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)], False, "smollm"),
        ([pre_tokenizers.Split(Regex(QWEN), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)], False, "qwen2"),
        ([pre_tokenizers.Split(Regex(QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")), "isolated"),
          pre_tokenizers.ByteLevel(False, use_regex=False)], True, "llama-bpe"),
        ([pre_tokenizers.Split(Regex(r"\d"), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)], False, None),
        ([pre_tokenizers.Digits(False), pre_tokenizers.ByteLevel(False)], False, None),
        ([pre_tokenizers.ByteLevel(True)], False, None),
        ([pre_tokenizers.ByteLevel(False)], True, None),
    ],
)  # fmt: skip
def test_the_rule_that_splits_texts_is_named_as_llama_cpp_names_it(steps: Any, whole: bool, name: str | None) -> None:
    tokenizer = Tokenizer(models.BPE(ignore_merges=whole))
    tokenizer.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    state = json.loads(tokenizer.to_str())
    if name is None:
        with pytest.raises(ModelError, match=r"llama\.cpp would read other tokens"):
            _splitting(state)
    else:
        assert _splitting(state) == name


def test_pairs_and_halves_of_two_heads() -> None:
    rows = np.arange(8)[:, None]
    assert paired(rows, heads=2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert halved(paired(rows, heads=2), heads=2).tolist() == rows.tolist()


def test_merged_weights_and_the_adapter_alone_are_the_trained_model(tmp_path: Path) -> None:
    base, source = tmp_path / "base", tmp_path / "tuned"
    save_model(small.language_model(), byte_tokenizer(64), base, card="# Base")
    model = load_policy(base)
    adapter = Adapter(model, LoraSettings(rank=2, alpha=4))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter, generator=None)
    adapter.merge()
    save_model(model, byte_tokenizer(64), source, card="# Tuned", adapter=adapter)
    assert float((probe(load_policy(source)) - probe(load_policy(base))).abs().max()) > 0.01
    assert trained_on(source) == str(base)
    assert export_merged(source, tmp_path / "merged").largest == 0.0
    assert not (tmp_path / "merged" / "adapter").exists()
    assert export_adapter(source, base, tmp_path / "adapter").largest < 1e-4
    with pytest.raises(ModelError, match="gives other log-probabilities"):
        # the wrong base: the adapter's own changes cannot make up for it
        export_adapter(source, source, tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()
    with pytest.raises(ModelError, match="has no adapter"):
        export_adapter(base, base, tmp_path / "none")
    with pytest.raises(ModelError, match="exists already"):
        export_merged(source, tmp_path / "merged")


def test_the_command_prints_the_drift_and_refuses_what_has_no_effect(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(made("llama"), TOKENIZER, tmp_path / "model", card="# A model")
    asked = [str(tmp_path / "model"), str(tmp_path / "out.gguf")]
    assert main([*asked, "--form", "gguf", "--precision", "q8_0"]) == 0
    assert "nats a token, at most" in capsys.readouterr().out
    assert main([*asked, "--precision", "f16"]) == 2
    assert "has no effect on --form merged" in capsys.readouterr().err
