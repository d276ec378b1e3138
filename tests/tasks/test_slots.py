import os
import signal
import subprocess
import sys
from pathlib import Path
from threading import Event, Thread

import pytest

from posttrain.errors import Interrupted, OrchestrationError
from tasks import slots
from tasks.slots import (
    SEVERAL_PROCESSES,
    Slot,
    cuda_devices,
    has_several_processes,
    lease,
    lease_directory,
    machine_slots,
    parse_devices,
)

LISTING = """GPU 0: NVIDIA H200 (UUID: GPU-aaaa)
GPU 1: NVIDIA H200 (UUID: GPU-bbbb)
  MIG 3g.71gb     Device  0: (UUID: MIG-b1)
  MIG 4g.71gb     Device  1: (UUID: MIG-b2)
GPU 2: NVIDIA H200 (UUID: GPU-cccc)
"""


def test_a_split_device_counts_as_its_parts() -> None:
    assert parse_devices(LISTING) == {
        "GPU-aaaa": ["GPU-aaaa"],
        "GPU-bbbb": ["MIG-b1", "MIG-b2"],
        "GPU-cccc": ["GPU-cccc"],
    }
    assert parse_devices("") == {}


@pytest.mark.parametrize(
    ("visible", "devices"),
    [
        ("2,0", ["GPU-cccc", "GPU-aaaa"]),
        ("1", ["MIG-b1", "MIG-b2"]),
        ("GPU-bbbb,2", ["MIG-b1", "MIG-b2", "GPU-cccc"]),
        ("MIG-b2,1", ["MIG-b2", "MIG-b1"]),
        ("3", ["3"]),
    ],
)
def test_an_index_counts_gpus_and_not_their_parts(
    visible: str, devices: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "_nvidia_smi", lambda: LISTING)
    assert cuda_devices({"CUDA_VISIBLE_DEVICES": visible}) == devices


def test_without_a_device_the_number_asked_for_is_the_number_of_slots() -> None:
    environ = {"CUDA_VISIBLE_DEVICES": "", "POSTTRAIN_SLOTS": "3"}
    assert machine_slots(environ) == [Slot(("cpu-0",), None), Slot(("cpu-1",), None), Slot(("cpu-2",), None)]
    assert 1 <= len(machine_slots({"CUDA_VISIBLE_DEVICES": "-1"})) <= (os.cpu_count() or 1)


def test_a_driver_without_nvidia_smi_is_refused_unless_the_devices_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container with NVIDIA_DRIVER_CAPABILITIES=compute."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(slots, "DRIVER", tmp_path)
    with pytest.raises(OrchestrationError, match=r"nvidia-smi is not found.* set CUDA_VISIBLE_DEVICES, such as 0"):
        machine_slots({})
    assert [slot.device for slot in machine_slots({"CUDA_VISIBLE_DEVICES": "0"})] == ["0"]
    assert machine_slots({"CUDA_VISIBLE_DEVICES": "", "POSTTRAIN_SLOTS": "1"}) == [Slot(("cpu-0",), None)]
    monkeypatch.setattr(slots, "DRIVER", tmp_path / "absent")
    assert machine_slots({"POSTTRAIN_SLOTS": "1"}) == [Slot(("cpu-0",), None)]


def test_more_slots_than_devices_share_them_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "_nvidia_smi", lambda: LISTING)
    environ = {"CUDA_VISIBLE_DEVICES": "2,0", "POSTTRAIN_SLOTS": "3"}
    assert machine_slots(environ) == [
        Slot(("GPU-cccc.0",), "GPU-cccc"),
        Slot(("GPU-aaaa.0",), "GPU-aaaa"),
        Slot(("GPU-cccc.1",), "GPU-cccc"),
    ]
    assert len(machine_slots({})) == 4


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5"])
def test_a_nonsensical_number_of_slots_is_refused(text: str) -> None:
    with pytest.raises(OrchestrationError, match="whole number of at least 1"):
        machine_slots({"POSTTRAIN_SLOTS": text, "CUDA_VISIBLE_DEVICES": ""})


def test_two_holders_get_two_slots_and_the_third_waits(tmp_path: Path) -> None:
    both = [Slot(("a",), None), Slot(("b",), "GPU-1")]
    waited, stop = Event(), Event()
    with lease(both, stop, directory=tmp_path) as first, lease(both, stop, directory=tmp_path) as second:
        assert (first.slot.names, second.slot.names) == (("a",), ("b",))
        assert first.environment() == {}
        assert second.environment() == {"CUDA_VISIBLE_DEVICES": "GPU-1"}
        Thread(target=lambda: (waited.wait(60), stop.set())).start()
        with pytest.raises(Interrupted), lease(both, stop, on_wait=waited.set, directory=tmp_path):
            pass
    with lease(both, Event(), directory=tmp_path) as again:
        assert again.slot.names == ("a",)


