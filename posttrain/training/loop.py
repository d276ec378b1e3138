"""The loop of all training steps: take a step's batches, update on each, record, checkpoint, stop cleanly.

Example:
    Metrics of several updates of one step are merged by name:

    >>> mean_of([{"loss": 1.0, "ratio/max": 2.0}, {"loss": 3.0, "ratio/max": 1.0}])
    {'loss': 2.0, 'ratio/max': 2.0}
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from accelerate import Accelerator
from tqdm import tqdm

from posttrain.choices import follow
from posttrain.distributed import agree_on_choices, all_reduce_max, any_rank, broadcast_state, on_one_host
from posttrain.errors import CheckpointError, Interrupted, NotFiniteError
from posttrain.models.policy import head_name
from posttrain.training.checkpoint import Checkpoints
from posttrain.training.faults import Faults, snapshot
from posttrain.training.own_checkpoints import OwnCheckpoints
from posttrain.training.randomness import random_state, set_random_state
from posttrain.training.source import BatchSource, StepData
from posttrain.training.trainer import Objective, Row, Trainer


class Recorder(Protocol):
    """Receives a run's metrics. In the pipeline's steps this is their journal."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None: ...

    def timings(self, step: int, values: Mapping[str, float]) -> None: ...

    def faults(self, step: int, records: Sequence[Mapping[str, Any]]) -> None:
        """Record the numerical faults of a step, one record per fault."""
        ...

    def truncate_after(self, step: int) -> None: ...

    def stop_requested(self) -> bool: ...


class StepHook(Protocol):
    def __call__(self, step: int) -> Mapping[str, float]:
        """Run after step `step` (counted from 1); the returned metrics are added to the step's."""
        ...


@dataclass(frozen=True)
class LoopSettings:
    """Length, title and checkpoint interval of a run; the progress bar shows the metrics in `shown`."""

    title: str
    steps: int
    shown: tuple[str, ...] = ("loss",)
    checkpoint_steps: int = 50
    checkpoint_minutes: float = 10.0


def fit(
    trainer: Trainer[Row],
    source: BatchSource[Row],
    objective: Objective[Row],
    settings: LoopSettings,
    recorder: Recorder,
    checkpoints: Checkpoints | OwnCheckpoints | None = None,
    hook: StepHook | None = None,
    faults: Faults | None = None,
    begun: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Train to the end, resuming from the newest complete checkpoint. Return the latest value of every metric.

    Without `checkpoints` the run cannot be resumed. Without `faults` no fault may be skipped and none is saved. `begun` is called
    before the first step, after a checkpoint was loaded.

    Raises:
        Interrupted: the recorder reports that a signal asked the run to stop; a checkpoint has been written.
        NotFiniteError: a numerical fault that may not be skipped.
    """
    first, last = _resume(trainer, source, recorder, checkpoints, faults)
    _choose(trainer)
    begun()
    saved_at = time.monotonic()
    # pyrefly: ignore[no-matching-overload]
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
            # each process has its own clock and signals, but all must write a checkpoint together
            stop = any_rank(trainer.accelerator, recorder.stop_requested()) and step < settings.steps
            due = any_rank(trainer.accelerator, due)
            if checkpoints is not None and ((due and step < settings.steps) or stop):
                checkpoints.save(step, _state(trainer, source, last, faults))
                saved_at = time.monotonic()
            elif checkpoints is not None:
                checkpoints.poll()
            if stop:
                if checkpoints is not None:
                    checkpoints.wait()
                raise Interrupted(
                    f"{settings.title} was stopped by a signal after step {step}; run it again to resume from there"
                )
    if checkpoints is not None:
        checkpoints.wait()
    return last


def _choose(trainer: Trainer[Row]) -> None:
    """Choose the functions that compute the head, alike in all processes: those that split layers compute the same rows."""
    with trainer.accelerator.autocast():
        head_name(trainer.unwrapped, trainer.accelerator.device)
    agree_on_choices(trainer.accelerator)


def _one_step(
    trainer: Trainer[Row],
    source: BatchSource[Row],
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
    metrics = data.metrics | mean_of(updates)
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


def _next(trainer: Trainer[Row], source: BatchSource[Row], step: int, faults: Faults | None) -> StepData[Row]:
    """Return the step's batches; none if preparing them met a numerical fault that may be skipped."""
    if faults is None:
        return source.next(step - 1)
    before, generators = source.state_dict(), random_state()
    try:
        return source.next(step - 1)
    except NotFiniteError as error:
        faults.skip(error, step, "preparing its batches", None, snapshot(trainer, before, generators))
        return StepData([])


def _updates(
    trainer: Trainer[Row],
    source: BatchSource[Row],
    objective: Objective[Row],
    batches: Sequence[Sequence[Row]],
    step: int,
    faults: Faults | None,
) -> list[dict[str, float]]:
    """Run one optimiser update per batch, and skip those with a numerical fault if that is allowed."""
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


def mean_of(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return a step's metrics from its updates: the mean, or the minimum, maximum or latest value depending on the name."""
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
    trainer: Trainer[Row],
    source: BatchSource[Row],
    recorder: Recorder,
    checkpoints: Checkpoints | OwnCheckpoints | None,
    faults: Faults | None,
) -> tuple[int, dict[str, float]]:
    """Return the step to resume after, and the latest metrics until then."""
    if checkpoints is None:
        recorder.truncate_after(0)
        return 0, {}
    found = _newest(trainer.accelerator, checkpoints)
    if found is None:
        recorder.truncate_after(0)
        return 0, {}
    step, state = found
    follow(state.get("choices", {}))
    trainer.load_state_dict(state["trainer"])
    source.load_state_dict(state["source"])
    set_random_state(state["random"])
    if faults is not None:
        faults.skipped = state["skipped"]
    recorder.truncate_after(step)
    if trainer.accelerator.is_main_process:
        tqdm.write(f"resuming from the checkpoint after step {step}")
    return step, state["last"]


def _newest(accelerator: Accelerator, checkpoints: Checkpoints | OwnCheckpoints) -> tuple[int, dict[str, Any]] | None:
    """Return the newest checkpoint, the same on every process: processes of several hosts receive rank 0's, so they need no shared disk.

    Raises:
        CheckpointError: processes of one host see different folders.
    """
    found = checkpoints.latest()
    step = 0 if found is None else found[0]
    newest = all_reduce_max(accelerator, step)
    if not on_one_host(accelerator):
        if accelerator.is_main_process and step < newest:
            tqdm.write(
                f"a different host has a checkpoint after step {newest}, rank 0 has {f'one after step {step}' if step else 'none'}: the run"
                " continues from rank 0's. To use the other one, stop, and start that host as rank 0.",
                file=sys.stderr,
            )
        return broadcast_state(accelerator, found)
    if any_rank(accelerator, step != newest):
        raise CheckpointError(
            f"the processes of this run do not see the same checkpoints ({step} is the newest step in {checkpoints.folder} for process"
            f" {accelerator.process_index}); start all processes of a host in the same folder"
        )
    return found


def _state(
    trainer: Trainer[Row], source: BatchSource[Row], last: Mapping[str, float], faults: Faults | None
) -> dict[str, Any]:
    # a run that goes on must choose like one that resumes from here
    agree_on_choices(trainer.accelerator)
    state = snapshot(trainer, source.state_dict(), random_state())
    return state | {"last": dict(last), "skipped": faults.skipped if faults is not None else 0}
