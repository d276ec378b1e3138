"""NaN and infinity in training: the update is left out or stops the run, and is kept on disk so that it can be repeated.

A kept fault is a checkpoint of the moment: weights and optimiser as the update met them, the source's position, and the batch itself.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

from posttrain.data.tokens import Tokens
from posttrain.errors import CheckpointError, NotFiniteError
from posttrain.training.checkpoint import Checkpoints
from posttrain.training.randomness import set_random_state
from posttrain.training.trainer import Objective, Row, Trainer

if TYPE_CHECKING:
    from posttrain.training.loop import Source


@dataclass
class Faults:
    """The policy of one run, and how much of it is used up. `skip_at_most` 0 stops at the first fault."""

    kept: Checkpoints
    skip_at_most: int = 0
    repeat: str = "posttrain.training.faults.repeat"
    """What repeats a kept fault; a message names it before the folder."""
    skipped: int = 0
    pending: list[dict[str, Any]] = field(default_factory=list)
    """What went wrong in the step in hand, one record a fault."""

    def skip(
        self, error: NotFiniteError, step: int, where: str, rows: Sequence[Any] | None, state: Mapping[str, Any]
    ) -> None:
        """Keep and tell a fault. Raises NotFiniteError when the run has left out as many as it may."""
        ids = row_ids(rows) if rows is not None else list(error.ids)
        about = {"step": step, "where": where, "reason": str(error), "rows": ids}
        path = self.kept.save(
            self.skipped + 1, {**state, "about": about, "batch": None if rows is None else pack(rows)}
        )
        self.pending.append(about)
        self.skipped += 1
        text = f"step {step}, {where}: {error} (rows {', '.join(ids) or 'unknown'})"
        if self.skipped > self.skip_at_most:
            left = (
                "no update may be left out" if not self.skip_at_most else f"{self.skip_at_most} were left out already"
            )
            raise NotFiniteError(
                f"{text}; {left} (faults.skip_at_most = {self.skip_at_most}). What it met is kept; repeat it with"
                f" `{self.repeat} {path}`",
                ids,
            ) from error
        tqdm.write(
            f"{text}; left out, {self.skipped} of at most {self.skip_at_most}. `{self.repeat} {path}` repeats it",
            file=sys.stderr,
        )


def snapshot(trainer: Trainer[Row], source: Mapping[str, Any], generators: Mapping[str, Any]) -> dict[str, Any]:
    """What a fault has to keep of a run."""
    return {"trainer": trainer.state_dict(), "source": dict(source), "random": dict(generators)}


def repeat(trainer: Trainer[Row], source: Source[Row], objective: Objective[Row], folder: Path) -> str:
    """Do again what failed, on the weights and the batch that it met. Returns one line when it goes well now.

    Raises NotFiniteError, with what can be said of weights and single rows, when the fault is still there, CheckpointError where
    `folder` is no kept fault.
    """
    state = Checkpoints.read(folder)
    if "about" not in state:
        raise CheckpointError(f"{folder} is a checkpoint, not a kept fault; those are in the folder `faults` beside it")
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
        print(f"  row {row_id}: {_alone(trainer, objective, row, objective.counts(rows))}", flush=True)
    metrics = trainer.update(rows, objective)
    return f"the fault is gone: loss {metrics['loss']:.6g}, gradient norm {metrics['grad_norm']:.6g}"


def _alone(trainer: Trainer[Row], objective: Objective[Row], row: Row, counts: Mapping[str, float]) -> str:
    """A row's part of the loss and the norm of its gradient."""
    trainer.unwrapped.eval()
    terms = objective.terms(trainer.unwrapped, [row])
    loss = torch.stack([v * (w / max(counts[count], 1e-12)) for v, count, w in terms.losses.values()]).sum()
    loss.backward()
    gradients = [p.grad.norm() for p in trainer.unwrapped.parameters() if p.grad is not None]
    trainer.optimizer.zero_grad()
    return f"loss {float(loss.detach()):.6g}, gradient norm {float(torch.stack(gradients).norm()):.6g}"


def row_ids(rows: Sequence[Any]) -> list[str]:
    """The id of the table's row behind each row of a batch; its place in the batch where it has none."""
    return [_id(row) or f"#{place}" for place, row in enumerate(rows)]


def _id(row: Any) -> str:
    if isinstance(row, Tokens):
        return row.id
    members = (
        row if isinstance(row, tuple) else [getattr(row, f.name) for f in fields(row)] if is_dataclass(row) else []
    )
    return next(filter(None, map(_id, members)), "")


def pack(value: Any) -> Any:
    """Rows as plain values and tensors, which load without unpickling code."""
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
    if isinstance(value, list | tuple):
        return type(value)(unpack(member) for member in value)
    if not isinstance(value, dict):
        return value
    if value["kind"] == "array":
        return value["of"].numpy()
    module, _, name = value["kind"].partition(":")
    kind = getattr(importlib.import_module(module), name) if module.startswith("posttrain.") else None
    if not (isinstance(kind, type) and is_dataclass(kind)):
        raise CheckpointError(f"{value['kind']!r} is no row of this library; the kept fault comes from elsewhere")
    return kind(*map(unpack, value["of"]))