def test_the_kernel_frees_the_slot_of_a_killed_holder(tmp_path: Path) -> None:
    script = f"""
import time
from pathlib import Path
from threading import Event
from tasks.slots import Slot, lease
with lease([Slot(("a",), None)], Event(), directory=Path({str(tmp_path)!r})):
    print("held", flush=True)
    time.sleep(60)
"""
    holder = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2], text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    assert slots._try_lock(tmp_path / "a") is None
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    with lease([Slot(("a",), None)], Event(), directory=tmp_path) as held:
        assert held.slot.names == ("a",)


def test_the_lease_directory_is_open_to_every_user(tmp_path: Path) -> None:
    where = lease_directory({"POSTTRAIN_LEASES": str(tmp_path / "leases")})
    assert where.stat().st_mode & 0o7777 == 0o1777


@pytest.fixture
def two_processes(tmp_path: Path) -> dict[str, str]:
    path = tmp_path / "two.yaml"
    path.write_text("num_processes: 2\nnum_machines: 1\n")
    return {"POSTTRAIN_ACCELERATE": str(path)}


def test_a_stage_of_two_processes_takes_two_devices(
    two_processes: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "_nvidia_smi", lambda: LISTING)
    assert machine_slots(two_processes) == [
        Slot(("GPU-aaaa.0", "MIG-b1.0"), "GPU-aaaa,MIG-b1"),
        Slot(("MIG-b2.0", "GPU-cccc.0"), "MIG-b2,GPU-cccc"),
    ]
    # one device is left over, and serves no pair
    assert [slot.device for slot in machine_slots(two_processes | {"CUDA_VISIBLE_DEVICES": "0,1"})] == [
        "GPU-aaaa,MIG-b1"
    ]
    with pytest.raises(OrchestrationError, match="2 processes per stage, but this machine has 1 devices"):
        machine_slots(two_processes | {"CUDA_VISIBLE_DEVICES": "0"})
    cores = two_processes | {"CUDA_VISIBLE_DEVICES": "", "POSTTRAIN_SLOTS": "2"}
    assert machine_slots(cores) == [Slot(("cpu-0", "cpu-1"), None), Slot(("cpu-2", "cpu-3"), None)]


def test_a_pair_waits_while_either_of_its_devices_is_held(tmp_path: Path) -> None:
    pair = [Slot(("a", "b"), None)]
    stop = Event()
    with lease([Slot(("b",), None)], Event(), directory=tmp_path):
        with pytest.raises(Interrupted), lease(pair, stop, on_wait=stop.set, directory=tmp_path):
            pass
        # and takes none of them meanwhile
        with lease([Slot(("a",), None)], Event(), directory=tmp_path) as held:
            assert held.slot.names == ("a",)
    with lease(pair, Event(), directory=tmp_path) as held:
        assert len(held.descriptors) == 2


def test_what_another_user_puts_in_place_of_a_lock_is_never_followed_and_never_blocks(tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    (tmp_path / "link").symlink_to(tmp_path / "precious")
    os.mkfifo(tmp_path / "pipe")
    words = r"cannot be used for the locks .*set POSTTRAIN_LEASES to a folder of your own"
    with pytest.raises(OrchestrationError, match=words), lease([Slot(("link",), None)], Event(), directory=tmp_path):
        pass
    with lease([Slot(("pipe",), None)], Event(), directory=tmp_path) as held:
        assert held.slot.names == ("pipe",)
    with pytest.raises(OrchestrationError, match=words):
        lease_directory({"POSTTRAIN_LEASES": str(tmp_path / "precious")})


def test_a_stage_that_does_not_train_leases_one_device(
    two_processes: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "_nvidia_smi", lambda: LISTING)
    training, single = machine_slots(two_processes), machine_slots(two_processes, several=False)
    assert [slot.device for slot in training] == ["GPU-aaaa,MIG-b1", "MIG-b2,GPU-cccc"]
    assert [slot.device for slot in single] == ["GPU-aaaa", "MIG-b1", "MIG-b2", "GPU-cccc"]
    with lease(training, Event(), directory=tmp_path), lease(single, Event(), directory=tmp_path) as second:
        assert second.slot == single[2]


def test_the_stages_with_several_processes_are_those_whose_steps_say_so(root: Path) -> None:
    marks = ("trains=True", "several=True")
    texts = {path.stem: path.read_text("utf-8") for path in (root / "pipelines").glob("*.py")}
    found = {name for name, text in texts.items() if any(mark in text for mark in marks)}
    assert found | {"evaluate_aligned"} == set(SEVERAL_PROCESSES)  # the same module as evaluate
    for stage, expected in (("align@grpo-0", True), ("evaluate_aligned@grpo-0", True), ("compare", False)):
        assert has_several_processes(stage) == expected, stage
