"""Apply policies to findings: keep rows, quarantine rows with a reason, or stop the run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from pipelines.config.schema import RuleParams
from pipelines.data.packed import PackedRows, chosen, empty_like, replaced
from pipelines.data.tables import ANSWERED, HELD_OUT, OPTIONAL, TEXT, TRAINING, Row, Table, plain, present
from pipelines.validation import suites
from pipelines.validation.gold import advice
from pipelines.validation.leakage import prompt_keys
from pipelines.validation.suites import Finding, TableLimits, Validator
from pipelines.validation.view import (
    TEMPLATE,
    UNKNOWN,
    Lengths,
    content_view,
    present_scores,
    prompts_view,
    structure_view,
    types_view,
)

Note = Callable[[int], str]
STOP, QUARANTINE, WARN = "stop", "quarantine", "warn"


@dataclass(frozen=True)
class Verdict:
    """A finding with the policy of its rule and the affected rows. `notes` describe each row further."""

    finding: Finding
    policy: str
    rows: Sequence[Row]
    notes: list[str] = field(default_factory=list)

    @property
    def stops(self) -> bool:
        """Return True if the run must stop: the rule failed, or could not be checked and is not a mere warning."""
        unchecked = self.finding.status == "errored" and self.policy != WARN
        return unchecked or (self.finding.status == "failed" and self.policy == STOP)


@dataclass
class ValidationOutcome:
    """The result for all tables. `kept` and `quarantined` together are the input rows; quarantined rows have a `reason`."""

    kept: dict[Table, Sequence[Row]] = field(default_factory=dict)
    quarantined: dict[Table, Sequence[Row]] = field(default_factory=dict)
    verdicts: list[Verdict] = field(default_factory=list)

    def rows_in(self, table: str) -> int:
        """Return the number of input rows of a table."""
        return sum(len(rows) for part in (self.kept, self.quarantined) for name, rows in part.items() if name == table)

    @property
    def stops(self) -> list[Verdict]:
        """Return the verdicts that stop the run."""
        return [verdict for verdict in self.verdicts if verdict.stops]


def check(
    tables: Mapping[Table, Sequence[Row]],
    rules: RuleParams,
    limits: TableLimits,
    lengths: Lengths,
    validator: Validator,
) -> ValidationOutcome:
    """Check every rule of every table, then leakage across all tables. Does not raise: see `ValidationOutcome.stops`.

    Packed rows stay packed in the outcome.
    """
    outcome = ValidationOutcome()
    for table, rows in tables.items():
        if table in OPTIONAL and not rows:
            outcome.kept[table], outcome.quarantined[table] = [], []
            continue
        _Checker(table, rules, outcome, validator).check(rows, limits, lengths)
    if not outcome.stops:
        _check_leakage(outcome, rules, validator)
    if not outcome.stops:
        _check_emptied(outcome, limits)
    return outcome


class _Checker:
    """Check one table in stages of rules; a row leaves at the first stage that quarantines it."""

    def __init__(self, table: Table, rules: RuleParams, outcome: ValidationOutcome, validator: Validator) -> None:
        self.table, self.rules, self.outcome, self.validator = table, rules, outcome, validator

    def check(self, rows: Sequence[Row], limits: TableLimits, lengths: Lengths) -> None:
        """Run all stages of rules on the rows."""
        self.outcome.kept[self.table], self.outcome.quarantined[self.table] = rows, empty_like(rows)
        scores = present_scores(rows)
        columns = ["id", *present(self.table, rows)]
        findings = self.validator.run(self.table, "structure", structure_view(rows), suites.structure(columns))
        if self._settle(rows, findings):
            return
        findings = self.validator.run(
            self.table, "types", types_view(self.table, rows), suites.types(self.table, scores)
        )
        if self._settle(rows, findings):
            return
        rows = self.outcome.kept[self.table]
        texts = {i: text for i, row in enumerate(rows) if (text := _texts(self.table, row)) is not row}
        rows = self.outcome.kept[self.table] = replaced(rows, texts)
        if rows:
            view = content_view(self.table, rows, lengths)
            suite = suites.content(self.table, limits, list(view.columns))
            shares = view[UNKNOWN].to_numpy()
            notes: dict[str, Note] = {UNKNOWN: lambda i: f"{shares[i]:.1%} of its tokens are unknown"}
            if TEMPLATE in view.columns:
                notes[TEMPLATE] = view[TEMPLATE].to_numpy().__getitem__
            detail = f"{view[UNKNOWN].mean():.2%} of a row's tokens are unknown on average, at most {view[UNKNOWN].max():.2%}"
            findings = [
                replace(finding, detail=detail) if finding.rule == "unknown_tokens" and not finding.detail else finding
                for finding in self.validator.run(self.table, "content", view, suite)
            ]
            self._settle(rows, findings, notes)

    def _settle(
        self, rows: Sequence[Row], findings: Sequence[Finding], notes: Mapping[str, Note] = MappingProxyType({})
    ) -> bool:
        """Record the findings and set rows aside. Return True if one of them stops the run. `notes`: by column, of a row."""
        verdicts = [
            Verdict(
                f,
                _policy(self.rules, f.rule),
                chosen(rows, f.rows),
                [notes[f.column](i) for i in f.rows] if f.column in notes else [],
            )
            for f in findings
        ]
        self.outcome.verdicts += verdicts
        reasons: dict[int, list[str]] = {}
        for verdict in verdicts:
            for place in verdict.finding.rows if verdict.policy == QUARANTINE else ():
                reasons.setdefault(place, []).append(f"{verdict.finding.rule} ({verdict.finding.column})")
        _quarantine(self.outcome, self.table, rows, reasons)
        return any(verdict.stops for verdict in verdicts)


def _quarantine(
    outcome: ValidationOutcome, table: Table, rows: Sequence[Row], reasons: Mapping[int, Sequence[str]]
) -> None:
    """Move rows to the quarantine with their reasons."""
    aside = outcome.quarantined[table]
    assert isinstance(aside, list | PackedRows)
    aside.extend(rows[i] | {"reason": "; ".join(reasons[i])} for i in sorted(reasons))
    outcome.kept[table] = chosen(rows, (i for i in range(len(rows)) if i not in reasons)) if reasons else rows


def _policy(rules: RuleParams, rule: str) -> str:
    """Return the policy of a rule. A rule without a parameter is about the table itself and always stops."""
    return str(getattr(rules, rule)) if rule in RuleParams.model_fields else STOP


def _texts(table: Table, row: Row) -> Row:
    """Return a row that can be written as text: a missing value becomes empty, a value of a wrong type becomes JSON."""
    names = (*TEXT[table], *(("answer",) if table in ANSWERED and "answer" in row else ()))
    wrong = [name for name in names if not (isinstance(row[name], str | list) and row[name])]
    return row | {name: plain(row[name]) for name in wrong} if wrong else row


def _check_leakage(outcome: ValidationOutcome, rules: RuleParams, validator: Validator) -> None:
    """Find training rows whose prompt is also in held-out data."""
    tables = [(table, outcome.kept[table]) for table in (*TRAINING, *HELD_OUT) if outcome.kept.get(table)]
    (finding,) = validator.run("all", "leakage", prompts_view(tables), suites.leakage())
    held_out = {
        key: (table, row["id"])
        for table, rows in reversed(tables)
        if table in HELD_OUT
        for row in reversed(rows)
        for key in prompt_keys(row, held_out=True)
    }
    shared: dict[Table, dict[int, str]] = {}
    for position in finding.rows:
        table, i = _place(tables, position)
        row = outcome.kept[table][i]
        for key in sorted(prompt_keys(row, held_out=False) & held_out.keys())[:1]:
            shared.setdefault(table, {})[i] = "{} id {}".format(*held_out[key])
    if finding.status == "errored" or not shared:
        outcome.verdicts.append(Verdict(finding, rules.leakage, []))
    for table, notes in shared.items():
        rows = outcome.kept[table]
        found = Finding(table, "leakage", "prompt", "failed", tuple(notes))
        outcome.verdicts.append(Verdict(found, rules.leakage, [rows[i] for i in notes], list(notes.values())))
        if rules.leakage == QUARANTINE:
            _quarantine(outcome, table, rows, {i: [f"leakage (prompt of {note})"] for i, note in notes.items()})


def _place(tables: Sequence[tuple[Table, Sequence[Row]]], position: int) -> tuple[Table, int]:
    """Return table and place of a row from its position in all tables below each other."""
    for table, rows in tables:
        if position < len(rows):
            return table, position
        position -= len(rows)
    raise IndexError(position)


def _check_emptied(outcome: ValidationOutcome, limits: TableLimits) -> None:
    """Stop if a table has no rows left."""
    for table, rows in outcome.kept.items():
        if not rows and (table not in OPTIONAL or outcome.quarantined[table]):
            aside = outcome.quarantined[table]
            counts = Counter(reason for row in aside for reason in str(row["reason"]).split("; "))
            rules = ", ".join(f"{reason}: {count}{_limit(reason, limits)}" for reason, count in counts.most_common())
            detail = (
                f"all {len(aside)} rows were quarantined by {rules}; first row: {_shown(aside[0])}" if aside else ""
            )
            outcome.verdicts.append(Verdict(Finding(table, "row_count", "", "failed", detail=detail), STOP, []))


def _limit(reason: str, limits: TableLimits) -> str:
    """Return the limit or form in params.yaml that a row did not meet, for the rules of length and of gold answers."""
    if reason.startswith("prompt_length"):
        return f" (validation.max_prompt_tokens is {limits.max_prompt_tokens})"
    if reason.startswith("completion_length"):
        return f" (validation.max_completion_tokens is {limits.max_completion_tokens})"
    if reason.startswith("unparseable_answer") and limits.answers != "text":
        return f" ({advice(limits.answers)})"
    return ""


def _shown(row: Row) -> str:
    """Return a row's values, shortened."""
    values = (f"{name} {str(plain(value))[:60]!r}" for name, value in row.items() if name not in ("id", "reason"))
    return f"id {row['id']}: {', '.join(values)}"
