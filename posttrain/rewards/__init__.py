"""Rewards: functions of prompts and completions, and the reward model, behind one interface."""

from __future__ import annotations

from importlib.util import find_spec

from posttrain.errors import ConfigError

BUILT_IN_NAMES = ("answer", "math", "mentions", "length", "regex", "format")
"""What params.yaml may name without an import path, besides `reward_model`; the functions are in rewards/functions.py."""


def require_available(function: str) -> None:
    """Raises ConfigError, saying what to type, where the function's package is not installed. Imports nothing."""
    if function == "math" and find_spec("math_verify") is None:
        raise ConfigError(
            "the reward function 'math' needs the package math-verify; install it with: pip install -c constraints.txt '.[math]'"
        )
    package = function.partition(":")[0].partition(".")[0]
    if ":" in function and find_spec(package) is None:
        raise ConfigError(
            f"the reward function {function!r}: there is no package {package!r}; install it, or put its folder in the project's root"
        )
