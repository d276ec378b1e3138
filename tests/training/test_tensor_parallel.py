"""A model that transformers' tensor parallelism splits over two processes trains and samples as one process does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from posttrain.distributed import splits_layers
from posttrain.errors import ConfigError
from posttrain.models.policy import Policy
from posttrain.models.tiny import TinyShape, tiny_model
from posttrain.training.checkpoint import Checkpoints
from posttrain.training.supervised import SupervisedObjective
from posttrain.training.tensor_parallel import refusal
from tests.models import small
from tests.reliability.workspace import Warm
from tests.training import tensor_parallel
from tests.training.test_two_processes import together

SHAPE = TinyShape(hidden_size=32, intermediate_size=64, layers=2, heads=4, kv_heads=2, max_length=64)


def test_two_processes_that_split_the_layers_agree_with_one(root: Path, tmp_path: Path, warm: Warm) -> None:
    tiny_model(SHAPE, 0)[0].save_pretrained(tmp_path / "model")
    command = ("tests.training.tensor_parallel", str(tmp_path / "model"), str(tmp_path))
    outputs = together(root, {}, *command, warm=warm)
    assert all("equal" in output for output in outputs)
    as_a_stage(tmp_path)


def as_a_stage(folder: Path) -> None:
    """Compare what two processes wrote with one process, which also goes on from their checkpoint."""
    first, second = (torch.load(folder / f"{rank}.pt") for rank in range(2))
    (folder / "alone").mkdir()
    tensor_parallel.stage(folder / "alone")
    alone = torch.load(folder / "alone" / "0.pt")
    assert first["metrics"] == second["metrics"]
    for mine, other in zip(first["metrics"], alone["metrics"], strict=True):
        assert mine == pytest.approx(other, rel=1e-5, abs=1e-6)
    assert second["weights"] == {}  # gathered once, for the process that saves
    assert close(first["weights"], alone["weights"])
    assert first["answers"] == second["answers"] == alone["answers"]
    assert first["reference"] == second["reference"]
    for mine, other in zip(first["reference"], alone["reference"], strict=True):
        assert mine == pytest.approx(other, abs=1e-5)
    # all but norms is halved, and the two names of the embeddings are one matrix
    assert first["held"] < 0.6 * alone["held"]
    accelerator = Accelerator(cpu=True)
    resumed = tensor_parallel.stage_trainer(Policy(small.tied_llama()), accelerator)
    _, state = Checkpoints(folder / "checkpoints").latest() or (0, {})
    resumed.load_state_dict(state["trainer"])
    resumed.update(tensor_parallel.STAGE_ROWS, SupervisedObjective())
    assert close(resumed.weights(), alone["weights"])


def close(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    assert left.keys() == right.keys()
    return max(float((left[name] - value).abs().max()) for name, value in right.items()) < 1e-5


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "2",
            "POSTTRAIN_TENSOR_PARALLEL = 2, and the stage runs as one process, which holds whole layers; give a config",
        ),
        ("two", "POSTTRAIN_TENSOR_PARALLEL = 'two': must be the number of processes"),
    ],
)
def test_a_number_of_processes_that_is_not_that_of_the_stage_is_refused(
    given: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POSTTRAIN_TENSOR_PARALLEL", given)
    with pytest.raises(ConfigError, match=message):
        splits_layers(Accelerator(cpu=True))


def test_models_that_cannot_be_split_are_named() -> None:
    model = small.tied_llama()
    assert refusal(model, 2) is None
    assert "the model's 2 heads, 2 of them with keys and values, cannot be divided evenly" in str(refusal(model, 4))
    next(model.parameters()).requires_grad_(False)
    assert "only a part is trained, as with `lora`" in str(refusal(model, 2))
    assert "cannot split a mixture of experts" in str(refusal(small.language_model(shape=small.MOE), 2))
