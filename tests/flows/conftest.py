"""Fixtures of the tests of promotions."""

from __future__ import annotations

from tests.flows.promoted import project, promoted

__all__ = ["project", "promoted"]
