"""Bad input of every kind, through the commands: exit code 2, one paragraph with the remedy, and nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.data.tables import read_rows, write_rows
from tests.reliability.workspace import Workspace

INGEST, VALIDATE, BASE, SFT = (f"pipelines.{name}" for name in ("ingest", "validate", "base", "sft"))
GRPO = ("pipelines.align", "--algorithm", "grpo", "--seed", "0")
Damage = Callable[[Path], None]


def source(text: str, table: str = "sft", name: str = "rows.jsonl", **options: Any) -> Damage:
    """Return the table comes from a file with this text."""

    def damage(folder: Path) -> None:
        (folder / "data" / "raw" / name).write_text(text, encoding="utf-8")
        replace(f"data.{table}", {"source": f"data/raw/{name}"} | options)(folder)

    return damage


def replace(path: str, value: Any) -> Damage:
    """One parameter, past the checks of `pipelines.commands.configure`: as an editor would."""

    def damage(folder: Path) -> None:
        from ruamel.yaml import YAML

        yaml, file = YAML(), folder / "params.yaml"
        tree = node = yaml.load(file)
        *parents, leaf = path.split(".")
        for parent in parents:
            node = node[parent]
        node[leaf] = value
        yaml.dump(tree, file)

    return damage


def row(table: str, number: int, **values: Any) -> Damage:
    """One row of an ingested and of a validated table."""

    def damage(folder: Path) -> None:
        for name in ("tables", "valid"):
            file = folder / "data" / name / f"{table}.parquet"
            rows = read_rows(file)
            rows[number] |= values
            write_rows(table, rows, file)  # type: ignore[arg-type]

    return damage


def emptied(folder: Path) -> None:
    write_rows("sft", [], folder / "data" / "valid" / "sft.parquet")


def duplicated(folder: Path) -> None:
    with (folder / "params.yaml").open("a") as file:
        file.write("report: {seed: 1}\n")


def without(token: str) -> Damage:
    def damage(folder: Path) -> None:
        file = folder / "models" / "base" / "tokenizer_config.json"
        settings = json.loads(file.read_text())
        settings.pop(f"{token}_token")
        file.write_text(json.dumps(settings))

    return damage


def pickled(folder: Path) -> None:
    (folder / "models" / "base" / "model.safetensors").rename(folder / "models" / "base" / "pytorch_model.bin")


def other_vocabulary(folder: Path) -> None:
    file = folder / "models" / "base" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"vocab_size": 100}))


PAIR = '{"prompt": "1+1=", "chosen": "2", "rejected": "3", "chosen_score": %s, "rejected_score": 0}\n'
GOOD = '{"prompt": "1+1=", "completion": "2"}\n'
CASES: dict[str, tuple[Damage, tuple[str, ...], str]] = {
    "malformed line": (source(GOOD + '{"prompt": "1'), (INGEST,), "data/raw/rows.jsonl, line 2, column"),
    "wrong column": (source(GOOD, columns={"prompt": "prompt", "completion": "complete"}), (INGEST,),
                     "column 'completion' should come from 'complete', which no record has; did you mean 'completion'"),
    "wrong type": (source('{"prompt": "1+1=", "completion": true}\n'), (INGEST,), "completion is never text; row 0 holds True (bool)"),
    "empty file": (source(""), (INGEST,), "data/raw/rows.jsonl: has no records"),
    "missing file": (replace("data.sft", {"source": "data/raw/none.jsonl"}), (INGEST,), "data/raw/none.jsonl"),
    "NaN score": (source(PAIR % 1 + PAIR % "NaN", "preferences", heldout=0.5), (INGEST,), "row 1: chosen_score is nan"),
    "unknown generator": (replace("data.sft.source", "arithmetics"), (INGEST,), "did you mean 'arithmetic'"),
    "unknown algorithm": (replace("algorithms.grpo.preset", "grop"), GRPO, "'grop'"),
    "no such section": (replace("project.algorithms", ["grop"]), GRPO, "no section algorithms.grop; did you mean 'grpo'"),
    "duplicated key": (duplicated, (SFT,), "remove one of the two"),
    "value out of range": (replace("sft.epochs", 0), (SFT,), "sft.epochs = 0"),
    "empty table": (emptied, (SFT,), "has no rows"),
    "prompt beyond the context": (row("sft", 3, prompt="1+" * 100), (SFT,), "row 3: "),
    "no eos": (without("eos"), (SFT,), "no eos token"),
    "pickled weights": (pickled, (SFT,), "pickled weights are not loaded"),
    "other vocabulary": (other_vocabulary, (SFT,), "they do not match"),
    "no model": (lambda folder: shutil.rmtree(folder / "models" / "base"), (SFT,), "does not exist"),
    "no such local model": (replace("model.source", "./nowhere"), (BASE,), "no model folder at ./nowhere"),
    "a folder that is no model": (replace("model.source", "data"), (BASE,), "no config.json"),
}  # fmt: skip


def files(folder: Path) -> dict[str, int]:
    """Return the user's files and the stages' outputs, without live files of runs."""
    found = (path for path in folder.rglob("*") if path.is_file() and ".posttrain" not in path.parts)
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in found}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_paragraph_and_leaves_everything_as_it_was(
    name: str, workspace: Workspace, tmp_path: Path
) -> None:
    damage, command, expected = CASES[name]
    folder = tmp_path / "project"
    shutil.copytree(workspace.folder, folder, ignore=shutil.ignore_patterns(".posttrain"))
    damage(folder)
    before = files(folder)
    done = Workspace(folder, workspace.warm).run(*command)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.strip().count("\n\n") == 0
    assert "Traceback" not in done.stderr
    assert expected in done.stderr
    assert files(folder) == before
