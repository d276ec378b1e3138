"""The whole pipeline, really run: dvc repro in one clone, the Prefect flow in a second, and a third that pulls the results."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from dvc.repo import Repo
from mlflow.tracking import MlflowClient
from ruamel.yaml import YAML
from transformers import AutoModelForCausalLM

from pipelines.commands.chat import Chat, Sampling, has_template, open_models
from pipelines.runtime.identity import content_digest
from posttrain.api import Model
from tasks.dag import before_plan, changed, read_dag, stale
from tests.end_to_end.conftest import TINY, Clone
from tests.s3 import CREDENTIALS, serving

pytestmark = pytest.mark.timeout(900)
MODELS = ("base", "sft", "dpo-0", "grpo-0", "ppo-0")


def stages(clone: Clone) -> dict[str, object]:
    with Repo(str(clone.root)) as repo:
        return {stage.name: stage for stage in repo.index.stages}


def lock(clone: Clone) -> object:
    return YAML(typ="safe").load((clone.root / "dvc.lock").read_text(encoding="utf-8"))["stages"]


def test_every_stage_writes_journal_metrics_and_result(reproduced: Clone) -> None:
    for model in MODELS:
        metrics = json.loads((reproduced.root / "runs" / "evaluate" / model / "metrics.json").read_text())
        assert metrics["greedy_accuracy_low"] <= metrics["greedy_accuracy"] <= metrics["greedy_accuracy_high"]
        assert 8 * metrics["second_task"]["accuracy"] in range(9)
    page = (reproduced.root / "report" / "index.html").read_text(encoding="utf-8")
    assert all(name in page for name in ("dpo", "grpo", "ppo"))
    assert json.loads((reproduced.root / "report" / "comparison.json").read_text())
    assert sorted(p.suffix for p in (reproduced.root / "report").glob("*.png")) != []


def test_a_second_repro_runs_no_stage(reproduced: Clone) -> None:
    output = reproduced.repro()
    assert "Running stage" not in output
    assert "up to date" in output


def test_the_curves_have_one_row_per_step_and_the_objectives_start_where_they_must(reproduced: Clone) -> None:
    def curve(run: str) -> list[dict[str, str]]:
        with (reproduced.root / "runs" / run / "curves.csv").open(newline="") as file:
            return list(csv.DictReader(file))

    dpo, grpo = curve("align/dpo-0"), curve("align/grpo-0")
    assert float(dpo[0]["loss"]) == pytest.approx(0.693147, abs=1e-5)
    assert [row["step"] for row in grpo] == ["1", "2"]
    assert float(grpo[0]["kl/approx"]) == pytest.approx(0.0, abs=1e-7)
    assert float(grpo[0]["kl/ref_k3"]) == pytest.approx(0.0, abs=1e-6)
    assert float(grpo[0]["ratio/min"]) == float(grpo[0]["ratio/max"]) == 1.0
    assert float(grpo[0]["mismatch/max"]) < 1e-4


def test_what_a_stage_uses_is_what_it_declares(reproduced: Clone) -> None:
    """Every parameter leaf and every module that a step used is covered by dvc.yaml, and nothing is declared in vain."""
    declared = stages(reproduced)
    traces = [json.loads(line) for line in (reproduced.root / ".posttrain" / "trace.jsonl").read_text().splitlines()]
    assert len(traces) == len(declared)
    commands = {stage.cmd.split("-m ")[1]: name for name, stage in declared.items()}  # type: ignore[attr-defined]
    families: dict[str, list[Any]] = {}
    for trace in traces:
        families.setdefault(commands[_command(trace)].split("@")[0], []).append(trace)
    for family, members in sorted(families.items()):
        # the instances of a matrix share one declaration
        leaves = {leaf for trace in members for leaf in trace["params"]}
        modules = {
            m
            for trace in members
            for m in trace["modules"]
            if not any(m == p or m.startswith(p + "/") for p in PLUMBING)
        }
        deps = [d for name, stage in declared.items() if name.split("@")[0] == family for d in stage.deps]  # type: ignore[attr-defined]
        prefixes = {p for d in deps if d.def_path == "params.yaml" for p in d.params}
        paths = {d.def_path for d in deps}
        undeclared = sorted(leaf for leaf in leaves if not any(leaf == p or leaf.startswith(p + ".") for p in prefixes))
        unread = sorted(p for p in prefixes if not any(leaf == p or leaf.startswith(p + ".") for leaf in leaves))
        uncovered = sorted(m for m in modules if not any(m == p or m.startswith(p + "/") for p in paths))
        code = {p for p in paths if p.startswith(("pipelines", "posttrain"))}
        code -= (
            {"posttrain/environments"} if family == "reward_readers" else set()
        )  # own code is recorded, not imported
        unused = sorted(p for p in code if not any(m == p or m.startswith(p + "/") for m in modules))
        # messages of every step use posttrain/text.py; ingest and validate, which compare texts by it, declare it. posttrain/extras.py
        # and posttrain/combinations.py only refuse
        free = ("posttrain/algorithms/", "posttrain/text.py", "posttrain/extras.py", "posttrain/combinations.py")
        missing = [m for m in uncovered if not (m.startswith(free) or m.endswith("__init__.py"))]
        assert (family, undeclared, unread, missing, unused) == (family, [], [], [], [])


# How a run is started, checked, recorded and tracked: no part of what a stage computes, so no reason to run one again. The records of
# posttrain/algorithms count as such too, but for the align stage, which declares them.
PLUMBING = (
    "pipelines/__init__.py",
    "pipelines/config",
    "pipelines/runtime",
    "posttrain/__init__.py",
    "posttrain/api_arguments.py",
    "posttrain/data/__init__.py",
    "posttrain/data/teacher_prompts.py",  # params.yaml is checked for templates without a prompt
    "posttrain/environments/base.py",  # params.yaml is checked for unknown environments
    "posttrain/environments/checked.py",
    "posttrain/environments/parts.py",
    "posttrain/errors.py",
    "posttrain/files.py",
    "posttrain/guard.py",
    "posttrain/network.py",
    "posttrain/settings.py",
)


def _command(trace: dict[str, str]) -> str:
    stage, variant = trace["stage"], trace["name"].removeprefix(trace["stage"]).removeprefix("-")
    algorithm, _, seed = variant.rpartition("-")
    if algorithm:
        return f"pipelines.{stage} --algorithm {algorithm} --seed {seed}"
    return f"pipelines.{stage} --model {variant}" if variant else f"pipelines.{stage}"


def test_changing_one_algorithm_makes_only_its_branch_stale(reproduced: Clone) -> None:
    params = reproduced.root / "params.yaml"
    before, locked = params.read_text(encoding="utf-8"), (reproduced.root / "dvc.lock").read_bytes()
    try:
        reproduced.configure("algorithms.ppo.options.kl_coefficient=0.3")
        early = before_plan(read_dag(reproduced.root), changed(reproduced.root))
        records = reproduced.repro("--single-item", *early, POSTTRAIN_FOLLOWER="1")
        planned = stale(read_dag(reproduced.root), changed(reproduced.root))
    finally:
        params.write_text(before, encoding="utf-8")
        (reproduced.root / "dvc.lock").write_bytes(locked)
        reproduced.run("dvc", "checkout", "-q")
    assert early == {"reward_readers"}
    assert "Running stage 'reward_readers'" in records
    assert planned == {"align@ppo-0", "evaluate_aligned@ppo-0", "compare"}


def test_dvc_sees_an_edit_of_own_code(reproduced: Clone) -> None:
    root, kept = reproduced.root, {name: (reproduced.root / name).read_bytes() for name in ("params.yaml", "dvc.lock")}
    (root / "mine").mkdir()
    (root / "mine/rewards.py").write_text("def f(prompts, completions, **_):\n    return [1.0]\n")
    try:
        reproduced.configure("rewards.mine.function=mine.rewards:f", "algorithms.grpo.rewards.mine=0.1")
        reproduced.repro("--single-item", "reward_readers", POSTTRAIN_FOLLOWER="1")
        (root / "mine/rewards.py").write_text("def f(prompts, completions, **_):\n    return [0.5]\n")
        status = json.loads(reproduced.run("dvc", "status", "--json", "reward_readers").stdout)["reward_readers"]
    finally:
        for name, content in kept.items():
            (root / name).write_bytes(content)
        shutil.rmtree(root / "mine")
        reproduced.run("dvc", "checkout", "-q")
    assert status == [{"changed deps": {"mine": "modified"}}]


def test_a_new_reward_model_leaves_algorithms_that_do_not_read_it_up_to_date(reproduced: Clone) -> None:
    """Ask DVC for the stale stages; and a step that is started by hand refuses the model that its record does not name."""
    root, kept = reproduced.root, {name: (reproduced.root / name).read_bytes() for name in ("params.yaml", "dvc.lock")}
    record, aligned = root / "runs/reward_readers/artifacts/algorithms", ("align@dpo-0", "align@grpo-0", "align@ppo-0")
    try:
        reproduced.configure("reward.optimizer.learning_rate=5e-4")
        # POSTTRAIN_FOLLOWER keeps these runs out of MLflow, whose runs a later test counts
        reproduced.repro("--single-item", "reward", POSTTRAIN_FOLLOWER="1")
        ppo = ("pipelines.align", "--algorithm", "ppo", "--seed", "0")
        by_hand = reproduced.run(*ppo, check=False, POSTTRAIN_FOLLOWER="1")
        reproduced.repro("--single-item", "reward_readers", POSTTRAIN_FOLLOWER="1")
        status = json.loads(reproduced.run("dvc", "status", "--json", *aligned).stdout)
        planned = stale(read_dag(root), changed(root))
        unread = json.loads((record / "dpo.json").read_text(encoding="utf-8"))
        read = json.loads((record / "ppo.json").read_text(encoding="utf-8"))
        digest = content_digest(root / "models/reward")
    finally:
        for name, content in kept.items():
            (root / name).write_bytes(content)
        reproduced.run("dvc", "checkout", "-q")
    # grpo measures the reward model with the weight 0
    assert set(status) == {"align@grpo-0", "align@ppo-0"}
    assert status["align@ppo-0"] == [{"changed deps": {f"{record.relative_to(root)}/ppo.json": "modified"}}]
    assert "align@dpo-0" not in planned
    assert {"align@ppo-0", "evaluate_aligned@ppo-0", "evaluate_aligned@dpo-0", "compare"} < planned
    assert (unread, read) == ({}, {"models/reward": digest})
    assert by_hand.returncode == 2
    assert "Type `dvc repro reward_readers`, then repeat the command." in by_hand.stderr


def test_the_champions_weights_give_the_answers_that_its_evaluation_gave(reproduced: Clone) -> None:
    reproduced.run("pipelines.gate", "--champion", "models/align/grpo-0", "--champion-name", "version 1",
                   "--candidates", "grpo-0", "ppo-0", POSTTRAIN_FOLLOWER="1")  # fmt: skip
    folder = reproduced.root / "runs" / "gate" / "artifacts"
    evaluated = reproduced.root / "runs" / "evaluate" / "grpo-0" / "artifacts" / "predictions.parquet"
    assert pq.read_table(folder / "champion.parquet").equals(pq.read_table(evaluated))
    decision = json.loads((folder / "decision.json").read_text(encoding="utf-8"))
    assert decision["reference"] == "version 1"
    itself = next(candidate for candidate in decision["candidates"] if candidate["name"] == "grpo-0")
    values = {check["name"]: check["value"] for check in itself["checks"]}
    assert (values["loss"], values["length"], values["divergence/rm"]) == (0.0, 1.0, 0.0)
    page = (folder / "decision.html").read_text(encoding="utf-8")
    assert all(f"<h2>{name} against version 1</h2>" in page for name in ("grpo-0", "ppo-0"))
    assert ("<h1>Promote" in page) == decision["promote"]


def test_metrics_diff_and_plots_work(reproduced: Clone) -> None:
    shown = json.loads(reproduced.run("dvc", "metrics", "show", "--json").stdout)[""]["data"]
    # the headline of five models and the number of tests and of significant ones, and nothing else
    (numbers,) = (entry["data"] for entry in shown.values())
    assert set(shown) == {"runs/compare/metrics.json"}
    assert set(numbers) == {"sampled_accuracy", "pairs"}
    assert set(numbers["sampled_accuracy"]) == {"base", "sft", "dpo", "grpo", "ppo"}
    assert reproduced.run("dvc", "metrics", "diff").returncode == 0
    reproduced.run("dvc", "plots", "show", "-o", ".posttrain/plots")
    assert "curves.csv" in (reproduced.root / ".posttrain" / "plots" / "index.html").read_text(encoding="utf-8")


def test_a_model_leads_to_its_data_and_a_row_to_its_models(reproduced: Clone) -> None:
    def lineage(*arguments: str) -> Any:
        return json.loads(reproduced.run("pipelines.commands.lineage", *arguments, "--json").stdout)

    found = lineage("ppo-0")
    stages = [entry["stage"] for entry in found["stages"]]
    assert stages[0] == "align --algorithm ppo --seed 0"
    assert set(stages[1:]) == {"validate", "reward_readers", "reward", "sft", "ingest", "base"}
    without = {entry["stage"] for entry in lineage("dpo-0")["stages"][1:]}
    assert without == {"validate", "sft", "ingest", "base"}
    outputs = {out["path"]: out["md5"] for stage in lock(reproduced).values() for out in stage["outs"]}  # type: ignore[attr-defined]
    assert found["model"] == {"path": "models/align/ppo-0", "md5": outputs["models/align/ppo-0"]}
    assert all(model["md5"] == outputs[model["path"]] for model in found["models"])
    rows = {table["path"]: table["rows"] for table in found["tables"]}
    assert rows["data/valid/sft.parquet"] == pq.read_metadata(reproduced.root / "data/valid/sft.parquet").num_rows
    trained = {model["path"] for model in lineage("--row", "sft:0")["models"]}
    assert trained == {"models/sft", "models/reward", *(f"models/align/{name}" for name in MODELS[2:])}
    assert {model["path"] for model in lineage("--row", "evaluation:0")["models"]} == set()


def test_models_load_with_transformers(reproduced: Clone) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    folder = reproduced.root / "models" / "align" / "grpo-0"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer("17+48=", return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=4).shape[1] <= ids["input_ids"].shape[1] + 4
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id != tokenizer.pad_token_id
    assert (
        AutoModelForSequenceClassification.from_pretrained(reproduced.root / "models" / "reward").config.num_labels == 1
    )
    assert "arXiv 2402.03300" in (folder / "README.md").read_text(encoding="utf-8")


def test_every_model_folder_that_a_run_writes_can_be_talked_to(reproduced: Clone) -> None:
    folders = sorted(path.parent for path in (reproduced.root / "models").rglob("config.json"))
    talking = [folder for folder in folders if folder != reproduced.root / "models/reward"]
    assert [folder.relative_to(reproduced.root / "models").parts[0] for folder in talking] == sorted(
        ["base", "sft", *["align"] * (len(talking) - 2)]
    )
    assert len(talking) >= 5
    settings = Sampling(temperature=0.0, max_new_tokens=6)
    for folder in talking:
        ((name, model),) = open_models(reproduced.root, [str(folder)])
        # a template that the model was not trained with would be answered with noise
        assert folder.name == "base" or not has_template(model)
        lines, written = iter(["17+48=", "/quit"]), list[str]()
        chat = Chat(
            [(name, model)], settings, reproduced.root / "inbox", lambda _, lines=lines: next(lines), written.append
        )  # type: ignore[misc]
        chat.run()
        assert written[0] == f"{name}> "
        assert chat.turns == 1
        if not has_template(model):
            assert "".join(written[1:]).strip("\n") == model.encoder.text(greedy(model, "17+48=", 6))


def greedy(model: Model, prompt: str, count: int) -> list[int]:
    """Return the most probable continuation, one forward pass a token, up to the end of the answer."""
    ids = list(model.encoder.prompt(prompt))
    start = len(ids)
    while len(ids) < start + count and not (ids[start:] and ids[-1] in model.encoder.ends):
        with torch.no_grad():
            ids.append(int(model.lm(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[start:]


def test_mlflow_holds_one_run_per_stage_with_every_metric_at_every_step(reproduced: Clone) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{reproduced.root / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("posttrain")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], max_results=100)
    assert len(runs) == len(stages(reproduced))
    assert {run.info.status for run in runs} == {"FINISHED"}
    aligned = {run.data.tags["algorithm"]: run for run in runs if run.data.tags["stage"] == "align"}
    assert set(aligned) == {"dpo", "grpo", "ppo"}
    history = client.get_metric_history(aligned["ppo"].info.run_id, "reward/answer/mean")
    journal = [
        json.loads(line) for line in (reproduced.root / "runs/align/ppo-0/journal.jsonl").read_text().splitlines()
    ]
    written = [(r["step"], r["values"]["reward/answer/mean"]) for r in journal if r["kind"] == "metrics"]
    assert sorted((m.step, m.value) for m in history) == written
    assert aligned["ppo"].data.params["kl_coefficient"] == "0.2"


def test_a_step_without_a_warm_process_gives_the_same_lock(reproduced: Clone) -> None:
    before = lock(reproduced)
    output = reproduced.repro("--single-item", "--force", "sft", POSTTRAIN_FOLLOWER="1", POSTTRAIN_WARM="")
    assert "Running stage 'sft'" in output
    assert lock(reproduced) == before


def test_the_flow_in_another_clone_gives_the_same_lock(reproduced: Clone, new_clone: Callable[[], Clone]) -> None:
    """Same parameters, data and code: the same bytes, weights included, whichever of the two ran them and in which order."""
    other = new_clone()
    other.configure(str(TINY))
    output = other.run("flows.compare").stdout
    assert "report" in output
    assert lock(other) == lock(reproduced)
    assert (other.root / ".posttrain" / "costs" / "index.html").exists()
    weights = Path("models/align/ppo-0/model.safetensors")
    assert (other.root / weights).read_bytes() == (reproduced.root / weights).read_bytes()


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with serving("depot") as url:
        yield url


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.slow)])
def remote(request: pytest.FixtureRequest, tmp_path: Path) -> list[tuple[str, ...]]:
    """Return the `dvc` commands that make the remote known to a clone. They write to config.local, which git does not see."""
    if request.param == "folder":
        return [("remote", "add", "--local", "-d", "depot", str(tmp_path / "depot"))]
    url = request.getfixturevalue("s3")
    return [
        ("remote", "add", "--local", "-d", "depot", "s3://depot/posttrain"),
        ("remote", "modify", "--local", "depot", "endpointurl", url),
    ]


@pytest.mark.servers
def test_a_fresh_clone_pulls_and_runs_nothing(reproduced: Clone, remote: list[tuple[str, ...]], tmp_path: Path) -> None:
    other = Clone(tmp_path / "clone", reproduced.warm)
    subprocess.run(["git", "clone", "-q", str(reproduced.root), str(other.root)], check=True)
    for name in ("params.yaml", "dvc.lock"):
        shutil.copy(reproduced.root / name, other.root)
    local = reproduced.root / ".dvc" / "config.local"
    try:
        for clone in (reproduced, other):
            for command in remote:
                clone.run("dvc", *command)
        reproduced.run("dvc", "push", "-q", **CREDENTIALS)
    finally:
        local.unlink(missing_ok=True)
    other.run("dvc", "pull", "-q", **CREDENTIALS)
    output = other.repro(**CREDENTIALS)
    assert "Running stage" not in output
    assert "up to date" in output
    assert lock(other) == lock(reproduced)
    models = sorted((reproduced.root / "models").rglob("model.safetensors"))
    assert len(models) == 6
    for model in models:
        assert (other.root / model.relative_to(reproduced.root)).read_bytes() == model.read_bytes()
    assert AutoModelForCausalLM.from_pretrained(other.root / "models" / "align" / "ppo-0").config.model_type == "qwen3"
    assert not (other.root / "mlflow.db").exists()
    other.run("pipelines.commands.sync")
    assert projected(other) == projected(reproduced)
    assert len(projected(other)) == len(stages(other))


def projected(clone: Clone) -> dict[str, object]:
    """By run: status, parameters and every value of every metric that a result has. Timings stay with the machine that took them."""
    client = MlflowClient(f"sqlite:///{clone.root / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("posttrain")
    assert experiment is not None
    found: dict[str, object] = {}
    for run in client.search_runs([experiment.experiment_id], max_results=100):
        names = [
            n for n in run.data.metrics if not n.startswith(("seconds/", "throughput/", "system/", "cost/seconds"))
        ]
        series = {
            n: sorted((m.step, str(m.value)) for m in client.get_metric_history(run.info.run_id, n)) for n in names
        }
        artifacts = sorted(info.path for info in client.list_artifacts(run.info.run_id, "artifacts"))
        assert run.data.tags["posttrain.run"] not in found
        found[run.data.tags["posttrain.run"]] = (run.info.status, run.data.params, series, artifacts)
    return found
