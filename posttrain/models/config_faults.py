"""Name the entries of a model's config.json that no model could have, after transformers has failed to load it.

Example:
    >>> print(_faults({"num_attention_heads": 0, "hidden_size": 64, "rope_scaling": {"rope_type": "linear", "factor": "4"}}))
    ['num_attention_heads is 0 and must be a whole number above 0', "rope_scaling.factor is '4' and must be a number"]
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

_SIZES = re.compile(
    r"(?:num_[a-z_]+|n_(?:head|layer|embd|inner)|[a-z_]*_size|head_dim|d_model|[a-z_]*_layers|[a-z_]*_heads)"
)
_ROPE = ("rope_scaling", "rope_parameters")
_MAY_BE_ZERO = re.compile(
    r"num_(?:nextn|shared|extra|dense)[a-z_]*|[a-z_]*type_vocab_size|num_local_experts|num_experts[a-z_]*"
)
SHOWN = 3


def config_faults(folder: Path) -> str:
    """Return the entries of config.json that cannot be right, for the end of a message; empty if none is known."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return ""
    found = [*_faults(config)] if isinstance(config, Mapping) else []
    return f". In its config.json, {'; '.join(found[:SHOWN])}" if found else ""


def _faults(config: Mapping[str, Any], place: str = "") -> list[str]:
    return [*_sizes(config, place), *_rope(config, place)]


def _sizes(config: Mapping[str, Any], place: str) -> Iterator[str]:
    for name, value in config.items():
        if isinstance(value, Mapping) and name.endswith("_config"):
            yield from _faults(value, f"{place}{name}.")
        whole = isinstance(value, int) and not isinstance(value, bool)
        if (
            value is None
            or not _SIZES.fullmatch(name)
            or _MAY_BE_ZERO.fullmatch(name)
            or isinstance(value, list | Mapping)
        ):
            continue
        if not whole or value <= 0:
            yield f"{place}{name} is {value!r} and must be a whole number above 0"


def _rope(config: Mapping[str, Any], place: str) -> Iterator[str]:
    for name in _ROPE:
        section = config.get(name)
        if section is None:
            continue
        if not isinstance(section, Mapping):
            yield f"{place}{name} is {section!r} and must be a mapping"
            continue
        kind = section.get("rope_type", section.get("type"))
        known = sorted({*ROPE_INIT_FUNCTIONS, "default"})
        if kind is not None and kind not in known:
            yield f"{place}{name}.rope_type is {kind!r}, which transformers does not know ({', '.join(known)})"
        for key, value in section.items():
            numeric = key.endswith(("factor", "theta", "embeddings")) or key.startswith("beta_")
            if numeric and value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                yield f"{place}{name}.{key} is {value!r} and must be a number"
