"""Check the canonical tables with Great Expectations: accept rows, quarantine rows, or stop the run.

    python -m pipelines.validate

Writes data/valid and data/quarantine (rows with a `reason`), and validation.html among the run's artifacts.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from pipelines.config.evaluation_schema import EvaluationParams
from pipelines.config.params import Params
from pipelines.data.tables import EXPERT, FOLDER, LABEL, OPTIONAL, Row, Table, read_changes, read_rows, write_rows
from pipelines.runtime.run import Run
from pipelines.runtime.step import main
from posttrain.errors import ConfigError
from posttrain.rewards import require_available

if TYPE_CHECKING:
    from posttrain.data.conversations import TrainOn
    from posttrain.data.tokens import TextEncoder
    from posttrain.rewards.extraction import AnswerKind

MODEL = Path("models/base")
SAMPLES = 2
"""Rows of each table whose trained tokens the page shows."""
VALID, QUARANTINE = Path("data/valid"), Path("data/quarantine")
TEXTS = ("prompt", "completion", "chosen", "rejected")
TABLES: tuple[Table, ...] = get_args(Table)


def run(run: Run) -> None:
    """Check all tables, write the valid and the quarantined rows, and record the counts."""
    project = run.context.params
    params = project.validation
    for section in project.rewards.values():
        # Check now: the first answer is scored only after hours of training.
        require_available(section.function)
    tables = {table: read_rows(FOLDER / f"{table}.parquet") for table in TABLES}
    lengths = TokenLengths(base_encoder(), project.sft.train_on)
    _check_context(params.max_prompt_tokens, params.max_completion_tokens, lengths.encoder.max_length)

    from pipelines.validation.check import check
    from pipelines.validation.masks import left_out, samples
    from pipelines.validation.messages import other_form, refuse, require_kept_template, summary, without_template
    from pipelines.validation.report import page
    from pipelines.validation.suites import TableLimits, Validator
    from posttrain.models.tiny import CHAT_TEMPLATE

    run.recorder.ready()
    limits = TableLimits(
        params.max_prompt_tokens, params.max_completion_tokens, answer_kind(project), params.max_unknown_share
    )
    validator = Validator()
    outcome = check(tables, params.rules, limits, lengths, validator)
    report = run.outputs.artifact("validation.html")
    shown = [] if outcome.stops else samples(lengths.encoder, outcome.kept, SAMPLES, project.sft.train_on)
    changes = read_changes(FOLDER)
    for table in () if outcome.stops else TABLES:
        counted = left_out(lengths.encoder, table, outcome.kept[table], project.sft.train_on)
        counted |= other_form(table, outcome.kept[table], outcome.kept["sft"])
        counted |= without_template(lengths.encoder.tokenizer.chat_template, CHAT_TEMPLATE, table, outcome.kept[table])
        for what, count in counted.items():
            changes.setdefault(table, {})[what] = count
            print(f"validate: {table}: {count} {what}", flush=True)
    report.write_text(page(outcome, params.max_shown_rows, changes, shown), encoding="utf-8")
    numbers = summary(outcome)
    run.recorder.summary(numbers)
    refuse(outcome, params.max_shown_rows, report)
    require_kept_template(lengths.encoder.tokenizer.chat_template, CHAT_TEMPLATE, outcome.kept)
    for table in TABLES:
        write_rows(table, outcome.kept[table], VALID / f"{table}.parquet")
        write_rows(table, outcome.quarantined[table], QUARANTINE / f"{table}.parquet", extra=["reason"])
        if table in OPTIONAL and not tables[table]:
            continue
        print(
            f"validate: {table}: {len(outcome.kept[table])} rows valid, {len(outcome.quarantined[table])} quarantined",
            flush=True,
        )
    for verdict in outcome.verdicts:
        if verdict.finding.status != "passed":
            check_name = f"{verdict.finding.table}: {verdict.finding.rule} ({verdict.finding.column})"
            print(
                f"validate: {verdict.policy}: {check_name}: {verdict.finding.status}, {len(verdict.rows)} rows",
                flush=True,
            )


class TokenLengths:
    """Count tokens as training is going to see them: special tokens, chat template and end of sequence included.

    Args:
        train_on: `sft.train_on`. A row for imitation that it cannot train is refused here, not hours later; the lengths of prompt and
            completion are those of `completion`, and with `each` those of its longest sequence.
    """

    def __init__(self, encoder: TextEncoder, train_on: TrainOn = "completion") -> None:
        self.encoder, self.train_on = encoder, train_on

    def prompt(self, row: Row) -> int:
        return len(self.encoder.prompt(row["prompt"] or "", self._tools(row), str(row["id"])))

    def pair(self, row: Row, column: str) -> tuple[int, int]:
        text = row["prompt"] or "", row[column] or "", str(row["id"]), self._tools(row)
        imitated = column == "completion" and LABEL not in row
        if imitated and self.train_on == "each":
            answers = self.encoder.answers(*text)
            return len(answers[0].prompt), max(map(len, answers)) - len(answers[0].prompt)
        tokens = self.encoder.tokens(*text)
        if imitated and not row.get(EXPERT) and self.train_on != "completion":
            self.encoder.tokens(*text, self.train_on)
        return len(tokens.prompt), len(tokens.response)

    def unknown(self, row: Row) -> float:
        return self.encoder.unknown_share([row[name] for name in TEXTS if row.get(name)])

    def _tools(self, row: Row) -> list[Any] | None:
        from posttrain.data.tokens import row_tools

        return row_tools(row)


def answer_kind(params: Params) -> AnswerKind:
    """Return the kind of gold answers: that of the reward `answer`, or text for any other reward."""
    evaluation: EvaluationParams = params.evaluation
    judge = params.rewards[evaluation.accuracy]
    kind: AnswerKind = judge.arguments.get("kind", "number") if judge.function == "answer" else "text"
    return kind


def base_encoder() -> TextEncoder:
    """Load the base model's tokenizer."""
    from transformers.utils import logging

    from posttrain.models.folders import load_encoder

    logging.set_verbosity_error()
    return load_encoder(MODEL)


def _check_context(prompt: int, completion: int, context: int) -> None:
    """Raise ConfigError if a row of maximum length does not fit the model's context."""
    if prompt + completion > context:
        raise ConfigError(
            f"validation.max_prompt_tokens = {prompt} and max_completion_tokens = {completion}: a row of both lengths has"
            f" {prompt + completion} tokens, but the context of {MODEL} is {context}. Lower one of them."
        )


if __name__ == "__main__":
    main(
        run,
        "validate",
        params=("validation", "evaluation.accuracy", "rewards", "sft.train_on"),
        inputs=[*(f"data/tables/{table}.parquet" for table in TABLES), "models/base"],
    )
