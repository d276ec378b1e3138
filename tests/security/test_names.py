"""Names of params.yaml never reach a shell as text, whichever command starts the DAG."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from dvc.exceptions import DvcException
from dvc.repo import Repo
from ruamel.yaml import YAML

from pipelines.commands.configure import main as check
from pipelines.config.params import load_params
from posttrain.errors import ConfigError, OrchestrationError
from tasks.dag import read_dag
from tests.end_to_end.conftest import Clone, new_clone  # noqa: F401  (a fixture)

HOSTILE = [
    "x; touch pwned; $(touch pwned) `touch pwned` | touch pwned & touch pwned #",
    "x'; touch pwned; '\ntouch pwned\n",
]


@pytest.fixture(scope="module")
def clone(new_clone: Callable[[], Clone]) -> Clone:  # noqa: F811
    """A clone in which the inputs of the matrix stages are there, so that DVC gets as far as their commands."""
    made = new_clone()
    for table in ("sft", "preferences", "problems", "evaluation", "preferences_heldout", "labelled"):
        (made.root / "data/valid").mkdir(parents=True, exist_ok=True)
        (made.root / f"data/valid/{table}.parquet").touch()
    for folder in ("base", "sft", "reward"):
        (made.root / "models" / folder).mkdir(parents=True)
        (made.root / "models" / folder / "config.json").touch()
    (made.root / "runs/reward_readers/artifacts/algorithms").mkdir(parents=True)
    (made.root / "runs/reward_readers/artifacts/evaluation.json").touch()
    return made


def edit(clone: Clone, name: str, seed: object) -> None:
    """Write the names into params.yaml by hand, past the command that checks them."""
    path = clone.root / "params.yaml"
    tree = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    tree["project"] |= {"algorithms": [name], "seeds": [seed]}
    tree["algorithms"] = {name: {"preset": "dpo"}}
    path.write_text(json.dumps(tree), encoding="utf-8")


@pytest.mark.parametrize(
    ("stage", "name"), [("align", HOSTILE[0]), ("align", HOSTILE[1]), ("evaluate_aligned", HOSTILE[1])]
)
def test_a_name_is_one_argument_of_its_command_under_dvc(clone: Clone, stage: str, name: str) -> None:
    edit(clone, name, 0)
    (clone.root / "models" / "align" / f"{name}-0").mkdir(parents=True, exist_ok=True)
    (clone.root / "runs/reward_readers/artifacts/algorithms" / f"{name}.json").touch()
    done = clone.run("dvc", "repro", "--single-item", f"{stage}@{name}-0", check=False)
    assert done.returncode != 0
    assert f"Running stage '{stage}@" in done.stdout
    assert not list(clone.root.glob("pwned*"))


def test_a_seed_is_one_argument_too(clone: Clone) -> None:
    edit(clone, "dpo", "0; touch pwned")
    (clone.root / "runs/reward_readers/artifacts/algorithms/dpo.json").touch()
    done = clone.run("dvc", "repro", "--single-item", "align@dpo-0; touch pwned", check=False)
    assert "argument --seed: '0; touch pwned' is no whole number" in done.stderr
    assert not list(clone.root.glob("pwned*"))


def test_plain_dvc_repro_names_the_parameter(clone: Clone) -> None:
    edit(clone, "x; touch pwned", 0)
    done = clone.run("dvc", "repro", check=False)
    assert "project.algorithms.0 = 'x; touch pwned'" in done.stderr
    assert not list(clone.root.glob("pwned*"))


@pytest.mark.parametrize(("name", "seed"), [(HOSTILE[0], 0), ("dpo", "/../../../docs"), ("dpo", "0; touch pwned")])
def test_a_flow_refuses_before_it_starts_a_stage(clone: Clone, name: str, seed: object) -> None:
    """DVC deletes a stage's outputs before its command: a seed must never become a path."""
    edit(clone, name, seed)
    with pytest.raises(OrchestrationError, match=r"Use letters, digits and _ in project\.algorithms"):
        read_dag(clone.root)
    assert (clone.root / "docs").is_dir()


@pytest.mark.parametrize(
    "path", ["../outside", "mine", "data/mine", "posttrain", ".", "docs", ".git", "models/mine", "models/base"]
)
def test_dvc_itself_refuses_a_seed_that_leads_out_of_the_models_of_align(clone: Clone, path: str) -> None:
    """A stage's outputs in models/ and runs/ would overlap, or .dvcignore excludes the path: the DAG is refused as a whole."""
    edit(clone, "dpo", f"/../../../{path}")
    with Repo(str(clone.root)) as repo, pytest.raises(DvcException, match=r"overlap|is ignored by|is specified in"):
        _ = repo.index.graph


@pytest.mark.parametrize(
    ("command", "path"),
    [("repro", "../outside"), ("checkout --force", "models/mine"), ("repro --single-item {stage}", "docs")],
)
def test_no_dvc_command_deletes_the_folder_that_a_seed_names(clone: Clone, command: str, path: str) -> None:
    seed = f"/../../../{path}"
    edit(clone, "dpo", seed)
    (clone.root / path).mkdir(parents=True, exist_ok=True)
    (clone.root / path / "precious").touch()
    done = clone.run("dvc", *command.format(stage=f"align@dpo-{seed}").split(), check=False)
    assert done.returncode != 0
    assert "Running stage" not in done.stdout
    assert (clone.root / path / "precious").is_file()


@pytest.mark.parametrize("seed", ["/../../../docs", "../../docs", "0; touch pwned", "$(touch pwned)", -1, 1.5, True])
def test_the_loader_refuses_a_seed_that_could_be_a_path_or_a_command(
    seed: object, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`posttrain configure --check` and every step read params.yaml by this loader; flows check the names in the DAG as well."""
    tree = YAML(typ="safe").load((root / "params.yaml").read_text(encoding="utf-8"))
    tree["project"] |= {"seeds": [seed]}
    path = tmp_path / "params.yaml"
    path.write_text(json.dumps(tree), encoding="utf-8")
    assert check(["--check", "--absent", "--params", str(path)]) == 2
    assert "project.seeds" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"project\.seeds"):
        load_params(path)
