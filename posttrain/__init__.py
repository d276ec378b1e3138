"""Post-training of language models: objectives, trainer, rollouts, rewards, evaluation. Knows only text and tensors.

`import posttrain as pt` imports neither torch nor transformers; they are imported with the first function that needs them.

Example:
    >>> import posttrain as pt
    >>> model = pt.tiny(seed=0, hidden_size=16, intermediate_size=16, layers=1, heads=2, kv_heads=1)
    >>> digits = lambda prompts, completions, **columns: [sum(map(str.isdigit, text)) for text in completions]
    >>> history = pt.train(
    ...     model, "grpo", ["Dial: "], reward=digits, steps=2, learning_rate=0.01, batch_size=2, samples=4, max_new_tokens=8
    ... )
    >>> len(history), history[0]["tokens/sampled"] <= 2 * 4 * 8
    (2, True)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from posttrain.algorithms import PRESETS, choose
    from posttrain.api import Model, load, tiny
    from posttrain.api_training import train
    from posttrain.environments.base import Environment, environment, register
    from posttrain.errors import PosttrainError
    from posttrain.rollouts.turns import Turns

__version__ = "0.2.0"
__all__ = [
    "PRESETS",
    "Environment",
    "Model",
    "PosttrainError",
    "Turns",
    "choose",
    "environment",
    "load",
    "register",
    "tiny",
    "train",
]
_MODULES = {
    "PRESETS": "posttrain.algorithms",
    "choose": "posttrain.algorithms",
    "Model": "posttrain.api",
    "load": "posttrain.api",
    "tiny": "posttrain.api",
    "train": "posttrain.api_training",
    "Environment": "posttrain.environments.base",
    "environment": "posttrain.environments.base",
    "register": "posttrain.environments.base",
    "PosttrainError": "posttrain.errors",
    "Turns": "posttrain.rollouts.turns",
}
"""Where each public name is defined; `__getattr__` imports that module on first use."""


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'posttrain' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
