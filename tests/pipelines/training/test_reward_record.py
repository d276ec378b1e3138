"""Which algorithms read the reward model, and the refusal of a step whose record names a different one."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from pipelines.config.params import Params, load_params, parse_params
from pipelines.config.yaml_files import read_yaml
from pipelines.runtime.context import RunContext
from pipelines.training.reward_record import FOLDER, MODEL, align_record, check_record, record_of, reward_inputs
from posttrain.errors import DataError


def context(inputs: dict[str, str]) -> RunContext:
    return RunContext(stage="align", name="align-ppo-0", params=load_params(), args=argparse.Namespace(),
                      directory=Path(), state=Path(), key="", code="", inputs=inputs)  # fmt: skip


@pytest.fixture
def params(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Params:
    """Enter a new folder and return the project's parameters with more algorithms."""
    tree = read_yaml(root / "params.yaml")
    verifiable = {"answer": 1.0}
    tree["algorithms"] |= {
        "judged": {"preset": "grpo", "rewards": verifiable},
        "critic": {"preset": "ppo", "rewards": verifiable},
        "supervised_critic": {"preset": "ppo", "options": {"critic_start": "sft"}, "rewards": verifiable},
        "shared_critic": {"preset": "ppo", "options": {"critic": "shared"}, "rewards": verifiable},
        "taught": {"preset": "distill", "teacher": "models/base"},
    }
    (tmp_path / "params.yaml").write_text(json.dumps(tree), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return parse_params(tree)


def test_only_algorithms_with_the_reward_model_as_a_reward_or_critic_read_it(params: Params) -> None:
    read = {name for name in params.algorithms if params.reward_model_in(name)}
    assert read == {"ppo", "grpo", "gspo", "dapo", "chord", "critic"}
    assert params.reward_model_in("critic") == ["algorithms.critic.options.critic_start (reward)"]
    assert params.reward_model_in("grpo") == ["algorithms.grpo.rewards (rm)"]
    assert params.reward_model_in_evaluation() == ["evaluation.rewards (rm)"]


def test_a_stage_depends_on_its_record_and_on_the_model_only_if_it_is_read(params: Params) -> None:
    own = argparse.Namespace(params=Path("params.yaml").resolve())
    other = argparse.Namespace(params=Path("other.yaml").resolve())
    record = align_record("ppo")
    assert reward_inputs(own, record, reads=False) == ["runs/reward_readers/artifacts/algorithms/ppo.json"]
    assert reward_inputs(own, record, reads=True) == [
        "runs/reward_readers/artifacts/algorithms/ppo.json",
        "models/reward",
    ]
    # the records describe params.yaml and no other file
    assert reward_inputs(other, record, reads=True) == ["models/reward"]


@pytest.mark.parametrize(
    ("recorded", "present", "words"),
    [
        ("a" * 64, "b" * 64, "models/reward is the model bbbbbbbbbbbb, but .* was written for the model aaaaaaaaaaaa"),
        (None, "b" * 64, "models/reward is the model bbbbbbbbbbbb, but .* was written for not read"),
        ("a" * 64, None, "models/reward is not read, but .* was written for the model aaaaaaaaaaaa"),
    ],
)
def test_a_record_of_a_different_model_is_refused(
    params: Params, recorded: str | None, present: str | None, words: str
) -> None:
    path = FOLDER / align_record("ppo")
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({MODEL: recorded} if recorded else {}), encoding="utf-8")
    inputs = {str(path): "c" * 64} | ({MODEL: present} if present else {})
    with pytest.raises(DataError, match=words):
        check_record(context(inputs), align_record("ppo"))
    path.write_text(json.dumps({MODEL: present} if present else {}), encoding="utf-8")
    check_record(context(inputs), align_record("ppo"))


def test_a_record_of_own_code_that_was_edited_is_refused(params: Params) -> None:
    path = FOLDER / align_record("ppo")
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(record_of({"mine/r.py": "1" * 64}, reads=False, code=["mine/r.py"])), encoding="utf-8")
    check_record(context({str(path): "c" * 64, "mine/r.py": "1" * 64}), align_record("ppo"))
    for present in ({"mine/r.py": "2" * 64}, {}, {"mine/r.py": "1" * 64, "mine/helper.py": "3" * 64}):
        changed = "mine/helper.py" if len(present) == 2 else "mine/r.py"
        with pytest.raises(
            DataError, match=f"{changed} is not the file that .*ppo.json was written for.*dvc repro reward_readers"
        ):
            check_record(context({str(path): "c" * 64, **present}), align_record("ppo"))
