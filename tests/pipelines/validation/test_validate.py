"""The rules that rows must pass before training: policies, quarantine, messages and report."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest

from pipelines import validate
from pipelines.config.params import load_params
from pipelines.data.tables import Row, Table
from pipelines.validation import suites
from pipelines.validation.messages import other_form, refuse, require_kept_template, summary, without_template
from pipelines.validation.report import page
from pipelines.validation.suites import TableLimits
from posttrain.errors import ConfigError, DataError, LeakageError
from posttrain.models.tiny import CHAT_TEMPLATE
from tests.pipelines.validation.tables import (
    Checked,
    answers,
    count,
    preferences,
    reasons,
    sft,
)


def test_clean_rows_pass_unchanged(checked: Checked) -> None:
    tables = sft(("a", "b"), ("c", "d")) | preferences(("x", "y"), scores=[(1, 0)]) | answers("evaluation", "1,200")
    outcome = checked(tables)
    assert outcome.kept == tables
    assert not outcome.stops
    assert {v.finding.status for v in outcome.verdicts} == {"passed"}


def test_a_table_without_rows_stops_although_every_other_rule_would_pass(checked: Checked) -> None:
    outcome = checked({"sft": []})
    with pytest.raises(DataError, match=r"table sft, rule row_count: the table has no rows\. Set data"):
        refuse(outcome, 5, Path("report.html"))


def test_a_missing_column_stops(checked: Checked) -> None:
    with pytest.raises(DataError, match=r"table sft, column completion, rule columns: the column is missing"):
        refuse(checked({"sft": [{"id": 0, "prompt": "a"}]}), 5, Path("report.html"))


def test_a_boolean_is_a_wrong_type_before_it_is_a_length(checked: Checked) -> None:
    outcome = checked(sft(("a", "fine"), ("b", True), ("c", 7), ("d", [{"role": "user"}]), ("e", None)))
    assert reasons(outcome, "sft") == {
        1: "wrong_type (completion)", 2: "wrong_type (completion)", 3: "wrong_type (completion)", 4: "empty_text (completion)",
    }  # fmt: skip
    assert count(outcome, "sft/wrong_type") == 3


def test_rows_whose_tokens_the_tokenizer_does_not_know_are_set_aside_and_shown(checked: Checked) -> None:
    outcome = checked(sft(("plain", "b"), ("snow \u2603 man!", "b")))  # 1 of 11 characters
    assert reasons(outcome, "sft") == {1: "unknown_tokens (unknown_share)"}
    shown = page(outcome, 5)
    assert "id 1: 9.1% of its tokens are unknown" in shown
    assert "4.55% of a row&#x27;s tokens are unknown on average, at most 9.09%" in shown
    assert not checked(
        sft(("snow \u2603 man!", "b")), limits=TableLimits(20, 20, "number", max_unknown_share=0.1)
    ).quarantined["sft"]


def test_a_wrong_type_that_only_warns_is_kept_as_its_json(checked: Checked) -> None:
    outcome = checked(sft(("a", "fine"), ("b", True), ("c", None)), wrong_type="warn", empty_text="warn")
    assert [row["completion"] for row in outcome.kept["sft"]] == ["fine", "true", ""]


def test_chat_messages_are_text(checked: Checked) -> None:
    chat = [{"role": "user", "content": "hello"}]
    empty = [{"role": "user", "content": " \u200b"}]
    outcome = checked(sft((chat, "fine"), (empty, "fine")))
    assert outcome.kept["sft"] == [{"id": 0, "prompt": chat, "completion": "fine"}]
    assert reasons(outcome, "sft") == {1: "empty_text (prompt)"}


def test_lengths_count_tokens_with_the_end_of_sequence(checked: Checked) -> None:
    outcome = checked(sft(("p" * 20, "c" * 19), ("p" * 21, "c"), ("p", "c" * 20)))
    assert reasons(outcome, "sft") == {1: "prompt_length (prompt)", 2: "completion_length (completion)"}


def test_pairs_and_duplicates_are_compared_by_what_is_trained(checked: Checked) -> None:
    says, asks = {"role": "assistant", "content": "a"}, {"role": "user", "content": "thanks"}
    ends = [[says], [says, asks], [says | {"weight": 1.0}, asks | {"weight": 0.0}], [says, says | {"weight": 0.0}]]
    outcome = checked(preferences(*((ends[0], end) for end in ends), (ends[0], [says, asks, says])))
    assert reasons(outcome, "preferences") == dict.fromkeys(range(4), "identical_pair (rejected)")
    assert count(checked(sft(*(("q", end) for end in [*ends, [says, asks, says]]))), "sft/duplicate_rows") == 3


def test_identical_pairs_and_scores_in_the_wrong_order_or_tied(checked: Checked) -> None:
    tables = preferences(("a", "b"), ("c", "c"), ("d", "e"), ("f", "g"), scores=[(1, 0), (1, 0), (0, 1), (1, 1)])
    outcome = checked(tables)
    assert reasons(outcome, "preferences") == {1: "identical_pair (rejected)", 2: "score_order (rejected_score)"}
    assert count(outcome, "preferences/tied_scores") == 1
    assert [row["id"] for row in outcome.kept["preferences"]] == [0, 3]


def test_a_negative_weight_is_quarantined_and_zero_is_none(checked: Checked) -> None:
    rows = [{"id": i, "prompt": f"p {i}", "completion": "c", "weight": w} for i, w in enumerate((1.0, -0.5, 0.0))]
    outcome = checked({"sft": rows})
    assert [row["weight"] for row in outcome.kept["sft"]] == [1.0, 0.0]
    assert reasons(outcome, "sft") == {1: "negative_weight (weight)"}


def test_of_equal_rows_only_the_later_ones_are_duplicates(checked: Checked) -> None:
    tables = sft(("a", "b"), ("a", "b"), ("a", "c"), ("a", "b"))
    assert count(checked(tables), "sft/duplicate_rows") == 2
    assert reasons(checked(tables, duplicate_rows="quarantine"), "sft") == dict.fromkeys((1, 3), "duplicate_rows (row)")


def test_a_gold_answer_must_be_a_number_for_a_numeric_reward_and_else_not_empty(checked: Checked) -> None:
    tables = answers("evaluation", "1,200", "about ten", "", "#### 7", None)
    assert set(reasons(checked(tables), "evaluation")) == {1, 2, 4}
    words = TableLimits(20, 20, answers="text")
    assert set(reasons(checked(tables, limits=words), "evaluation")) == {2, 4}


def test_a_gold_answer_of_multiple_choice_must_have_a_letter(checked: Checked) -> None:
    letters = TableLimits(20, 20, answers="choice")
    tables = answers("evaluation", "B", "Paris", "(c)", "d) Rome", None, '["x", "A"]')
    assert set(reasons(checked(tables, limits=letters), "evaluation")) == {1, 4}


def test_an_answer_that_its_equation_contradicts(checked: Checked) -> None:
    equations = ["( 4.0 - 2.0 )", "( 4.0 - 2.0 )", "see text", None]
    outcome = checked(answers("evaluation", "2", "3", "4", "5", equation=equations))
    assert reasons(outcome, "evaluation") == {1: "contradicted_answer (answer)"}


def test_a_row_tells_every_reason_of_its_stage(checked: Checked) -> None:
    outcome = checked(preferences(("", ""), ("a", "b")))
    assert reasons(outcome, "preferences") == {
        0: "empty_text (chosen); empty_text (rejected); identical_pair (rejected)"
    }


def test_a_stop_says_table_column_rule_count_rows_and_what_next(checked: Checked) -> None:
    outcome = checked(sft(("a", ""), ("b", " "), ("c", ""), ("d", "x")), empty_text="stop")
    with pytest.raises(DataError) as caught:
        refuse(outcome, 2, Path("report.html"))
    assert str(caught.value).split("\n") == [
        "table sft, column completion, rule empty_text (stop): 3 of 4 rows. First rows:",
        "  id 0: completion ''",
        "  id 1: completion ' '",
        "Correct the source, or set validation.rules.empty_text to quarantine (remove these rows) or warn (keep them).",
        "The full report: report.html",
    ]
    assert not isinstance(caught.value, LeakageError)


def test_a_table_that_quarantine_emptied_stops(checked: Checked) -> None:
    outcome = checked(sft(("a", ""), ("b", "")))
    with pytest.raises(DataError) as caught:
        refuse(outcome, 5, Path("report.html"))
    assert (
        "table sft, rule row_count: all 2 rows were quarantined by empty_text (completion): 2;"
        " first row: id 0: prompt 'a', completion ''. No row is left." in str(caught.value)
    )


def test_a_table_whose_answers_are_no_numbers_says_how_to_compare_words(checked: Checked) -> None:
    outcome = checked({"problems": [{"id": 0, "prompt": "which colour?", "answer": "green"}]})
    with pytest.raises(DataError) as caught:
        refuse(outcome, 5, Path("report.html"))
    assert (
        "all 1 rows were quarantined by unparseable_answer (answer): 1 (the reward `answer` compares a number;"
        in str(caught.value)
    )
    assert "`posttrain configure 'rewards.answer.arguments={kind: text}'`" in str(caught.value)


def test_plain_rows_of_a_chat_model_are_counted_with_the_command_that_changes_it() -> None:
    text, chat = {"prompt": "a"}, {"prompt": [{"role": "user", "content": "a"}]}
    ((words, count),) = without_template("{{ own }}", "{{ tiny }}", "sft", [text, chat, text]).items()
    assert count == 2
    assert "without the model's chat template" in words
    assert "posttrain configure 'data.sft.template=\"{prompt}\"'" in words
    assert without_template("{{ own }}", "{{ tiny }}", "sft", [chat]) == {}
    assert without_template("{{ tiny }}", "{{ tiny }}", "sft", [text]) == {}
    assert without_template(None, "{{ tiny }}", "sft", [text]) == {}


def test_problems_without_answers_have_no_rule_about_answers(checked: Checked) -> None:
    outcome = checked({"problems": [{"id": 0, "prompt": "a"}, {"id": 1, "prompt": "b"}]})
    assert len(outcome.kept["problems"]) == 2
    assert not [v for v in outcome.verdicts if v.finding.rule == "unparseable_answer"]
    assert checked({"problems": [{"id": 0, "prompt": "a", "answer": None}]}).stops
    assert checked({"evaluation": [{"id": 0, "prompt": "a"}]}).stops


def test_prompts_of_another_form_than_the_demonstrations_are_counted() -> None:
    chat, text = {"id": 0, "prompt": [{"role": "user", "content": "a"}]}, {"id": 1, "prompt": "a"}
    ((words, count),) = other_form("problems", [text, text, chat], [chat]).items()
    assert (words.partition(":")[0], count) == ("prompts are plain text, but all of data.sft is chat", 2)
    ((words, count),) = other_form("evaluation", [text, chat], [text, text]).items()
    assert (words.partition(":")[0], count) == ("prompts are chat, but all of data.sft is plain text", 1)
    assert other_form("problems", [text], [chat, text]) == {}
    assert other_form("problems", [chat], [chat]) == {}
    assert other_form("sft", [chat], [chat]) == {}


@pytest.mark.parametrize("table", ["evaluation", "preferences", "preferences_heldout"])
def test_chat_prompts_stop_if_the_built_in_model_loses_its_template(table: Table) -> None:
    # the stage sft removes the template after plain rows; stages that asked chat prompts then failed hours later
    chat, text = {"prompt": [{"role": "user", "content": "a"}]}, {"prompt": "a"}
    tables: dict[Table, list[Any]] = {name: [text] for name in get_args(Table)}
    require_kept_template(CHAT_TEMPLATE, CHAT_TEMPLATE, tables)
    tables[table] = [text, chat]
    with pytest.raises(
        DataError, match=f"{table}: 1 of 2 prompts are chat, and all of data.sft is plain text"
    ) as caught:
        require_kept_template(CHAT_TEMPLATE, CHAT_TEMPLATE, tables)
    assert "posttrain configure 'data.sft.template=\"{prompt}\"'" in str(caught.value)
    for template, shown in (("{{ own }}", text), (None, text), (CHAT_TEMPLATE, chat)):
        require_kept_template(template, CHAT_TEMPLATE, tables | {"sft": [shown]})


def test_a_table_that_a_limit_emptied_names_the_limit(checked: Checked) -> None:
    outcome = checked(sft(("a" * 300, "b")))
    with pytest.raises(DataError) as caught:
        refuse(outcome, 5, Path("report.html"))
    assert "quarantined by prompt_length (prompt): 1 (validation.max_prompt_tokens is " in str(caught.value)


# Errors and reports --------------------------------------------------------------------------------------------------


def test_an_expectation_that_raises_is_errored_and_not_failed(
    checked: Checked, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(table: Table, limits: TableLimits, columns: Any) -> list[Any]:
        return [suites._differ("chosen", "no_such_column", "identical_pair")]

    monkeypatch.setattr(suites, "content", broken)
    outcome = checked(preferences(("a", "b")))
    (verdict,) = [v for v in outcome.verdicts if v.finding.rule == "identical_pair"]
    assert verdict.finding.status == "errored"
    assert summary(outcome)["errored"] == 1
    with pytest.raises(DataError, match=r"rule identical_pair: could not be checked: .*no_such_column"):
        refuse(outcome, 5, Path("report.html"))
    assert not checked(preferences(("a", "b")), identical_pair="warn").stops


def test_the_report_is_self_contained_escaped_and_always_the_same(checked: Checked) -> None:
    tables = sft(("<script>alert(1)</script>", "x" * 30), ("b", "y"))
    html = page(checked(tables), 5)
    assert html == page(checked(tables), 5)
    assert "<script" not in html
    assert "http" not in html
    assert "Accepted" in html
    assert "completion_length" in html
    escaped = page(checked(sft(("<b>", ""), ("b", "<script>" * 4))), 5)
    assert "&lt;script&gt;" in escaped
    assert "Refused" in page(checked(sft(("a", "")), empty_text="stop"), 5)


# The step ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "kind"),
    [({}, "number"), ({"function": "mentions"}, "text"), ({"arguments": {"kind": "choice"}}, "choice")],
)
def test_the_judge_says_what_a_gold_answer_must_be(root: Path, change: dict[str, Any], kind: str) -> None:
    params = load_params(root / "params.yaml")
    source = params.rewards["answer"].model_copy(update=change)
    assert validate.answer_kind(params.model_copy(update={"rewards": params.rewards | {"answer": source}})) == kind


def test_a_judge_that_is_not_installed_is_refused_before_anything_is_read_or_trained(root: Path) -> None:
    params = load_params(root / "params.yaml")
    source = params.rewards["answer"].model_copy(update={"function": "no_such_package.judges:f"})
    run: Any = SimpleNamespace(
        context=SimpleNamespace(params=params.model_copy(update={"rewards": params.rewards | {"mine": source}}))
    )
    with pytest.raises(ConfigError, match=r"there is no package 'no_such_package'"):
        validate.run(run)


def test_limits_beyond_the_context_are_refused_before_training_would() -> None:
    validate._check_context(200, 56, 256)
    with pytest.raises(ConfigError, match="has 257 tokens, but the context of models/base is 256"):
        validate._check_context(200, 57, 256)


# Real data -----------------------------------------------------------------------------------------------------------


def test_labelled_answers_are_checked_like_others_and_may_be_absent(checked: Checked) -> None:
    rows: list[Row] = [
        {"id": 0, "prompt": "one", "completion": "a", "label": True},
        {"id": 1, "prompt": "two", "completion": "", "label": False},
        {"id": 2, "prompt": "three", "completion": "x" * 30, "label": False},
        {"id": 3, "prompt": "evaluation 0", "completion": "b", "label": True},
    ]
    outcome = checked({"labelled": rows} | answers("evaluation", "1"), leakage="quarantine")
    assert {i: reason.split(" ")[0] for i, reason in reasons(outcome, "labelled").items()} == {
        1: "empty_text",
        2: "completion_length",
        3: "leakage",
    }
    assert outcome.kept["labelled"] == [rows[0]]
    absent = checked({"labelled": []} | answers("evaluation", "1"))
    assert not absent.stops
    assert absent.kept["labelled"] == []


def test_labelled_answers_that_are_all_quarantined_stop(checked: Checked) -> None:
    outcome = checked({"labelled": [{"id": 0, "prompt": "p", "completion": "", "label": True}]})
    assert [verdict.finding.rule for verdict in outcome.stops] == ["row_count"]
