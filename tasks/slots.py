"""Lease slots for parallel stages; the kernel releases the lease of a dead process.

A slot is a lock file in a directory that all flows of the machine share (POSTTRAIN_LEASES, default <tmp>/posttrain-slots).
POSTTRAIN_SLOTS sets the number of slots; the default is one per CUDA device, else one per CPU core with 2 GiB of memory. If
POSTTRAIN_ACCELERATE starts n processes per stage that trains or evaluates, the slot of such a stage is n devices or cores and holds the
lock of each. Devices of samplers (tasks/samplers.py) are no slots.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from threading import Event

from pipelines.runtime.launch import configuration, processes
from pipelines.runtime.machine import available_cores
from posttrain.errors import Interrupted, OrchestrationError

SEVERAL_PROCESSES = ("sft", "reward", "align", "evaluate", "evaluate_aligned")
"""Stages whose steps POSTTRAIN_ACCELERATE starts as several processes; every other stage is one process on one device."""
MEMORY_PER_SLOT_BYTES = 2 << 30
POLL_SECONDS = 0.2
DRIVER = Path("/dev/nvidiactl")
"""Device file of NVIDIA's driver."""
_UUID = re.compile(r"\(UUID: ((?:GPU|MIG)-[^)]+)\)")


@dataclass(frozen=True)
class Slot:
    """One place for a stage: its lock files and its devices."""

    names: tuple[str, ...]
    """Names of the lock files to hold, one for each process of a stage."""
    device: str | None
    """UUIDs or indices for CUDA_VISIBLE_DEVICES; None on a CPU."""


@dataclass(frozen=True)
class Lease:
    """A held slot."""

    slot: Slot
    descriptors: tuple[int, ...]
    """Open lock files, passed to the stage's guard: the slot is free when the last process that may use it has ended."""

    def environment(self) -> dict[str, str]:
        """Return the variables that select the slot's devices."""
        return {} if self.slot.device is None else {"CUDA_VISIBLE_DEVICES": self.slot.device}


def has_several_processes(stage: str) -> bool:
    """Return True if POSTTRAIN_ACCELERATE may start several processes for a node of the DAG."""
    return stage.partition("@")[0] in SEVERAL_PROCESSES


