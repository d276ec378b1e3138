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
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from posttrain.errors import CheckpointError, ConfigError
from posttrain.files import replace, sync
from posttrain.training.sharded_checkpoint import FOLDER, file_digest, main_group, marked, outcomes, split, write


class Checkpoints:
    """Checkpoints of one run, in a folder that is specific to its parameters, inputs and code."""

    def __init__(self, folder: str | Path, keep: int = 2, name: str = "step", writes: bool = True) -> None:
        """Open the folder.

        Args:
            keep: number of checkpoints to keep.
            writes: False for all but one of the processes that train together; all of them read.

        Raises:
            ConfigError: the folder is no path, or no checkpoint would be kept.
        """
        if not isinstance(folder, str | PathLike) or not isinstance(keep, int) or keep < 1:
            raise ConfigError(
                f"Checkpoints: folder = {folder!r} and keep = {keep!r}; give the path of a folder, and keep at least 1 checkpoint"
            )
        self.folder, self.keep, self.name, self.writes = Path(folder), keep, name, writes
        self._writing: tuple[int, Future[dict[str, str]]] | None = None

    def save(self, step: int, state: Mapping[str, Any]) -> Path:
        """Write the state after `step` steps; it is complete on disk before it gets its final name.

        Tensors that processes share are copied at once and written in the background: call `poll` after each step, and `wait` at the end.

        Raises:
            CheckpointError: the disk is full or read-only.
        """
        self.wait()
        plain, shared = split(dict(state))
        partial, final = self.folder / f"partial-{step:08d}", self._final(step)
        if self.writes:
            with self._reported(step):
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
                torch.save(plain, partial / "state.pt")
                sync(partial / "state.pt")
        if shared:
            torch.distributed.barrier()  # the folder exists for all
            self._writing = (step, write(shared, partial))
        elif self.writes:
            self._complete(step, {})
        return final

    def poll(self) -> None:
        """Complete the checkpoint that is being written if all processes are ready. All processes must call it after each step."""
        if self._writing is not None:
            waits = torch.tensor([int(not self._writing[1].done())])
            torch.distributed.all_reduce(waits, torch.distributed.ReduceOp.MAX, group=main_group())
            if not int(waits):
                self.wait()

    def wait(self) -> None:
        """Wait for the checkpoint that is being written, and complete it. All processes must call it.

        Raises:
            CheckpointError: the disk of one process is full or read-only.
        """
        if self._writing is None:
            return
        (step, digests), self._writing = self._writing, None
        files, errors = outcomes(digests)
        with self._reported(step):
            if errors:
                raise OSError(errors[0])
            if self.writes:
                self._complete(step, files)
        torch.distributed.barrier()

    def _complete(self, step: int, shards: Mapping[str, str]) -> None:
        """Give a written checkpoint its final name, and remove those that are older than the ones to keep."""
        partial, final = self.folder / f"partial-{step:08d}", self._final(step)
        with self._reported(step):
            manifest = _manifest(step, file_digest(partial / "state.pt"), shards)
            (partial / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
            for path in (partial / "manifest.json", partial):
                sync(path)
            replace(partial, final)
        names = self._names()
        # a later step exists only if it was damaged and skipped
        torn = [path for path in names if path.name > final.name]
        for path in [*names[: -self.keep - len(torn)], *torn]:
            shutil.rmtree(path)

    @contextmanager
    def _reported(self, step: int) -> Iterator[None]:
        """Remove what was written and raise CheckpointError if the block cannot write."""
        try:
            yield
        except (OSError, RuntimeError) as error:  # torch raises RuntimeError when the disk is full
            if self.writes:
                shutil.rmtree(self.folder / f"partial-{step:08d}", ignore_errors=True)
            free = shutil.disk_usage(self.folder).free / 2**20 if self.folder.exists() else 0.0
            raise CheckpointError(
                f"cannot write checkpoint {self._final(step)}, where {free:.1f} MiB are free: {error}. Free space or set another"
                " workspace, then run again."
            ) from error

    def _final(self, step: int) -> Path:
        return self.folder / f"{self.name}-{step:08d}"

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
    if not isinstance(manifest, dict):
        raise CheckpointError("its manifest.json is damaged")
    step = int(path.name.rpartition("-")[2])
    written = manifest.get(FOLDER, {}) if isinstance(manifest, dict) else None
    if not isinstance(written, dict):
        raise CheckpointError("manifest.json does not have the form of a manifest")
    shards = {name: file_digest(path / FOLDER / name) for name in sorted(written)}
    if manifest != _manifest(step, file_digest(path / "state.pt"), shards):
        raise CheckpointError("a checksum does not match")
    # onto the CPU: the device that wrote it may not exist here, and the other processes of this machine have devices of their own
    state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    return step, marked(state, path) if shards else state


def _manifest(step: int, digest: str, shards: Mapping[str, str] = MappingProxyType({})) -> dict[str, Any]:
    """Return the content of manifest.json: the step, the checksums of the state and of the shards' files, and a checksum of all."""
    written = dict(sorted(shards.items()))
    check = hashlib.sha256(f"{step} {digest}{' ' + json.dumps(written) if written else ''}".encode()).hexdigest()
    return {"step": step, "sha256": digest, "check": check} | ({FOLDER: written} if written else {})
