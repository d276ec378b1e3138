"""Take new files of the inbox in, each checked on its own: good ones join the data, bad ones are set aside with the reason.

    posttrain intake

A file INBOX/TABLE/NAME (TABLE: sft, preferences, problems or evaluation) is read, shaped and checked by the rules of
params.yaml's `validation` as the step `validate` will check it. One that would stop the pipeline (it cannot be read, lacks a
column, shares prompts with held-out data …) goes to INBOX/quarantined with its reason beside it; the others go to
data/raw/accepted and are read by `ingest` from now on. Single bad rows are left to `validate`, which sets them aside.

An entry that is still being written, or that is a link or a pipe, stays where it is and is reported.

Killed in the middle, the next call goes on: a file leaves the inbox only after it is in its place.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.config.params import Params, load_params
from pipelines.data.bounds import memory_for, refuse_too_large, refuse_too_many
from pipelines.data.compression import kind_and_compression
from pipelines.data.files import is_readable
from pipelines.data.inbox import Arrival, Inbox, location
from pipelines.data.inbox_folder import open_inbox
from pipelines.data.packed import PackedRows, packed
from pipelines.data.size_limit import limit_megabytes, limit_seconds
from pipelines.data.sources import ACCEPTED, accepted_files, alike, arrival_number, file_rows, numbered, table_rows
from pipelines.runtime import environment
from pipelines.runtime.command_line import command_parser, reports_errors
from pipelines.runtime.identity import file_digest
from pipelines.runtime.process import Lock
from pipelines.runtime.redaction import printable, redact
from pipelines.tracking.lockfile import read_dvc_config
from posttrain.data.limits import bounded
from posttrain.environments.parts import KINDS, Kind
from posttrain.errors import DataError, PosttrainError
from posttrain.files import replace, write_atomic

if TYPE_CHECKING:
    from pipelines.commands.admission import Admission

RECORD = Path(".posttrain/intake.json")
LOCK = Path(".posttrain/intake.lock")
"""Held by the one process of a project that takes files in: all use the same folder of work, and number the accepted files."""
_WORK = Path(".posttrain/intake")
_NAME_BYTES = 160
"""Longest name of an accepted file without its number and its ending; a file system allows 255 bytes for all."""
MOST_ATTEMPTS = 2
_ANY_SIZE = 2**62
"""Bytes: no bound of memory."""


@dataclass(frozen=True)
class IntakeResult:
    """One file that was dealt with. `outcome`: accepted, known (the same rows were taken in before), quarantined, or left (waits)."""

    file: str
    outcome: str
    table: str = ""
    rows: int = 0
    set_aside: int = 0
    """Rows that `validate` is going to set aside."""
    reason: str = ""

    def describe(self) -> str:
        """Return the result in one line."""
        if self.outcome == "accepted":
            aside = f", {self.set_aside} of them to be set aside" if self.set_aside else ""
            return f"accepted {self.file}: {self.rows} rows for {self.table}{aside}"
        if self.outcome == "known":
            return f"known already {self.file}: the same rows were taken in before"
        if self.outcome == "left":
            return f"left {self.file}: {self.reason}"
        return f"quarantined {self.file}: {self.reason}"


def take_in(params: Params, inbox: Inbox) -> list[IntakeResult]:
    """Deal with every file that waits, in the order of their names. An entry that cannot be taken never stops the others."""
    limit_megabytes(), limit_seconds()  # a wrong setting stops here, and is no fault of a file
    with _only_process(), inbox.exclusive() as held:
        arrivals = inbox.arrivals()  # not before: a process that had the lock may have taken some of them
        if held and not all(arrival.left for arrival in arrivals):
            return _take_all(arrivals, params, inbox)
    reason = "a process of a different project is checking this inbox; the next run takes it"
    return [IntakeResult(arrival.name, "left", reason=arrival.left or reason) for arrival in arrivals]


@contextmanager
def _only_process() -> Iterator[None]:
    """Hold the project's lock of intake; say so if a different process has it."""
    lock = Lock(LOCK)
    if not lock.acquire():
        print("intake: waits for a different process that is checking the inbox", flush=True)
        lock.acquire(wait=True)
    try:
        yield
    finally:
        lock.release()


