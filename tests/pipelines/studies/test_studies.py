"""Studies: files are checked when they are read, arms share workspaces, and verdicts follow the rule."""

from __future__ import annotations

import json
import math
import re
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError
from scipy import stats

from pipelines.config.own_code import all_code, require_covered
from pipelines.config.params import load_params, parse_params
from pipelines.config.yaml_files import read_yaml
from pipelines.runtime.context import MEASUREMENTS
from pipelines.studies.outcomes import Reader
from pipelines.studies.page import page, short
from pipelines.studies.results import Entry, all_saved, earlier, judge, save, saved, work_seconds
from pipelines.studies.study import FOLDER, Study, load_study, names
from pipelines.studies.verdict import Estimate, combined, estimate, seeds_to_decide, verdict
from pipelines.studies.workspace import Workspace, prepare, pretraining, workspaces
from pipelines.tuning.trials import trials
from pipelines.tuning.workspace import search_workspace
from posttrain.errors import ConfigError, DataError
from posttrain.evaluation.crossed import crossed_difference
from tests.pipelines.synthetic_runs import build

ARMS = {"grpo": {"algorithm": {"preset": "grpo"}}, "ppo": {"algorithm": {"preset": "ppo"}}}
BETTER = {"claim": "grpo is better", "outcome": "answers/accuracy", "contrast": {"grpo": 1.0, "ppo": -1.0}}


def study(**changes: Any) -> Study:
    tree = {
        "question": "Which?", "source": "2402.03300", "factor": "algorithm", "seeds": [0, 1, 2], "arms": ARMS, "claims": [BETTER],
    }  # fmt: skip
    return Study.model_validate(tree | changes)


@pytest.fixture
def finished(tmp_path: Path, root: Path) -> Workspace:
    folder = build(tmp_path / "home" / "grpo", algorithms=("grpo", "ppo"), seeds=(0, 1, 2), steps=3, prompts=60)
    return Workspace(folder, ("grpo", "ppo"), load_params(root / "params.yaml").model_dump())


@pytest.mark.parametrize(
    ("low", "high", "at_least", "expected"),
    [
        (0.01, 0.2, 0.0, "supported"),
        (-0.1, 0.2, 0.0, "undecided"),
        (-0.3, -0.1, 0.0, "contradicted"),
        (0.01, 0.03, 0.05, "contradicted"),
        (-0.01, 0.01, -0.02, "supported"),
        (0.0, 0.0, 0.0, "undecided"),
    ],
)
def test_the_rule(low: float, high: float, at_least: float, expected: str) -> None:
    assert verdict(Estimate((low + high) / 2, low, high, 4, 1, 0, 5), at_least) == expected


def test_a_study_needs_all_of_its_claims() -> None:
    assert combined(["supported", "supported"]) == "supported"
    assert combined(["supported", "undecided"]) == "undecided"
    assert combined(["undecided", "contradicted", "supported"]) == "contradicted"


def test_numbers_of_runs_get_welchs_interval() -> None:
    a, b = np.array([1.0, 2.0, 3.0]), np.array([0.0, 4.0])
    found = estimate({"a": a, "b": b}, {"a": 1.0, "b": -1.0}, 0.95)
    # variances 1 and 8: 1/3 + 8/2; Welch-Satterthwaite with 2 and 1 degrees of freedom
    error, freedom = math.sqrt(1 / 3 + 4), (1 / 3 + 4) ** 2 / ((1 / 3) ** 2 / 2 + 4**2 / 1)
    assert (found.value, found.df) == pytest.approx((0.0, freedom))
    assert found.high == pytest.approx(stats.t.ppf(0.975, freedom) * error)


def test_seeds_that_would_decide_an_undecided_claim() -> None:
    found = Estimate(0.1, -0.1, 0.3, 8, 0.005, 0.0, 5)
    seeds = seeds_to_decide(found, 0.0, 0.95)
    assert seeds is not None

    def reach(n: int) -> float:
        df = 8 * n / 5
        return float((stats.t.ppf(0.975, df) + stats.t.ppf(0.8, df)) * math.sqrt(0.005 * 5 / n))

    assert reach(seeds) <= 0.1 < reach(seeds - 1)
    assert seeds_to_decide(found, 0.1, 0.95) is None


