"""Reward sources as params.yaml describes them: in process, in a separate process, or refused at once."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.config.params import load_params, parse_params
from pipelines.config.yaml_files import read_yaml
from pipelines.training.reward_sources import reward_sources
from posttrain.data.tokens import Tokens
from posttrain.errors import ConfigError
from posttrain.rewards.sources import FunctionReward, RewardBatch
from posttrain.rewards.worker import Worker


def sources(root: Path, seconds: dict[str, float] | None = None, **sections: Any) -> dict[str, FunctionReward]:
    tree = read_yaml(root / "params.yaml")
    tree["rewards"] |= sections
    tree["limits"]["reward_seconds"] = seconds or {}
    params = parse_params(tree)
    made = reward_sources(
        params.rewards, sorted(sections), torch.device("cpu"), params.align.compute, params.limits.reward_seconds
    )
    return {source.name: source for source in made if isinstance(source, FunctionReward)}


def test_built_ins_run_here_and_foreign_or_limited_functions_in_a_process(root: Path) -> None:
    made = sources(
        root,
        {"limited": 0.5},
        plain={"function": "answer"},
        limited={"function": "regex", "arguments": {"pattern": "(a+)+$"}, "on_failure": "skip"},
        mine={"function": "tests.rewards.behaving:lengths", "arguments": {"bonus": 1.0}},
        latex={"function": "math", "arguments": {"row_seconds": 60}},
    )
    assert {name: source.call.seconds for name, source in made.items() if isinstance(source.call, Worker)} == {
        "limited": 0.5, "mine": 60.0, "latex": 60.0,
    }  # fmt: skip
    answers = RewardBatch(["p"] * 2, ["aa", "2"], [Tokens((1,), (2,))] * 2, {"answer": ["2", r"\sqrt{4}"]})
    assert made["plain"].score(answers) == [0.0, 0.0]
    assert made["mine"].score(answers) == [3.0, 2.0]
    assert made["latex"].score(answers) == [0.0, 1.0]
    # a pattern that backtracks for ever on this text is stopped, and says nothing about it
    [late] = made["limited"].score(RewardBatch(["p"], ["a" * 40 + "!"], answers.tokens[:1], {}))
    assert late is not None
    assert math.isnan(late)
    assert made["limited"].failures == {"timed_out": 1}


def test_the_limit_of_a_machine_is_no_parameter(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = {"function": "tests.rewards.behaving:lengths"}
    monkeypatch.setenv("POSTTRAIN_REWARD_SECONDS", "7.5")
    call = sources(root, {"mine": 2.0}, mine=mine)["mine"].call
    assert isinstance(call, Worker)
    assert call.seconds == 7.5
    monkeypatch.setenv("POSTTRAIN_REWARD_SECONDS", "soon")
    with pytest.raises(ConfigError, match="POSTTRAIN_REWARD_SECONDS = 'soon': must be a number of seconds above 0"):
        sources(root, {"mine": 2.0}, mine=mine)


def test_a_missing_extra_is_one_sentence_before_anything_is_trained(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ConfigError, match=r"'math' needs the package math-verify; install it with: pip install"):
        sources(root, latex={"function": "math"})
    with pytest.raises(ConfigError, match=r"'no_such_package\.judges:f': there is no package 'no_such_package'"):
        sources(root, mine={"function": "no_such_package.judges:f"})


def test_the_shipped_sources_need_no_process(root: Path) -> None:
    params = load_params(root / "params.yaml")
    assert params.limits.reward_seconds == {}
    assert {section.on_failure for section in params.rewards.values()} == {"stop"}
