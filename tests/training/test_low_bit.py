"""AdamW with moments in 8 bits: as exact as its blocks, resumed to the bit, and refused with the command to type if torchao is absent."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from posttrain.errors import CheckpointError, ConfigError
from posttrain.settings import OptimizerSettings
from posttrain.training.checkpoint import Checkpoints
from posttrain.training.low_bit import has_blocks, keep_embeddings_wide
from posttrain.training.optimizer import load_portable, make_optimizer, portable_state, stepping
from tests.models import small
from tests.reliability.workspace import Warm
from tests.training import low_bit_sharded
from tests.training.test_two_processes import FSDP2, together

SETTINGS = OptimizerSettings(0.01, weight_decay=0.1, moment_bits=8)
CPU = torch.device("cpu")


def weights() -> list[nn.Parameter]:
    """Return a matrix of 16 blocks, whose moments are quantised, and a vector, whose moments are not."""
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((16, 256), (300,))]


def stepped(optimizer: Any, parameters: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        with stepping(optimizer, CPU):
            optimizer.step()


def made(settings: OptimizerSettings, parameters: list[nn.Parameter]) -> Any:
    return make_optimizer([{"params": parameters, "lr": settings.learning_rate}], settings)


def test_a_missing_package_is_a_command_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setattr("posttrain.extras.find_spec", lambda name: sys.modules.get(name))
    with pytest.raises(
        ConfigError, match=r"moment_bits = 8 needs the package torchao; .*pip install .*'\.\[low-bit\]'"
    ):
        made(SETTINGS, weights())


def test_the_first_step_is_that_of_32_bits_and_later_ones_differ_by_the_rounding_of_blocks() -> None:
    pytest.importorskip("torchao", reason="the extra low-bit is not installed")
    eight, whole = weights(), weights()
    low, high = made(SETTINGS, eight), made(replace(SETTINGS, moment_bits=32), whole)
    for steps, limit in ((range(1), 1e-6), (range(1, 20), 0.005)):
        stepped(low, eight, steps)
        stepped(high, whole, steps)
        matrix, vector = (float((a - b).detach().abs().max()) for a, b in zip(eight, whole, strict=True))
        assert matrix < limit
        assert vector < 1e-5  # its moments are float32, and only the order of products differs
    assert not torch.equal(eight[0], whole[0])
    state = portable_state(low)["state"]
    codes, scale = state[0]["exp_avg"]["codes"], state[0]["exp_avg"]["scale"]
    assert (codes.dtype, codes.shape, scale.dtype, scale.shape) == (torch.uint8, (16, 256), torch.float32, (16,))
    assert state[1]["exp_avg"].dtype == torch.float32


def test_moments_of_embeddings_and_heads_stay_in_32_bits() -> None:
    model = nn.ModuleDict({"lm": small.language_model(shape=low_bit_sharded.SHAPE), "other": nn.Linear(256, 16)})
    before = {name for name, parameter in model.named_parameters() if has_blocks(parameter)}
    keep_embeddings_wide(model)
    after = {name for name, parameter in model.named_parameters() if has_blocks(parameter)}
    assert before - after == {"lm.model.embed_tokens.weight", "lm.lm_head.weight"}
    assert "other.weight" in after


def test_resumed_from_a_file_is_bit_identical(tmp_path: Path) -> None:
    pytest.importorskip("torchao", reason="the extra low-bit is not installed")
    straight = weights()
    stepped(made(SETTINGS, straight), straight, range(6))
    first, second = weights(), weights()
    optimizer = made(SETTINGS, first)
    stepped(optimizer, first, range(3))
    Checkpoints(tmp_path).save(3, {"weights": first, "optimizer": portable_state(optimizer)})
    (_, state), resumed = Checkpoints(tmp_path).latest() or (0, {}), made(SETTINGS, second)
    load_portable(resumed, state["optimizer"])
    with torch.no_grad():
        for parameter, stored in zip(second, state["weights"], strict=True):
            parameter.copy_(stored)
    stepped(resumed, second, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(straight, second, strict=True))
    with pytest.raises(CheckpointError, match=r"moments of a different precision.*moment_bits"):
        load_portable(made(replace(SETTINGS, moment_bits=32), weights()), state["optimizer"])


def test_two_processes_under_fsdp2_train_as_one_and_either_resumes_the_other(
    root: Path, tmp_path: Path, warm: Warm
) -> None:
    """Blocks are those of whole weights; embeddings and head keep float32 moments."""
    pytest.importorskip("torchao", reason="the extra low-bit is not installed")
    accelerator = Accelerator(cpu=True)
    one = low_bit_sharded.results(accelerator, tmp_path / "one")
    together(root, FSDP2, "tests.training.low_bit_sharded", str(tmp_path), warm=warm)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert (one["in 8 bits"], first["in 8 bits"], second["in 8 bits"]) == (7, 7, 7)
    assert second["weights"] == {}
    assert all(torch.equal(first["resumed"][name], value) for name, value in first["weights"].items())
    from_two = low_bit_sharded.resumed(accelerator, tmp_path / "two")
    # three steps of Adam move a weight by about 0.02; the rounding of blocks changes that by less than one part in a hundred on average
    for weights in (first["weights"], first["from one"], from_two):
        gaps = torch.cat([(weights[name] - value).abs().flatten() for name, value in one["weights"].items()])
        assert float(gaps.mean()) < 2e-4
    whole = low_bit_sharded.trained(
        low_bit_sharded.trainer_of(accelerator, replace(low_bit_sharded.SETTINGS, moment_bits=32)), 3
    )
    # 0.0031; with a quantised head 0.081, and with quantised embeddings 0.30
    assert max(float((one["weights"][name] - value).abs().max()) for name, value in whole.items()) < 0.01
    assert all(torch.allclose(first["from one"][name], value, atol=1e-6) for name, value in one["weights"].items())
