"""A training run in MLflow answers the question: its result, its cost, its settings, and the tags to group it by."""

from __future__ import annotations

import base64
import json
import math
import shutil
import zlib
from pathlib import Path
from typing import Any

import pytest

from pipelines.config.effective import effective_parameters
from pipelines.config.params import load_params
from pipelines.runtime.journal import Journal, encode, read
from pipelines.runtime.param_tracking import declared_values
from pipelines.runtime.ranking import RECORD
from pipelines.runtime.ranking import encode as ranking
from pipelines.tracking import describe
from pipelines.tracking.projection import Projector
from pipelines.tracking.source import RecordedRun, discover, load
from pipelines.tracking.store import open_client
from pipelines.tracking.views import VIEW_TAG, experiment_tags

SFT_DIGEST, RM_DIGEST = "5" * 64, "6" * 64
STARTS = {"models/sft": SFT_DIGEST, "models/reward": RM_DIGEST}
RESULT = {"greedy_accuracy": 0.75, "greedy_accuracy_low": 0.5, "greedy_accuracy_high": 0.875, "sampled_accuracy": 0.625,
          "sampled_accuracy_low": 0.6, "sampled_accuracy_high": 0.65, "reward/answer/mean": 0.625,
          "reward/answer/low": 0.6, "reward/answer/high": 0.65, "kl/ref_k1": 2.5}  # fmt: skip
END = {"kind": "end", "status": "FINISHED"}


def start(stage: str, name: str, arguments: dict[str, Any], inputs: dict[str, str]) -> dict[str, Any]:
    run = f"{stage}-{name}-{'0' * 16}"
    return {"kind": "start", "stage": stage, "name": f"{stage}-{name}", "key": "0" * 64, "run": run,
            "arguments": arguments, "directory": f"runs/{stage}/{name}", "inputs": inputs}  # fmt: skip


def write(folder: Path, *records: dict[str, Any]) -> None:
    journal = Journal(folder / "journal.jsonl")
    for record in records:
        journal.append(record)
    journal.close()


@pytest.fixture
def project(tmp_path: Path, root: Path) -> Path:
    """An align run of grpo with two steps, and the evaluation of its model; dpo's evaluation is of a model that is gone."""
    (tmp_path / "params.yaml").write_bytes((root / "params.yaml").read_bytes())
    model = {"kind": "model", "path": "models/align/grpo-0", "sha256": "a" * 64, "content": "b" * 64, "files": {}}
    steps = [
        {"kind": "metrics", "step": step, "values": {"loss": 1 / step, "tokens/trained": 100.0 * step}}
        for step in (1, 2)
    ]
    summary = {"kind": "summary", "values": {"loss": 0.5, "steps": 2}}
    write(tmp_path / "runs/align/grpo-0", start("align", "grpo-0", {"algorithm": "grpo", "seed": 0}, STARTS), *steps, model,
          summary, END)  # fmt: skip
    evaluated = STARTS | {"models/align/grpo-0": "b" * 64}
    done = {"kind": "summary", "values": RESULT}
    write(
        tmp_path / "runs/evaluate/grpo-0",
        start("evaluate", "grpo-0", {"model": "grpo-0"}, evaluated),
        {"kind": "params", "values": {"evaluation.accuracy": "answer"}},
        done,
        END,
    )
    return tmp_path


def found(project: Path, stage: str) -> RecordedRun:
    (run,) = (source for source in discover(project, []) if source.start["stage"] == stage)
    return run


def test_the_align_run_has_the_results_of_exactly_its_model(project: Path) -> None:
    values = found(project, "align").metrics
    assert values["eval/greedy_accuracy", 0] == 0.75
    assert values["eval/sampled_accuracy", 0] == 0.625
    assert values["eval/kl_ref_k1", 0] == 2.5
    assert values["cost/tokens_trained", 0] == 200.0
    assert values["steps", 2] == 2
    assert not [name for name, _ in values if name.startswith("final/")]
    journal = project / "runs/evaluate/grpo-0/journal.jsonl"
    journal.write_text("".join(map(encode, read(journal))).replace("b" * 64, "c" * 64))
    assert ("eval/greedy_accuracy", 0) not in found(project, "align").metrics


