"""Delete every copy of an accepted file's rows, and name the models that must be trained again.

    posttrain forget data/raw/accepted/preferences/0003-monday.jsonl          # shows what would be deleted
    posttrain forget data/raw/accepted/preferences/0003-monday.jsonl --yes    # deletes it

Deleted are the file, its rows in all versions of the tables, and every journal, artifact, log, page and MLflow trace that quotes them: in
the project, in DVC's cache and in all its remotes, and in MLflow, also on a server. FILE may be any copy of the file; a copy outside
data/raw/accepted is not deleted.
An accepted file can be forgotten at any time, also before ingest has read it and where validate stops.
Weights are kept, and the registry's versions that were trained on the rows get the tag `retrain`. Files of inbox/ and labels/ that hold
the same texts are named, for you to decide. Afterwards `make retrain` makes tables and models anew.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from pipelines.commands.intake import LOCK as INTAKE
from pipelines.config.params import load_params
from pipelines.data.lost_files import POINTER
from pipelines.data.sources import ACCEPTED
from pipelines.lineage.erasure import Erasure, erase, plan
from pipelines.lineage.graph import ERASED, FORGOTTEN, Lineage
from pipelines.lineage.objects import erase_remotely
from pipelines.promotion.local_store import read_versions
from pipelines.promotion.registry import RETRAIN, Registry
from pipelines.runtime import environment
from pipelines.runtime.command_line import command_parser, print_text, reports_errors
from pipelines.runtime.journal import Journal
from pipelines.runtime.process import Lock
from pipelines.runtime.redaction import printable
from pipelines.tracking.artifact_erasure import erase_artifacts
from pipelines.tracking.erasure import erase_traces
from posttrain.errors import DataError, OrchestrationError


def describe(found: Erasure, project: Path) -> str:
    """Return what is deleted and what must be trained again, as text."""
    lines = []
    for title, entries in (
        ("accepted files", [str(path.relative_to(project)) for path in found.accepted]),
        ("files that quote the rows", [str(path.relative_to(project)) for path in found.files]),
        ("objects of DVC's cache and remotes", list(found.objects)),
        ("traces in MLflow, as experiment/trace", list(found.traces)),
        ("artifacts of MLflow outside the project, as run/path", list(found.artifacts)),
        ("models to train again, which are kept", [f"{each.path}  md5 {each.md5}" for each in found.models]),
        (
            "other accepted files with the same texts, which are kept",
            [str(p.relative_to(project)) for p in found.others],
        ),
        ("your own files with the same texts, which are kept", [str(p.relative_to(project)) for p in found.elsewhere]),
    ):
        lines += [f"{title}: {len(entries) or 'none'}", *(f"  {entry}" for entry in entries)]
    if found.unknown:
        lines.append(
            f"models may be missing above: the cache has lost the journals of {found.unknown} run(s) of ingest, so the files that they read"
            " are not known. Type `dvc pull --run-cache`, then this again."
        )
    return "\n".join(lines)


def forget(project: Path, lineage: Lineage, found: Erasure, file: Path) -> tuple[list[str], list[str]]:
    """Delete everything; return the names of the remotes that were changed, and of the versions that were marked.

    Remotes and MLflow come first: if one cannot be changed, the local copies are still there to find the rest by.
    """
    remotes = erase_remotely(project, found.objects)
    erase_traces(project, found.traces)
    erase_artifacts(project, found.artifacts)
    marked = mark(project, load_params(project / "params.yaml").project.experiment, found)
    record(project / FORGOTTEN, lineage, found)
    erase(project, found, lineage, file)
    if found.accepted:
        done = subprocess.run(
            [sys.executable, "-m", "dvc", "add", str(ACCEPTED)], cwd=project, capture_output=True, text=True
        )
        if done.returncode:
            raise OrchestrationError(
                f"the rows are deleted, but `dvc add {ACCEPTED}` failed: {done.stderr.strip()[-300:]}. Type it again, then `make retrain`."
            )
        stage_pointer(project)
    return remotes, marked


def stage_pointer(project: Path) -> None:
    """Add accepted.dvc to git's index: by the files that it names there, ingest decides whether files were lost."""
    if shutil.which("git") is not None:  # fails without a repository, where nothing is compared
        subprocess.run(["git", "add", "--update", POINTER], cwd=project, capture_output=True, check=False)


def record(path: Path, lineage: Lineage, found: Erasure) -> None:
    """Record the deletion by hash, and the files that ingest runs read whose journals are deleted."""
    tables, models = [each._asdict() for each in found.tables], [each._asdict() for each in found.models]
    journal = Journal(path)
    for run in lineage.records:
        kept = run.journal()
        if run.stage == "ingest" and kept is not None and kept.md5 in found.objects:
            journal.append({"kind": ERASED, "journal": kept.md5, "inputs": lineage.files(run)})
    journal.append({"kind": "forgotten", "sha256": found.sha256, "tables": tables, "models": models})
    journal.close()


def mark(project: Path, experiment: str, found: Erasure) -> list[str]:
    """Tag the registry's versions that were trained on the rows, and return their names."""
    seen = {each.md5 for each in found.models}
    local = read_versions(project, experiment)
    versions = Registry(project, experiment).versions() if local is None else local
    marked = [each for each in versions if any(map(each.holds, seen))]
    for version in marked:
        Registry(project, experiment).tag(
            version.number, {RETRAIN: f"trained on a forgotten file, sha256 {found.sha256}"}
        )
    return [version.name for version in marked]


@contextmanager
def without_flow(project: Path) -> Iterator[None]:
    """Hold the lock of flows. Raises OrchestrationError if one is running: it could write the rows again."""
    path = project / ".posttrain" / "flow.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OrchestrationError(
                "a flow is running here and could write the rows again; wait for it or stop it"
            ) from None
        yield


@reports_errors
def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = command_parser("posttrain forget", __doc__)
    parser.add_argument("file", type=Path, help="an accepted file, or a copy of it")
    parser.add_argument("--yes", action="store_true", help="delete; without it, only show")
    parser.add_argument("--json", action="store_true", help="print as JSON")
    args = parser.parse_args(argv)
    environment.quiet()
    project, file = environment.root(), args.file.absolute()
    os.chdir(project)
    if not file.is_file():
        raise DataError(f"{args.file}: no such file")
    lineage = Lineage.read(project)
    if args.yes:
        with without_flow(project), Lock(project / INTAKE):
            found = plan(project, lineage, file)
            remotes, marked = forget(project, lineage, found, file)
        outcome = [
            f"deleted; remotes: {', '.join(remotes) or 'none'}; versions marked: {', '.join(marked) or 'none'}",
            "type `make retrain` to make tables and models anew",
        ]
    else:
        found, outcome = plan(project, lineage, file), ["nothing was changed; add --yes to delete"]
    if args.json:
        print_text(json.dumps(asdict(found), indent=1, default=str))
    else:
        print_text("\n".join(map(printable, [*describe(found, project).split("\n"), *outcome])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
