"""Name flow runs by what they do and when: "retrain 2026-11-29"."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

TAG = "posttrain"
"""Tag of every flow run of this project, from the command line as from a deployment."""


def dated(name: str) -> Callable[[], str]:
    """Return a function that Prefect calls at the start of a run for the run's name."""
    return lambda: f"{name} {datetime.now().astimezone():%Y-%m-%d %H:%M}"
