"""Forms of OpenAI, LLaMA-Factory and verl that differ from the usual ones in a column or a field."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from pipelines.config.data_schema import PreferredAnswer
from pipelines.data.files import read_file
from pipelines.data.tables import read_rows, write_rows
from posttrain.errors import ConfigError, DataError
from tests.pipelines.data.records import rows, says, user

TOOL = {"type": "function", "function": {"name": "weather"}}


def test_pairs_of_openai_have_their_prompt_and_tools_in_input() -> None:
    record = {
        "input": {"messages": [user("Hello?")], "tools": [TOOL], "parallel_tool_calls": True},
        "preferred_output": [says("Hi")],
        "non_preferred_output": [says("No")],
    }
    assert rows("preferences", record) == [
        {"prompt": [user("Hello?")], "chosen": [says("Hi")], "rejected": [says("No")],
         "tools": json.dumps([TOOL], sort_keys=True)}
    ]  # fmt: skip
    with pytest.raises(DataError, match=r"row 0: input 'Hello\?': must be an object with messages"):
        rows("preferences", record | {"input": "Hello?"})


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": None, "refusal": "I cannot"},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "I cannot"}]},
    ],
)
def test_an_answer_that_declines_is_its_text(turn: dict[str, Any]) -> None:
    assert rows("sft", {"messages": [user("a"), turn]}) == [{"prompt": [user("a")], "completion": [says("I cannot")]}]


@pytest.mark.parametrize("label", ["label", "kto_tag"])
def test_labels_come_with_conversations_and_instructions(label: str) -> None:
    sharegpt = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    whole = [{"prompt": [user("a")], "completion": [says("b")], "label": False}]
    assert rows("labelled", {"conversations": sharegpt, label: False}) == whole
    assert rows("labelled", {"messages": [user("a"), says("b")], label: 0}) == whole
    assert rows("labelled", {"instruction": "a", "input": "c", "output": "b", label: True}) == [
        {"prompt": "a\nc", "completion": "b", "label": True}
    ]


def test_a_ground_truth_of_verl_may_be_written_as_json() -> None:
    record = {"prompt": [user("3+4?")], "reward_model": '{"style": "rule", "ground_truth": "7"}'}
    assert rows("problems", record) == [{"prompt": [user("3+4?")], "answer": "7"}]
    assert rows("problems", record | {"reward_model": {"style": "model"}}) == [{"prompt": [user("3+4?")]}]
    with pytest.raises(DataError, match="row 0: reward_model 'rule': must be an object with ground_truth"):
        rows("problems", record | {"reward_model": "rule"})


def test_problems_may_have_no_answers(tmp_path: Path) -> None:
    made = rows("problems", {"prompt": "a"}, {"prompt": "b", "id": 7})
    assert made == [{"prompt": "a"}, {"prompt": "b"}]
    assert rows("problems", {"q": "a", "more": "x"}, columns={"prompt": "q"}) == [{"prompt": "a"}]
    assert rows("problems", {"q": "a", "answer": "x"}, columns={"prompt": "q"}) == [{"prompt": "a", "answer": "x"}]
    write_rows("problems", [{"id": 0, "prompt": "a"}], tmp_path / "problems.parquet")
    assert read_rows(tmp_path / "problems.parquet") == [{"id": 0, "prompt": "a"}]


def test_an_answer_in_an_unknown_column_is_not_left_out() -> None:
    with pytest.raises(DataError, match="no known format has its columns"):
        rows("problems", {"prompt": "a", "solution": "x"})
    with pytest.raises(DataError, match="no known format has its columns"):
        rows("evaluation", {"prompt": "a"})
    with pytest.raises(ConfigError, match="has no 'answer'"):
        rows("evaluation", {"q": "a"}, columns={"prompt": "q"})


@pytest.mark.parametrize(
    "turns",
    [
        [{"role": "user", "content": "a"}, {"role": "assistant", "value": "b"}],
        [{"from": "human", "value": "a"}, {"role": "assistant", "content": "b"}],
        [{"from": "human", "role": None, "content": "a"}, {"from": "gpt", "value": "b", "content": None}],
        [{"from": "human", "role": "user", "value": "a", "content": "a"}, {"from": "gpt", "value": "b", "content": ""}],
    ],
)
def test_turns_of_one_conversation_may_mix_the_spellings(turns: list[dict[str, Any]]) -> None:
    expected = [{"prompt": [user("a")], "completion": [says("b")]}]
    assert rows("sft", {"messages": turns}) == expected
    assert rows("sft", {"messages": json.dumps(turns)}) == expected
    (asked,) = rows("sft", {"conversations": turns, "system": "S"})
    assert asked == {"prompt": [{"role": "system", "content": "S"}, user("a")], "completion": [says("b")]}


@pytest.mark.parametrize(
    ("turn", "words"),
    [
        (
            {"from": "gpt", "value": "w", "content": "W2"},
            "turn [12]: its content is 'W2' and its value 'w', and only one",
        ),
        (
            {"from": "human", "role": "assistant", "content": "w"},
            "turn [12]: its role is 'assistant' and its from 'human'",
        ),
    ],
)
def test_a_turn_with_two_texts_or_roles_is_refused(turn: dict[str, Any], words: str) -> None:
    for name, more in (("messages", {}), ("conversations", {"system": "S"})):
        with pytest.raises(DataError, match=f"row 0, {words}"):
            rows("sft", {name: [{"role": "user", "content": "q"}, turn], **more})


@pytest.mark.parametrize("label", ["a", "A "])
def test_a_label_in_a_different_spelling_is_proposed_as_no_tie(label: str) -> None:
    preferred = PreferredAnswer(columns=["won"], answers={"A": "one", "B": "two"})
    record = {"prompt": "p", "one": "x", "two": "y", "won": label}
    with pytest.raises(DataError, match=rf"won is '{label}', .*; if it means 'A', spell") as error:
        rows("preferences", record, preferred=preferred)
    assert "ties" not in str(error.value)


def test_a_boolean_label_is_spelt_as_in_json() -> None:
    record = {"prompt": "p", "one": "x", "two": "y"}
    for names in (("true", "false"), ("True", "False")):
        preferred = PreferredAnswer(columns=["won"], answers=dict(zip(names, ("one", "two"), strict=True)))
        made = rows("preferences", record | {"won": True}, record | {"won": False}, preferred=preferred)
        assert [row["chosen"] for row in made] == ["x", "y"]


@pytest.mark.parametrize("number", ["1e400", "-1e400", "12345678901234567890.5"])
def test_a_gold_number_that_no_float_holds_keeps_its_spelling(tmp_path: Path, number: str) -> None:
    (tmp_path / "rows.jsonl").write_text(f'{{"prompt": "q", "answer": {number}}}\n')
    assert rows("problems", *read_file(tmp_path / "rows.jsonl")) == [{"prompt": "q", "answer": number}]


@pytest.mark.parametrize(
    "spelt", ["0.00001", "1.50", "1e400", "12345678901234567890.5", "0.1000000000000000055", "7.25", "7"]
)
def test_a_number_in_a_prompt_or_a_further_column_is_spelt_as_in_the_file(spelt: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(f'{{"n": {spelt}, "a": "2"}}')
    (row,) = rows(
        "problems", *read_file(tmp_path / "rows.jsonl"), columns={"prompt": "{n} + 1", "answer": "a", "n": "n"}
    )
    assert (row["prompt"], row["n"]) == (f"{spelt} + 1", spelt)


def test_a_further_column_is_empty_where_its_number_is_missing() -> None:
    (row,) = rows("problems", {"q": "a", "a": "2", "g": math.nan}, columns={"prompt": "q", "answer": "a", "g": "g"})
    assert row["g"] == ""


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_arguments_of_a_call_that_are_no_json_are_refused_by_turn(number: float) -> None:
    call = {"function": {"name": "weather", "arguments": {"at": [number]}}}
    with pytest.raises(
        DataError, match=r"row 0, turn 1: the arguments of a tool call are \{'at': .* neither NaN nor inf"
    ):
        rows("sft", {"messages": [user("Hello?"), {"role": "assistant", "content": None, "tool_calls": [call]}]})
