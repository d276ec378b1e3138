"""Optional packages: each is asked for by one setting, and its absence is one sentence with the command to type.

Example:
    >>> require_extra("torch", "optimizer.moment_bits = 8", "low-bit")
    >>> try:
    ...     require_extra("no_such_package", "optimizer.moment_bits = 8", "low-bit")
    ... except ConfigError as error:
    ...     print(str(error).partition(";")[0])
    optimizer.moment_bits = 8 needs the package no_such_package
"""

from __future__ import annotations

from importlib.util import find_spec

from posttrain.errors import ConfigError


def require_extra(package: str, setting: str, extra: str) -> None:
    """Raise ConfigError with the command to type if `package` is not installed. This imports nothing."""
    if find_spec(package) is None:
        raise ConfigError(
            f"{setting} needs the package {package}; install it with: pip install -c constraints.txt '.[{extra}]'"
        )