def test_align_and_evaluate_runs_share_the_tags_to_group_by(project: Path) -> None:
    aligned, evaluated = (describe.tags(found(project, stage), project) for stage in ("align", "evaluate"))
    for name in ("algorithm", "seed", "study", "protocol", "mlflow.runColor"):
        assert aligned[name] == evaluated[name], name
    assert (aligned["algorithm"], aligned["seed"], aligned["study"]) == ("grpo", "0", "posttrain")
    assert (
        " Sampled accuracy: **62.5 %** (95 % interval 60.0 to 65.0 %)."
        " Greedy accuracy: **75.0 %** (95 % interval 50.0 to 87.5 %)."
    ) in aligned["mlflow.note.content"]


def test_the_cost_of_a_run_and_of_a_point_over_sft_are_tags(project: Path) -> None:
    done = {"kind": "summary", "values": RESULT | {"sampled_accuracy": 0.375, "reward/answer/mean": 0.375}}
    write(
        project / "runs/evaluate/sft", start("evaluate", "sft", {"model": "sft"}, {"models/sft": SFT_DIGEST}), done, END
    )
    times = [{"kind": "start", "time": 100.0}, {"kind": "end", "time": 150.0}]
    (project / "runs/align/grpo-0/measurements.jsonl").write_text("".join(json.dumps(each) + "\n" for each in times))

    def costs() -> dict[str, str]:
        found = describe.tags(next(s for s in discover(project, []) if s.start["stage"] == "align"), project)
        return {name.removeprefix("cost."): value for name, value in found.items() if name.startswith("cost.")}

    # 50 s for 0.625 - 0.375 = 25 points
    assert costs() == {"seconds_per_point": "2 s"}
    (project / "prices.yaml").write_text("currency: EUR\nhour: {cpu: 7.2}\n")
    assert costs() == {"seconds_per_point": "2 s", "money": "0.1 EUR", "money_per_point": "0.004 EUR"}
    asked = {"kind": "judge", "time": 120.0, "model": "referee", "prompt_tokens": 100_000, "completion_tokens": 50_000}
    lines = [json.dumps(each) + "\n" for each in (times[0], asked, times[1])]
    (project / "runs/align/grpo-0/measurements.jsonl").write_text("".join(lines))
    assert costs() == {"seconds_per_point": "2 s"}, "the price of a judge is not listed"
    (project / "prices.yaml").write_text(
        "currency: EUR\nhour: {cpu: 7.2}\njudge_tokens: {referee: {input: 1, output: 4}}\n"
    )
    judged = {"money": "0.4 EUR", "money_per_point": "0.016 EUR", "judge_money": "0.3 EUR"}
    assert costs() == {"seconds_per_point": "2 s", "judge_money_per_point": "0.012 EUR"} | judged
    timings = next(s for s in discover(project, []) if s.start["stage"] == "align").timings
    assert (timings[("cost/judge_tokens_input", 0)], timings[("cost/judge_tokens_output", 0)]) == (100_000, 50_000)
    (project / "prices.yaml").write_text("currency: EUR\nhour: {cpu: 7.2}\n")
    (project / "runs/align/grpo-0/measurements.jsonl").write_text("".join(json.dumps(each) + "\n" for each in times))
    shipped = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(shipped.replace("headline: sampled ", "headline: greedy "))
    assert costs() == {"money": "0.1 EUR"}, "both are right on 75 % of the greedy answers"


def test_stored_evaluations_with_the_old_names_get_the_present_ones(project: Path) -> None:
    old = {
        "accuracy": 0.5,
        "accuracy_low": 0.25,
        "accuracy_high": 0.75,
        "reward/answer/mean": 0.375,
        "reward/rm/mean": 2.0,
    }
    journal = project / "runs/evaluate/grpo-0/journal.jsonl"
    kept = [record for record in read(journal) if record["kind"] != "summary"]
    journal.write_text("".join(map(encode, [*kept[:-1], {"kind": "summary", "values": old}, kept[-1]])))
    evaluated, aligned = (found(project, stage).metrics for stage in ("evaluate", "align"))
    assert evaluated == {
        ("greedy_accuracy", 0): 0.5, ("greedy_accuracy_low", 0): 0.25, ("greedy_accuracy_high", 0): 0.75,
        ("sampled_accuracy", 0): 0.375, ("reward/rm/mean", 0): 2.0,
    }  # fmt: skip
    assert aligned["eval/sampled_accuracy", 0] == 0.375
    assert aligned["eval/reward_rm", 0] == 2.0
    assert not {"eval/accuracy", "eval/reward_answer"} & {name for name, _ in aligned}


