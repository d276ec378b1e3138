"""Define the expectations that Great Expectations lacks. Importing this module registers them and imports Great Expectations."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import pandas as pd
from great_expectations.core.metric_domain_types import MetricDomainTypes
from great_expectations.execution_engine.pandas_execution_engine import PandasExecutionEngine
from great_expectations.expectations.expectation import BatchExpectation, ColumnMapExpectation, ColumnPairMapExpectation
from great_expectations.expectations.metrics.map_metric_provider.column_condition_partial import (
    column_condition_partial,
)
from great_expectations.expectations.metrics.map_metric_provider.column_map_metric_provider import (
    ColumnMapMetricProvider,
)
from great_expectations.expectations.metrics.map_metric_provider.column_pair_condition_partial import (
    column_pair_condition_partial,
)
from great_expectations.expectations.metrics.map_metric_provider.column_pair_map_metric_provider import (
    ColumnPairMapMetricProvider,
)
from great_expectations.expectations.metrics.metric_provider import metric_value
from great_expectations.expectations.metrics.table_metric_provider import TableMetricProvider

from pipelines.validation.gold import is_choice, is_number
from posttrain.environments.arithmetic import answer_value
from posttrain.environments.expressions import expression_value


class NotBlank(ColumnMapMetricProvider):
    """Metric: the text has a character other than white space."""

    condition_metric_name = "column_values.not_blank"
    filter_column_isnull = False

    @column_condition_partial(engine=PandasExecutionEngine)
    def _pandas(cls, column: pd.Series[Any], **_: Any) -> pd.Series[bool]:
        return column.fillna("").str.strip() != ""


class ExpectColumnValuesToNotBeBlank(ColumnMapExpectation):
    """Expect text with a character other than white space."""

    map_metric: ClassVar[str] = "column_values.not_blank"


class FirstOccurrence(ColumnMapMetricProvider):
    """Metric: no earlier row has the same value."""

    condition_metric_name = "column_values.first_occurrence"

    @column_condition_partial(engine=PandasExecutionEngine)
    def _pandas(cls, column: pd.Series[Any], **_: Any) -> pd.Series[bool]:
        return ~column.duplicated(keep="first")


class ExpectColumnValuesToBeFirstOccurrences(ColumnMapExpectation):
    """Expect that no earlier row has the same value; among equal rows, only the later ones are unexpected."""

    map_metric: ClassVar[str] = "column_values.first_occurrence"


class IsNumber(ColumnMapMetricProvider):
    """Metric: the reward `answer` reads the text as a number."""

    condition_metric_name = "column_values.is_number"
    filter_column_isnull = False

    @column_condition_partial(engine=PandasExecutionEngine)
    def _pandas(cls, column: pd.Series[Any], **_: Any) -> pd.Series[bool]:
        return column.fillna("").map(is_number).astype(bool)


class ExpectColumnValuesToBeNumbers(ColumnMapExpectation):
    """Expect text that the reward `answer` reads as a number."""

    map_metric: ClassVar[str] = "column_values.is_number"


class IsChoice(ColumnMapMetricProvider):
    """Metric: the reward `answer` reads the text as a letter of multiple choice."""

    condition_metric_name = "column_values.is_choice"
    filter_column_isnull = False

    @column_condition_partial(engine=PandasExecutionEngine)
    def _pandas(cls, column: pd.Series[Any], **_: Any) -> pd.Series[bool]:
        return column.fillna("").map(is_choice).astype(bool)


class ExpectColumnValuesToBeChoices(ColumnMapExpectation):
    """Expect text that the reward `answer` reads as a letter of multiple choice."""

    map_metric: ClassVar[str] = "column_values.is_choice"


class PairDiffers(ColumnPairMapMetricProvider):
    """Metric: the two values of a row differ."""

    condition_metric_name = "column_pair_values.differ"
    condition_domain_keys = (
        "batch_id", "table", "column_A", "column_B", "row_condition", "condition_parser", "ignore_row_if",
    )  # fmt: skip

    @column_pair_condition_partial(engine=PandasExecutionEngine)  # type: ignore[untyped-decorator]
    def _pandas(cls, column_A: pd.Series[Any], column_B: pd.Series[Any], **_: Any) -> pd.Series[bool]:
        return column_A != column_B


class ExpectColumnPairValuesToDiffer(ColumnPairMapExpectation):
    """Expect that the two values of every row differ."""

    ignore_row_if: Literal["both_values_are_missing", "either_value_is_missing", "neither"] = "both_values_are_missing"
    map_metric: ClassVar[str] = "column_pair_values.differ"
    # The metric needs `ignore_row_if` and receives it only through success_keys.
    success_keys: ClassVar[tuple[str, ...]] = ("column_A", "column_B", "ignore_row_if", "mostly")
    args_keys: ClassVar[tuple[str, ...]] = ("column_A", "column_B")


class EquationAgrees(ColumnPairMapMetricProvider):
    """Metric: the answer does not contradict the equation."""

    condition_metric_name = "column_pair_values.equation_agrees"
    condition_domain_keys = PairDiffers.condition_domain_keys

    @column_pair_condition_partial(engine=PandasExecutionEngine)  # type: ignore[untyped-decorator]
    def _pandas(cls, column_A: pd.Series[Any], column_B: pd.Series[Any], **_: Any) -> pd.Series[bool]:
        pairs = zip(column_A, column_B, strict=True)
        return pd.Series([not _contradicts(*pair) for pair in pairs], index=column_A.index, dtype=bool)


def _contradicts(answer: str, equation: str) -> bool:
    """Return True if both are numbers and differ; an equation that is not arithmetic is never contradicted."""
    value, given = expression_value(equation), answer_value(answer)
    return value is not None and given is not None and value != given


class ExpectColumnPairAnswerToSolveEquation(ColumnPairMapExpectation):
    """Expect that the answer in A is the value of the equation in B."""

    ignore_row_if: Literal["both_values_are_missing", "either_value_is_missing", "neither"] = "either_value_is_missing"
    map_metric: ClassVar[str] = "column_pair_values.equation_agrees"
    success_keys: ClassVar[tuple[str, ...]] = ExpectColumnPairValuesToDiffer.success_keys
    args_keys: ClassVar[tuple[str, ...]] = ("column_A", "column_B")


class SharedPrompts(TableMetricProvider):
    """Metric: positions of training rows whose `prompt_key` is also in a held-out row."""

    metric_name = "table.shared_prompts"

    @metric_value(engine=PandasExecutionEngine)
    def _pandas(cls, execution_engine: Any, metric_domain_kwargs: Any, **_: Any) -> list[int]:
        frame, _, _ = execution_engine.get_compute_domain(metric_domain_kwargs, domain_type=MetricDomainTypes.TABLE)
        held_out = set(frame.loc[frame["held_out"], "prompt_key"])
        shared = frame.loc[~frame["held_out"] & frame["prompt_key"].isin(held_out), "position"]
        return [int(position) for position in shared.unique()]


class ExpectTrainingPromptsToNotBeHeldOut(BatchExpectation):
    """Expect that no training prompt is in a held-out table, compared by `prompt_key`."""

    metric_dependencies = ("table.shared_prompts",)
    success_keys: ClassVar[tuple[str, ...]] = ()
    args_keys: ClassVar[tuple[str, ...]] = ()

    def _validate(
        self, metrics: Any, runtime_configuration: Any = None, execution_engine: Any = None
    ) -> dict[str, Any]:
        shared = metrics["table.shared_prompts"]
        return {
            "success": not shared,
            "result": {"observed_value": f"{len(shared)} training rows", "unexpected_index_list": shared},
        }
