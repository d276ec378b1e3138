"""Check if the rows of one additional file may join the tables, by the rules of `validate`, before anything changes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pipelines.config.params import Params
from pipelines.data.conversation_rows import Sourced
from pipelines.data.sources import accepted_files
from pipelines.data.tables import HELD_OUT, TRAINING, Row, Table
from pipelines.ingest import split_tables
from pipelines.runtime.identity import file_digest
from pipelines.validate import MODEL, TokenLengths, answer_kind, base_encoder
from pipelines.validation.check import check
from pipelines.validation.leakage import prompt_keys, shown_prompt
from pipelines.validation.messages import paragraphs
from pipelines.validation.suites import TableLimits, Validator
from pipelines.validation.view import row_digest
from posttrain.environments.parts import Kind
from posttrain.errors import DataError, LeakageError


class Admission:
    """Check new files against the current rows. `rows` holds the rows of the four sources and grows with each admitted file."""

    def __init__(self, params: Params, rows: Mapping[Kind, list[Row]]) -> None:
        self.rows: dict[Sourced, list[Row]] = {kind: list(each) for kind, each in rows.items()}
        self._digests: dict[Sourced, list[bytes]] = {}
        self._accepted: dict[Path, str] = {}
        self._held_out: dict[str, Table] | None = None
        self._params = params
        rules = params.validation
        self._limits = TableLimits(
            rules.max_prompt_tokens, rules.max_completion_tokens, answer_kind(params), rules.max_unknown_share
        )
        self._lengths = TokenLengths(base_encoder()) if MODEL.is_dir() else _Unknown()

    def accepted_bytes(self, kind: Kind) -> set[str]:
        """Return the digests of the accepted files. Each file is read once: with 1,000 new files, 1,000 times as many reads otherwise."""
        for path in accepted_files(kind):
            if path not in self._accepted:
                self._accepted[path] = file_digest(path)
        return {digest for path, digest in self._accepted.items() if path.parent.name == kind}

    def holds(self, kind: Kind, rows: list[Row]) -> bool:
        """Return True if the table has these rows, in this order: the same file with other line ends, spacing or compression."""
        mine, theirs = self._row_digests(kind), [row_digest(row) for row in rows]
        starts = (i for i, digest in enumerate(mine) if digest == theirs[0])
        return any(mine[i : i + len(theirs)] == theirs for i in starts)

    def check(self, kind: Kind, rows: list[Row]) -> int:
        """Return the number of rows that `validate` will quarantine. Raises DataError if it would stop the pipeline."""
        outcome = check({kind: rows}, self._params.validation.rules, self._limits, self._lengths, Validator())
        if outcome.stops:
            raise DataError("\n".join(paragraphs(outcome, self._params.validation.max_shown_rows)))
        kept: list[Row] = outcome.kept[kind]
        if self._params.validation.rules.leakage == "stop":
            self._refuse_leakage(kind, kept)
        return len(outcome.quarantined[kind]) + self._repeated(kind, rows, kept)

    def admit(self, kind: Kind, rows: list[Row]) -> None:
        """Add the rows to a table; they are numbered on from its last row."""
        self._row_digests(kind).extend(row_digest(row) for row in rows)
        for i, row in enumerate(rows, start=len(self.rows[kind])):
            row["id"] = i
        self.rows[kind] += rows
        if kind in ("evaluation", "preferences"):
            self._held_out = None

    def _row_digests(self, kind: Kind) -> list[bytes]:
        if kind not in self._digests:
            self._digests[kind] = [row_digest(row) for row in self.rows[kind]]
        return self._digests[kind]

    def _repeated(self, kind: Kind, rows: list[Row], kept: list[Row]) -> int:
        """Return how many of the kept rows `validate` quarantines because the table has them. Raises DataError if it would stop."""
        rule = self._params.validation.rules.duplicate_rows
        if rule == "warn":
            return 0
        mine = set(self._row_digests(kind))
        stays = bytearray(len(rows))  # by id, which is a row's position in its file
        for row in kept:
            stays[row["id"]] = True
        again = [row for row in rows if stays[row["id"]] and row_digest(row) in mine]
        if again and rule == "stop":
            raise DataError(
                f"{len(again)} rows are in the table {kind} already (first: {shown_prompt(again[0])!r}). Remove them, or set"
                " validation.rules.duplicate_rows to quarantine or warn."
            )
        return len(again)

    def _refuse_leakage(self, kind: Kind, rows: list[Row]) -> None:
        """Raise LeakageError if a prompt would be in training and in held-out data.

        Pairs are split by prompt, so their split is computed as it will be with the new rows.
        """
        training: dict[Table, list[Row]] = {kind: rows}  # only new rows can be found, since no held-out row is new
        if kind in ("evaluation", "preferences"):
            tables = split_tables({**self.rows, kind: [*self.rows[kind], *rows]}, self._params.data)
            training, held_out = {table: tables[table] for table in TRAINING}, _keys(tables, HELD_OUT)
        else:
            if self._held_out is None:
                self._held_out = _keys(split_tables(self.rows, self._params.data), HELD_OUT)
            held_out = self._held_out
        shared = [
            (row, table, held_out[key])
            for table, mine in training.items()
            for row in mine
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
