"""Devices that the environment names for samplers are leased: no stage trains on them, and stages that sample wait for each other."""

from __future__ import annotations

from pathlib import Path
from threading import Event

import pytest

from posttrain.errors import Interrupted, OrchestrationError
from tasks import slots
from tasks.samplers import stage_slots
from tasks.slots import Slot, lease, machine_slots
from tests.tasks.test_slots import LISTING

ONE, TWO = {"POSTTRAIN_VLLM_DEVICES": "0"}, {"POSTTRAIN_VLLM_DEVICES": "0", "POSTTRAIN_SAMPLER_DEVICES": " MIG-b1, 0"}


@pytest.fixture(autouse=True)
def devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "_nvidia_smi", lambda: LISTING)


def names(found: list[Slot]) -> list[tuple[str, ...]]:
    return [slot.names for slot in found]


def test_stages_that_sample_hold_the_samplers_devices_and_no_stage_trains_on_them(root: Path) -> None:
    own = [("MIG-b1.0",), ("MIG-b2.0",), ("GPU-cccc.0",)]
    assert names(stage_slots(root, "align@grpo-0", ONE)) == [(*each, "GPU-aaaa.0") for each in own]
    assert [slot.device for slot in stage_slots(root, "align@grpo-0", ONE)] == ["MIG-b1", "MIG-b2", "GPU-cccc"]
    for stage in ("align@dpo-0", "evaluate_aligned@grpo-0", "sft"):
        assert names(stage_slots(root, stage, ONE)) == own, stage
    assert names(machine_slots(ONE)) == own
    assert names(stage_slots(root, "align@ppo-1", TWO)) == [
        (each, "MIG-b1.0", "GPU-aaaa.0") for each in ("MIG-b2.0", "GPU-cccc.0")
    ]


def test_indices_count_all_devices_whatever_is_visible(root: Path) -> None:
    visible = ONE | {"CUDA_VISIBLE_DEVICES": "2"}
    assert stage_slots(root, "align@grpo-0", visible) == [Slot(("GPU-cccc.0", "GPU-aaaa.0"), "GPU-cccc")]


@pytest.mark.parametrize(
    "environ", [{}, ONE | {"POSTTRAIN_VLLM_URLS": "http://h:8000"}, {"POSTTRAIN_SAMPLER_DEVICES": ""}]
)
def test_without_own_devices_of_a_sampler_nothing_more_is_held(root: Path, environ: dict[str, str]) -> None:
    assert names(stage_slots(root, "align@grpo-0", environ)) == names(machine_slots({}))
    assert len(machine_slots({})) == 4


def test_two_stages_that_sample_wait_for_each_other_and_others_do_not(root: Path, tmp_path: Path) -> None:
    stop = Event()
    sampling, training = (stage_slots(root, f"align@{name}-0", ONE) for name in ("grpo", "dpo"))
    with lease(sampling, Event(), directory=tmp_path):
        with pytest.raises(Interrupted), lease(sampling, stop, on_wait=stop.set, directory=tmp_path):
            pass
        with lease(training, Event(), directory=tmp_path) as held:
            assert held.slot.device == "MIG-b2"


def test_samplers_on_all_devices_are_refused() -> None:
    with pytest.raises(OrchestrationError, match=r"POSTTRAIN_VLLM_DEVICES = 0,1,2: all 4 devices"):
        machine_slots({"POSTTRAIN_VLLM_DEVICES": "0,1,2"})
