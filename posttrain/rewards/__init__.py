"""Rewards behind one interface: functions of prompts and completions, and the reward model.

Example:
    >>> from posttrain.rewards.functions import find_function
    >>> find_function("answer")(["17+4="], ["#21"], answer=["21"])
    [1.0]
"""

from __future__ import annotations

from importlib.util import find_spec

from posttrain.errors import ConfigError

BUILT_IN_NAMES = ("answer", "math", "mentions", "length", "regex", "format")
"""Names that params.yaml may use without an import path, besides `reward_model`; rewards/functions.py defines them."""


WRAPPED_PACKAGES = {
    "reasoning_gym": ("reasoning_gym", "reasoning-gym", "reasoning"),
    "verifiers": ("verifiers", "verifiers", "verifiers"),
    "openenv": ("websockets", "websockets", "openenv"),
}
"""Packages whose tasks are rewards by PACKAGE:NAME, with the module that they need, its name to install, and the extra."""


def require_available(function: str) -> None:
    """Raise ConfigError with the command to type if the function's package is not installed. This imports nothing."""
    if function == "math" and find_spec("math_verify") is None:
        raise ConfigError(
            "the reward function 'math' needs the package math-verify; install it with: pip install -c constraints.txt '.[math]'"
        )
    for package, (module, distribution, extra) in WRAPPED_PACKAGES.items():
        if function.startswith(f"{package}:") and find_spec(module) is None:
            raise ConfigError(
                f"the reward function {function!r} needs the package {distribution}; install it with: pip install -c constraints.txt"
                f" '.[{extra}]'"
            )
    package = function.partition(":")[0].partition(".")[0]
    if ":" in function and find_spec(package) is None:
        raise ConfigError(
            f"the reward function {function!r}: there is no package {package!r}; install it, or move its folder to the project's root"
        )
