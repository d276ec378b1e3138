"""A recorder that keeps nothing and stops at a numerical fault. Benchmarks derive theirs from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class Silent:
    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Do nothing."""

    def timings(self, step: int, values: Mapping[str, float]) -> None:
        """Do nothing."""

    def faults(self, step: int, found: Sequence[Mapping[str, Any]]) -> None:
        raise RuntimeError(f"step {step}: {found}")

    def truncate_after(self, step: int) -> None:
        """Do nothing."""

    def stop_requested(self) -> bool:
        return False
