"""Take new files of the inbox in, each checked on its own: good ones join the data, bad ones are set aside with the reason.

    python -m pipelines.commands.intake

A file INBOX/TABLE/NAME (TABLE: sft, preferences, problems or evaluation) is read, shaped and checked by the rules of
params.yaml's `validation` as the step `validate` will check it. One that would stop the pipeline (it cannot be read, lacks a
column, shares prompts with held-out data …) goes to INBOX/quarantined with its reason beside it; the others go to
data/raw/accepted and are read by `ingest` from now on. Single bad rows are left to `validate`, which sets them aside.

Killed in the middle, the next call goes on: a file leaves the inbox only after it stands where it belongs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.config.params import Params, load_params
from pipelines.data.inbox import Arrival, Inbox, location
from pipelines.data.sources import ACCEPTED, accepted_files, alike, arrival_number, file_rows, numbered, table_rows
from pipelines.runtime import environment
from pipelines.runtime.identity import file_digest
from pipelines.runtime.redaction import redact, report_error
from posttrain.environments.parts import KINDS, Kind
from posttrain.errors import DataError, PosttrainError

if TYPE_CHECKING:
    from pipelines.commands.admission import Admission
    from pipelines.data.tables import Row

RECORD = Path(".posttrain/intake.json")
_WORK = Path(".posttrain/intake")
_NAME_LENGTH = 80


@dataclass(frozen=True)
class Taken:
    """One file that was dealt with. `outcome`: accepted, known (the same bytes were taken in before) or quarantined."""

    file: str
    outcome: str
    table: str = ""
    rows: int = 0
    set_aside: int = 0
    """Rows that `validate` is going to set aside."""
    reason: str = ""

    def describe(self) -> str:
        if self.outcome == "accepted":
            aside = f", {self.set_aside} of them to be set aside" if self.set_aside else ""
            return f"accepted {self.file}: {self.rows} rows for {self.table}{aside}"
        if self.outcome == "known":
            return f"known already {self.file}: the same bytes were taken in before"
        return f"quarantined {self.file}: {self.reason}"


def take_in(params: Params, inbox: Inbox) -> list[Taken]:
    """Deal with every file that waits, in the order of their names."""
    arrivals = inbox.arrivals()
    if not arrivals:
        return []
    from pipelines.commands.admission import Admission

    admission = Admission(params, {kind: table_rows(kind, params.data) for kind in KINDS})
    return [_take(arrival, params, inbox, admission) for arrival in arrivals]


def _take(arrival: Arrival, params: Params, inbox: Inbox, admission: Admission) -> Taken:
    local = _WORK / arrival.file
    inbox.fetch(arrival, local)
    try:
        kind = _kind(arrival)
        if file_digest(local) in {file_digest(path) for path in accepted_files(kind)}:
            inbox.remove(arrival)
            return Taken(arrival.name, "known", kind)
        rows = _rows(kind, params, local, admission)
        aside = admission.check(kind, rows)
    except PosttrainError as error:
        reason = redact(str(error).replace(str(local), arrival.file))
        inbox.quarantine(arrival, reason)
        local.unlink()
        return Taken(arrival.name, "quarantined", reason=reason)
    _keep(local, kind, arrival.file)
    inbox.remove(arrival)
    admission.admit(kind, rows)
    return Taken(arrival.name, "accepted", kind, len(rows), aside)


def _kind(arrival: Arrival) -> Kind:
    for kind in KINDS:
        if arrival.folder == kind:
            return kind
    raise DataError(
        f"{arrival.name}: the folder says which table a file is for: {', '.join(KINDS)};"
        f" e.g. preferences/{arrival.file}"
    )


def _rows(kind: Kind, params: Params, path: Path, admission: Admission) -> list[Row]:
    return numbered(alike(kind, admission.rows[kind], file_rows(kind, params.data, path), path))


def _keep(local: Path, kind: Kind, name: str) -> None:
    """Into data/raw/accepted under the next number, so that files are read in the order in which they came."""
    folder = ACCEPTED / kind
    folder.mkdir(parents=True, exist_ok=True)
    last = max((arrival_number(path) for path in accepted_files(kind)), default=0)
    stem, suffix = os.path.splitext(name)
    safe = re.sub(r"[^\w.-]+", "_", stem)[:_NAME_LENGTH] or hashlib.sha256(stem.encode()).hexdigest()[:12]
    with local.open("rb") as file:
        os.fsync(file.fileno())
    local.replace(folder / f"{last + 1:04d}-{safe}{suffix.lower()}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.commands.intake",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--inbox", help="folder or s3://BUCKET/PREFIX (default: POSTTRAIN_INBOX, else ./inbox)")
    args = parser.parse_args(argv)
    environment.quiet()
    project = environment.root()
    os.chdir(project)
    try:
        inbox = Inbox(args.inbox or location(project))
        taken = take_in(load_params(project / "params.yaml"), inbox)
    except PosttrainError as error:
        return report_error(error)
    RECORD.parent.mkdir(exist_ok=True)
    RECORD.write_text(json.dumps([asdict(entry) for entry in taken], indent=1) + "\n", encoding="utf-8")
    for entry in taken:
        print(f"intake: {entry.describe()}", flush=True)
    if not taken:
        print(f"intake: nothing waits in {redact(inbox.where)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