def _take_all(arrivals: list[Arrival], params: Params, inbox: Inbox) -> list[IntakeResult]:
    """Deal with every file. Reading the tables of the project comes first, and takes seconds."""
    from pipelines.commands.admission import Admission

    admission = Admission(params, {kind: packed(table_rows(kind, params.data)) for kind in KINDS})
    return [_claimed(arrival, params, inbox, admission) for arrival in arrivals]


def _claimed(arrival: Arrival, params: Params, inbox: Inbox, admission: Admission) -> IntakeResult:
    claimed = arrival if arrival.left else inbox.claim(arrival)
    if claimed.left:
        return IntakeResult(claimed.name, "left", reason=claimed.left)
    if claimed.attempts >= MOST_ATTEMPTS:
        reason = (
            f"{claimed.file}: {claimed.attempts} processes were killed while they read this file; most likely it needs more memory"
            " than there is. Split it, and move the parts back."
        )
        return _quarantined(claimed, inbox, reason)
    try:
        return _take(claimed, params, inbox, admission)
    except BaseException:
        with contextlib.suppress(PosttrainError):
            inbox.give_back(claimed)
        raise


def _take(arrival: Arrival, params: Params, inbox: Inbox, admission: Admission) -> IntakeResult:
    """Process one file."""
    local = _WORK / arrival.file
    try:
        kind = _kind(arrival)
        inbox.fetch(arrival, local)
        if file_digest(local) in admission.accepted_bytes(kind):
            return _finished(arrival, inbox, local, IntakeResult(arrival.name, "known", kind))
        with bounded(limit_seconds(), _ANY_SIZE):
            refuse_too_large(local)
            with bounded(limit_seconds(), memory_for(local)):
                rows = _rows(kind, params, local, admission)
            refuse_too_many(len(rows), local)
            known = admission.holds(kind, rows)
            aside = 0 if known else admission.check(kind, rows)
        if known:
            return _finished(arrival, inbox, local, IntakeResult(arrival.name, "known", kind))
    except PosttrainError as error:
        return _set_aside(arrival, inbox, local, str(error))
    except MemoryError:
        reason = (
            f"{arrival.file}: reading it needs more than {memory_for(local) // 1_000_000} MB of memory, and files of this size need much"
            " less: it holds millions of tiny or empty values. Correct it, or split it."
        )
        return _set_aside(arrival, inbox, local, reason)
    except TimeoutError as error:
        reason = (
            f"{arrival.file}: reading and checking it was stopped: {error}. Split it, or raise POSTTRAIN_INBOX_SECONDS."
        )
        return _set_aside(arrival, inbox, local, reason)
    except OSError:
        raise
    except Exception as error:  # whatever one file's content does to a reader, the others are taken
        return _set_aside(arrival, inbox, local, f"it cannot be checked: {type(error).__name__}: {error}")
    if not inbox.unchanged(arrival):
        return _postponed(arrival, inbox)
    _keep(local, kind, arrival.file)
    inbox.remove(arrival)
    admission.admit(kind, rows)
    return IntakeResult(arrival.name, "accepted", kind, len(rows), aside)


def _set_aside(arrival: Arrival, inbox: Inbox, local: Path, why: str) -> IntakeResult:
    reason = redact(why.replace(str(local), arrival.file))
    if not inbox.unchanged(arrival):
        return _postponed(arrival, inbox)
    local.unlink(missing_ok=True)
    return _quarantined(arrival, inbox, reason)


def _quarantined(arrival: Arrival, inbox: Inbox, reason: str) -> IntakeResult:
    """Set a file aside. If its folder does not allow it, the file waits, and the others are taken."""
    failed = inbox.quarantine(arrival, reason)
    if not failed:
        return IntakeResult(arrival.name, "quarantined", reason=reason)
    if arrival.attempts < MOST_ATTEMPTS:
        inbox.give_back(arrival)
    return IntakeResult(arrival.name, "left", reason=f"it is refused, and {failed}. The reason: {reason}")


