"""Sources to the canonical tables in data/tables. Loads no model.

    python -m pipelines.ingest

Pairs are split by prompt into `preferences` and `preferences_heldout`, so that accuracy on held-out pairs is on unseen prompts.
"""

from __future__ import annotations

import argparse
import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping

from pipelines.config.params import load_params
from pipelines.config.schema import DataParams
from pipelines.data.pairs import Changes
from pipelines.data.sources import accepted_files, local_files, table_rows
from pipelines.data.tables import FOLDER, Row, Table, plain, write_changes, write_rows
from pipelines.runtime.run import Run
from pipelines.runtime.step import main
from posttrain.environments.parts import KINDS, Kind
from posttrain.errors import ConfigError, DataError
from posttrain.text import letters_and_digits, normalised


def run(run: Run) -> None:
    data = run.context.params.data
    changes: dict[str, Changes] = {kind: Counter() for kind in KINDS}
    tables = split_tables({kind: table_rows(kind, data, changes[kind]) for kind in KINDS}, data)
    FOLDER.mkdir(parents=True, exist_ok=True)
    write_changes(changes, FOLDER)
    for kind, counted in changes.items():
        for description, count in sorted(counted.items()):
            if count:
                print(f"ingest: {kind}: {count} {description}", flush=True)
    for table, rows in sorted(tables.items()):
        write_rows(table, rows, FOLDER / f"{table}.parquet")
        run.recorder.table(table, 0, [{name: plain(value) for name, value in row.items()} for row in rows[:5]])
        print(f"ingest: {table}: {len(rows)} rows, {_prompts(rows)} prompts", flush=True)
    counts = {f"rows/{table}": len(rows) for table, rows in tables.items()}
    run.recorder.summary(counts | {f"prompts/{table}": _prompts(rows) for table, rows in tables.items()})


def split_tables(rows: Mapping[Kind, list[Row]], data: DataParams) -> dict[Table, list[Row]]:
    """The five tables out of the rows of the four sources."""
    kept, heldout = split_by_prompt(rows["preferences"], data.preferences.heldout, data.seed)
    return {
        "sft": rows["sft"],
        "preferences": kept,
        "preferences_heldout": heldout,
        "problems": rows["problems"],
        "evaluation": rows["evaluation"],
    }


def split_by_prompt(rows: list[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Rows of about `1 - share` of the prompts, and rows of the others; which ones depends on prompt and seed alone.

    Prompts that differ only in case or spacing count as one. Those that differ in signs are neighbours in the order, so they are
    rarely parted.
    """
    if not share:
        raise ConfigError(
            "data.preferences.heldout: must be above 0, e.g. 0.1; pairs kept apart measure the reward model"
        )
    prompts = sorted({_key(row) for row in rows}, key=lambda key: (_place(key, seed), key))
    count = max(1, round(share * len(prompts)))
    if count >= len(prompts):
        raise DataError(
            f"data.preferences.heldout = {share} would keep {count} of {len(prompts)} prompts apart and leave none to train on;"
            " lower it or give more pairs"
        )
    heldout = set(prompts[:count])
    return [row for row in rows if _key(row) not in heldout], [row for row in rows if _key(row) in heldout]


def _place(key: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}\0{letters_and_digits(key)}".encode()).digest()


def _key(row: Row) -> str:
    return normalised(plain(row["prompt"]))


def _prompts(rows: Iterable[Row]) -> int:
    return len({_key(row) for row in rows})


def sources(args: argparse.Namespace) -> list[str]:
    """The local files that this step reads: part of what its result is."""
    data = load_params(args.params).data
    files = [path for kind in KINDS for path in local_files(getattr(data, kind))]
    files += [path for kind in KINDS for path in accepted_files(kind)]
    return sorted({file.as_posix() for file in files})


if __name__ == "__main__":
    main(run, "ingest", params=("data",), inputs=sources)
