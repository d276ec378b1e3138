"""Machine costs from measurements and a flow's record, with times written by hand."""

import ctypes.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.report.costs import COST_SECTION, per_point, write_costs
from pipelines.report.load import training
from pipelines.report.measured import all_runs, flow_time, newest, overlap, union
from pipelines.report.wall_time import curves, picture
from pipelines.runtime.energy import gpu_counters, nvml_counters
from posttrain.errors import ConfigError, TrackingError
from tests.pipelines.labelling.test_win_rates import NEW, OLD, judgement, session
from tests.pipelines.synthetic_runs import build


def measured(project: Path, name: str, key: str, stage: str | None, *records: dict[str, Any]) -> None:
    folder = project / ".posttrain" / "runs" / f"{name}-{key * 16}"
    folder.mkdir(parents=True)
    lines = [record | ({"dvc_stage": stage} if record["kind"] == "start" else {}) for record in records]
    (folder / "measurements.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def timings(step: int, time: float, **values: float) -> dict[str, Any]:
    names = {
        "rollout": "seconds/rollout",
        "train": "seconds/train",
        "whole": "seconds/step",
        "speed": "throughput/tokens_per_second",
    }
    names |= {"memory": "memory/peak_mib"}
    return {"kind": "timings", "step": step, "time": time, "values": {names[k]: v for k, v in values.items()}}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """sft took 10 s of work in a stage of 12 s; grpo was killed after 3 s, resumed, and worked 5 s more in a stage of 7 s."""
    start, end = {"kind": "start"}, {"kind": "end"}
    measured(tmp_path, "sft", "a", "sft", start | {"time": 50.0}, end | {"time": 51.0})
    measured(tmp_path, "sft", "b", "sft", start | {"time": 101.0}, timings(1, 104, whole=2.0, train=1.5, speed=100.0),
             timings(2, 108, whole=4.0, train=3.5, speed=300.0), end | {"time": 111.0})  # fmt: skip
    measured(tmp_path, "align-grpo-0", "c", "align@grpo-0", start | {"time": 60.0}, timings(1, 63.0, rollout=1.0, memory=900.0),
             start | {"time": 113.5}, timings(2, 117.0, rollout=2.0, memory=1100.0), end | {"time": 118.5})  # fmt: skip
    stages = {
        "sft": {"started": 100.0, "ended": 112.0, "ran": True, "outcome": "ran"},
        "align@grpo-0": {"started": 112.0, "ended": 119.0, "ran": True, "outcome": "ran"},
        "ingest": {"started": 100.0, "ended": 100.0, "ran": False, "outcome": "up-to-date"},
    }
    (tmp_path / ".posttrain" / "flow.json").write_text(json.dumps({"started": 98.0, "ended": 120.0, "stages": stages}))
    return tmp_path


def test_orchestration_is_what_is_not_inside_a_step(project: Path) -> None:
    flow = flow_time(project, all_runs(project))
    assert flow is not None
    stages = {stage.name: (stage.wall, stage.work, stage.orchestration) for stage in flow.stages}
    assert stages == {"ingest": (0, 0, 0), "sft": (12, 10, 2), "align@grpo-0": (7, 5, 2)}
    assert (flow.wall, flow.overhead, flow.orchestration) == (22, 3, 7)
    assert flow.share == pytest.approx(7 / 22)


def test_runs_show_the_newest_of_each_name_over_all_attempts(project: Path) -> None:
    grpo, sft = newest(all_runs(project))
    assert (grpo.name, grpo.stage, grpo.seconds, len(grpo.spans)) == ("align-grpo-0", "align@grpo-0", 8.0, 2)
    assert (grpo.total("seconds/rollout"), grpo.greatest("memory/peak_mib"), grpo.median("seconds/step")) == (
        3,
        1100,
        None,
    )
    assert (sft.seconds, sft.median("throughput/tokens_per_second"), sft.total("seconds/train")) == (10, 200, 5)


def test_the_page_and_its_numbers(project: Path) -> None:
    page = write_costs(project).read_text(encoding="utf-8")
    numbers = json.loads((project / ".posttrain" / "costs" / "costs.json").read_text())
    assert numbers["flow"]["orchestration_share"] == pytest.approx(7 / 22)
    assert numbers["flow"]["stages"]["sft"]["work_seconds"] == 10
    assert [row["name"] for row in numbers["runs"]] == ["align-grpo-0", "sft"]
    assert "31.8 %" in page
    assert "above the target of 25 %" in page
    assert '<b>2</b><span><span lang="en">of 3 stages were stale and ran</span>' in page
    assert "http" not in page.replace("http-equiv", "")


def test_true_reward_against_seconds_has_the_runs_whose_steps_were_all_timed(tmp_path: Path) -> None:
    build(tmp_path, algorithms=("grpo", "ppo"), seeds=(0, 1), steps=3)
    for i, (name, seconds) in enumerate(
        [("grpo-0", (1, 2, 4)), ("grpo-1", (3, 2, 6)), ("ppo-0", (1, 1, 1)), ("ppo-1", (1, 1))]
    ):
        steps = [timings(step, 60.0 + step, whole=float(took)) for step, took in enumerate(seconds, 1)]
        measured(tmp_path, f"align-{name}", "abcd"[i], f"align@{name}", {"kind": "start", "time": 60.0}, *steps)
    found = curves(tmp_path, newest(all_runs(tmp_path)), {"grpo": [0, 1], "ppo": [0, 1], "dpo": [0]}, "answer")
    assert list(found) == ["grpo"]
    seconds, level = found["grpo"]
    assert seconds.tolist() == [2.0, 4.0, 9.0]
    by_hand = [
        training(tmp_path / "runs/align" / f"grpo-{seed}", "grpo").curves["reward/answer/mean"][1] for seed in (0, 1)
    ]
    assert level[1] == pytest.approx(np.mean(by_hand, axis=0)[:2].mean())
    drawn = picture(found, ["grpo", "ppo"], "answer")
    assert drawn is not None
    assert drawn.bytes["light"].startswith(b"\x89PNG")
    assert picture({}, [], "answer") is None


def test_money_is_seconds_times_the_price_of_the_devices_hour(project: Path) -> None:
    measured(project, "reward", "d", "reward", {"kind": "start", "time": 10.0},
             {"kind": "ready", "time": 20.0, "device": "cuda: Big"}, {"kind": "end", "time": 56.0})  # fmt: skip
    measured(project, "base", "e", "base", {"kind": "start", "time": 1.0},
             {"kind": "ready", "time": 1.0, "device": "cuda: Odd"}, {"kind": "end", "time": 2.0})  # fmt: skip
    (project / "prices.yaml").write_text('currency: EUR\nhour: {cpu: 0.36, "cuda: Big": 10}\n')
    page = write_costs(project).read_text(encoding="utf-8")
    numbers = json.loads((project / ".posttrain" / "costs" / "costs.json").read_text())
    money = {row["name"]: row["money"] for row in numbers["runs"]}
    # 10 s and 8 s at 0.36 an hour; 36 s at 10 an hour; a device without a price
    assert money == {
        "sft": pytest.approx(0.001),
        "align-grpo-0": pytest.approx(0.0008),
        "reward": pytest.approx(0.1),
        "base": None,
    }
    assert (numbers["currency"], numbers["money"]) == ("EUR", pytest.approx(0.1018))
    assert "Together 0.1018 EUR" in page
    assert "No price is listed for cuda: Odd." in page


def test_tokens_of_judges_have_their_price(project: Path) -> None:
    asked = {"kind": "judge", "time": 20.0, "model": "referee", "prompt_tokens": 200_000, "completion_tokens": 10_000}
    measured(project, "align-ppo-0", "d", "align@ppo-0", {"kind": "start", "time": 10.0}, asked, asked,
             {"kind": "start", "time": 30.0}, asked | {"time": 40.0}, {"kind": "end", "time": 40.0})  # fmt: skip
    (project / "prices.yaml").write_text("currency: EUR\nhour: {cpu: 0.36}\n")

    def written() -> tuple[str, dict[str, Any], float]:
        page = write_costs(project).read_text(encoding="utf-8")
        numbers = json.loads((project / ".posttrain" / "costs" / "costs.json").read_text())
        return page, next(row for row in numbers["runs"] if row["name"] == "align-ppo-0"), numbers["money"]

    page, row, total = written()
    assert (row["money"], row["judge_money"]) == (None, None)
    assert total == pytest.approx(0.0018), "sft and grpo asked no judge"
    assert "No price is listed for referee." in page
    with (project / "prices.yaml").open("a") as listed:
        listed.write("judge_tokens: {referee: {input: 0.5, output: 2}}\n")
    page, row, total = written()
    # 600,000 tokens of questions at 0.5 a million, 30,000 of replies at 2; 20 s at 0.36 an hour
    assert row["judges"] == {"referee": {"input": 600_000, "output": 30_000}}
    assert row["judge_money"] == pytest.approx(0.36)
    assert row["money"] == pytest.approx(0.362)
    assert total == pytest.approx(0.3638)
    assert "referee: 600,000 + 30,000" in page
    assert "No price is listed" not in page


def test_co2_is_energy_times_the_grids_factor(project: Path) -> None:
    measured(project, "reward", "d", "reward", {"kind": "start", "time": 10.0},
             {"kind": "ready", "time": 20.0, "device": "cuda: Big"}, {"kind": "end", "time": 56.0})  # fmt: skip
    (project / "prices.yaml").write_text('currency: EUR\nhour: {}\ngrams_per_kwh: 400\nwatts: {"cuda: Big": 700}\n')
    page = write_costs(project).read_text(encoding="utf-8")
    numbers = json.loads((project / ".posttrain" / "costs" / "costs.json").read_text())
    grams = {row["name"]: row["co2_grams"] for row in numbers["runs"]}
    # 36 s at 700 W are 0.007 kWh; the others have no counters, and no stated power
    assert grams == {"sft": None, "align-grpo-0": None, "reward": pytest.approx(2.8)}
    assert numbers["co2_grams"] == pytest.approx(2.8)
    assert "Together 2.8 g of CO₂" in page
    assert "Unknown energy: cpu." in page


def test_a_point_costs_the_mean_run_divided_by_the_gain_over_sft() -> None:
    rows = [
        {"name": name, "seconds": seconds, "money": money, "joules": None, "co2_grams": 0.5}
        for name, seconds, money in (
            ("align-grpo-0", 10.0, 0.2),
            ("align-grpo-1", 30.0, None),
            ("align-ppo-0", 5.0, 0.1),
        )
    ]
    models = {
        name: {"greedy_accuracy": {"mean": mean}}
        for name, mean in (("base", 0.0), ("sft", 0.4), ("grpo", 0.45), ("ppo", 0.4), ("dpo", 0.9))
    }
    grpo, ppo = per_point(rows, models, "greedy_accuracy")
    # 20 s a run for 5 points; a seed without a price leaves the money unknown; ppo gained nothing; dpo was not measured here
    assert grpo == {
        "name": "grpo", "gain": pytest.approx(5.0), "seconds": pytest.approx(4.0), "money": None, "joules": None,
        "co2_grams": pytest.approx(0.1),
    }  # fmt: skip
    assert ppo == {"name": "ppo", "gain": 0.0, "seconds": None, "money": None, "joules": None, "co2_grams": None}


def test_the_energy_of_a_gpu_counts_and_a_gpu_without_a_counter_leaves_it_unknown(project: Path) -> None:
    cpu, gpu = ("package-0", 1_000_000), ("gpu GPU-1", 5_000_000)

    def energy(after: float, *counters: tuple[str, int]) -> dict[str, Any]:
        return {"energy": {name: [round(start + after), 2**60] for name, start in counters}}

    for name, ready in (("reward", (cpu, gpu)), ("base", (cpu,))):
        measured(project, name, name[0], name, {"kind": "start", "time": 10.0} | energy(0, cpu),
                 {"kind": "ready", "time": 20.0, "device": "cuda: Big"} | energy(0, *ready),
                 {"kind": "end", "time": 56.0} | energy(2e6, *ready))  # fmt: skip
    joules = {run.name: run.joules for run in newest(all_runs(project))}
    assert (joules["reward"], joules["base"]) == (4.0, None)


def test_without_nvidias_driver_a_gpu_has_no_counter() -> None:
    if ctypes.util.find_library("nvidia-ml"):
        pytest.skip("this machine has NVIDIA's driver")
    assert nvml_counters(["GPU-00000000-0000-0000-0000-000000000000"]) == {}
    assert gpu_counters() == {}


@pytest.mark.parametrize(
    "text",
    ["hour: {cpu: 1}", "currency: EUR\nhour: {cpu: much}", "currency: EUR\nhour: {cpu: -1}", "[]",
     "currency: EUR\nhour: {}\ngrams_per_kwh: -1",
     "currency: EUR\nhour: {}\njudge_tokens: {referee: {input: 1}}", "currency: EUR\nhour: {}\njudge_tokens: [referee]",
     "currency: EUR\nhour: []", "currency: EUR\nwatts: 5", "currency: EUR\nhour: {}\nkwh: 5"],
)  # fmt: skip
def test_a_list_of_prices_in_another_form_is_refused(project: Path, text: str) -> None:
    (project / "prices.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"prices\.yaml: must have `currency`"):
        write_costs(project)


def test_the_report_says_which_model_people_preferred(tmp_path: Path) -> None:
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "index.html").write_text(f"<main>{COST_SECTION}</main>")
    numbers = {"models": {}, "best": None, "headline": "sampled_accuracy", "accuracy_source": "answer"}
    (tmp_path / "report" / "comparison.json").write_text(json.dumps(numbers))
    write_costs(tmp_path)
    copied = tmp_path / ".posttrain" / "report.html"
    assert "What people preferred" not in copied.read_text()
    session(tmp_path, "monday", *(judgement(prompt, 0, NEW, OLD) for prompt in "abc"), judgement("d", "tie", NEW, OLD))
    write_costs(tmp_path)
    shown = copied.read_text()
    # aa.dir comes before bb.dir: the champion won half of one of four comparisons
    assert '<th scope="row">champion</th><td class="text">grpo-0</td><td>12.5 %</td>' in shown
    assert shown.index("What people preferred") < shown.index("</main>")


def test_without_measurements_the_page_says_so(tmp_path: Path) -> None:
    page = write_costs(tmp_path).read_text(encoding="utf-8")
    assert "No flow has run in this copy" in page
    assert "No run has been measured" in page


def test_a_flow_that_found_nothing_stale_has_no_share(project: Path) -> None:
    record = {"started": 0.0, "ended": 2.0, "stages": {"sft": {"started": 1.0, "ended": 1.0, "ran": False}}}
    (project / ".posttrain" / "flow.json").write_text(json.dumps(record))
    flow = flow_time(project, all_runs(project))
    assert flow is not None
    assert flow.share is None
    assert "found every stage up to date" in write_costs(project).read_text(encoding="utf-8")


def test_a_damaged_record_is_named(project: Path, root: Path) -> None:
    (project / ".posttrain" / "flow.json").write_text('{"started": 1}')
    with pytest.raises(TrackingError, match=r"flow.json: not a record of a flow"):
        write_costs(project)
    (project / "params.yaml").write_text("")
    command = [sys.executable, "-m", "pipelines.report.costs"]
    done = subprocess.run(
        command, cwd=project, env={"PYTHONPATH": str(root)}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert done.stderr.startswith("error: ")


def test_spans() -> None:
    assert union([(0, 2), (1, 3), (5, 6), (5.5, 5.7)]) == 4
    assert union([]) == 0
    assert overlap((0, 5), (3, 9)) == (3, 5)
    assert overlap((0, 1), (3, 9)) == (3, 3)
