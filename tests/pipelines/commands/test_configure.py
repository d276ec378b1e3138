"""Changing params.yaml by overlay and by key."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipelines.commands.configure import configure, main
from pipelines.config.params import load_params
from posttrain.algorithms import PRESETS, OnPolicy
from posttrain.errors import ConfigError


@pytest.fixture
def params(root: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(root / "params.yaml", tmp_path))


def test_keys_change_alone_and_comments_stay(params: Path) -> None:
    before = params.read_text()
    assert configure(params, ["sft.batch_size=7", "sft.optimizer.learning_rate=3e-5", "project.seeds=[0, 1]"]) == [
        "project.seeds: [0] -> [0, 1]",
        "sft.batch_size: 64 -> 7",
        "sft.optimizer.learning_rate: 0.002 -> 3e-05",
    ]
    changed = [(a, b) for a, b in zip(before.split("\n"), params.read_text().split("\n"), strict=True) if a != b]
    assert [b for _, b in changed] == [
        "  seeds: [0, 1]",
        "  batch_size: 7",
        "  optimizer: {learning_rate: 3e-5, schedule: cosine, warmup_steps: 20}",
    ]


def test_nothing_changes_nothing(params: Path) -> None:
    before = params.read_bytes()
    assert configure(params, ["sft.batch_size=64"]) == []
    assert params.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("sft.epoch=2", r"sft\.epoch: unknown parameter; did you mean 'epochs'\?"),
        ("sft.epochs=two", r"sft\.epochs = 'two': should be a valid integer"),
        ("sft.epochs=[", "the value is not YAML"),
        ("sft..epochs=1", "write dotted.key=value"),
        ("nowhere.yaml", "cannot read nowhere.yaml"),
        ("evaluation.accuracy=null", r"evaluation\.accuracy: missing"),
    ],
)
def test_what_would_not_be_valid_is_refused_and_not_written(params: Path, change: str, message: str) -> None:
    before = params.read_bytes()
    with pytest.raises(ConfigError, match=message):
        configure(params, ["sft.batch_size=7", change])
    assert params.read_bytes() == before


@pytest.mark.parametrize("name", ["gsm8k", "stories"])
def test_every_shipped_overlay_is_valid_and_says_what_it_changes(root: Path, params: Path, name: str) -> None:
    changes = configure(params, [str(root / "examples" / f"{name}.yaml")])
    assert "model.source: 'tiny' -> '../shared/data/stories260k'" in changes
    assert load_params(params).model.source == "../shared/data/stories260k"
    assert configure(params, [str(root / "examples" / f"{name}.yaml")]) == []


def test_the_overlay_of_all_presets_names_every_one_that_the_slow_tier_measures(root: Path, params: Path) -> None:
    configure(params, [str(root / "examples" / "all_presets.yaml")])
    loaded = load_params(params)
    sampling = {name for name, record in PRESETS.items() if isinstance(record, OnPolicy)}
    assert {loaded.algorithm(name).name for name in loaded.project.algorithms} == sampling | {
        "dpo",
        "dpo_soft",
        "grpo_pairs",
    }
    assert loaded.project.seeds == [0, 1, 2]


def test_every_shipped_overlay_is_tested(root: Path) -> None:
    assert sorted(path.stem for path in (root / "examples").glob("*.yaml")) == ["all_presets", "gsm8k", "stories"]


def test_the_command_checks_without_writing(params: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, epochs = params.read_bytes(), load_params(params).sft.epochs
    assert main(["--check", "--params", str(params), "sft.epochs=99"]) == 0
    assert capsys.readouterr().out == f"sft.epochs: {epochs} -> 99\n"
    assert main(["--params", str(params), "sft.epochs=none"]) == 2
    assert capsys.readouterr().err.startswith("error: params.yaml: sft.epochs = 'none'")
    assert params.read_bytes() == before
