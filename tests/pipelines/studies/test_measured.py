"""A study reads seconds and memory of its runs, and seconds to a level; numbers by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.config.yaml_files import read_yaml
from pipelines.report.load import training
from pipelines.runtime.context import MEASUREMENTS
from pipelines.studies.measured import measured, reaches
from pipelines.studies.results import judge
from pipelines.studies.study import Study
from pipelines.studies.workspace import Workspace
from posttrain.errors import DataError
from tests.pipelines.synthetic_runs import build

STEPS = 12


def record(folder: Path, name: str, seconds: float, memory: float, steps: list[float]) -> None:
    """Write the measurements of a run that worked for `seconds` from second 100 on."""
    place = folder / ".posttrain" / "runs" / f"{name}-{'0' * 16}"
    place.mkdir(parents=True)
    lines: list[dict[str, Any]] = [{"kind": "start", "time": 1.0}, {"kind": "ready", "time": 100.0}]
    lines += [{"kind": "timings", "time": 100.0, "values": {"seconds/step": own}} for own in steps]
    lines += [{"kind": "timings", "time": 100.0, "values": {"memory/peak_mib": memory}}]
    lines += [{"kind": "end", "time": 100.0 + seconds}]
    (place / MEASUREMENTS).write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def space(tmp_path: Path, root: Path) -> Workspace:
    folder = build(tmp_path / "home", algorithms=("dpo", "ppo"), seeds=(0, 1), steps=STEPS, prompts=20)
    params = read_yaml(root / "params.yaml")
    params["algorithms"]["ppo"]["rewards"] = {"answer": 0.0, "rm": 1.0}
    record(folder, "reward", 6.0, 500.0, [])
    for seed in (0, 1):
        record(folder, f"align-dpo-{seed}", 2.5 + seed, 510.0, [])
        record(folder, f"align-ppo-{seed}", 20.0 + seed, 530.0 + seed, [1.5] * STEPS)
    return Workspace(folder, ("dpo", "ppo"), params)


def test_seconds_and_memory_are_those_of_the_training(space: Workspace) -> None:
    assert measured(space.folder, "ppo", 1, "seconds", space.params, None) == 21.0
    assert measured(space.folder, "ppo", 1, "memory_mib", space.params, None) == 531.0
    with pytest.raises(DataError, match="no such measurement; did you mean 'seconds'"):
        measured(space.folder, "ppo", 1, "second", space.params, None)


def test_seconds_to_a_level_count_the_reward_model_and_no_later_steps(space: Workspace) -> None:
    rewards = training(space.folder / "runs/align/ppo-0", "ppo").curves["reward/answer/mean"][1]
    windows = [float(rewards[i : i + 5].mean()) for i in range(STEPS - 4)]
    level = sorted(windows)[len(windows) // 2]
    later = STEPS - (next(i for i, mean in enumerate(windows) if mean >= level) + 5)
    assert later > 0
    # 20 seconds without those of later steps, and 6 of the reward model
    found = measured(space.folder, "ppo", 0, "seconds_to_level", space.params, level)
    assert found == pytest.approx(20.0 - 1.5 * later + 6.0)
    # DPO samples nothing and reads no reward model
    assert measured(space.folder, "dpo", 1, "seconds_to_level", space.params, 0.01) == 3.5
    with pytest.raises(DataError, match="the true reward never reached the study's level 2"):
        measured(space.folder, "ppo", 0, "seconds_to_level", space.params, 2.0)
    with pytest.raises(DataError, match="below the study's level 2"):
        measured(space.folder, "dpo", 0, "seconds_to_level", space.params, 2.0)
    with pytest.raises(DataError, match="the study has no `level`"):
        measured(space.folder, "ppo", 0, "seconds_to_level", space.params, None)


def test_a_restored_run_has_no_measurements(space: Workspace) -> None:
    with pytest.raises(DataError, match="align-ppo-7 has no measurements on this machine: it was restored"):
        measured(space.folder, "ppo", 7, "seconds", space.params, None)


def test_the_level_is_reached_by_five_steps_together() -> None:
    assert reaches(np.array([1.0, 0, 0, 0, 0, 0]), 0.2) == 5
    assert reaches(np.array([0, 0, 0, 0, 0, 1.0]), 0.2) == 6
    assert reaches(np.array([1.0, 1.0, 1.0, 1.0]), 0.2) is None


def test_a_study_may_claim_and_show_them(space: Workspace) -> None:
    study = Study.model_validate(
        {
            "question": "Faster?", "source": "2305.18290", "factor": "algorithm", "seeds": [0, 1], "level": 0.01,
            "arms": {"dpo": {"algorithm": {"preset": "dpo"}}, "ppo": {"algorithm": {"preset": "ppo"}}},
            "claims": [
                {"claim": "ppo takes longer", "outcome": "measured/seconds_to_level", "contrast": {"ppo": 1, "dpo": -1}}
            ],
            "shown": ["measured/memory_mib"],
        }
    )  # fmt: skip
    result = judge("faster", study, [space])
    # to 1 %: after five steps, 20 - 7 x 1.5 + 6 and a second more; DPO 2.5 and 3.5
    assert result.claims[0].value == pytest.approx(16.0 - 3.0)
    assert result.arms["ppo"]["measured/memory_mib"] == 530.5
    assert "measured/memory_mib" not in result.arms["sft"]
    assert study.digest != study.model_copy(update={"level": 0.02}).digest
