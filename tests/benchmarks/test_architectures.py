"""Every causal architecture of transformers agrees with transformers, or is refused by name; docs/models.md is the table."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from benchmarks.architectures import LIMIT, Row, line, measured, page


def test_a_language_model_of_a_composite_family_agrees_in_everything() -> None:
    row = measured("qwen3_5_moe_text")
    assert isinstance(row, Row)
    assert {name: isinstance(cell, float) and cell <= LIMIT for name, cell in row.cells.items()} == dict.fromkeys(
        row.cells, True
    )


def test_attention_to_compressed_keys_keeps_the_mask_of_its_own_implementation() -> None:
    """DeepSeek-V4 adds a bias to the mask; a boolean mask would turn it around beyond the first compressed key."""
    row = measured("deepseek_v4")
    assert isinstance(row, Row)
    assert row.agrees, (line(row), row.faults)


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_an_architecture_agrees_or_is_refused(kind: str) -> None:
    row = measured(kind)
    if isinstance(row, Row):
        assert row.agrees, (line(row), row.faults)


def test_the_page_counts_its_rows() -> None:
    whole = Row(
        "a",
        cells=dict.fromkeys(("log-probabilities", "samples", "scores", "merged adapter", "checkpointing", "plan"), 0.0),
    )
    part = Row("b", cells=whole.cells | {"scores": "no such head"})
    wrong = Row("c", cells=whole.cells | {"plan": 2.0})
    text = page([whole, part, wrong, Row("d", refused="not causal"), "e: not tried"])
    assert (
        "4 architectures were tried: 1 agree in everything, 1 agree and are refused in a part, 1 are refused, 1 differ."
        in text
    )
    assert "| `c` **differs** |" in text
    assert "* `b`, scores: no such head" in text


def test_the_table_holds_at_least_sixty_architectures_and_none_differs(root: Path) -> None:
    text = (root / "docs" / "models.md").read_text(encoding="utf-8")
    counts = re.search(r"(\d+) architectures were tried: (\d+) agree in everything.* (\d+) differ\.", text)
    assert counts
    assert int(counts[1]) == text.count("\n| `") >= 60
    assert int(counts[2]) >= 60
    assert int(counts[3]) == 0
    assert "differs" not in text
