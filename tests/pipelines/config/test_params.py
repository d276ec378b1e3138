"""The typed model of params.yaml: the values it refuses, and in which words."""

from __future__ import annotations

import contextlib
import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.config.params import flatten, load_params, parse_params
from pipelines.config.schema import OnPolicyBudget
from pipelines.config.yaml_files import read_yaml
from posttrain.errors import ConfigError


@pytest.fixture(scope="module")
def tree(root: Path) -> Any:
    return read_yaml(root / "params.yaml")


def changed(tree: Any, path: str, value: Any) -> Any:
    """A copy of the tree with one leaf set."""
    result = copy.deepcopy(tree)
    node = result
    *parents, last = path.split(".")
    for part in parents:
        node = node.setdefault(part, {})
    node[last] = value
    return result


def test_the_shipped_parameters_are_valid_and_2e_minus_3_is_a_number(root: Path) -> None:
    params = load_params(root / "params.yaml")
    assert params.sft.optimizer.learning_rate == 0.002
    assert flatten(params)["sft.optimizer.learning_rate"] == 0.002


def test_yaml_reads_an_exponent_without_a_dot_as_a_float(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("a: 2e-5\n", encoding="utf-8")
    assert read_yaml(tmp_path / "p.yaml") == {"a": 2e-5}


def test_aliases_that_stand_for_millions_of_values_are_refused_at_once(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    (tmp_path / "bomb.yaml").write_text("\n".join([*lines, "project: {seeds: *a11}"]))
    with pytest.raises(ConfigError, match=r"bomb\.yaml: its aliases .* stand for \d{12} values"):
        read_yaml(tmp_path / "bomb.yaml")
    (tmp_path / "few.yaml").write_text("a: &a [1, 2]\nb: [*a, *a]\nc: &c [*c]\n")
    assert read_yaml(tmp_path / "few.yaml")["b"] == [[1, 2], [1, 2]]


def test_a_duplicated_key_is_refused_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("a: 1\nb: 2\na: 3\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"duplicate key.*line 3; remove one"):
        read_yaml(tmp_path / "p.yaml")


PPO_DROPPING_ALONE = {
    "preset": "ppo",
    "options": {"filter": "drop"},
    "rewards": {"answer": 1.0},
    "budget": {"samples_per_prompt": 1},
}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("sft.epoch", 2, "sft.epoch: unknown parameter; did you mean 'epochs'?"),
        ("sft.Epochs", 2, "sft.Epochs: unknown parameter; did you mean 'epochs'?"),
        ("algorithms.grpo.budget.learning_rate", 1e-3, "did you mean 'algorithms.grpo.budget.optimizer.learning_rate'?"),
        ("algorithms.dpo.learning_rate", 1e-3, "did you mean 'algorithms.dpo.budget.optimizer.learning_rate'?"),
        ("algorithms.grpo.optimizer", {"warmup_steps": 1}, "did you mean 'algorithms.grpo.budget.optimizer'?"),
        ("algorithms.dpo.steps", 9, "algorithms.dpo.steps: unknown parameter; Valid: budget, options, "),
        ("sft.optimizer.batch_size", 8, "sft.optimizer.batch_size: unknown parameter; did you mean 'sft.batch_size'?"),
        ("evaluation_rows", 8, "evaluation_rows: unknown parameter; did you mean 'evaluation'?"),
        ("epochs", 8, "epochs: unknown parameter; did you mean 'sft.epochs' or 'reward.epochs'?"),
        ("data.evaluation.heldouts", 0.1, "data.evaluation.heldouts: unknown parameter; did you mean 'heldout'?"),
        ("sft.epochs", "2", "sft.epochs = '2': should be a valid integer"),
        (
            "data.preferences.preferred",
            {"columns": ["labels"], "answers": {1: "a", 0: "b"}},
            "preferred.answers: the key 1: should be a valid string, and YAML reads this as a number; write it in quotes: '1'",
        ),
        (
            "data.preferences.preferred",
            {"columns": ["labels"], "answers": {"a": "a", "b": "b"}, "ties": [False]},
            "preferred.ties.0 = False: should be a valid string, and YAML reads this as a truth value; write it in quotes: 'False'",
        ),
        ("sft.optimizer.learning_rate", float("nan"), "must be a finite number"),
        ("algorithms.grpo.rewards", {"answer": 1e300}, "algorithms.grpo.rewards.answer = 1e+300: should be less than or equal to 1000000"),
        ("sft.optimizer.beta1", 1.0, "should be less than 1"),
        ("project.algorithms", ["grp"], "no section algorithms.grp; did you mean 'grpo'?"),
        ("project.seeds", [0, 0], "must not repeat a value"),
        ("algorithms.grpo.options", {"gamma": 0.9}, "algorithms.grpo: grpo.options.gamma = 0.9: has no effect here"),
        ("algorithms.mine", {"preset": "grop"}, "algorithms.mine: unknown algorithm preset 'grop'; did you mean 'grpo'?"),
        ("algorithms.pppo", {"options": {}}, "algorithms.pppo.preset: missing, and 'pppo' is no preset; did you mean 'ppo'?"),
        ("algorithms.dpo.rewards", {"answer": 1.0}, "algorithms.dpo.rewards: has no effect"),
        ("algorithms.mine", {"preset": "distill"}, "algorithms.mine.teacher: missing; the preset learns from a teacher"),
        (
            "algorithms.mine",
            {"preset": "distill", "teacher": "self"},
            "algorithms.mine.teacher_prompt: missing. The model before training teaches only what its prompt adds",
        ),
        (
            "algorithms.mine",
            {"preset": "distill", "teacher": "self", "teacher_prompt": "Think."},
            "algorithms.mine.teacher_prompt = 'Think.': has no {prompt}",
        ),
        ("algorithms.grpo.teacher_prompt", "{prompt}", "algorithms.grpo.teacher_prompt: has no effect on the preset grpo"),
        ("algorithms.grpo.teacher", "models/base", "algorithms.grpo.teacher: has no effect on the preset grpo"),
        (
            "algorithms.mine",
            {"preset": "distill", "teacher": "models/base", "rewards": {"answer": 1.0}},
            "learns from its teacher only",
        ),
        ("algorithms.grpo.rewards", {"answr": 1.0}, "no reward 'answr'; did you mean 'answer'?"),
        ("algorithms.grpo.rewards", {"answer": 0.0}, "at least one reward a weight other than 0"),
        ("algorithms.grpo.budget", {"samples_per_prompt": 1}, "samples_per_prompt = 1 must be at least 2"),
        ("align.on_policy.top_p", 0.9, "align.on_policy: top_p: truncated sampling biases the importance ratio"),
        ("algorithms.grpo.budget", {"critic_learning_rate": 1e-3}, "critic_learning_rate: has no effect here"),
        ("algorithms.ppo", PPO_DROPPING_ALONE, "filter 'drop' keeps prompts whose answers are rewarded differently"),
        ("algorithms.grpo.options", {"clip_high": 0.28}, "it counts only when epochs x minibatches > 1"),
        ("algorithms.grpo.budget", {"top_k": 5}, "algorithms.grpo.budget: top_k: truncated sampling biases"),
        ("algorithms.grpo.budget", {"max_new_tokens": 5000}, "exceeds model.tiny.max_length"),
        ("align.on_policy.turns", {"environment": "guess"}, "write the same in align.on_policy.turns and evaluation.turns"),
        ("evaluation.turns", {"environment": "guess", "on_error": "ask"}, "evaluation.turns.on_error = 'ask': should be"),
        ("algorithms.grpo.options", {"overlong_share": 1.5}, "overlong_share = 1.5: must be in [0, 1]"),
        ("algorithms.chord.options", {"mu_decay_steps": 200}, "mu_decay_steps = 200 are longer than the run's 40 optimiser steps"),
        ("algorithms.grpo.budget", {"optimizer": {"warmup_steps": 40}}, "warmup_steps = 40 is as long as the run of 40"),
        ("rewards.tags", {"function": "regex", "arguments": {"pattern": "(#"}}, "rewards.tags.arguments.pattern = '(#': not a regular"),
        ("rewards.tags", {"function": "format"}, "rewards.tags.arguments.pattern = None: must be a regular expression"),
        ("rewards.answer.arguments", {"extract": "strct"}, "rewards.answer.arguments.extract = 'strct': must be one of strict, flexible"),
        ("rewards.answer.arguments", {"kind": ["number"]}, "must be one of number, choice, text"),
        ("rewards.answer.arguments", {"extrakt": "strict"}, "'answer' has no such argument; did you mean 'extract'?"),
        ("rewards.tags", {"function": "mentions", "arguments": {"word": "a"}}, "'mentions' has no such argument; it has none"),
        ("rewards.tags", {"function": "length", "arguments": {"target": 9}}, "rewards.tags.arguments.tolerance: missing"),
        ("rewards.tags", {"function": "length", "arguments": {"target": 9, "tolerance": 0}}, "tolerance = 0: must be a number above 0"),
        ("data.sft.extract", {"completion": "["}, "data.sft.extract.completion = '[': not a regular expression"),
        ("reward.soft_target_scale", 0.0, "should be greater than 0"),
        ("rewards.answer.function", "anwser", "no such function; did you mean 'answer'?"),
        ("rewards.total", {"function": "answer"}, "this name is reserved"),
        ("limits.reward_seconds", {"rm": 5.0}, "limits.reward_seconds.rm: has no effect on the reward model"),
        ("limits.reward_seconds", {"anwser": 5.0}, "limits.reward_seconds.anwser: no reward 'anwser'; did you mean 'answer'?"),
        ("rewards.answer.timeout_seconds", 5.0, "rewards.answer: timeout_seconds is now limits.reward_seconds, where a change makes no"),
        ("rewards.rm.on_failure", "skip", "rewards.rm.on_failure: has no effect on the reward model"),
        ("limits.reward_seconds", {"answer": 0.0}, "should be greater than 0"),
        ("rewards.answer.on_failure", "ignore", "should be 'stop' or 'skip'"),
        ("algorithms.grpo.options", {"reward_combination": "group_normalised"}, "only 'answer' has a weight"),
        ("evaluation.pass_k", [9], "k must not exceed samples_per_prompt"),
        ("evaluation.max_new_tokens", 5000, "exceeds model.tiny.max_length"),
    ],
)  # fmt: skip
def test_a_fault_is_named_with_its_rule_and_the_nearest_name(tree: Any, path: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_params(changed(tree, path, value))
    assert message in str(caught.value)
    assert str(caught.value).startswith("params.yaml: ")


def test_scores_do_not_count_twice_in_the_reward_model(tree: Any) -> None:
    soft = changed(tree, "reward.soft_target_scale", 2.0)
    assert parse_params(soft).reward.soft_target_scale == 2.0
    with pytest.raises(ConfigError, match=r"margin_from_scores and soft_target_scale .* would count it twice"):
        parse_params(changed(soft, "reward.margin_from_scores", True))


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("reward.lora", {"rank": 2, "alpha": 4}, "lora"),
        ("reward.margin_from_scores", True, "margin_from_scores"),
        ("reward.soft_target_scale", 2.0, "soft_target_scale"),
        ("reward.enabled", False, "enabled: false"),
    ],
)
def test_an_existing_reward_model_takes_no_options_of_training(tree: Any, key: str, value: Any, named: str) -> None:
    existing = changed(tree, "reward.source", "hub/rm")
    assert parse_params(existing).reward.source == "hub/rm"
    with pytest.raises(ConfigError, match=f"existing reward model, which is not trained: {named} would have no effect"):
        parse_params(changed(existing, key, value))


