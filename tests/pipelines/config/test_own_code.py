"""Own code: the files behind import paths, and the folder in which DVC sees their edits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipelines.commands.configure import configure
from pipelines.config.own_code import algorithm_code, all_code, code_folder, common_folder, evaluation_code, own_files
from pipelines.config.params import Params, parse_params
from pipelines.config.yaml_files import read_yaml
from posttrain.errors import ConfigError
from posttrain.files import read_json

MODULES = {
    "mine/__init__.py": "",
    "mine/rewards.py": "import json\nfrom mine import words\nfrom .deep.numbers import ten\ndef brevity(prompts, completions, **_): ...\n",
    "mine/words.py": "import numpy\nimport posttrain.text\nfrom helper import *\n",
    "mine/deep/numbers.py": "ten = 10\n",
    "mine/unused.py": "",
    "helper.py": "import mine.rewards\n",
}


@pytest.fixture
def project(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Enter a project with own modules."""
    for name, text in MODULES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "params.yaml").write_bytes((root / "params.yaml").read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def parsed(**changes: Any) -> Params:
    """Return the shipped parameters with a reward of own code that `grpo` trains on."""
    tree = read_yaml("params.yaml")
    tree["rewards"]["brief"] = {"function": "mine.rewards:brevity"}
    tree["algorithms"]["grpo"]["rewards"]["brief"] = 0.1
    for section, values in changes.items():
        tree[section] |= values
    return parse_params(tree)


def test_a_module_brings_the_own_modules_that_it_imports_and_no_installed_one(project: Path) -> None:
    used = ["helper.py", "mine/__init__.py", "mine/deep/numbers.py", "mine/rewards.py", "mine/words.py"]
    assert own_files(["mine.rewards:brevity", "arithmetic", "reasoning_gym:gcd", "json:dumps", "numpy:mean"]) == used
    assert own_files(["mine.deep.numbers:ten"]) == ["mine/__init__.py", "mine/deep/numbers.py"]
    assert own_files(["posttrain.environments.guess:ENVIRONMENT", "absent.module:f"]) == []


def test_only_the_stages_that_import_own_code_depend_on_it(project: Path) -> None:
    params = parsed()
    assert [name for name in params.algorithms if algorithm_code(params, name)] == ["grpo"]
    assert evaluation_code(params) == []
    measured = parsed(evaluation={"rewards": ["answer", "rm", "brief"]})
    assert evaluation_code(measured) == algorithm_code(measured, "grpo") == all_code(measured)


@pytest.mark.parametrize(
    ("files", "folder"),
    [
        (["mine/rewards.py"], "mine"),
        (["mine/__init__.py", "mine/deep/numbers.py"], "mine"),
        (["one.py"], "one.py"),
        (["one.py", "mine/rewards.py"], None),
        (["a/b/c.py", "a/b/d/e.py"], "a/b"),
    ],
)
def test_the_folder_is_the_smallest_that_holds_all(files: list[str], folder: str | None) -> None:
    assert common_folder(files) == folder


def test_configure_names_the_folder_or_refuses_code_in_the_root(project: Path) -> None:
    reward = "rewards.brief.function=mine.rewards:brevity"
    weight = "algorithms.grpo.rewards.brief=0.1"
    with pytest.raises(ConfigError, match="Move your modules into one folder"):
        configure(project / "params.yaml", [reward, weight])
    (project / "mine/words.py").write_text("")
    assert "project.code: 'posttrain/environments' -> 'mine'" in configure(project / "params.yaml", [reward, weight])
    assert code_folder(parse_params(read_yaml("params.yaml"))) is None
    assert configure(project / "params.yaml", ["sft.epochs=7"]) == ["sft.epochs: 6 -> 7"]


def test_the_records_name_the_code_and_an_uncovered_module_is_refused(project: Path, root: Path) -> None:
    (project / "mine/words.py").write_text("")
    (project / "models/reward").mkdir(parents=True)
    (project / "models/reward/config.json").write_text("{}")
    configure(
        project / "params.yaml", ["rewards.brief.function=mine.rewards:brevity", "algorithms.grpo.rewards.brief=0.1"]
    )

    def records() -> dict[str, Any]:
        folder = project / "runs/reward_readers/artifacts/algorithms"
        return {path.stem: read_json(path, "") for path in sorted(folder.iterdir())}

    def step() -> subprocess.CompletedProcess[str]:
        env = os.environ | {"PYTHONPATH": str(root), "POSTTRAIN_FOLLOWER": "1"}
        command = [sys.executable, "-m", "pipelines.reward_readers"]
        return subprocess.run(command, cwd=project, env=env, capture_output=True, text=True, timeout=120, check=False)

    done = step()
    assert done.returncode == 0, done.stderr
    before = records()
    assert sorted(before["grpo"]["code"]) == [
        "mine/__init__.py",
        "mine/deep/numbers.py",
        "mine/rewards.py",
        "mine/words.py",
    ]
    (project / "mine/deep/numbers.py").write_text("ten = 11\n")
    assert step().returncode == 0
    after = records()
    assert {name for name in after if after[name] != before[name]} == {"grpo"}
    params = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(params.replace("code: mine ", "code: posttrain/environments "))
    refused = step()
    assert refused.returncode != 0
    assert "mine/__init__.py is own code outside of it, so DVC would not see an edit" in refused.stderr
    assert "Type: posttrain configure project.code=mine" in refused.stderr
