"""Single answers with thumbs up or down: labels are read as they are spelt, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipelines.config.data_schema import TableSource
from pipelines.config.params import load_params
from pipelines.data.column_mapping import canonical_rows
from pipelines.data.pairs import Changes
from pipelines.data.sources import table_rows
from pipelines.data.tables import read_rows, write_rows
from posttrain.errors import ConfigError, DataError
from tests.pipelines.data.records import rows, says, user


def test_single_answers_keep_their_labels(tmp_path: Path) -> None:
    records = [
        {"prompt": "p", "completion": "a", "label": True, "source": "web"},
        {"prompt": "p", "completion": "b", "label": 0},
        {"prompt": "q", "completion": "c", "label": "TRUE"},
    ]
    made = canonical_rows("labelled", TableSource(source="memory.jsonl"), records)
    assert [(row["completion"], row["label"]) for row in made] == [("a", True), ("b", False), ("c", True)]
    write_rows("labelled", made, tmp_path / "labelled.parquet")
    assert read_rows(tmp_path / "labelled.parquet") == made
    chat = canonical_rows(
        "labelled",
        TableSource(source="memory.jsonl"),
        [{"prompt": [user("q")], "completion": [says("c")], "label": False}],
    )
    assert (chat[0]["completion"], chat[0]["label"]) == ([says("c")], False)
    write_rows("labelled", [], tmp_path / "empty.parquet")
    assert read_rows(tmp_path / "empty.parquet") == []


@pytest.mark.parametrize("label", ["up", 2, None, 0.5])
def test_a_label_that_is_no_thumb_is_named(label: Any) -> None:
    with pytest.raises(DataError, match=r"row 0: label is .*; it must be true \(thumbs up\) or false"):
        rows("labelled", {"prompt": "p", "completion": "a", "label": label})


def test_the_table_of_labelled_answers_needs_their_labels() -> None:
    with pytest.raises(DataError, match="no known format has its columns"):
        rows("labelled", {"prompt": "p", "completion": "a"})
    assert rows(
        "labelled", {"q": "p", "a": "x", "ok": 1}, columns={"prompt": "q", "completion": "a", "label": "ok"}
    ) == [{"prompt": "p", "completion": "x", "label": True}]


def test_no_generator_makes_labelled_answers(root: Path) -> None:
    data = load_params(root / "params.yaml").data
    given = data.model_copy(update={"labelled": TableSource(source="arithmetic", rows=4)})
    with pytest.raises(ConfigError, match="generators make no labelled answers"):
        table_rows("labelled", given)


@pytest.mark.parametrize("label", ["False", "0", "false", 0, False])
def test_an_answer_with_thumbs_down_is_never_imitated_however_its_label_is_spelt(label: Any) -> None:
    good, bad = (
        {"prompt": "a", "completion": "good", "label": "True"},
        {"prompt": "a", "completion": "bad", "label": label},
    )
    changes = Changes()
    assert rows("sft", good, bad, changes=changes) == [{"prompt": "a", "completion": "good"}]
    assert changes["answers with label false, left out of imitation"] == 1
    assert rows("preferences", good, bad) == [{"prompt": "a", "chosen": "good", "rejected": "bad"}]


@pytest.mark.parametrize("columns", [{}, {"label": "good"}])
def test_thumbs_down_are_left_out_if_columns_are_named(columns: dict[str, str]) -> None:
    named = columns.get("label", "label")
    changes = Changes()
    records = [{"q": "a", "a": "good", named: True}, {"q": "a", "a": "bad", named: "false"}, {"q": "b", "a": "none"}]
    made = rows("sft", *records, columns={"prompt": "q", "completion": "a"} | columns, changes=changes)
    assert [row["completion"] for row in made] == ["good", "none"]
    assert changes["answers with label false, left out of imitation"] == 1
    with pytest.raises(DataError, match="every record has label false"):
        rows("sft", records[1], columns={"prompt": "q", "completion": "a"} | columns)


def test_thumbs_down_of_whole_conversations_are_refused() -> None:
    good, bad = ({"messages": [user("a"), says("b")], "label": label} for label in (1, 0))
    assert len(rows("sft", good, good)) == 2
    with pytest.raises(
        DataError, match="the column 'label' is true or false, and answers with false would be imitated"
    ):
        rows("sft", good, bad)


def test_labels_that_are_classes_or_answers_leave_nothing_out() -> None:
    records = [{"q": "a", "a": "x", "label": 0}, {"q": "b", "a": "y", "label": 2}]
    assert len(rows("sft", *records, columns={"prompt": "q", "completion": "a"})) == 2
    asked = [{"q": "a", "label": "true"}, {"q": "b", "label": "false"}]
    assert len(rows("sft", *asked, columns={"prompt": "q", "completion": "label"})) == 2


@pytest.mark.parametrize("kind", ["sft", "preferences"])
@pytest.mark.parametrize("label", [-1, "down", None, "-1"])
def test_a_label_that_is_neither_true_nor_false_is_refused(kind: str, label: Any) -> None:
    with pytest.raises(DataError, match=r"row 1: label is .*; it must be true"):
        rows(kind, {"prompt": "a", "completion": "x", "label": 1}, {"prompt": "a", "completion": "y", "label": label})