def test_without_a_reward_model_nothing_may_use_it(tree: Any) -> None:
    off = changed(tree, "reward.enabled", False)
    with pytest.raises(ConfigError) as caught:
        parse_params(off)
    for place in (
        "evaluation.rewards (rm)",
        "algorithms.grpo.rewards (rm)",
        "algorithms.ppo.options.critic_start (reward)",
    ):
        assert place in str(caught.value)
    off["project"]["algorithms"], off["evaluation"]["rewards"] = ["dpo", "grpo"], ["answer"]
    off["algorithms"]["grpo"]["rewards"] = {"answer": 1.0}
    assert not parse_params(off).reward.enabled


def test_a_new_point_of_the_design_space_needs_parameters_alone(tree: Any) -> None:
    section = {"preset": "grpo", "options": {"advantage": "group_z"}, "rewards": {"answer": 1}, "budget": {"steps": 3}}
    params = parse_params(changed(tree, "algorithms.grpo_z", section))
    assert params.algorithm("grpo_z").advantage == "group_z"  # type: ignore[union-attr]
    budget = params.budget("grpo_z")
    assert isinstance(budget, OnPolicyBudget)
    assert (budget.steps, budget.samples_per_prompt) == (3, params.align.on_policy.samples_per_prompt)


@pytest.mark.parametrize("nested", [False, True])
def test_the_context_of_any_model_folder_bounds_new_tokens(tree: Any, tmp_path: Path, nested: bool) -> None:
    """GPT-2 spells it n_positions; composite models keep it in text_config."""
    sizes = {"n_positions": 48}
    (tmp_path / "config.json").write_text(json.dumps({"text_config": sizes} if nested else sizes))
    with pytest.raises(
        ConfigError,
        match=r"evaluation.max_new_tokens = 44 with validation.max_prompt_tokens = 64 exceeds the context of",
    ):
        parse_params(changed(tree, "model.source", str(tmp_path)))
    assert parse_params(changed(tree, "model.source", "some/hub-id")).model.source == "some/hub-id"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), value=JSON)
