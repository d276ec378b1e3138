"""The folder that servers load: the policy's weights at one version, complete or absent."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from posttrain.errors import RolloutError
from posttrain.files import replace
from posttrain.models.plain import head_name


def write_weights(lm: PreTrainedModel, state: Mapping[str, Tensor], folder: Path) -> None:
    """Write `state`, the result of `plain_state`, and the model's configuration.

    An output head that is tied to the input embeddings is written as a separate weight, and the configuration sets it untied: vLLM (0.32)
    stores the head of a tied model in a different layout, and `reload_weights` does not renew that copy.

    Raises:
        RolloutError: the disk is full or read-only.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from posttrain.models.plain import plain_state
        >>> from posttrain.models.tiny import TinyShape, tiny_model
        >>> lm, _ = tiny_model(TinyShape(hidden_size=16, intermediate_size=16, layers=1, heads=2, kv_heads=1), seed=0)
        >>> with TemporaryDirectory() as root:
        ...     folder = Path(root, "weights-1")
        ...     write_weights(lm, plain_state(lm, lm.dtype), folder)
        ...     sorted(path.name for path in folder.iterdir())
        ['config.json', 'generation_config.json', 'model.safetensors']
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    weights, head = dict(state), head_name(lm)
    # save_pretrained leaves out weights that share memory, so the head must be a clone
    weights[head] = weights[head].clone()
    try:
        lm.save_pretrained(partial, state_dict=weights, max_shard_size="1000TB")
        _untie(partial / "config.json")
        replace(partial, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise RolloutError(
            f"cannot write the weights for the vLLM server to {folder}: {error}. Free space or give the right to write"
            " there, then run again."
        ) from error


def write_config(lm: PreTrainedModel, folder: Path) -> None:
    """Write the configuration only, for a server that starts with arbitrary weights.

    Raises:
        RolloutError: the disk is full or read-only.
    """
    try:
        lm.config.save_pretrained(folder)
        # a model's save_pretrained adds its class, without which vLLM serves embeddings
        _untie(folder / "config.json", architectures=[type(lm).__name__], dtype=str(lm.dtype).removeprefix("torch."))
    except OSError as error:
        raise RolloutError(f"cannot write the configuration for the vLLM server to {folder}: {error}") from error


def _untie(config: Path, **more: Any) -> None:
    values = json.loads(config.read_text(encoding="utf-8")) | more | {"tie_word_embeddings": False}
    config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
