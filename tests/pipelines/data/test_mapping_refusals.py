"""Mappings that would leak an answer, lose a part of it, or contradict themselves."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from pydantic import ValidationError

from pipelines.config.data_schema import GradedAnswers, PreferredAnswer, TableSource
from pipelines.data.column_mapping import generated_rows
from posttrain.errors import ConfigError, DataError
from tests.pipelines.data.records import rows, says, user

LABELLED = {"columns": ["w"], "answers": {"A": "a", "B": "b"}}


@pytest.mark.parametrize(
    ("kind", "columns", "more", "place"),
    [
        ("problems", {"prompt": "{q} {a}", "answer": "{a}"}, {}, "a"),
        ("problems", {"prompt": "{q} {a}", "answer": "#### {a}"}, {}, "a"),
        ("sft", {"prompt": "{a}", "completion": "{a}"}, {}, "a"),
        ("sft", {"prompt": "{d}", "completion": "d.a"}, {}, "d"),
        ("sft", {"prompt": "d", "completion": "{d.a} {q}"}, {}, "d"),
        ("preferences", {"prompt": "{q} {a}"}, {"preferred": LABELLED}, "a"),
        ("preferences", {"prompt": "{q} {r}"}, {"graded": {"answers": "r", "text": "t", "score": "s"}}, "r"),
        ("problems", {"prompt": "l.0", "answer": "l"}, {}, "l.0"),
        ("sft", {"prompt": "{d.a}", "completion": "{d} {q}"}, {}, "d.a"),
        ("preferences", {"prompt": "c.1.content", "chosen": "c", "rejected": "c"}, {}, "c.1.content"),
        (
            "preferences",
            {"prompt": "c.1.content"},
            {"preferred": {"columns": ["w"], "answers": {"A": "c", "B": "b"}}},
            "c.1.content",
        ),
        ("preferences", {"prompt": "{r.0}"}, {"graded": {"answers": "r", "text": "t", "score": "s"}}, "r.0"),
        ("preferences", {"prompt": "{r.0.t}"}, {"graded": {"answers": "r", "text": "t", "score": "s"}}, "r.0.t"),
        ("preferences", {"prompt": "{x}"}, {"graded": {"columns": ["x", "y"], "text": "t", "score": "s"}}, "x"),
    ],
)
def test_a_prompt_that_reads_a_part_of_its_answer_is_refused(
    kind: str, columns: dict[str, str], more: dict[str, Any], place: str
) -> None:
    scored = {"t": "good", "s": True}
    record = {"q": "1+1?", "a": "2", "b": "3", "w": "A", "d": {"a": "2"}, "r": [scored], "x": scored, "y": scored}
    record |= {"c": [user("1+1?"), says("2")], "l": ["2", "two"]}
    with pytest.raises(ConfigError, match=rf"prompt and .* are both read from '{place}'"):
        rows(kind, record, columns=columns, **more)


def test_a_prompt_next_to_its_answer_in_one_record_is_no_leak() -> None:
    assert rows("sft", {"d": {"q": "1+1?", "a": "2"}}, columns={"prompt": "{d.q}", "completion": "d.a"}) == [
        {"prompt": "1+1?", "completion": "2"}
    ]
    dotted = {"d": "1+1?", "d.a": "2"}
    assert rows("sft", dotted, columns={"prompt": "d", "completion": "d.a"}) == [{"prompt": "1+1?", "completion": "2"}]


@pytest.mark.parametrize("place", ["m.01", "m.-1", "m[1]", "m.\u0661"])
def test_a_place_in_a_list_has_one_spelling(place: str) -> None:
    with pytest.raises(DataError, match="which no record has"):
        rows("sft", {"m": ["1+1?", "2"]}, columns={"prompt": "m.1", "completion": place})


def test_the_question_of_a_conversation_is_no_leak() -> None:
    pair = {"c": [user("1+1?"), says("2")], "r": [user("1+1?"), says("3")]}
    made = rows("preferences", pair, columns={"prompt": "c.0.content", "chosen": "c", "rejected": "r"})
    assert made == [{"prompt": [user("1+1?")], "chosen": [says("2")], "rejected": [says("3")]}]
    shared = {"q": {"role": "gpt", "content": "2"}, "a": "2"}
    assert rows("sft", shared, columns={"prompt": "q.role", "completion": "a"})[0]["prompt"] == "gpt"


@pytest.mark.parametrize("mask", [{"loss_mask": 0}, {"train": False}, {"Mask": "no"}, {"loss_mask": [1, 0]}])
@pytest.mark.parametrize("kind", ["sft", "preferences"])
def test_a_mask_that_no_part_of_the_mapping_reads_is_refused(kind: str, mask: dict[str, Any]) -> None:
    records = [{"q": "a", "c": "b", "r": "d", "loss_mask": None}, {"q": "e", "c": "f", "r": "g"} | mask]
    columns = {"prompt": "q", "completion": "c"} if kind == "sft" else {"prompt": "q", "chosen": "c", "rejected": "r"}
    with pytest.raises(DataError, match=rf"{next(iter(mask))}' is not read, and excludes .*first: row 1"):
        rows(kind, *records, columns=columns)


def test_a_mask_may_be_the_weight_of_rows_or_exclude_nothing() -> None:
    records = [{"q": "a", "c": "b", "loss_mask": 0}, {"q": "e", "c": "f", "loss_mask": 1}]
    columns = {"prompt": "q", "completion": "c", "weight": "loss_mask"}
    assert [row["weight"] for row in rows("sft", *records, columns=columns)] == [0.0, 1.0]
    assert rows("sft", records[1], columns={"prompt": "q", "completion": "c"}) == [{"prompt": "e", "completion": "f"}]
    topics = {"q": "a", "c": "b", "labels": ["algebra"]}
    assert rows("sft", topics, columns={"prompt": "q", "completion": "c"}) == [{"prompt": "a", "completion": "b"}]


def test_bad_answers_of_an_environment_are_not_imitated() -> None:
    changes: Counter[str] = Counter()
    made = [{"prompt": "1+1?", "completion": "3", "label": False}, {"prompt": "1+1?", "completion": "2", "label": True}]
    kept = generated_rows("sft", made, TableSource(source="memory"), "data.sft", changes)
    assert [row["completion"] for row in kept] == ["2"]
    assert +changes == {"answers with label false, left out of imitation": 1}
    with pytest.raises(DataError, match="'loss_mask' is not read"):
        generated_rows("sft", [made[1] | {"loss_mask": 0}], TableSource(source="memory"), "data.sft", changes)


def test_a_label_that_selects_rows_is_not_counted_as_unused() -> None:
    changes: Counter[str] = Counter()
    records = [{"q": "a", "c": "b", "label": False}, {"q": "a", "c": "d", "label": True}]
    assert len(rows("sft", *records, columns={"prompt": "q", "completion": "c"}, changes=changes)) == 1
    assert +changes == {"answers with label false, left out of imitation": 1}


def test_an_expression_leaves_a_missing_value_to_validation() -> None:
    records = [{"prompt": "1+1?", "answer": None}, {"prompt": "2+2?", "answer": "#### 4"}, {"prompt": "3+3?"}]
    made = rows("problems", *records, extract={"answer": r"#### (\S+)"})
    assert [row["answer"] for row in made] == [None, "4", None]


def test_a_template_without_one_of_its_parts_gives_no_value() -> None:
    records = [{"q": "x", "a": "y", "r": "b"}, {"q": "x2", "a": None, "r": "z"}, {"q": "x3", "r": "z"}]
    records.append({"q": "x4", "a": float("nan"), "r": "z"})
    made = rows("sft", *records, columns={"prompt": "q", "completion": "{r} #### {a}"})
    assert [row["completion"] for row in made] == ["b #### y", None, None, None]


def test_texts_of_templates_and_expressions_keep_their_white_space() -> None:
    columns = {"prompt": "q", "completion": "{a}"}
    record = {"q": "def f():", "a": "    return 1\n"}
    assert rows("sft", record, columns=columns)[0]["completion"] == "    return 1\n"
    cut = rows("sft", record, columns=columns, extract={"completion": "^(.*)1"})
    assert cut[0]["completion"] == "    return "


def test_an_expression_is_applied_to_each_accepted_answer() -> None:
    record = {"prompt": "3+4?", "answer": ["#### 7", "#### seven "]}
    assert rows("problems", record, extract={"answer": "#### (.+)"})[0]["answer"] == '["7", "seven"]'
    assert rows("problems", {"prompt": "3+4?", "answer": 7.0}, extract={"answer": "(.*)"})[0]["answer"] == "7"
    with pytest.raises(DataError, match=r"row 0: answer 'none' does not match"):
        rows("problems", {"prompt": "3+4?", "answer": ["#### 7", "none"]}, extract={"answer": r"#### (\w+)"})


def test_an_expression_for_an_optional_column_leaves_rows_without_it() -> None:
    tools = '[{"name": "add"}]'
    records: list[dict[str, Any]] = [{"prompt": "q", "completion": "a"}, {"prompt": "r", "completion": "b"}]
    made = rows("sft", records[0] | {"tools": f"tools: {tools}"}, records[1], extract={"tools": "tools: (.*)"})
    assert [row.get("tools") for row in made] == [tools, None]
    made = rows("sft", records[0], records[1] | {"tools": f"tools: {tools}"}, extract={"tools": "tools: (.*)"})
    assert [row.get("tools") for row in made] == [None, tools]


def test_a_preferred_answer_or_label_that_a_record_lacks_is_counted() -> None:
    records = [{"q": "x", "a": "1", "b": "2", "w": "A"}, {"q": "y", "a": "1", "w": "A"}, {"q": "z", "a": "1", "b": "2"}]
    changes: Counter[str] = Counter()
    made = rows("preferences", *records, columns={"prompt": "q"}, preferred=LABELLED, changes=changes)
    assert [(row["chosen"], row["rejected"]) for row in made] == [("1", "2"), ("1", None)]
    assert changes["labels of the better answer that are missing, which count for neither"] == 1
    assert changes["pairs without a winner, left out"] == 1


@pytest.mark.parametrize(
    ("preferred", "words"),
    [
        (
            {"columns": ["ww"], "answers": {"A": "a", "B": "b"}},
            r"preferred\.columns: no record .* 'ww'; did you mean 'w'",
        ),
        ({"columns": ["w"], "answers": {"A": "a", "B": "bb"}}, r"preferred\.answers\.B: no .* 'bb'; did you mean 'b'"),
    ],
)
def test_a_preferred_column_that_no_record_has_is_refused_by_name(preferred: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        rows("preferences", {"q": "x", "a": "1", "b": "2", "w": "A"}, columns={"prompt": "q"}, preferred=preferred)


@pytest.mark.parametrize(
    ("graded", "words"),
    [
        ({"answers": "r", "text": "txt", "score": "score"}, r"graded\.text: no .* 'txt'; did you mean 'text'"),
        ({"answers": "r", "score": "score"}, r"graded\.text: missing.*score, text"),
        ({"answers": "r", "text": "text", "score": "scor"}, r"graded\.score: no .* 'scor'; did you mean 'score'"),
        ({"answers": "rr", "text": "text", "score": "score"}, r"graded\.answers: no .* 'rr'; did you mean 'r'"),
        (
            {"answers": "replies", "text": "text", "score": "score"},
            r"graded\.answers: no .* 'replies'; .*Valid: .*n\.replies",
        ),
        ({"columns": ["x", "yy"], "text": "text", "score": "score"}, r"graded\.columns: no .* 'yy'; did you mean 'y'"),
        ({"columns": ["x", "y"], "text": "txt", "score": "score"}, r"graded\.text: no .* 'txt'; did you mean 'text'"),
        (
            {"columns": ["w", "z"], "score": "z"},
            r"graded\.columns: w holds answers without scores .*\{answers: LIST, score: LIST\}",
        ),
    ],
)
def test_a_graded_place_that_no_record_has_is_refused_by_name(graded: dict[str, Any], words: str) -> None:
    good, bad = {"text": "yes", "score": 2}, {"text": "no", "score": 1}
    record = {"q": "x", "r": [good, bad], "x": good, "y": bad, "w": "yes", "z": 1, "n": {"replies": [good]}}
    with pytest.raises(DataError, match=words):
        rows("preferences", record, columns={"prompt": "q"}, graded=graded | {"better": "higher"})


def test_the_text_of_a_graded_answer_may_be_a_path() -> None:
    good, bad = {"reply": {"text": "yes"}, "ok": True}, {"reply": {"text": "no"}, "ok": False}
    graded = {"answers": "r", "text": "reply.text", "score": "ok"}
    made = rows("preferences", {"q": "x", "r": [good, bad]}, columns={"prompt": "q"}, graded=graded)
    assert [(row["chosen"], row["rejected"]) for row in made] == [("yes", "no")]
    plain = {"columns": ["x", "y"], "text": "text", "score": "ok"}
    with pytest.raises(DataError, match=r"graded\.text: no record has a value in 'x\.text'"):
        rows("preferences", {"q": "x", "x": "yes", "y": "no"}, columns={"prompt": "q"}, graded=plain)


def test_an_answer_without_a_score_is_left_out_and_counted() -> None:
    """As OASST's replies without a rank."""
    replies = [{"text": "yes", "rank": 0}, {"text": "no", "rank": 1}, {"text": "new", "rank": None}, {"text": "newer"}]
    changes: Counter[str] = Counter()
    graded = {"answers": "r", "text": "text", "score": "rank", "better": "lower"}
    made = rows("preferences", {"q": "x", "r": replies}, columns={"prompt": "q"}, graded=graded, changes=changes)
    assert [(row["chosen"], row["rejected"]) for row in made] == [("yes", "no")]
    assert changes["answers without a score, left out"] == 2


