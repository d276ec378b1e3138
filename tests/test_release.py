"""The files that a release and a public host need: version, license, citation, templates and workflow."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import yaml

from posttrain import __version__


def project(root: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return loaded


def test_the_version_is_written_once_and_the_changelog_agrees(root: Path) -> None:
    changelog = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    first = next(line for line in changelog.splitlines() if line.startswith("## ["))
    assert first.startswith(f"## [{__version__}] - ")
    assert project(root)["dynamic"] == ["version"]
    assert "version" not in project(root)


def test_the_license_is_apache_2_and_goes_into_the_wheel(root: Path) -> None:
    text = (root / "LICENSE").read_text(encoding="utf-8")
    assert text.split()[:4] == ["Apache", "License", "Version", "2.0,"]
    assert "END OF TERMS AND CONDITIONS" in text
    assert project(root)["license"] == "Apache-2.0"
    assert project(root)["license-files"] == ["LICENSE"]
    assert yaml.safe_load((root / "CITATION.cff").read_text(encoding="utf-8"))["license"] == "Apache-2.0"


def test_the_workflow_of_the_public_host_calls_the_project_s_own_gate(root: Path) -> None:
    workflow = yaml.safe_load((root / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    steps = workflow["jobs"]["gate"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == [".ci/run"]
    assert (root / ".ci" / "run").stat().st_mode & 0o100


def test_the_weekly_job_runs_the_twenty_kills_and_not_the_gate(root: Path) -> None:
    workflow = yaml.safe_load((root / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    schedule = workflow[True]["schedule"]  # YAML reads the key `on` as true
    assert [entry["cron"].split()[2:] for entry in schedule] == [["*", "*", "0"]]
    gate, kills = workflow["jobs"]["gate"], workflow["jobs"]["kills"]
    assert (gate["if"], kills["if"].split(" || ")[0]) == (
        "github.event_name != 'schedule'",
        "github.event_name == 'schedule'",
    )
    *_, test = [step["run"] for step in kills["steps"] if "run" in step]
    target, argument = test.removeprefix("make ").split()
    makefile = (root / "Makefile").read_text(encoding="utf-8")
    assert f"\n{target}: setup  ##" in makefile
    assert "def test_twenty_kills_change_nothing" in (root / argument.removeprefix("ARGS=")).read_text(encoding="utf-8")


def test_issue_templates_and_hooks_are_well_formed(root: Path) -> None:
    for path in sorted((root / ".github" / "ISSUE_TEMPLATE").glob("*.yml")):
        form = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert {"name", "description", "body"} <= set(form), path.name
        assert all(field["type"] in {"textarea", "input", "markdown"} for field in form["body"])
    hooks = yaml.safe_load((root / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert [hook["id"] for repo in hooks["repos"] for hook in repo["hooks"]] == ["format", "lint", "types"]


def test_the_map_names_folders_and_files_that_exist(root: Path) -> None:
    rows = [line for line in (root / "AGENTS.md").read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    named = [name for row in rows for name in row.split("|")[1].replace("`", "").replace(",", " ").split()]
    assert len(named) > 15
    assert [name for name in named if not (root / name).exists()] == []
