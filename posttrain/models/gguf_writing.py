"""Write a model as a GGUF file, as llama.cpp reads it: Llama and Qwen models with a byte-level BPE tokenizer.

llama.cpp rotates neighbouring pairs of a head's dimensions, transformers the two halves; so the rows of Llama's query and key matrices are
reordered. Vectors, such as norms, stay in float32.

Example:
    >>> weights = np.arange(8.0).reshape(4, 2)
    >>> paired(weights, heads=1)[:, 0].tolist(), halved(paired(weights, heads=1), heads=1).tolist() == weights.tolist()
    ([0.0, 4.0, 2.0, 6.0], True)
"""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from tokenizers import Regex, Tokenizer, pre_tokenizers
from tqdm import tqdm
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from posttrain.errors import ModelError

if TYPE_CHECKING:
    from posttrain.data.tokens import TextEncoder

Precision = Literal["f32", "f16", "q8_0"]
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_PATTERNS = {"".join(_WORDS): "qwen2", "{1,3}".join(_WORDS): "llama-bpe"}
"""Regular expressions that split a text into words, and llama.cpp's names of them."""
_ALIASES = {
    "gpt-2": "phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert mpt olmo jais trillion granite-docling",
    "smollm": "starcoder refact command-r codeshell exaone minerva-7b",
    "qwen2": "stablelm2 hunyuan deepseek-r1-qwen kormo f2llmv2 megrez",
    "llama-bpe": "llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
}
"""Other names by which llama.cpp (src/llama-vocab.cpp) calls the same rules."""
_RULE_OF = {alias: name for name, aliases in _ALIASES.items() for alias in (name, *aliases.split())}
ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""Types of transformers' configurations; llama.cpp gives them the same names."""


_ROTATED = tuple(f"{name}_proj.{part}" for name in "qk" for part in ("weight", "bias"))


