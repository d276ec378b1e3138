"""Models whose weights stay in their files until a module asks for them, so that no process holds a whole model.

Example:
    >>> import tempfile
    >>> from transformers import AutoModelForCausalLM
    >>> from posttrain.models.folders import save_model
    >>> from posttrain.models.tiny import TinyShape, tiny_model
    >>> folder = Path(tempfile.mkdtemp()) / "model"
    >>> made, tokenizer = tiny_model(TinyShape(hidden_size=16, intermediate_size=16, layers=1, heads=2, kv_heads=1), seed=0)
    >>> save_model(made, tokenizer, folder, card="")
    >>> model = deferred_model(AutoModelForCausalLM, made.config, folder)
    >>> is_deferred(model), fill(model), is_deferred(model)
    (True, None, False)
    >>> bool((model.lm_head.weight == made.lm_head.weight).all())
    True
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from posttrain.errors import ModelError
from posttrain.models.checkpointing import without_dropout
from posttrain.models.ties import untied
from posttrain.models.weights import FLOATING, all_finite, weight_files

STORED = "_posttrain_stored"
"""Attribute of a parameter without values: the file and the name under which they are stored."""
CHECKS = "_posttrain_checks"
"""Attribute of a deferred model: checks that need its weights."""


def deferred_model(kind: Any, config: PreTrainedConfig, source: str | Path) -> PreTrainedModel | None:
    """Build a float32 model without weights, with dropout off; `fill` reads them.

    Return None if the folder's weights do not have the model's own names and shapes: `load_whole` converts or refuses those.
    """
    folder = Path(source)
    if not folder.is_dir():
        return None
    stored = _stored(folder)
    # the buffers that no file holds, such as rotary frequencies, are made as usual
    with torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False):
        build = kind.from_config if hasattr(kind, "from_config") else kind._from_config
        model: PreTrainedModel = build(config, dtype=torch.float32).eval()
    parameters = dict(model.named_parameters())
    tied = dict(model.named_parameters(remove_duplicate=False))
    persistent = {name for name in model.state_dict() if name not in tied}
    if persistent or not parameters.keys() <= stored.keys() <= tied.keys():
        return None
    if untied(model):  # built without values they are not shared, and two stored copies would be trained apart
        return None
    for name, parameter in parameters.items():
        path, shape, dtype = stored[name]
        if shape != parameter.shape or dtype not in FLOATING:
            return None
        setattr(parameter, STORED, (path, name))
    without_dropout(model)
    setattr(model, CHECKS, [])
    return model


def is_deferred(module: nn.Module) -> bool:
    """Return True if some weights have not been read yet."""
    return any(parameter.is_meta for parameter in module.parameters())


def fill(module: nn.Module) -> None:
    """Read the weights of `module` that are still in their files; tied weights stay tied.

    Raises:
        ModelError: a weight holds NaN or infinity.
    """
    read: dict[nn.Parameter, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False, remove_duplicate=False)):
            if parameter.is_meta:
                if parameter not in read:
                    read[parameter] = _read(parameter)
                setattr(part, name, read[parameter])


def after_fill(model: PreTrainedModel, check: Callable[[], None]) -> None:
    """Remember a check that needs the weights of a deferred model."""
    getattr(model, CHECKS).append(check)


def run_checks(module: nn.Module) -> None:
    """Run the checks that waited for the weights of the models in `module`, once."""
    for part in module.modules():
        checks: list[Callable[[], None]] = getattr(part, CHECKS, [])
        while checks:
            checks.pop()()


def _read(parameter: nn.Parameter) -> nn.Parameter:
    path, name = getattr(parameter, STORED)
    with safe_open(path, "pt") as weights:
        value = weights.get_tensor(name).to(torch.float32)
    if not all_finite(value):
        raise ModelError(
            f"{Path(path).parent}: {name} holds NaN or infinity, so every output would be NaN; fetch the weights again, or take an"
            " earlier checkpoint"
        )
    return nn.Parameter(value, requires_grad=parameter.requires_grad)


def _stored(folder: Path) -> dict[str, tuple[Path, tuple[int, ...], str]]:
    """Return file, shape and number format of each weight by name, from the files' headers."""
    found = {}
    for path in weight_files(folder):
        with safe_open(path, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118
                part = weights.get_slice(name)
                found[name] = (path, tuple(part.get_shape()), part.get_dtype())
    return found
