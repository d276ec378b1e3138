"""Reward functions that behave in every way a user's may; tests name them by import path."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

Rewards = list[float | None]


def lengths(prompts: Sequence[Any], completions: Sequence[str], bonus: float = 0.0, **_: Any) -> Rewards:
    print("what a function prints is not an answer")
    return [np.float32(len(c) + bonus) if c else None for c in completions]  # type: ignore[misc]


def process_ids(prompts: Sequence[Any], completions: Sequence[str], **_: Any) -> Rewards:
    return [float(os.getpid())] * len(completions)


def seen(prompts: Sequence[Any], completions: Sequence[str], answer: Sequence[Any], **_: Any) -> Rewards:
    """Return 1 if a row's parts are still together."""
    return [float(p[0]["content"] + str(a) == c) for p, c, a in zip(prompts, completions, answer, strict=True)]


def sleeper(prompts: Sequence[Any], completions: Sequence[str], pid_file: str = "", **_: Any) -> Rewards:
    """Sleeps for an hour, with a child that does so too, when an answer is "slow"."""
    if "slow" in completions:
        child = subprocess.Popen(["sleep", "3600"])
        if pid_file:
            Path(pid_file).write_text(f"{os.getpid()} {child.pid}")
        time.sleep(3600)
    return [1.0] * len(completions)


def spinner(prompts: Sequence[Any], completions: Sequence[str], **_: Any) -> Rewards:
    while True:
        pass


def picky(prompts: Sequence[Any], completions: Sequence[str], **_: Any) -> Rewards:
    """Raises on "bad"; otherwise returns how many answers it was shown."""
    if "bad" in completions:
        raise KeyError("no such thing")
    return [float(len(completions))] * len(completions)


def together(prompts: Sequence[Any], completions: Sequence[str], **_: Any) -> Rewards:
    """Fails on more than one answer at once, so that no single row explains it."""
    if len(completions) > 1:
        raise RuntimeError("the service is away")
    return [0.0]


def dying(prompts: Sequence[Any], completions: Sequence[str], **_: Any) -> Rewards:
    if "die" in completions:
        os.kill(os.getpid(), 11)
    return [0.5] * len(completions)


def infinite(prompts: Sequence[Any], completions: Sequence[str], **_: Any) -> Rewards:
    return [float("inf")] * len(completions)


def complex_number(prompts: Sequence[Any], completions: Sequence[str], **_: Any) -> Any:
    return [1j] * len(completions)