def test_outcomes_are_read_by_name(finished: Workspace) -> None:
    reader = Reader(study(), [finished], "answer")
    assert reader.values("grpo", "answers/accuracy").shape == (60, 3)
    assert reader.values("sft", "answers/accuracy").shape == (60, 1)
    assert reader.values("grpo", "training/tokens/sampled").tolist() == [5120.0 * 3] * 3
    assert reader.values("grpo", "training/tokens/sampled:mean").tolist() == [5120.0 * 2] * 3
    # the recorded accuracy on pairs of the synthetic runs is .5 + rate / 4
    assert reader.values("ppo", "evaluation/preference/accuracy").tolist() == pytest.approx([0.575] * 3)
    with pytest.raises(DataError, match="no outcome 'rewrad_rm'; did you mean 'reward_rm'"):
        reader.values("grpo", "answers/rewrad_rm")


def test_a_study_is_decided_saved_and_shown(finished: Workspace, tmp_path: Path, root: Path) -> None:
    two = [BETTER, BETTER | {"claim": "by 90 points", "at_least": 0.9}]
    result = judge("which", study(claims=two), [finished])
    assert [claim.verdict for claim in result.claims] == ["supported", "contradicted"]
    assert (result.verdict, result.seconds, result.prompts) == ("contradicted", 0.0, 60)
    reader = Reader(study(), [finished], "answer")
    # two claims share the level: 97.5 % each
    alone = crossed_difference(*(reader.values(a, "answers/accuracy") for a in ("grpo", "ppo")), 0.975, fixed_b=False)
    assert result.claims[0].low == pytest.approx(alone.low, rel=1e-4)
    assert result.arms["sft"].keys() == {"answers/accuracy"}
    save(tmp_path, result)
    assert saved(tmp_path, "which") == result
    text = page([Entry("which", study(claims=two), result), Entry("later", study(), None)])
    assert "make study NAME=which    # 3 seeds, 60 prompts, 0 s of work" in text
    assert "| [later](#later) | Which? | [2402.03300](https://arxiv.org/abs/2402.03300) | not run |" in text
    assert short(study(), result) == "contradicted (the study has changed since)"


def test_looks_share_the_level(finished: Workspace) -> None:
    params = dict(finished.params) | {"report": finished.params["report"] | {"looks": 4}}
    result = judge("which", study(), [Workspace(finished.folder, finished.arms, params)])
    reader = Reader(study(), [finished], "answer")
    tables = [reader.values(arm, "answers/accuracy") for arm in ("grpo", "ppo")]
    assert result.claims[0].low == pytest.approx(crossed_difference(*tables, 1 - 0.05 / 4, fixed_b=False).low, rel=1e-4)
    assert result.looks == 4


