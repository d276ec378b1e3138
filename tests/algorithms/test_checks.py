"""Refusals: every option that is unknown, of the wrong type, out of range, impossible or without effect."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.algorithms import PRESETS, choose
from posttrain.algorithms.specs import Algorithm, LoggedGroups, OnPolicy, Preference, Unpaired
from posttrain.errors import ConfigError

# a preset, options that must be refused, and what the message must say
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("grpo", {"advantge": "group_z"}, "did you mean 'advantage'"),
    ("grpo", {"name": "mine"}, "no such option"),
    ("grpo", {"advantage": "group"}, "one of 'gae', 'group_mean'"),
    ("grpo", {"clip_low": "0.2"}, "must be a number"),
    ("grpo", {"clip_low": True}, "must be a number"),
    ("grpo", {"clip_low": float("nan")}, "must be a number"),
    ("grpo", {"epochs": 1.5}, "a whole number"),
    ("grpo", {"epochs": True}, "a whole number"),
    ("grpo", {"mask_truncated": 1}, "true or false"),
    ("ppo", {"kl_target": "6"}, "a number or null"),
    ("grpo", {"clip_low": -0.1}, "at least 0"),
    ("grpo", {"epochs": 0}, "at least 1"),
    ("grpo", {"minibatches": 0}, "at least 1"),
    ("dapo", {"refill_limit": 0}, "at least 1"),
    ("grpo", {"overlong_share": -0.1}, r"in \[0, 1\]"),
    ("grpo", {"missing_eos_penalty": -1.0}, "not negative"),
    ("grpo", {"kl_coefficient": float("inf")}, "finite"),
    ("grpo", {"kl_target": 0.0}, "above 0"),
    ("grpo", {"mismatch": "mask", "mismatch_cap": 0.0}, "at least 1"),
    ("ppo", {"lam": 1.5}, r"in \[0, 1\]"),
    ("ppo", {"gamma": -0.1}, r"in \[0, 1\]"),
    ("chord", {"mu_peak": 1.5}, r"in \[0, 1\]"),
    ("chord", {"mu_peak": 0.01}, "above mu_peak"),
    ("chord", {"mu_warmup_steps": -5}, "at least 0"),
    ("dpo", {"beta": 0.0}, "above 0"),
    ("ipo", {"beta": -1.0}, "above 0"),
    ("dpo", {"label_smoothing": 0.5}, r"\[0, 0.5\)"),
    ("dpo", {"label_smoothing": -0.1}, r"\[0, 0.5\)"),
    ("grpo", {"kl": "none", "kl_estimator": "k1"}, "kl is 'reward' or 'loss'"),
    ("dapo", {"kl_coefficient": 0.1}, "kl is 'reward' or 'loss'"),
    ("dapo", {"kl_target": 6.0}, "kl is 'reward' or 'loss'"),
    ("dapo", {"kl": "loss"}, "kl_coefficient is 0"),
    ("grpo", {"kl_horizon": 500}, "kl_target is set"),
    ("grpo", {"kl": "reward"}, "k1"),
    ("grpo", {"kl_estimator": "k1"}, "does not depend on the reference"),
    ("grpo_pairs", {"kl_estimator": "k1"}, "does not depend on the reference"),
    ("grpo", {"refill_limit": 3}, "filter is 'refill'"),
    ("grpo", {"refill_partial": True}, "filter is 'refill'"),
    ("grpo", {"mismatch_cap": 3.0}, "mismatch is"),
    ("grpo", {"mu_valley": 0.1}, "mu_peak > 0"),
    ("grpo", {"mu_warmup_steps": 5}, "mu_peak > 0"),
    ("grpo", {"mu_decay_steps": 5}, "mu_peak > 0"),
    ("grpo", {"phi": "p_one_minus_p"}, "mu_peak > 0"),
    ("grpo", {"gamma": 0.9}, "advantage is 'gae'"),
    ("grpo", {"lam": 0.9}, "advantage is 'gae'"),
    ("grpo", {"whiten": True}, "advantage is 'gae'"),
    ("grpo", {"value_clip": 0.1}, "advantage is 'gae'"),
    ("ppo", {"reward_combination": "group_normalised"}, "not 'gae'"),
    ("grpo", {"critic_start": "sft"}, "advantage is 'gae'"),
    ("ppo", {"critic": "shared", "critic_start": "sft"}, "critic is 'separate'"),
    ("ppo", {"critic_start": "base"}, "one of 'reward', 'sft'"),
    ("grpo", {"value_coefficient": 0.1}, "advantage is 'gae'"),
    ("grpo", {"critic": "shared"}, "advantage is 'gae'"),
    ("grpo", {"ratio": "sequence", "minibatches": 2}, "never clips"),
    ("grpo", {"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4}, "epochs x minibatches > 1"),
    ("sapo", {"clip_high": 0.3}, "surrogate is not 'soft'"),
    ("gspo", {"tau_negative": 1.2}, "surrogate is 'soft'"),
    ("sapo", {"tau_negative": 0.0}, "above 0"),
    ("grpo", {"dual_clip": 3.0}, "epochs x minibatches > 1"),
    ("cispo", {"dual_clip": 3.0}, "surrogate is 'clip'"),
    ("dapo", {"dual_clip": 0.5}, "at least 1"),
    ("gmpo", {"ratio": "sequence"}, "reads the ratio of each token"),
    ("dppo_tv", {"mismatch": "mask"}, "need no correction"),
    ("maxrl", {"missing_eos_penalty": 1.0}, "must not be negative"),
    ("maxrl", {"kl": "reward", "kl_estimator": "k1", "kl_coefficient": 0.1}, "must not be negative"),
    ("grpo", {"entropy_coefficient": -0.1}, "not negative"),
    ("distill", {"kl": "loss", "kl_coefficient": 0.1}, "reads no reward and no reference"),
    ("distill", {"overlong_share": 0.2}, "reads no reward and no reference"),
    ("distill", {"surrogate": "geometric", "minibatches": 2}, "one advantage per token"),
    ("distill", {"reward_combination": "group_normalised"}, "not 'gae' or 'teacher'"),
    ("grpo", {"clip_low": 0.1}, "epochs x minibatches > 1"),
    ("grpo", {"clip_high": 0.28}, "epochs x minibatches > 1"),
    ("grpo", {"surrogate": "weight"}, "epochs x minibatches > 1"),
    ("gspo", {"minibatches": 1, "clip_high": 0.1}, "epochs x minibatches > 1"),
    ("grpo", {"kl_coefficient": 0.0, "kl_target": 6.0}, "kl_coefficient > 0"),
    ("grpo", {"kl_coefficient": 0.0, "kl_estimator": "k2"}, "kl_coefficient > 0"),
    ("grpo", {"mu_peak": 0.5}, "mu_peak = 0.5 has no effect"),
    ("grpo", {"reward_combination": "group_normalised", "advantage": "group_z"}, "undoes reward_combination"),
    ("chord", {"mu_decay_steps": 2.5}, "a whole number or null"),
    ("chord", {"mu_decay_steps": 0}, "mu_peak = 0.9 has no effect"),
    ("chord_phi", {"mu_decay_steps": 50}, "mu_valley differs"),
    ("gspo", {"clip_high": 0.2}, "never clips"),
    ("ppo", {"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4}, "one advantage per response"),
    ("ppo", {"surrogate": "geometric"}, "'geometric' has one factor for all tokens .* 'gae' gives one per token"),
    ("ipo", {"label_smoothing": 0.1}, "has no effect"),
    ("ipo", {"score_weighting": "soft"}, "'square'"),
    ("ipo", {"score_weighting": "offset"}, "'square'"),
    ("ipo", {"target_margin": 0.5}, "has no effect"),
    ("robust", {"link": "square"}, "'square'"),
    ("simpo", {"link": "square"}, "'square'"),
    ("dpo", {"robust": True}, "label_smoothing > 0"),
    ("robust", {"score_weighting": "soft"}, "'soft'"),
    ("hinge", {"score_weighting": "soft"}, "'soft'"),
    ("dpo_soft", {"label_smoothing": 0.1}, "has no effect"),
    ("dpo", {"score_scale": 2.0}, "has no effect"),
    ("dpo", {"score_weighting": "weight", "score_scale": 2.0}, "has no effect"),
    ("dpo", {"pair_coefficient": 0.1}, "nll_coefficient > 0"),
    ("dpo", {"logit": "odds"}, "reference: false"),
    ("orpo", {"link": "square"}, "no target to regress"),
    ("orpo", {"nll_coefficient": -1.0}, "not negative"),
    ("kto", {"beta": 0.0}, "above 0"),
    ("kto", {"undesirable_weight": 0.0}, "above 0"),
    ("kto", {"logit": "mean"}, "no such option"),
    ("grpo_pairs", {"kl_coefficient": 0.0, "kl_estimator": "k1"}, "has no effect"),
    ("grpo_pairs", {"advantage": "group_z"}, "no such option"),
]


@pytest.mark.parametrize(("preset", "options", "message"), REFUSED, ids=lambda v: str(v)[:60])
def test_refused_with_a_reason(preset: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        choose(preset, options)
    assert preset in str(caught.value)


def test_a_sequence_ratio_with_a_wide_clip_of_ones_own_is_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"gspo: a sequence ratio .* with clip 0.2/0.2 it hardly ever clips"):
        choose("gspo", {"clip_low": 0.2, "clip_high": 0.2})


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'grpo'"):
        choose("grop")


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_is_itself_and_passes_its_own_checks(name: str) -> None:
    assert choose(name) is not None
    assert choose(name) == PRESETS[name]
    assert choose(name).name == name


@pytest.mark.parametrize(
    ("preset", "options"),
    [
        ("grpo", {"advantage": "group_z", "clip_high": 0.28, "kl": "none", "minibatches": 2}),
        ("grpo", {"kl": "reward", "kl_estimator": "k1", "kl_target": 6, "kl_horizon": 500}),
        ("grpo", {"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4, "epochs": 2}),
        ("grpo", {"mu_peak": 0.5, "mu_warmup_steps": 5, "mu_decay_steps": 50, "phi": "p_one_minus_p"}),
        ("grpo", {"clip_high": float("inf"), "minibatches": 4}),
        ("grpo", {"ratio": "token", "surrogate": "clip"}),
        ("grpo", {"mu_peak": 0.5, "mu_valley": 0.5}),
        ("chord", {"mu_peak": 0.0}),
        ("grpo", {"reward_combination": "group_normalised", "advantage": "batch_z"}),
        ("dapo", {"refill_limit": 20, "refill_partial": True}),
        ("ppo", {"critic": "shared", "lam": 1, "kl_target": None}),
        ("ppo", {"critic": "separate", "critic_start": "sft"}),
        ("dpo", {"label_smoothing": 0.1, "robust": True}),
        ("dpo", {"score_weighting": "offset", "score_scale": 0.5}),
        ("ipo", {"score_weighting": "weight"}),
    ],
)
def test_neighbours_of_a_preset_are_accepted(preset: str, options: dict[str, Any]) -> None:
    spec = choose(preset, options)
    for name, value in options.items():
        assert getattr(spec, name) == value


def test_whole_numbers_become_floats_where_a_float_is_meant() -> None:
    spec = choose("ppo", {"lam": 1, "kl_target": 6})
    assert isinstance(spec, OnPolicy)
    assert isinstance(spec.lam, float)
    assert isinstance(spec.kl_target, float)


def strategy(hint: Any) -> st.SearchStrategy[Any]:
    if get_origin(hint) is Literal:
        return st.sampled_from(get_args(hint))
    if hint is bool:
        return st.booleans()
    if hint is int:
        return st.integers(-1, 5)
    floats = st.sampled_from([-1.0, 0.0, 3e-4, 0.1, 0.3, 0.6, 1.0, 2.0])
    return floats if hint is float else st.none() | floats


def options_of(spec: Algorithm) -> st.SearchStrategy[dict[str, Any]]:
    hints = get_type_hints(type(spec))
    names = [f.name for f in fields(spec) if f.name not in ("name", "paper")]
    return st.lists(st.sampled_from(names), max_size=3, unique=True).flatmap(
        lambda chosen: st.fixed_dictionaries({name: strategy(hints[name]) for name in chosen})
    )


@given(st.sampled_from(sorted(PRESETS)).flatmap(lambda name: st.tuples(st.just(name), options_of(PRESETS[name]))))
@settings(max_examples=400, deadline=None)
def test_any_options_give_a_sound_record_or_a_config_error(case: tuple[str, dict[str, Any]]) -> None:
    name, options = case
    try:
        spec = choose(name, options)
    except ConfigError:
        return
    assert all(getattr(spec, key) == value for key, value in options.items())
    untouched = [f.name for f in fields(spec) if f.name not in options]
    assert all(getattr(spec, key) == getattr(PRESETS[name], key) for key in untouched)
    if isinstance(spec, OnPolicy):
        assert spec.has_expert or "phi" not in options or spec.phi == "none"
        assert not (spec.has_critic and spec.ratio == "sequence")
        assert spec.kl != "reward" or spec.kl_estimator == "k1"
        assert spec.kl != "loss" or not spec.kl_coefficient or spec.kl_estimator != "k1"
        assert spec.mu_peak <= 1
        assert not spec.has_expert or spec.mu_valley <= spec.mu_peak
        assert not spec.has_expert or spec.mu_decay_steps != 0 or spec.mu_valley == spec.mu_peak
        clipped = {"clip_low", "clip_high"} & set(options)
        assert not clipped or spec.epochs * spec.minibatches > 1 or spec.anchor == "rollout"
        assert not clipped or spec.surrogate != "soft"
    elif isinstance(spec, Preference):
        assert spec.beta > 0
        assert 0 <= spec.label_smoothing < 0.5
        # whatever the loss would ignore has been refused
        assert spec.link != "square" or spec.score_weighting in ("none", "weight")
        assert not (spec.score_weighting == "soft" and (spec.robust or spec.link == "hinge"))
    else:
        assert isinstance(spec, LoggedGroups | Unpaired)
        assert spec.epochs >= 1
