"""Check which weights a new adapter reaches: names without a layer are refused, and weights that stay as they are are reported.

peft reads the names of some mixtures of experts as those of older checkpoints, in which each expert had linear layers `gate_proj`,
`up_proj` and `down_proj`, and the router was one named `gate`. These names, and all-linear, then mean the weights of experts and
routers. Linear layers with the same names, such as those of shared experts, get no adapter.

Example:
    >>> _short("model.layers.0.mlp.experts.down_proj")
    'mlp.experts.down_proj'
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import Any

from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from posttrain.errors import ModelError
from posttrain.models.plain import adapted_modules, adapted_weight
from posttrain.settings import LoraSettings

SCORE = "score"
"""The scalar head of a reward model or critic; it is trained in full next to the adapter."""


def check_targets(model: PreTrainedModel, settings: LoraSettings, left: set[str]) -> None:
    """Raise ModelError if a name matches no layer, or the rank exceeds those of the layers; report what gets no adapter.

    Args:
        left: the names that peft still looks for in modules; it has read the others as names of experts.
    """
    adapted = {adapted_weight(path, module): module for path, module in adapted_modules(model)}
    tensors = {name: module for name, module in adapted.items() if hasattr(module, "parameter_name")}
    experts = sorted({_short(n) for n, module in tensors.items() if not isinstance(module.get_base_layer(), nn.Linear)})
    wanted = () if isinstance(settings.target_modules, str) else settings.target_modules
    for name in wanted:
        reached = bool(tensors) if name not in left else any(f".{path}".endswith(f".{name}.weight") for path in adapted)
        if not reached:
            known = sorted({path.rpartition(".")[0].rpartition(".")[2] for path in adapted})
            raise ModelError(
                f"lora.target_modules: {name!r} matches no linear layer of {type(model).__name__} that can be adapted, so it would have no"
                f" effect; remove it or correct its name (matched: {', '.join(known)})"
            )
    most = max((min(part.in_features, part.out_features) for part in adapted.values()), default=settings.rank)
    if settings.rank > most:
        raise ModelError(
            f"lora.rank = {settings.rank}: the adapted layers of {type(model).__name__} have at most {most} ranks; set a rank far below"
            f" {most}"
        )
    _report(type(model).__name__, experts, sorted({*_bare(model, adapted)}), sorted({*_same_names(model, settings)}))


def _report(kind: str, experts: list[str], bare: list[str], linear: list[str]) -> None:
    if experts:
        _write(f"LoRA: weights of {kind} that are no linear layers get an adapter, too: {', '.join(experts)}")
    if bare:
        _write(
            f"LoRA: weights of {kind} that are no linear layers get no adapter and stay as they are: {', '.join(bare)}"
        )
    if linear:
        _write(
            f"LoRA: linear layers of {kind} get no adapter and stay as they are, because peft reads their names as those of the experts:"
            f" {', '.join(linear)}"
        )


def _write(line: str) -> None:
    tqdm.write(line, file=sys.stderr)


def _bare(model: PreTrainedModel, adapted: dict[str, Any]) -> Iterator[str]:
    """Yield the short names of matrices inside layers that are neither linear layers nor adapted, such as those of experts."""
    linear = {id(part.weight) for part in model.modules() if isinstance(part, nn.Linear | Conv1D)}
    for name, weight in model.named_parameters():
        name = name.replace("base_layer.", "")
        inside = re.search(r"\.\d+\.", name) and ".lora_" not in name
        if inside and sum(size > 1 for size in weight.shape) > 1 and id(weight) not in linear and name not in adapted:
            yield _short(name)


def _same_names(model: PreTrainedModel, settings: LoraSettings) -> Iterator[str]:
    """Yield the short names of linear layers that the settings name and that have no adapter."""
    heads = (model.get_output_embeddings(), getattr(model, SCORE, None))
    held = {id(part.get_base_layer()) for _, part in adapted_modules(model)}
    named = settings.target_modules
    for name, part in model.named_modules():
        if not isinstance(part, nn.Linear | Conv1D) or part in heads or id(part) in held or ".lora_" in name:
            continue
        wanted = named == "all-linear" if isinstance(named, str) else any(f".{name}".endswith(f".{n}") for n in named)
        if wanted and SCORE not in name.split("."):  # peft wraps a head that is trained whole
            yield _short(f"{name}.weight").removesuffix(".weight")


def _short(name: str) -> str:
    """Return the end of a weight's name, such as mlp.experts.down_proj."""
    return ".".join(part for part in name.split(".")[-3:] if not part.isdecimal())
