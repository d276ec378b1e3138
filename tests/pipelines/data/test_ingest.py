"""Sources to canonical tables."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.config.data_schema import DataParams, GradedAnswers, TableSource
from pipelines.config.params import load_params
from pipelines.data.column_mapping import canonical_rows, generated_rows
from pipelines.data.compact import compact
from pipelines.data.files import read_file
from pipelines.data.sources import table_rows
from pipelines.data.tables import plain, read_rows, write_rows
from pipelines.ingest import split_by_prompt
from posttrain.environments.parts import KINDS
from posttrain.errors import ConfigError, DataError
from posttrain.text import letters_and_digits, normalised


@pytest.fixture
def data(root: Path) -> DataParams:
    return load_params(root / "params.yaml").data


def source(path: object = "memory", **fields: Any) -> TableSource:
    return TableSource(source=str(path), **fields)


def test_default_tables_come_from_the_generator_with_ids_in_order(data: DataParams) -> None:
    for kind in KINDS:
        rows = table_rows(kind, data)
        assert len(rows) == getattr(data, kind).rows
        assert [row["id"] for row in rows] == list(range(len(rows)))


def test_a_generator_refuses_what_would_have_no_effect(data: DataParams) -> None:
    changed = data.model_copy(update={"sft": source("arithmetic", rows=5, columns={"prompt": "x"})})
    with pytest.raises(ConfigError, match=r"data\.sft\.columns: has no effect on the generator 'arithmetic'"):
        table_rows("sft", changed)
    with pytest.raises(ConfigError, match=r"data\.sft\.rows: missing"):
        table_rows("sft", data.model_copy(update={"sft": source("arithmetic")}))


def test_an_unknown_source_names_the_nearest_generator(data: DataParams) -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'arithmetic'\?.*\.jsonl.*hub:OWNER/NAME"):
        table_rows("sft", data.model_copy(update={"sft": source("aritmetic", rows=3)}))


# Files ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_kind_of_file_gives_the_same_records(tmp_path: Path, suffix: str) -> None:
    records = [{"prompt": 'a, "b"\nc', "answer": "1"}, {"prompt": "é", "answer": "2"}]
    path = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    elif suffix == ".csv":
        path.write_text('prompt,answer\n"a, ""b""\nc",1\né,2\n', encoding="utf-8")
    elif suffix == ".json":
        path.write_text(json.dumps(records), encoding="utf-8")
    else:
        path.write_text("\n\n".join(map(json.dumps, records)) + "\n", encoding="utf-8")
    assert read_file(path) == records


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", '{"a": 1}\n{"a": \n', r"x\.jsonl, line 2, column 7: not JSON: Expecting value.*'\{\"a\": '"),
        ("x.jsonl", '{"a": 1}\n[1]\n', r"x\.jsonl, line 2: must be an object with named columns, and is an array"),
        ("x.jsonl", "\n \n", r"x\.jsonl: has no records"),
        ("x.json", '{"a": 1}', r"must hold an array of objects, and holds an object"),
        ("x.json", '{"a": 1}\n{"a": 2}', r"line 2, column 1: not JSON: Extra data.*rename it"),
        ("x.json", "[1]", r"element 0: must be an object"),
        ("x.csv", "a,b\n1,2,3\n", r"x\.csv, line 2: has 3 fields, the header has 2"),
        ("x.csv", "a,b\n1\n", r"x\.csv, line 2: has 1 fields, the header has 2"),
        ("x.csv", "a,b\n", r"has no records"),
        ("x.parquet", "PAR?", r"not a Parquet file"),
        (
            "x.txt",
            "",
            r"cannot read files that end in '\.txt'.*Valid: \.csv, \.json, \.jsonl, \.ndjson, \.parquet, \.tsv",
        ),
    ],
)
def test_a_broken_file_is_named_with_line_and_fault(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        read_file(path)


def test_a_missing_file_and_one_in_another_encoding_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl: no such file"):
        read_file(tmp_path / "none.jsonl")
    (tmp_path / "l.jsonl").write_bytes('{"a": "é"}'.encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8 text at byte 7"):
        read_file(tmp_path / "l.jsonl")


@settings(max_examples=60)
@given(st.text())
def test_any_line_is_records_or_a_data_error(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_text(text, encoding="utf-8", errors="ignore")
    with contextlib.suppress(DataError):
        assert all(isinstance(record, dict) for record in read_file(path))


# Shapes --------------------------------------------------------------------------------------------------------------


def test_columns_are_names_dotted_paths_or_templates() -> None:
    record = {"q": {"text": "How many?"}, "Body": "Two cats.", "turns": [{"x": "first"}], "a.b": 3, "ID": 9}
    columns = {"prompt": "{Body} {q.text} {turns.0.x}", "answer": "a.b", "origin": "ID"}
    assert canonical_rows("problems", source(columns=columns), [record]) == [
        {"id": 0, "prompt": "Two cats. How many? first", "answer": "3", "origin": "9"}
    ]


def test_number_answers_become_text_and_whole_ones_lose_their_point() -> None:
    records = [{"prompt": "p", "answer": value} for value in (51.0, 0.5, 7, "x")]
    assert [row["answer"] for row in canonical_rows("problems", source(), records)] == ["51", "0.5", "7", "x"]
    huge = [{"prompt": "q", "answer": 10**400}]
    assert canonical_rows("problems", source(), huge)[0]["answer"] == "1" + "0" * 400, "no number of any type is lost"


def test_a_missing_column_names_those_there_are() -> None:
    with pytest.raises(
        DataError,
        match=r"column 'prompt' should come from 'questoin', which no record has; did you mean 'question'\? Valid: answer, question",
    ):
        canonical_rows(
            "problems", source(columns={"prompt": "questoin", "answer": "answer"}), [{"question": "q", "answer": "1"}]
        )


def test_a_mapping_of_the_prompt_only_gives_problems_without_answers() -> None:
    changes = Counter[str]()
    record = {"question": "q", "solution": "1"}
    (row,) = canonical_rows("problems", source(columns={"prompt": "question"}), [record], changes)
    assert (row["prompt"], row.get("answer")) == ("q", None)
    assert changes["columns that are not used: solution"] == 1
    with pytest.raises(ConfigError, match=r"data\.problems\.columns: has no 'answer'"):
        canonical_rows("problems", source(columns={"prompt": "answer"}), [{"answer": "q", "solution": "1"}])


def test_a_mapping_need_not_name_columns_that_have_their_own_name() -> None:
    changes = Counter[str]()
    asked = source(columns={"prompt": "question"})
    record = {"question": "q", "answer": "1", "level": "easy"}
    (row,) = canonical_rows("problems", asked, [record], changes)
    assert {name: row[name] for name in row} == {"id": 0, "prompt": "q", "answer": "1"}
    assert changes["columns that are not used: level"] == 1


def test_extract_keeps_the_first_group_and_names_a_row_without_one() -> None:
    records = [{"prompt": "p", "answer": "so\n#### 1,200"}, {"prompt": "q", "answer": "none"}]
    asked = source(extract={"answer": r"#### (\S+)"})
    assert canonical_rows("problems", asked, records[:1])[0]["answer"] == "1,200"
    with pytest.raises(DataError, match="row 1: answer 'none' does not match extract"):
        canonical_rows("problems", asked, records)
    for pattern, message in (("(", "not a regular expression"), ("x", "has no group")):
        with pytest.raises(ConfigError, match=message):
            canonical_rows("problems", source(extract={"answer": pattern}), records)


def test_graded_answers_pair_every_better_one_with_every_worse_one() -> None:
    record = {
        "q": "p",
        "a": {"t": "A", "s": 3},
        "b": {"t": "B", "s": 1},
        "c": {"t": "C", "s": 1},
        "d": {"t": "D", "s": 2},
    }
    graded = GradedAnswers(columns=["a", "b", "c", "d"], text="t", score="s", better="higher")
    rows = canonical_rows("preferences", source(columns={"prompt": "q"}, graded=graded), [record])
    pairs = {(row["chosen"], row["rejected"], row["chosen_score"], row["rejected_score"]) for row in rows}
    assert pairs == {("A", "B", 3, 1), ("A", "C", 3, 1), ("A", "D", 3, 2), ("D", "B", 2, 1), ("D", "C", 2, 1)}
    assert [row["id"] for row in rows] == [0, 1, 2, 3, 4]
    assert {row["record"] for row in rows} == {0}


@pytest.mark.parametrize("score", [math.nan, math.inf, "high", None, 10**400])
def test_a_score_that_is_no_finite_number_is_named(score: Any) -> None:
    pair = {"prompt": "p", "chosen": "c", "rejected": "r", "chosen_score": 1.0, "rejected_score": 0.5}
    with pytest.raises(DataError, match=r"row 1: rejected_score is "):
        canonical_rows("preferences", source(), [pair, pair | {"rejected_score": score}])


@pytest.mark.parametrize(
    ("columns", "given", "message"),
    [
        (None, {"chosen_score": 1}, "has chosen_score, but no row has a value of rejected_score;"),
        (None, {"score_chosen": 1}, "has score_chosen, but no row has a value of score_rejected;"),
        (None, {"score_rejected": 1}, "has score_rejected, but no row has a value of score_chosen;"),
        (
            None,
            {"score_chosen": 1, "score_rejected": None},
            "has score_chosen, but no row has a value of score_rejected;",
        ),
        ({"chosen_score": "good"}, {"good": 1}, "has good, but no row has a value of rejected_score;"),
        (
            {"chosen_score": "good", "rejected_score": "bad"},
            {"good": 1, "bad": None},
            "no row has a value of bad; pairs",
        ),
        (None, {"score_chosen": "high", "score_rejected": 1}, "row 0: score_chosen is 'high'"),
    ],
)
def test_one_score_without_the_other_is_refused_by_the_names_of_the_file(
    columns: dict[str, str] | None, given: dict[str, Any], message: str
) -> None:
    texts = {"prompt": "p", "chosen": "c", "rejected": "r"}
    mapped = None if columns is None else {name: name for name in texts} | columns
    with pytest.raises(DataError, match=message):
        canonical_rows("preferences", source(columns=mapped), [texts | given])


def test_the_advice_about_one_score_is_accepted() -> None:
    texts = {"prompt": "p", "chosen": "c", "rejected": "r"}
    rows = canonical_rows("preferences", source(columns={name: name for name in texts}), [texts | {"score_chosen": 1}])
    assert rows == [{"id": 0, **texts}]


def test_weights_of_examples_are_numbers_and_a_weight_elsewhere_is_a_column_like_any_other(tmp_path: Path) -> None:
    record = {"prompt": "p", "completion": "c", "weight": 2, "kg": 0.5}
    rows = canonical_rows("sft", source(), [record])
    assert rows == [{"id": 0, "prompt": "p", "completion": "c", "weight": 2.0}]
    write_rows("sft", rows, tmp_path / "sft.parquet")
    assert read_rows(tmp_path / "sft.parquet") == rows
    columns = {"prompt": "prompt", "completion": "completion", "weight": "kg"}
    assert canonical_rows("sft", source(columns=columns), [record])[0]["weight"] == 0.5
    with pytest.raises(DataError, match="row 0: weight is 'heavy'; it must be a number"):
        canonical_rows("sft", source(), [record | {"weight": "heavy"}])
    parcels = {"prompt": "prompt", "answer": "kg", "weight": "weight"}
    assert canonical_rows("problems", source(columns=parcels), [record])[0]["weight"] == "2"


def test_a_column_that_is_never_text_is_the_wrong_column() -> None:
    with pytest.raises(DataError, match=r"completion is never text; row 0 holds True \(bool\)"):
        canonical_rows("sft", source(), [{"prompt": "p", "completion": True}])


# Tables --------------------------------------------------------------------------------------------------------------


def test_tables_round_trip_with_messages_and_values_of_a_wrong_type(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}]
    rows = [
        {"id": 0, "prompt": messages, "completion": "x", "source": "s"},
        {"id": 1, "prompt": messages, "completion": True, "source": "s"},
        {"id": 2, "prompt": messages, "completion": None, "source": "s"},
    ]
    write_rows("sft", rows, tmp_path / "sft.parquet")
    assert pq.read_table(tmp_path / "sft.parquet")["completion"].to_pylist() == ["x", None, None]
    assert read_rows(tmp_path / "sft.parquet") == rows


def test_the_same_rows_are_the_same_bytes_and_an_empty_table_keeps_its_columns(tmp_path: Path) -> None:
    rows = [{"id": 0, "prompt": "p", "answer": "1"}]
    for name in ("a", "b"):
        write_rows("problems", rows, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    write_rows("preferences", [], tmp_path / "empty", extra=["reason"])
    assert pq.read_table(tmp_path / "empty").column_names == ["id", "prompt", "chosen", "rejected", "reason"]


PROMPTS = st.lists(st.text(min_size=1, max_size=8), min_size=4, max_size=40)


@given(PROMPTS, st.floats(0.1, 0.5), st.integers(0, 9))
def test_held_out_pairs_share_no_prompt_with_the_others(prompts: list[str], share: float, seed: int) -> None:
    rows = [{"id": i, "prompt": prompt} for i, prompt in enumerate(prompts)]
    keys = {normalised(plain(row["prompt"])) for row in rows}
    if len(keys) < 2:
        return
    kept, heldout = split_by_prompt(rows, share, seed)
    assert sorted(row["id"] for row in kept + heldout) == list(range(len(rows)))
    held = {normalised(row["prompt"]) for row in heldout}
    assert not held & {normalised(row["prompt"]) for row in kept}
    assert len(held) == max(1, round(share * len(keys)))
    assert (kept, heldout) == split_by_prompt(rows, share, seed)


@given(
    st.lists(st.text("ab!?. ", min_size=1, max_size=4), min_size=4, max_size=40), st.floats(0.1, 0.5), st.integers(0, 3)
)
def test_the_split_is_that_of_prompts_sorted_by_a_hash_of_their_letters_then_by_text(
    prompts: list[str], share: float, seed: int
) -> None:
    """Prompts that differ only in punctuation have one hash, so the border may lie between them."""
    rows = [{"id": i, "prompt": prompt} for i, prompt in enumerate(prompts)]
    keys = {normalised(plain(row["prompt"])) for row in rows}
    places = {key: hashlib.sha256(f"{seed}\0{letters_and_digits(key)}".encode()).digest() for key in keys}
    count = max(1, round(share * len(keys)))
    if count >= len(keys):
        return
    held = set(sorted(keys, key=lambda key: (places[key], key))[:count])
    kept, heldout = split_by_prompt(rows, share, seed)
    assert heldout == [row for row in rows if normalised(row["prompt"]) in held]
    assert kept == [row for row in rows if normalised(row["prompt"]) not in held]


def test_rows_share_their_names_and_stay_dictionaries() -> None:
    names = ("id", "prompt", "chosen", "rejected", "chosen_score", "rejected_score")
    rows = [compact(dict.fromkeys(names, i)) for i in range(100)]
    plain_size = sys.getsizeof(dict.fromkeys(names, 0))
    assert sys.getsizeof(rows[-1]) < 0.6 * plain_size
    row = rows[0]
    row |= {"id": 7, "reason": "x"}
    assert row.pop("chosen") == 0
    assert list(row.items()) == [("id", 7), *((n, 0) for n in ("prompt", "rejected", *names[4:])), ("reason", "x")]
    assert rows[1] == dict.fromkeys(names, 1)
    for odd in ({"__class__": 1}, {"a b": 1}, {"": 1}, {"class": 1}):
        assert compact(odd) == odd


def test_heldout_needs_a_share_that_leaves_both_sides() -> None:
    with pytest.raises(ConfigError, match=r"data\.preferences\.heldout: must be greater than 0"):
        split_by_prompt([{"prompt": "a"}, {"prompt": "b"}], 0.0, 0)
    with pytest.raises(DataError, match="hold out 1 of 1 prompts"):
        split_by_prompt([{"prompt": "a"}], 0.2, 0)


# Real data -----------------------------------------------------------------------------------------------------------


@pytest.mark.real
def test_gsm8k_solutions_make_graded_pairs(shared_data: Path) -> None:
    records = read_file(shared_data / "gsm8k" / "example_model_solutions.jsonl")
    names = ["6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification"]
    graded = GradedAnswers(columns=names, text="solution", score="is_correct")
    rows = canonical_rows("preferences", source(columns={"prompt": "question"}, graded=graded), records)
    right = [sum(record[name]["is_correct"] for name in names) for record in records]
    assert len(rows) == sum(good * (4 - good) for good in right)
    assert {(row["chosen_score"], row["rejected_score"]) for row in rows} == {(1.0, 0.0)}


@pytest.mark.real
def test_pandalm_prompts_are_split_by_prompt_and_not_by_row(shared_data: Path) -> None:
    columns = {"prompt": "{instruction}\n{input}", "chosen": "response1", "rejected": "response2"}
    records = read_file(shared_data / "pandalm_human" / "testset-v1.json")
    rows = canonical_rows("preferences", source(columns=columns), records)
    assert (len(rows), sum(isinstance(row["chosen"], bool) + isinstance(row["rejected"], bool) for row in rows)) == (
        999,
        6,
    )
    kept, heldout = split_by_prompt(rows, 0.2, 0)
    assert (len({row["prompt"] for row in kept}), len({row["prompt"] for row in heldout})) == (136, 34)


def test_further_columns_of_an_environment_become_text_as_those_of_files_do() -> None:
    made = [
        {"prompt": "a", "answer": 7, "level": 1, "tags": ["x"], "about": {"b": 1}, "none": None},
        {"prompt": "b", "answer": 7.5, "level": "hard", "tags": [], "about": {}, "none": "n"},
    ]
    source = TableSource(source="made:ENVIRONMENT", rows=2)
    found = generated_rows("problems", made, source, "data.problems", Counter())
    assert [row["answer"] for row in found] == ["7", "7.5"]
    assert [(row["level"], row["tags"], row["about"], row["none"]) for row in found] == [
        ("1", '["x"]', '{"b": 1}', ""),
        ("hard", "[]", "{}", "n"),
    ]
    for value in ({1}, object(), b"x"):
        with pytest.raises(DataError, match=r"data.problems, row 0: .* is not JSON serializable; give texts, numbers"):
            generated_rows(
                "problems", [{"prompt": "a", "answer": "7", "odd": value}], source, "data.problems", Counter()
            )
    with pytest.raises(DataError, match="prompt is never text; row 0 holds 3"):
        generated_rows("problems", [{"prompt": 3, "answer": "7"}], source, "data.problems", Counter())


@pytest.mark.parametrize("value", [[], [{}], [None], 5, [{"role": "user", "content": "q"}]])
def test_a_further_column_named_like_one_of_other_tables_becomes_text(tmp_path: Path, value: Any) -> None:
    records = [{"q": "1+1=", "a": "2", "x": value}, {"q": "1+2=", "a": "3", "x": value}]
    columns = {"prompt": "q", "completion": "a", "chosen": "x"}
    rows = canonical_rows("sft", source(columns=columns), records)
    write_rows("sft", rows, tmp_path / "sft.parquet")
    assert [row["chosen"] for row in read_rows(tmp_path / "sft.parquet")] == [json.dumps(value, sort_keys=True)] * 2


def test_a_column_without_a_name_is_shown_as_such() -> None:
    changes: Counter[str] = Counter()
    canonical_rows("sft", source(), [{"": "0", "prompt": "a", "completion": "b"}], changes)
    assert changes["columns that are not used: '' (a column without a name, such as an index of pandas)"] == 1
