"""How many stages may run side by side on this machine, and leases that the kernel takes back from a dead holder.

A slot is a lock file in a directory shared by every flow of the machine (POSTTRAIN_LEASES, default <tmp>/posttrain-slots).
POSTTRAIN_SLOTS sets their number; by default one per CUDA device, else one per CPU core with 2 GiB of memory to itself. Where
POSTTRAIN_ACCELERATE starts n processes for a stage, a slot is n devices or cores, and holds the lock of each.
"""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event

from pipelines.runtime.launch import configuration, processes
from pipelines.runtime.machine import available_cores
from posttrain.errors import Interrupted, OrchestrationError

MEMORY_PER_SLOT_BYTES = 2 << 30
POLL_SECONDS = 0.2
_UUID = re.compile(r"\(UUID: ((?:GPU|MIG)-[^)]+)\)")


@dataclass(frozen=True)
class Slot:
    names: tuple[str, ...]
    """Of the lock files to hold, one for each process of a stage."""
    device: str | None
    """UUIDs or indices for CUDA_VISIBLE_DEVICES; None on a CPU."""


@dataclass(frozen=True)
class Lease:
    slot: Slot
    descriptors: tuple[int, ...]
    """Handed to the stage's guard: the device is free when the last process that may use it is gone."""

    def environment(self) -> dict[str, str]:
        return {} if self.slot.device is None else {"CUDA_VISIBLE_DEVICES": self.slot.device}


def machine_slots(environ: Mapping[str, str] = os.environ) -> list[Slot]:
    """The slots of this machine: with more slots than devices, several stages share a device."""
    devices, each = cuda_devices(environ), processes(configuration(environ))
    if devices and len(devices) < each:
        raise OrchestrationError(
            f"POSTTRAIN_ACCELERATE asks for {each} processes a stage, and there are {len(devices)} devices; lower num_processes"
        )
    count = _asked(environ) or len(devices) // each or max(1, _cpu_slots() // each)
    groups = [range(i * each, (i + 1) * each) for i in range(count)]
    if not devices:
        return [Slot(tuple(f"cpu-{i}" for i in group), None) for group in groups]
    slots = []
    for group in groups:
        members = [(devices[i % len(devices)], i // len(devices)) for i in group]
        names = tuple(f"{device.replace('/', '_')}.{share}" for device, share in members)
        slots.append(Slot(names, ",".join(device for device, _ in members)))
    return slots


def cuda_devices(environ: Mapping[str, str] = os.environ) -> list[str]:
    """UUIDs of the devices that this process may use; MIG instances in place of the device that is split into them."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return []
    present = parse_devices(_nvidia_smi())
    if visible is None:
        return present
    names = [name.strip() for name in visible.split(",") if name.strip()]
    # An index means another device in another order; the UUID means the same one for every flow.
    return [present[int(name)] if name.isdigit() and int(name) < len(present) else name for name in names]


def parse_devices(listing: str) -> list[str]:
    """UUIDs out of `nvidia-smi -L`."""
    found: list[str] = []
    for line in listing.splitlines():
        match = _UUID.search(line)
        if match is None:
            continue
        if match[1].startswith("MIG-") and found and found[-1].startswith("GPU-"):
            found.pop()
        found.append(match[1])
    return found


@contextmanager
def lease(
    slots: Sequence[Slot], stop: Event, on_wait: Callable[[], None] = lambda: None, directory: Path | None = None
) -> Iterator[Lease]:
    """The first free slot; waits while all are taken, by this flow or another one. Raises Interrupted when `stop` is set."""
    where = directory or lease_directory()
    told = False
    while True:
        for slot in slots:
            descriptors = _try_all([where / name for name in slot.names])
            if descriptors is None:
                continue
            try:
                yield Lease(slot, descriptors)
            finally:
                _close(descriptors)
            return
        if not told:
            on_wait()
            told = True
        if stop.wait(POLL_SECONDS):
            raise Interrupted("stopped while waiting for a free slot")


def lease_directory(environ: Mapping[str, str] = os.environ) -> Path:
    where = Path(environ.get("POSTTRAIN_LEASES") or Path(tempfile.gettempdir()) / "posttrain-slots")
    if not where.is_dir():
        where.mkdir(parents=True, exist_ok=True)
        where.chmod(0o1777)
    return where


def _try_all(paths: Sequence[Path]) -> tuple[int, ...] | None:
    """Every lock, or none."""
    held: list[int] = []
    for path in paths:
        descriptor = _try_lock(path)
        if descriptor is None:
            _close(held)
            return None
        held.append(descriptor)
    return tuple(held)


def _close(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _try_lock(path: Path) -> int | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        descriptor = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        os.fchmod(descriptor, 0o644)  # all users of the machine take turns, whatever the umask of the first
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _asked(environ: Mapping[str, str]) -> int | None:
    text = environ.get("POSTTRAIN_SLOTS", "").strip()
    if not text:
        return None
    if not text.isdigit() or int(text) < 1:
        raise OrchestrationError(
            f"POSTTRAIN_SLOTS = {text!r}: must be a whole number from 1; unset it for the machine's own number."
        )
    return int(text)


def _cpu_slots() -> int:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(available_cores(), memory // MEMORY_PER_SLOT_BYTES))


def _nvidia_smi() -> str:
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False)
    except FileNotFoundError:
        return ""
    except subprocess.TimeoutExpired:
        raise OrchestrationError(
            "`nvidia-smi -L` did not answer in 30 s. Set CUDA_VISIBLE_DEVICES= to run on the CPU."
        ) from None
    return done.stdout if done.returncode == 0 else ""