def paired(weights: np.ndarray, heads: int) -> np.ndarray:
    """Reorder rows [heads x size, hidden] from halves of each head to neighbouring pairs."""
    split = weights.reshape(heads, 2, -1, *weights.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(weights.shape)


def halved(weights: np.ndarray, heads: int) -> np.ndarray:
    """Undo `paired`."""
    split = weights.reshape(heads, -1, 2, *weights.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(weights.shape)


def write_gguf(model: PreTrainedModel, encoder: TextEncoder, file: Path, precision: Precision) -> None:
    """Write weights, configuration, tokenizer and the ends of an answer.

    Raises:
        ModelError: the architecture or the tokenizer cannot be written, or the package gguf is missing.
    """
    if find_spec("gguf") is None:
        raise ModelError("writing GGUF files needs the package gguf; type: pip install 'posttrain[gguf]'")
    import gguf

    kind = model.config.model_type
    if kind not in ARCHITECTURES:
        raise ModelError(
            f"a model of type {kind!r} cannot be written as GGUF here, only {', '.join(ARCHITECTURES)}; export a merged folder, and"
            " convert it with llama.cpp's convert_hf_to_gguf.py"
        )
    _require_known_layers(model.config)
    writer = gguf.GGUFWriter(file, kind)
    _write_configuration(writer, model.config)
    _write_tokenizer(writer, encoder.tokenizer, model.config.vocab_size)
    writer.add_add_bos_token(_begins_with_bos(encoder))
    _write_ends(writer, encoder)
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, kind.upper()), model.config.num_hidden_layers)
    target = {
        "f32": gguf.GGMLQuantizationType.F32,
        "f16": gguf.GGMLQuantizationType.F16,
        "q8_0": gguf.GGMLQuantizationType.Q8_0,
    }
    tied = model.config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        written = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if written is None:
            raise ModelError(
                f"the weight {name} has no name in GGUF files of type {kind}; the model cannot be exported"
            )
        weights = tensor.detach().float().cpu().numpy()
        if kind == "llama" and name.endswith(_ROTATED):
            heads = model.config.num_attention_heads if "q_proj" in name else model.config.num_key_value_heads
            weights = paired(weights, heads)
        stored = target[precision] if weights.ndim > 1 else gguf.GGMLQuantizationType.F32
        if stored == gguf.GGMLQuantizationType.Q8_0 and weights.shape[-1] % 32:
            stored = gguf.GGMLQuantizationType.F16  # blocks of 32 numbers do not fit the row
        writer.add_tensor(written, gguf.quants.quantize(weights, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _require_known_layers(config: PreTrainedConfig) -> None:
    """Raise ModelError for settings that a GGUF file does not hold: llama.cpp would compute a different model, and the proof,
    which reads the configuration from the folder, cannot see it."""
    found = []
    if config.hidden_act != "silu":
        found.append(f"hidden_act {config.hidden_act!r} (llama.cpp computes 'silu')")
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        found.append(f"a sliding window of {config.sliding_window} tokens (llama.cpp attends to all)")
    if config.model_type == "qwen3" and config.attention_bias:
        found.append("attention_bias")
    if found:
        raise ModelError(
            f"a model of type {config.model_type!r} with {' and '.join(found)} cannot be written as GGUF: the file has no place for it."
            " Export a merged folder"
        )


def read_setting(file: Path, name: str) -> Any:
    """Return a setting of a GGUF file as an array; None if it has none of this name."""
    import gguf

    field = gguf.GGUFReader(file).fields.get(name)
    return None if field is None else field.parts[-1]


def read_tokens(file: Path) -> list[str]:
    """Return the tokens of a GGUF file in the order of their ids."""
    import gguf

    field = gguf.GGUFReader(file).fields["tokenizer.ggml.tokens"]
    return [bytes(field.parts[i]).decode() for i in field.data]


def _write_configuration(writer: Any, config: PreTrainedConfig) -> None:
    writer.add_name(config.model_type)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_rope_dimension_count(size)
    writer.add_key_length(size)
    writer.add_value_length(size)
    rotary = dict(config.rope_parameters)
    if rotary.get("rope_type", "default") != "default":
        raise ModelError(f"rotary embeddings of type {rotary['rope_type']!r} cannot be written as GGUF here")
    writer.add_rope_freq_base(float(rotary["rope_theta"]))


def _splitting(state: dict[str, Any]) -> str:
    """Return `splitting_rule` of a tokenizer.

    Raises:
        ModelError: llama.cpp would split texts by a different rule, and the model would read other tokens.
    """
    name = splitting_rule(state)
    if name is None or state["model"].get("ignore_merges", False) != (name == "llama-bpe"):
        found = state["pre_tokenizer"]
        kinds = ", ".join(step["type"] for step in found.get("pretokenizers", [found]))
        raise ModelError(
            f"the tokenizer splits texts into words by {kinds}, in a way that is none of those that can be written as GGUF here"
            " (GPT-2's, SmolLM's, Qwen 2's, Llama 3's), so llama.cpp would read other tokens than were trained; export a merged folder, and"
            " convert it with llama.cpp's convert_hf_to_gguf.py"
        )
    return name


def splitting_rule(state: dict[str, Any]) -> str | None:
    """Return llama.cpp's name of the rule by which a tokenizer, given as its JSON, splits a text into words; None if it is not known."""
    found = state.get("pre_tokenizer") or {"type": "none"}
    steps = found.get("pretokenizers", [found])
    kinds, first, last = [step["type"] for step in steps], steps[0], steps[-1]
    if kinds[-1:] != ["ByteLevel"] or last.get("add_prefix_space", True):
        return None
    splits = last.get("use_regex", True)
    if kinds == ["ByteLevel"] and splits:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and first.get("individual_digits") and splits:
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and first.get("behavior") == "Isolated" and not splits:
        return _PATTERNS.get(str(first.get("pattern", {}).get("Regex")))
    return None


def apply_rule(name: str, backend: Tokenizer) -> bool:
    """Make a tokenizer split texts by the rule that llama.cpp calls `name`; return False if the rule is not known."""
    rule = _RULE_OF.get(name, name)
    if rule in ("gpt-2", "smollm"):
        words: Any = pre_tokenizers.ByteLevel(add_prefix_space=False)
        steps = [pre_tokenizers.Digits(individual_digits=True), words]
        backend.pre_tokenizer = pre_tokenizers.Sequence(steps) if rule == "smollm" else words
        return True
    patterns = GGUF_PRE_TOKENIZER_SPLITS | {known: text for text, known in _PATTERNS.items()}
    if rule not in patterns:
        return False
    split = pre_tokenizers.Split(Regex(patterns[rule]), behavior="isolated")
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, whole])
    backend.model.ignore_merges = rule in ("llama-bpe", "tekken")
    return True


