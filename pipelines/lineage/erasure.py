"""Find and delete every stored copy of a file's rows: in DVC's cache and remotes, in tables, journals, artifacts, and MLflow's
files and traces.

Models are never deleted: the caller names those that were trained on the rows. The searched objects follow from the run cache: the file
itself, the tables that were made from it, journals and artifacts of every stage run that had such a table, or a model trained on it, as
input, and objects that no stage wrote, such as earlier versions of the file. Of these, exactly the objects that contain a row's text are
deleted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.data.files import read_file
from pipelines.data.sources import ACCEPTED
from pipelines.lineage.graph import Lineage, accepted_copies
from pipelines.lineage.objects import Objects
from pipelines.lineage.quotes import Texts, strings
from pipelines.lineage.records import Artifact, StageRecord
from pipelines.runtime.identity import file_digest
from pipelines.tracking.erasure import find_traces
from posttrain.files import files_below

STATE = ("runs", "logs", "costs", "report.html", "served", "judges", "intake", "intake.json", "studies", "tune")
"""Parts of .posttrain that record rows. Not among them: fetched models and databases, whose bytes may hold a short text by chance."""
MADE = (
    *("data/tables", "data/valid", "data/quarantine", "runs", "report", "mlartifacts"),
    *(f".posttrain/{name}" for name in STATE),
)
"""Files and folders of files that the pipeline made: those that hold a text are deleted."""
KEPT = ("data/raw", "inbox", "labels")
"""Folders of people's own files: those that hold a text are only named."""
WEIGHTS = (".safetensors", ".pt", ".bin")
_SUFFIX = ".dir"


@dataclass(frozen=True)
class Erasure:
    """Everything that `posttrain forget` deletes, and the models that must be trained again.

    Attributes:
        accepted: files of data/raw/accepted with the same bytes.
        objects: MD5 of each object of DVC's cache and remotes.
        files: files of the project that the pipeline made.
        elsewhere: people's own files with texts of the rows, which are kept.
        others: other files of data/raw/accepted with texts of the rows, which are kept.
        traces: MLflow traces, as experiment/trace.
        tables: versions of validated tables with the rows.
        models: models that were trained on them.
    """

    sha256: str
    accepted: tuple[Path, ...]
    objects: tuple[str, ...]
    files: tuple[Path, ...]
    elsewhere: tuple[Path, ...]
    others: tuple[Path, ...]
    traces: tuple[str, ...]
    tables: tuple[Artifact, ...]
    models: tuple[Artifact, ...]


def plan(project: Path, lineage: Lineage, path: Path) -> Erasure:
    """Return what must be deleted so that no copy of the file's rows is left. Changes nothing.

    Raises:
        DataError: the file cannot be read, or it is neither accepted nor was it read by a recorded run.
    """
    digest = file_digest(path)
    accepted = accepted_copies(project, digest)
    read_from, mine = lineage.tables_with_file(digest, bool(accepted)), read_file(path)
    texts, stored = Texts(mine, _other_rows(project, mine)), Objects(project, lineage.cache)
    # a version that cache and remotes have lost is counted as one with the rows
    tables = [each for each in read_from if (data := stored.read(each.md5)) is None or texts.in_bytes(data)]
    candidates = {md5 for record in _touched(lineage, digest, tables) for md5 in _contents(stored, record)}
    candidates |= set(_unrecorded(lineage)) - {_md5(each) for each in _files(project, KEPT) if each not in accepted}
    objects = {md5 for md5 in candidates if (data := stored.read(md5)) is not None and texts.in_bytes(data)}
    records = lineage.descendants(tables)
    models = {each for record in records for each in record.outputs if each.path.startswith("models/")}
    kept = [each for each in _files(project, KEPT) if each not in accepted and texts.in_file(each)]
    others = [each for each in kept if each.is_relative_to(project / ACCEPTED)]
    return Erasure(
        digest,
        tuple(accepted),
        tuple(sorted(objects | {_md5(path)})),
        tuple(each for each in _files(project, MADE) if texts.in_file(each)),
        tuple(each for each in kept if each not in others),
        tuple(others),
        tuple(find_traces(project, texts.in_text)),
        tuple(tables),
        tuple(sorted(models)),
    )


def erase(found: Erasure, lineage: Lineage) -> None:
    """Delete files of the project and objects of the local cache."""
    for path in (*found.accepted, *found.files):
        path.unlink(missing_ok=True)
    for md5 in found.objects:
        stored = lineage.cache.file(md5)
        if stored is not None:
            stored.unlink()


def _touched(lineage: Lineage, digest: str, tables: Iterable[Artifact]) -> Iterator[StageRecord]:
    """Yield the stage runs whose outputs may quote the rows: those that read the file, its tables, or models trained on them."""
    reached, pending = set[str](), lineage.reads(digest)
    wanted = {each.md5 for each in tables}
    found: dict[StageRecord, None] = {}
    while pending:
        for record in pending:
            found[record] = None
            reached |= {each.md5 for each in lineage.written(record)}
        pending = [
            record
            for record in lineage.records
            if record not in found and any(each.md5 in reached or each.md5 in wanted for each in record.inputs)
        ]
    yield from found


def _contents(stored: Objects, record: StageRecord) -> Iterator[str]:
    """Yield the MD5 of every file that a stage run wrote, without weights."""
    for output in record.outputs:
        if output.path.startswith("models/"):
            continue
        if not output.md5.endswith(_SUFFIX):
            yield output.md5
        else:
            yield from stored.listed(output.md5)


def _unrecorded(lineage: Lineage) -> Iterator[str]:
    """Yield the MD5 of objects that no stage wrote, such as earlier versions of accepted files, without weights."""
    outputs = {output for record in lineage.records for output in record.outputs}
    known = {output.md5 for output in outputs}
    known |= {
        each.md5 for output in outputs if output.md5.endswith(_SUFFIX) for each in lineage.cache.listing(output) or ()
    }
    root = lineage.cache.folder / "files" / "md5"
    for path in files_below(root):
        md5 = path.parent.name + path.name
        if path.is_file() and not md5.endswith(_SUFFIX) and md5 not in known and not _is_safetensors(path):
            yield md5


def _is_safetensors(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(10)[8:] == b'{"'


def _md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def _other_rows(project: Path, mine: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of the present tables that are not of the file."""
    import pyarrow.parquet as pq

    own = [set(strings(record)) for record in mine]
    found = []
    for path in sorted((project / "data/tables").glob("*.parquet")):
        for row in pq.ParquetFile(path).read().to_pylist():
            texts = set(strings(row))
            if not any(texts <= each for each in own):
                found.append(row)
    return found


def _files(project: Path, folders: Sequence[str]) -> Iterator[Path]:
    """Yield the files of folders, without models, weights, secrets and links. The vocabulary of a tokenizer holds many short texts."""
    for folder in folders:
        root = project / folder
        for path in [root] if root.is_file() else files_below(root):
            left_out = {"secrets", "models"}.intersection(path.relative_to(project).parts)
            if path.is_file() and not path.is_symlink() and path.suffix not in WEIGHTS and not left_out:
                yield path
