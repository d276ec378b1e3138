"""Whatever rows a file holds: they are checked, encoded and shown, or refused in one paragraph. No traceback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.config.data_schema import TableSource
from pipelines.config.params import load_params
from pipelines.data.column_mapping import canonical_rows
from pipelines.data.files import read_file
from pipelines.data.tables import Row, Table, read_rows, write_rows
from pipelines.validate import TokenLengths
from pipelines.validation.check import check
from pipelines.validation.masks import samples, trained_parts
from pipelines.validation.messages import refuse, summary
from pipelines.validation.report import page
from pipelines.validation.suites import TableLimits, Validator
from posttrain.environments.parts import KINDS
from posttrain.errors import PosttrainError
from tests.data.test_conversations import CHATML, HIDDEN, MARKED, NO_SYSTEM, OPEN, REASONING, THINKING, encoder

FEW = settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
MANY = settings(FEW, max_examples=100)
TEMPLATES = (
    None,
    CHATML + OPEN,
    MARKED,
    REASONING,
    THINKING,
    NO_SYSTEM,
    HIDDEN,
    "{{ 1 / 0 }}",
    "{{ messages[7].role }}",
)
TEXT = st.text(max_size=8) | st.sampled_from(
    ["", " ", "7", "#### 7", "<think>a</think>b", "<|im_end|>", "{{ x }}", "\x00"]
)
PARTS = st.lists(
    st.sampled_from([{"type": "text", "text": "a"}, {"type": "image"}, {"text": "b"}, {}, "c", 1]), max_size=2
)
CALLS = [{"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}]
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool", "User", ""]), "content": TEXT | PARTS | st.none()},
    optional={
        "tool_calls": st.sampled_from([CALLS, [], None, "add", [{}]]),
        "name": TEXT,
        "weight": st.sampled_from([0, 1, 0.5, -1, None]),
        "thinking": TEXT,
    },
)
SAID = TEXT | st.lists(MESSAGE, max_size=4)
TOOLS = st.sampled_from([None, [], "[]", [{"type": "function", "function": {"name": "add"}}], "add", 3])
SCORE = st.none() | st.integers(-3, 3) | st.floats() | TEXT
EXTRAS = {
    "tools": TOOLS,
    "weight": SCORE,
    "chosen_score": SCORE,
    "rejected_score": SCORE,
    "answer": SCORE,
    "label": SCORE,
}
SHAPES = (
    ("prompt", "completion"),
    ("messages",),
    ("prompt", "chosen", "rejected"),
    ("chosen", "rejected"),
    ("prompt", "answer"),
    ("question", "answer"),
    ("instruction", "output"),
)
RECORDS = st.sampled_from(SHAPES).flatmap(
    lambda names: st.lists(
        st.fixed_dictionaries(
            {name: SCORE | SAID if name == "answer" else SAID for name in names},
            optional={name: values for name, values in EXTRAS.items() if name not in names},
        ),
        min_size=1,
        max_size=4,
    )
)


def accepted(folder: Path, kind: Any, records: list[Row]) -> list[Row]:
    """Return the rows that `ingest` would write for a file of these records; none if it refuses the file in words."""
    file, table = folder / "rows.jsonl", cast(Table, kind)
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    try:
        write_rows(
            table, canonical_rows(kind, TableSource(source="rows.jsonl"), read_file(file)), folder / "rows.parquet"
        )
    except PosttrainError:
        return []
    return read_rows(folder / "rows.parquet")


@MANY
@given(kind=st.sampled_from(sorted(KINDS)), records=RECORDS, template=st.sampled_from(TEMPLATES))
def test_any_accepted_row_is_encoded_or_refused_in_words(
    tmp_path: Path, kind: Any, records: list[Row], template: str | None
) -> None:
    enc = encoder(template)
    for row in accepted(tmp_path, kind, records):
        try:
            shown = trained_parts(enc, kind, row)
        except PosttrainError:
            continue
        assert all(count > 0 for parts in shown.values() for _, count, _ in parts)


@FEW
@given(records=st.fixed_dictionaries(dict.fromkeys(sorted(KINDS), RECORDS)), template=st.sampled_from(TEMPLATES))
def test_any_accepted_tables_are_checked_or_refused_in_words(
    root: Path, tmp_path: Path, records: dict[str, list[Row]], template: str | None
) -> None:
    tables = {cast(Table, kind): accepted(tmp_path, kind, rows) for kind, rows in records.items()}
    lengths = TokenLengths(encoder(template))
    limits = TableLimits(max_prompt_tokens=60, max_completion_tokens=60, answers="number")
    try:
        outcome = check(tables, load_params(root / "params.yaml").validation.rules, limits, lengths, Validator())
        shown = [] if outcome.stops else samples(lengths.encoder, outcome.kept, 2)
        html = page(outcome, 5, {}, shown)
        summary(outcome)
        refuse(outcome, 5, tmp_path / "validation.html")
    except PosttrainError:
        return
    assert html.startswith("<!doctype html>")
    for table, rows in tables.items():
        assert len(outcome.kept[table]) + len(outcome.quarantined[table]) == len(rows)