def compared(project: Path, words: str, name: str = "one", measure: str = "sampled_accuracy") -> None:
    """Write a finished comparison that gave the align run this place."""
    tags = {"kind": "tags", "values": {RECORD: ranking(measure, {found(project, "align").identity: words})}}
    begin = start("compare", name, {}, {})
    shutil.rmtree(project / "runs/compare", ignore_errors=True)
    write(project / "runs/compare", begin, tags, END)


def test_only_a_ranked_run_has_the_metric_that_sorts_the_table(project: Path, empty_store: Path) -> None:
    shutil.copy(empty_store, project / "mlflow.db")
    store, projector = open_client(project), Projector(open_client(project), project)

    def shown() -> tuple[str | None, float | None, str]:
        run = store.get_run(projector.project(found(project, "align")))
        place = run.data.tags.get("ranked")
        return place, run.data.metrics.get("ranked/sampled_accuracy"), run.data.tags["mlflow.note.content"]

    assert shown()[:2] == (None, None), "no comparison has read the run yet"
    assert saved_state(project)["orderByKey"] == "metrics.`eval/sampled_accuracy`"
    compared(project, "2 of 3")
    place, value, words = shown()
    assert (place, value) == ("2 of 3", 0.625)
    assert "Its algorithm ranks **2 of 3** by sampled accuracy in the last comparison." in words
    assert saved_state(project)["orderByKey"] == "metrics.`ranked/sampled_accuracy`"
    charts = [chart["metricKey"] for chart in saved_state(project)["compareRunCharts"][1:]]
    assert charts[:2] == ["ranked/sampled_accuracy", "eval/sampled_accuracy"]
    compared(project, "not ranked: trained on reward rm", "two")
    place, value, words = shown()
    assert place == "not ranked: trained on reward rm"
    assert value is not None
    assert math.isnan(value), "MLflow keeps every value, and sorts NaN last"
    assert "**Not ranked: trained on reward rm**" in words
    compared(project, "1 of 2", "three")
    assert shown()[:2] == ("1 of 2", 0.625)
    write(project / ".posttrain/runs/later", start("compare", "four", {}, {}), END)
    shutil.copytree(project / "runs/compare", project / ".posttrain/runs/earlier")
    shutil.rmtree(project / "runs/compare")
    write(project / "runs/compare", start("compare", "four", {}, {}), END)
    place, value, _ = shown()
    assert place == "not ranked: not in the last comparison"
    assert value is not None
    assert math.isnan(value)
    shutil.rmtree(project / ".posttrain/runs/later")
    compared(project, "1 of 2", "three")
    first = store.get_run(projector.project(found(project, "align"))).info.run_id
    assert shown()[:2] == ("1 of 2", 0.625)
    other = Projector(open_client(project), project)
    assert other.project(found(project, "align")) == first
    assert len(store.get_metric_history(first, "ranked/sampled_accuracy")) == 5, "a copy of the same journals adds none"


def test_a_resent_run_without_its_evaluation_keeps_the_results_that_are_stored(project: Path) -> None:
    alone = load(project / "runs/align/grpo-0")
    assert alone is not None
    assert alone.digest == found(project, "align").digest
    assert describe.EVALUATION_TAG not in describe.tags(alone, project)


def saved_state(project: Path) -> dict[str, Any]:
    """Return the state of the saved view."""
    saved = json.loads(experiment_tags("7", discover(project, []), "eval/sampled_accuracy")[VIEW_TAG])["state"]
    state: dict[str, Any] = json.loads(zlib.decompress(base64.b64decode(saved.removeprefix("deflate;"))))
    return state


