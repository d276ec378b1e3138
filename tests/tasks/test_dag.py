from pathlib import Path

import pytest

from posttrain.errors import OrchestrationError
from tasks.dag import Node, changed, in_order, needed_for, read_dag, stale

EXPECTED = {
    "inbox.dvc": ("data", ()),
    "start": ("stage", ("inbox.dvc",)),
    "side@left": ("stage", ("start",)),
    "side@right": ("stage", ("start",)),
    "join": ("stage", ("side@left", "side@right")),
}


def test_the_dag_is_the_one_of_dvc_yaml_whatever_the_current_directory(workspace: Path) -> None:
    dag = read_dag(workspace)
    assert {name: (node.kind, node.after) for name, node in dag.items()} == EXPECTED
    assert list(dag) == list(EXPECTED)


def test_data_files_come_first_and_ties_keep_the_given_order() -> None:
    nodes = [
        Node("z", "stage", ()),
        Node("b", "stage", ("d.dvc",)),
        Node("a", "stage", ("z",)),
        Node("d.dvc", "data", ()),
    ]
    assert list(in_order(nodes)) == ["d.dvc", "z", "b", "a"]


def test_a_target_brings_what_it_needs_and_a_change_what_depends_on_it() -> None:
    dag = in_order(
        Node(name, "stage", tuple(after)) for name, after in [("a", ""), ("b", "a"), ("c", "a"), ("d", "bc")]
    )
    assert list(needed_for(dag, ["b"])) == ["a", "b"]
    assert list(needed_for(dag, [])) == ["a", "b", "c", "d"]
    assert stale(dag, {"b"}) == {"b", "d"}
    assert stale(dag, set()) == set()
    with pytest.raises(OrchestrationError, match=r"dvc\.yaml has no stage 'e'"):
        needed_for(dag, ["e"])


def test_changed_are_the_stages_that_dvc_status_names(workspace: Path) -> None:
    assert changed(workspace) == {"start", "side@left", "side@right", "join"}


def test_a_folder_without_dvc_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OrchestrationError, match="not a DVC workspace"):
        read_dag(tmp_path)


def test_an_absent_parameter_is_named_with_the_command_that_sets_it(workspace: Path) -> None:
    text = (workspace / "dvc.yaml").read_text()
    (workspace / "dvc.yaml").write_text(text.replace("inbox]", "'${project.code}']", 1))
    with pytest.raises(
        OrchestrationError, match=r"params\.yaml has no project\.code.*posttrain configure project\.code=VALUE"
    ):
        read_dag(workspace)


def test_a_cycle_is_refused_in_one_sentence(workspace: Path) -> None:
    text = (workspace / "dvc.yaml").read_text()
    (workspace / "dvc.yaml").write_text(text.replace("deps: [work.py, inbox]", "deps: [join.txt]"))
    with pytest.raises(OrchestrationError, match="DVC cannot read the pipeline"):
        read_dag(workspace)
