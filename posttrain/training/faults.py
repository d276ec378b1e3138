"""NaN and infinity in training: an update is skipped or stops the run, and its state is saved for replay.

A saved fault is a checkpoint: weights and optimiser before the update, the source's position, and the batch.

Example:
    >>> row_ids([Tokens((1,), (2,), id="row 7"), Tokens((1,), (3,))])
    ['row 7', '#1']
    >>> unpack(pack([Tokens((1,), (2,))])) == [Tokens((1,), (2,))]
    True
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from posttrain.choices import follow, made
from posttrain.data.tokens import Tokens
from posttrain.errors import CheckpointError, NotFiniteError
from posttrain.training.checkpoint import Checkpoints
from posttrain.training.randomness import set_random_state
from posttrain.training.source import BatchSource, settled
from posttrain.training.trainer import Objective, Row, Trainer


@dataclass
class Faults:
    """How many faults a run may skip, and how many it has skipped. `skip_at_most` 0 stops at the first fault."""

    kept: Checkpoints
    skip_at_most: int = 0
    repeat: str = "posttrain.training.faults.repeat"
    """Command that replays a saved fault; messages name it before the folder."""
    skipped: int = 0
    pending: list[dict[str, Any]] = field(default_factory=list)
    """Faults of the current step."""

    def skip(
        self, error: NotFiniteError, step: int, where: str, rows: Sequence[Any] | None, state: Mapping[str, Any]
    ) -> None:
        """Save and report a fault.

        Raises:
            NotFiniteError: the run has already skipped as many faults as it may.
        """
        ids = row_ids(rows) if rows is not None else list(error.ids)
        about = {"step": step, "where": where, "reason": str(error), "rows": ids}
        path = self.kept.save(
            self.skipped + 1, {**state, "about": about, "batch": None if rows is None else pack(rows)}
        )
        self.kept.wait()
        self.pending.append(about)
        self.skipped += 1
        text = f"step {step}, {where}: {error} (rows {', '.join(ids) or 'unknown'})"
        if self.skipped > self.skip_at_most:
            left = "no update may be skipped" if not self.skip_at_most else f"{self.skip_at_most} were already skipped"
            raise NotFiniteError(
                f"{text}; {left} (faults.skip_at_most = {self.skip_at_most}). State saved. Replay with:"
                f" `{self.repeat} {path}`",
                ids,
            ) from error
        tqdm.write(
            f"{text}; skipped, {self.skipped} of at most {self.skip_at_most}. `{self.repeat} {path}` replays it",
            file=sys.stderr,
        )


def snapshot(trainer: Trainer[Row], source: Mapping[str, Any], generators: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a run's state that a fault needs for its replay, after waiting for answers that are being sampled."""
    state = {"trainer": trainer.state_dict(), "source": settled(dict(source)), "random": dict(generators)}
    return state | {"choices": made()}


def repeat(trainer: Trainer[Row], source: BatchSource[Row], objective: Objective[Row], folder: Path) -> str:
    """Replay a failed step on the weights and batch that it met. Return one line if it succeeds now.

    Raises:
        NotFiniteError: the fault is still there; weights and single rows have been examined and printed.
        CheckpointError: `folder` is not a saved fault.
    """
    state = Checkpoints.read(folder)
    if "about" not in state:
        raise CheckpointError(
            f"{folder} is a checkpoint, not a saved fault; saved faults are in the folder `faults` next to it"
        )
    follow(state.get("choices", {}))
    trainer.load_state_dict(state["trainer"])
    source.load_state_dict(state["source"])
    set_random_state(state["random"])
    about = state["about"]
    print(f"step {about['step']}, {about['where']}: {about['reason']} (rows {', '.join(about['rows'])})", flush=True)
    if state["batch"] is None:
        data = source.next(about["step"] - 1)
        return f"the fault is gone: {len(data.batches)} batches were made"
    rows = unpack(state["batch"])
    broken = [name for name, value in trainer.unwrapped.named_parameters() if not value.isfinite().all()]
    print(f"weights that are not finite: {', '.join(broken) or 'none'}", flush=True)
    for row, row_id in zip(rows, row_ids(rows), strict=True):
        print(f"  row {row_id}: {_row_report(trainer, objective, row, objective.counts(rows))}", flush=True)
    metrics = trainer.update(rows, objective)
    return f"the fault is gone: loss {metrics['loss']:.6g}, gradient norm {metrics['grad_norm']:.6g}"


def _row_report(trainer: Trainer[Row], objective: Objective[Row], row: Row, counts: Mapping[str, float]) -> str:
    """Return a row's part of the loss and the norm of its gradient."""
    trainer.unwrapped.eval()
    terms = objective.terms(trainer.unwrapped, [row])
    loss = torch.stack([v * (w / max(counts[count], 1e-12)) for v, count, w in terms.losses.values()]).sum()
    loss.backward()
    gradients = [p.grad.norm() for p in trainer.unwrapped.parameters() if p.grad is not None]
    trainer.optimizer.zero_grad()
    return f"loss {float(loss.detach()):.6g}, gradient norm {float(torch.stack(gradients).norm()):.6g}"


def row_ids(rows: Sequence[Any]) -> list[str]:
    """Return the table row's id behind each row of a batch, or its index in the batch if it has none."""
    return [_id(row) or f"#{place}" for place, row in enumerate(rows)]


def _id(row: Any) -> str:
    if isinstance(row, Tokens):
        return row.id
    members = (
        row if isinstance(row, tuple) else [getattr(row, f.name) for f in fields(row)] if is_dataclass(row) else []
    )
    return next(filter(None, map(_id, members)), "")


def pack(value: Any) -> Any:
    """Convert rows to plain values and tensors, which load without unpickling code."""
    if is_dataclass(value) and not isinstance(value, type):
        kind = type(value)
        return {
            "kind": f"{kind.__module__}:{kind.__qualname__}",
            "of": [pack(getattr(value, f.name)) for f in fields(value)],
        }
    if isinstance(value, np.ndarray):
        return {"kind": "array", "of": torch.from_numpy(value.copy())}
    if isinstance(value, list | tuple):
        return type(value)(pack(member) for member in value)
    return value


def unpack(value: Any) -> Any:
    """Restore the rows that `pack` converted."""
    if isinstance(value, list | tuple):
        return type(value)(unpack(member) for member in value)
    if not isinstance(value, dict):
        return value
    if value["kind"] == "array":
        return value["of"].numpy()
    module, _, name = value["kind"].partition(":")
    kind = getattr(importlib.import_module(module), name) if module.startswith("posttrain.") else None
    if not (isinstance(kind, type) and is_dataclass(kind)):
        raise CheckpointError(
            f"{value['kind']!r} is not a row type of this library; the saved fault was written by other software"
        )
    return kind(*map(unpack, value["of"]))
