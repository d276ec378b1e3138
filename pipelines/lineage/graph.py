"""Follow models back to their data, and data forward to the models that were trained on them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pipelines.data.sources import ACCEPTED
from pipelines.lineage.reads import trained_on
from pipelines.lineage.records import TABLES, Artifact, Cache, StageRecord, open_cache, read_records
from pipelines.runtime.identity import file_digest
from pipelines.runtime.journal import read
from posttrain.errors import DataError
from posttrain.files import files_below

INGEST_JOURNAL = "runs/ingest/journal.jsonl"
LEADS_ON = ("models/", "runs/reward_readers/artifacts/")
"""Starts of the paths of outputs that carry data on to the next stage: models, and records of the reward model."""
FORGOTTEN = Path(".posttrain/forgotten.jsonl")
"""Deleted tables and files by hash, and the models that had seen them: the run cache no longer knows after the deletion."""
ERASED = "read"
"""Kind of a record of FORGOTTEN: the files that a run of ingest read, whose journal was deleted."""
HELDOUT = {"preferences": ("preferences", "preferences_heldout")}
"""Validated tables that rows of one source may be in."""


class Lineage:
    """The records of one checkout as a graph."""

    def __init__(
        self, records: list[StageRecord], cache: Cache, erased: Mapping[str, dict[str, str]] | None = None
    ) -> None:
        """Connect records.

        Args:
            erased: the files that an ingest run read, by the MD5 of its journal, for journals that `posttrain forget` deleted.
        """
        self.records, self.cache = records, cache
        self._erased = erased or {}
        self._written = {record: list(_written(record, cache)) for record in records}
        self._used = {record: trained_on(record) for record in records}
        self._producers: dict[Artifact, list[StageRecord]] = {}
        for record, artifacts in self._written.items():
            for artifact in artifacts:
                self._producers.setdefault(artifact, []).append(record)

    @classmethod
    def read(cls, project: Path) -> Lineage:
        """Read the records of a checkout. Raises TrackingError if dvc.lock is damaged."""
        return cls(read_records(project), open_cache(project), _erased(project / FORGOTTEN))

    def producers(self, artifact: Artifact) -> list[StageRecord]:
        """Return the records that wrote exactly these bytes at this path; a table that did not change has one for each night."""
        return self._producers.get(artifact, [])

    def used(self, record: StageRecord) -> tuple[Artifact, ...]:
        """Return the inputs that can have changed the outputs of a stage run."""
        return self._used[record]

    def written(self, record: StageRecord) -> list[Artifact]:
        """Return the outputs of a stage and, for tables and records of readers, each file of the folder."""
        return self._written[record]

    def ancestors(self, artifact: Artifact) -> list[StageRecord]:
        """Return the records that led to an artifact, the nearest first, each once.

        If several records wrote an input, one that is already among the ancestors is preferred, so that one night's tables stay together.
        """
        found: dict[StageRecord, None] = {}
        waiting = [artifact]
        while waiting:
            producers = self.producers(waiting.pop(0))
            if producers and not found.keys() & producers:
                found[producers[0]] = None
                waiting += self._used[producers[0]]
        return list(found)

    def descendants(self, artifacts: Iterable[Artifact]) -> list[StageRecord]:
        """Return the records with one of the artifacts, or a model made from it, among their inputs, in the order of the stages."""
        reached, found = set(artifacts), dict[StageRecord, None]()
        while more := [r for r in self.records if r not in found and reached.intersection(self._used[r])]:
            found |= dict.fromkeys(more)
            reached |= {each for record in more for each in self.written(record) if each.path.startswith(LEADS_ON)}
        return list(found)

    def start(self, record: StageRecord) -> dict[str, Any]:
        """Return the first record of the run's journal: stage, arguments, inputs. It is empty if the journal is not in the cache."""
        return next(self._journal(record), {})

    def parameters(self, record: StageRecord) -> dict[str, Any]:
        """Return the parameters that the run read, by their dotted names; those of dvc.lock if its journal is not in the cache."""
        found = next((each for each in self._journal(record) if each["kind"] == "params"), None)
        return dict(record.params) if found is None else dict(found["values"])

    def _journal(self, record: StageRecord) -> Iterator[dict[str, Any]]:
        journal = record.journal()
        path = None if journal is None else self.cache.file(journal.md5)
        if path is not None:
            with path.open(encoding="utf-8") as file:
                yield from map(json.loads, file)

    def files(self, record: StageRecord) -> dict[str, str]:
        """Return the local files that an ingest run read, with their SHA-256; none if its journal is lost."""
        journal = record.journal()
        known = {} if journal is None else self._erased.get(journal.md5, {})
        return dict(self.start(record).get("inputs", known))

    def without_journal(self) -> list[StageRecord]:
        """Return the ingest runs of which it is not known which files they read: the cache has lost their journals."""
        return [
            each for each in self.records if each.stage == "ingest" and not self.start(each) and not self.files(each)
        ]

    def reads(self, sha256: str) -> list[StageRecord]:
        """Return the ingest runs that read a file."""
        return [each for each in self.records if each.stage == "ingest" and sha256 in self.files(each).values()]

    def tables_with_file(self, sha256: str, accepted: bool = False) -> list[Artifact]:
        """Return the versions of validated tables that hold rows of a file; none before validate has finished.

        Args:
            sha256: hash of the file.
            accepted: the file is in data/raw/accepted, so that it may be there before any ingest run has read it.

        Raises DataError if no ingest run read the file and it is not accepted, or if the cache has lost the validated tables.
        """
        reads = self.reads(sha256)
        if not reads and not accepted:
            raise DataError(
                "no recorded run read a file with these bytes, and data/raw/accepted does not hold them; type"
                " `dvc pull --run-cache` to fetch the records of other machines."
            )
        validated = [(ingest, validate) for ingest in reads for validate in self._validated(ingest)]
        found = dict.fromkeys(table for pair in validated for table in self._tables_with_file(sha256, *pair))
        if validated and not found:
            raise DataError(
                "validate has finished on this file, but DVC's cache does not know its tables any more; type"
                " `dvc pull --run-cache` to fetch them."
            )
        return list(found)

    def versions(self, table: str) -> list[Artifact]:
        """Return all versions of one validated table."""
        path = f"data/valid/{table}.parquet"
        written = [each for record in self.records for each in self._written[record] if each.path == path]
        return list(dict.fromkeys(written))

    def _validated(self, ingest: StageRecord) -> list[StageRecord]:
        """Return the validate runs that finished on the tables of an ingest run."""
        tables = ingest.output("data/tables")
        return [each for each in self.records if each.stage == "validate" and tables in each.inputs]

    def _tables_with_file(self, sha256: str, ingest: StageRecord, validate: StageRecord) -> Iterator[Artifact]:
        names = [name for name, digest in self.files(ingest).items() if digest == sha256]
        kinds = {kind for name in names for kind in _kinds(name, ingest)}
        yield from (each for each in self._written[validate] if _table(each.path) in kinds)


