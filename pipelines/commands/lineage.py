"""Show which data made a model, or which models a file or a row went into.

    posttrain lineage champion             # or challenger, previous, a version's number, dpo-0, sft, models/align/dpo-0
    posttrain lineage --file FILE          # an accepted or configured source file: every model that was trained on it
    posttrain lineage --row preferences:17 # a row of data/valid/TABLE.parquet by its id, in all versions of the table

A model comes with the commit and the parameters of each stage behind it. The commit was checked out when the stage ran; it is read from
the run's measurements, or from MLflow. An align stage counts with the tables and models that its algorithm learns from; a reward model of
weight 0 only measures. Reads DVC's run cache, which remembers every stage run of this checkout; `dvc pull --run-cache` adds those of
other machines.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipelines.config.effective import effective_parameters
from pipelines.config.params import load_params
from pipelines.data.files import read_file
from pipelines.lineage.commits import commit_of
from pipelines.lineage.graph import Lineage, accepted_copies
from pipelines.lineage.records import REMOVE, Artifact, StageRecord
from pipelines.promotion.named import find_model
from pipelines.promotion.registry import DECISION, REASON, Version
from pipelines.runtime import environment
from pipelines.runtime.command_line import command_parser, print_text, reports_errors
from pipelines.runtime.identity import file_digest
from pipelines.runtime.measures import GREEDY, SAMPLED, in_words, with_measures
from pipelines.runtime.redaction import printable
from posttrain.errors import DataError
from posttrain.files import read_json


def describe_model(lineage: Lineage, model: Artifact) -> dict[str, Any]:
    """Return the stages, models, tables, files and results behind a model. Raises DataError if no record made it."""
    if not lineage.producers(model):
        raise DataError(
            f"no recorded run made {model.path} ({model.md5}). Type `dvc pull --run-cache` to fetch the records of other machines."
        )
    chain = lineage.ancestors(model)
    ingest = next((record for record in chain if record.stage == "ingest"), None)
    used = [each for record in chain for each in lineage.used(record)]
    files = lineage.files(ingest) if ingest is not None else {}
    return {
        "model": model._asdict(),
        "stages": [_stage(lineage, record) for record in chain],
        "models": [each._asdict() for each in dict.fromkeys(used) if each.path.startswith("models/")],
        "tables": [
            each._asdict() | {"rows": _rows(lineage, each)}
            for each in dict.fromkeys(used)
            if each.path.startswith("data/valid/")
        ],
        "files": files,
        "annotators": annotators(files),
        "set_aside": {Path(each.path).stem: _rows(lineage, each) for each in _quarantined(lineage, chain)},
        "evaluation": _evaluation(lineage, model),
    }


def _stage(lineage: Lineage, record: StageRecord) -> dict[str, Any]:
    """Return a stage run: parameters as params.yaml has them, those that it read by their common names, and its commit."""
    start = lineage.start(record)
    used = effective_parameters(start.get("stage", ""), start.get("arguments", {}), lineage.parameters(record))
    commit = commit_of(Path.cwd(), str(start.get("run", "")))
    return {"stage": record.stage, "commit": commit, "used": used, "params": dict(record.params)}


def annotators(files: Mapping[str, str]) -> dict[str, dict[str, int]]:
    """Return how many rows each annotator gave, by file; only for files of JSON lines that the workspace still has unchanged."""
    found = {}
    for name, digest in sorted(files.items()):
        path = Path(name)
        if path.suffix != ".jsonl" or not path.is_file() or b'"annotator"' not in path.read_bytes():
            continue
        if file_digest(path) == digest:
            found[name] = dict(Counter(str(row["annotator"]) for row in read_file(path) if "annotator" in row))
    return found


def affected(lineage: Lineage, tables: list[Artifact]) -> dict[str, Any]:
    """Return the versions of tables with their rows, and the models that were trained on them. Evaluation trains nothing."""
    records = lineage.descendants(tables)
    models = [each for record in records for each in record.outputs if each.path.startswith("models/")]
    return {
        "tables": [each._asdict() for each in tables],
        "models": [each._asdict() for each in sorted(dict.fromkeys(models))],
    }


def tables_with_file(project: Path, lineage: Lineage, file: Path) -> list[Artifact]:
    """Return the versions of validated tables with rows of a file. Raises DataError if it is neither accepted nor was it read."""
    digest = file_digest(file)
    return lineage.tables_with_file(digest, bool(accepted_copies(project, digest)))


def versions_with_row(lineage: Lineage, table: str, identity: int) -> list[Artifact]:
    """Return the versions of a table that hold the row with this id in the current version.

    Raises DataError if the table or the row does not exist.
    """
    import pyarrow.parquet as pq  # its ParquetFile: read_table imports pandas, which takes a third of the command's time

    path = Path(f"data/valid/{table}.parquet")
    if not path.is_file():
        names = ", ".join(sorted(found.stem for found in path.parent.glob("*.parquet"))) or "none yet: type `dvc repro`"
        raise DataError(f"{path} does not exist; validated tables: {names}")
    wanted = next((row for row in pq.ParquetFile(path).read().to_pylist() if row["id"] == identity), None)
    if wanted is None:
        raise DataError(
            f"{path} has no row with id {identity}; `posttrain preview {table} {identity}` shows rows by id"
        )
    content = _content(wanted)
    found = []
    for version in lineage.versions(table):
        stored = lineage.cache.file(version.md5)
        if stored is not None and any(_content(row) == content for row in pq.ParquetFile(stored).read().to_pylist()):
            found.append(version)
    return found


def _quarantined(lineage: Lineage, chain: list[StageRecord]) -> Iterator[Artifact]:
    for record in chain:
        if record.stage == "validate":
            yield from (each for each in lineage.written(record) if each.path.startswith("data/quarantine/"))


def _rows(lineage: Lineage, table: Artifact) -> int | None:
    """Return the number of rows of a table, or None if the cache does not have it."""
    import pyarrow.parquet as pq

    path = lineage.cache.file(table.md5)
    return None if path is None else int(pq.read_metadata(path).num_rows)


def _levels(results: Mapping[str, Any]) -> Iterator[str]:
    """Yield each measure of accuracy with its interval."""
    for name in (SAMPLED, GREEDY):
        if name in results:
            low, high = (results.get(f"{name}{end}") for end in ("_low", "_high"))
            known = low is not None and high is not None
            interval = f"95 % interval {low:.3f} to {high:.3f}" if known else "no interval from equal values"
            yield f"{in_words(name)} {results[name]:.3f}, {interval}"


def _evaluation(lineage: Lineage, model: Artifact) -> dict[str, Any]:
    """Return the metrics of the model's newest evaluation that the cache holds."""
    for record in lineage.records:
        metrics = next((each for each in record.outputs if each.path.endswith("/metrics.json")), None)
        if record.stage.startswith("evaluate") and model in record.inputs and metrics is not None:
            path = lineage.cache.file(metrics.md5)
            # The evaluation of an aligned model also depends on models/sft, whose score is not this one.
            name = Path(model.path).name
            if path is not None and metrics.path == f"runs/evaluate/{name}/metrics.json":
                found: dict[str, Any] = read_json(path, REMOVE)
                return found
    return {}


