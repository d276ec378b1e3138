"""Checking a table needs no multiple of its text: views hold what the rules read, and no run keeps its frame."""

from __future__ import annotations

import gc
import weakref
from typing import Any

from pipelines.validation import suites
from pipelines.validation.suites import Validator
from pipelines.validation.view import prompts_view, structure_view

ROWS: list[dict[str, Any]] = [
    {"id": i, "prompt": f"{i} " + "word " * 200, "completion": [{"role": "assistant", "content": "word " * 200}]}
    for i in range(50)
]
"""About 2,000 characters a row."""


def test_views_about_whole_tables_hold_no_text() -> None:
    for view in (structure_view(ROWS), prompts_view([("sft", ROWS)])):
        assert view.memory_usage(deep=True, index=False).sum() / len(ROWS) < 60
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
