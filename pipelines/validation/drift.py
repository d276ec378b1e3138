"""Rules about the drift of arriving rows: each measured index must not exceed its limit."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pandas as pd
from great_expectations.expectations.core.expect_column_pair_values_a_to_be_greater_than_b import (
    ExpectColumnPairValuesAToBeGreaterThanB,
)

from pipelines.validation.suites import Validator
from pipelines.validation.view import POSITION
from posttrain.errors import DataError


def exceeded(measures: Mapping[str, tuple[float, float]]) -> list[str]:
    """Return the names of the measures that exceed their limits, in their order.

    Args:
        measures: value and limit by name.

    Raises:
        DataError: a rule could not be checked, or a value is NaN, which every rule would pass.

    Example:
        >>> exceeded({"length_psi": (0.3, 0.25), "new_words": (0.1, 0.1)})
        ['length_psi']
    """
    unknown = [name for name, (value, _) in measures.items() if math.isnan(value)]
    if unknown:
        raise DataError(f"the drift of arriving rows could not be measured: {', '.join(unknown)} is not a number")
    columns = {name: [value] for name, (value, _) in measures.items()}
    limits = {_limit(name): [limit] for name, (_, limit) in measures.items()}
    frame = pd.DataFrame({POSITION: [0], **columns, **limits}).astype(dict.fromkeys((*columns, *limits), float))
    suite = [
        ExpectColumnPairValuesAToBeGreaterThanB(
            column_A=_limit(name), column_B=name, or_equal=True, meta={"rule": "drift", "column": name}
        )
        for name in measures
    ]
    findings = Validator().run("arriving", "drift", frame, suite)
    broken = [finding for finding in findings if finding.status == "errored"]
    if broken:
        raise DataError(f"the drift of arriving rows could not be checked: {broken[0].column}: {broken[0].detail}")
    failed = {finding.column for finding in findings if finding.status == "failed"}
    return [name for name in measures if name in failed]


def _limit(name: str) -> str:
    return f"{name} limit"