def _content(row: Mapping[str, Any]) -> str:
    """Return a row as text without its position, which changes with the rows before it."""
    return json.dumps({key: value for key, value in row.items() if key != "id"}, sort_keys=True, default=str)


def model_text(found: Mapping[str, Any], version: Version | None) -> str:
    """Return a model's lineage as text."""
    model = found["model"]
    lines = []
    if version is not None:
        aliases = ", ".join(version.aliases) or "no alias"
        said = ", ".join(filter(None, (version.words(DECISION), version.words(REASON))))
        lines.append(f"{version.name}, {aliases}{said and f': {said}'}")
    lines.append(f"{model['path']}  md5 {model['md5']}")
    lines += _section("made by", (f"{entry['stage']}  {_commit(entry['commit'])}" for entry in found["stages"]))
    lines += _section("from the models", (f"{each['path']}  md5 {each['md5']}" for each in found["models"]))
    lines += _section(
        "from the tables", (f"{each['path']}  {_count(each['rows'])}  md5 {each['md5']}" for each in found["tables"])
    )
    lines += _section(
        "out of the files", (f"{name}  sha256 {digest}" for name, digest in sorted(found["files"].items()))
    )
    people = (
        f"{name}: {', '.join(f'{who} {count}' for who, count in sorted(counts.items()))}"
        for name, counts in sorted(found["annotators"].items())
    )
    lines += _section("judged by", people)
    aside = {table: count for table, count in found["set_aside"].items() if count}
    lines += _section("set aside by validate", (f"{table}: {_count(count)}" for table, count in sorted(aside.items())))
    lines += _section("evaluated", _levels(with_measures(found["evaluation"], None)))
    for entry in found["stages"]:
        values = (
            f"{name} = {json.dumps(value, ensure_ascii=False)}"
            for name, value in sorted(entry["used"].items())
            if value is not None
        )
        lines += _section(f"parameters of {entry['stage']}", values)
    return "\n".join(lines)


