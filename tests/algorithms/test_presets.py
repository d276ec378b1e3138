"""The presets match the table of the specification, and each is a small change to a neighbour."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import FrozenInstanceError, asdict
from pathlib import Path

import pytest

from posttrain.algorithms import PRESETS
from posttrain.algorithms.specs import OnPolicy

# name: advantage, ratio, clip low, clip high, aggregate, kl, beta
TABLE = {
    "ppo": ("gae", "token", 0.2, 0.2, "token_mean", "reward", 0.05),
    "grpo": ("group_mean", "token", 0.2, 0.2, "sequence_mean", "loss", 0.04),
    "dr_grpo": ("group_mean", "token", 0.2, 0.2, "constant", "none", 0.0),
    "gspo": ("group_z", "sequence", 3e-4, 4e-4, "sequence_mean", "none", 0.0),
    "dapo": ("group_z", "token", 0.2, 0.28, "token_mean", "none", 0.0),
    "chord": ("group_z", "token", 0.2, 0.2, "sequence_mean", "none", 0.0),
    # as published: RLOO's action is the whole answer, so no length divides it; CISPO has no lower bound
    "rloo": ("leave_one_out", "token", 0.2, 0.2, "constant", "reward", 0.05),
    "reinforce_pp": ("batch_z", "token", 0.2, 0.2, "token_mean", "reward", 0.01),
    "cispo": ("group_z", "token", 1.0, 0.28, "token_mean", "none", 0.0),
    "sapo": ("group_z", "token", 0.2, 0.2, "sequence_mean", "none", 0.0),
    "gmpo": ("group_z", "token", 0.4, 0.4, "sequence_mean", "none", 0.0),
    "dppo_tv": ("group_mean", "token", 0.2, 0.2, "token_mean", "none", 0.0),
    "dppo_kl": ("group_mean", "token", 0.05, 0.05, "token_mean", "none", 0.0),
    "distill": ("teacher", "token", 0.2, 0.2, "token_mean", "none", 0.0),
    "maxrl": ("group_rate", "token", 0.2, 0.2, "constant", "none", 0.0),
}


@pytest.mark.parametrize("name", sorted(TABLE))
def test_the_table(name: str) -> None:
    spec = PRESETS[name]
    assert isinstance(spec, OnPolicy)
    point = (spec.advantage, spec.ratio, spec.clip_low, spec.clip_high)
    assert (*point, spec.aggregate, spec.kl, spec.kl_coefficient) == TABLE[name]


def test_what_else_the_table_says() -> None:
    ppo, gspo, dapo, chord, phi = (PRESETS[n] for n in ("ppo", "gspo", "dapo", "chord", "chord_phi"))
    for spec in (ppo, gspo, dapo, chord, phi):
        assert isinstance(spec, OnPolicy)
    assert (ppo.gamma, ppo.lam, ppo.whiten, ppo.value_clip, ppo.epochs) == (1.0, 0.95, True, 0.2, 4)
    assert (ppo.kl_estimator, PRESETS["grpo"].kl_estimator) == ("k1", "k3")
    assert ppo.missing_eos_penalty > 0
    # the point of these three is a clip, which only acts where a rollout serves several updates
    assert [PRESETS[n].minibatches for n in ("gspo", "dapo", "cispo")] == [4, 4, 4]  # type: ignore[union-attr]
    assert PRESETS["cispo"].surrogate == "weight"  # type: ignore[union-attr]
    assert (dapo.filter, dapo.mask_truncated) == ("refill", True)
    assert dapo.overlong_share == 0.2
    assert (chord.mu_peak, chord.mu_valley, chord.mu_decay_steps) == (0.9, 0.05, None)
    assert (phi.mu_peak, phi.mu_valley, phi.phi) == (0.1, 0.1, "p_one_minus_p")


def differences(name: str, other: str) -> set[str]:
    left, right = asdict(PRESETS[name]), asdict(PRESETS[other])
    return {key for key in left if left[key] != right[key]} - {"name", "paper"}


def test_a_preset_is_a_small_change_to_another() -> None:
    assert differences("dr_grpo", "grpo") == {"aggregate", "kl", "kl_coefficient"}
    assert differences("chord_phi", "chord") == {"mu_peak", "mu_valley", "mu_decay_steps", "phi"}
    assert differences("maxrl", "dr_grpo") == {"advantage"}
    assert differences("dppo_kl", "dppo_tv") == {"surrogate", "clip_low", "clip_high"}
    assert differences("ipo", "dpo") == {"link", "logit"}


def test_records_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        PRESETS["grpo"].clip_low = 0.5  # type: ignore[misc]


def test_the_configuration_of_algorithms_imports_no_model_library(root: Path) -> None:
    code = "import sys, posttrain.algorithms as a; a.choose('grpo'); print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
