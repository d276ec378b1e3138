"""Compute what runs cost in money and CO2, from prices.yaml in the project.

    currency: EUR
    hour:                     # price of an hour by device; optional
      cpu: 0.08               # the machine without a GPU
      "cuda: NVIDIA H200": 3.20
    grams_per_kwh: 380        # CO2 of a kilowatt-hour where the machine is; optional
    watts: {"cuda: NVIDIA H200": 700}    # power of a device whose energy is not measured; optional
    judge_tokens:             # price of a million tokens of questions and of replies, by the judge's model; optional
      referee: {input: 0.50, output: 2.00}

The file is optional and no part of a result. A device is named as a step records it; MLflow shows it as the tag `device`.

Example:
    >>> prices = Prices("EUR", {"cpu": 3.6}, grams_per_kwh=400.0, watts={"gpu": 700.0})
    >>> prices.of("cpu", 100.0), prices.of("cuda: X", 100.0)
    (0.1, None)
    >>> prices.grams("cpu", 100.0, joules=9e6), prices.grams("gpu", 3600.0, joules=None), prices.grams("cpu", 1.0, joules=None)
    (1000.0, 280.0, None)
    >>> judged = Prices("EUR", {}, judge_tokens={"referee": (0.5, 2.0)})
    >>> judged.of_judges({"referee": (1_000_000, 250_000)}), judged.of_judges({"other": (1, 1)}), judged.of_judges({})
    (1.0, None, 0.0)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.config.yaml_files import read_yaml
from posttrain.errors import ConfigError

FILE = "prices.yaml"
_JOULES_PER_KWH = 3.6e6

Tokens = Mapping[str, tuple[int, int]]
"""Tokens of questions and of replies that were paid for, by the judge's model."""


@dataclass(frozen=True)
class Prices:
    """Price of an hour and power by device, grams of CO2 per kWh (None: unknown), and prices of a million tokens by judge."""

    currency: str
    hour: Mapping[str, float]
    grams_per_kwh: float | None = None
    watts: Mapping[str, float] = field(default_factory=dict)
    judge_tokens: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def of(self, device: str, seconds: float) -> float | None:
        """Return the money for so many seconds on a device, or None if its price is not listed."""
        return None if device not in self.hour else self.hour[device] * seconds / 3600

    def of_judges(self, tokens: Tokens) -> float | None:
        """Return the money for the judges' tokens, or None if the price of one of the judges is not listed."""
        if not tokens.keys() <= self.judge_tokens.keys():
            return None
        prices = {name: self.judge_tokens[name] for name in tokens}
        return (
            sum(count * price for name in tokens for count, price in zip(tokens[name], prices[name], strict=True)) / 1e6
        )

    def total(self, device: str, seconds: float, tokens: Tokens) -> float | None:
        """Return the money of a run: of its device and of its judges. None if either is unknown."""
        parts = (self.of(device, seconds), self.of_judges(tokens))
        return None if parts[0] is None or parts[1] is None else parts[0] + parts[1]

    def grams(self, device: str, seconds: float, joules: float | None) -> float | None:
        """Return the grams of CO2 of a run, or None if its energy or the grid's factor is unknown.

        The stated power of a device counts before the measured `joules`.
        """
        energy = self.watts[device] * seconds if device in self.watts else joules
        return None if energy is None or self.grams_per_kwh is None else energy / _JOULES_PER_KWH * self.grams_per_kwh


def judge_tokens(records: Sequence[Mapping[str, Any]]) -> dict[str, tuple[int, int]]:
    """Return the tokens that judges were paid for in a run, from its measurements."""
    found: dict[str, tuple[int, int]] = {}
    for record in records:
        if record["kind"] == "judge":
            asked, replied = found.get(record["model"], (0, 0))
            found[record["model"]] = (asked + record["prompt_tokens"], replied + record["completion_tokens"])
    return found


def read_prices(project: Path) -> Prices | None:
    """Return the project's prices, or None without the file. Raises ConfigError if it has a different form."""
    path = project / FILE
    if not path.is_file():
        return None
    tree = read_yaml(path)
    known = {"currency", "hour", "grams_per_kwh", "watts", "judge_tokens"}
    valid = isinstance(tree, dict) and {"currency"} <= set(tree) <= known and isinstance(tree["currency"], str)
    if (
        not valid
        or not (_numbers(tree.get("hour", {})) and _numbers(tree.get("watts", {})))
        or not (_factor(tree) and _judges(tree))
    ):
        raise ConfigError(
            f"{FILE}: must have `currency`, such as EUR. It may have `hour`, which gives the price of an hour by device, e.g. cpu: 0.08,"
            " `grams_per_kwh`, the CO2 of the grid, e.g. 380, `watts`, the power by device, and `judge_tokens`,"
            " the prices of a million tokens by a judge's model, e.g. referee: {input: 0.5, output: 2.0}. Numbers must not be negative."
        )
    factor = tree.get("grams_per_kwh")
    return Prices(
        tree["currency"],
        {str(device): float(price) for device, price in tree.get("hour", {}).items()},
        None if factor is None else float(factor),
        {str(device): float(power) for device, power in tree.get("watts", {}).items()},
        {str(name): (float(of["input"]), float(of["output"])) for name, of in tree.get("judge_tokens", {}).items()},
    )


def _judges(tree: Mapping[str, Any]) -> bool:
    """Return True if each judge has both of its prices, or none is listed."""
    listed = tree.get("judge_tokens", {})
    return isinstance(listed, dict) and all(
        _numbers(prices) and prices.keys() == {"input", "output"} for prices in listed.values()
    )


def _factor(tree: Mapping[str, Any]) -> bool:
    """Return True if the grid's factor is a number or absent."""
    return _numbers({"": tree.get("grams_per_kwh", 0)})


def _numbers(given: Any) -> bool:
    """Return True for a mapping to numbers that are not negative."""
    return isinstance(given, dict) and all(
        isinstance(number, int | float) and not isinstance(number, bool) and number >= 0 for number in given.values()
    )
