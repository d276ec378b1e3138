"""The predicted time of a flow: worked out by hand, within Graham's bounds, and from the records of a flow."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.commands.plan import workers_table
from pipelines.config.params import load_params
from pipelines.report.makespan import Work, critical_path, expected_work, schedule
from pipelines.tracking.lockfile import read_lock
from posttrain.errors import DataError


@st.composite
def dags(draw: st.DrawFn) -> dict[str, Work]:
    """Return stages that depend only on earlier ones."""
    work: dict[str, Work] = {}
    for i in range(draw(st.integers(1, 12))):
        after = draw(st.lists(st.sampled_from(sorted(work)), unique=True, max_size=3)) if work else []
        work[f"s{i:02}"] = Work(draw(st.integers(1, 100)), tuple(after))
    return work


@given(dags(), st.integers(1, 6))
def test_a_schedule_is_within_grahams_bounds(work: dict[str, Work], workers: int) -> None:
    total = sum(each.seconds for each in work.values())
    longest = sum(work[name].seconds for name in critical_path(work))
    found = schedule(work, workers)
    assert max(longest, total / workers) - 1e-9 <= found.wall <= total / workers + (1 - 1 / workers) * longest + 1e-9
    assert found.busy == pytest.approx(total / (workers * found.wall))
    assert schedule(work, len(work)).wall == pytest.approx(longest)


def test_two_workers_by_hand() -> None:
    work = {
        "a": Work(3.0, ()), "b": Work(2.0, ()), "c": Work(4.0, ("b",)), "d": Work(1.0, ("a",)), "e": Work(1.0, ("c", "d"))
    }  # fmt: skip
    # worker 1: a 0-3, d 3-4; worker 2: b 0-2, c 2-6; then e 6-7
    assert schedule(work, 2).wall == 7.0
    assert schedule(work, 1).wall == 11.0
    assert critical_path(work) == ["b", "c", "e"]


def test_seeds_that_have_not_run_take_as_long_as_their_algorithms_others(root: Path, tmp_path: Path) -> None:
    params = load_params(root / "params.yaml")
    params.project.algorithms[:] = ["dpo", "grpo"]
    params.project.seeds[:] = [0, 1]
    with pytest.raises(DataError, match="make demo"):
        expected_work(tmp_path, read_lock(tmp_path), params)
    seconds = {"sft": 10, "align@dpo-0": 20, "align@grpo-0": 40, "evaluate_aligned@dpo-0": 5,
               "evaluate_aligned@grpo-0": 7, "compare": 2}  # fmt: skip
    record = {name: {"started": 0, "ended": took, "ran": True} for name, took in seconds.items()}
    (tmp_path / ".posttrain").mkdir()
    (tmp_path / ".posttrain/flow.json").write_text(json.dumps({"started": 0, "ended": 60, "stages": record}))
    stages = ["sft:\n    outs: [{path: models/sft}]"]
    for name in ("dpo-0", "grpo-0"):
        stages.append(f"align@{name}:\n    deps: [{{path: models/sft}}]\n    outs: [{{path: models/align/{name}}}]")
        stages.append(
            f"evaluate_aligned@{name}:\n    deps: [{{path: models/align/{name}}}]\n    outs: [{{path: runs/evaluate/{name}}}]"
        )
    stages.append("compare:\n    deps: [{path: runs/evaluate}]\n    outs: [{path: report}]")
    (tmp_path / "dvc.lock").write_text("schema: '2.0'\nstages:\n  " + "\n  ".join(stages) + "\n")
    work = expected_work(tmp_path, read_lock(tmp_path), params)
    assert work["align@grpo-1"] == Work(40.0, ("sft",))
    assert work["evaluate_aligned@dpo-1"] == Work(5.0, ("align@dpo-1",))
    assert len(work) == 10
    # sft 10; two workers: dpo-0 10-30, dpo-1 10-30, grpo-0 30-70, grpo-1 30-70; evaluations 5, 5, 7, 7: 70-75-82 twice; compare 2
    assert schedule(work, 2).wall == 84.0
    lines = workers_table(work, 2).splitlines()
    assert lines[2].split() == ["1", "2.6", "min", "100%"]
    assert lines[3].split() == ["2", "1.4", "min", "93%"]
    assert lines[4] == (
        "No number of workers takes less than 1.0 min: sft -> align@grpo-0 -> evaluate_aligned@grpo-0 -> compare"
    )
