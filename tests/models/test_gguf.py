"""A GGUF file becomes a folder with the same model. The files are written here as llama.cpp writes them."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pipelines.base import model_folder
from posttrain.errors import ModelError
from posttrain.models.folders import load_policy
from posttrain.models.gguf import convert, load_gguf_config, main
from posttrain.planning import sizes

TOKENS = ["<unk>", "<s>", "</s>", *(chr(c) for c in range(97, 123)), "ab", "cd"]
HEADS, WIDTH = 2, 32


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS), hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=HEADS,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=False, rms_norm_eps=1e-5,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Return a projection in llama.cpp's order of rotary pairs: neighbours in place of halves."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write(model: LlamaForCausalLM, path: Path, kind: gguf.GGMLQuantizationType) -> Path:
    """Write the model with weights of one kind; norms stay float32."""
    writer, config = gguf.GGUFWriter(path, "llama"), model.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3, *[1] * (len(TOKENS) - 3)])
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    parts = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
             "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
             "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}  # fmt: skip
    for i in range(config.num_hidden_layers):
        names |= {f"model.layers.{i}.{ours}": f"blk.{i}.{theirs}" for ours, theirs in parts.items()}
    for name, value in model.state_dict().items():
        own = name.removesuffix(".weight")
        weight = value
        if own.endswith(("q_proj", "k_proj")):
            weight = interleaved(value, HEADS if own.endswith("q_proj") else 1)
        stored = kind if weight.dim() == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(f"{names[own]}.weight", gguf.quants.quantize(weight.numpy(), stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_full_weights_give_the_same_logits_and_tokens(tmp_path: Path) -> None:
    model, ids = llama(), torch.tensor([[4, 9, 29, 7, 30]])
    convert(write(model, tmp_path / "model.gguf", gguf.GGMLQuantizationType.F32), tmp_path / "folder")
    with torch.no_grad():
        assert torch.allclose(load_policy(tmp_path / "folder")(ids).logits, model(ids).logits, atol=1e-6)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "folder")
    assert tokenizer("abcde", add_special_tokens=False)["input_ids"] == [29, 30, 7]
    assert tokenizer.eos_token == "</s>"
    assert "quantization" not in (tmp_path / "folder" / "config.json").read_text(encoding="utf-8")


def test_quantised_weights_are_those_of_the_file(tmp_path: Path) -> None:
    kind = gguf.GGMLQuantizationType.Q8_0
    model = llama()
    convert(write(model, tmp_path / "model.gguf", kind), tmp_path / "folder")
    weight = model.model.layers[1].mlp.down_proj.weight.detach()
    stored = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), kind), kind))
    found = load_policy(tmp_path / "folder").model.layers[1].mlp.down_proj.weight
    assert torch.equal(found, stored)
    assert 0 < (found - weight).abs().max() < 1e-3


def test_the_base_stage_and_the_plan_take_the_file_itself(tmp_path: Path) -> None:
    model = llama()
    file = write(model, tmp_path / "model.gguf", gguf.GGMLQuantizationType.F32)
    with model_folder(str(file)) as folder:
        assert torch.equal(load_policy(folder).lm_head.weight, model.lm_head.weight)
    assert not Path(folder).exists()
    with model_folder("models/base") as folder:
        assert folder == "models/base"
    assert sizes(load_gguf_config(file)).parameters == sum(p.numel() for p in model.parameters())


def test_what_is_no_gguf_file_is_refused_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "page.gguf").write_text("<html>")
    with pytest.raises(ModelError, match="is not a GGUF file"):
        convert(tmp_path / "page.gguf", tmp_path / "folder")
    (tmp_path / "torn.gguf").write_bytes(
        write(llama(), tmp_path / "m.gguf", gguf.GGMLQuantizationType.F32).read_bytes()[:900]
    )
    with pytest.raises(ModelError, match=r"torn|transformers cannot load"):
        convert(tmp_path / "torn.gguf", tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
    assert main([str(tmp_path / "absent.gguf"), "x"]) == 2
    assert "absent.gguf: no such file" in capsys.readouterr().err
    assert main([]) == 2
