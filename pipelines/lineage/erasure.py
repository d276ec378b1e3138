"""Find and delete every stored copy of a file's rows: in DVC's cache and remotes, in tables, journals, artifacts, and MLflow's
files, artifacts and traces.

Models are never deleted: the caller names those that were trained on the rows. The searched objects follow from the run cache: the file
itself, the tables that were made from it, journals and artifacts of every stage run that had such a table, or a model trained on it, as
input, and objects that no stage wrote, such as earlier versions of the file. Of these, exactly the objects that contain a row's text are
deleted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.data.files import read_file
from pipelines.data.sources import ACCEPTED
from pipelines.lineage.graph import Lineage, accepted_copies
from pipelines.lineage.objects import Objects
from pipelines.lineage.other_rows import REMAINING, keep_other_rows, other_rows, read_tables
from pipelines.lineage.quotes import Texts
from pipelines.lineage.records import Artifact, StageRecord
from pipelines.runtime.identity import file_digest
from pipelines.tracking.artifact_erasure import find_artifacts
from pipelines.tracking.erasure import find_traces
from posttrain.files import files_below

if TYPE_CHECKING:
    from pyarrow import Table

STATE = ("runs", "logs", "costs", "report.html", "served", "judges", "intake", "intake.json", "studies", "tune")
"""Parts of .posttrain that record rows. Not among them: fetched models and databases, whose bytes may hold a short text by chance."""
MADE = (
    *("data/tables", "data/valid", "data/quarantine", "runs", "report", "mlartifacts"),
    *(f".posttrain/{name}" for name in STATE),
    REMAINING.as_posix(),
)
"""Files and folders of files that the pipeline made: those that hold a text are deleted."""
KEPT = ("data/raw", "inbox", "labels")
"""Folders of people's own files: those that hold a text are only named."""
WEIGHTS = (".safetensors", ".pt", ".bin")
_SUFFIX = ".dir"
_SAFETENSORS = b'{"'
"""Bytes 8 and 9 of a file of weights."""


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
        artifacts: MLflow artifacts outside the project, such as a server's, as run/path.
        tables: versions of validated tables with the rows.
        models: models that were trained on them.
        unknown: ingest runs whose journals are lost, so that models behind them are not among these.
    """

    sha256: str
    accepted: tuple[Path, ...]
    objects: tuple[str, ...]
    files: tuple[Path, ...]
    elsewhere: tuple[Path, ...]
    others: tuple[Path, ...]
    traces: tuple[str, ...]
    artifacts: tuple[str, ...]
    tables: tuple[Artifact, ...]
    models: tuple[Artifact, ...]
    unknown: int


def plan(project: Path, lineage: Lineage, path: Path) -> Erasure:
    """Return what must be deleted so that no copy of the file's rows is left. Changes nothing.

    Raises:
        DataError: the file cannot be read, or it is neither accepted nor was it read by a recorded run.
    """
    digest = file_digest(path)
    accepted = accepted_copies(project, digest)
    read_from, stored = lineage.tables_with_file(digest, bool(accepted)), Objects(project, lineage.cache)
    texts = _texts(path, read_tables(project, stored))
    # a version that cache and remotes have lost is counted as one with the rows
    tables = [each for each in read_from if (data := stored.read(each.md5)) is None or texts.in_bytes(data)]
    candidates = {md5 for record in _touched(lineage, digest, tables) for md5 in _contents(stored, record)}
    candidates |= set(_unrecorded(lineage, stored)) - {
        _md5(each) for each in _files(project, KEPT) if each not in accepted
    }
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
        tuple(find_artifacts(project, texts.in_bytes)),
        tuple(tables),
        tuple(sorted(models)),
        len(lineage.without_journal()),
    )


def erase(project: Path, found: Erasure, lineage: Lineage, path: Path) -> None:
    """Delete files of the project and objects of the local cache. The other rows of deleted tables are kept for a later call."""
    tables = read_tables(project, Objects(project, lineage.cache))
    texts = _texts(path, tables)
    for each in found.files:
        each.unlink(missing_ok=True)
    keep_other_rows(project, tables, texts)
    for md5 in found.objects:
        stored = lineage.cache.file(md5)
        if stored is not None:
            stored.unlink()
    for each in found.accepted:
        each.unlink(missing_ok=True)


def _texts(path: Path, tables: Mapping[str, Table]) -> Texts:
    """Return the texts that only rows of the file hold."""
    mine = read_file(path)
    return Texts(mine, other_rows(tables.values(), mine))


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


def _unrecorded(lineage: Lineage, stored: Objects) -> Iterator[str]:
    """Yield the MD5 of objects that no stage here wrote: earlier versions of accepted files, and results of other machines.

    Those that only a remote holds are among them. The files of models are left out: a vocabulary holds many short texts.
    """
    names = stored.names()
    outputs = {output.md5 for record in lineage.records for output in record.outputs}
    known = {*outputs, *(md5 for folder in outputs if folder.endswith(_SUFFIX) for md5 in stored.listed(folder))}
    for folder in sorted(names - outputs):
        if folder.endswith(_SUFFIX):
            entries = stored.entries(folder)
            if any(name.endswith(WEIGHTS) for name in entries):
                known |= set(entries.values())
    for md5 in sorted(names - known):
        if not md5.endswith(_SUFFIX) and stored.begin(md5, 10)[8:] != _SAFETENSORS:
            yield md5


def _md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def _files(project: Path, folders: Sequence[str]) -> Iterator[Path]:
    """Yield the files of folders, without models, weights, secrets and links. The vocabulary of a tokenizer holds many short texts."""
    for folder in folders:
        root = project / folder
        for path in [root] if root.is_file() else files_below(root):
            left_out = {"secrets", "models"}.intersection(path.relative_to(project).parts)
            if path.is_file() and not path.is_symlink() and path.suffix not in WEIGHTS and not left_out:
                yield path
