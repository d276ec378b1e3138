"""Seeds are added to params.yaml, never removed, and a second look is named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipelines.commands.configure import configure
from pipelines.commands.seeds import more, raise_seeds
from pipelines.config.params import load_params
from pipelines.runtime.comparison import COMPARISON


@pytest.fixture
def project(root: Path, tmp_path: Path) -> Path:
    shutil.copy(root / "params.yaml", tmp_path / "params.yaml")
    return tmp_path


def seeds(project: Path) -> list[int]:
    return load_params(project / "params.yaml").project.seeds


def test_gaps_are_filled_and_the_given_seeds_stay_first() -> None:
    assert more([7, 1], 5) == [7, 1, 0, 2, 3]
    assert more([], 2) == [0, 1]


def test_seeds_are_added_once(project: Path) -> None:
    (line,) = raise_seeds(project, 3)
    assert line == "seeds: [1, 2] are added to params.yaml; runs of [0] stay as they are"
    assert seeds(project) == [0, 1, 2]
    written = (project / "params.yaml").read_bytes()
    assert raise_seeds(project, 2) == ["seeds: params.yaml has 3 of them, [0, 1, 2]; none is added"]
    assert (project / "params.yaml").read_bytes() == written


def test_a_second_look_is_named_with_its_level(project: Path) -> None:
    (project / COMPARISON).parent.mkdir()
    (project / COMPARISON).write_text("{}")
    assert "hold for one look only" in raise_seeds(project, 2)[1]
    configure(project / "params.yaml", ["report.looks=5"])
    # 1 - .05 / 5
    assert "intervals of 99.00%" in raise_seeds(project, 3)[1]
    configure(project / "params.yaml", ["report.looks=always"])
    # 1 - .05 / 12
    assert "report.looks = always, so 4 seeds have intervals of 99.5833%" in raise_seeds(project, 4)[1]
