"""Under FSDP2 no process holds a whole model while it loads, samples and trains, and the numbers are those of one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from posttrain.errors import CheckpointError
from posttrain.models.folders import save_model
from posttrain.models.tiny import TinyShape, tiny_model
from posttrain.training.checkpoint import Checkpoints
from tests.models import small
from tests.reliability.workspace import Warm
from tests.training import sharded
from tests.training.test_two_processes import FSDP2, together

pytestmark = pytest.mark.timeout(1000)
SHAPE = TinyShape(hidden_size=32, intermediate_size=96, layers=8, heads=2, kv_heads=1, max_length=64)


def close(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], tolerance: float) -> None:
    assert left.keys() == right.keys()
    assert max(float((left[name] - value).abs().max()) for name, value in right.items()) < tolerance


@pytest.fixture(scope="module")
def found(root: Path, tmp_path_factory: pytest.TempPathFactory, warm: Warm) -> dict[str, Any]:
    """Results of both processes, and of a single one that resumes from their checkpoint."""
    folder = tmp_path_factory.mktemp("sharded")
    model, tokenizer = tiny_model(SHAPE, seed=0)
    save_model(small.sharpened(model, by=4.0), tokenizer, folder / "model", "")
    together(root, FSDP2, "tests.training.sharded", str(folder / "model"), str(folder), warm=warm)
    two = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]
    accelerator = Accelerator(cpu=True)
    alone = sharded.results(folder / "model", Checkpoints(folder / "alone"), accelerator)
    trainer = sharded.trainer_of(sharded.loaded(folder / "model", accelerator), accelerator)
    _, state = Checkpoints(folder / "checkpoints").latest() or (0, {})
    trainer.load_state_dict(state["trainer"])
    sharded.updated(trainer, 1)
    return {
        "two": two, "alone": alone, "from_two": trainer.weights(), "folder": folder,
        "adapter": sharded.adapted(folder / "model", accelerator),
        "loss": sharded.updated(sharded.trainer_of(sharded.loaded(folder / "model", accelerator), accelerator), 1)["loss"],
        "bytes": 4 * sum(p.numel() for p in model.parameters()),
    }  # fmt: skip


def test_a_thread_writes_checkpoints_while_the_main_thread_polls(found: dict[str, Any]) -> None:
    assert [two["polled"] for two in found["two"]] == [20, 20]


def test_no_process_ever_holds_the_whole_model(found: dict[str, Any]) -> None:
    """Half of the weights and at most a layer, or the embeddings, of the rest; training adds as much again for gradient and moments."""
    whole = found["bytes"]
    for two in found["two"]:
        assert 0.5 * whole <= two["loaded"] < 0.8 * whole
        # two models, the policy and its reference, with caches
        assert two["sampled"] < 0.9 * 2 * whole
        assert two["trained"] < 0.75 * 5 * whole


def test_the_numbers_are_those_of_one_process(found: dict[str, Any]) -> None:
    (first, second), alone = found["two"], found["alone"]
    assert first["packs"] == second["packs"] == alone["packs"]
    assert [[tokens for tokens, _ in group] for group in first["answers"]] == [
        [tokens for tokens, _ in group] for group in alone["answers"]
    ]
    assert second["answers"] == []
    for one, other in zip(first["reference"], alone["reference"], strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    assert second["reference"][0] == pytest.approx(alone["reference"][0], abs=1e-5)
    assert first["unmoved"] == second["unmoved"] == []
    assert first["metrics"] == pytest.approx(alone["metrics"], abs=1e-4)
    close(first["weights"], alone["weights"], 1e-4)
    assert second["weights"] == {}  # gathered once, for the process that saves
    for split, whole in zip(first["adapter"], found["adapter"], strict=True):
        # other functions compute the layers of split weights, and AdamW divides the smallest gradients by their own size
        close(split, whole, 1e-4)
    assert any(not torch.equal(value, first["adapter"][1][name]) for name, value in first["adapter"][0].items())


def test_a_checkpoint_written_in_the_background_resumes_two_processes_and_one(found: dict[str, Any]) -> None:
    first, folder = found["two"][0], found["folder"] / "checkpoints" / "step-00000002"
    close(first["resumed"], first["weights"], 1e-7)
    close(found["from_two"], first["weights"], 1e-4)
    assert first["last"] == {"loss": 1.0}
    files = sorted(path.name for path in (folder / "shards").iterdir())
    assert [name[:12] for name in files] == ["shard-00001-", "shard-00002-"]
    assert json.loads((folder / "manifest.json").read_text())["shards"].keys() == set(files)


def test_a_damaged_file_of_one_process_is_found(found: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    folder = found["folder"] / "checkpoints"
    path = next((folder / "step-00000002" / "shards").glob("shard-00002-*"))
    intact = path.read_bytes()
    path.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))
    assert Checkpoints(folder).latest() is None
    assert "step-00000002 is damaged (a checksum does not match)" in capsys.readouterr().err
    path.unlink()
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        Checkpoints.read(folder / "step-00000002")
    path.write_bytes(intact)


def test_bf16_gathers_layers_in_bf16_and_keeps_float32_weights(found: dict[str, Any]) -> None:
    loss = found["two"][0]["bf16"]["loss"]
    assert 0 < abs(loss - found["loss"]) < 0.02
    for two in found["two"]:
        assert two["bf16"] == {
            "loss": loss, "seen": {torch.bfloat16}, "held": {torch.float32}, "packs": True, "answers": 3,
            "cached": {False},
        }  # fmt: skip
