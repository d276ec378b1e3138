"""Read the machine's energy counters, where they are readable: of processor packages (RAPL) and of NVIDIA GPUs (NVML).

A counter covers a whole package or GPU with everything that runs on it, so that runs side by side share its joules.

Example:
    >>> used({"package-0": (5_000_000, 9_000_000)}, {"package-0": (2_000_000, 9_000_000)})  # the counter has started again at 9 J
    6.0
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

POWERCAP = Path("/sys/class/powercap")
NVML = "libnvidia-ml.so.1"
"""NVIDIA's management library, a part of the driver."""
GPU = "gpu "
"""Beginning of the names of the counters of GPUs."""
Counters = Mapping[str, Sequence[int]]
"""Microjoules and the value after which the counter starts again, by the package's name."""


def read_counters(folder: Path = POWERCAP) -> dict[str, tuple[int, int]]:
    """Return the counters of all packages; none if the machine has none, or only root may read them."""
    found = {}
    for zone in sorted(folder.glob("intel-rapl:*")):
        if zone.name.count(":") != 1:  # parts of a package, which it contains
            continue
        try:
            name = (zone / "name").read_text(encoding="ascii").strip()
            found[name] = int((zone / "energy_uj").read_text()), int((zone / "max_energy_range_uj").read_text())
        except (OSError, ValueError):
            return {}
    return found


def gpu_counters() -> dict[str, tuple[int, int]]:
    """Return the counters of all GPUs that this process sees; none before it computes on one, or if a GPU has no counter."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return {}
    uuids = [f"GPU-{torch.cuda.get_device_properties(i).uuid}" for i in range(torch.cuda.device_count())]
    return nvml_counters(uuids)


def nvml_counters(uuids: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Return the energy of GPUs since the driver was loaded, in microjoules; none without the driver, or if a GPU has no counter."""
    try:
        nvml = ctypes.CDLL(NVML)
    except OSError:
        return {}
    if nvml.nvmlInit_v2() != 0:
        return {}
    found, handle, millijoules = {}, ctypes.c_void_p(), ctypes.c_ulonglong()
    for uuid in uuids:
        known = nvml.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(handle)) == 0
        if known and nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules)) == 0:
            found[f"{GPU}{uuid}"] = 1000 * millijoules.value, 1000 * 2**64
    nvml.nvmlShutdown()
    return found if len(found) == len(uuids) else {}


def joules(records: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the energy of all attempts of a run, from its measurements.

    None if the machine shows no counters, the run computed on a GPU without one, or an attempt was cut off.
    """
    total, before = 0.0, None
    for record in records:
        if record["kind"] == "start" and before is not None:
            return None  # the attempt before has no end
        if record["kind"] in ("start", "ready"):
            before = record.get("energy")
        elsewhere = record["kind"] == "ready" and record.get("device", "cpu") != "cpu"
        if elsewhere and not any(name.startswith(GPU) for name in before or {}):
            return None
        if record["kind"] == "end":
            spent = used(before or {}, record.get("energy") or {})
            if spent is None:
                return None
            total, before = total + spent, None
    return total if total and before is None else None


def used(before: Counters, after: Counters) -> float | None:
    """Return the joules between two readings; None if they are not of the same packages. A counter may have started again once."""
    if not before or before.keys() != after.keys():
        return None
    total = 0
    for name, (start, limit) in before.items():
        end = after[name][0]
        total += end - start if end >= start else end + limit - start
    return total / 1e6