def test_the_saved_view_puts_results_and_rewards_first(project: Path) -> None:
    tags = experiment_tags("7", discover(project, []), "eval/sampled_accuracy")
    view = json.loads(tags[VIEW_TAG])
    state = json.loads(zlib.decompress(base64.b64decode(view["state"].removeprefix("deflate;"))))
    assert len(tags[VIEW_TAG]) < 20_000
    sections = {section["uuid"]: section["name"] for section in state["compareRunSections"]}
    assert list(sections.values()) == ["Result on held-out problems", "Loss", "Cost", "More"]
    charts = [
        (chart["metricKey"], chart["type"], sections[chart["metricSectionId"]])
        for chart in state["compareRunCharts"][1:]
    ]
    assert charts[0] == ("eval/sampled_accuracy", "BAR", "Result on held-out problems")
    assert ("loss", "LINE", "Loss") in charts
    assert state["compareRunCharts"][0]["selectedMetrics"] == ["eval/sampled_accuracy"]
    assert "metrics.`eval/greedy_accuracy`" in state["selectedColumns"]
    assert state["orderByKey"] == "metrics.`eval/sampled_accuracy`"
    # one run of one algorithm: nothing to average
    assert state["groupBy"] is None
    assert (
        "/#/experiments/7/runs?workflowType=machine_learning&viewStateShareKey=algorithms"
        in tags["mlflow.note.content"]
    )
    assert experiment_tags("7", [found(project, "evaluate")], "x") == {}


def test_models_and_tables_are_linked_to_the_run(project: Path, empty_store: Path) -> None:
    shutil.copy(empty_store, project / "mlflow.db")
    store, projector = open_client(project), Projector(open_client(project), project)
    source = found(project, "align")
    source.start["inputs"]["data/valid/sft.parquet"] = "d" * 64
    source.measurements.append({"kind": "timings", "step": 2, "time": 5.0, "values": {"memory/peak_mib": 512.0}})
    run = store.get_run(projector.project(source))
    assert run.data.metrics["system/memory/peak_mib"] == 512, (
        "the beginning that MLflow's page of system metrics asks for"
    )
    assert run.data.tags["mlflow.source.name"] == "python -m pipelines.align --algorithm grpo --seed 0"
    (table,) = run.inputs.dataset_inputs
    assert (table.dataset.name, table.dataset.digest) == ("sft", "d" * 32)
    (model,) = store.search_logged_models([run.info.experiment_id])
    assert (model.name, model.source_run_id, str(model.status)) == ("align-grpo-0", run.info.run_id, "READY")
    assert {metric.key: metric.value for metric in model.metrics}["eval/greedy_accuracy"] == 0.75
    assert run.data.metrics["eval/greedy_accuracy"] == 0.75
    assert projector.project(source) == run.info.run_id
    assert len(store.search_logged_models([run.info.experiment_id])) == 1


def effective(root: Path, algorithm: str) -> dict[str, Any]:
    params = load_params(root / "params.yaml")
    values = declared_values(params, ("align", "rewards", f"algorithms.{algorithm}"))
    return effective_parameters("align", {"algorithm": algorithm, "seed": 0}, values)


def test_hyper_parameters_have_one_name_and_only_those_that_were_used(root: Path) -> None:
    ppo, grpo, dpo, chord = (effective(root, name) for name in ("ppo", "grpo", "dpo", "chord"))
    params = load_params(root / "params.yaml").align
    assert (ppo["optimizer.learning_rate"], dpo["optimizer.learning_rate"]) == (
        params.on_policy.optimizer.learning_rate,
        params.preference.optimizer.learning_rate,
    )
    assert (ppo["kl_coefficient"], ppo["epochs"], ppo["clip_high"]) == (0.2, 2, 0.2)
    assert (grpo["kl_coefficient"], grpo["ratio"], grpo["aggregate"]) == (0.04, "token", "sequence_mean")
    assert (grpo["reward_weight.answer"], "reward_weight.rm" in grpo) == (1.0, False)
    assert dpo["beta"] == 0.1
    assert chord["mu_peak"] == 0.9
    assert chord["mu_decay_steps"] == 3 * chord["steps"] * chord["epochs"] * chord["minibatches"] // 4
    assert not {"mu_decay_steps", "critic_learning_rate", "lam", "kl_target", "refill_limit", "beta"} & grpo.keys()
    assert not {"samples_per_prompt", "clip_high", "temperature"} & dpo.keys()
    assert not [name for name in ppo if name.startswith(("align.", "algorithms.", "rewards.", "checkpoint."))]


