"""Fixtures of the validation tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.config.params import load_params
from pipelines.config.schema import RuleParams
from pipelines.validation.check import ValidationOutcome, check
from pipelines.validation.suites import TableLimits, Validator
from tests.pipelines.validation.tables import LIMITS, Characters, Checked, Tables


@pytest.fixture
def checked(root: Path) -> Checked:
    """Rows through all rules, under the default policies but for those given."""
    rules = load_params(root / "params.yaml").validation.rules

    def run(tables: Tables, limits: TableLimits = LIMITS, **policies: str) -> ValidationOutcome:
        changed = RuleParams.model_validate(rules.model_dump() | policies)
        validator = Validator()
        return check(tables, changed, limits, Characters(), validator)

    return run
