"""The README's speeds and benchmarks/RESULTS.md are those of the tables that the scripts have written."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SPEED = {
    "8": ("sft", "rm", "dpo", "grpo"),
    "256": ("", "", "dpo-long", "grpo-long"),
    "16": ("sft-uneven", "", "", "grpo-uneven"),
    "151,936": ("sft-vocabulary", "", "dpo-vocabulary", ""),
    "30": ("sft-30m-bf16", "", "dpo-30m-bf16", "grpo-30m-bf16"),
}
"""Cases of benchmarks/training.md by the first number of a row of the table of speeds, one a column."""
ASYNC = ("async", "async-long", "async-2048")
"""Cases of benchmarks/async_grpo.py in the row that names AsyncGRPOTrainer."""
PAGES = ("README.md", "README.zh-CN.md", "docs/speed.md")


def cells(page: Path) -> dict[str, list[str]]:
    """Return the rows of a page's tables, by their first cell."""
    rows = [
        [cell.strip() for cell in line.strip("| ").split("|")]
        for line in page.read_text(encoding="utf-8").splitlines()
        if line.startswith("|")
    ]
    return {row[0]: row[1:] for row in rows}


@pytest.mark.parametrize("page", PAGES)
def test_the_table_of_speeds_shows_measured_ratios(root: Path, page: str) -> None:
    measured = cells(root / "benchmarks" / "training.md")
    _, _, table = (root / page).read_text(encoding="utf-8").partition("| DPO | GRPO |\n|---|---|---|---|---|\n")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.partition("\n\n")[0].splitlines()]
    shown = {re.findall(r"[\d,]+", row[0])[0]: tuple(row[1:]) for row in rows if "AsyncGRPO" not in row[0]}
    assert shown == {
        key: tuple(f"{float(measured[case][2]):.1f}" if case else "" for case in cases) for key, cases in SPEED.items()
    }


@pytest.mark.parametrize("page", PAGES)
def test_the_row_of_async_grpo_shows_ratios_of_processor_time(root: Path, page: str) -> None:
    measured = cells(root / "benchmarks" / "async_grpo.md")
    (shown,) = [row for name, row in cells(root / page).items() if "AsyncGRPOTrainer" in name]
    assert shown == ["", "", "", "/".join(f"{float(measured[case][3]):.1f}" for case in ASYNC)]


@pytest.mark.parametrize("page", PAGES)
def test_the_pages_show_the_measured_log_probabilities(root: Path, page: str) -> None:
    measured = cells(root / "benchmarks" / "logprobs.md")
    speeds = [f"{float(measured[way][1].removesuffix(' x')):.1f}" for way in ("fused", "fused, bf16")]
    parts = [str(int(float(measured[way][5].removeprefix("1/")))) for way in ("fused", "fused, bf16")]
    _, _, text = (root / page).read_text(encoding="utf-8").partition("| 30 M")
    sentence = text.partition("\n\n")[2].partition("\n\n")[0].partition("151,936")[2]
    assert re.findall(r"\d+\.\d|(?<=1/)\d+", sentence) == [*speeds, *parts]


def test_all_results_on_one_page_are_those_of_the_tables(root: Path, tmp_path: Path) -> None:
    for page in (root / "benchmarks").glob("*.md"):
        (tmp_path / page.name).write_bytes(page.read_bytes())
    (tmp_path / "results.py").write_bytes((root / "benchmarks" / "results.py").read_bytes())
    subprocess.run([sys.executable, str(tmp_path / "results.py")], check=True, capture_output=True)
    assert (tmp_path / "RESULTS.md").read_text() == (root / "benchmarks" / "RESULTS.md").read_text()


def test_a_script_that_imports_its_package_finds_it(root: Path) -> None:
    for script in sorted((root / "benchmarks").glob("*.py")):
        text = script.read_text(encoding="utf-8")
        if "__main__" in text and re.search(r"^from benchmarks", text, re.M):
            assert "sys.path.insert(" in text.split("import torch")[0], script.name