def _erased(path: Path) -> dict[str, dict[str, str]]:
    """Return the files that ingest runs read, by the MD5 of their journals, of which `posttrain forget` deleted those."""
    return (
        {each["journal"]: dict(each["inputs"]) for each in read(path) if each["kind"] == ERASED}
        if path.is_file()
        else {}
    )


def accepted_copies(project: Path, sha256: str) -> list[Path]:
    """Return the files of data/raw/accepted with these bytes."""
    return [each for each in files_below(project / ACCEPTED) if not each.is_symlink() and file_digest(each) == sha256]


def _written(record: StageRecord, cache: Cache) -> Iterator[Artifact]:
    for output in record.outputs:
        yield output
        if output.path in TABLES:
            yield from cache.listing(output) or ()


def _table(path: str) -> str:
    """Return the name of a validated table, or nothing."""
    return Path(path).stem if path.startswith("data/valid/") else ""


def _kinds(name: str, ingest: StageRecord) -> Iterator[str]:
    """Yield the validated tables that a source file goes into."""
    parts = Path(name).parts
    accepted = [parts[3]] if parts[:3] == ("data", "raw", "accepted") and len(parts) > 3 else []
    data = ingest.params.get("data") or {}
    named = [kind for kind, section in data.items() if isinstance(section, dict) and _names(section, name)]
    for kind in accepted or named:
        yield from HELDOUT.get(kind, (kind,))


def _names(section: dict[str, Any], name: str) -> bool:
    """Return True if a table's source is the file, or a folder or pattern that the file is in."""
    sources = section.get("source")
    for source in [sources] if isinstance(sources, str) else sources or ():
        if Path(name) == Path(source) or Path(source) in Path(name).parents or Path(name).match(str(source)):
            return True
    return False
