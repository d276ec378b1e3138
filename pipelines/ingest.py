"""Convert the sources to the canonical tables in data/tables. Loads no model.

    python -m pipelines.ingest

Pairs are split by prompt into `preferences` and `preferences_heldout`, so that the accuracy on held-out pairs is for unseen prompts.
"""

from __future__ import annotations

import argparse
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import compress
from pathlib import Path

import numpy as np

from pipelines.config.data_schema import DataParams
from pipelines.config.params import load_params
from pipelines.data.conversation_rows import Sourced
from pipelines.data.experts import with_experts
from pipelines.data.lost_files import refuse_lost_files
from pipelines.data.noise import with_noise
from pipelines.data.pairs import Changes
from pipelines.data.sources import accepted_files, environment_files, local_files, table_rows
from pipelines.data.tables import EXPERT, FOLDER, Row, Table, plain, write_changes, write_rows
from pipelines.runtime.consistency import VARIABLE
from pipelines.runtime.process import STAGE
from pipelines.runtime.run import Run
from pipelines.runtime.step import main
from posttrain.environments.parts import KINDS
from posttrain.errors import ConfigError, DataError
from posttrain.text import as_prompt, letters_and_digits


def run(run: Run) -> None:
    """Read the sources, write the tables and record their sizes."""
    if STAGE in os.environ and VARIABLE not in os.environ:  # by hand nothing is recorded, and flows have compared
        refuse_lost_files(Path())
    data = run.context.params.data
    kinds: list[Sourced] = list(KINDS)
    if data.labelled:
        kinds.append("labelled")
    changes: dict[str, Changes] = {kind: Counter() for kind in kinds}
    rows_of = {kind: table_rows(kind, data, changes[kind]) for kind in kinds}
    rows_of["sft"] = with_experts(rows_of["sft"], data, changes["sft"])
    tables = split_tables(rows_of, data)
    FOLDER.mkdir(parents=True, exist_ok=True)
    write_changes(changes, FOLDER)
    for kind, counted in changes.items():
        for description, count in sorted(counted.items()):
            if count:
                print(f"ingest: {kind}: {count} {description}", flush=True)
    for table, rows in sorted(tables.items()):
        write_rows(table, rows, FOLDER / f"{table}.parquet")
        if not rows:
            continue
        run.recorder.table(table, 0, [{name: plain(value) for name, value in row.items()} for row in rows[:5]])
        experts = sum(bool(row.get(EXPERT)) for row in rows)
        of = f", {experts} rows of data.experts" if experts else ""
        print(f"ingest: {table}: {len(rows)} rows, {_prompts(rows)} prompts{of}", flush=True)
    counts = {f"rows/{table}": len(rows) for table, rows in tables.items() if rows}
    run.recorder.summary(counts | {f"prompts/{table}": _prompts(rows) for table, rows in tables.items() if rows})


def split_tables(rows: Mapping[Sourced, list[Row]], data: DataParams) -> dict[Table, list[Row]]:
    """Return all tables from the rows of their sources; an optional table without a source has no rows."""
    kept, heldout = split_by_prompt(rows["preferences"], data.preferences.heldout, data.seed)
    return {
        "sft": rows["sft"],
        "preferences": with_noise(kept, data.noise, data.seed),
        "preferences_heldout": heldout,
        "problems": rows["problems"],
        "evaluation": rows["evaluation"],
        "labelled": rows.get("labelled", []),
    }


def split_by_prompt(rows: list[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Return the rows of about `1 - share` of the prompts, and the rows of the remaining prompts."""
    heldout = held_out(rows, share, seed)
    return [row for row, held in zip(rows, heldout, strict=True) if not held], [*compress(rows, heldout)]


def held_out(rows: Sequence[Row], share: float, seed: int) -> list[bool]:
    """Return which rows are held out: those of about `share` of the prompts.

    The split depends only on prompts and seed. Prompts that differ only in case or spacing count as one. Prompts that differ only in
    punctuation are neighbours in the order, so they are rarely separated.
    """
    if not share:
        raise ConfigError(
            "data.preferences.heldout: must be greater than 0, e.g. 0.1, because held-out pairs measure the reward model"
        )
    places = np.fromiter((_place(_key(row), seed) for row in rows), np.uint64, len(rows))
    prompts = np.fromiter((_digest(_key(row)) for row in rows), np.uint64, len(rows))
    order = np.lexsort((prompts, places))
    places_in_order, prompts_in_order = places[order], prompts[order]
    first = np.ones(len(rows), dtype=bool)  # of the rows of a prompt
    first[1:] = (np.diff(places_in_order) != 0) | (np.diff(prompts_in_order) != 0)
    count = max(1, round(share * int(first.sum())))
    if count >= first.sum():
        raise DataError(
            f"data.preferences.heldout = {share} would hold out {count} of {first.sum()} prompts and leave none for training;"
            " lower it, or add pairs"
        )
    limit = places_in_order[first][count - 1]
    before = int((places_in_order[first] < limit).sum())
    neighbours = {_key(rows[int(i)]) for i in np.flatnonzero(places == limit)}
    last = set(sorted(neighbours)[: count - before])
    return [
        bool(place < limit or (place == limit and _key(row) in last)) for place, row in zip(places, rows, strict=True)
    ]


def _place(key: str, seed: int) -> int:
    """Return the prompt's place in a random order that depends only on prompt and seed, as a number of 64 bits."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{letters_and_digits(key)}".encode()).digest()[:8])


def _digest(key: str) -> int:
    """Return a number of 64 bits by which prompts are told apart: a million of them take 8 MB."""
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest())


def _key(row: Row) -> str:
    """Return the prompt without differences of case and spacing."""
    return as_prompt(plain(row["prompt"]))


def _prompts(rows: Iterable[Row]) -> int:
    """Return the number of different prompts."""
    return len({_key(row) for row in rows})


def sources(args: argparse.Namespace) -> list[str]:
    """Return the local files that this step reads; they are part of its identity."""
    data = load_params(args.params).data
    files = [path for kind in KINDS for path in local_files(getattr(data, kind))]
    more = [source for source in (data.labelled, data.experts) if source is not None]
    files += [path for source in more for path in (*local_files(source), *environment_files(source))]
    files += [path for kind in KINDS for path in accepted_files(kind)]
    files += [path for kind in KINDS for path in environment_files(getattr(data, kind))]
    return sorted({file.as_posix() for file in files})


if __name__ == "__main__":
    main(run, "ingest", params=("data",), inputs=sources)
