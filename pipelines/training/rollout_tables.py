"""Tables of a run's rollouts: one compressed Parquet file per step, with the answers and the data of their updates.

A table of all answers also holds the batches of the step, so that `posttrain replay` can compute its updates again.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.runtime.recorder import RunRecorder
from posttrain.data.tokens import TextEncoder, Tokens
from posttrain.errors import DataError
from posttrain.rollouts.engine import uniforms
from posttrain.rollouts.groups import ScoredAnswer
from posttrain.rollouts.turns import transcript
from posttrain.training.experience import ExperienceSource
from posttrain.training.onpolicy import Demonstration, Experience, OnPolicyRow
from posttrain.training.replay import KeptStep, KeptUpdate, keep_step

KEPT = b"posttrain.step"
"""Key of the file's metadata: the step, its batches and its KL coefficient as JSON."""
PER_TOKEN = ("advantages", "rollout_logprobs", "ref_logprobs", "old_logprobs", "old_values", "returns")
"""Columns of float32 lists, one value per response token; null if the step did not measure them."""
EXTREMES = 2
"""Answers kept at each end by `keep: extremes`."""
_LIST = pa.list_(pa.float32())


def file_name(step: int) -> str:
    """Return the name of a step's table among the artifacts of its run."""
    return f"rollouts-{step:06d}.parquet"


def keep_rollouts(recorder: RunRecorder, step: int, source: ExperienceSource, keep: str | float) -> None:
    """Write the last step's answers that the run keeps, and record the file."""
    answers, sampler = source.last_answers, source.sampler
    kept = keep_step(step, source.last_batches, source.objective.kl_coefficient)
    rows = selected(keep, kept, answers, sampler.seed)
    recorder.file(
        file_name(step), step, lambda path: write_table(path, kept, rows, answers, sampler.encoder, sampler.seed)
    )


def selected(keep: str | float, step: KeptStep, answers: Sequence[ScoredAnswer], seed: int) -> list[int]:
    """Return the indices of the rows to keep, sorted: all, a random share of the answers, or their extremes.

    The extremes are the highest and the lowest rewards, the answers on which sampler and reference differ most, and those that
    one reward source ranks far higher than a second one. Several answers with the same value count in the order of the step.
    """
    if keep == "all":
        return list(range(len(step.rows)))
    sampled = {id(row.tokens): index for index, row in enumerate(step.rows) if isinstance(row, Experience)}
    trained = [(sampled[id(answer.tokens)], answer) for answer in answers if id(answer.tokens) in sampled]
    if isinstance(keep, float):
        draws = uniforms((seed, step.step), len(trained))
        return sorted(index for (index, _), draw in zip(trained, draws, strict=True) if draw <= keep)
    measures = [[answer.reward for _, answer in trained], [_moved(step.rows[index]) for index, _ in trained]]
    names = sorted(trained[0][1].sources) if trained else []
    ranks = {name: _ranks([answer.sources[name] for _, answer in trained]) for name in names}
    measures += [list(ranks[a] - ranks[b]) for a in names for b in names if a < b]
    found = set[int]()
    for values in measures:
        order = [int(place) for place in np.argsort(values, kind="stable") if np.isfinite(values[place])]
        found |= {trained[place][0] for place in (*order[:EXTREMES], *order[-EXTREMES:])}
    return sorted(found)


def write_table(
    path: Path,
    step: KeptStep,
    rows: Sequence[int],
    answers: Sequence[ScoredAnswer],
    encoder: TextEncoder,
    seed: int,
) -> None:
    """Write the rows with these indices. The same run writes the same bytes."""
    sampled = {id(answer.tokens): (answer, drawn) for answer, drawn in zip(answers, _seeds(answers, seed), strict=True)}
    records = []
    for row in (step.rows[index] for index in rows):
        answer, drawn = sampled.get(id(row.tokens), (None, None))
        records.append(_about(row, answer, encoder) | {"seed": drawn} | _numbers(row))
    columns = {name: [record.get(name) for record in records] for name in _columns(answers)}
    arrays = {name: pa.array(values, _type(name)) for name, values in columns.items()}
    complete = len(rows) == len(step.rows)
    about = {
        "step": step.step,
        "kl_coefficient": step.kl_coefficient,
        "updates": [asdict(update) for update in step.updates] if complete else [],
    }
    table = pa.table(arrays).replace_schema_metadata({KEPT: json.dumps(about)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, compression="zstd")


def read_table(path: Path) -> KeptStep:
    """Return a step as it was kept. Raises DataError if the file cannot be read, or holds no step."""
    try:
        table = pq.ParquetFile(path).read()
        about = json.loads(table.schema.metadata[KEPT])
        rows = [_row(record) for record in _records(table)]
        updates = [KeptUpdate(**update) for update in about["updates"]]
        return KeptStep(about["step"], rows, updates, about["kl_coefficient"])
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path}: not a table of rollouts that can be read ({error}); restore it with `dvc checkout`"
        ) from error


