"""A study from its file to its verdict: the flow runs the arms in separate workspaces and continues after an interruption."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from tests.end_to_end.conftest import TINY, Clone

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
STUDY = """
question: Does the flow decide a study?
source: "2305.18290"
factor: preset
base: ../../{base}
seeds: [0, 1]
arms:
  dpo: {{algorithm: {{preset: dpo}}}}
  shifted: {{algorithm: {{preset: dpo}}, params: {{data: {{noise: {{flipped: 0.5}}}}}}}}
claims:
  - claim: clean pairs are better
    outcome: evaluation/preference/accuracy
    contrast: {{dpo: 1, shifted: -1}}
"""


def test_a_study_runs_is_decided_and_is_up_to_date_afterwards(new_clone: Callable[[], Clone]) -> None:
    clone = new_clone()
    (clone.root / "examples" / "studies" / "small.yaml").write_text(STUDY.format(base=TINY), encoding="utf-8")
    first = clone.run("flows.study", "small", "--no-tracking")
    result = json.loads((clone.root / "examples" / "studies" / "results" / "small.json").read_text(encoding="utf-8"))
    assert result["verdict"] in ("supported", "contradicted", "undecided")
    assert (result["seeds"], result["prompts"]) == (2, 24)
    assert result["seconds"] > 0
    assert "## small" in (clone.root / "docs" / "claims.md").read_text(encoding="utf-8")
    # the second workspace has the same model and demonstrations: they come from the cache
    assert "sft                      restored from the cache" in first.stdout
    again = clone.run("flows.study", "small", "--no-tracking")
    assert again.stdout.count("nothing to do") == 2
    assert (
        json.loads((clone.root / "examples" / "studies" / "results" / "small.json").read_text(encoding="utf-8"))
        == result
    )
