"""Keys of a message that say whether it is trained: read as its weight, or refused by name."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from pipelines.data.pairs import Changes
from posttrain.errors import DataError
from tests.pipelines.data.records import rows, says, user


@pytest.mark.parametrize("key", ["train", "trainable", "training", "loss", "loss_weight", "loss_mask", "weight"])
@pytest.mark.parametrize(("value", "weight"), [(False, 0.0), (0, 0.0), (0.0, 0.0), (True, 1.0), (0.5, 0.5)])
def test_each_key_that_says_what_is_trained_is_the_weight_of_its_turn(key: str, value: float, weight: float) -> None:
    """Before, a turn with `train: false` was trained."""
    (row,) = rows("sft", {"messages": [user("a"), says("BAD") | {key: value}, user("b"), says("GOOD") | {key: None}]})
    assert row["completion"] == [says("BAD") | {"weight": weight}, user("b"), says("GOOD")]


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"mask": True}, r"turn 1: the key 'mask' \(True\) may say which tokens are trained.*weight: 0"),
        ({"train_detail": [{"begin_offset": 0, "end_offset": 2, "train": False}]}, "the key 'train_detail'"),
        ({"lossMask": 0}, "the key 'lossMask'"),
        ({"Train": False}, "the key 'Train'"),
        ({"is_masked": 1}, "the key 'is_masked'"),
        ({"train": "false"}, "turn 1: train is 'false'; it must be true, false"),
        ({"loss_mask": [0, 1]}, r"turn 1: loss_mask is \[0, 1\]"),
        ({"loss_weight": float("nan")}, "turn 1: loss_weight is nan"),
        ({"train": True, "weight": 0}, "turn 1: weight: 0, train: True contradict each other"),
    ],
)
def test_other_keys_that_may_say_what_is_trained_are_refused_by_name(extra: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        rows("sft", {"messages": [user("a"), says("b") | extra]})
    with pytest.raises(DataError, match=words):
        rows("preferences", {"prompt": "a", "chosen": [user("a"), says("b") | extra], "rejected": [says("c")]})


def test_marks_on_turns_that_are_never_trained_are_counted() -> None:
    changes: Changes = Counter()
    asked = [user("a") | {"train": True}, says("b") | {"train": 1}, user("c") | {"train": False}]
    rows(
        "sft", {"prompt": asked, "completion": [says("d") | {"train": True}, user("e") | {"loss": 1}]}, changes=changes
    )
    assert changes["turns with a weight above 0 that are not trained: only answers of the assistant are"] == 3
