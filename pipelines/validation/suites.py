"""Build suites of expectations per table, and run Great Expectations. No other module runs it."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import great_expectations as gx
import pandas as pd
from great_expectations.core.validation_definition import ValidationDefinition
from great_expectations.expectations.core.expect_column_pair_values_a_to_be_greater_than_b import (
    ExpectColumnPairValuesAToBeGreaterThanB,
)
from great_expectations.expectations.core.expect_column_to_exist import ExpectColumnToExist
from great_expectations.expectations.core.expect_column_values_to_be_between import ExpectColumnValuesToBeBetween
from great_expectations.expectations.core.expect_column_values_to_be_in_set import ExpectColumnValuesToBeInSet
from great_expectations.expectations.core.expect_column_values_to_not_be_in_set import ExpectColumnValuesToNotBeInSet
from great_expectations.expectations.core.expect_column_values_to_not_be_null import ExpectColumnValuesToNotBeNull
from great_expectations.expectations.core.expect_table_row_count_to_be_between import ExpectTableRowCountToBeBetween

from pipelines.data.tables import ANSWERED, EQUATION, TEXT, WEIGHT, Table
from pipelines.validation import expectations as own
from pipelines.validation.view import BLANK, POSITION, TEMPLATE, UNKNOWN, typed_columns
from posttrain.rewards.extraction import AnswerKind

Status = Literal["passed", "failed", "errored"]
Expectation = Any
_LARGE = 10_000
"""Rows of a frame whose memory is worth a collection, which takes about 0.1 s."""
ANSWERS: dict[AnswerKind, type[Any]] = {
    "number": own.ExpectColumnValuesToBeNumbers,
    "choice": own.ExpectColumnValuesToBeChoices,
    "text": own.ExpectColumnValuesToNotBeBlank,
}
"""The form that a gold answer of each kind must have, so that an answer can match it."""


@dataclass(frozen=True)
class Finding:
    """The result of one expectation. `rows` are positions of unexpected rows; `detail` is the observed value or the exception."""

    table: str
    rule: str
    column: str
    status: Status
    rows: tuple[int, ...] = ()
    detail: str = ""


@dataclass(frozen=True)
class TableLimits:
    """TableLimits of the rules. `answers`: the kind of gold answers, a number, a letter or text."""

    max_prompt_tokens: int
    max_completion_tokens: int
    answers: AnswerKind
    max_unknown_share: float = 0.02


def structure(columns: Sequence[str]) -> list[Expectation]:
    """Checked first: every other expectation passes on a table without rows."""
    exist = [ExpectColumnToExist(column=name, meta=_meta("columns", name)) for name in columns]
    return [ExpectTableRowCountToBeBetween(min_value=1, meta=_meta("row_count", "")), *exist]


def types(table: Table, scores: Sequence[str]) -> list[Expectation]:
    """Return the expectations about types. They come before content, because a length check passes on a boolean."""
    texts = [
        ExpectColumnValuesToBeInSet(
            column=f"{name}_type",
            value_set=["text", "missing"] if name == "answer" else ["text", "messages", "missing"],
            meta=_meta("wrong_type", name),
        )
        for name in typed_columns(table)
    ]
    given = [ExpectColumnValuesToNotBeNull(column=name, meta=_meta("wrong_type", name)) for name in scores]
    return texts + given


def content(table: Table, limits: TableLimits, columns: Collection[str]) -> list[Expectation]:
    """Return the rules about single rows with valid types; `columns` are the view's columns."""
    suite: list[Expectation] = [
        ExpectColumnValuesToNotBeInSet(column=name, value_set=[BLANK], meta=_meta("empty_text", name))
        for name in TEXT[table]
    ]
    suite.append(own.ExpectColumnValuesToBeFirstOccurrences(column="row", meta=_meta("duplicate_rows", "row")))
    suite += [_length(name, limits) for name in TEXT[table]]
    if "chosen" in TEXT[table]:
        suite.append(_differ("chosen", "rejected", "identical_pair"))
    if "chosen_score" in columns:
        suite.append(
            ExpectColumnPairValuesAToBeGreaterThanB(
                column_A="chosen_score",
                column_B="rejected_score",
                or_equal=True,
                meta=_meta("score_order", "rejected_score"),
            )
        )
        suite.append(_differ("chosen_score", "rejected_score", "tied_scores"))
    if WEIGHT in columns:
        suite.append(ExpectColumnValuesToBeBetween(column=WEIGHT, min_value=0, meta=_meta("negative_weight", WEIGHT)))
    most = limits.max_unknown_share
    suite.append(
        ExpectColumnValuesToBeBetween(
            column=UNKNOWN, min_value=0, max_value=most, meta=_meta("unknown_tokens", UNKNOWN)
        )
    )
    if TEMPLATE in columns:
        suite.append(
            ExpectColumnValuesToBeInSet(column=TEMPLATE, value_set=[""], meta=_meta("chat_template", TEMPLATE))
        )
    if table in ANSWERED and "answer" in columns:
        answer = ANSWERS[limits.answers]
        suite.append(answer(column="answer", meta=_meta("unparseable_answer", "answer")))
    if table in ANSWERED and {"answer", EQUATION} <= {*columns}:
        meta = _meta("contradicted_answer", "answer")
        suite.append(own.ExpectColumnPairAnswerToSolveEquation(column_A="answer", column_B=EQUATION, meta=meta))
    return suite


