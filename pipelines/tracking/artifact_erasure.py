"""Find and delete MLflow artifacts that quote given texts, if MLflow keeps them outside the project: on a server, or in a bucket."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from pipelines.tracking.erasure import FAILS, experiments, local_database
from pipelines.tracking.store import artifact_root, ask, open_client
from posttrain.errors import TrackingError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.store.artifact.artifact_repo import ArtifactRepository

_ADVICE = "Nothing local was deleted. Correct it and run again."


def find_artifacts(project: Path, quotes: Callable[[bytes], bool]) -> list[str]:
    """Return `run/path` of each artifact outside the project with bytes for which `quotes` is true.

    The runs are those of the experiments that `find_traces` searches, with deleted ones: MLflow keeps their artifacts until `mlflow gc`.
    Raises TrackingError if the store does not answer.
    """
    database = local_database(project)
    if database is not None and not database.is_file():
        return []
    client = open_client(project)
    return ask(client, partial(_find, client, project, quotes), "cannot be searched for artifacts", FAILS[1])


def erase_artifacts(project: Path, artifacts: Sequence[str]) -> None:
    """Delete artifacts. Raises TrackingError if the store does not answer, or still lists one of them afterwards."""
    if not artifacts:
        return
    client = open_client(project)
    ask(client, partial(_erase, client, artifacts), "cannot delete artifacts", _ADVICE)


def _find(client: MlflowClient, project: Path, quotes: Callable[[bytes], bool]) -> list[str]:
    found = []
    here = artifact_root(project).as_uri()
    for run_id, address in _runs(client, list(experiments(client, project))):
        if address.startswith(here):
            continue  # files of the project, which are searched as such
        repository = _repository(client, address)
        found += [f"{run_id}/{path}" for path in _paths(repository) if quotes(_content(repository, path))]
    return sorted(found)


def _erase(client: MlflowClient, artifacts: Sequence[str]) -> None:
    pairs = sorted(each.split("/", 1) for each in artifacts)
    for run_id, group in groupby(pairs, lambda pair: pair[0]):
        repository = _repository(client, str(client.get_run(run_id).info.artifact_uri))
        paths = [path for _, path in group]
        for path in paths:
            repository.delete_artifacts(path)
        if left := set(paths) & set(_paths(repository)):
            raise TrackingError(
                f"MLflow's store of artifacts has kept {len(left)} of {len(paths)} files of run {run_id} (first: {min(left)}), so the rows"
                " are still there. Delete them with the store's own tools, then run again."
            )


def _runs(client: MlflowClient, ids: list[str]) -> Iterator[tuple[str, str]]:
    """Yield id and artifact address of each run of experiments."""
    from mlflow.entities import ViewType

    token = None
    while ids:
        page = client.search_runs(ids, run_view_type=ViewType.ALL, max_results=1000, page_token=token)
        yield from ((str(run.info.run_id), str(run.info.artifact_uri)) for run in page)
        token = page.token
        if not token:
            return


def _repository(client: MlflowClient, address: str) -> ArtifactRepository:
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    return get_artifact_repository(address, tracking_uri=client.tracking_uri)


def _paths(repository: ArtifactRepository, folder: str | None = None) -> Iterator[str]:
    """Yield the paths of all files below a folder."""
    for entry in repository.list_artifacts(folder):
        if entry.is_dir:
            yield from _paths(repository, entry.path)
        else:
            yield str(entry.path)


def _content(repository: ArtifactRepository, path: str) -> bytes:
    with TemporaryDirectory(prefix="posttrain-") as folder:
        repository.download_artifacts(path, folder)
        return Path(folder, *PurePosixPath(path).parts).read_bytes()
