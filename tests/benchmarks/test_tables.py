"""The README's speeds and benchmarks/RESULTS.md are those of the tables that the scripts have written."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

CASES = {
    "GRPO, 256-token prompts x 8 answers": ("grpo-long",),
    "GRPO's update on given answers of 16 to 512 tokens; SFT on such": ("grpo-uneven", "sft-uneven"),
    "DPO with 256-token prompts; with 8-token prompts": ("dpo-long", "dpo"),
    "reward model; SFT; GRPO with 8-token prompts": ("rm", "sft", "grpo"),
    "a vocabulary of 151,936: SFT, DPO": ("sft-vocabulary", "dpo-vocabulary"),
    "a 30 M model in bf16: SFT, DPO, GRPO": ("sft-30m-bf16", "dpo-30m-bf16", "grpo-30m-bf16"),
}
"""A row of the README's table, and the cases of benchmarks/training.md whose ratios it shows."""
HEAD = "log-probabilities at a vocabulary of 151,936, against the whole table"


def cells(page: Path) -> dict[str, list[str]]:
    """Return the rows of a page's tables, by their first cell."""
    rows = [
        [cell.strip() for cell in line.strip("| ").split("|")]
        for line in page.read_text(encoding="utf-8").splitlines()
        if line.startswith("|")
    ]
    return {row[0]: row[1:] for row in rows}


def test_the_readme_shows_the_measured_speeds(root: Path) -> None:
    shown, measured = cells(root / "README.md"), cells(root / "benchmarks" / "training.md")
    for row, cases in CASES.items():
        assert re.findall(r"[\d.]+", shown[row][0]) == [f"{float(measured[case][2]):.1f}" for case in cases], row


def test_the_readme_shows_the_measured_log_probabilities(root: Path) -> None:
    shown, measured = cells(root / "README.md"), cells(root / "benchmarks" / "logprobs.md")
    speeds = [f"{float(measured[way][1].removesuffix(' x')):.1f}" for way in ("fused", "fused, bf16")]
    parts = [str(int(float(measured[way][5].removeprefix("1/")))) for way in ("fused", "fused, bf16")]
    assert shown[HEAD] == [f"{speeds[0]} (bf16 {speeds[1]}), in 1/{parts[0]} (1/{parts[1]}) of the memory"]


def test_all_results_on_one_page_are_those_of_the_tables(root: Path, tmp_path: Path) -> None:
    for page in (root / "benchmarks").glob("*.md"):
        (tmp_path / page.name).write_bytes(page.read_bytes())
    (tmp_path / "results.py").write_bytes((root / "benchmarks" / "results.py").read_bytes())
    subprocess.run([sys.executable, str(tmp_path / "results.py")], check=True, capture_output=True)
    assert (tmp_path / "RESULTS.md").read_text() == (root / "benchmarks" / "RESULTS.md").read_text()


def test_a_script_that_imports_its_package_finds_it(root: Path) -> None:
    for script in sorted((root / "benchmarks").glob("*.py")):
        before_torch = script.read_text(encoding="utf-8").split("import torch")[0]
        if re.search(r"^from benchmarks", script.read_text(encoding="utf-8"), re.M):
            assert "sys.path.insert(" in before_torch, script.name