def _finished(arrival: Arrival, inbox: Inbox, local: Path, taken: IntakeResult) -> IntakeResult:
    local.unlink(missing_ok=True)
    if not inbox.unchanged(arrival):
        return _postponed(arrival, inbox)
    inbox.remove(arrival)
    return taken


def _postponed(arrival: Arrival, inbox: Inbox) -> IntakeResult:
    """A file that is written to while it is read is neither accepted nor removed."""
    inbox.give_back(arrival)
    return IntakeResult(arrival.name, "left", reason="it was changed while it was read; the next run takes it")


def _kind(arrival: Arrival) -> Kind:
    """Return the table that the file's folder names. Raises DataError if there is none."""
    for kind in KINDS:
        if arrival.folder == kind:
            return kind
    raise DataError(
        f"{arrival.name}: the folder says which table a file is for: {', '.join(KINDS)};"
        f" e.g. preferences/{arrival.file}"
    )


def _rows(kind: Kind, params: Params, path: Path, admission: Admission) -> PackedRows:
    """Return the file's rows. Raises DataError if they do not fit the table."""
    return packed(numbered(alike(kind, admission.rows[kind], file_rows(kind, params.data, path), path)))


def _keep(local: Path, kind: Kind, name: str) -> None:
    """Move the file to data/raw/accepted under the next number, so that files are read in the order of their arrival."""
    folder = ACCEPTED / kind
    folder.mkdir(parents=True, exist_ok=True)
    last = max((arrival_number(path) for path in accepted_files(kind)), default=0)
    suffix = "".join(kind_and_compression(Path(name)))
    stem = name[: len(name) - len(suffix)]
    safe = re.sub(r"[^\w.-]+", "_", stem).encode()[:_NAME_BYTES].decode(errors="ignore")
    final = folder / f"{last + 1:04d}-{safe or hashlib.sha256(stem.encode()).hexdigest()[:12]}{suffix}"
    if not is_readable(final) or final.exists():  # a later run would pass it over, or it would replace rows
        raise AssertionError(f"{final} is no name for an accepted file")
    with local.open("rb") as file:
        os.fsync(file.fileno())
    replace(local, final)


def refuse_remotes(project: Path, address: str) -> None:
    """Raise DataError if the inbox contains a remote of DVC, as a whole bucket may: the objects of models would be moved to quarantine."""
    config, inbox = read_dvc_config(project), _prefix(address, project)
    for section in sorted(config.sections()):
        url = config.get(section, "url", fallback="")
        if url and _prefix(url, project / ".dvc").startswith(inbox):
            raise DataError(
                f"the inbox {redact(address)} cannot be used: it contains DVC's remote {redact(url)}, and intake moves every file of its"
                " inbox. Nothing was moved. Set POSTTRAIN_INBOX to a folder or prefix for new files only."
            )


def _prefix(address: str, base: Path) -> str:
    """Return an address, or an absolute path, with a slash at its end; a relative path begins at `base`."""
    if "://" in address and not address.startswith("file://"):
        return address.rstrip("/") + "/"
    path = (base / Path(address.removeprefix("file://")).expanduser()).resolve()
    return path.as_posix().rstrip("/") + "/"


@reports_errors
def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = command_parser("posttrain intake", __doc__)
    parser.add_argument("--inbox", help="folder or s3://BUCKET/PREFIX (default: POSTTRAIN_INBOX, else ./inbox)")
    args = parser.parse_args(argv)
    environment.quiet()
    project = environment.root()
    os.chdir(project)
    environment.require_writable(project)
    refuse_remotes(project, args.inbox or location(project))
    inbox = open_inbox(args.inbox or location(project), required=bool(args.inbox or os.environ.get("POSTTRAIN_INBOX")))
    taken = take_in(load_params(project / "params.yaml"), inbox)
    write_atomic(RECORD, (json.dumps([asdict(entry) for entry in taken], indent=1) + "\n").encode())
    for entry in taken:
        print(f"intake: {printable(entry.describe())}", flush=True)
    if not taken:
        print(f"intake: nothing waits in {redact(inbox.where)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