def machine_slots(environ: Mapping[str, str] = os.environ, several: bool = True, samples: bool = False) -> list[Slot]:
    """Return the slots of this machine; with more slots than devices, several stages share a device.

    Args:
        several: False for a stage that is one process even if POSTTRAIN_ACCELERATE asks for more.
        samples: True for a stage that also uses the samplers' devices, so each of its slots holds their locks.
    """
    present, samplers = cuda_devices(environ), _sampler_devices(environ)
    devices = [name for name in present if name not in samplers]
    each = processes(configuration(environ)) if several else 1
    if present and not devices:
        raise OrchestrationError(
            f"{' and '.join(named_samplers(environ))}: all {len(present)} devices that stages may use, so none is left for training. Name"
            " fewer, or unset POSTTRAIN_VLLM_DEVICES, so that server and trainer share a device"
        )
    if devices and len(devices) < each:
        raise OrchestrationError(
            f"POSTTRAIN_ACCELERATE asks for {each} processes per stage, but this machine has {len(devices)} devices; lower num_processes"
        )
    count = _requested_slots(environ) or len(devices) // each or max(1, _cpu_slots() // each)
    groups = [range(i * each, (i + 1) * each) for i in range(count)]
    also = tuple(f"{device.replace('/', '_')}.0" for device in samplers) if samples else ()
    if not devices:
        return [Slot((*(f"cpu-{i}" for i in group), *also), None) for group in groups]
    slots = []
    for group in groups:
        members = [(devices[i % len(devices)], i // len(devices)) for i in group]
        names = tuple(f"{device.replace('/', '_')}.{share}" for device, share in members)
        slots.append(Slot((*names, *also), ",".join(device for device, _ in members)))
    return slots


def cuda_devices(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Return the UUIDs of the devices that this process may use; a device split by MIG is replaced by its instances."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return []
    present = parse_devices(_nvidia_smi())
    if not present and visible is None and DRIVER.exists() and shutil.which("nvidia-smi") is None:
        raise OrchestrationError(
            f"{DRIVER} exists, and nvidia-smi is not found, so the GPUs of this machine are not known, and stages that run at the same time"
            " would share one. Install nvidia-smi (in a container: NVIDIA_DRIVER_CAPABILITIES=compute,utility), or set"
            " CUDA_VISIBLE_DEVICES, such as 0; empty for the CPU"
        )
    return [*chain(*present.values())] if visible is None else _resolved(visible, present)


def named_samplers(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Return the variables, with their values, that name devices for samplers next to a trainer: `NAME = VALUE`.

    POSTTRAIN_VLLM_DEVICES has no effect on servers that run already.
    """
    names = ["POSTTRAIN_SAMPLER_DEVICES", *([] if environ.get("POSTTRAIN_VLLM_URLS") else ["POSTTRAIN_VLLM_DEVICES"])]
    given = {name: environ.get(name, "").strip() for name in names}
    return [f"{name} = {value}" for name, value in given.items() if value not in ("", "-1")]


def _sampler_devices(environ: Mapping[str, str]) -> list[str]:
    named = [text.partition(" = ")[2] for text in named_samplers(environ)]
    # they replace CUDA_VISIBLE_DEVICES, so their indices count all devices
    return _resolved(",".join(named), parse_devices(_nvidia_smi())) if named else []


def _resolved(visible: str, present: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the devices that a list names, each once. An index counts GPUs, as in CUDA; a GPU split by MIG is all its instances."""
    # The meaning of an index depends on the order of devices; a UUID is the same for every flow.
    gpus, names = list(present), [name.strip() for name in visible.split(",") if name.strip()]
    named = [gpus[int(name)] if name.isdigit() and int(name) < len(gpus) else name for name in names]
    return [*dict.fromkeys(chain.from_iterable(present.get(name, [name]) for name in named))]


def parse_devices(listing: str) -> dict[str, list[str]]:
    """Return the devices of each GPU in the output of `nvidia-smi -L`, by its UUID: itself, or its MIG instances."""
    found: dict[str, list[str]] = {}
    gpu = ""
    for line in listing.splitlines():
        match = _UUID.search(line)
        if match is None:
            continue
        if match[1].startswith("GPU-"):
            gpu = match[1]
            found[gpu] = [gpu]
        else:
            found[gpu] = [each for each in found.get(gpu, []) if each != gpu] + [match[1]]
    return found


@contextmanager
def lease(
    slots: Sequence[Slot], stop: Event, on_wait: Callable[[], None] = lambda: None, directory: Path | None = None
) -> Iterator[Lease]:
    """Yield the first free slot; waits while all are taken, by this flow or a different one. Raises Interrupted if `stop` is set."""
    folder = directory or lease_directory()
    reported = False
    while True:
        for slot in slots:
            descriptors = _try_all([folder / name for name in slot.names])
            if descriptors is None:
                continue
            try:
                yield Lease(slot, descriptors)
            finally:
                _close(descriptors)
            return
        if not reported:
            on_wait()
            reported = True
        if stop.wait(POLL_SECONDS):
            raise Interrupted("stopped while waiting for a free slot")


def lease_directory(environ: Mapping[str, str] = os.environ) -> Path:
    """Return the directory of the lock files, and create it for all users."""
    folder = Path(environ.get("POSTTRAIN_LEASES") or Path(tempfile.gettempdir()) / "posttrain-slots")
    try:
        if not folder.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(0o1777)
    except OSError as error:
        raise _unusable(folder, error) from None
    return folder


def _try_all(paths: Sequence[Path]) -> tuple[int, ...] | None:
    """Take every lock, or none."""
    held: list[int] = []
    for path in paths:
        descriptor = _try_lock(path)
        if descriptor is None:
            _close(held)
            return None
        held.append(descriptor)
    return tuple(held)


def _close(descriptors: Sequence[int]) -> None:
    """Close the descriptors, which releases their locks."""
    for descriptor in descriptors:
        os.close(descriptor)


def _try_lock(path: Path) -> int | None:
    """Take one lock file; return None if it is held. Raises OrchestrationError if it cannot be opened."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # a pipe would block without O_NONBLOCK
    try:
        try:
            descriptor = os.open(path, flags)
        except FileNotFoundError:
            descriptor = os.open(path, flags | os.O_CREAT, 0o644)
            os.fchmod(descriptor, 0o644)  # All users of the machine share the lock, whatever the first user's umask is.
    except OSError as error:
        raise _unusable(path, error) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _unusable(path: Path, error: OSError) -> OrchestrationError:
    """Return the error for a lock that cannot be opened; the default folder can be written by every user of the machine."""
    return OrchestrationError(
        f"{path}: cannot be used for the locks that share this machine's devices ({error.strerror}). Remove it, or set POSTTRAIN_LEASES to"
        " a folder of your own."
    )


def _requested_slots(environ: Mapping[str, str]) -> int | None:
    """Return POSTTRAIN_SLOTS, or None if it is unset. Raises OrchestrationError if it is not a positive number."""
    text = environ.get("POSTTRAIN_SLOTS", "").strip()
    if not text:
        return None
    if not re.fullmatch("[0-9]{1,4}", text) or int(text) < 1:
        raise OrchestrationError(
            f"POSTTRAIN_SLOTS = {text[:40]!r}: must be a whole number of at least 1; unset it to use the machine's default."
        )
    return int(text)


def _cpu_slots() -> int:
    """Return the number of CPU cores that have enough memory each."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(available_cores(), memory // MEMORY_PER_SLOT_BYTES))


def _nvidia_smi() -> str:
    """Return the output of `nvidia-smi -L`, empty without a GPU."""
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False)
    except FileNotFoundError:
        return ""
    except subprocess.TimeoutExpired:
        raise OrchestrationError(
            "`nvidia-smi -L` did not respond within 30 s. Set CUDA_VISIBLE_DEVICES= to run on the CPU."
        ) from None
    return done.stdout if done.returncode == 0 else ""
