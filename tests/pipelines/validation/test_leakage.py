"""Leakage between tables, and the findings in public data sets."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipelines.config.data_schema import TableSource
from pipelines.data.column_mapping import canonical_rows
from pipelines.data.files import read_file
from pipelines.data.pairs import Changes
from pipelines.data.tables import write_rows
from pipelines.validation.leakage import prompt_keys
from pipelines.validation.messages import refuse
from pipelines.validation.suites import TableLimits
from posttrain.errors import LeakageError
from tests.pipelines.validation.tables import (
    Checked,
    Tables,
    answers,
    count,
    reasons,
    sft,
)


def leaking() -> Tables:
    tables = sft(("What is 1 + 1?", "2"), ("fine", "3")) | answers("problems", "1") | answers("evaluation", "2")
    tables["evaluation"][0]["prompt"] = "what is  1 + 1"
    tables["preferences_heldout"] = [{"id": 8, "prompt": "PROBLEMS  0?", "chosen": "a", "rejected": "b"}]
    return tables


def test_leakage_is_found_across_all_tables_and_named_by_row(checked: Checked) -> None:
    with pytest.raises(LeakageError) as caught:
        refuse(checked(leaking()), 5, Path("report.html"))
    assert "table sft, column prompt, rule leakage (stop): 1 of 2 rows" in str(caught.value)
    assert "  id 0 (as evaluation id 0): prompt 'What is 1 + 1?'" in str(caught.value)
    assert "table problems, column prompt, rule leakage (stop): 1 of 1 rows" in str(caught.value)
    assert "  id 0 (as preferences_heldout id 8): prompt 'problems 0'" in str(caught.value)


def test_a_developer_message_hides_no_leak_and_is_a_system_message_of_its_own() -> None:
    asked = [{"role": "user", "content": "dev q"}]
    developer = [{"role": "developer", "content": "Be brief."}, *asked]
    held_out = prompt_keys({"prompt": asked}, held_out=True)
    assert prompt_keys({"prompt": developer}, held_out=False) & held_out
    changes = Changes()
    source = TableSource(source="memory.jsonl", system="S")
    answer = [{"role": "assistant", "content": "a"}]
    (row,) = canonical_rows("sft", source, [{"prompt": developer, "completion": answer}], changes)
    assert row["prompt"] == developer
    assert changes["conversations that keep their own system message instead of data.*.system"] == 1


def test_rows_are_shown_where_they_differ(checked: Checked) -> None:
    system = "You are careful and answer with a number and nothing else. "
    tables = sft(*((f"{system}{i} + {i}", "2") for i in range(3)))
    tables["evaluation"] = [{"id": i, "prompt": f"{system}{i} + {i}", "answer": "2"} for i in range(3)]
    with pytest.raises(LeakageError) as caught:
        refuse(checked(tables, limits=TableLimits(200, 200, answers="number")), 5, Path("report.html"))
    for i in range(3):
        assert f"  id {i} (as evaluation id {i}): prompt '...and nothing else. {i} + {i}'" in str(caught.value)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("15+0=", "15 + 0 =", True), ("x<y?", "x < y", True), ("3 \u2212 2", "3\u2212 2", True),
        ("8 - 3", "8 + 3", False), ("1, 234", "1,234", False), ("a b", "ab", False), ("2.5", "2 / 5", False),
    ],
)  # fmt: skip
def test_spaces_around_signs_hide_no_leak(one: str, other: str, same: bool) -> None:
    keys = prompt_keys({"prompt": one}, held_out=True)
    assert bool(keys & prompt_keys({"prompt": other}, held_out=False)) is same


@pytest.mark.parametrize("mark", ["\u200b", "\ufeff", "\u200f", "\u00ad"])
def test_a_mark_that_no_reader_sees_hides_no_leak(mark: str) -> None:
    row, other = ({"prompt": text} for text in (f"{mark}What is {mark}8-3?", "What is 8-3?"))
    assert prompt_keys(row, False) & prompt_keys(other, True)


def test_prompts_that_differ_in_a_sign_do_not_leak(checked: Checked) -> None:
    tables = sft(("What is 8-3?", "5"), ("Is x<y?", "1"), ("Compute 2.5", "2.5"), ("दिन", "1"))
    asked = ("What is 8+3?", "Is x>y?", "Compute 2/5", "दान")
    tables["evaluation"] = [{"id": i, "prompt": prompt, "answer": "1"} for i, prompt in enumerate(asked)]
    assert not checked(tables).stops


def test_quarantined_leakage_removes_the_training_rows_alone(checked: Checked) -> None:
    tables = leaking()
    tables["problems"].append({"id": 1, "prompt": "other", "answer": "4"})
    outcome = checked(tables, leakage="quarantine")
    assert not outcome.stops
    assert [row["id"] for row in outcome.kept["sft"]] == [1]
    assert reasons(outcome, "sft") == {0: "leakage (prompt of evaluation id 0)"}
    assert reasons(outcome, "problems") == {0: "leakage (prompt of preferences_heldout id 8)"}
    assert outcome.kept["evaluation"] == tables["evaluation"]
    assert outcome.kept["preferences_heldout"] == tables["preferences_heldout"]


def test_a_quarantined_evaluation_row_cannot_leak(checked: Checked) -> None:
    tables = sft(("same", "2")) | answers("evaluation", "no number", "3")
    tables["evaluation"][0]["prompt"] = "same"
    assert not checked(tables).stops


def test_training_tables_may_share_prompts(checked: Checked) -> None:
    tables = sft(("same", "2")) | answers("problems", "2")
    tables["problems"][0]["prompt"] = "same"
    assert not checked(tables).stops


WIDE = TableLimits(max_prompt_tokens=10**6, max_completion_tokens=10**6, answers="number")


@pytest.mark.real
def test_pandalm_booleans_and_empty_responses_are_counted_and_quarantined(
    shared_data: Path, tmp_path: Path, checked: Checked
) -> None:
    columns = {"prompt": "{instruction}\n{input}", "chosen": "response1", "rejected": "response2", "idx": "idx"}
    records = read_file(shared_data / "pandalm_human" / "testset-v1.json")
    rows = canonical_rows("preferences", TableSource(source="pandalm", columns=columns), records)
    outcome = checked({"preferences": rows}, limits=WIDE)
    assert count(outcome, "preferences/wrong_type") == 6
    assert count(outcome, "preferences/empty_text") == 54
    assert len(outcome.kept["preferences"]) == 999 - 6 - 54
    write_rows("preferences", outcome.quarantined["preferences"], tmp_path / "q.parquet", extra=["reason"])
    aside = pq.read_table(tmp_path / "q.parquet").to_pylist()
    assert [row["idx"] for row in aside if row["wrong_type"]] == ["157", "158", "159", "161", "162", "164"]
    assert sum("empty_text" in row["reason"] for row in aside) == 54


@pytest.mark.real
def test_pandalm_prompts_stand_in_the_user_tasks_of_self_instruct(shared_data: Path, checked: Checked) -> None:
    tasks = TableSource(
        source="tasks", columns={"prompt": "{instruction}\n{instances.0.input}", "answer": "instances.0.output"}
    )
    pairs = TableSource(
        source="pandalm", columns={"prompt": "{instruction}\n{input}", "chosen": "response1", "rejected": "response2"}
    )
    evaluation = canonical_rows(
        "evaluation", tasks, read_file(shared_data / "self_instruct" / "user_oriented_instructions.jsonl")
    )
    rows = canonical_rows("preferences", pairs, read_file(shared_data / "pandalm_human" / "testset-v1.json"))
    words = TableLimits(10**6, 10**6, answers="text")
    kept = {"empty_text": "warn", "wrong_type": "warn", "unparseable_answer": "warn"}
    outcome = checked({"preferences": rows, "evaluation": evaluation}, limits=words, **kept)
    (verdict,) = outcome.stops
    assert verdict.finding.rule == "leakage"
    # one more prompt differs only in its emojis, which are the question
    assert len({row["prompt"] for row in verdict.rows}) == 168


@pytest.mark.real
def test_training_on_solutions_of_the_gsm8k_test_questions_is_refused(shared_data: Path, checked: Checked) -> None:
    columns = {"prompt": "question", "completion": "175b_verification.solution"}
    solutions = read_file(shared_data / "gsm8k" / "example_model_solutions.jsonl")
    rows = canonical_rows("sft", TableSource(source="solutions", columns=columns), solutions)
    test = TableSource(
        source="test", columns={"prompt": "question", "answer": "answer"}, extract={"answer": r"#### (\S+)"}
    )
    evaluation = canonical_rows("evaluation", test, read_file(shared_data / "gsm8k" / "test.jsonl"))
    outcome = checked({"sft": rows, "evaluation": evaluation}, limits=WIDE)
    with pytest.raises(LeakageError, match=r"rule leakage \(stop\): 1319 of 1319 rows") as caught:
        refuse(outcome, 5, Path("report.html"))
    assert 'id 0 (as evaluation id 0): prompt "Janet’s ducks lay 16 eggs per day.' in str(caught.value)
    assert str(caught.value).count("(as evaluation") == 5


@pytest.mark.real
def test_the_svamp_answer_that_contradicts_its_equation(shared_data: Path, checked: Checked) -> None:
    columns = {"prompt": "{Body} {Question}", "answer": "Answer", "equation": "Equation", "problem": "ID"}
    rows = canonical_rows(
        "evaluation", TableSource(source="svamp", columns=columns), read_file(shared_data / "svamp" / "SVAMP.json")
    )
    outcome = checked({"evaluation": rows}, limits=WIDE)
    assert [row["problem"] for row in outcome.quarantined["evaluation"]] == ["chal-680"]
    assert len(outcome.kept["evaluation"]) == 999
