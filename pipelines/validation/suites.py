"""Suites of expectations per table, and their results as findings. The only place that runs Great Expectations."""

from __future__ import annotations

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
from great_expectations.expectations.core.expect_column_values_to_not_be_null import ExpectColumnValuesToNotBeNull
from great_expectations.expectations.core.expect_table_row_count_to_be_between import ExpectTableRowCountToBeBetween

from pipelines.data.tables import ANSWERED, EQUATION, TEXT, WEIGHT, Table
from pipelines.validation import expectations as own
from pipelines.validation.view import POSITION, TEMPLATE, typed_columns

Status = Literal["passed", "failed", "errored"]
Expectation = Any


@dataclass(frozen=True)
class Finding:
    """What one expectation said. `rows`: positions of unexpected rows; `detail`: what was observed, or why it raised."""

    table: str
    rule: str
    column: str
    status: Status
    rows: tuple[int, ...] = ()
    detail: str = ""


@dataclass(frozen=True)
class Limits:
    """What the rules compare with. `numeric_answer`: a gold answer must be a number, not just text."""

    max_prompt_tokens: int
    max_completion_tokens: int
    numeric_answer: bool


def structure(columns: Sequence[str]) -> list[Expectation]:
    """Checked first: every other expectation passes on a table without rows."""
    exist = [ExpectColumnToExist(column=name, meta=_meta("columns", name)) for name in columns]
    return [ExpectTableRowCountToBeBetween(min_value=1, meta=_meta("row_count", "")), *exist]


def types(table: Table, scores: Sequence[str]) -> list[Expectation]:
    """A length check passes on a boolean, so types are asked before content."""
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


def content(table: Table, limits: Limits, columns: Collection[str]) -> list[Expectation]:
    """Rules about single rows of the right type; `columns` are those that the view has."""
    suite: list[Expectation] = [
        own.ExpectColumnValuesToNotBeBlank(column=name, meta=_meta("empty_text", name)) for name in TEXT[table]
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
    if TEMPLATE in columns:
        suite.append(
            ExpectColumnValuesToBeInSet(column=TEMPLATE, value_set=[""], meta=_meta("chat_template", TEMPLATE))
        )
    if table in ANSWERED:
        answer = own.ExpectColumnValuesToBeNumbers if limits.numeric_answer else own.ExpectColumnValuesToNotBeBlank
        suite.append(answer(column="answer", meta=_meta("unparseable_answer", "answer")))
    if table in ANSWERED and EQUATION in columns:
        meta = _meta("contradicted_answer", "answer")
        suite.append(own.ExpectColumnPairAnswerToSolveEquation(column_A="answer", column_B=EQUATION, meta=meta))
    return suite


def leakage() -> list[Expectation]:
    return [own.ExpectTrainingPromptsToNotBeHeldOut(meta=_meta("leakage", "prompt"))]


class Validator:
    """An ephemeral context, without Data Docs: those pages show rows of the data as markup."""

    def __init__(self) -> None:
        self.context = gx.get_context(mode="ephemeral")
        self.context.variables.progress_bars = {"globally": False}  # type: ignore[assignment]
        self._discard_default_site()
        self.source = self.context.data_sources.add_pandas("tables")

    def run(self, table: str, stage: str, frame: pd.DataFrame, suite: Sequence[Expectation]) -> list[Finding]:
        """One finding per expectation, in the suite's order."""
        name = f"{table}-{stage}"
        data = self.source.add_dataframe_asset(name).add_batch_definition_whole_dataframe("all")
        held = self.context.suites.add(gx.ExpectationSuite(name=name, expectations=list(suite)))
        definition = self.context.validation_definitions.add(ValidationDefinition(name=name, data=data, suite=held))
        outcome = definition.run(
            batch_parameters={"dataframe": frame},
            result_format={"result_format": "COMPLETE", "unexpected_index_column_names": [POSITION]}
            if len(frame)
            else "BASIC",
        )
        asked = {(e.meta["rule"], e.meta["column"]): place for place, e in enumerate(suite)}
        return sorted((_finding(table, result) for result in outcome.results), key=lambda f: asked[f.rule, f.column])

    def _discard_default_site(self) -> None:
        """The context makes a site of its own in a temporary folder, and leaves the folder behind."""
        for name, site in list((self.context.variables.data_docs_sites or {}).items()):
            shutil.rmtree(site["store_backend"]["base_directory"], ignore_errors=True)
            self.context.delete_data_docs_site(name)


def _differ(first: str, second: str, rule: str) -> Expectation:
    return own.ExpectColumnPairValuesToDiffer(column_A=first, column_B=second, meta=_meta(rule, second))


def _length(name: str, limits: Limits) -> Expectation:
    rule, most = (
        ("prompt_length", limits.max_prompt_tokens)
        if name == "prompt"
        else ("completion_length", limits.max_completion_tokens)
    )
    return ExpectColumnValuesToBeBetween(column=f"{name}_tokens", min_value=0, max_value=most, meta=_meta(rule, name))


def _meta(rule: str, column: str) -> dict[str, str]:
    return {"rule": rule, "column": column}


def _finding(table: str, result: Any) -> Finding:
    meta = result.expectation_config.meta
    where = (table, meta["rule"], meta["column"])
    raised = sorted(set(_exceptions(result.exception_info)))
    if raised:
        return Finding(*where, "errored", detail="; ".join(raised))
    rows = tuple(sorted({_position(entry) for entry in result.result.get("unexpected_index_list") or ()}))
    observed = result.result.get("observed_value")
    return Finding(*where, "passed" if result.success else "failed", rows, "" if observed is None else str(observed))


def _exceptions(info: Any) -> Iterator[str]:
    """A result says that it raised either directly or by metric."""
    if not info:
        return
    if "raised_exception" not in info:
        for entry in info.values():
            yield from _exceptions(entry)
    elif info["raised_exception"]:
        yield str(info["exception_message"])


def _position(entry: Any) -> int:
    return int(entry[POSITION] if isinstance(entry, dict) else entry)