def _write_tokenizer(writer: Any, tokenizer: PreTrainedTokenizerBase, size: int) -> None:
    """Write a byte-level BPE tokenizer; ids without a token are filled with unused ones."""
    import gguf

    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = {"model": {"type": "slow"}} if backend is None else json.loads(backend.to_str())
    if state["model"]["type"] != "BPE" or "ByteLevel" not in str(state["pre_tokenizer"]):
        raise ModelError(
            f"a tokenizer of type {state['model']['type']} cannot be written as GGUF here, only byte-level BPE; export a merged folder"
        )
    if not state["model"]["merges"]:
        raise ModelError(
            "the tokenizer has no merges (one token a byte), which llama.cpp cannot read; the built-in tiny model is such a one. Export a"
            " merged folder"
        )
    tokens = {number: token for token, number in tokenizer.get_vocab().items()}
    # no merge makes an added token, so it is found in a text only if the file names it as one
    added = {
        number: gguf.TokenType.CONTROL if token.special else gguf.TokenType.USER_DEFINED
        for number, token in tokenizer.added_tokens_decoder.items()
    }
    types = [gguf.TokenType.UNUSED if i not in tokens else added.get(i, gguf.TokenType.NORMAL) for i in range(size)]
    writer.add_tokenizer_model("gpt2")
    # llama.cpp splits text by a rule that the file names
    writer.add_tokenizer_pre(_splitting(state))
    writer.add_token_list([tokens.get(i, f"[unused{i}]") for i in range(size)])
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(merge) for merge in state["model"]["merges"]])
    for add, number in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if number is not None:
            add(number)
    template: Any = tokenizer.chat_template
    if template:
        several = isinstance(template, dict)
        writer.add_chat_template(
            [{"name": name, "template": text} for name, text in template.items()] if several else template
        )


def _begins_with_bos(encoder: TextEncoder) -> bool:
    """Return True if a prompt begins with the beginning of sequence: without this entry, llama.cpp decides by the splitting rule.

    Raises:
        ModelError: the tokenizer puts other tokens before every text.
    """
    own = encoder.tokenizer("a", add_special_tokens=False)["input_ids"]
    before = encoder.prompt("a")[: -len(own)]
    if before and before != [encoder.tokenizer.bos_token_id]:
        named = " ".join(encoder.tokenizer.convert_ids_to_tokens(before))
        raise ModelError(
            f"the tokenizer puts {named} before every text, and a GGUF file can only ask for the beginning of sequence, so llama.cpp would"
            " read other tokens than were trained; export a merged folder"
        )
    return bool(before)


def _write_ends(writer: Any, encoder: TextEncoder) -> None:
    """Write the tokens that end an answer; a file names up to three."""
    adds = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
    for add, number in zip(adds, encoder.ends, strict=False):
        add(number)
    if left := encoder.ends[len(adds) :]:
        named = " ".join(encoder.tokenizer.convert_ids_to_tokens(list(left)))
        tqdm.write(
            f"a GGUF file names three ends of an answer; llama.cpp does not know that {named} end one", file=sys.stderr
        )
