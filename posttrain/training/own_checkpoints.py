"""Checkpoints that only the run which wrote them resumes from: a folder that is used again would end, or begin, another run.

Example:
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     _ = OwnCheckpoints(Checkpoints(Path(folder)), {"steps": 3}).save(1, {})
    ...     OwnCheckpoints(Checkpoints(Path(folder)), {"steps": 2}).latest()
    Traceback (most recent call last):
    posttrain.errors.CheckpointError: ... is of a run with other steps; give an empty folder, or the arguments of that run
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from posttrain.errors import CheckpointError
from posttrain.training.checkpoint import Checkpoints
from posttrain.training.fingerprints import plain, weights_digest

_RUN = "run"


class OwnCheckpoints:
    """`Checkpoints` with the run's identity in each state: the arguments by name, each as a digest."""

    def __init__(self, inner: Checkpoints, identity: Mapping[str, Any]) -> None:
        self.inner, self.folder = inner, getattr(inner, "folder", "")
        self.identity = {name: _digest(value) for name, value in identity.items()}

    def save(self, step: int, state: Mapping[str, Any]) -> Path:
        """Write the state with the identity."""
        return self.inner.save(step, {**state, _RUN: self.identity})

    def poll(self) -> None:
        """Complete the checkpoint that is being written if all processes are ready."""
        self.inner.poll()

    def wait(self) -> None:
        """Wait for the checkpoint that is being written, and complete it."""
        self.inner.wait()

    def latest(self) -> tuple[int, dict[str, Any]] | None:
        """Return (step, state) of the newest complete checkpoint, or None.

        Raises:
            CheckpointError: it is of a run with other arguments.
        """
        found = self.inner.latest()
        if found is None:
            return None
        theirs = found[1].get(_RUN) or {}
        if other := [name for name, digest in self.identity.items() if theirs.get(name) != digest]:
            raise CheckpointError(
                f"the checkpoint of step {found[0]} in {self.folder} is of a run with other {', '.join(other)}; give an empty folder, or"
                " the arguments of that run"
            )
        return found


def identity_of(algorithm: object, model: nn.Module, numbers: Mapping[str, float], weighed: bool) -> dict[str, Any]:
    """Return a run's identity without its rows: algorithm, the numbers by name, and the weights that training starts from.

    Args:
        weighed: False leaves out the weights, for a run without checkpoints.
    """
    weights = {"model": weights_digest(model)} if weighed else {}
    return {"algorithm": repr(algorithm), **{name: float(value) for name, value in numbers.items()}, **weights}


def _digest(value: Any) -> str:
    """Return a digest of a value's text; an object that JSON does not have counts by its type, unless `plain` reads it."""
    text = json.dumps(value, sort_keys=True, default=lambda one: plain(one) or type(one).__name__)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]
