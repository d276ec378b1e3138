"""What a stopped validation says: table, column, rule, count, the first rows, and what to do next."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from pipelines.data.tables import Row, plain
from pipelines.validation.check import Outcome, Verdict
from posttrain.errors import DataError, LeakageError

_WIDTH = 90
_BEFORE = 18
"""Characters shown before the place where rows differ."""


def refuse(outcome: Outcome, shown: int, report: Path) -> None:
    """Raise DataError (LeakageError where leakage is all there is) if a rule stops the run."""
    stops = outcome.stops
    if not stops:
        return
    kind = LeakageError if all(v.finding.rule == "leakage" for v in stops) else DataError
    raise kind("\n".join([*paragraphs(outcome, shown), f"The full report: {report}"]))


def paragraphs(outcome: Outcome, shown: int) -> list[str]:
    """What each rule that stops the run says."""
    return [_paragraph(verdict, outcome, shown) for verdict in outcome.stops]


def _paragraph(verdict: Verdict, outcome: Outcome, shown: int) -> str:
    finding = verdict.finding
    where = (
        f"table {finding.table}" + (f", column {finding.column}" if finding.column else "") + f", rule {finding.rule}"
    )
    if finding.status == "errored":
        return f"{where}: could not be checked: {finding.detail}. Mend the data, or set validation.rules.{finding.rule} to warn."
    if finding.rule in ("row_count", "columns"):
        return f"{where}: {_structure(verdict)}"
    total = outcome.rows_in(finding.table)
    rows = "".join(f"\n  {line}" for line in examples(verdict, shown))
    return (
        f"{where} (stop): {len(verdict.rows)} of {total} rows. First rows:{rows}\n{_next(finding.rule, finding.table)}"
    )


def examples(verdict: Verdict, shown: int) -> list[str]:
    """Return the first unexpected rows, one line each, from where their values begin to differ."""
    rows = verdict.rows[:shown]
    notes = (verdict.notes or [""] * len(rows))[:shown]
    if verdict.finding.rule == "chat_template":
        return [f"id {row['id']}: {note}" for row, note in zip(rows, notes, strict=True)]
    column = "prompt" if verdict.finding.column == "row" else verdict.finding.column
    values = [_value(row, column) for row in rows]
    start = _first_difference(values)
    lines = []
    for row, note, value in zip(rows, notes, values, strict=True):
        same = f" (as {note})" if note else ""
        lines.append(f"id {row['id']}{same}: {column} {_cut(value, start)}")
    return lines


def _value(row: Row, column: str) -> Any:
    return plain(row[column]) if isinstance(row.get(column), str | list | None) else row[column]


def _first_difference(values: Sequence[Any]) -> int:
    """Return where to begin showing texts that share a long beginning, such as a system prompt; else 0."""
    texts = sorted({value for value in values if isinstance(value, str)})
    if len(texts) < 2:
        return 0
    # in sorted order, what the first and the last text share is shared by all
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(texts[0], texts[-1], strict=False)))
    return shared - _BEFORE if shared > _WIDTH // 2 else 0


def _cut(value: Any, start: int) -> str:
    text = repr(value if not start or not isinstance(value, str) else "..." + value[start:])
    return text if len(text) <= _WIDTH else text[: _WIDTH - 3] + "..."


def _structure(verdict: Verdict) -> str:
    if verdict.finding.rule == "columns":
        return "the column is missing. Make the table again with `dvc repro ingest`, or map it in data.*.columns."
    said = verdict.finding.detail
    return (f"{said}; nothing is left. See data.*.source and the limits under validation." if "quarantined" in said
            else "the table has no rows. Give data.*.source one that has, or raise data.*.rows.")  # fmt: skip


def _next(rule: str, table: str) -> str:
    if rule == "leakage":
        return (
            "A score on prompts that were trained on says nothing about others. Take another source for"
            f" data.{table} or for the held-out table, or set validation.rules.leakage to quarantine to remove these training rows."
        )
    return (
        f"Correct the source, or set validation.rules.{rule} to quarantine (set such rows aside) or warn (keep them)."
    )


def summary(outcome: Outcome) -> dict[str, float]:
    """Rows in, valid and quarantined per table; rows that each rule found, over its columns."""
    numbers: dict[str, float] = {}
    for table in sorted(outcome.kept):
        kept, away = len(outcome.kept[table]), len(outcome.quarantined[table])
        numbers |= {f"rows/{table}/in": kept + away, f"rows/{table}/valid": kept, f"rows/{table}/quarantined": away}
    for rule, verdicts in by_rule(outcome.verdicts).items():
        numbers[f"rules/{rule[0]}/{rule[1]}"] = len({row["id"] for verdict in verdicts for row in verdict.rows})
    numbers["errored"] = sum(v.finding.status == "errored" for v in outcome.verdicts)
    return numbers


def by_rule(verdicts: Sequence[Verdict]) -> dict[tuple[str, str], list[Verdict]]:
    groups: dict[tuple[str, str], list[Verdict]] = {}
    for verdict in verdicts:
        groups.setdefault((verdict.finding.table, verdict.finding.rule), []).append(verdict)
    return groups
