"""Read the machine's energy counters (RAPL, through /sys/class/powercap), where they are readable.

A counter covers a whole processor package with everything that runs on it, so that runs side by side share its joules.

Example:
    >>> used({"package-0": (5_000_000, 9_000_000)}, {"package-0": (2_000_000, 9_000_000)})  # the counter has started again at 9 J
    6.0
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
Counters = Mapping[str, Sequence[int]]
"""Microjoules and the value after which the counter starts again, by the package's name."""


def read_counters(folder: Path = POWERCAP) -> dict[str, tuple[int, int]]:
    """Return the counters of all packages; none if the machine has none, or only root may read them."""
    found = {}
    for zone in sorted(folder.glob("intel-rapl:*")):
        if zone.name.count(":") != 1:  # parts of a package, which it contains
            continue
        try:
            name = (zone / "name").read_text(encoding="ascii").strip()
            found[name] = int((zone / "energy_uj").read_text()), int((zone / "max_energy_range_uj").read_text())
        except (OSError, ValueError):
            return {}
    return found


def used(before: Counters, after: Counters) -> float | None:
    """Return the joules between two readings; None if they are not of the same packages. A counter may have started again once."""
    if not before or before.keys() != after.keys():
        return None
    total = 0
    for name, (start, limit) in before.items():
        end = after[name][0]
        total += end - start if end >= start else end + limit - start
    return total / 1e6
