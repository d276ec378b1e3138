"""Whatever stands in a parameter file or a table: it is accepted, or refused in one paragraph. No traceback."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.config.data_schema import GradedAnswers, TableSource
from pipelines.config.params import Params, load_params
from pipelines.data.column_mapping import canonical_rows
from pipelines.data.files import read_file
from pipelines.data.tables import Row, Table, read_rows, write_rows
from posttrain.environments.parts import KINDS
from posttrain.errors import ConfigError, DataError, PosttrainError

FEW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
MANY = settings(FEW, max_examples=300)
ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=12)
"""With halves of surrogate pairs, which JSON can spell and UTF-8 cannot."""
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
MESSAGES = st.lists(st.fixed_dictionaries({"role": st.text(max_size=5), "content": ANY_TEXT | JSON}), max_size=2)
NAMES = st.sampled_from(
    [
        "prompt",
        "completion",
        "chosen",
        "rejected",
        "answer",
        "chosen_score",
        "rejected_score",
        "id",
        "wrong_type",
        "a.b",
        "equation",
    ]
)
RECORDS = st.lists(st.dictionaries(NAMES | st.text(max_size=4), JSON | MESSAGES, max_size=7), min_size=1, max_size=5)
PATHS = NAMES | st.sampled_from(["{prompt}", "{a.b} {x}", "{", "a..b", "0", ""]) | st.text(max_size=6)


@pytest.fixture(scope="module")
def shipped(root: Path) -> str:
    return (root / "params.yaml").read_text(encoding="utf-8")


@MANY
@given(data=st.data())
def test_any_edit_of_the_parameter_file_is_valid_or_refused_in_words(
    shipped: str, tmp_path: Path, data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, len(shipped)))
    end = data.draw(st.integers(start, min(len(shipped), start + 30)))
    text = (
        shipped[:start]
        + data.draw(st.text(max_size=10) | st.sampled_from(["\t", "&a ", "*a", "!!python/name:os.system ", "{", ": "]))
        + shipped[end:]
    )
    path = tmp_path / "params.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with contextlib.suppress(ConfigError):  # anything else is a traceback that a user would see
        assert isinstance(load_params(path), Params)


def through_ingest(folder: Path, kind: Any, source: TableSource, records: list[Row]) -> list[Row]:
    """Do the steps' work on a file: read, shape, write as a table, read again."""
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    rows = canonical_rows(kind, source, read_file(file))
    table: Table = kind
    write_rows(table, rows, folder / "rows.parquet")
    return read_rows(folder / "rows.parquet")


@MANY
@given(kind=st.sampled_from(sorted(KINDS)), records=RECORDS, columns=st.none() | st.dictionaries(NAMES, PATHS, max_size=4),
       extract=st.none() | st.dictionaries(NAMES, st.sampled_from(["(.)", "(", "x", "(a)?b"]), max_size=1))  # fmt: skip
def test_any_table_is_taken_or_refused_in_words(
    tmp_path: Path, kind: Any, records: list[Row], columns: dict[str, str] | None, extract: dict[str, str] | None
) -> None:
    source = TableSource(source="rows.jsonl", columns=columns, extract=extract)
    try:
        rows = through_ingest(tmp_path, kind, source, records)
    except (DataError, ConfigError):
        return
    assert [row["id"] for row in rows] == list(range(len(rows)))


@FEW
@given(records=st.lists(st.fixed_dictionaries({"prompt": ANY_TEXT} | {
    name: st.fixed_dictionaries({}, optional={"text": JSON, "score": SCALARS}) | SCALARS for name in ("one", "two")
}), min_size=1, max_size=4))  # fmt: skip
def test_any_graded_answers_are_paired_or_refused_in_words(tmp_path: Path, records: list[Row]) -> None:
    source = TableSource(
        source="rows.jsonl", graded=GradedAnswers(columns=["one", "two"], text="text", score="score", better="higher")
    )
    try:
        rows = through_ingest(tmp_path, "preferences", source, records)
    except PosttrainError:
        return
    assert all(row["chosen_score"] > row["rejected_score"] for row in rows)


@pytest.mark.parametrize(
    "value", ["1" * 5000, "1e400", r'"\ud800"', "[" * 100_000 + "]" * 100_000, '{"a":' * 20_000 + "1" + "}" * 20_000]
)
def test_numbers_and_nests_that_no_reader_holds(tmp_path: Path, value: str) -> None:
    good, bad = '{"prompt": "1+1=", "completion": "2"}\n', f'{{"prompt": {value}, "completion": "3"}}\n'
    (tmp_path / "rows.jsonl").write_text(good + bad)
    if value == "1e400":
        assert read_file(tmp_path / "rows.jsonl")[1]["prompt"] == math.inf
    else:
        with pytest.raises(DataError, match=r"rows\.jsonl, line 2[:,] "):
            read_file(tmp_path / "rows.jsonl")
    (tmp_path / "params.yaml").write_text(f"project: {value}\n")
    with pytest.raises(ConfigError, match=r"params\.yaml"):
        load_params(tmp_path / "params.yaml")
