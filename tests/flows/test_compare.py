import contextlib
import json
import re
from pathlib import Path

import pytest
from prefect import tags
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId, FlowRunFilterTags
from prefect.client.schemas.sorting import FlowRunSort

from flows.compare import compare
from flows.remaining import time_left
from posttrain.errors import OrchestrationError
from posttrain.network import wait_until
from tasks.dag import read_dag
from tasks.lockfile import sorted_lock
from tests.webhook import listening
from tests.workspace import times

pytestmark = pytest.mark.usefixtures("prefect_url")


def run(root: Path, *targets: str) -> None:
    with contextlib.chdir(root):
        compare(list(targets), tracking=False)


def tags_of_tasks(tag: str) -> list[list[str]]:
    """Return the tags of the five tasks of the only flow run with this tag, once the server has received their events."""
    found: list[list[str]] = []

    def arrived() -> bool:
        with get_client(sync_client=True) as client:
            (flow,) = client.read_flow_runs(flow_run_filter=FlowRunFilter(tags=FlowRunFilterTags(all_=[tag])))
            tasks = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow.id])))
        found[:] = [task.tags for task in tasks]
        return len(found) == 5

    assert wait_until(arrived, lambda: True, 30)
    return found


def test_order_is_kept_independent_stages_overlap_and_the_lock_is_dvcs_own(
    workspace: Path, finished_template: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SIDE_SECONDS", "5")
    with tags("demo"):
        run(workspace)
    when = times(workspace)
    assert tags_of_tasks("demo") == [[]] * 5, "a tag costs each stage two requests for a concurrency slot"
    assert sorted(when, key=lambda name: when[name][1])[0] == "start"
    assert when["side-left"][0] >= when["start"][1]
    assert when["side-right"][0] >= when["start"][1]
    assert when["join"][0] >= max(when["side-left"][1], when["side-right"][1])
    assert max(when["side-left"][0], when["side-right"][0]) < min(when["side-left"][1], when["side-right"][1])
    assert (workspace / "join.txt").read_text() == str((1 + 1 + 1) * 2 + 1)

    printed = capsys.readouterr().out
    assert printed.count(" started\n") == 4
    assert printed.count(" done in ") == 4
    record = json.loads((workspace / ".posttrain" / "flow.json").read_text())
    assert {name: stage["ran"] for name, stage in record["stages"].items()} == {
        "inbox.dvc": False,
        "start": True,
        "side@left": True,
        "side@right": True,
        "join": True,
    }
    assert (
        record["started"]
        <= record["stages"]["start"]["started"]
        <= record["stages"]["join"]["ended"]
        <= record["ended"]
    )

    order = [name for name in read_dag(workspace) if name != "inbox.dvc"]
    alone = sorted_lock((finished_template / "dvc.lock").read_text(), order)
    assert (workspace / "dvc.lock").read_text() == alone

    run(workspace)
    assert times(workspace) == when
    assert "nothing to do: all 5 stages are up to date" in capsys.readouterr().out


SELECTING = """
  select:
    cmd: mkdir -p chosen && cp left.in chosen/left && cp right.in chosen/right
    meta: {before_plan: true}
    deps: [left.in, right.in]
    outs: [chosen]
  chosen:
    matrix:
      name: ${sides}
    cmd: cp chosen/${item.name} chosen-${item.name}.txt
    deps: ["chosen/${item.name}"]
    outs: ["chosen-${item.name}.txt"]
"""


def test_a_stage_before_the_plan_runs_first_so_that_only_stages_with_new_inputs_are_counted(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (workspace / "dvc.yaml").open("a") as file:
        file.write(SELECTING)
    for side in ("left", "right"):
        (workspace / f"{side}.in").write_text(side)
    run(workspace)
    capsys.readouterr()
    (workspace / "left.in").write_text("new")
    run(workspace)
    printed = capsys.readouterr().out
    assert "1 of 8 stages to bring up to date" in printed
    first, counted = re.search(r"select +done in", printed), printed.index("1 of 8 stages")
    assert first is not None
    assert first.start() < counted
    assert (workspace / "chosen-left.txt").read_text() == "new"
    record = json.loads((workspace / ".posttrain" / "flow.json").read_text())["stages"]
    assert {name for name, stage in record.items() if stage["ran"]} == {"select", "chosen@left"}


def test_a_failure_stops_only_its_dependants_and_the_webhook_is_told(
    workspace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (workspace / "dvc.yaml").read_text()
    broken = """
  broken:
    cmd: 'python -c "raise SystemExit(''error: no such reward'')"'
    outs: [broken.txt]
  after_broken:
    cmd: python work.py after_broken broken.txt
    deps: [broken.txt]
    outs: [after_broken.txt]
"""
    (workspace / "dvc.yaml").write_text(text + broken)
    with listening() as (url, told):
        monkeypatch.setenv("POSTTRAIN_WEBHOOK", url)
        with pytest.raises(OrchestrationError) as failure:
            run(workspace)
    (body,) = told
    assert body["event"] == "failed"
    assert "stage broken failed: error: no such reward" in body["text"]
    message = str(failure.value)
    assert "stage broken failed: error: no such reward" in message
    assert message.endswith("not started, because they depend on a failed stage: after_broken")
    assert sorted(times(workspace)) == ["join", "side-left", "side-right", "start"]
    assert "broken                   FAILED" in capsys.readouterr().out


def test_one_slot_means_one_stage_at_a_time_and_targets_bring_only_what_they_need(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POSTTRAIN_SLOTS", "1")
    run(workspace, "side@left", "side@right")
    assert sorted(times(workspace)) == ["side-left", "side-right", "start"]
    first, second = sorted([times(workspace)["side-left"], times(workspace)["side-right"]])
    assert first[1] <= second[0]


def test_a_flow_run_is_named_by_what_it_does_and_when(finished: Path) -> None:
    run(finished)
    with get_client(sync_client=True) as client:
        newest = client.read_flow_runs(sort=FlowRunSort.START_TIME_DESC, limit=1)[0]
    assert re.fullmatch(r"compare 20\d\d-\d\d-\d\d \d\d:\d\d", newest.name)


def test_the_time_left_comes_from_stages_of_the_same_kind() -> None:
    seconds = {"align@grpo-0": 90.0, "align@grpo-1": 110.0, "sft": 40.0}
    # two unknown alignments take the mean of the known ones, 100 s each; two slots share them
    assert time_left({"align@dpo-0", "align@dpo-1"}, seconds, 1) == "about 3 min left"
    assert time_left({"align@dpo-0", "align@dpo-1"}, seconds, 2) == "about 2 min left"
    assert time_left({"align@dpo-1"}, {"align@dpo-0": 40.0, "align@grpo-0": 80.0}, 1) == "about 40 s left", (
        "its other seed"
    )
    assert time_left({"sft", "compare"}, seconds, 1) == "at least 40 s left"
    assert time_left({"sft", "compare", "reward"}, seconds, 1) == "", "the time of most stages is not known"
    assert time_left({"compare"}, seconds, 1) == time_left(set(), seconds, 1) == ""
