"""Count the rows that a run would train on, and estimate its time from the steps that this machine has timed."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from pipelines.config.params import Params, flatten
from pipelines.config.schema import OnPolicyBudget, PreferenceBudget
from pipelines.data.conversation_rows import Sourced
from pipelines.data.sources import HUB, is_generator, table_rows
from pipelines.data.tables import EXPERT, supervised_rows
from pipelines.ingest import split_by_prompt
from pipelines.report.measured import all_runs, newest
from pipelines.runtime.journal import read
from pipelines.runtime.param_tracking import declared_values
from pipelines.runtime.publish import JOURNAL
from posttrain.algorithms import OnPolicy
from posttrain.environments.parts import Kind

VALID, INGESTED = Path("data/valid"), Path("runs/ingest")
STEP = "seconds/step"


def rows_by_table(params: Params, kinds: Sequence[Kind] = get_args(Kind)) -> dict[str, int | None]:
    """Return the training rows of each table, pairs without the held-out ones; None if the number is not known before a run.

    Validated tables count if they were made from the present `data`. Otherwise local files are read, and generators and hub data sets
    have the number of rows that `data` asks for. Raises DataError if a file cannot be read.
    """
    present = is_present(params)
    return {kind: _validated(kind) if present else _expected(kind, params) for kind in kinds}


def steps_by_stage(params: Params, counted: Mapping[str, int | None]) -> dict[str, int | None]:
    """Return the optimiser steps of each training stage for the rows of `rows_by_table`; None if the rows are not known."""
    sft, reward, pairs = params.sft, params.reward, counted["preferences"]
    steps = {"sft": _steps(counted["sft"], sft.batch_size, sft.epochs)}
    if reward.enabled and reward.source is None:
        steps["reward"] = _steps(pairs, reward.batch_size, reward.epochs)
    for name in params.project.algorithms:
        spec, budget = params.algorithm(name), params.budget(name)
        if isinstance(spec, OnPolicy):
            assert isinstance(budget, OnPolicyBudget)
            steps[f"align@{name}"] = budget.steps * spec.epochs * spec.minibatches
        else:
            assert isinstance(budget, PreferenceBudget)
            steps[f"align@{name}"] = _steps(pairs, budget.batch_size, spec.epochs)
    return steps


def _steps(count: int | None, batch: int, epochs: int) -> int | None:
    """Return the number of optimiser steps, or None if the number of rows is unknown."""
    return None if count is None else math.ceil(count / batch) * epochs


def is_present(params: Params) -> bool:
    """Return True if there are validated tables, and `data` has not changed since ingest wrote them.

    A parameter that an earlier version of the project did not record counts as its default.
    """
    if not (VALID / "sft.parquet").is_file():
        return False
    recorded = [record["values"] for record in read(INGESTED / JOURNAL) if record["kind"] == "params"]
    used = {name: value for values in recorded for name, value in values.items()}
    if not used:
        return True
    not_default = flatten(params.data.model_dump(exclude_defaults=True), "data")
    wanted = {name: v for name, v in declared_values(params, ("data",)).items() if name in used or name in not_default}
    return _with_splits(used) == _with_splits(json.loads(json.dumps(wanted, default=str)))


def _with_splits(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of `data` with the split that a table without one reads; earlier versions recorded it as the default."""
    return {name: "train" if name.endswith(".split") and value is None else value for name, value in values.items()}


def _validated(kind: str) -> int | None:
    """Return the rows of a validated table."""
    import pyarrow.parquet as pq

    path = VALID / f"{kind}.parquet"
    if not path.is_file():
        return None
    if kind == "sft" and EXPERT in pq.read_schema(path).names:
        return len(supervised_rows(pq.read_table(path, columns=[EXPERT]).to_pylist()))
    return int(pq.read_metadata(path).num_rows)


def _expected(kind: Sourced, params: Params) -> int | None:
    """Return the rows of a table that is not made yet."""
    source = getattr(params.data, kind)
    if any(name.startswith(HUB) or is_generator(name) for name in source.names):
        held = round(source.rows * source.heldout) if source.rows and kind == "preferences" else 0
        return None if source.rows is None else source.rows - held
    rows = table_rows(kind, params.data)
    if kind == "preferences" and source.heldout:
        rows, _ = split_by_prompt(rows, source.heldout, params.data.seed)
    return len(rows)


def seconds_by_stage(project: Path) -> dict[str, float]:
    """Return the median seconds of one training step by stage (sft, reward, align@grpo), mean over seeds, from the last runs here."""
    found: dict[str, list[float]] = {}
    for run in newest(all_runs(project)):
        median = run.median(STEP)
        if median is not None:
            stage = re.sub(r"^align-(.+)-\d+$", r"align@\1", run.name)
            found.setdefault(stage, []).append(median)
    return {stage: float(np.mean(values)) for stage, values in found.items()}


def time_line(params: Params, steps: Mapping[str, int | None], timed: Mapping[str, float]) -> str:
    """Return a sentence on the time of all training stages, one after another. `steps` are optimiser steps by stage."""
    seconds, unknown = {}, []
    for stage, count in steps.items():
        name = stage.removeprefix("align@")
        sampled = name != stage and isinstance(params.algorithm(name), OnPolicy)
        loops = getattr(params.budget(name), "steps", count) if sampled else count
        runs = len(params.project.seeds) if name != stage else 1
        if stage in timed and loops is not None:
            seconds[stage] = runs * loops * timed[stage]
        else:
            unknown.append(stage)
    if not seconds:
        return "time: not known before a first run on this machine has timed its steps"
    each = ", ".join(f"{stage} {minutes(value)}" for stage, value in seconds.items())
    left = f". Not timed here yet: {', '.join(unknown)}" if unknown else ""
    return f"time: about {minutes(sum(seconds.values()))} of training, as the last steps here took: {each}{left}"


def too_long_warmups(params: Params, steps: Mapping[str, int | None]) -> list[str]:
    """Return one line for each stage that would stop because its warm-up is longer than its optimiser steps."""
    found = []
    for stage, count in steps.items():
        name = stage.removeprefix("align@")
        settings = params.budget(name) if name != stage else getattr(params, stage)
        warmup = settings.optimizer.warmup_steps
        if count is not None and warmup > count:
            section = stage if name == stage else _budget_section(params, name)
            found.append(
                f"{stage} would stop: {section}.optimizer.warmup_steps = {warmup} is longer than its {count} optimiser steps; set it to"
                f" {count // 10}, a tenth of them, or train for longer."
            )
    return found


def _budget_section(params: Params, name: str) -> str:
    """Return the section of params.yaml that sets an algorithm's warm-up."""
    own = params.algorithms[name].budget.get("optimizer")
    if isinstance(own, dict) and "warmup_steps" in own:
        return f"algorithms.{name}.budget"
    return "align.on_policy" if isinstance(params.algorithm(name), OnPolicy) else "align.preference"


def minutes(seconds: float) -> str:
    """Return a time in seconds, minutes or hours."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
