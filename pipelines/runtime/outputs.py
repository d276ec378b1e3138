"""Record the files that a step writes: artifacts, figures and a model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.runtime.identity import folder_digests, joined_digest
from pipelines.runtime.journal import Journal
from pipelines.runtime.publish import ARTIFACTS
from posttrain.errors import TrackingError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "config.json")


class RunOutputs:
    """Record the files of a run in its journal. `records` is False in processes that do not record."""

    def __init__(self, journal: Journal, folder: Path, *, records: bool) -> None:
        self._journal, self._folder, self.records = journal, folder, records

    def artifact(self, name: str) -> Path:
        """Record an artifact and return its path under artifacts/; the step must write it before it ends."""
        path = artifact_path(self._folder, name)
        self._journal.append({"kind": "artifact", "path": path.relative_to(self._folder).as_posix()})
        return path

    def figure(self, name: str, figure: Figure) -> Path:
        """Write a matplotlib figure to artifacts/{name}.png, without library version and date in its metadata."""
        path = self.artifact(f"{name}.png")
        figure.savefig(path, format="png", dpi=120, metadata={"Software": None})
        return path

    def model(self, path: str | Path) -> None:
        """Record a written model folder by its path and the sha256 of its weights; DVC stores the bytes."""
        folder = Path(path)
        files = sorted({file for pattern in _WEIGHTS for file in folder.glob(pattern)})
        if not any(file.suffix == ".safetensors" for file in files):
            raise TrackingError(
                f"{folder}: holds no .safetensors file, so there are no weights to record. Save the model there first."
            )
        every = folder_digests(folder)
        weights = {file.name: every[file.name] for file in files}
        digest = hashlib.sha256(json.dumps(weights, sort_keys=True).encode()).hexdigest()
        record = {"kind": "model", "path": folder.as_posix(), "files": weights, "sha256": digest}
        # The same digest that a later step records for this folder as its input.
        self._journal.append(record | {"content": joined_digest(every)})


def artifact_path(folder: Path, name: str) -> Path:
    """Return artifacts/{name} in a run's folder, and create its parent. Raises TrackingError if the name leads outside."""
    if ".." in Path(name).parts or Path(name).is_absolute():
        raise TrackingError(f"artifact {name!r}: must be a name inside artifacts/, without '..'")
    path = folder / ARTIFACTS / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