def _about(row: OnPolicyRow, answer: ScoredAnswer | None, encoder: TextEncoder) -> dict[str, Any]:
    """Return the columns for people: texts, rewards and origin of the row."""
    about: dict[str, Any] = {"id": row.tokens.id, "completion": encoder.text(row.tokens.response)}
    if answer is None:
        return about | {"kind": "demonstration", "prompt": encoder.text(row.tokens.prompt)}
    prompt = answer.problem.prompt
    rewards = {f"reward/{name}": value for name, value in answer.sources.items()}
    return about | rewards | {
        "kind": "answer",
        "group": answer.group,
        "version": answer.version,
        "versions": [version for version, tokens in answer.completion.parts for _ in range(tokens)] or None,
        "prompt": prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False),
        "conversation": transcript(answer.completion.messages) or None,
        "finished": answer.completion.finished,
        "reward": answer.reward,
        "task_reward": answer.task,
    }  # fmt: skip


def _numbers(row: OnPolicyRow) -> dict[str, Any]:
    """Return the columns that an update reads."""
    numbers: dict[str, Any] = {
        "prompt_ids": row.tokens.prompt,
        "response_ids": row.tokens.response,
        "loss_weights": row.tokens.weights,
    }
    if isinstance(row, Experience):
        numbers |= {name: getattr(row, name) for name in PER_TOKEN} | {"trained": row.trained}
        if row.old_routing is not None:
            numbers |= {"routing": row.old_routing.ravel(), "routing_shape": row.old_routing.shape}
    return numbers


def _row(record: dict[str, Any]) -> OnPolicyRow:
    """Return a row of an update from its columns. Its weight is set by each update."""
    weights = record["loss_weights"]
    tokens = Tokens(
        tuple(record["prompt_ids"].tolist()),
        tuple(record["response_ids"].tolist()),
        record["id"],
        None if weights is None else tuple(weights.tolist()),
    )
    if record["kind"] == "demonstration":
        return Demonstration(tokens, 0.0)
    routing = record["routing"]
    shaped = None if routing is None else routing.reshape(record["routing_shape"].tolist())
    return Experience(
        tokens, **{name: record[name] for name in PER_TOKEN}, old_routing=shaped, trained=record["trained"]
    )


def _records(table: pa.Table) -> list[dict[str, Any]]:
    """Return the rows of a table with lists as writable NumPy arrays of their own type."""
    columns = {
        name: [
            None if not value.is_valid else np.array(value.values.to_numpy(zero_copy_only=False))
            if pa.types.is_list(column.type) else value.as_py()
            for value in column
        ]
        for name, column in zip(table.column_names, table.columns, strict=True)
    }  # fmt: skip
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _columns(answers: Sequence[ScoredAnswer]) -> list[str]:
    """Return the names of the columns, in order."""
    sources = sorted(answers[0].sources) if answers else []
    return [
        *(
            "kind",
            "id",
            "group",
            "version",
            "versions",
            "seed",
            "prompt",
            "completion",
            "conversation",
            "finished",
            "reward",
            "task_reward",
        ),
        *(f"reward/{name}" for name in sources),
        *("trained", "prompt_ids", "response_ids", "loss_weights", *PER_TOKEN, "routing", "routing_shape"),
    ]


def _type(name: str) -> pa.DataType:
    """Return the Arrow type of a column."""
    if name in PER_TOKEN:
        return _LIST
    if name in ("prompt_ids", "response_ids", "routing_shape"):
        return pa.list_(pa.int32())
    if name.startswith("reward") or name == "task_reward":
        return pa.float64()
    return {
        "loss_weights": pa.list_(pa.float64()), "routing": pa.list_(pa.int16()), "seed": pa.list_(pa.int64()),
        "versions": pa.list_(pa.int64()),
        "group": pa.int64(), "version": pa.int64(), "finished": pa.bool_(), "trained": pa.bool_(),
    }.get(name, pa.string())  # fmt: skip


def _seeds(answers: Sequence[ScoredAnswer], seed: int) -> list[list[int]]:
    """Return the seed of each answer: the run's, the position of its prompt, and its number within its group."""
    drawn = Counter[int]()
    seeds = []
    for answer in answers:
        seeds.append([seed, answer.group, drawn[answer.group]])
        drawn[answer.group] += 1
    return seeds


def _moved(row: OnPolicyRow) -> float:
    """Return log p / p_ref of a whole answer; NaN if the step did not measure it."""
    assert isinstance(row, Experience)
    return float("nan") if row.ref_logprobs is None else float(np.sum(row.rollout_logprobs - row.ref_logprobs))


def _ranks(values: Sequence[float | None]) -> np.ndarray:
    """Return the rank of each value as a share, with equal ranks for equal values; NaN for a missing value."""
    known = np.array([np.nan if value is None else value for value in values], dtype=float)
    _, inverse, counts = np.unique(known, return_inverse=True, return_counts=True)
    middle = np.cumsum(counts) - (counts + 1) / 2
    return np.where(np.isnan(known), np.nan, middle[inverse] / max(1, len(values)))
