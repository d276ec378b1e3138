"""Every command that a README or quick start shows is run by a test, or marked with its requirement; every link leads somewhere."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from pipelines.commands import plan
from pipelines.commands.configure import configure

ONE_MACHINE = "tests/servers/test_one_machine.py"
PIPELINE = "tests/end_to_end/test_pipeline.py"
HERE = "tests/test_readme.py"
RETRAIN = "tests/flows/test_retrain.py"
VALID = "test_the_changes_that_the_pages_show_are_valid_and_can_be_planned"
COMMANDS = {
    "make demo": (f"{PIPELINE}::test_the_flow_in_another_clone_gives_the_same_lock", "flows.compare"),
    "make ui": (f"{ONE_MACHINE}::test_ui_is_heard_on_loopback_alone", "pipelines.commands.ui"),
    "make serve": (f"{ONE_MACHINE}::test_serve_retrains_and_is_heard_on_loopback_alone", "flows.serve"),
    "make retrain": (f"{RETRAIN}::test_new_data_runs_the_chain_and_no_new_data_stops_at_once", "flows.retrain"),
    "source .venv/bin/activate": ("runs: changes only the caller's shell", ""),
    "mkdir -p inbox/preferences && cp more.jsonl inbox/preferences/more.part"
    " && mv inbox/preferences/more.part inbox/preferences/more.jsonl": (
        "tests/pipelines/commands/test_intake.py::test_bad_files_are_set_aside_with_their_reason_and_never_block_good_ones",
        "",
    ),
    "posttrain configure examples/gsm8k.yaml": (f"{HERE}::{VALID}", ""),
    "posttrain configure algorithms.ppo.options.kl_coefficient=0.1": (f"{HERE}::{VALID}", ""),
    "posttrain configure 'project.seeds=[0, 1, 2, 3, 4]'": (f"{HERE}::{VALID}", ""),
    "posttrain plan": (f"{HERE}::{VALID}", ""),
    "python examples/train_grpo.py": (
        "tests/test_library.py::test_train_grpo_lifts_the_reward_in_under_twenty_lines",
        "",
    ),
    "posttrain chat champion": (
        "tests/pipelines/commands/test_chat.py::test_the_command_reads_lines_and_ends_with_them",
        "",
    ),
    "posttrain lineage champion": (f"{PIPELINE}::test_a_model_leads_to_its_data_and_a_row_to_its_models", ""),
    "dvc repro": (f"{PIPELINE}::test_a_second_repro_runs_no_stage", ""),
    "make test": ("runs: .ci/run", "pytest"),
    "make lint": ("runs: .ci/run", "mypy"),
}
"""A command, the test that runs it (or the requirement that a test lacks), and the module that a make target starts."""
PAGES = ["README.md", "README.zh-CN.md", "docs/tutorial.md", "docs/quickstart.zh-CN.md"]
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


SPEED = {
    "8": ("sft", "rm", "dpo", "grpo"),
    "256": ("", "", "dpo-long", "grpo-long"),
    "16": ("sft-uneven", "", "", "grpo-uneven"),
    "151,936": ("sft-vocabulary", "", "dpo-vocabulary", ""),
    "30": ("sft-30m-bf16", "", "dpo-30m-bf16", "grpo-30m-bf16"),
}
"""Cases of benchmarks/RESULTS.md by the first number of a row of the table of speeds, one a column."""


def text(root: Path, name: str) -> str:
    return (root / name).read_text(encoding="utf-8")


def commands(page: str) -> list[str]:
    """Return the lines of the page's bash blocks, without comments."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    return [line.split("  #")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


@pytest.mark.parametrize("name", PAGES)
def test_every_command_shown_has_a_test_that_runs_it(root: Path, name: str) -> None:
    shown = commands(text(root, name))
    assert shown
    assert [command for command in shown if command not in COMMANDS] == [], "add the command and its test to COMMANDS"


def test_no_command_is_listed_that_no_page_shows_and_every_test_exists(root: Path) -> None:
    shown = {command for name in PAGES for command in commands(text(root, name))}
    assert sorted(set(COMMANDS) - shown) == []
    for by, _ in COMMANDS.values():
        file, _, test = by.partition("::")
        assert by.startswith(("runs: ", "needs: ")) or f"def {test}(" in text(root, file), by


def test_make_starts_the_module_that_the_test_runs(root: Path) -> None:
    targets = {command: module for command, (_, module) in COMMANDS.items() if command.startswith("make ")}
    for command, module in targets.items():
        made = subprocess.run([*shlex.split(command), "-n"], cwd=root, capture_output=True, text=True, check=True)
        assert f"-m {module} " in made.stdout.replace("\n", " ") + " ", command


def test_the_changes_that_the_pages_show_are_valid_and_can_be_planned(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    params = tmp_path / "params.yaml"
    shown = {command for name in PAGES for command in commands(text(root, name)) if "posttrain configure" in command}
    for command in sorted(shown):
        params.write_text(text(root, "params.yaml"), encoding="utf-8")
        assert configure(params, shlex.split(command)[2:]) != [], command
    assert plan.main(["--params", str(params)]) == 0
    assert "dpo" in capsys.readouterr().out


def test_every_link_of_a_readme_leads_to_a_file(root: Path) -> None:
    for name in ("README.md", "README.zh-CN.md", "CONTRIBUTING.md", "SECURITY.md", "AGENTS.md"):
        missing = [to for to in LINK.findall(text(root, name)) if "://" not in to and not (root / to).exists()]
        assert [to for to in missing if to != "docs/security.md"] == [], name


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md", "docs/speed.md"])
def test_the_table_of_speeds_shows_measured_ratios(root: Path, name: str) -> None:
    results = text(root, "benchmarks/RESULTS.md")
    measured = dict(re.findall(r"^\| ([\w-]+) \| [^|]+ s?\| [^|]+ \| ([\d.]+) \|", results, re.MULTILINE))
    _, _, table = text(root, name).partition("| DPO | GRPO |\n|---|---|---|---|---|\n")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.partition("\n\n")[0].splitlines()]
    shown = {re.findall(r"[\d,]+", row[0])[0]: tuple(row[1:]) for row in rows}
    wanted = {
        key: tuple(f"{float(measured[case]):.1f}" if case else "" for case in cases) for key, cases in SPEED.items()
    }
    assert shown == wanted
