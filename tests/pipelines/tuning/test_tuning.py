"""Check equal tuning: the trials, the split of the prompts, the choice and its report."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.config.params import Params, parse_params
from pipelines.config.yaml_files import read_yaml
from pipelines.tuning.choose import choose, report, scores, split
from pipelines.tuning.page import page, sections
from pipelines.tuning.suggest import suggest
from pipelines.tuning.trials import Trial, trials
from pipelines.tuning.workspace import search_workspace
from posttrain.errors import ConfigError, DataError
from tests.pipelines.synthetic_runs import predictions

RATE = "budget.optimizer.learning_rate"


def params_with(root: Path, **tune: Any) -> Params:
    tree = read_yaml(root / "params.yaml")
    tree["project"] = tree["project"] | {"algorithms": ["dpo", "grpo"]}
    tree["tune"] = tree["tune"] | tune
    return parse_params(tree)


def test_every_algorithm_has_the_same_number_of_trials_and_the_first_is_as_given(root: Path) -> None:
    params = params_with(root)
    found = trials(params)
    assert [trial.name for trial in found] == [f"{name}_t{i}" for name in ("dpo", "grpo") for i in range(4)]
    assert found[0].section == {"preset": "dpo"}
    assert all(2.5e-6 <= trial.values[RATE] <= 4e-5 for trial in found[1:4])
    assert all(5e-5 <= trial.values[RATE] <= 8e-4 for trial in found[5:])
    assert len({trial.values.get(RATE) for trial in found}) == 7
    assert found[5].section["budget"]["optimizer"] == {"learning_rate": found[5].values[RATE]}
    assert found[5].section["rewards"] == {"answer": 1.0, "rm": 0.0}
    assert trials(params) == found
    # more trials keep the earlier ones, and one algorithm's draws do not depend on the others
    assert trials(params_with(root, trials=6))[6:10] == found[4:]


def test_a_grid_is_the_product_of_lists_and_even_steps(root: Path) -> None:
    space = {
        "dpo": {"options.beta": {"values": [0.1, 0.3]}, RATE: {"low": 1e-5, "high": 1e-3, "log": True}},
        "grpo": {"options.kl_coefficient": {"low": 0.0, "high": 0.5}},
    }
    found = trials(params_with(root, method="grid", trials=7, space=space))
    assert [tuple(trial.values.values()) for trial in found[1:7]] == [
        (rate, beta) for rate in (1e-5, 1e-4, 1e-3) for beta in (0.1, 0.3)
    ]
    assert [trial.values["options.kl_coefficient"] for trial in found[8:]] == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]
    with pytest.raises(
        ConfigError, match=r"grid over budget.optimizer.learning_rate, options.beta of dpo cannot have 7 points"
    ):
        trials(params_with(root, method="grid", trials=8, space=space))


def test_suggested_trials_follow_the_scores(root: Path) -> None:
    """Score highest near a rate of 3e-4: later suggestions are nearer to it than random draws."""
    pytest.importorskip("optuna")
    params = params_with(root, method="tpe", trials=20)
    assert [one.name for one in trials(params)] == ["dpo_t0", "grpo_t0"]
    found, scores_so_far = [trials(params)[1]], [0.5]

    def distance(one: Trial) -> float:
        return abs(math.log10(one.values[RATE] / 3e-4))

    for _ in range(19):
        found.append(suggest(params, found, scores_so_far))
        scores_so_far.append(1 - distance(found[-1]))
    assert [one.name for one in found] == [f"grpo_t{i}" for i in range(20)]
    assert all(5e-5 <= one.values[RATE] <= 8e-4 for one in found[1:])
    assert np.mean([distance(one) for one in found[-8:]]) < 0.2  # draws that are even in the logarithm have 0.33
    assert suggest(params, found[:5], scores_so_far[:5]) == found[5]


def test_suggesting_without_optuna_says_what_to_install(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    params = params_with(root, method="tpe")
    with pytest.raises(ConfigError, match=r"pip install 'posttrain\[tune\]'; or set tune.method: random"):
        suggest(params, trials(params)[:1], [0.5])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"space": {"grop": {}}}, "tune.space.grop: not an algorithm of project.algorithms; did you mean 'grpo'?"),
        ({"space": {"dpo": {RATE: {"low": 0.5, "high": 1.0}}}}, "no parameter of grpo to tune; give tune.space.grpo"),
        ({"training_seed": 0}, "tune.training_seed = 0 is one of project.seeds"),
        ({"space": {"dpo": {RATE: {"low": 2.0, "high": 1.0}}}}, "high 1.0 must be greater than low 2.0"),
        ({"space": {"dpo": {RATE: {"low": 0.0, "high": 1.0, "log": True}}}}, "low 0.0 must be positive"),
        ({"space": {"dpo": {RATE: {"low": 1.0}}}}, "give either low and high, or values"),
    ],
)
def test_a_wrong_search_is_refused(root: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        trials(params_with(root, **change))
    assert message in str(refused.value)


def test_a_trial_with_impossible_values_is_refused_before_anything_runs(root: Path) -> None:
    space = {"on_policy": {"options.cliphigh": {"values": [0.3]}}, "preference": {RATE: {"values": [1e-5]}}}
    with pytest.raises(ConfigError, match=r"tune\.space\.on_policy\.options\.cliphigh: the value 0\.3 cannot be tried"):
        params_with(root, space=space)
    space = search_workspace(root, trials(params_with(root)), [1000])
    assert space.targets([1000])[2] == "evaluate_aligned@dpo_t0-1000"
    assert space.params["project"]["seeds"] == [1000]


def test_no_prompt_chooses_and_reports() -> None:
    mask = split(range(100), 0.3, seed=1)
    assert (mask.sum(), (~mask).sum()) == (30, 70)
    assert (split(range(100), 0.3, seed=1) == mask).all()
    assert (split(range(100), 0.3, seed=2) != mask).any()
    assert split(range(5), 0.01, seed=0).sum() == 2
    with pytest.raises(DataError, match="3 evaluation prompts cannot be split"):
        split(range(3), 0.5, seed=0)


def test_no_group_of_prompts_chooses_and_reports() -> None:
    groups = [f"g{i // 5}" for i in range(100)]
    mask = split(range(100), 0.3, 1, groups)
    # six of twenty groups
    assert mask.sum() == 30
    assert {g for g, chosen in zip(groups, mask, strict=True) if chosen}.isdisjoint(
        g for g, chosen in zip(groups, mask, strict=True) if not chosen
    )
    with pytest.raises(DataError, match="3 evaluation groups of prompts cannot be split"):
        split(range(9), 0.5, 0, list("aaabbbccc"))


def test_the_best_on_the_selection_is_reported_on_the_other_prompts_with_new_seeds(root: Path, tmp_path: Path) -> None:
    params = params_with(root)
    found = [trial for trial in trials(params) if trial.algorithm == "dpo"]
    rates = ("ppo", "dpo", "grpo", "sft")  # groups of the synthetic runs with accuracies .3, .5, .75 and .45
    for trial, group in zip(found, rates, strict=True):
        predictions(tmp_path, f"{trial.name}-1000", group, 120, 4, False, params)
    for seed in (0, 1, 2):
        predictions(tmp_path, f"dpo_t2-{seed}", "grpo", 120, 4, False, params)
    mask = split(range(120), 0.5, seed=0)
    choice = choose(tmp_path, found, 1000, "answer", mask)
    assert choice.best.name == "dpo_t2"
    table = scores(tmp_path, "dpo_t2-1000", "answer")
    assert (choice.scores[2], choice.elsewhere) == pytest.approx((table[mask].mean(), table[~mask].mean()))
    result = report(tmp_path, choice, [0, 1, 2], "answer", mask)
    fresh = np.mean([scores(tmp_path, f"dpo_t2-{seed}", "answer")[~mask].mean() for seed in (0, 1, 2)])
    assert (result.fresh.value, result.curse) == pytest.approx((fresh, choice.scores[2] - fresh))
    assert (result.fresh.prompts, result.fresh.seeds) == (60, (3,))
    text = page(params, [result], 60, 120)
    assert f"| dpo | `{RATE}` {found[2].values[RATE]} | {choice.scores[2]:.3f} | {choice.elsewhere:.3f} |" in text
    assert " · ".join(f"{score:.3f}" for score in choice.scores) in text
    (tmp_path / "tuned.yaml").write_text(sections(params, [result]), encoding="utf-8")
    section = read_yaml(tmp_path / "tuned.yaml")["algorithms"]["dpo"]
    assert section["budget"]["optimizer"]["learning_rate"] == found[2].values[RATE]
    assert section["tuned"] == "best of 4 trials (random), chosen on 0.5 of the prompts"
    tree = read_yaml(root / "params.yaml")
    tree["algorithms"] = tree["algorithms"] | {"dpo": section}
    assert parse_params(tree).algorithms["dpo"].tuned == section["tuned"]


def test_the_best_of_several_equal_trials_scores_above_its_new_seeds(root: Path, tmp_path: Path) -> None:
    """Show the winner's curse: eight copies of one algorithm, whose true accuracy is the same."""
    params = params_with(root, trials=8)
    found = [trial for trial in trials(params) if trial.algorithm == "dpo"]
    for trial in found:
        for seed in (1000, 0, 1, 2):
            predictions(tmp_path, f"{trial.name}-{seed}", "dpo", 40, 1, False, params)
    curses = []
    for seed in range(8):
        mask = split(range(40), 0.5, seed)
        curses.append(report(tmp_path, choose(tmp_path, found, 1000, "answer", mask), [0, 1, 2], "answer", mask).curse)
    assert np.mean(curses) > 0.02
