"""Twice or nowhere in a file: prompts that answers repeat, columns of weights, labels, groups of prompts."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pipelines.commands.lookahead import problems
from pipelines.config.data_schema import TableSource
from pipelines.config.params import Params, load_params
from pipelines.data.pairs import REPEATED, Changes
from pipelines.data.tables import group_labels
from posttrain.errors import ConfigError, DataError
from tests.pipelines.data.records import rows, says, user

TURN = {"prompt": [user("q0")], "completion": [user("q0"), says("b")]}
ONCE = {"prompt": [user("q0")], "completion": [says("b")]}


@pytest.mark.parametrize("kind", ["sft", "labelled"])
@pytest.mark.parametrize("prompt", ["q0", [user("q0")], [user("q0 ")]])
def test_a_prompt_that_the_completion_repeats_is_kept_once_and_counted(kind: Any, prompt: Any) -> None:
    changes: Changes = Counter()
    label = {"label": "True"} if kind == "labelled" else {}
    (row,) = rows(kind, TURN | {"prompt": prompt} | label, changes=changes)
    assert row["completion"] == ONCE["completion"]
    assert [turn["content"].strip() for turn in row["prompt"]] == ["q0"]
    assert changes[REPEATED] == 1


def test_only_the_last_question_or_a_system_message_more_may_be_repeated() -> None:
    asked = [user("a"), says("b"), user("c")]
    assert rows("sft", {"prompt": asked, "completion": [user("c"), says("d")]}) == [
        {"prompt": asked, "completion": [says("d")]}
    ]
    system = {"role": "system", "content": "s"}
    assert rows("sft", {"prompt": [user("c")], "completion": [system, user("c"), says("d")]}) == [
        {"prompt": [system, user("c")], "completion": [says("d")]}
    ]
    assert rows("sft", {"prompt": [system], "completion": [user("c"), says("d")]}) == [
        {"prompt": [system], "completion": [user("c"), says("d")]}
    ]
    with pytest.raises(DataError, match="row 0: the answer begins with a turn of user that is not the prompt: 'z'"):
        rows("sft", {"prompt": [user("c")], "completion": [user("z"), says("d")]})


def test_texts_that_begin_with_their_prompt_are_counted_and_refused_if_all_do() -> None:
    echo = {"prompt": "Human: what is 1+1? Assistant:", "completion": "Human: what is 1+1? Assistant: 2"}
    changes: Changes = Counter()
    rows("sft", echo, {"prompt": "a", "completion": "ab"}, changes=changes)
    assert changes["answers whose text begins with the whole prompt, which is kept"] == 1
    with pytest.raises(DataError, match="in every row completion begins with the whole text of the prompt"):
        rows("sft", echo, echo)
    pair = {"prompt": echo["prompt"], "chosen": echo["completion"], "rejected": echo["completion"] + "3"}
    with pytest.raises(DataError, match="in every row chosen and rejected begin with the whole text"):
        rows("preferences", pair, pair)


@pytest.mark.parametrize(
    ("kind", "record", "name"),
    [
        ("sft", {"prompt": "a", "completion": "b", "loss_mask": 0}, "loss_mask"),
        ("sft", {"messages": [user("a"), says("b")], "train": False}, "train"),
        ("preferences", {"prompt": "a", "chosen": "b", "rejected": "c", "weight": 2}, "weight"),
        ("labelled", {"prompt": "a", "completion": "b", "label": True, "mask": [1]}, "mask"),
    ],
)
def test_a_column_that_may_say_what_is_trained_is_refused_by_name(kind: Any, record: dict[str, Any], name: str) -> None:
    with pytest.raises(DataError, match=f"the column '{name}' may say which tokens are trained"):
        rows(kind, record)
    rows(kind, record | {name: None})


def test_columns_that_one_format_reads_and_another_ignores_are_counted_or_refused() -> None:
    changes: Changes = Counter()
    rows("sft", {"prompt": "a", "completion": "b", "functions": "f"}, changes=changes)
    assert changes["columns that are not used: functions"] == 1
    with pytest.raises(DataError, match="would leave out the column 'history'"):
        rows("sft", {"prompt": "a", "completion": "b", "history": [["c", "d"]]})


def test_a_turn_of_a_pair_counts_or_not() -> None:
    pair = {"prompt": [user("a")], "chosen": [says("b") | {"weight": 0.5}], "rejected": [says("c")]}
    with pytest.raises(DataError, match=r"chosen, turn 0: its weight is 0\.5, and here a turn counts or not"):
        rows("preferences", pair)
    rows("sft", {"prompt": [user("a")], "completion": [says("b") | {"weight": 0.5}]})


def test_roles_that_no_template_knows_are_refused_or_counted() -> None:
    with pytest.raises(DataError, match="turn 1: the role is 'Asistant'; did you mean 'assistant'"):
        rows("sft", {"messages": [user("a"), {"role": "Asistant", "content": "b"}]})
    with pytest.raises(DataError, match="no answer of the assistant, and turns of bing"):
        rows("sft", {"conversations": [{"from": "human", "value": "a"}, {"from": "bing", "value": "b"}]})
    changes: Changes = Counter()
    rows("sft", {"messages": [user("a"), says("b"), {"role": "critic", "content": "c"}, says(" ")]}, changes=changes)
    assert changes["turns of the assistant without text, of which only the end is trained"] == 1
    assert changes["conversations with turns of unknown roles, which are not trained: critic"] == 1


def test_conversations_with_a_label_are_labelled_and_never_imitated() -> None:
    record = {"messages": [user("a"), says("b")], "label": False}
    assert rows("labelled", record) == [{"prompt": [user("a")], "completion": [says("b")], "label": False}]
    with pytest.raises(DataError, match="answers with false would be imitated"):
        rows("sft", record)
    assert rows("sft", record | {"label": "sport"}) == [{"prompt": [user("a")], "completion": [says("b")]}]


def test_a_missing_part_of_a_question_is_empty_and_a_misspelt_column_is_refused() -> None:
    (row,) = rows("sft", {"instruction": "a", "input": float("nan"), "output": "b"})
    assert row["prompt"] == "a"
    columns = {"prompt": "prompt", "completion": "completion", "weigth": "w"}
    with pytest.raises(ConfigError, match=r"columns\.weigth: would not be used; did you mean 'weight'"):
        rows("sft", {"prompt": "a", "completion": "b", "w": 1}, columns=columns)


def write(folder: Path, name: str, *records: dict[str, Any]) -> str:
    path = folder / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


@pytest.fixture
def shipped(root: Path) -> Params:
    return load_params(root / "params.yaml")


def with_table(params: Params, kind: str, source: TableSource, groups: str | None = None) -> Params:
    data = params.data.model_copy(update={kind: source})
    evaluation = params.evaluation.model_copy(update={"groups": groups})
    return params.model_copy(update={"data": data, "evaluation": evaluation})


def test_configure_names_the_file_without_a_weight(shipped: Params, tmp_path: Path) -> None:
    files = [
        write(tmp_path, "a.jsonl", {"question": "a", "reply": "b", "w": 1}),
        write(tmp_path, "b.jsonl", {"question": "c", "reply": "d"}),
    ]
    columns = {"prompt": "question", "completion": "reply", "weight": "w"}
    (found,) = problems(with_table(shipped, "sft", TableSource(source=files, columns=columns)))
    assert "b.jsonl has no 'w', from which data.sft.columns reads weight" in found
    files = [
        write(tmp_path, "a.jsonl", {"prompt": "a", "completion": "b", "weight": 1}),
        write(tmp_path, "b.jsonl", {"prompt": "c", "completion": "d"}),
    ]
    (found,) = problems(with_table(shipped, "sft", TableSource(source=files)))
    assert "b.jsonl has no column 'weight', which" in found


def test_configure_reads_labels_and_groups(shipped: Params, tmp_path: Path) -> None:
    labels = write(tmp_path, "labels.jsonl", {"prompt": "a", "completion": "b", "label": "yes"})
    (found,) = problems(with_table(shipped, "labelled", TableSource(source=labels)))
    assert "label is 'yes'; it must be true" in found
    asked = TableSource(
        source=write(tmp_path, "e.jsonl", *({"prompt": f"{i}?", "answer": "1", "doc": i} for i in range(3))),
        columns={"prompt": "prompt", "answer": "answer", "doc": "doc"},
    )
    assert problems(with_table(shipped, "evaluation", asked, "doc")) == []
    (found,) = problems(with_table(shipped, "evaluation", asked, "docs"))
    assert "evaluation.groups = 'docs': 3 evaluation prompts have no value in this column" in found


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ((1, None), "1 evaluation prompts have no value"),
        (("x", ""), "first: prompt 1"),
        ((2, "2.0"), "'2' and '2.0' are the same"),
    ],
)
def test_groups_have_one_spelling_and_no_gap(values: tuple[Any, ...], words: str) -> None:
    with pytest.raises(DataError, match=words):
        group_labels("doc", [{"doc": value} for value in values])
    assert group_labels("doc", [{"doc": 1}, {"doc": "b"}, {"doc": 1}]) == ["1", "b", "1"]


@pytest.mark.parametrize(
    ("kind", "source", "words"),
    [
        ("labelled", TableSource(source="arithmetic", rows=4), "generators make no labelled answers"),
        ("sft", TableSource(source=["arithmetic", "stories"], rows=4), "cannot be one of several sources"),
        ("sft", TableSource(source="arithmetic", rows=4, heldout=0.5), "data.sft.heldout = 0.5: has no effect"),
        ("preferences", TableSource(source="arithmetic", rows=4), "data.preferences.heldout: must be greater than 0"),
    ],
)
def test_configure_refuses_what_ingest_would(shipped: Params, kind: str, source: TableSource, words: str) -> None:
    (found,) = problems(with_table(shipped, kind, source))
    assert words in found


@pytest.mark.parametrize("change", [{"rewards": ["answer", "answer"]}, {"benchmarks": {"tasks": ["a", "a"]}}])
def test_a_reward_or_benchmark_of_the_evaluation_is_named_once(shipped: Params, change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="names the same one twice"):
        type(shipped.evaluation).model_validate(shipped.evaluation.model_dump() | change)
