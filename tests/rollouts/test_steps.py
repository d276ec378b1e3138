"""Recorded decoding steps: the samples of steps that run, no recording for a step that asks the device, and a faulty replay is found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from posttrain.rollouts import slots
from posttrain.rollouts.engine import Completion, Request, SamplingSettings
from posttrain.rollouts.native import NativeEngine
from posttrain.rollouts.plain_step import PlainStep
from posttrain.rollouts.steps import RECORDERS, StepRunner
from tests.models import small
from tests.rollouts.replayed import replayed

REQUESTS = [
    Request((5, 6, 7), tuple((0, i) for i in range(3))),
    Request((9,) * 12, tuple((1, i) for i in range(4))),
    Request((4, 8), ((2,),)),
]
SETTINGS = SamplingSettings(24, 1.0)


class Counted:
    """A recorder of the CPU that counts recordings and replays."""

    def __init__(self) -> None:
        self.recordings = self.replays = 0

    def __call__(self, step: Callable[[], object]) -> Callable[[], None]:
        self.recordings += 1
        replay = replayed(step)

        def counted() -> None:
            self.replays += 1
            replay()

        return counted


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Counted:
    made = Counted()
    monkeypatch.setitem(RECORDERS, "cpu", made)
    monkeypatch.setattr(slots, "ROOM", 8)
    return made


def sampled(lm: Any, **options: Any) -> list[Completion]:
    return [answer for group in NativeEngine(lm, small.EOS, **options).sample(REQUESTS, SETTINGS) for answer in group]


@pytest.mark.parametrize("options", [{}, {"max_rows": 3}, {"bf16": True}])
@pytest.mark.parametrize("make", [small.language_model, small.tied_llama])
def test_replayed_steps_draw_the_samples_of_steps_that_run(
    make: Callable[[], Any], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = sampled(make(), **options)
    recorder = Counted()
    monkeypatch.setitem(RECORDERS, "cpu", recorder)
    monkeypatch.setattr(slots, "ROOM", 8)
    found = sampled(make(), **options)
    assert recorder.recordings >= 2, "an arrangement ends after eight tokens, or when answers leave"
    assert recorder.replays > 2 * recorder.recordings
    assert len({len(answer.tokens) for answer in expected}) > 1, "answers leave at different times"
    assert [a.tokens for a in found] == [a.tokens for a in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-2 if "bf16" in options else 1e-5)


def test_a_step_that_asks_the_device_is_not_recorded(
    recorder: Counted, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = sampled(small.language_model())
    step = PlainStep.__call__

    def asking(*given: Any) -> Tensor:
        hidden: Tensor = step(*given)
        float(hidden.sum())
        return hidden

    monkeypatch.setattr(PlainStep, "__call__", asking)
    recordings = recorder.recordings
    lm = small.language_model()
    engine = NativeEngine(lm, small.EOS)
    for _ in range(2):
        found = [answer for group in engine.sample(REQUESTS, SETTINGS) for answer in group]
        assert [a.tokens for a in found] == [a.tokens for a in expected]
    assert recorder.recordings == recordings + 1, "it is tried once"
    assert "is sampled kernel by kernel: this model's step cannot be recorded" in capsys.readouterr().err


def test_a_position_of_the_host_in_a_replay_is_found() -> None:
    position, written = torch.zeros(1, dtype=torch.long), torch.zeros(8)
    on_host = [0]

    def step() -> None:
        written[on_host[0]] = 1.0
        position.add_(1)

    runner = StepRunner(replayed_wrongly)
    for _ in range(4):
        runner.run(step, lambda: [position, written], arrangement=1)
        on_host[0] += 1
    assert runner.refusal == "a replayed step gave other tokens than the step itself"
    assert written.tolist() == [1.0] * 4 + [0.0] * 4
    assert int(position) == 4


def replayed_wrongly(step: Callable[[], object]) -> Callable[[], object]:
    """Return a recording without kernels."""
    replayed(step)
    return lambda: None


def test_an_arrangement_is_recorded_once_after_a_step_of_its_own() -> None:
    count, recorder = torch.zeros(1), Counted()
    runner = StepRunner(recorder)
    for arrangement in (0, 0, 0, 0, 1, 2, 2):
        runner.run(lambda: count.add_(1), lambda: [count], arrangement)
    assert float(count) == 7
    assert (recorder.recordings, recorder.replays) == (2, 4)
