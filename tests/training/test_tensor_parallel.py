"""A model that transformers' tensor parallelism splits over two processes trains and samples as one process does."""

from __future__ import annotations

from pathlib import Path

from posttrain.models.tiny import TinyShape, tiny_model
from tests.reliability.workspace import Warm
from tests.training.test_two_processes import together

SHAPE = TinyShape(hidden_size=32, intermediate_size=64, layers=2, heads=4, kv_heads=2, max_length=64)


def test_two_processes_that_split_the_layers_agree_with_one(root: Path, tmp_path: Path, warm: Warm) -> None:
    tiny_model(SHAPE, 0)[0].save_pretrained(tmp_path / "model")
    outputs = together(root, {}, "tests.training.tensor_parallel", str(tmp_path / "model"), warm=warm)
    assert all("equal" in output for output in outputs)
