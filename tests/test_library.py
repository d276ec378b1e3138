"""The library door: `import posttrain as pt` is light, four examples run as they are, and misuse is refused."""

from __future__ import annotations

import ast
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import posttrain as pt
from posttrain.algorithms.grpo import GRPO
from posttrain.errors import ConfigError, DataError

SMALL = {"hidden_size": 16, "intermediate_size": 16, "layers": 1, "heads": 2, "kv_heads": 1}
NUMBER = r"(-?\d+\.\d+)"


@pytest.fixture
def run_example(root: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[str], str]:
    """Run an example as a program in this process, which has imported torch already."""

    def run(name: str) -> str:
        runpy.run_path(str(root / "examples" / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_the_import_brings_no_torch(root: Path) -> None:
    code = "import sys, posttrain as pt; pt.PosttrainError; pt.choose; print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False False"
    assert all(hasattr(pt, name) for name in pt.__all__)
    assert set(pt.__all__) == set(pt._MODULES)


def test_train_grpo_lifts_the_reward_in_under_twenty_lines(root: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(root / "examples" / "train_grpo.py")]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    before, after = (float(value) for value in re.findall(NUMBER, said.splitlines()[0]))
    assert before < 0.1
    assert after > before + 0.2
    tree = ast.parse((root / "examples" / "train_grpo.py").read_text(encoding="utf-8"))
    docs = [n for n in ast.walk(tree) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)]
    lines = {n.lineno for n in ast.walk(tree) if isinstance(n, ast.stmt) and n not in docs}
    assert len(lines) < 20


def test_the_block_of_docs_library_md_runs_as_it_is(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (root / "docs" / "library.md").read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    pt.tiny(seed=0, **SMALL).save("path/to/model")
    assert "steps=40" in block
    names: dict[str, Any] = {}
    exec(block.replace("steps=40", "steps=2"), names)
    assert len(names["history"]) == 2
    assert (tmp_path / "tuned" / "model.safetensors").is_file()


def test_train_dpo_learns_the_preferences(run_example: Callable[[str], str]) -> None:
    said = run_example("train_dpo")
    first, last, accuracy = (float(value) for value in re.findall(NUMBER, said))
    assert first == pytest.approx(0.69)
    assert last < 0.5
    assert accuracy > 0.7


def test_custom_rewards_are_told_apart_by_name(run_example: Callable[[str], str]) -> None:
    said = run_example("custom_reward")
    assert [line.partition(":")[0] for line in said.splitlines()] == ["starts_right", "brief"]


def test_a_custom_environment_is_learnt(run_example: Callable[[str], str]) -> None:
    before, after = (float(value) for value in re.findall(NUMBER, run_example("custom_environment")))
    assert after > before


def lengths(prompts: Any, completions: list[str], **columns: Any) -> list[float]:
    return [float(len(text)) for text in completions]


@pytest.mark.parametrize(
    ("algorithm", "arguments", "message"),
    [
        ("grpo", {}, "grpo learns from rewards: pass reward="),
        (
            "dpo",
            {"reward": lengths},
            "train: reward has no effect here: only on-policy algorithms",
        ),
        ("ppo", {"reward": lengths}, "use choose\\('ppo', {'critic': 'shared'}\\)"),
        ("chord", {"reward": lengths}, "pass demonstrations= if and only if"),
        ("grop", {}, "did you mean 'grpo'"),
    ],
)
def test_misuse_is_refused(algorithm: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pt.train(pt.tiny(seed=0, **SMALL), algorithm, ["a"], steps=1, learning_rate=0.1, batch_size=1, **arguments)


def test_no_rows_are_refused() -> None:
    with pytest.raises(DataError, match="rows is empty"):
        pt.train(pt.tiny(seed=0, **SMALL), "sft", [], steps=1, learning_rate=0.1, batch_size=1)


@pytest.mark.parametrize("label", ["no", -1, None])
def test_a_label_that_is_neither_true_nor_false_is_refused(label: object) -> None:
    rows = [{"prompt": "a", "completion": "b", "label": 1}, {"prompt": "c", "completion": "d", "label": label}]
    with pytest.raises(DataError, match="row 1: label is "):
        pt.train(pt.tiny(seed=0, **SMALL), "kto", rows, steps=1, learning_rate=0.1, batch_size=1)


@pytest.mark.parametrize("algorithm", ["ppo_shared", "chord", "grpo_pairs", "dr_grpo"])
def test_every_kind_of_algorithm_trains(algorithm: str) -> None:
    model = pt.tiny(seed=0, **SMALL)
    before = {name: value.clone() for name, value in model.lm.state_dict().items()}
    common: dict[str, Any] = {"steps": 2, "learning_rate": 0.01, "batch_size": 2}
    asked = [{"prompt": "a", "answer": "b"}, {"prompt": "c", "answer": "d"}]
    sampled: dict[str, Any] = common | {"reward": lengths, "samples": 4, "max_new_tokens": 6}
    if algorithm == "ppo_shared":
        history = pt.train(model, pt.choose("ppo", {"critic": "shared"}), asked, **sampled)
    elif algorithm == "chord":
        shown = [{"prompt": "a", "completion": "b"}]
        history = pt.train(model, "chord", asked, demonstrations=shown, **sampled)
    elif algorithm == "grpo_pairs":
        history = pt.train(model, algorithm, [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2, **common)
    else:
        history = pt.train(model, replace(GRPO, kl="none", kl_coefficient=0.0), asked, **sampled)
    assert [metrics["loss"] == metrics["loss"] for metrics in history] == [True, True]
    assert any((value != before[name]).any() for name, value in model.lm.state_dict().items())


def test_the_same_seed_gives_the_same_history() -> None:
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
    runs = [
        pt.train(pt.tiny(seed=0, **SMALL), "sft", rows, steps=3, learning_rate=0.01, batch_size=1) for _ in range(2)
    ]
    assert runs[0] == runs[1]


def test_a_saved_model_answers_as_before(tmp_path: Path) -> None:
    model = pt.tiny(seed=0, **SMALL)
    model.save(tmp_path / "model")
    again = pt.load(tmp_path / "model")
    assert again.generate(["1+1="], max_new_tokens=5) == model.generate(["1+1="], max_new_tokens=5)


def test_environments_are_found_by_name_and_by_path() -> None:
    assert pt.environment("stories").judge("The dog ran.", "dog") == 1.0
    assert pt.environment("posttrain.environments.arithmetic:ENVIRONMENT") is pt.environment("arithmetic")
    for name, message in (
        ("arithmetics", "did you mean 'arithmetic'"),
        ("posttrain.text:nearest", "is a function, not an Environment"),
        ("posttrain.text:none", "cannot import the environment"),
    ):
        with pytest.raises(ConfigError, match=message):
            pt.environment(name)
    with pytest.raises(ConfigError, match="already exists"):
        pt.register(pt.Environment("stories", lambda *_: [], lambda *_: None))


def test_the_library_is_typed(root: Path) -> None:
    assert (root / "posttrain" / "py.typed").exists()
