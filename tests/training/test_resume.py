"""A kill at any step and a second start change neither a weight nor a recorded number."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from posttrain.errors import Interrupted
from tests.training.runs import STEPS, Killed, Memory, start

NAMES = ["sft", "reward", "dpo", "grpo_pairs", "grpo", "ppo", "dapo", "chord", "reinforce_pp"]


def disturb(seed: int) -> None:
    """A new process has other generators; the checkpoint must restore them."""
    random.seed(seed)
    torch.manual_seed(seed)


def same_weights(left: torch.nn.Module, right: torch.nn.Module) -> None:
    others = right.state_dict()
    for name, weight in left.state_dict().items():
        assert torch.equal(weight, others[name]), name


@pytest.mark.parametrize("name", NAMES)
def test_resumed_is_bit_identical(name: str, tmp_path: Path) -> None:
    straight = Memory()
    trained = start(name, tmp_path / "straight", straight)
    assert sorted(straight.steps) == list(range(1, STEPS + 1))

    kills = sorted(random.Random(name).sample(range(1, STEPS + 1), 2))
    recorder = Memory(kill_at=kills[0])
    with pytest.raises(Killed):
        start(name, tmp_path / "killed", recorder)
    disturb(1)
    recorder.kill_at = kills[1]
    with pytest.raises(Killed):
        start(name, tmp_path / "killed", recorder)
    disturb(2)
    recorder.kill_at = None
    resumed = start(name, tmp_path / "killed", recorder)
    # a kill before the first checkpoint starts over, a later one goes on from the last even step
    assert recorder.truncated == [0, *(k - 1 - (k - 1) % 2 for k in kills)]
    same_weights(trained, resumed)
    assert recorder.steps.keys() == straight.steps.keys()
    for step, values in straight.steps.items():
        assert recorder.steps[step] == pytest.approx(values, abs=0, rel=0, nan_ok=True), step


def test_training_changed_the_weights_at_all(tmp_path: Path) -> None:
    one, other = (start("grpo", tmp_path / str(rate), Memory(), rate) for rate in (3e-3, 1e-3))
    assert not torch.equal(one.state_dict()["lm.lm_head.weight"], other.state_dict()["lm.lm_head.weight"])


def test_a_torn_checkpoint_is_named_and_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    straight = Memory()
    trained = start("sft", tmp_path / "straight", straight)
    recorder = Memory(kill_at=5)
    with pytest.raises(Killed):
        start("sft", tmp_path / "torn", recorder)
    state = tmp_path / "torn" / "step-00000004" / "state.pt"
    state.write_bytes(state.read_bytes()[:-100])
    recorder.kill_at = None
    resumed = start("sft", tmp_path / "torn", recorder)
    assert "step-00000004 is damaged" in capsys.readouterr().err
    assert recorder.truncated == [0, 2]
    same_weights(trained, resumed)
    assert recorder.steps == straight.steps


def test_a_request_to_stop_writes_a_checkpoint_and_is_gone_on_from(tmp_path: Path) -> None:
    straight = Memory()
    trained = start("dpo", tmp_path / "straight", straight)
    recorder = Memory(stop_at=3)
    with pytest.raises(Interrupted, match="after step 3"):
        start("dpo", tmp_path / "stopped", recorder)
    recorder.stop_at = None
    resumed = start("dpo", tmp_path / "stopped", recorder)
    assert recorder.truncated == [0, 3]
    same_weights(trained, resumed)
    assert recorder.steps == straight.steps
