"""Sampling ahead of training: which weights sample which step, whatever the speeds, and a kill that changes nothing."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.algorithms.dapo import DAPO
from posttrain.algorithms.grpo import GRPO
from posttrain.errors import CheckpointError, ConfigError, RolloutError
from posttrain.models.policy import Policy
from posttrain.rollouts.ahead import Ahead, Background
from posttrain.rollouts.engine import Completion, Request, SamplingSettings
from posttrain.rollouts.native import NativeEngine
from posttrain.training.checkpoint import Checkpoints
from posttrain.training.loop import LoopSettings, fit
from posttrain.training.trainer import Trainer
from tests.models import small
from tests.training.runs import OPTIMIZER, STEPS, Killed, Memory, source_of

SPEC = replace(GRPO, anchor="rollout")


@dataclass
class Copies:
    """A snapshot is a copy of the model; `asked` has, for each request, the position in the order and the weights' sum."""

    lm: Any
    delay_seconds: float = 0.0
    asked: list[tuple[int, float]] = field(default_factory=list)

    def snapshot(self, settings: SamplingSettings) -> Any:
        return copy.deepcopy(self.lm)

    def sample_with(
        self, taken: Any, requests: Sequence[Request], settings: SamplingSettings
    ) -> list[list[Completion]]:
        time.sleep(self.delay_seconds)
        self.asked += [(request.seeds[0][1], total(taken)) for request in requests]
        return NativeEngine(taken, small.EOS).sample(requests, settings)


def total(lm: Any) -> float:
    return float(sum(p.detach().double().abs().sum() for p in lm.parameters()))


class Watch(Memory):
    """Notes the sum of the policy's weights after every step, and may be slow."""

    def __init__(self, lm: Any, delay_seconds: float = 0.0, **options: Any) -> None:
        super().__init__(**options)
        self.lm, self.delay_seconds, self.weights = lm, delay_seconds, {0: total(lm)}

    def metrics(self, step: int, values: Any) -> None:
        time.sleep(self.delay_seconds)
        self.weights[step] = total(self.lm)
        super().metrics(step, values)


def start(
    folder: Path,
    staleness: int,
    spec: Any = SPEC,
    delays: tuple[float, float] = (0.0, 0.0),
    kill_at: int | None = None,
    earlier: Memory | None = None,
    interrupt: int = 0,
    **options: Any,
) -> tuple[Policy, Copies, Watch]:
    """Train for STEPS steps, or on from the checkpoint in `folder`."""
    torch.manual_seed(0)
    policy = small.policy()
    engine = Copies(policy.lm, delays[0])
    ahead = Ahead(Background(engine), staleness, STEPS, interrupt) if staleness else None
    source, objective = source_of(spec, policy, ahead=ahead, **options)
    objective.staleness = staleness
    trainer: Trainer[Any] = Trainer(policy, OPTIMIZER, total_steps=STEPS, micro_batch_tokens=60)
    recorder = Watch(policy.lm, delays[1], kill_at=kill_at, steps=earlier.steps if earlier else {})
    with suppress(Killed):
        fit(trainer, source, objective, LoopSettings("t", STEPS, checkpoint_steps=2), recorder, Checkpoints(folder))
    return policy, engine, recorder


def same(one: Policy, other: Policy) -> bool:
    return all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))


@pytest.mark.parametrize("staleness", [1, 3])
def test_the_answers_of_a_step_come_from_the_weights_of_so_many_steps_before(staleness: int, tmp_path: Path) -> None:
    _, engine, watch = start(tmp_path, staleness)
    # four prompts a step, in the order of their positions: step k is sampled by the weights after max(0, k - staleness) steps
    expected = [(4 * k + i, watch.weights[max(0, k - staleness)]) for k in range(STEPS) for i in range(4)]
    assert engine.asked == expected
    assert [watch.steps[k + 1]["staleness/mean"] for k in range(STEPS)] == [min(k, staleness) for k in range(STEPS)]
    assert watch.steps[1]["mismatch/mean"] < 1e-5 < 1e-3 < watch.steps[STEPS]["mismatch/mean"]


