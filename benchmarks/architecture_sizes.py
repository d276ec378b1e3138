"""Settings that make any causal architecture of transformers tiny: small numbers under every name that configurations use."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import AutoConfig

SIZES: dict[str, Any] = {
    "vocab_size": 272, "hidden_size": 32, "n_embd": 32, "d_model": 32, "dim": 32, "embedding_size": 32, "word_embed_proj_dim": 32,
    "lm_head_dim": 32, "intermediate_size": 48, "n_inner": 48, "ffn_dim": 48, "d_ff": 48, "ffn_hidden_size": 48, "dff": 48,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "decoder_layers": 2, "encoder_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rotary_dim": 4,
    "decoder_ffn_dim": 48, "encoder_ffn_dim": 48, "max_position_embeddings": 128, "n_positions": 128, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
    # mixtures of experts
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1,
    # latent attention, indexers, linear attention, state spaces
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "index_n_heads": 2,
    "index_head_dim": 8, "index_topk": 8, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "state_size": 8, "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_expand": 2,
    "mamba_n_groups": 1,
    # windows that a row of the comparison exceeds
    "chunk_size": 8, "mamba_chunk_size": 8, "sliding_window": 8, "window_size": 8, "attention_window_size": 8,
    "layer_types": None, "is_decoder": True,
    # rates above 0: they must have no effect
    "dropout": 0.1, "attention_dropout": 0.1, "activation_dropout": 0.1, "hidden_dropout_prob": 0.1, "attn_pdrop": 0.1,
    "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attention_probs_dropout_prob": 0.1, "hidden_dropout": 0.1,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "bamba": {"num_hidden_layers": 3, "attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "mamba_n_heads": 8, "mamba_d_head": 8},
    "bailing_hybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_5_moe_text": {"layer_types": ["linear_attention", "full_attention"]},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "recurrent_gemma": {
        "num_hidden_layers": 3,
        "lru_width": 32,
        "block_types": ["recurrent", "recurrent", "attention"],
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "lsh"], "num_buckets": 4, "feed_forward_size": 48},
    "gemma3": {
        "text_config": {
            "vocab_size": 272,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "sliding_window": 8,
            "max_position_embeddings": 128,
        },
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        "mm_tokens_per_image": 4,
    },
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
}
"""Settings of architectures that need more than a small size."""
WITHOUT = {"layer_types", "attention_dropout"}
"""Settings that some architectures refuse; they are tried without them."""


def tiny_settings(kind: str) -> Iterator[dict[str, Any]]:
    """Yield settings for a tiny model of this architecture: those of `SIZES` that its configuration has, and its own."""
    config = AutoConfig.for_model(kind)
    names = set(config.to_dict()) | set(getattr(type(config), "attribute_map", {}) or {})
    common = {name: value for name, value in SIZES.items() if name in names}
    if "qk_rope_head_dim" in names:  # latent attention has a key for every head
        common["num_key_value_heads"] = 4
    for less in (set(), {"layer_types"}, {"attention_dropout"}, WITHOUT):
        yield {name: value for name, value in common.items() if name not in less} | OWN.get(kind, {})
