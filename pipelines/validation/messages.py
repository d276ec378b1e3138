"""Write the messages of a stopped validation: table, column, rule, count, first rows, and the next step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from pipelines.data.tables import Row, Table, plain
from pipelines.validation.check import ValidationOutcome, Verdict
from posttrain.errors import DataError, LeakageError

_WIDTH = 90
_BEFORE = 18
"""Number of characters shown before the position at which rows differ."""


def refuse(outcome: ValidationOutcome, shown: int, report: Path) -> None:
    """Raise DataError if a rule stops the run, or LeakageError if leakage is the only reason."""
    stops = outcome.stops
    if not stops:
        return
    kind = LeakageError if all(v.finding.rule == "leakage" for v in stops) else DataError
    raise kind("\n".join([*paragraphs(outcome, shown), f"The full report: {report}"]))


def paragraphs(outcome: ValidationOutcome, shown: int) -> list[str]:
    """Return one paragraph for each rule that stops the run."""
    return [_paragraph(verdict, outcome, shown) for verdict in outcome.stops]


def _paragraph(verdict: Verdict, outcome: ValidationOutcome, shown: int) -> str:
    """Return the paragraph of one rule."""
    finding = verdict.finding
    subject = (
        f"table {finding.table}" + (f", column {finding.column}" if finding.column else "") + f", rule {finding.rule}"
    )
    if finding.status == "errored":
        return f"{subject}: could not be checked: {finding.detail}. Correct the data, or set validation.rules.{finding.rule} to warn."
    if finding.rule in ("row_count", "columns"):
        return f"{subject}: {_structure(verdict)}"
    total = outcome.rows_in(finding.table)
    rows = "".join(f"\n  {line}" for line in examples(verdict, shown))
    return f"{subject} (stop): {len(verdict.rows)} of {total} rows. First rows:{rows}\n{_next(finding.rule, finding.table)}"


def examples(verdict: Verdict, shown: int) -> list[str]:
    """Return the first unexpected rows, one line each, starting near the position at which their values differ."""
    rows = verdict.rows[:shown]
    notes = (verdict.notes or [""] * len(rows))[:shown]
    if verdict.finding.rule in ("chat_template", "unknown_tokens"):
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
    """Return the shown value of a row."""
    return plain(row[column]) if isinstance(row.get(column), str | list | None) else row[column]


def _first_difference(values: Sequence[Any]) -> int:
    """Return the position from which to show texts with a long common start, such as a system prompt; else 0."""
    texts = sorted({value for value in values if isinstance(value, str)})
    if len(texts) < 2:
        return 0
    # In sorted order, the common start of the first and the last text is common to all.
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(texts[0], texts[-1], strict=False)))
    return shared - _BEFORE if shared > _WIDTH // 2 else 0


def _cut(value: Any, start: int) -> str:
    """Return a value, shortened at both ends."""
    text = repr(value if not start or not isinstance(value, str) else "..." + value[start:])
    return text if len(text) <= _WIDTH else text[: _WIDTH - 3] + "..."


def _structure(verdict: Verdict) -> str:
    """Return the message for a missing column or an empty table."""
    if verdict.finding.rule == "columns":
        return "the column is missing. Make the table again with `dvc repro ingest`, or map it in data.*.columns."
    detail = verdict.finding.detail
    if "quarantined" not in detail:
        return "the table has no rows. Set data.*.source to a source with rows, or raise data.*.rows."
    return f"{detail}. No row is left. Check data.*.source and the limits under validation."


def _next(rule: str, table: str) -> str:
    """Return the next step for a rule."""
    if rule == "leakage":
        return (
            "Training on held-out prompts would inflate the score. Use a different source for"
            f" data.{table} or for the held-out table, or set validation.rules.leakage to quarantine to remove these training rows."
        )
    return f"Correct the source, or set validation.rules.{rule} to quarantine (remove these rows) or warn (keep them)."


def other_form(table: str, rows: Sequence[Row], demonstrations: Sequence[Row]) -> dict[str, int]:
    """Count the prompts of a table that are text while all demonstrations are chat, or the other way round, under words for the page."""
    forms = {isinstance(row["prompt"], list) for row in demonstrations}
    if table == "sft" or len(forms) != 1:
        return {}
    chat = forms.pop()
    count = sum(isinstance(row["prompt"], list) != chat for row in rows)
    if not count:
        return {}
    ours, theirs = ("plain text", "chat") if chat else ("chat", "plain text")
    return {
        f"prompts are {ours}, but all of data.sft is {theirs}: the model is asked in a form that it was not trained on. Give both"
        ' the same form; a prompt of chat is [{"role": "user", "content": "…"}]': count
    }


def require_kept_template(template: Any, built_in: str, tables: Mapping[Table, Sequence[Row]]) -> None:
    """Raise DataError if a table needs the built-in model's chat template, which the stage sft removes after rows of plain text.

    Problems and labelled answers may be read from models/base, which keeps it.
    """
    if template != built_in or any(isinstance(row["prompt"], list) for row in tables["sft"]):
        return
    for table in ("preferences", "preferences_heldout", "evaluation"):
        if count := sum(isinstance(row["prompt"], list) for row in tables[table]):
            source = table.removesuffix("_heldout")
            raise DataError(
                f"{table}: {count} of {len(tables[table])} prompts are chat, and all of data.sft is plain text, after which the built-in"
                " model has no chat template: the stages after sft could not read them. Give data.sft conversations (for plain columns:"
                f" posttrain configure 'data.sft.template=\"{{prompt}}\"'), or data.{source} plain text, or take a chat model."
            )


def without_template(template: Any, built_in: str, table: str, rows: Sequence[Row]) -> dict[str, int]:
    """Count the rows of plain text for a model with its own chat template, under words for the page.

    Args:
        template: the tokenizer's chat template, None if it has none.
        built_in: that of the built-in model, which reads plain text as well.
    """
    if not template or template == built_in or table == "preferences_heldout":
        return {}
    count = sum(isinstance(row["prompt"], str) for row in rows)
    if not count:
        return {}
    return {
        "rows are plain text, and go without the model's chat template. To write them as turns of a conversation:"
        f" posttrain configure 'data.{table}.template=\"{{prompt}}\"'": count
    }


def summary(outcome: ValidationOutcome) -> dict[str, float]:
    """Return the rows in, valid and quarantined per table, and the rows that each rule found."""
    numbers: dict[str, float] = {}
    for table in sorted(outcome.kept):
        kept, away = len(outcome.kept[table]), len(outcome.quarantined[table])
        numbers |= {f"rows/{table}/in": kept + away, f"rows/{table}/valid": kept, f"rows/{table}/quarantined": away}
    for rule, verdicts in by_rule(outcome.verdicts).items():
        numbers[f"rules/{rule[0]}/{rule[1]}"] = len({row["id"] for verdict in verdicts for row in verdict.rows})
    numbers["errored"] = sum(v.finding.status == "errored" for v in outcome.verdicts)
    return numbers


def by_rule(verdicts: Sequence[Verdict]) -> dict[tuple[str, str], list[Verdict]]:
    """Group the verdicts by table and rule."""
    groups: dict[tuple[str, str], list[Verdict]] = {}
    for verdict in verdicts:
        groups.setdefault((verdict.finding.table, verdict.finding.rule), []).append(verdict)
    return groups
