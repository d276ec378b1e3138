"""Compare only algorithms with the same protocol: the same start, training signal, prompts and tuning, and an equal budget in one currency.

Algorithms with equal protocols form a panel. The headline ranks the largest panel; the report marks the cells of the others that
differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pipelines.config.effective import spec_of, under
from pipelines.report.load import Results, Training
from posttrain.algorithms import OnPolicy
from posttrain.errors import ConfigError

Currency = Literal["tokens_sampled", "tokens_trained", "optimiser_steps", "wall_time"]
CURRENCIES: Mapping[Currency, str] = {
    "tokens_sampled": "tokens sampled",
    "tokens_trained": "tokens trained on",
    "optimiser_steps": "optimiser steps",
    "wall_time": "wall time",
}
"""`wall_time` is in seconds on the machine that trained; the others are counted in the journals."""
PROBLEMS, PREFERENCES = "data/valid/problems.parquet", "data/valid/preferences.parquet"
TOLERANCE = 0.1
"""Budgets that differ by at most this share count as equal: answers of one number of tokens do not exist."""
PAIRS, UNKNOWN, AS_GIVEN = "logged pairs", "not recorded", "as given"


@dataclass(frozen=True)
class Protocol:
    """The training signal of an algorithm, its start, how it was tuned, and its budget in the currency of the comparison."""

    signal: str
    """The rewards with a weight, or logged pairs."""
    start: str
    """Folder of the model that training starts from."""
    digest: str
    """sha256 of that model; empty if it was not recorded."""
    tuned: str
    """How the algorithm's values were found."""
    spent: float | None
    """None if the algorithm spends nothing in this currency, or it was not measured on this machine."""
    prompts: str = ""
    """sha256 of the table whose prompts it trained on; empty if it was not recorded."""

    def differs(self, other: Protocol, currency: Currency) -> list[str]:
        """Return the cells in which this protocol differs from `other`, in words."""
        found = [] if self.signal == other.signal else [f"trained on {self.signal}"]
        if (self.start, self.digest) != (other.start, other.digest):
            found.append(f"started from {self.start}" if self.start != other.start else "a different starting model")
        if self.signal == other.signal and self.prompts != other.prompts:
            found.append("different training prompts")
        found += [] if self.tuned == other.tuned else [f"tuned: {self.tuned}"]
        if found or self.same_budget(other):
            return found
        if not self.spent or not other.spent:
            if currency == "wall_time":
                return ["not timed on this machine" if not self.spent else "timed on this machine"]
            return [f"no {CURRENCIES[currency]}" if not self.spent else f"has {CURRENCIES[currency]}"]
        return [f"{self.spent / other.spent:.2g} times the {CURRENCIES[currency]}"]

    def same_budget(self, other: Protocol) -> bool:
        """Return True if both budgets are equal up to the tolerance."""
        if self.spent is None or other.spent is None:
            return self.spent == other.spent
        return abs(self.spent - other.spent) <= TOLERANCE * max(self.spent, other.spent)


def protocols(results: Results, spent: Mapping[str, float | None]) -> dict[str, Protocol]:
    """Return the protocol of each algorithm, from its first seed; `spent` is the mean over seeds in the currency."""
    runs = {name: results.of(name)[0].training for name in results.algorithms}
    return {
        name: Protocol(
            _signal(name, run),
            _start(name, run),
            run.inputs.get(_start(name, run), ""),
            str(run.params.get(f"algorithms.{name}.tuned") or AS_GIVEN),
            spent.get(name),
            run.inputs.get(PREFERENCES if _signal(name, run) == PAIRS else PROBLEMS, ""),
        )
        for name, run in runs.items()
        if run is not None
    }


def _start(algorithm: str, run: Training) -> str:
    """Return the folder of the model that the run started from."""
    own = run.params.get(f"algorithms.{algorithm}.start") or run.params.get("align.start", "sft")
    return f"models/{own}"


def _signal(algorithm: str, run: Training) -> str:
    """Return the name of the training signal."""
    try:
        spec = spec_of(algorithm, run.params)
    except (ConfigError, KeyError):
        return UNKNOWN
    if not isinstance(spec, OnPolicy):
        return PAIRS
    if spec.needs_teacher:
        return f"teacher {run.params.get(f'algorithms.{algorithm}.teacher') or UNKNOWN}"
    weights = under(run.params, f"algorithms.{algorithm}.rewards")
    return " and ".join(f"reward {name}" for name in sorted(weights) if weights[name]) or UNKNOWN


def panels(found: Mapping[str, Protocol]) -> list[list[str]]:
    """Return the algorithms in groups of equal protocols, in their order."""
    groups: list[list[str]] = []
    for name, protocol in found.items():
        same = (g for g in groups if not protocol.differs(found[g[0]], "tokens_sampled"))
        group = next(same, None)
        if group is None:
            groups.append([name])
        else:
            group.append(name)
    return groups


def main_panel(found: Mapping[str, Protocol], level: Mapping[str, float]) -> Sequence[str]:
    """Return the largest panel; of equally large ones, the one with the best algorithm."""
    return max(panels(found), key=lambda names: (len(names), max(level[name] for name in names)), default=[])