def _commit(commit: str | None) -> str:
    return "commit not recorded here" if commit is None else f"commit {commit}"


def affected_text(found: Mapping[str, Any], what: str) -> str:
    """Return the models that a file or row went into as text."""
    lines = [f"{what} is in {len(found['tables'])} version(s) of the validated tables"]
    if not found["tables"]:
        lines.append(
            "no run of validate has finished on it yet; `dvc repro validate` takes it in, or names the reason why it stops"
        )
    lines += _section("tables", (f"{each['path']}  md5 {each['md5']}" for each in found["tables"]))
    if not found["models"]:
        return "\n".join([*lines, "no recorded model was trained on it"])
    return "\n".join(
        [*lines, *_section("models trained on it", (f"{m['path']}  md5 {m['md5']}" for m in found["models"]))]
    )


def _section(title: str, entries: Any) -> list[str]:
    listed = [f"  {entry}" for entry in entries]
    return [f"{title}:", *listed] if listed else []


def _count(rows: int | None) -> str:
    return "? rows (not in the cache)" if rows is None else f"{rows} row{'' if rows == 1 else 's'}"


def _row(text: str) -> tuple[str, int]:
    """Parse TABLE:ID."""
    if (parts := re.fullmatch(r"([a-z_]+):(\d+)", text)) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not TABLE:ID, e.g. preferences:17")
    return parts[1], int(parts[2])


@reports_errors
def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = command_parser("posttrain lineage", __doc__)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("model", nargs="?", help="alias, version number, or model")
    which.add_argument("--file", type=Path, help="a source file")
    which.add_argument("--row", type=_row, metavar="TABLE:ID", help="a row of a validated table")
    parser.add_argument("--json", action="store_true", help="print everything as JSON, with all parameters")
    args = parser.parse_args(argv)
    environment.quiet()
    project = environment.root()
    file = args.file.absolute() if args.file else None
    os.chdir(project)
    if args.model:
        named = find_model(project, args.model, load_params(project / "params.yaml").project.experiment)
        found, version = describe_model(Lineage.read(project), Artifact(named.path, named.md5)), named.version
        text = model_text(found, version)
    else:
        lineage = Lineage.read(project)
        if file is not None and not file.is_file():
            raise DataError(f"{args.file}: no such file")
        tables = tables_with_file(project, lineage, file) if file else versions_with_row(lineage, *args.row)
        found = affected(lineage, tables)
        text = affected_text(found, str(args.file) if file else f"row {args.row[1]} of {args.row[0]}")
    print_text(
        json.dumps(found, indent=1, ensure_ascii=False) if args.json else "\n".join(map(printable, text.split("\n")))
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
