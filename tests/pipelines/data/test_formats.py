"""Formats of data sets as people have them: recognised by their columns, or one mapping away; never a mapping that leaks."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pipelines.config.data_schema import DataParams, GradedAnswers, PreferredAnswer, TableSource
from pipelines.config.params import load_params
from pipelines.data.column_mapping import canonical_rows
from pipelines.data.pairs import Changes
from pipelines.data.sources import table_rows
from pipelines.data.tables import read_changes, read_rows, write_changes, write_rows
from posttrain.errors import ConfigError, DataError, PosttrainError
from tests.pipelines.data.records import rows, says, user

FRUIT = {"prompt": [user("Name a fruit")], "completion": [says("Plum"), user("Another"), says("Pear")]}


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [user("Name a fruit"), says("Plum"), user("Another"), says("Pear")]},
        {"conversations": [
            {"from": "human", "value": "Name a fruit"}, {"from": "gpt", "value": "Plum"},
            {"from": "human", "value": "Another"}, {"from": "gpt", "value": "Pear"},
        ], "id": "a1"},
        {"prompt": "Name a fruit", "completion": [says("Plum"), user("Another"), says("Pear")]},
        {"prompt": [{"role": "user", "content": [{"type": "text", "text": "Name a "}, {"type": "text", "text": "fruit"}]}],
         "completion": [says("Plum"), user("Another"), {"role": "assistant", "content": "Pear", "tool_calls": None}]},
    ],
)  # fmt: skip
def test_conversations_of_every_spelling_are_one_form(record: dict[str, Any]) -> None:
    assert rows("sft", record) == [FRUIT]


def test_a_conversation_may_stand_in_any_column() -> None:
    assert rows("sft", {"dialog": [*FRUIT["prompt"], *FRUIT["completion"]]}, columns={"messages": "dialog"}) == [FRUIT]


def test_instructions_with_input_history_and_system() -> None:
    plain = {"instruction": "Translate", "input": "dog", "output": "chien"}
    assert rows("sft", plain, {"instruction": "Name", "input": "", "output": "Plum"}) == [
        {"prompt": "Translate\ndog", "completion": "chien"},
        {"prompt": "Name", "completion": "Plum"},
    ]
    assert rows("sft", plain | {"history": [["a", "b"]], "system": "s"}) == [
        {
            "prompt": [{"role": "system", "content": "s"}, user("a"), says("b"), user("Translate\ndog")],
            "completion": [says("chien")],
        }
    ]


def test_tool_calls_of_openai_are_read_and_survive_the_table(tmp_path: Path) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Graz"}'}}
    record = {
        "messages": [user("Weather?"), {"role": "assistant", "content": None, "tool_calls": [call], "weight": 1},
                     {"role": "tool", "content": "rain", "tool_call_id": "1"}, says("It rains")],
        "tools": [{"type": "function", "function": {"name": "weather"}}],
    }  # fmt: skip
    (row,) = canonical_rows("sft", TableSource(source="memory.jsonl"), [record])
    assert row["completion"][0]["content"] == ""
    assert row["completion"][0]["tool_calls"][0]["function"]["arguments"] == {"city": "Graz"}
    assert row["completion"][0]["weight"] == 1.0
    assert row["tools"] == '[{"function": {"name": "weather"}, "type": "function"}]'
    write_rows("sft", [row], tmp_path / "sft.parquet")
    assert read_rows(tmp_path / "sft.parquet") == [row]


@pytest.mark.parametrize(
    ("tools", "shown"),
    [("add", "'add'"), (3, "3"), (["add"], "add"), ('{"a": ', "a"), ({"f": {"parameters": {}}}, "f")],
)
def test_tools_that_are_no_list_of_objects_are_refused(tools: Any, shown: str) -> None:
    record = {"messages": [user("Weather?"), says("Rain")], "tools": tools}
    with pytest.raises(DataError, match=rf"row 0: tools is .*{shown}.*; it must be a list of objects such as"):
        canonical_rows("sft", TableSource(source="memory.jsonl"), [record])


@pytest.mark.parametrize("calls", ["add", 3])
def test_tool_calls_that_are_no_list_are_refused(calls: Any) -> None:
    record = {"messages": [user("Weather?"), {"role": "assistant", "content": "", "tool_calls": calls}]}
    with pytest.raises(
        DataError, match=r"row 0, turn 1: tool_calls is .*; it must be a list of objects with name and arguments"
    ):
        canonical_rows("sft", TableSource(source="memory.jsonl"), [record])


def test_pairs_share_the_turns_that_are_equal() -> None:
    shared = [user("Name a fruit"), says("Plum"), user("Red one?")]
    expected = [{"prompt": shared, "chosen": [says("Cherry")], "rejected": [says("Brick")]}]
    assert rows("preferences", {"chosen": [*shared, says("Cherry")], "rejected": [*shared, says("Brick")]}) == expected
    texts = {name: f"\n\nHuman: Name a fruit\n\nAssistant: Plum\n\nHuman: Red one?\n\nAssistant: {last}"
             for name, last in (("chosen", "Cherry"), ("rejected", "Brick"))}  # fmt: skip
    assert rows("preferences", texts) == expected
    with pytest.raises(DataError, match="row 0: the pair has no prompt"):
        rows("preferences", {"chosen": "a", "rejected": "b"})


def test_a_prompt_that_the_answers_repeat_is_not_doubled_and_scores_have_two_names() -> None:
    record = {"prompt": "p", "chosen": [user("p"), says("a")], "rejected": [user("p"), says("b")]}
    expected = {"prompt": [user("p")], "chosen": [says("a")], "rejected": [says("b")]}
    assert rows("preferences", record) == [expected]
    assert rows("preferences", record | {"score_chosen": 8.5, "score_rejected": 2}) == [
        expected | {"chosen_score": 8.5, "rejected_score": 2.0}
    ]
    with pytest.raises(DataError, match="row 0: the answer begins with a turn of user that is not the prompt"):
        rows("preferences", record | {"prompt": "q"})


@pytest.mark.parametrize(
    "pair", [{"chosen": None, "rejected": []}, {"chosen": [user("q"), says("a")], "rejected": "b"}]
)
def test_a_pair_without_a_prompt_is_refused(pair: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="the pair has no prompt, and chosen or rejected is no conversation"):
        rows("preferences", pair)


def test_thumbs_make_pairs_and_only_thumbs_up_are_imitated() -> None:
    records = [{"prompt": "p", "completion": c, "label": up} for c, up in (("a", True), ("b", False), ("c", True))]
    records.append({"prompt": "q", "completion": "d", "label": True})
    changes: Changes = Counter()
    assert rows("preferences", *records, changes=changes) == [
        {"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "p", "chosen": "c", "rejected": "b"},
    ]  # fmt: skip
    assert list((+changes).values()) == [1]
    changes.clear()
    assert [row["completion"] for row in rows("sft", *records, changes=changes)] == ["a", "c", "d"]
    assert dict(+changes) == {"answers with label false, left out of imitation": 1}


def test_ranks_ask_which_end_is_better() -> None:
    record = {"q": "p", "replies": [{"text": "best", "rank": 0}, {"text": "worst", "rank": 2}]}
    graded = {"answers": "replies", "text": "text", "score": "rank"}
    with pytest.raises(ConfigError, match=r"graded\.better: missing.*row 0 has 0, 2"):
        rows("preferences", record, columns={"prompt": "q"}, graded=GradedAnswers(**graded))
    (pair,) = rows("preferences", record, columns={"prompt": "q"}, graded=GradedAnswers(**graded, better="lower"))
    assert pair == {"prompt": "p", "chosen": "best", "rejected": "worst", "chosen_score": 0.0, "rejected_score": -2.0}
    parallel = {"prompt": "p", "texts": ["best", "worst"], "ranks": [0, 2]}
    listed = GradedAnswers(answers="texts", score="ranks", better="lower")
    assert rows("preferences", parallel, graded=listed) == [pair]


def test_records_without_a_pair_are_counted() -> None:
    changes: Changes = Counter()
    graded = GradedAnswers(answers="a", text="t", score="s", better="higher")
    records = [{"prompt": "p", "a": [{"t": str(s), "s": s} for s in scores]} for scores in ((1, 0), (1,), (2, 2))]
    assert len(rows("preferences", *records, graded=graded, changes=changes)) == 1
    assert dict(+changes) == {"records without a better and a worse answer, left out": 2}


def test_a_label_or_most_annotators_say_which_answer_won() -> None:
    preferred = PreferredAnswer(columns=["x", "y", "z"], answers={"1": "one", "2": "two"}, ties=["0"])

    def vote(*labels: Any) -> dict[str, Any]:
        return {"prompt": "p", "one": "A", "two": "B", **dict(zip("xyz", labels, strict=True))}

    changes: Changes = Counter()
    found = rows(
        "preferences",
        vote(1, 1, 2),
        vote(2, 2.0, "0"),
        vote(1, 2, 0),
        vote(0, 0, 1),
        preferred=preferred,
        changes=changes,
    )
    assert [(row["chosen"], row["rejected"]) for row in found] == [("A", "B"), ("B", "A")]
    assert dict(+changes) == {"pairs without a winner, left out": 2}
    with pytest.raises(
        DataError, match=r"row 0: x is '3', which is none of data\.preferences\.preferred\.answers \(1, 2\)"
    ):
        rows("preferences", vote(3, 1, 1), preferred=preferred)


def test_problems_of_verl_and_lists_of_accepted_answers() -> None:
    verl = {"data_source": "x", "prompt": [user("3+4?")], "reward_model": {"style": "rule", "ground_truth": "7"}}
    assert rows("problems", verl) == [{"prompt": [user("3+4?")], "answer": "7"}]
    assert rows("problems", {"question": "Capital?", "answer": ["Madrid", 7]}) == [
        {"prompt": "Capital?", "answer": '["Madrid", "7"]'}
    ]


def test_no_hint_and_no_mapping_puts_the_answer_into_the_prompt() -> None:
    whole = {"messages": [user("q"), says("a")]}
    for kind, other in (("sft", "completion"), ("problems", "answer")):
        with pytest.raises(ConfigError, match="so the answer would be in the prompt"):
            rows(kind, whole, columns={"prompt": "messages", other: "messages"})
    with pytest.raises(DataError, match="the prompt ends with an assistant turn"):
        rows("problems", whole | {"x": "a"}, columns={"prompt": "messages", "answer": "x"})
    pair = whole | {"chosen": "a", "rejected": "b"}
    for more in ({}, {"chosen": [says("a")]}, {"chosen": [says("c")], "rejected": [says("b")]}):
        with pytest.raises(DataError, match="the prompt ends with an assistant turn"):
            rows("preferences", pair | more, columns={"prompt": "messages", "chosen": "chosen", "rejected": "rejected"})
    for kind, record in (("problems", whole), ("preferences", whole), ("sft", {"text": "t"}), ("sft", {"chosen": "c"})):
        with pytest.raises(PosttrainError) as caught:
            rows(kind, record)
        assert "{prompt:" not in str(caught.value)


def test_a_system_message_and_a_template_for_plain_columns(root: Path) -> None:
    fields = {"system": "Be brief.", "template": "Q: {prompt}"}
    (row,) = rows("sft", {"prompt": "1+1?", "completion": "2"}, **fields)
    system = {"role": "system", "content": "Be brief."}
    assert row == {"prompt": [system, user("Q: 1+1?")], "completion": [says("2")]}
    with pytest.raises(ConfigError, match=r"data\.sft\.template: has no effect"):
        rows("sft", {"messages": [user("q"), says("a")]}, **fields)
    with pytest.raises(ValueError, match=r"must contain {prompt}"):
        TableSource(source="x.jsonl", template="Q:")

    data: DataParams = load_params(root / "params.yaml").data
    few = TableSource(source="arithmetic", rows=2, template="{prompt}")
    made = table_rows("problems", data.model_copy(update={"problems": few}))
    assert all(row["prompt"][0]["role"] == "user" for row in made)


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"role": "user", "content": [{"type": "image_url"}]}, "turn 0: holds a content part of type 'image_url'"),
        ({"role": "user", "content": 3}, r"turn 0: the content is 3 \(int\)"),
        ({"role": "user", "content": "q", "weight": -1}, r"turn 0: weight is -1"),
    ],
)
def test_what_is_no_text_is_named(turn: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"row 0, {message}"):
        rows("sft", {"messages": [turn, says("a")]})


def test_what_a_conversation_does_not_train_is_counted_and_kept_for_validation(tmp_path: Path) -> None:
    changes: Changes = Counter()
    (row,) = rows("sft", {"messages": [says("Hello"), user("q"), says("a"), user("thanks")]}, changes=changes)
    assert row == {"prompt": [says("Hello"), user("q")], "completion": [says("a"), user("thanks")]}
    assert sorted((+changes).values()) == [1, 1]
    write_changes({"sft": changes, "problems": Counter()}, tmp_path)
    assert read_changes(tmp_path) == {"sft": dict(+changes)}
    write_changes({}, tmp_path)
    assert read_changes(tmp_path) == {}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kind", "records", "words"),
    [
        ("sft", [{"instruction": "a", "output": "b", "history": [1]}], r"history '\[1\]': must be a list of \[question, answer\]"),
        ("preferences", [{"prompt": "p", "completion": "a", "label": True}, {"prompt": "p", "completion": "b"}], "row 1: .* no label"),
        ("preferences", [{"chosen": [user("q"), [says("a")]], "rejected": [user("q"), says("b")]}], "row 0: .* without role and content"),
    ],
)  # fmt: skip
def test_records_that_a_fuzzer_found_are_refused_in_words(kind: str, records: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(DataError, match=words):
        rows(kind, *records)


def test_an_answer_that_is_no_conversation_is_left_to_validation() -> None:
    """Validation counts it as wrong_type."""
    record = {"prompt": "p", "chosen": [{}, {"role": 0, "content": "Brick"}], "rejected": [user("p"), says("b")]}
    (row,) = rows("preferences", record, {"prompt": "q", "chosen": [says("a")], "rejected": [says("b")]})[:1]
    assert row["chosen"] == record["chosen"]


@pytest.mark.parametrize(
    ("kind", "record", "column"),
    [
        ("problems", {"question": "Which?", "choices": ["x", "y"], "answer": 1}, "choices"),
        ("problems", {"question": "Is it?", "passage": "It is.", "answer": True}, "passage"),
        ("sft", {"prompt": "a", "completion": "b", "system": "Be brief."}, "system"),
        ("sft", {"instruction": "a", "output": "b", "context": "c"}, "context"),
        ("preferences", {"prompt": "a", "chosen": "b", "rejected": "c", "system": "S"}, "system"),
    ],
)
def test_a_part_of_the_question_is_not_left_out_in_silence(kind: str, record: dict[str, Any], column: str) -> None:
    with pytest.raises(
        DataError, match=f"would leave out the column '{column}', .* Map each column in data.{kind}.columns"
    ):
        rows(kind, record)
    assert rows(kind, record | {column: ""})


def test_conversations_in_text_fields_are_read_from_json_and_counted() -> None:
    turns = [user("a"), says("b")]
    changes: Changes = Counter()
    assert rows("sft", {"messages": json.dumps(turns)}, changes=changes) == rows("sft", {"messages": turns})
    assert changes["conversations read from text that is JSON"] == 1
    assert rows("sft", {"prompt": "[1, 2]", "completion": '["b"]'})[0]["prompt"] == "[1, 2]"


def test_roles_are_read_whatever_their_case() -> None:
    turns = [
        {"role": "System", "content": "s"},
        {"role": "USER", "content": "a"},
        {"role": "Assistant", "content": "b"},
    ]
    (row,) = rows("sft", {"messages": turns})
    assert row["prompt"] == [{"role": "system", "content": "s"}, user("a")]
    assert row["completion"] == [says("b")]


def test_a_pair_of_conversations_without_a_first_turn_in_common_is_refused() -> None:
    with pytest.raises(DataError, match="row 0: chosen and rejected have no first turn in common"):
        rows("preferences", {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: x\n\nAssistant: c"})


@pytest.mark.parametrize(
    "records",
    [
        [{"prompt": "Name", "completion": "Plum", "messages": [user("q"), says("r")]}],
        [{"prompt": "Name", "completion": "Plum"}, {"messages": [user("q"), says("r")]}],
    ],
)
def test_columns_of_two_formats_are_refused_because_one_would_be_lost(records: list[dict[str, Any]]) -> None:
    with pytest.raises(
        DataError, match=r"two formats, 'prompt and completion' .* and 'messages' .* data\.sft\.columns"
    ):
        rows("sft", *records)
    assert rows("sft", records[0], columns={"prompt": "prompt", "completion": "completion"}) == [
        {"prompt": "Name", "completion": "Plum"}
    ]


def test_the_documentations_graded_and_judged_records_become_its_pairs() -> None:
    graded = GradedAnswers(answers="replies", text="text", score="rank", better="lower")
    replies = [{"text": "best", "rank": 0}, {"text": "middle", "rank": 1}, {"text": "worst", "rank": 2}]
    pairs = rows("preferences", {"prompt": "q", "replies": replies}, columns={"prompt": "prompt"}, graded=graded)
    assert {(pair["chosen"], pair["rejected"]) for pair in pairs} == {
        ("best", "middle"), ("best", "worst"), ("middle", "worst")
    }  # fmt: skip
    judged = PreferredAnswer(columns=["winner"], answers={"A": "a", "B": "b"}, ties=["tie"])
    records = [{"question": "q", "a": "one", "b": "two", "winner": label} for label in ("A", "B", "tie")]
    pairs = rows("preferences", *records, columns={"prompt": "question"}, preferred=judged)
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == [("one", "two"), ("two", "one")]


def _sft(*records: dict[str, Any]) -> tuple[list[dict[str, Any]], Counter[str]]:
    changes: Counter[str] = Counter()
    return canonical_rows("sft", TableSource(source="x", rows=None), list(records), changes), +changes


def test_a_part_of_the_question_that_is_a_number_stays_and_other_values_are_refused() -> None:
    rows, _ = _sft({"instruction": "Square it", "input": 5, "output": "25"})
    assert rows[0]["prompt"] == "Square it\n5"
    with pytest.raises(DataError, match=r"row 0: input \"\['a'\]\": must be text"):
        _sft({"instruction": "Square it", "input": ["a"], "output": "25"})


def test_a_system_column_reaches_the_conversation_or_is_refused() -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows, _ = _sft({"messages": json.dumps(turns), "system": "Be brief."})
    assert rows[0]["prompt"] == [{"role": "system", "content": "Be brief."}, turns[0]]
    own = [{"role": "system", "content": "Be long."}, *turns]
    with pytest.raises(
        DataError, match=r"row 0: the column system \('Be brief.'\) and the conversation's own .*\('Be long.'\) differ"
    ):
        _sft({"messages": own, "system": "Be brief."})
    assert _sft({"messages": own, "system": "Be long."})[0][0]["prompt"][0] == own[0]
    with pytest.raises(DataError, match="row 0: system '5': must be text"):
        _sft({"messages": turns, "system": 5})


def test_columns_that_no_format_reads_are_counted() -> None:
    record = {"prompt": "a", "completion": "b", "weight": 1.0, "margin": 2, "source": "web"}
    assert _sft(record)[1] == {"columns that are not used: margin, source": 2}


def test_columns_that_a_mapping_leaves_out_are_counted() -> None:
    record = {"q": {"text": "a", "id": 1}, "body": "b", "a.b": "c", "reasoning": "because", "source": "web"}
    changes: Changes = Counter()
    found = rows(
        "sft", record, columns={"prompt": "{q.text} {body}", "completion": "a.b", "site": "source"}, changes=changes
    )
    assert [(row["prompt"], row["completion"], row["site"]) for row in found] == [("a b", "c", "web")]
    assert dict(+changes) == {"columns that are not used: reasoning": 1}
    votes = {"prompt": "p", "one": "A", "two": "B", "x": "1", "note": "n"}
    changes.clear()
    rows(
        "preferences",
        votes,
        preferred=PreferredAnswer(columns=["x"], answers={"1": "one", "2": "two"}),
        changes=changes,
    )
    assert dict(+changes) == {"columns that are not used: note": 1}


@pytest.mark.parametrize("spelling", [("role", "content", "user", "assistant"), ("from", "value", "human", "gpt")])
def test_pairs_whose_answers_are_single_messages_have_their_prompt_in_conversations(spelling: tuple[str, ...]) -> None:
    role, content, asks, answers = spelling
    turn = lambda who, text: {role: who, content: text}  # noqa: E731
    pair = {"chosen": turn(answers, "Plum"), "rejected": turn(answers, "Stone")}
    found = {"prompt": [user("Name a fruit")], "chosen": [says("Plum")], "rejected": [says("Stone")]}
    assert rows("preferences", {"conversations": [turn(asks, "Name a fruit")], **pair}) == [found]
    assert rows("preferences", {"prompt": [turn(asks, "Name a fruit")], **pair}) == [found]
    with pytest.raises(
        DataError, match=r"no first turn in common.*Known are: .*conversations.*data.preferences.columns"
    ):
        rows("preferences", pair)
