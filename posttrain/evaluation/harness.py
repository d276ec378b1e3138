"""Check for the package of the benchmarks without importing it or torch.

Example:
    >>> if find_spec("lm_eval"):
    ...     require_package()
"""

from __future__ import annotations

from importlib.util import find_spec

from posttrain.errors import ConfigError


def require_package() -> None:
    """Raise ConfigError with the command to type if lm-eval is not installed. This imports nothing."""
    if find_spec("lm_eval") is None:
        raise ConfigError(
            "evaluation.benchmarks needs the package lm-eval; install it with: pip install -c constraints.txt '.[benchmarks]'"
        )