def test_a_study_refuses_a_level_that_depends_on_added_seeds(tmp_path: Path, root: Path) -> None:
    (tmp_path / "params.yaml").write_bytes((root / "params.yaml").read_bytes())
    base = tmp_path / "base.yaml"
    base.write_text("report: {looks: always}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="a study's seeds are fixed before its runs"):
        workspaces(tmp_path, "chord", load_study(root, "chord"), base)


def test_a_series_on_new_seeds_keeps_the_earlier_one_on_the_page(finished: Workspace, tmp_path: Path) -> None:
    first = judge("which", study(), [finished])
    again = judge("which", study(seeds=[0, 1]), [finished])
    save(tmp_path, first)
    save(tmp_path, first)
    assert earlier(tmp_path, "which") == []
    save(tmp_path, again)
    assert (saved(tmp_path, "which"), earlier(tmp_path, "which")) == (again, [first])
    text = page([Entry("which", study(seeds=[0, 1]), again, earlier(tmp_path, "which"))])
    assert "| supported (a new series is planned) |" in page([Entry("which", study(), None, [first])])
    claim = first.claims[0]
    assert (
        f"| 3 | 60 | grpo is better | {claim.value:.3f} | {claim.low:.3f} to {claim.high:.3f} | > 0.000 | supported |"
        in text
    )


def test_a_study_that_has_not_run_says_how_to_run_it(tmp_path: Path, root: Path) -> None:
    space = Workspace(tmp_path, ("grpo", "ppo"), load_params(root / "params.yaml").model_dump())
    with pytest.raises(DataError, match="the study has not run yet"):
        judge("which", study(), [space])


def test_a_claim_names_arms_of_the_study() -> None:
    with pytest.raises(ValidationError, match="no arm 'grop'; did you mean 'grpo'"):
        study(claims=[BETTER | {"contrast": {"grop": 1.0}}])
    with pytest.raises(ValidationError):
        study(claims=[BETTER | {"outcome": "accuracy"}])


def test_an_unknown_study_gets_the_nearest_name(root: Path) -> None:
    with pytest.raises(ConfigError, match="no study 'group_sise' in examples/studies; did you mean 'group_size'"):
        load_study(root, "group_sise")


def test_every_study_of_the_project_has_valid_arms_and_an_up_to_date_page(root: Path) -> None:
    assert len(names(root)) >= 7
    for name in names(root):
        loaded = load_study(root, name)
        assert len(loaded.seeds) >= 5, name
        assert {arm for space in workspaces(root, name, loaded) for arm in space.arms} == set(loaded.arms)
    assert (root / "docs/claims.md").read_text(encoding="utf-8") == page(all_saved(root))
    results = {path.stem for path in (root / FOLDER / "results").glob("*.json")}
    assert results <= set(names(root))
    for name in results:
        result = saved(root, name)
        assert result is not None
        assert result.digest == load_study(root, name).digest, f"{name} has changed since its runs"


def test_every_workspace_has_the_parameters_that_dvc_reads_and_names_its_own_code(root: Path) -> None:
    read = set(re.findall(r"\$\{(\w+\.[\w.]+)\}", (root / "dvc.yaml").read_text(encoding="utf-8")))
    read = {path for path in read if not path.startswith("item.")}
    assert "project.code" in read
    spaces = [search_workspace(root, trials(load_params(root / "params.yaml"))[:1], [7])]
    for name in names(root):
        first = pretraining(root, name, load_study(root, name))
        spaces += [*workspaces(root, name, load_study(root, name)), *([first] if first else [])]
    for space in spaces:
        given = {
            path for path in read if reduce(lambda part, key: part[key], path.split("."), space.params) is not None
        }
        assert given == read, space.folder
        params = parse_params(space.params, space.folder.name)
        require_covered(params, all_code(params))
    assert {space.params["project"]["code"] for space in spaces} == {"posttrain/environments", "examples"}


def test_arms_share_a_workspace_unless_they_change_other_parameters(root: Path, tmp_path: Path) -> None:
    arms = ARMS | {"noisy": {"algorithm": {"preset": "dpo"}, "params": {"data": {"seed": 5}}}}
    arms["grpo"] = arms["ppo"] = {"algorithm": {"preset": "grpo", "rewards": {"answer": 1.0}}}
    first, second = workspaces(root, "which", study(arms=arms), None)
    assert (first.arms, second.arms) == (("grpo", "ppo"), ("noisy",))
    changed = {"experiment": "study which", "algorithms": ["grpo", "ppo"], "seeds": [0, 1, 2]}
    assert first.params["project"] == read_yaml(root / "params.yaml")["project"] | changed
    assert (first.params["data"]["seed"], second.params["data"]["seed"]) == (0, 5)
    assert first.targets([0, 1])[2:] == [f"evaluate_aligned@{arm}-{seed}" for arm in ("grpo", "ppo") for seed in (0, 1)]

    copy = Workspace(tmp_path / "space", first.arms, first.params)
    prepare(root, copy)
    assert load_params(copy.folder / "params.yaml").project.algorithms == ["grpo", "ppo"]
    assert (copy.folder / "pipelines" / "align.py").read_bytes() == (root / "pipelines" / "align.py").read_bytes()
    assert (copy.folder / "dvc.yaml").is_file()
    assert not (copy.folder / "tests").exists()
    assert f"dir = {(root / '.dvc' / 'cache').resolve()}" in (copy.folder / ".dvc" / "config.local").read_text()
    (copy.folder / "dvc.lock").write_text("kept")
    prepare(root, copy)
    assert (copy.folder / "dvc.lock").read_text() == "kept"


def test_a_workspace_has_everything_that_stages_read_and_no_stage_writes(root: Path, tmp_path: Path) -> None:
    space = workspaces(root, "group_size", load_study(root, "group_size"))[0]
    copy = Workspace(tmp_path / "space", space.arms, space.params)
    prepare(root, copy)
    stages = read_yaml(root / "dvc.yaml")["stages"].values()
    paths = {kind: {str(path) for stage in stages for path in stage.get(kind, [])} for kind in ("deps", "outs")}
    written = {path.split("${")[0] for path in paths["outs"]}
    given = {
        dep
        for dep in paths["deps"]
        if "${" not in dep and not any(dep.startswith(w) or w.startswith(dep) for w in written)
    }
    assert {"pipelines/sft.py", "data/raw", "data/benchmarks"} <= given
    assert sorted(dep for dep in given if not (copy.folder / dep).exists()) == []


def test_a_pretraining_makes_the_base_model_of_all_arms(root: Path) -> None:
    arms = {"rl": {"algorithm": {"preset": "grpo", "start": "base", "rewards": {"answer": 1.0}}}}
    own = study(
        arms=arms,
        claims=[BETTER | {"contrast": {"rl": 1.0}}],
        pretraining={"sft": {"epochs": 3}},
        params={"sft": {"epochs": 1}},
    )
    first = pretraining(root, "which", own)
    assert first is not None
    assert (first.targets([0]), first.params["sft"]["epochs"]) == (["sft"], 3)
    (space,) = workspaces(root, "which", own)
    assert space.params["model"]["source"] == str(first.folder / "models/sft")
    assert space.params["sft"]["epochs"] == 1
    # other parameters make another model, in a different folder: DVC does not look into model.source
    other = pretraining(root, "which", own.model_copy(update={"pretraining": {"sft": {"epochs": 4}}}))
    assert other is not None
    assert other.folder != first.folder
    assert pretraining(root, "which", study()) is None
    assert own.digest != own.model_copy(update={"pretraining": {}}).digest


def test_committed_verdicts_are_those_of_the_committed_studies(root: Path) -> None:
    assert [short(own, result) for _, own, result, _ in all_saved(root) if result and result.digest != own.digest] == []


def test_the_time_of_a_study_is_the_work_of_its_runs(tmp_path: Path) -> None:
    for name, span in (("sft", (10.0, 14.0)), ("align-grpo-0", (20.0, 22.5))):
        folder = tmp_path / ".posttrain" / "runs" / f"{name}-{'0' * 16}"
        folder.mkdir(parents=True)
        lines = [{"kind": "start", "time": 1.0}, {"kind": "ready", "time": span[0]}, {"kind": "end", "time": span[1]}]
        (folder / MEASUREMENTS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert work_seconds([Workspace(tmp_path, (), {}), Workspace(tmp_path / "none", (), {})]) == 6.5


def test_the_settings_that_tell_algorithms_apart_have_the_numbers_of_the_committed_results(root: Path) -> None:
    page = (root / "docs" / "comparison.md").read_text(encoding="utf-8")
    rows = re.findall(r"\| (\d+) \| ([.\d]+) \| ([.\d]+) to ([.\d]+) \| (\d) \| `make study NAME=(\w+)` \|", page)
    assert len(rows) == 4
    for seeds, start, low, high, shown, name in rows:
        result = saved(root, name)
        assert result is not None
        levels = {arm: values["answers/accuracy"] for arm, values in result.arms.items()}
        assert (result.seeds, f"{levels.pop('sft'):.3f}") == (int(seeds), start)
        assert (f"{min(levels.values()):.3f}", f"{max(levels.values()):.3f}") == (low, high)
        found = [claim for claim in result.claims if claim.outcome == "answers/accuracy" and claim.low * claim.high > 0]
        assert len(found) == int(shown)


def test_a_claim_over_prompts_in_groups_is_clustered(finished: Workspace) -> None:
    ungrouped = judge("which", study(), [finished])
    for path in sorted(finished.folder.glob("runs/evaluate/*/artifacts/predictions.parquet")):
        table = pq.read_table(path)
        group = pa.array([f"g{i // 10}" for i in table.column("prompt_id").to_pylist()])
        pq.write_table(table.append_column("group", group), path)
    grouped = judge("which", study(), [finished])
    reader = Reader(study(), [finished], "answer")
    sides = [reader.values(arm, "answers/accuracy") for arm in ("grpo", "ppo")]
    by_hand = crossed_difference(*sides, 0.95, fixed_b=False, groups=[f"g{i // 10}" for i in range(60)])
    assert (grouped.claims[0].low, grouped.claims[0].high) == pytest.approx((by_hand.low, by_hand.high), rel=1e-4)
    assert grouped.claims[0].value == ungrouped.claims[0].value
    assert grouped.claims[0].high - grouped.claims[0].low > ungrouped.claims[0].high - ungrouped.claims[0].low
