"""Moves between the host and a device keep values, dtypes and shapes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from posttrain.data.batches import collate
from posttrain.data.layout import ending, predicting
from posttrain.data.tokens import Tokens
from posttrain.data.transfer import to_host, together
from posttrain.training.host_optimizer import _buffer

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


@pytest.mark.parametrize(
    "move",
    [
        lambda device: together([torch.arange(3)], device),
        lambda device: _buffer(SimpleNamespace(shape=(3,), dtype=torch.float32, device=device)),  # type: ignore[arg-type]
    ],
)
def test_what_travels_to_cuda_without_a_wait_is_pinned(
    monkeypatch: pytest.MonkeyPatch, move: Callable[[torch.device], object]
) -> None:
    """CUDA waits for a copy from memory that is not pinned, although it is asked not to."""
    asked, empty = [], torch.empty

    def watched(*shape: Any, pin_memory: bool, **options: Any) -> torch.Tensor:
        asked.append(pin_memory)
        return empty(*shape, **options)

    monkeypatch.setattr(torch, "empty", watched)
    for kind in ("cuda", "meta"):
        with suppress(AssertionError, RuntimeError):  # torch may see no such device
            move(torch.device(kind))
    assert asked == [True, False]
