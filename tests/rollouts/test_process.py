"""The sampling process: the answers of the native engine to the bit, weights that are proven, and ends that are reported."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from posttrain import choices
from posttrain.errors import RolloutError, StaleWeightsError
from posttrain.models.lora import Adapter
from posttrain.models.plain import plain_state
from posttrain.rollouts.engine import Request, SamplingSettings
from posttrain.rollouts.native import NativeEngine
from posttrain.rollouts.process import OWN, ProcessEngine
from posttrain.rollouts.sampling_process import serve
from posttrain.settings import LoraSettings
from tests.models import small

SETTINGS = SamplingSettings(8, 0.8)
CHOSEN = {"tokens": 5, OWN + "tokens": 7}
REQUESTS = [Request((5, 6, 7), ((0, 0), (0, 1))), Request((9, 10), ((1, 0),))]


@pytest.fixture(scope="module")
def engine() -> Iterator[ProcessEngine]:
    """A process for a policy with tied embeddings."""
    choices.follow(CHOSEN)
    made = ProcessEngine(small.tied_llama(), small.EOS, slots=2)
    yield made
    made.close()


def moved(lm: torch.nn.Module, by: float) -> None:
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.requires_grad:
                parameter.mul_(by)


def test_every_snapshot_samples_as_the_policy_did_when_it_was_taken(engine: ProcessEngine) -> None:
    native = NativeEngine(engine.lm, small.EOS)
    expected, taken = [], []
    for _ in range(2):
        expected.append(native.sample(REQUESTS, SETTINGS))
        taken.append(engine.snapshot(SETTINGS))
        moved(engine.lm, 1.3)
    assert expected[0] != expected[1]
    # both snapshots were taken before the first was used
    assert [engine.sample_with(each, REQUESTS, SETTINGS) for each in taken] == expected


def test_the_process_follows_the_choices_of_the_one_before_it(
    engine: ProcessEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They came with its start, and its answers bring them to the checkpoint."""
    taken = engine.snapshot(SETTINGS)
    monkeypatch.setattr(choices, "_MADE", {})
    engine.sample_with(taken, REQUESTS, SETTINGS)
    # the trainer's own were not sent there
    assert choices.made() == {OWN + "tokens": 7}


def test_weights_that_were_not_taken_over_stop_the_run(engine: ProcessEngine) -> None:
    taken = engine.snapshot(SETTINGS)
    memory = engine.memory[taken.slot].tensors
    name = max(memory, key=lambda each: memory[each].numel())
    memory[name].mul_(1.5)
    with pytest.raises(StaleWeightsError, match="other log-probabilities than the policy"):
        engine.sample_with(taken, REQUESTS, SETTINGS)
    # the next snapshot is whole again
    expected = NativeEngine(engine.lm, small.EOS).sample(REQUESTS, SETTINGS)
    assert engine.sample_with(engine.snapshot(SETTINGS), REQUESTS, SETTINGS) == expected


def test_an_error_of_the_engine_is_its_own_message(engine: ProcessEngine) -> None:
    with pytest.raises(RolloutError, match="exceed the model's context of 64"):
        engine.sample_with(engine.snapshot(SETTINGS), REQUESTS, SamplingSettings(64, 1.0))
    assert engine.sample_with(engine.snapshot(SETTINGS), [], SETTINGS) == []


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_process_uses_deterministic_kernels_if_the_trainer_does(
    monkeypatch: pytest.MonkeyPatch, deterministic: bool
) -> None:
    sent, found = dict[str, object](), []

    def started(request: dict[str, object]) -> NoReturn:
        sent.update(request)
        raise RolloutError("enough")

    def build(_: object) -> NoReturn:
        found.append((torch.are_deterministic_algorithms_enabled(), torch.backends.cuda.cudnn_sdp_enabled()))
        raise RolloutError("enough")

    monkeypatch.setattr("posttrain.rollouts.sampling_process.build", build)
    made = ProcessEngine(small.tied_llama(), small.EOS, slots=1)
    monkeypatch.setattr(made, "_exchange", started)
    try:
        torch.use_deterministic_algorithms(deterministic)
        with pytest.raises(RolloutError, match="enough"):
            made.snapshot(SETTINGS)
        torch.use_deterministic_algorithms(False)
        serve(io.BytesIO(json.dumps(sent).encode() + b"\n"), io.BytesIO())
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cuda.enable_cudnn_sdp(True)
        made.close()
    assert found == [(deterministic, False)]


def _lacks() -> NoReturn:
    torch.empty(2**56)
    raise AssertionError


@pytest.mark.parametrize("lost", [False, True], ids=["memory", "trainer"])
def test_a_lack_of_memory_is_words_and_a_lost_trainer_is_no_bug(monkeypatch: pytest.MonkeyPatch, lost: bool) -> None:
    monkeypatch.setattr("posttrain.rollouts.sampling_process._Sampler", lambda request: _lacks())
    reader, writer = os.pipe()
    if lost:
        os.close(reader)
    with os.fdopen(writer, "wb") as replies:
        serve(io.BytesIO(b"{}\n"), replies)
    if not lost:
        with os.fdopen(reader, "rb") as sent:
            assert re.match(
                "the memory did not suffice for the sampling process .*allocate memory",
                json.loads(sent.read())["error"],
            )


def test_only_what_an_adapter_changes_travels_and_a_killed_process_is_reported() -> None:
    lm = small.language_model()
    Adapter(lm, LoraSettings(2, 4.0, ("q_proj",)))
    engine = ProcessEngine(lm, small.EOS, slots=1)
    try:
        for name, parameter in lm.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.5, generator=torch.Generator().manual_seed(1))
        answers = engine.sample_with(engine.snapshot(SETTINGS), REQUESTS, SETTINGS)
        assert sorted(engine.memory[0].tensors) == [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)]
        moved(lm, 1.5)
        later = engine.sample_with(engine.snapshot(SETTINGS), REQUESTS, SETTINGS)
        plain = small.language_model()
        plain.load_state_dict(plain_state(lm, torch.float32))
        assert later == NativeEngine(plain, small.EOS).sample(REQUESTS, SETTINGS)
        assert later != answers
        taken = engine.snapshot(SETTINGS)
        assert engine.process is not None
        engine.process.kill()
        with pytest.raises(RolloutError, match="the sampling process was killed by SIGKILL"):
            engine.sample_with(taken, REQUESTS, SETTINGS)
    finally:
        engine.close()


@pytest.mark.slow
def test_sigkill_of_the_whole_training_changes_no_byte_and_leaves_no_process(root: Path, tmp_path: Path) -> None:
    def run(folder: str, kill_at: int) -> tuple[int, list[str]]:
        command = [sys.executable, "-m", "tests.rollouts.train_ahead", str(tmp_path / folder), str(kill_at)]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=400)
        return done.returncode, done.stdout.splitlines()

    status, straight = run("straight", 0)
    assert (status, len(straight)) == (0, 2)
    for kill_at in (2, 5):
        status, lines = run("killed", kill_at)
        assert status == -signal.SIGKILL
        sampler = int(lines[0])
        assert not _running(sampler), "the sampling process outlived its trainer"
    status, resumed = run("killed", 0)
    assert status == 0
    assert resumed[-1] == straight[-1]


def _running(pid: int) -> bool:
    """Wait until a process is gone, a minute at most; return True if it is still there."""
    from posttrain.network import wait_until

    return not wait_until(lambda: not _exists(pid), lambda: True, 60)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
