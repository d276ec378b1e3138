"""Load, check and write model folders: safetensors weights, configuration and tokenizer as `from_pretrained` reads them."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from posttrain.data.tokens import TextEncoder
from posttrain.errors import ModelError

if TYPE_CHECKING:
    from posttrain.models.lora import Adapter

ADAPTER = "adapter"
"""Subfolder with the adapter of a model that was trained with one, as `PeftModel.from_pretrained` loads it."""
PROBE = (3, 4, 5)
"""Token ids of the forward pass that checks a policy when it is loaded."""


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder or hub id.

    Raises:
        ModelError: it has no end-of-sequence token or no pad token.
    """
    _check_folder(source)
    tokenizer: PreTrainedTokenizerBase = _pretrained(AutoTokenizer, source)
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"{source}: the tokenizer has no eos token, so a response could never end; set eos_token in its configuration"
        )
    if tokenizer.pad_token_id is None:
        raise ModelError(
            f"{source}: the tokenizer has no pad token; set pad_token (it may be the eos token) in its configuration"
        )
    return tokenizer


def load_policy(source: str | Path) -> PreTrainedModel:
    """Load a causal language model in float32 with dropout off.

    Raises:
        ModelError: the folder cannot be used, or the logits are not the plain output of the head.
    """
    model = _load(AutoModelForCausalLM, source)
    _check_logits(model, source)
    return model


def load_scorer(source: str | Path) -> PreTrainedModel:
    """Load a trunk with one scalar head: a reward model, or the start of one if `source` is a language model."""
    return _load(AutoModelForSequenceClassification, source, num_labels=1)


def load_new_scorer(source: str | Path) -> PreTrainedModel:
    """Load the trunk of a language model with a scalar head of zeros: a critic that starts from it gives every state the value 0."""
    model = load_scorer(source)
    torch.nn.init.zeros_(cast(torch.nn.Linear, model.score).weight)
    return model


def load_config(source: str | Path) -> PreTrainedConfig:
    """Load the configuration of a folder or hub id, without its weights."""
    _check_folder(source)
    config: PreTrainedConfig = _pretrained(AutoConfig, source)
    return config


def count_parameters(folder: Path) -> int:
    """Return the number of weights in a folder; only the headers of the files are read."""
    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as weights:
            total += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    return total


def load_encoder(source: str | Path) -> TextEncoder:
    """Load the tokenizer and the model's context length.

    Raises:
        ModelError: the vocabulary does not fit the model's embedding.
    """
    tokenizer = load_tokenizer(source)
    config = json.loads((Path(source) / "config.json").read_text()) if Path(source).is_dir() else {}
    vocabulary = config.get("vocab_size")
    if vocabulary is not None and len(tokenizer) > vocabulary:
        raise ModelError(
            f"{source}: the tokenizer has {len(tokenizer)} tokens, the model's embedding {vocabulary}; they do not match"
        )
    return TextEncoder(tokenizer, int(config.get("max_position_embeddings", tokenizer.model_max_length)))


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    card: str,
    extra_config: dict[str, Any] | None = None,
    adapter: Adapter | None = None,
) -> None:
    """Write weights (safetensors), configuration, tokenizer and README.md; the folder is complete or absent.

    Args:
        adapter: already merged into `model`; its own weights are kept in the subfolder `adapter`.

    Raises:
        ModelError: the disk is full or read-only.
    """
    partial = folder.with_name(folder.name + ".partial")
    _remove(partial)
    for key, value in (extra_config or {}).items():
        setattr(model.config, key, value)
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        if adapter is not None:
            adapter.save(partial / ADAPTER)
        (partial / "README.md").write_text(card, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        _remove(partial)
        raise ModelError(
            f"cannot write the model {folder}: {error}. Free space or give the right to write, then run again."
        ) from error
    _remove(folder)
    os.replace(partial, folder)


@torch.no_grad()
def _check_logits(model: PreTrainedModel, source: str | Path) -> None:
    """Raise ModelError unless the logits are the head's output for the trunk's last hidden states.

    Log-probabilities here are fused with the head. If a model scales, caps or transforms its logits (Gemma 2, Cohere, Granite, Falcon-H1
    and others), it would be trained on other log-probabilities than it samples from.
    """
    ids, head = torch.tensor([PROBE]), model.get_output_embeddings()
    hidden = getattr(model.base_model(input_ids=ids, use_cache=False), "last_hidden_state", None)
    if head is not None and hidden is not None:
        plain = torch.nn.functional.linear(hidden, head.weight, head.bias).log_softmax(-1)
        own = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
        if plain.shape == own.shape and bool((plain - own).abs().max() <= 1e-3):
            return
    raise ModelError(
        f"{source}: the logits of {type(model).__name__} are not the plain output of its head, so training would use"
        " other log-probabilities than sampling does; choose an architecture with plain logits, such as Qwen3 or Llama"
    )


def _load(kind: Any, source: str | Path, **options: Any) -> PreTrainedModel:
    _check_folder(source)
    model: PreTrainedModel = _pretrained(kind, source, dtype=torch.float32, use_safetensors=True, **options)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def _pretrained(kind: Any, source: str | Path, **options: Any) -> Any:
    """Call `from_pretrained`, which never runs code that comes with a model."""
    try:
        return kind.from_pretrained(str(source), trust_remote_code=False, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        if Path(source).is_dir():
            raise ModelError(f"{source}: transformers cannot load this folder ({reason})") from error
        raise ModelError(
            f"{source}: there is no such folder here, and it could not be loaded as a hub id ({reason}). Check the path,"
            " or allow the download with HF_HUB_OFFLINE=0"
        ) from error


def _check_folder(source: str | Path) -> None:
    folder = Path(source)
    if not folder.exists() and (folder.is_absolute() or str(source).startswith((".", "models/"))):
        raise ModelError(f"no model folder at {source}; check the path, or run the stage that writes it")
    if folder.is_dir() and not (folder / "config.json").exists():
        raise ModelError(f"{source}: no config.json, so this is not a model folder")
    if folder.is_dir() and not sorted(folder.glob("*.safetensors")):
        found = ", ".join(sorted(p.name for p in folder.iterdir())) or "nothing"
        raise ModelError(
            f"{source}: no safetensors weights (found {found}); convert them, because pickled weights are not loaded (they can run code)"
        )


def _remove(folder: Path) -> None:
    import shutil

    if folder.exists():
        shutil.rmtree(folder)
