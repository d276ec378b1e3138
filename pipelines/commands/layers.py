"""Names of a model's linear layers, read from the headers of its files without loading it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from pipelines.config.params import Params
from pipelines.config.schema import LoraParams, TinyParams

HEADS = ("lm_head", "embed_out", "embed_tokens", "embed_in", "wte", "word_embeddings")
"""Last names of heads and embeddings, which cannot have an adapter: log-probabilities are fused with the head's own weight."""
_TINY = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Layers of the tiny model; its experts are no linear layers."""
LARGEST_HEADER = 100 * 2**20


def adapters(params: Params) -> Mapping[str, LoraParams]:
    """Return the adapters that are trained on the model, by their parameter."""
    found = {"sft.lora": params.sft.lora, "align.lora": params.align.lora}
    if params.reward.enabled and params.reward.source is None:
        found["reward.lora"] = params.reward.lora
    return {key: lora for key, lora in found.items() if lora is not None}


def weight_names(params: Params) -> list[str]:
    """Return the paths of the layers of `model.source`; empty if it is no folder of safetensors files here."""
    return sorted(weight_shapes(params))


def weight_shapes(params: Params) -> dict[str, tuple[int, int]]:
    """Return the shape (outputs, inputs) of each layer of `model.source` by its path; empty as for `weight_names`."""
    if params.model.source == "tiny":
        return _tiny_shapes(params.model.tiny) if not params.model.tiny.experts else {}
    return {
        name.removesuffix(".weight"): (entry["shape"][0], entry["shape"][1])  # type: ignore[index]
        for name, entry in folder_tensors(Path(params.model.source)).items()
        if _is_matrix(name, entry)
    }


def folder_tensors(folder: Path) -> dict[str, object]:
    """Return the entries of the headers of a folder's safetensors files by the tensors' names."""
    found: dict[str, object] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= _header(path)
    return found


def _tiny_shapes(shape: TinyParams) -> dict[str, tuple[int, int]]:
    hidden, inner = shape.hidden_size, shape.intermediate_size
    keys = hidden // shape.heads * shape.kv_heads
    outputs = dict(zip(_TINY, (hidden, keys, keys, hidden, inner, inner, hidden), strict=True))
    return {name: (size, inner if name == "down_proj" else hidden) for name, size in outputs.items()}


def _is_matrix(name: str, entry: object) -> bool:
    """Return True for the weight of a linear layer; those of norms are vectors, those of experts often have three dimensions."""
    shape = entry.get("shape") if isinstance(entry, Mapping) else None
    return name.endswith(".weight") and isinstance(shape, list) and len(shape) == 2


def _header(path: Path) -> Mapping[str, object]:
    """Return the header of a safetensors file; empty if it has none, which loading the model reports."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > LARGEST_HEADER:
            return {}
        try:
            found = json.loads(file.read(size))
        except ValueError:
            return {}
    return found if isinstance(found, dict) else {}
