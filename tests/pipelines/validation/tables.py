"""Small tables, and a stand-in tokenizer that counts characters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipelines.data.tables import Row, Table
from pipelines.validation.check import ValidationOutcome
from pipelines.validation.messages import summary
from pipelines.validation.suites import TableLimits

LIMITS = TableLimits(max_prompt_tokens=20, max_completion_tokens=20, answers="number")
Tables = dict[Table, list[Row]]
Checked = Callable[..., ValidationOutcome]


class Characters:
    """Counts characters, and one for the end of a completion."""

    def prompt(self, row: Row) -> int:
        return self._count(row["prompt"])

    def pair(self, row: Row, column: str) -> tuple[int, int]:
        return self._count(row["prompt"]), self._count(row[column]) + 1

    def unknown(self, row: Row) -> float:
        text = str(row["prompt"])
        return text.count("\u2603") / max(1, len(text))

    def _count(self, text: Any) -> int:
        return len(text or "") if isinstance(text, str | None) else len(text[-1]["content"])


def sft(*pairs: tuple[Any, Any]) -> Tables:
    return {"sft": [{"id": i, "prompt": prompt, "completion": text} for i, (prompt, text) in enumerate(pairs)]}


def preferences(*pairs: tuple[Any, Any], scores: list[tuple[float, float]] | None = None) -> Tables:
    rows: list[Row] = [{"id": i, "prompt": f"p {i}", "chosen": c, "rejected": r} for i, (c, r) in enumerate(pairs)]
    for row, (high, low) in zip(rows, scores or [], strict=False):
        row |= {"chosen_score": high, "rejected_score": low}
    return {"preferences": rows}


def answers(table: Table, *answers: Any, **columns: list[Any]) -> Tables:
    rows = [{"id": i, "prompt": f"{table} {i}", "answer": answer} for i, answer in enumerate(answers)]
    return {table: [row | {name: values[i] for name, values in columns.items()} for i, row in enumerate(rows)]}


def reasons(outcome: ValidationOutcome, table: Table) -> dict[int, str]:
    return {row["id"]: row["reason"] for row in outcome.quarantined[table]}


def count(outcome: ValidationOutcome, rule: str) -> float:
    return summary(outcome)[f"rules/{rule}"]