def test_a_checkpoint_of_a_different_staleness_is_refused(tmp_path: Path) -> None:
    _, _, killed = start(tmp_path, 0, kill_at=4)
    with pytest.raises(CheckpointError, match="a different staleness"):
        start(tmp_path, 1, earlier=killed)


def test_no_result_depends_on_who_is_faster(tmp_path: Path) -> None:
    slow_sampler, _, one = start(tmp_path / "one", 2, delays=(0.03, 0.0))
    slow_trainer, _, other = start(tmp_path / "other", 2, delays=(0.0, 0.03))
    assert same(slow_sampler, slow_trainer)
    assert one.steps == other.steps


@pytest.mark.parametrize(("staleness", "kill_at"), [(3, 1), (1, 4), (3, 4)])
def test_a_kill_and_a_resume_change_nothing(staleness: int, kill_at: int, tmp_path: Path) -> None:
    straight, _, expected = start(tmp_path / "straight", staleness)
    _, _, killed = start(tmp_path / "killed", staleness, kill_at=kill_at)
    resumed, engine, recorder = start(tmp_path / "killed", staleness, earlier=killed)
    assert same(straight, resumed)
    assert recorder.steps == expected.steps
    if (
        kill_at == 4
    ):  # the checkpoint after step 2 holds the answers of the next `staleness` steps, so they are not sampled again
        assert min(position for position, _ in engine.asked) == 4 * (2 + staleness)


def test_dynamic_sampling_fills_up_with_the_present_weights(tmp_path: Path) -> None:
    spec = replace(DAPO, anchor="rollout", refill_limit=3, refill_partial=True, overlong_share=0.0)
    policy, _, watch = start(tmp_path / "a", 1, spec=spec)
    rounds = [watch.steps[k]["sampling/rounds"] for k in range(2, STEPS + 1)]
    mixed = [watch.steps[k]["staleness/mean"] for k in range(2, STEPS + 1)]
    assert max(rounds) > 1
    assert all((0 < mean < 1) if count > 1 else mean == 1 for count, mean in zip(rounds, mixed, strict=True))
    again, _, other = start(tmp_path / "b", 1, spec=spec, delays=(0.02, 0.0))
    assert same(policy, again)
    assert watch.steps == other.steps


def test_what_goes_wrong_in_the_background_stops_the_run(tmp_path: Path) -> None:
    class Broken(Copies):
        def sample_with(self, *_: Any) -> list[list[Completion]]:
            raise RolloutError("no memory for keys")

    policy = small.policy()
    source, objective = source_of(SPEC, policy, ahead=Ahead(Background(Broken(policy.lm)), 1, STEPS))
    trainer: Trainer[Any] = Trainer(policy, OPTIMIZER, total_steps=STEPS, micro_batch_tokens=60)
    with pytest.raises(RolloutError, match="no memory for keys"):
        fit(trainer, source, objective, LoopSettings("t", STEPS), Memory(), None)


def test_an_algorithm_must_correct_for_older_weights() -> None:
    import posttrain as pt

    model = pt.tiny(seed=0, hidden_size=16, intermediate_size=16, layers=1, heads=2, kv_heads=1)
    options: dict[str, Any] = {
        "steps": 1,
        "learning_rate": 1e-3,
        "batch_size": 1,
        "reward": lambda p, c: [0.0] * len(c),
    }
    with pytest.raises(ConfigError, match=r"grpo: staleness = 1: .*pass dataclasses.replace\(SPEC, anchor='rollout'\)"):
        pt.train(model, "grpo", ["1+1="], staleness=1, **options)
    with pytest.raises(
        ConfigError, match=r"staleness = 9: all answers of the \d steps would come from the weights of the"
    ):
        pt.train(model, SPEC, ["1+1="], staleness=9, **options)
    with pytest.raises(ConfigError, match="staleness = -1; it must be a whole number of at least 0"):
        pt.train(model, SPEC, ["1+1="], staleness=-1, **options)
    with pytest.raises(ConfigError, match="staleness has no effect here: only on-policy algorithms"):
        pt.train(
            model, "sft", [{"prompt": "a", "completion": "b"}], steps=1, learning_rate=1e-3, batch_size=1, staleness=1
        )
