"""The models that a server answers with. The champion is replaced when a promotion has put other weights into production."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipelines.config.yaml_files import read_yaml
from pipelines.promotion.named import PRODUCTION
from pipelines.promotion.registry import CHAMPION
from pipelines.runtime.redaction import printable, redact
from pipelines.serving.batching import Batcher, Job
from pipelines.tracking.content import folder_md5
from posttrain.api import load
from posttrain.errors import DataError, PosttrainError
from posttrain.text import nearest

POINTER = Path("champion.dvc")
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Served:
    """A loaded model. `version` is the registry's number, or nothing if the registry does not know the weights."""

    name: str
    md5: str
    version: str
    batcher: Batcher

    @property
    def fingerprint(self) -> str:
        """Return version and weights, e.g. `version 3, md5 0a1b….dir`, for every answer."""
        return f"version {self.version}, md5 {self.md5}" if self.version else f"md5 {self.md5}"


class Models:
    """The served models by name; safe for several threads."""

    def __init__(self, served: Mapping[str, Served]) -> None:
        self._served = dict(served)
        self._lock = threading.Lock()

    def all(self) -> list[Served]:
        with self._lock:
            return list(self._served.values())

    def has(self, name: str) -> bool:
        """Return True if a model of that name is served. Models are replaced, and never removed."""
        with self._lock:
            return name in self._served

    def missing(self, name: str) -> str:
        """Return a sentence about a model that is not served, with the nearest name."""
        return f"the model {name[:200]!r} is not served here{nearest(name[:200], self._served)}"

    def get(self, name: str) -> Served:
        """Return the model of that name. Raises DataError if it is not served here."""
        with self._lock:
            found = self._served.get(name)
        if found is None:
            raise DataError(self.missing(name))
        return found

    def submit(self, name: str, make: Callable[[Served], Job]) -> tuple[Served, Job]:
        """Give a job to the present model of that name, and return both. `make` is called again if the model is replaced meanwhile."""
        while True:
            served = self.get(name)
            job = make(served)
            if served.batcher.submit(job):
                return served, job

    def replace(self, served: Served) -> None:
        """Answer new requests with this model; the one before finishes its own."""
        with self._lock:
            before = self._served.get(served.name)
            self._served[served.name] = served
        if before is not None:
            before.batcher.retire()

    def close(self) -> None:
        """Answer the requests that wait, and end."""
        for served in self.all():
            served.batcher.retire()
        for served in self.all():
            served.batcher.join()


def serve_folder(name: str, folder: Path, md5: str, version: str = "") -> Served:
    """Load a model folder. Raises ModelError if it cannot be used."""
    return Served(name, md5, version, Batcher(load(folder)))


def production_md5(project: Path) -> str:
    """Return the hash of the weights that champion.dvc names. Raises DataError if there is no champion, or the file is damaged."""
    path = project / POINTER
    if not path.is_file():
        raise DataError("there is no champion yet: `make retrain` asks the gate for one, or name a model such as dpo-0")
    try:
        return str(read_yaml(path)["outs"][0]["md5"])
    except (PosttrainError, KeyError, IndexError, TypeError) as error:
        raise DataError(f"{path} is damaged; `git checkout {POINTER}`, or promote a version again") from error


def load_champion(project: Path, version: Callable[[str], str]) -> Served | None:
    """Load the weights in production. Return None while a promotion is changing the folder.

    The folder's hash is compared with champion.dvc's, and its files must be the same before and after loading.

    Args:
        version: returns the registry's number of weights by their hash.
    """
    md5, folder = production_md5(project), project / PRODUCTION
    before = _files(folder)
    if not before or folder_md5(folder) != md5:
        return None
    served = serve_folder(CHAMPION, folder, md5, version(md5))
    if _files(folder) == before and production_md5(project) == md5:
        return served
    served.batcher.retire()
    return None


class Watch:
    """A thread that replaces the champion when champion.dvc names other weights. Errors are reported, and tried again."""

    def __init__(self, project: Path, models: Models, version: Callable[[str], str]) -> None:
        self._project, self._models, self._version = project, models, version
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="champion", daemon=True)
        self._said = ""

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            try:
                self._look()
            except (PosttrainError, OSError) as error:
                if str(error) != self._said:
                    self._said = str(error)
                    print(
                        f"serve: the champion before stays: {printable(redact(self._said))}",
                        file=sys.stderr,
                        flush=True,
                    )

    def _look(self) -> None:
        if production_md5(self._project) == self._models.get(CHAMPION).md5:
            return
        served = load_champion(self._project, self._version)
        if served is not None:
            self._models.replace(served)
            print(f"serve: the champion is now {served.fingerprint}", flush=True)


def _files(folder: Path) -> list[tuple[str, int, int, int]]:
    """Return name, inode, size and time of every file: they change if the folder is replaced or written to."""
    found = [(path, path.stat()) for path in sorted(folder.rglob("*")) if path.is_file()]
    return [(str(path), stat.st_ino, stat.st_size, stat.st_mtime_ns) for path, stat in found]
