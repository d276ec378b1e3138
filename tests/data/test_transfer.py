"""Moves between the host and a device keep values, dtypes and shapes."""

from __future__ import annotations

import torch

from posttrain.data.batches import collate
from posttrain.data.layout import ending, predicting
from posttrain.data.tokens import Tokens
from posttrain.data.transfer import to_host

CPU = torch.device("cpu")


def test_a_batch_takes_the_objectives_columns_and_its_reads_along() -> None:
    batch = collate([Tokens((1, 2, 3, 4), (5, 6)), Tokens((1, 2, 3, 4), (7,))])
    moved, columns = batch.with_columns({"weight": torch.tensor([0.5, 2.0])}, CPU, ending)
    assert columns["weight"].tolist() == [0.5, 2.0]
    assert list(moved.found) == [ending]
    assert moved.ending().tokens.tolist() == [5, 6]
    assert moved.predicting().tokens.tolist() == [3, 4]
    assert list(moved.found) == [ending, predicting]
    assert moved.input_ids.tolist() == batch.input_ids.tolist()


def test_nothing_to_read_is_nothing() -> None:
    assert to_host([]) == []
