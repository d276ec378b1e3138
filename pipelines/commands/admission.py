"""Check if the rows of one additional file may join the tables, by the rules of `validate`, before anything changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from pipelines.config.data_schema import DataParams
from pipelines.config.params import Params
from pipelines.data.packed import Chained, PackedRows
from pipelines.data.sources import accepted_files
from pipelines.data.tables import Row, Table
from pipelines.ingest import held_out
from pipelines.runtime.identity import file_digest
from pipelines.validate import MODEL, TokenLengths, answer_kind, base_encoder
from pipelines.validation.check import check
from pipelines.validation.leakage import prompt_keys, shown_prompt
from pipelines.validation.messages import paragraphs
from pipelines.validation.suites import TableLimits, Validator
from pipelines.validation.view import DIGEST, DIGEST_BYTES, row_digests
from posttrain.environments.parts import Kind
from posttrain.errors import DataError, LeakageError


class Admission:
    """Check new files against the current rows. `rows` holds the rows of the four sources and grows with each admitted file."""

    def __init__(self, params: Params, rows: Mapping[Kind, PackedRows]) -> None:
        self.rows = {kind: Chained(each) for kind, each in rows.items()}
        self._digests: dict[Kind, bytearray] = {}
        self._accepted: dict[Path, str] = {}
        self._held_out: dict[str, Table] | None = None
        self._params = params
        rules = params.validation
        self._limits = TableLimits(
            rules.max_prompt_tokens, rules.max_completion_tokens, answer_kind(params), rules.max_unknown_share
        )
        self._lengths = TokenLengths(base_encoder(), params.sft.train_on) if MODEL.is_dir() else _Unknown()

    def accepted_bytes(self, kind: Kind) -> set[str]:
        """Return the digests of the accepted files. Each file is read once: with 1,000 new files, 1,000 times as many reads otherwise."""
        for path in accepted_files(kind):
            if path not in self._accepted:
                self._accepted[path] = file_digest(path)
        return {digest for path, digest in self._accepted.items() if path.parent.name == kind}

    def holds(self, kind: Kind, rows: Sequence[Row]) -> bool:
        """Return True if the table has these rows, in this order: the same file with other line ends, spacing or compression."""
        mine, theirs = self._row_digests(kind), row_digests(rows)
        place = mine.find(theirs)
        while place > 0 and place % DIGEST_BYTES:  # between two digests
            place = mine.find(theirs, place + 1)
        return place >= 0

    def check(self, kind: Kind, rows: PackedRows) -> int:
        """Return the number of rows that `validate` will quarantine. Raises DataError if it would stop the pipeline."""
        outcome = check({kind: rows}, self._params.validation.rules, self._limits, self._lengths, Validator())
        if outcome.stops:
            raise DataError("\n".join(paragraphs(outcome, self._params.validation.max_shown_rows)))
        kept = outcome.kept[kind]
        if self._params.validation.rules.leakage == "stop":
            self._refuse_leakage(kind, kept)
        return len(outcome.quarantined[kind]) + self._repeated(kind, rows.chosen(row["id"] for row in kept))

    def admit(self, kind: Kind, rows: PackedRows) -> None:
        """Add the rows to a table; they keep their numbers within their file."""
        self._row_digests(kind).extend(row_digests(rows))
        self.rows[kind].append(rows)
        if kind in ("evaluation", "preferences"):
            self._held_out = None

    def _row_digests(self, kind: Kind) -> bytearray:
        if kind not in self._digests:
            self._digests[kind] = row_digests(self.rows[kind])
        return self._digests[kind]

    def _repeated(self, kind: Kind, kept: Sequence[Row]) -> int:
        """Return how many of the kept rows `validate` quarantines because the table has them. Raises DataError if it would stop."""
        rule = self._params.validation.rules.duplicate_rows
        if rule == "warn":
            return 0
        mine, theirs = (np.frombuffer(each, DIGEST) for each in (self._row_digests(kind), row_digests(kept)))
        again = np.flatnonzero(np.isin(theirs, mine))
        if len(again) and rule == "stop":
            raise DataError(
                f"{len(again)} rows are in the table {kind} already (first: {shown_prompt(kept[int(again[0])])!r}). Remove them, or set"
                " validation.rules.duplicate_rows to quarantine or warn."
            )
        return len(again)

    def _refuse_leakage(self, kind: Kind, rows: Sequence[Row]) -> None:
        """Raise LeakageError if a prompt would be in training and in held-out data.

        Pairs are split by prompt, so their split is computed as it will be with the new rows.
        """
        if kind in ("evaluation", "preferences"):
            tables = _Split({**self.rows, kind: Chained(self.rows[kind], rows)}, self._params.data)
            training, keys = tables.training(), tables.held_out_keys()
        else:
            if self._held_out is None:
                self._held_out = _Split(self.rows, self._params.data).held_out_keys()
            # only new rows can be found, since no held-out row is new
            training, keys = ((kind, row) for row in rows), self._held_out
        leaks = (
            (row, table, keys[key])
            for table, row in training
            for key in sorted(prompt_keys(row, held_out=False) & keys.keys())[:1]
        )
        first = next(leaks, None)
        if first is not None:
            row, table, place = first
            prompts = len({shown_prompt(row), *(shown_prompt(leaking) for leaking, _, _ in leaks)})
            raise LeakageError(
                f"{prompts} prompts would be in training and in held-out data, e.g. {shown_prompt(row)!r} in {table} and"
                f" {place}. A score on prompts that were trained on says nothing about others: remove them."
            )


class _Split:
    """The tables that `ingest` will make of the rows, one row at a time. Noise changes no prompt, so it is left out."""

    def __init__(self, rows: Mapping[Kind, Sequence[Row]], data: DataParams) -> None:
        self._rows = rows
        self._is_held = held_out(rows["preferences"], data.preferences.heldout, data.seed)

    def training(self) -> Iterator[tuple[Table, Row]]:
        """Yield every row that is trained on, with its table."""
        yield from (("sft", row) for row in self._rows["sft"])
        yield from (("preferences", row) for row in self._pairs(held=False))
        yield from (("problems", row) for row in self._rows["problems"])

    def held_out_keys(self) -> dict[str, Table]:
        """Return the table of each key of a held-out prompt."""
        keys: dict[str, Table] = {}
        for row in self._rows["evaluation"]:
            # pyrefly: ignore[bad-assignment]
            keys |= dict.fromkeys(prompt_keys(row, held_out=True), "evaluation")
        for row in self._pairs(held=True):
            # pyrefly: ignore[bad-assignment]
            keys |= dict.fromkeys(prompt_keys(row, held_out=True), "preferences_heldout")
        return keys

    def _pairs(self, held: bool) -> Iterator[Row]:
        return (row for row, is_held in zip(self._rows["preferences"], self._is_held, strict=True) if is_held == held)


class _Unknown:
    """Token lengths without a base model: unknown, so 0; `validate` checks the lengths later."""

    def prompt(self, row: Row) -> int:
        return 0

    def pair(self, row: Row, column: str) -> tuple[int, int]:
        return 0, 0

    def unknown(self, row: Row) -> float:
        return 0.0