def test_a_record_without_graded_answers_is_counted() -> None:
    good, bad = {"text": "yes", "score": 2}, {"text": "no", "score": 1}
    records = [{"q": "x", "r": [good, bad]}, {"q": "y", "r": None}, {"q": "z"}, {"q": "v", "r": []}]
    changes: Counter[str] = Counter()
    graded = {"answers": "r", "text": "text", "score": "score", "better": "higher"}
    made = rows("preferences", *records, columns={"prompt": "q"}, graded=graded, changes=changes)
    assert [(row["chosen"], row["rejected"]) for row in made] == [("yes", "no")]
    assert changes["records without a better and a worse answer, left out"] == 3
    with pytest.raises(DataError, match="row 1: r is 'text'; it must be a list of answers"):
        rows("preferences", records[0], {"q": "y", "r": "text"}, columns={"prompt": "q"}, graded=graded)


@pytest.mark.parametrize(
    ("section", "fields", "words"),
    [
        (PreferredAnswer, {"columns": ["w"], "answers": {"A": "a", "B": "a"}}, "both labels name the same column"),
        (PreferredAnswer, LABELLED | {"ties": ["A"]}, "'A' is also a label of answers"),
        (PreferredAnswer, LABELLED | {"columns": ["w", "w"]}, "names a column twice"),
        (GradedAnswers, {"columns": ["x", "x"], "text": "t", "score": "s"}, "names a column twice"),
    ],
)
def test_contradictions_are_refused(section: Any, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        section(**fields)


def test_advice_about_scores_fits_the_table_and_the_format() -> None:
    pair = {"chosen": [user("q"), says("a")], "rejected": [user("q"), says("b")]}
    with pytest.raises(DataError, match="Add rejected_score, or remove this column from the file"):
        rows("preferences", pair | {"chosen_score": 1})
    with pytest.raises(DataError, match=r"or leave chosen_score out of data\.preferences\.columns"):
        rows("preferences", pair | {"s": 1}, columns={"chosen": "chosen", "rejected": "rejected", "chosen_score": "s"})
    scored = pair | {"messages": pair["chosen"], "score_chosen": 8.0, "score_rejected": 5.0}
    assert rows("sft", scored) == [{"prompt": [user("q")], "completion": [says("a")]}]


@pytest.mark.parametrize("name", ["record", "reason", "wrong_type", "expert"])
def test_a_further_column_cannot_have_the_name_of_one_that_this_project_writes(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"columns\.{name}: this project writes its own column '{name}'"):
        rows("problems", {"q": "1+1=", "a": "2", "x": "y"}, columns={"prompt": "q", "answer": "a", name: "x"})
    made = [{"prompt": "1+1=", "answer": "2", name: "y"}]
    with pytest.raises(DataError, match=rf"row 0: this project writes its own column '{name}'"):
        generated_rows("problems", made, TableSource(source="memory"), "data.problems", Counter())