def test_an_override_of_the_budget_replaces_the_default(root: Path) -> None:
    params = load_params(root / "params.yaml")
    values = declared_values(params, ("align", "rewards", "algorithms.gspo"))
    values["algorithms.gspo.budget.optimizer.learning_rate"] = 1e-3
    assert effective_parameters("align", {"algorithm": "gspo"}, values)["optimizer.learning_rate"] == 1e-3


def test_other_stages_use_the_same_names(root: Path) -> None:
    params = load_params(root / "params.yaml")
    sft = effective_parameters("sft", {}, declared_values(params, ("sft",)))
    assert sft["optimizer.learning_rate"] == params.sft.optimizer.learning_rate
    assert "lora" not in sft
    raw = declared_values(params, ("data",))
    assert effective_parameters("ingest", {}, raw) == raw


def test_a_preset_that_is_gone_keeps_the_names_of_the_journal() -> None:
    values = {"algorithms.old.preset": "withdrawn", "align.on_policy.steps": 3}
    assert effective_parameters("align", {"algorithm": "old"}, values) == values


def sweep(root: Path, *runs: tuple[str, int, dict[str, Any]]) -> list[RecordedRun]:
    """Return align runs of (algorithm, seed, changed parameters)."""
    params = load_params(root / "params.yaml")
    found = []
    for algorithm, seed, changed in runs:
        values = declared_values(params, ("align", "rewards", f"algorithms.{algorithm}")) | changed
        begin = start("align", f"{algorithm}-{seed}", {"algorithm": algorithm, "seed": seed}, STARTS)
        found.append(RecordedRun(root, [begin, {"kind": "params", "values": values}, END], [], "FINISHED"))
    return found


def view(sources: list[RecordedRun]) -> tuple[Any, list[str]]:
    """Return the grouping and the axes of the parallel coordinates of the saved view."""
    saved = json.loads(experiment_tags("7", sources, "eval/greedy_accuracy")[VIEW_TAG])["state"]
    state = json.loads(zlib.decompress(base64.b64decode(saved.removeprefix("deflate;"))))
    grouped = state["groupBy"] and [(key["mode"], key["groupByData"]) for key in state["groupBy"]["groupByKeys"]]
    return grouped, state["compareRunCharts"][0]["selectedParams"]


def test_runs_from_other_models_or_code_are_no_seeds_of_one_group(root: Path) -> None:
    runs = sweep(root, ("grpo", 0, {}), ("grpo", 1, {}), ("grpo", 0, {}))
    for other, key in (
        ({"models/sft": "9" * 64}, ("tag", "protocol")),
        ({"mine/r.py": "8" * 64}, ("param", "own_code")),
    ):
        inputs = [STARTS | {"mine/r.py": "7" * 64}] * 2 + [STARTS | {"mine/r.py": "7" * 64} | other]
        found = [
            RecordedRun(root, [{**run.start, "inputs": given}, *run.records[1:]], [], "FINISHED")
            for run, given in zip(runs, inputs, strict=True)
        ]
        grouped, axes = view(found)
        assert grouped == [("tag", "algorithm"), key]
        assert "own_code" not in axes, "no axis of numbers"


def test_seeds_are_grouped_and_a_sweep_stays_apart(root: Path) -> None:
    rate = "align.on_policy.optimizer.learning_rate"
    two_seeds = sweep(root, ("grpo", 0, {}), ("grpo", 1, {}), ("dpo", 0, {}))
    assert view(two_seeds) == ([("tag", "algorithm")], ["optimizer.learning_rate"]), "a preset is no number"
    one_seed = sweep(root, ("grpo", 0, {}), ("dpo", 0, {}))
    assert view(one_seed) == (None, ["optimizer.learning_rate", "preset"])
    rates = sweep(root, ("grpo", 0, {rate: 1e-3}), ("grpo", 0, {rate: 1e-4}))
    assert view(rates) == (None, ["optimizer.learning_rate"]), "the mean over learning rates would say nothing"
    both = sweep(root, *(("grpo", seed, {rate: value}) for seed in (0, 1) for value in (1e-3, 1e-4)))
    assert view(both) == ([("tag", "algorithm"), ("param", "optimizer.learning_rate")], ["optimizer.learning_rate"])
