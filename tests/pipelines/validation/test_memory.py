"""Checking a table needs no multiple of its text: views hold the columns that the rules read, and no run keeps its frame."""

from __future__ import annotations

import gc
import json
import tracemalloc
import weakref
from pathlib import Path
from typing import Any

import pytest

from benchmarks import intake
from pipelines.config.params import load_params
from pipelines.data.packed import packed
from pipelines.data.sources import file_rows, numbered
from pipelines.validation import suites
from pipelines.validation.check import check
from pipelines.validation.suites import TableLimits, Validator
from pipelines.validation.view import content_view, prompts_view, structure_view

ROWS: list[dict[str, Any]] = [
    {"id": i, "prompt": f"{i} " + "word " * 200, "completion": [{"role": "assistant", "content": "word " * 200}]}
    for i in range(50)
]
"""About 2,000 characters a row."""


class Lengths:
    """Token counts of no model."""

    def prompt(self, row: dict[str, Any]) -> int:
        return 1

    def pair(self, row: dict[str, Any], column: str) -> tuple[int, int]:
        return 1, 1

    def unknown(self, row: dict[str, Any]) -> float:
        return 0.0


def test_no_view_holds_text() -> None:
    plain = [row | {"completion": "word " * 200} for row in ROWS]
    for view in (structure_view(ROWS), prompts_view([("sft", ROWS)]), content_view("sft", plain, Lengths())):
        assert view.memory_usage(deep=True, index=False).sum() / len(ROWS) < 100
    assert list(structure_view(ROWS).columns) == ["id", "prompt", "completion"]


def test_a_run_keeps_no_frame() -> None:
    validator = Validator()
    frame = structure_view(ROWS)
    kept = weakref.ref(frame)
    (count, missing) = validator.run("sft", "structure", frame, suites.structure(["other"]))
    assert (count.status, missing.status) == ("passed", "failed")
    del frame
    gc.collect()
    assert kept() is None


def test_reading_and_checking_short_rows_needs_at_most_two_and_a_half_times_their_size(
    root: Path, tmp_path: Path
) -> None:
    """Records are forgotten as rows are made of them, and rows are packed: dictionaries would need three times the file."""
    params = load_params(root / "params.yaml")
    path, limits = tmp_path / "pairs.jsonl", TableLimits(10, 10, "number")

    def peak_and_size(count: int) -> tuple[int, int]:
        texts = (f"{i} ".ljust(35, "w") for i in range(count))
        lines = (json.dumps({"prompt": text, "chosen": "yes " + text, "rejected": "no " + text}) for text in texts)
        path.write_text("\n".join(lines) + "\n")
        gc.collect()
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        rows = packed(numbered(file_rows("preferences", params.data, path)))
        outcome = check({"preferences": rows}, params.validation.rules, limits, Lengths(), Validator())
        assert len(outcome.kept["preferences"]) == count
        return tracemalloc.get_traced_memory()[1] - before, path.stat().st_size

    usual = gc.get_threshold()
    gc.set_threshold(700, 10, 10)  # as in the intake; the tests' own threshold lets garbage wait for longer
    tracemalloc.start()
    try:
        peak_and_size(20)  # the libraries' own memory
        (less, small), (more, large) = peak_and_size(500), peak_and_size(3500)
    finally:
        tracemalloc.stop()
        gc.set_threshold(*usual)
    assert (more - less) / (large - small) < 2.5


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("table", intake.TEXTS)
def test_the_intake_of_a_large_file_of_short_rows_needs_at_most_four_times_its_size(table: str) -> None:
    """Resident memory of the command besides that of the same command with 50 rows."""
    base, _, _ = intake.measured(table, 160, 50)
    peak, size, _ = intake.measured(table, 160, 125_000)
    assert (peak - base) / size < 4
