"""Find and delete every stored copy of a file's rows: in DVC's cache and remotes, in tables, journals, artifacts, and MLflow's
files and traces.

Models are never deleted: the caller names those that were trained on the rows. Which objects are looked at follows from the run cache:
the file itself, the tables that were made from it, and journals and artifacts of every stage run that had such a table, or a model trained
on it, as input. Of these, exactly the objects that contain a row's text are deleted.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.data.files import read_file
from pipelines.lineage.graph import Lineage
from pipelines.lineage.records import Artifact, StageRecord
from pipelines.runtime.identity import file_digest
from pipelines.tracking.erasure import find_traces
from posttrain.errors import DataError
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
SHORTEST = 4
"""Shorter texts are in many unrelated files, so that a file without longer ones could not be distinguished from others."""
_SUFFIX = ".dir"
ROLLOUTS = {"prompt", "completion", "prompt_ids", "response_ids"}
"""Columns by which a table of rollouts is known."""


@dataclass(frozen=True)
class Erasure:
    """Everything that `posttrain forget` deletes, and the models that must be trained again.

    Attributes:
        accepted: files of data/raw/accepted with the same bytes.
        objects: MD5 of each object of DVC's cache and remotes.
        files: files of the project that the pipeline made.
        elsewhere: people's own files with texts of the rows, which are kept.
        traces: MLflow traces, as experiment/trace.
        tables: versions of validated tables with the rows.
        models: models that were trained on them.
    """

    sha256: str
    accepted: tuple[Path, ...]
    objects: tuple[str, ...]
    files: tuple[Path, ...]
    elsewhere: tuple[Path, ...]
    traces: tuple[str, ...]
    tables: tuple[Artifact, ...]
    models: tuple[Artifact, ...]


class Texts:
    """The texts of a file's rows, as bytes in every form in which a file may hold them."""

    def __init__(self, records: Sequence[Any], others: Sequence[Any] = ()) -> None:
        """Take the texts of `records` that are in none of the `others`.

        Raises DataError if there is no text of four characters or more by which a copy could be recognised.
        """
        shared = set(_strings(list(others)))
        found = {text for text in _strings(list(records)) if len(text) >= SHORTEST and text not in shared}
        if not found:
            raise DataError(
                f"every text of the file is in other rows too, or is shorter than {SHORTEST} characters, so copies of its rows cannot be"
                " distinguished from theirs. Remove the file from data/raw/accepted, and run `dvc add data/raw/accepted` and `dvc repro`."
            )
        self._forms = tuple(sorted({form for text in found for form in _forms(text)}))
        self._plain = found

    def in_file(self, path: Path) -> bool:
        """Return True if a file holds one of the texts; Parquet files are decoded."""
        if _is_parquet(path):
            return self._in_table(path)
        data = path.read_bytes()
        return any(form in data for form in self._forms)

    def in_text(self, text: str) -> bool:
        """Return True if a text holds one of the texts."""
        data = text.encode("utf-8", "surrogatepass")
        return any(form in data for form in self._forms)

    def _in_table(self, path: Path) -> bool:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            table = pq.ParquetFile(path).read()
        except (pa.ArrowException, OSError):
            return True  # it cannot be shown to be free of the texts
        if set(table.column_names) >= ROLLOUTS:
            # a prompt is there as one text, whose messages and template surround the row's own
            texts = table.select(["prompt", "completion"]).to_pylist()
            return self.in_text("\0".join(text for row in texts for text in _strings(row)))
        return any(text in self._plain for row in table.to_pylist() for text in _strings(row))


def plan(project: Path, lineage: Lineage, path: Path) -> Erasure:
    """Return what must be deleted so that no copy of the file's rows is left. Changes nothing.

    Raises:
        DataError: the file cannot be read, or no recorded run read it.
    """
    digest = file_digest(path)
    read_from, mine = lineage.tables_with_file(digest), read_file(path)
    texts = Texts(mine, _other_rows(project, mine))
    # a version that the cache has lost is counted as one with the rows
    tables = [each for each in read_from if not (stored := lineage.cache.file(each.md5)) or texts.in_file(stored)]
    accepted = [each for each in _files(project, ("data/raw/accepted",)) if file_digest(each) == digest]
    candidates = {md5 for record in _touched(lineage, digest, tables) for md5 in _contents(lineage, record)}
    objects = {md5 for md5 in candidates if (stored := lineage.cache.file(md5)) and texts.in_file(stored)}
    records = lineage.descendants(tables)
    models = {each for record in records for each in record.outputs if each.path.startswith("models/")}
    return Erasure(
        digest,
        tuple(accepted),
        tuple(sorted(objects | set(_copies(lineage, digest)))),
        tuple(each for each in _files(project, MADE) if texts.in_file(each)),
        tuple(each for each in _files(project, KEPT) if each not in accepted and texts.in_file(each)),
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


def erase_remotely(project: Path, objects: Sequence[str]) -> list[str]:
    """Delete objects from every remote of DVC, and return the remotes' names. Raises DataError if one cannot be changed."""
    from botocore.exceptions import BotoCoreError, ClientError
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    names = []
    with Repo(str(project)) as repo:
        for name in sorted(repo.config["remote"]):
            try:
                store = repo.cloud.get_remote_odb(name, "forget")
                for md5 in objects:
                    if store.exists(md5):
                        store.delete(md5)
            except (DvcException, OSError, ImportError, BotoCoreError, ClientError) as error:
                raise DataError(
                    f"the remote {name} may still hold the rows: {error}. Nothing local was deleted; correct the remote and run again."
                ) from error
            names.append(name)
    return names


def _touched(lineage: Lineage, digest: str, tables: Iterable[Artifact]) -> Iterator[StageRecord]:
    """Yield the stage runs whose outputs may quote the rows: those that read the file, its tables, or models trained on them."""
    reached, pending = set[str](), list[StageRecord]()
    for record in lineage.records:
        if record.stage == "ingest" and digest in lineage.files(record).values():
            pending.append(record)
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


def _contents(lineage: Lineage, record: StageRecord) -> Iterator[str]:
    """Yield the MD5 of every file that a stage run wrote, without weights."""
    for output in record.outputs:
        if output.path.startswith("models/"):
            continue
        if not output.md5.endswith(_SUFFIX):
            yield output.md5
        else:
            yield from (each.md5 for each in lineage.cache.listing(output) or ())


def _copies(lineage: Lineage, digest: str) -> Iterator[str]:
    """Yield the MD5 of objects of the cache with the file's bytes."""
    for path in files_below(lineage.cache.folder / "files" / "md5"):
        if path.is_file() and not path.name.endswith(_SUFFIX) and file_digest(path) == digest:
            yield path.parent.name + path.name


def _other_rows(project: Path, mine: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of the present tables that are not of the file."""
    import pyarrow.parquet as pq

    own = [set(_strings(record)) for record in mine]
    found = []
    for path in sorted((project / "data/tables").glob("*.parquet")):
        for row in pq.ParquetFile(path).read().to_pylist():
            texts = set(_strings(row))
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


def _is_parquet(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PAR1"


def _strings(value: Any) -> Iterator[str]:
    """Yield every string inside a JSON-like value, without the roles of messages."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            if key not in ("role", "labelled", "annotator", "time"):
                yield from _strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _strings(inner)


def _forms(text: str) -> Iterator[bytes]:
    """Yield a text as it is, as in JSON, and as in HTML."""
    in_json = (json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1])
    for form in (text, *in_json, html.escape(text), html.escape(text, quote=False)):
        yield form.encode("utf-8", "surrogatepass")
