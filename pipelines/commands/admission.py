"""Check if the rows of one additional file may join the tables, by the rules of `validate`, before anything changes."""

from __future__ import annotations

from collections.abc import Mapping

from pipelines.config.params import Params
from pipelines.data.conversation_rows import Sourced
from pipelines.data.sources import numbered
from pipelines.data.tables import HELD_OUT, TRAINING, Row, Table
from pipelines.ingest import split_tables
from pipelines.validate import MODEL, TokenLengths, answer_kind, base_encoder
from pipelines.validation.check import check
from pipelines.validation.leakage import prompt_keys, shown_prompt
from pipelines.validation.messages import paragraphs
from pipelines.validation.suites import TableLimits, Validator
from posttrain.environments.parts import Kind
from posttrain.errors import DataError, LeakageError


class Admission:
    """Check new files against the current rows. `rows` holds the rows of the four sources and grows with each admitted file."""

    def __init__(self, params: Params, rows: Mapping[Kind, list[Row]]) -> None:
        self.rows: dict[Sourced, list[Row]] = dict(rows.items())
        self._params = params
        rules = params.validation
        self._limits = TableLimits(
            rules.max_prompt_tokens, rules.max_completion_tokens, answer_kind(params), rules.max_unknown_share
        )
        self._lengths = TokenLengths(base_encoder()) if MODEL.is_dir() else _Unknown()

    def check(self, kind: Kind, rows: list[Row]) -> int:
        """Return the number of rows that `validate` will quarantine. Raises DataError if it would stop the pipeline."""
        outcome = check({kind: rows}, self._params.validation.rules, self._limits, self._lengths, Validator())
        if outcome.stops:
            raise DataError("\n".join(paragraphs(outcome, self._params.validation.max_shown_rows)))
        kept: list[Row] = outcome.kept[kind]
        if self._params.validation.rules.leakage == "stop":
            self._refuse_leakage(kind, kept)
        return len(outcome.quarantined[kind])

    def admit(self, kind: Kind, rows: list[Row]) -> None:
        """Add the rows to a table."""
        self.rows[kind] = numbered([*self.rows[kind], *rows])

    def _refuse_leakage(self, kind: Kind, rows: list[Row]) -> None:
        """Raise LeakageError if a prompt would be in training and in held-out data.

        Pairs are split by prompt, so the split is computed as it will be with the new rows.
        """
        tables = split_tables({**self.rows, kind: [*self.rows[kind], *rows]}, self._params.data)
        held_out = _keys(tables, HELD_OUT)
        shared = [
            (row, table, held_out[key])
            for table in TRAINING
            for row in tables[table]
            for key in sorted(prompt_keys(row, held_out=False) & held_out.keys())[:1]
        ]
        if shared:
            row, table, place = shared[0]
            prompts = len({shown_prompt(leaking) for leaking, _, _ in shared})
            raise LeakageError(
                f"{prompts} prompts would be in training and in held-out data, e.g. {shown_prompt(row)!r} in {table} and"
                f" {place}. A score on prompts that were trained on says nothing about others: remove them."
            )


def _keys(tables: Mapping[Table, list[Row]], names: tuple[Table, ...]) -> dict[str, Table]:
    return {key: name for name in names for row in tables[name] for key in prompt_keys(row, held_out=True)}


class _Unknown:
    """Token lengths without a base model: unknown, so 0; `validate` checks the lengths later."""

    def prompt(self, row: Row) -> int:
        return 0

    def pair(self, row: Row, column: str) -> tuple[int, int]:
        return 0, 0

    def unknown(self, row: Row) -> float:
        return 0.0
