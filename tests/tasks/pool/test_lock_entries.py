"""Merging results of workers into dvc.lock: the text is that of one machine, and a foreign result is refused."""

from pathlib import Path

import pytest

from pipelines.tracking.lockfile import read_lock
from posttrain.errors import ConfigError
from tasks.dag import read_dag
from tasks.lockfile import lock_entries, write_entries
from tasks.pool.merged_lock import checked_entry
from tasks.pool.snapshot import StagePaths, input_lock, read_paths, recorded_stages
from tests.workspace import dvc

JOIN = StagePaths(("side-left.txt", "side-right.txt"), ("join.txt",))


def test_entries_in_any_order_give_the_lock_of_one_machine(finished: Path, tmp_path: Path) -> None:
    whole = (finished / "dvc.lock").read_text()
    entries = lock_entries(whole)
    assert list(entries) == ["start", "side@left", "side@right", "join"]
    mixed = {name: entries[name] for name in ("join", "side@right", "start", "side@left")}
    write_entries(tmp_path, mixed, entries)
    assert (tmp_path / "dvc.lock").read_text() == whole
    write_entries(tmp_path, mixed, ["start"])  # unknown names follow in the order of the alphabet
    assert list(lock_entries((tmp_path / "dvc.lock").read_text())) == ["start", "join", "side@left", "side@right"]


def test_dvc_takes_a_lock_of_merged_entries_as_its_own(finished: Path) -> None:
    entries = lock_entries((finished / "dvc.lock").read_text())
    write_entries(finished, {name: entries[name] for name in reversed(entries)}, entries)
    assert dvc(finished, "status").strip() == "Data and pipelines are up to date."


def test_a_result_of_another_stage_or_of_other_inputs_is_refused(finished: Path) -> None:
    paths = read_paths(finished)
    assert paths["join"] == JOIN
    entries = lock_entries((finished / "dvc.lock").read_text())
    locked = read_lock(finished)
    assert checked_entry("join", entries["join"], JOIN, locked) == locked["join"]
    other = entries["join"].replace(locked["side@left"]["outs"][0]["md5"], "0" * 32)
    escaped = entries["join"].replace("path: join.txt", "path: ../join.txt")
    refused = {
        other: "it was made from other inputs (first: side-left.txt)",
        entries["start"]: "it is not one entry of this stage",
        entries["join"] + entries["start"]: "it is not one entry of this stage",
        escaped: "its outputs are not those of dvc.yaml",
        "  join:\n    - }": "the entry: not valid YAML",
    }
    for entry, words in refused.items():
        with pytest.raises(ConfigError) as error:
            checked_entry("join", entry, JOIN, locked)
        assert str(error.value).startswith(words)


def test_a_worker_gets_the_hashes_of_its_inputs_and_no_others() -> None:
    locked = {
        "a": {
            "cmd": "python a",
            "deps": [{"path": "x", "md5": "1"}],
            "outs": [{"path": "data/valid", "md5": "2.dir", "size": 7, "nfiles": 2}],
        },
        "b": {"cmd": "python b", "outs": [{"path": "models/b", "md5": "3"}, {"path": "runs/b", "md5": "4"}]},
        "c": {"cmd": "python c", "outs": [{"path": "models/c", "md5": "5"}]},
    }  # fmt: skip
    assert input_lock(locked, ["data/valid/sft.parquet", "models/b", "pipelines/code.py"]) == (
        "schema: '2.0'\nstages:\n"
        '  a:\n    cmd: "python a"\n    outs:\n    - path: "data/valid"\n      md5: "2.dir"\n      size: 7\n      nfiles: 2\n'
        '  b:\n    cmd: "python b"\n    outs:\n    - path: "models/b"\n      md5: "3"\n'
    )
    assert input_lock(locked, ["pipelines"]) == ""


@pytest.mark.parametrize("text", ["schema: '2.0'\n", "schema: '2.0'\nstages: {}\n", ""])
def test_a_lock_without_entries_has_none(text: str) -> None:
    assert lock_entries(text) == {}


def test_a_stage_with_a_record_of_the_reward_model_is_ordered_with_the_model(root: Path) -> None:
    """dvc.yaml names the record as the input, not the model; a worker needs both."""
    dag, paths = read_dag(root), read_paths(root)
    aligned = next(node for name, node in dag.items() if name.startswith("align@"))
    assert recorded_stages(aligned, paths) == ["reward"]
    assert recorded_stages(dag["reward"], paths) == recorded_stages(dag["sft"], paths) == []
