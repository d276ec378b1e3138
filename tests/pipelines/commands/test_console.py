"""The console script: one line for every command and step, the nearest name, and the old module names."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.commands.console import COMMANDS, RENAMED, STEPS, main, module, overview
from pipelines.config.yaml_files import read_yaml


def run(root: Path, *command: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(root)}
    return subprocess.run([sys.executable, *command], cwd=root, env=env, capture_output=True, text=True, check=False)


def test_every_step_and_every_command_has_a_name(root: Path) -> None:
    assert set(STEPS) == {path.stem for path in (root / "pipelines").glob("[a-z]*.py")}
    used = {
        stage["cmd"].split()[2].removeprefix("pipelines.") for stage in read_yaml(root / "dvc.yaml")["stages"].values()
    }
    assert used <= set(STEPS)
    with_main = {p.stem for p in (root / "pipelines/commands").glob("*.py") if "\ndef main(" in p.read_text()}
    assert set(COMMANDS) == with_main - {"console"}
    assert {path.stem for path in (root / "pipelines/aliases").glob("*.py")} == {*RENAMED, "__init__"}


def test_help_lists_each_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert capsys.readouterr().out.strip() == overview()
    lines = {line.split()[0]: line for line in overview().splitlines() if line.startswith("  ")}
    assert list(lines) == [*COMMANDS, *STEPS]
    assert all(len(line.split()) > 3 for line in lines.values())


def test_an_unknown_name_gets_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plam"]) == 2
    assert "posttrain has no command 'plam'; did you mean 'plan'? Valid: align, " in capsys.readouterr().err
    assert main([]) == 2


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_runs_by_its_name(root: Path, name: str) -> None:
    done = run(root, "-m", "pipelines.commands", name, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: posttrain {name}")


@pytest.mark.parametrize("name", RENAMED)
def test_a_command_runs_by_its_old_module_which_names_the_new_one(root: Path, name: str) -> None:
    old = run(root, "-m", f"pipelines.{name}", "--help")
    assert old.returncode == 0, old.stderr
    assert old.stdout.startswith(f"usage: posttrain {name}")
    assert old.stderr.splitlines()[0] == f"python -m pipelines.{name} is now called: posttrain {name}"


def test_a_step_runs_by_its_name(root: Path, tmp_path: Path) -> None:
    by_name = run(root, "-m", "pipelines.commands", "align", "--help").stdout
    by_module = run(root, "-m", module("align"), "--help").stdout
    # each help shows the command that was typed, in the usage as in the example
    assert by_name.startswith("usage: posttrain align [-h]")
    assert "    posttrain align --algorithm grpo --seed 0" in by_name
    assert "python -m" not in by_name
    assert by_module.startswith("usage: python -m pipelines.align [-h]")
    assert "    python -m pipelines.align --algorithm grpo --seed 0" in by_module
    failed = run(
        root,
        "-m",
        "pipelines.commands",
        "align",
        "--algorithm",
        "grpo",
        "--seed",
        "0",
        "--params",
        str(tmp_path / "none"),
    )
    assert failed.returncode != 0
    assert failed.stderr.startswith("error: ")
    assert "Traceback" not in failed.stderr


def test_the_installed_script_is_this_one(root: Path) -> None:
    assert 'posttrain = "pipelines.commands.console:main"' in (root / "pyproject.toml").read_text(encoding="utf-8")