def test_whatever_stands_in_a_leaf_it_is_accepted_or_refused_in_words(
    tree: Any, data: st.DataObject, value: Any
) -> None:
    path = data.draw(st.sampled_from(sorted(path for path in flatten(tree) if path)))
    with contextlib.suppress(ConfigError):  # anything else is a traceback that a user would see
        parse_params(changed(tree, path, value))


def test_a_section_that_is_not_listed_is_checked_and_the_message_leads_on(tree: Any) -> None:
    answer = {"rewards": {"answer": 1.0}}
    sections = {"grpo": {"preset": "grpo"} | answer, "odd": {"preset": "gspo"} | answer}
    only = changed(changed(tree, "project.algorithms", ["grpo"]), "algorithms", sections)
    small = changed(only, "align.on_policy.prompts_per_step", 6)
    with pytest.raises(
        ConfigError, match=r"set algorithms\.odd\.budget\.prompts_per_step=8\. .*remove it: algorithms\.odd=null$"
    ):
        parse_params(small)
    assert parse_params(changed(small, "algorithms.odd.budget.prompts_per_step", 8))
    with pytest.raises(ConfigError, match=r"budget\.prompts_per_step=8$"):
        parse_params(changed(small, "project.algorithms", ["grpo", "odd"]))


@pytest.mark.parametrize(
    "path", ["align.on_policy.steps", "algorithms.dpo_soft.options.score_scale", "sft.epochs", "tune.trials"]
)
def test_a_whole_number_beyond_all_bounds_is_refused_by_name(tree: Any, path: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"{path}: a whole number beyond 2\^53 = 9,007,199,254,740,992; type a smaller one"
    ):
        parse_params(changed(tree, path, 10**400))


