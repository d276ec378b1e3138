"""Checkpoints: written under a temporary name and renamed, verified by checksum, newest kept; a damaged one is reported and skipped.

Example:
    >>> import tempfile
    >>> checkpoints = Checkpoints(Path(tempfile.mkdtemp()), keep=2)
    >>> for step in (10, 20, 30):
    ...     _ = checkpoints.save(step, {"x": torch.tensor(float(step))})
    >>> sorted(path.name for path in checkpoints.folder.iterdir()), checkpoints.latest()
    (['step-00000020', 'step-00000030'], (30, {'x': tensor(30.)}))
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from posttrain.errors import CheckpointError
from posttrain.files import replace, sync


class Checkpoints:
    """Checkpoints of one run, in a folder that is specific to its parameters, inputs and code."""

    def __init__(self, folder: Path, keep: int = 2, name: str = "step", writes: bool = True) -> None:
        """Open the folder.

        Args:
            keep: number of checkpoints to keep.
            writes: False for all but one of the processes that train together; all of them read.
        """
        self.folder, self.keep, self.name, self.writes = folder, keep, name, writes

    def save(self, step: int, state: Mapping[str, Any]) -> Path:
        """Write the state after `step` steps; it is complete on disk before it gets its final name.

        Raises:
            CheckpointError: the disk is full or read-only.
        """
        final = self.folder / f"{self.name}-{step:08d}"
        if not self.writes:
            return final
        partial = self.folder / f"partial-{step:08d}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            torch.save(dict(state), partial / "state.pt")
            manifest = _manifest(step, _sha256(partial / "state.pt"))
            (partial / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
            for path in (partial / "state.pt", partial / "manifest.json", partial):
                sync(path)
            replace(partial, final)
        except (OSError, RuntimeError) as error:  # torch raises RuntimeError when the disk is full
            shutil.rmtree(partial, ignore_errors=True)
            free = shutil.disk_usage(self.folder).free / 2**20 if self.folder.exists() else 0.0
            raise CheckpointError(
                f"cannot write checkpoint {final}, where {free:.1f} MiB are free: {error}. Free space or set another workspace, then run"
                " again."
            ) from error
        names = self._names()
        # a later step exists only if it was damaged and skipped
        torn = [path for path in names if path.name > final.name]
        for path in [*names[: -self.keep - len(torn)], *torn]:
            shutil.rmtree(path)
        return final

    def latest(self) -> tuple[int, dict[str, Any]] | None:
        """Return (step, state) of the newest complete checkpoint, or None. Every damaged one is reported on stderr."""
        for path in reversed(self._names()):
            try:
                return _read(path)
            except (OSError, ValueError, CheckpointError) as error:
                print(f"checkpoint {path.name} is damaged ({error}); trying the one before it", file=sys.stderr)
        return None

    @staticmethod
    def read(path: Path) -> dict[str, Any]:
        """Return the state in one checkpoint's folder.

        Raises:
            CheckpointError: it is absent or damaged.
        """
        try:
            return _read(path)[1]
        except (OSError, ValueError, CheckpointError) as error:
            raise CheckpointError(f"{path}: not a complete checkpoint ({error}); check the path") from error

    def clear(self) -> None:
        """Remove all checkpoints of the run."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _names(self) -> list[Path]:
        return sorted(self.folder.glob(f"{self.name}-*")) if self.folder.exists() else []


def _read(path: Path) -> tuple[int, dict[str, Any]]:
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    step = int(path.name.rpartition("-")[2])
    if manifest != _manifest(step, _sha256(path / "state.pt")):
        raise CheckpointError("a checksum does not match")
    # onto the CPU: the device that wrote it may not exist here, and the other processes of this machine have devices of their own
    return step, torch.load(path / "state.pt", map_location="cpu", weights_only=True)


def _manifest(step: int, digest: str) -> dict[str, Any]:
    """Return the content of manifest.json: the step, the state's checksum, and a checksum of these two."""
    check = hashlib.sha256(f"{step} {digest}".encode()).hexdigest()
    return {"step": step, "sha256": digest, "check": check}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
