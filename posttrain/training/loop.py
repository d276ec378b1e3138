"""The loop every training step shares: take a step's batches, update on each, record, checkpoint, stop cleanly."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from tqdm import tqdm

from posttrain.distributed import all_reduce_max, any_rank
from posttrain.errors import CheckpointError, Interrupted, NotFiniteError
from posttrain.training.checkpoint import Checkpoints
from posttrain.training.faults import Faults, snapshot
from posttrain.training.randomness import random_state, set_random_state
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

    def faults(self, step: int, told: Sequence[Mapping[str, Any]]) -> None:
        """What went numerically wrong in a step, one record a fault."""
        ...

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
    faults: Faults | None = None,
) -> dict[str, float]:
    """Train to the end, going on from the newest whole checkpoint if there is one. Returns the latest value of every metric.

    Raises Interrupted, after a checkpoint, when the recorder says that a signal asked the run to stop, and NotFiniteError at a
    numerical fault that may not be left out; without `faults` none may, and none is kept.
    """
    first, last = _resume(trainer, source, recorder, checkpoints, faults)
    saved_at = time.monotonic()
    bar = tqdm(
        total=settings.steps,
        initial=first,
        desc=settings.title,
        unit="step",
        dynamic_ncols=True,
        mininterval=1.0,
        **({} if trainer.accelerator.is_main_process else {"disable": True}),
    )
    with bar:
        for step in range(first + 1, settings.steps + 1):
            last |= _one_step(trainer, source, objective, recorder, step, hook, faults)
            bar.set_postfix(
                {name.removesuffix("/mean"): f"{last[name]:.3g}" for name in settings.shown if name in last},
                refresh=False,
            )
            bar.update()
            due = (
                step % settings.checkpoint_steps == 0 or time.monotonic() - saved_at > 60 * settings.checkpoint_minutes
            )
            # processes have clocks and signals of their own, and write a checkpoint together
            stop = any_rank(trainer.accelerator, recorder.stop_requested()) and step < settings.steps
            due = any_rank(trainer.accelerator, due)
            if (due and step < settings.steps) or stop:
                checkpoints.save(step, _state(trainer, source, last, faults))
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
    faults: Faults | None,
) -> dict[str, float]:
    started = time.perf_counter()
    try:
        data = _next(trainer, source, step, faults)
        prepared = time.perf_counter()
        tokens_before = trainer.tokens_trained
        updates = _updates(trainer, source, objective, data.batches, step, faults)
    finally:
        if faults is not None and faults.pending:
            recorder.faults(step, faults.pending)
    trained = time.perf_counter()
    metrics = data.metrics | _mean_of(updates)
    if faults is not None and faults.pending:
        metrics["faults/skipped"] = float(faults.skipped)
        faults.pending = []
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


def _next(trainer: Trainer[Row], source: Source[Row], step: int, faults: Faults | None) -> StepData[Row]:
    """The step's batches; none where making them met a numerical fault that may be left out."""
    if faults is None:
        return source.next(step - 1)
    before, generators = source.state_dict(), random_state()
    try:
        return source.next(step - 1)
    except NotFiniteError as error:
        faults.skip(error, step, "making its batches", None, snapshot(trainer, before, generators))
        return StepData([])


def _updates(
    trainer: Trainer[Row],
    source: Source[Row],
    objective: Objective[Row],
    batches: Sequence[Sequence[Row]],
    step: int,
    faults: Faults | None,
) -> list[dict[str, float]]:
    """One optimiser update a batch, without those that met a numerical fault and may be left out."""
    done = []
    for number, batch in enumerate(batches, start=1):
        try:
            done.append(trainer.update(batch, objective))
        except NotFiniteError as error:
            if faults is None:
                raise
            where, state = f"update {number} of {len(batches)}", snapshot(trainer, source.state_dict(), random_state())
            faults.skip(error, step, where, batch, state)
    return done


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


def _resume(
    trainer: Trainer[Row], source: Source[Row], recorder: Recorder, checkpoints: Checkpoints, faults: Faults | None
) -> tuple[int, dict[str, float]]:
    """The step to go on after, and the latest metrics until then."""
    found = checkpoints.latest()
    newest = 0 if found is None else found[0]
    if any_rank(trainer.accelerator, newest != all_reduce_max(trainer.accelerator, newest)):
        raise CheckpointError(
            f"the processes of this run do not see the same checkpoints ({newest} is the newest step in {checkpoints.folder} for process"
            f" {trainer.accelerator.process_index}); keep the project on a disk that all of them share"
        )
    if found is None:
        recorder.truncate_after(0)
        return 0, {}
    step, state = found
    trainer.load_state_dict(state["trainer"])
    source.load_state_dict(state["source"])
    set_random_state(state["random"])
    if faults is not None:
        faults.skipped = state["skipped"]
    recorder.truncate_after(step)
    if trainer.accelerator.is_main_process:
        tqdm.write(f"going on from the checkpoint after step {step}")
    return step, state["last"]


def _state(
    trainer: Trainer[Row], source: Source[Row], last: Mapping[str, float], faults: Faults | None
) -> dict[str, Any]:
    whole = snapshot(trainer, source.state_dict(), random_state())
    return whole | {"last": dict(last), "skipped": faults.skipped if faults is not None else 0}
