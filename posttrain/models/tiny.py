"""A tiny Qwen3 (or Qwen3-MoE) with a byte tokenizer, built from a seed; nothing is downloaded.

Example:
    >>> model, tokenizer = tiny_model(TinyShape(hidden_size=16, intermediate_size=16, layers=1, heads=2, kv_heads=1), seed=0)
    >>> len(tokenizer), len(tokenizer("héy")["input_ids"]), model.config.num_hidden_layers
    (259, 4, 1)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3MoeConfig,
)

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class TinyShape:
    """Sizes of a tiny model; it is a mixture of experts if `experts` is above 0."""

    hidden_size: int = 128
    intermediate_size: int = 256
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    max_length: int = 256
    experts: int = 0
    experts_per_token: int = 2


def byte_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per UTF-8 byte: no text is out of vocabulary. Pad and end-of-sequence are different tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate([PAD, START, END, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[START],
        model_max_length=max_length,
        chat_template=CHAT_TEMPLATE,
    )


def tiny_config(shape: TinyShape) -> PreTrainedConfig:
    """Return the configuration of a model with untied embeddings over the byte vocabulary."""
    tokenizer = byte_tokenizer(shape.max_length)
    common: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.hidden_size // shape.heads,
        "max_position_embeddings": shape.max_length,
        "tie_word_embeddings": False,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    if not shape.experts:
        return Qwen3Config(**common)
    moe: dict[str, Any] = {
        "num_experts": shape.experts,
        "num_experts_per_tok": shape.experts_per_token,
        "norm_topk_prob": True,
    }
    return Qwen3MoeConfig(**common, **moe, moe_intermediate_size=shape.intermediate_size)


def tiny_model(shape: TinyShape, seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Return model and tokenizer; the weights depend only on the seed."""
    tokenizer = byte_tokenizer(shape.max_length)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(tiny_config(shape))
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True, temperature=1.0
    )
    return model, tokenizer