def leakage() -> list[Expectation]:
    """Return the expectation about shared prompts."""
    return [own.ExpectTrainingPromptsToNotBeHeldOut(meta=_meta("leakage", "prompt"))]


class Validator:
    """An ephemeral context, without Data Docs: those pages show rows of the data as markup."""

    def __init__(self) -> None:
        self.context = gx.get_context(mode="ephemeral")
        self.context.variables.progress_bars = {"globally": False}  # type: ignore[assignment]
        self._discard_default_site()

    def run(self, table: str, stage: str, frame: pd.DataFrame, suite: Sequence[Expectation]) -> list[Finding]:
        """Return one finding per expectation, in the order of the suite. The source ends with the run: it would keep the frame."""
        name = f"{table}-{stage}"
        source = self.context.data_sources.add_pandas(name)
        data = source.add_dataframe_asset(name).add_batch_definition_whole_dataframe("all")
        held = self.context.suites.add(gx.ExpectationSuite(name=name, expectations=list(suite)))
        definition = self.context.validation_definitions.add(ValidationDefinition(name=name, data=data, suite=held))
        outcome = definition.run(
            batch_parameters={"dataframe": frame},
            result_format={"result_format": "COMPLETE", "unexpected_index_column_names": [POSITION]}
            if len(frame)
            else "BASIC",
        )
        self.context.validation_definitions.delete(name)
        self.context.data_sources.delete(name)
        if len(frame) > _LARGE:
            gc.collect()  # frame and results are in cycles
        order = {(e.meta["rule"], e.meta["column"]): place for place, e in enumerate(suite)}
        return sorted((_finding(table, result) for result in outcome.results), key=lambda f: order[f.rule, f.column])

    def _discard_default_site(self) -> None:
        """Remove the site that the context creates in a temporary folder, which it would leave behind."""
        for name, site in list((self.context.variables.data_docs_sites or {}).items()):
            shutil.rmtree(site["store_backend"]["base_directory"], ignore_errors=True)
            self.context.delete_data_docs_site(name)


def _differ(first: str, second: str, rule: str) -> Expectation:
    """Return the expectation that two columns differ."""
    return own.ExpectColumnPairValuesToDiffer(column_A=first, column_B=second, meta=_meta(rule, second))


def _length(name: str, limits: TableLimits) -> Expectation:
    """Return the expectation about a column's number of tokens."""
    rule, most = (
        ("prompt_length", limits.max_prompt_tokens)
        if name == "prompt"
        else ("completion_length", limits.max_completion_tokens)
    )
    return ExpectColumnValuesToBeBetween(column=f"{name}_tokens", min_value=0, max_value=most, meta=_meta(rule, name))


def _meta(rule: str, column: str) -> dict[str, str]:
    """Return the rule and column of an expectation."""
    return {"rule": rule, "column": column}


def _finding(table: str, result: Any) -> Finding:
    """Convert a result of Great Expectations."""
    meta = result.expectation_config.meta
    subject = (table, meta["rule"], meta["column"])
    raised = sorted(set(_exceptions(result.exception_info)))
    if raised:
        return Finding(*subject, "errored", detail="; ".join(raised))
    rows = tuple(sorted({_position(entry) for entry in result.result.get("unexpected_index_list") or ()}))
    observed = result.result.get("observed_value")
    return Finding(*subject, "passed" if result.success else "failed", rows, "" if observed is None else str(observed))


def _exceptions(info: Any) -> Iterator[str]:
    """Yield the exceptions of a result, which are stored directly or by metric."""
    if not info:
        return
    if "raised_exception" not in info:
        for entry in info.values():
            yield from _exceptions(entry)
    elif info["raised_exception"]:
        yield str(info["exception_message"])


def _position(entry: Any) -> int:
    """Return the row's position in an entry of a result."""
    return int(entry[POSITION] if isinstance(entry, dict) else entry)
