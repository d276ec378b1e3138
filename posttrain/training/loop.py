"""The loop every training step shares: take a step's batches, update on each, record, checkpoint, stop cleanly."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from tqdm import tqdm

from posttrain.errors import Interrupted
from posttrain.training.checkpoint import Checkpoints
from posttrain.training.trainer import Objective, Row, Trainer

RowOut = TypeVar("RowOut", covariant=True)


@dataclass
class StepData(Generic[Row]):
    """What one step trains on: one batch per optimiser update, with what was measured while making it."""

    batches: list[Sequence[Row]]
    metrics: dict[str, float] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)


class Source(Protocol[Row]):
    """Gives the batches of a step. Its state is part of the checkpoint."""

    def next(self, step: int) -> StepData[Row]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Recorder(Protocol):
    """Where a run's numbers go; the steps of the pipeline give their journal."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None: ...

    def timings(self, step: int, values: Mapping[str, float]) -> None: ...

    def truncate_after(self, step: int) -> None: ...

    def stop_requested(self) -> bool: ...


class StepHook(Protocol):
    def __call__(self, step: int) -> Mapping[str, float]:
        """Called after step `step` (counted from 1); its metrics join the step's."""
        ...


@dataclass(frozen=True)
class LoopSettings:
    """Shown numbers are the three that the progress bar carries."""

    title: str
    steps: int
    shown: tuple[str, ...] = ("loss",)
    checkpoint_steps: int = 50
    checkpoint_minutes: float = 10.0


def fit(
    trainer: Trainer[Row],
    source: Source[Row],
    objective: Objective[Row],
    settings: LoopSettings,
    recorder: Recorder,
    checkpoints: Checkpoints,
    hook: StepHook | None = None,
) -> dict[str, float]:
    """Train to the end, going on from the newest whole checkpoint if there is one. Returns the last step's metrics.

    Raises Interrupted, after a checkpoint, when the recorder says that a signal asked the run to stop.
    """
    first = _resume(trainer, source, recorder, checkpoints)
    last: dict[str, float] = {}
    saved_at = time.monotonic()
    bar = tqdm(
        total=settings.steps, initial=first, desc=settings.title, unit="step", dynamic_ncols=True, mininterval=1.0
    )
    with bar:
        for step in range(first + 1, settings.steps + 1):
            last = _one_step(trainer, source, objective, recorder, step, hook)
            bar.set_postfix(
                {name.removesuffix("/mean"): f"{last[name]:.3g}" for name in settings.shown if name in last},
                refresh=False,
            )
            bar.update()
            due = (
                step % settings.checkpoint_steps == 0 or time.monotonic() - saved_at > 60 * settings.checkpoint_minutes
            )
            stop = recorder.stop_requested() and step < settings.steps
            if (due and step < settings.steps) or stop:
                checkpoints.save(step, _state(trainer, source))
                saved_at = time.monotonic()
            if stop:
                raise Interrupted(
                    f"{settings.title} was asked to stop after step {step}; run it again and it goes on from there"
                )
    return last


def _one_step(
    trainer: Trainer[Row],
    source: Source[Row],
    objective: Objective[Row],
    recorder: Recorder,
    step: int,
    hook: StepHook | None,
) -> dict[str, float]:
    started = time.perf_counter()
    data = source.next(step - 1)
    prepared = time.perf_counter()
    tokens_before = trainer.tokens_trained
    updates = [trainer.update(batch, objective) for batch in data.batches]
    trained = time.perf_counter()
    metrics = data.metrics | _mean_of(updates)
    if hook is not None:
        metrics |= hook(step)
    recorder.metrics(step, metrics)
    seconds = {
        "seconds/data": prepared - started,
        "seconds/train": trained - prepared,
        "seconds/step": trained - started,
    }
    throughput = {
        "throughput/tokens_per_second": (trainer.tokens_trained - tokens_before) / max(trained - prepared, 1e-9)
    }
    recorder.timings(step, seconds | throughput | data.timings)
    return metrics


def _mean_of(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Metrics of a step from its updates: the mean, but the least, greatest or latest where the name says so."""
    names = sorted({name for update in updates for name in update})
    merged = {}
    for name in names:
        values = [update[name] for update in updates if name in update]
        if name.endswith("/min"):
            merged[name] = min(values)
        elif name.endswith("/max"):
            merged[name] = max(values)
        elif name in ("learning_rate", "tokens/trained"):
            merged[name] = values[-1]
        else:
            merged[name] = float(np.mean(values))
    return merged


def _resume(trainer: Trainer[Row], source: Source[Row], recorder: Recorder, checkpoints: Checkpoints) -> int:
    found = checkpoints.latest()
    if found is None:
        recorder.truncate_after(0)
        return 0
    step, state = found
    trainer.load_state_dict(state["trainer"])
    source.load_state_dict(state["source"])
    _set_random_state(state["random"])
    recorder.truncate_after(step)
    tqdm.write(f"going on from the checkpoint after step {step}")
    return step


def _state(trainer: Trainer[Row], source: Source[Row]) -> dict[str, Any]:
    return {"trainer": trainer.state_dict(), "source": source.state_dict(), "random": _random_state()}


def _random_state() -> dict[str, Any]:
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(internal), gauss],
        "numpy": [
            str(name),
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _set_random_state(state: Mapping[str, Any]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