@pytest.mark.parametrize("path", ["data.sft.source", "model.source", "reward.source"])
@pytest.mark.parametrize("value", ["", "  ", "a\0b", "x" * 5000])
def test_a_source_names_something(tree: Any, path: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"{path}.* must be a path, a name or a hub id"):
        parse_params(changed(tree, path, value))


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (
            "data.environments",
            {"gues": {"largest": 5}},
            r"environments.gues: no such environment.* did you mean 'guess'\?",
        ),
        ("model.tiny.experts_per_token", 3, r"experts_per_token 3 has no effect without experts"),
    ],
)
def test_options_that_nothing_reads_are_refused(tree: Any, path: str, value: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_params(changed(tree, path, value))


@pytest.mark.parametrize(
    ("rule", "refusal"),
    [
        ({"every_steps": 40, "problems": 100}, "every_steps = 40: ppo has 40 steps, so only its last step"),
        ({"every_steps": 10, "problems": 100, "reward": "anwser"}, "no reward 'anwser'.*answer"),
        ({"every_steps": 10, "problems": 100, "reward": "rm"}, "would choose the step that exploits its errors most"),
        ({"every_steps": 10}, "best_checkpoint.problems"),
        (10, r"best_checkpoint = 10: should be a section with keys, e\.g\. \{key: value\}"),
    ],
)
def test_a_choice_of_the_checkpoint_without_effect_is_refused(tree: Any, rule: Any, refusal: str) -> None:
    with pytest.raises(ConfigError, match=refusal):
        parse_params(changed(tree, "align.best_checkpoint", rule))
    assert parse_params(changed(tree, "align.best_checkpoint", {"every_steps": 10, "problems": 100}))


def test_every_wrong_section_of_algorithms_is_named_at_once(tree: Any) -> None:
    """Also those that project.algorithms does not list: correcting one, only to meet the next, takes as many tries."""
    for name, section in {
        "grpo": {"preset": "grpo", "rewards": {"answr": 1.0}},
        "one": {"preset": "gspo", "rewards": {"answer": 1.0}, "budget": {"prompts_per_step": 6}},
        "two": {"preset": "dpo", "rewards": {"answer": 1.0}},
    }.items():
        tree = changed(tree, f"algorithms.{name}", section)
    with pytest.raises(ConfigError) as caught:
        parse_params(tree)
    first, one, two = str(caught.value).split("\n")
    assert "algorithms.grpo.rewards: no reward 'answr'; did you mean 'answer'?" in first
    assert "algorithms.one: prompts_per_step = 6" in one
    assert "or remove it: algorithms.one=null" in one
    assert "algorithms.two.rewards: has no effect" in two
