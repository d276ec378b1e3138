"""Prefixes that wrappers such as torch.compile add to the names of weights.

Example:
    >>> named(wrappers(["_orig_mod.lm_head.weight", "_orig_mod.model.norm.weight"]))
    '_orig_mod. (torch.compile)'
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from transformers import PreTrainedModel

from posttrain.errors import ModelError

WRAPPERS = {
    "_orig_mod.": "torch.compile",
    "_fsdp_wrapped_module.": "FSDP",
    "_checkpoint_wrapped_module.": "activation checkpointing",
    "base_model.model.": "peft",
    "module.": "DistributedDataParallel",
}
"""Prefixes that a wrapper adds to the names of weights."""


def wrappers(names: Iterable[str]) -> set[str]:
    """Return the prefixes of wrappers that names of weights have."""
    names = list(names)
    return {prefix for prefix in WRAPPERS if any(n.startswith(prefix) or f".{prefix}" in n for n in names)}


def named(prefixes: Iterable[str]) -> str:
    """Return the prefixes with their wrappers, for a message."""
    return ", ".join(f"{prefix} ({WRAPPERS[prefix]})" for prefix in sorted(prefixes))


def check_spelling(stored: Iterable[str], pattern: str, model: PreTrainedModel, source: str | Path) -> None:
    """Raise ModelError if only some of the weights that are joined into one, such as those of a layer's experts, have a prefix.

    transformers joins them in the order of their names in the file, in which the prefix counts.
    """
    own, spelt = model.state_dict().keys(), dict[str, str]()
    for name in sorted(stored):
        plain = re.sub(pattern, "", name)
        if plain not in own and spelt.setdefault(_unnumbered(plain), _unnumbered(name)) != _unnumbered(name):
            raise ModelError(
                f"{source}: {name} and other weights like it have different prefixes, so transformers would join them in a wrong order."
                " Save the model again with save_pretrained, unwrapped"
            )


def _unnumbered(name: str) -> str:
    """Return a name without the last number in it, which is an expert's."""
    parts = name.split(".")
    last = max((i for i, part in enumerate(parts) if part.isdecimal()), default=-1)
    return ".".join("#" if i == last else part for i, part in enumerate(parts))
