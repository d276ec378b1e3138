"""Compute the cost of runs in money: their seconds times the price of an hour of their device, from prices.yaml in the project.

    currency: EUR
    hour:
      cpu: 0.08               # the machine without a GPU
      "cuda: NVIDIA H200": 3.20

The file is optional and no part of a result. A device is named as a step records it; MLflow shows it as the tag `device`.

Example:
    >>> prices = Prices("EUR", {"cpu": 3.6})
    >>> prices.of("cpu", 100.0), prices.of("cuda: X", 100.0)
    (0.1, None)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipelines.config.yaml_files import read_yaml
from posttrain.errors import ConfigError

FILE = "prices.yaml"


@dataclass(frozen=True)
class Prices:
    """Price of an hour by device, in one currency."""

    currency: str
    hour: Mapping[str, float]

    def of(self, device: str, seconds: float) -> float | None:
        """Return the money for so many seconds on a device, or None if its price is not listed."""
        return None if device not in self.hour else self.hour[device] * seconds / 3600


def read_prices(project: Path) -> Prices | None:
    """Return the project's prices, or None without the file. Raises ConfigError if it has a different form."""
    path = project / FILE
    if not path.is_file():
        return None
    tree = read_yaml(path)
    hour = tree.get("hour") if isinstance(tree, dict) else None
    valid = isinstance(hour, dict) and all(
        isinstance(price, int | float) and not isinstance(price, bool) and price >= 0 for price in hour.values()
    )
    if not valid or set(tree) != {"currency", "hour"} or not isinstance(tree["currency"], str):
        raise ConfigError(
            f"{FILE}: must have `currency`, such as EUR, and `hour`, which gives the price of an hour by device, e.g. cpu: 0.08"
        )
    assert isinstance(hour, dict)
    return Prices(tree["currency"], {str(device): float(price) for device, price in hour.items()})
