"""A few steps of each kind of training on a language model of 135 million parameters: conversations, tools, a vocabulary of 49,152."""

from __future__ import annotations

import math
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.api import Model, load
from posttrain.api_training import train
from posttrain.data.tokens import Tokens, table_tokens
from posttrain.environments import calculator, word_problems
from posttrain.models.export import export_gguf
from posttrain.models.inference import token_logprobs
from posttrain.models.policy import Policy, Scorer
from posttrain.models.scorers import start_scorer
from posttrain.rollouts.engine import Request, SamplingSettings
from posttrain.rollouts.native import NativeEngine
from posttrain.rollouts.turns import TurnEngine, Turns
from posttrain.settings import OptimizerSettings
from posttrain.training.supervised import RewardObjective, RewardPair
from posttrain.training.trainer import Trainer

pytestmark = [pytest.mark.real_model, pytest.mark.slow]
SYSTEM = {"role": "system", "content": "You solve word problems in one line."}


@pytest.fixture(scope="module")
def folder(root: Path) -> Path:
    found = root / ".posttrain/models/smollm2"
    if not (found / "model.safetensors").is_file():
        pytest.skip(f"no model in {found}; fetch it with infra/models/smollm2.sh")
    return found


@pytest.fixture
def model(folder: Path) -> Model:
    torch.set_num_threads(1)
    return load(folder)


def rows(kind: Any, count: int) -> list[dict[str, Any]]:
    """Return word problems as conversations."""
    return [
        row | {"prompt": [SYSTEM, {"role": "user", "content": row["prompt"]}]}
        for row in word_problems.rows(kind, count, 0, largest=20)
    ]


def test_the_measurement_of_the_page_is_the_number_in_its_table(folder: Path, root: Path) -> None:
    """Run the block of docs/real-model.md as it is shown."""
    page = (root / "docs" / "real-model.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    done = subprocess.run([sys.executable, "-c", block], cwd=root, capture_output=True, text=True, check=True)
    assert f"{float(done.stdout):.2f}" in page
    assert 0.2 < float(done.stdout) < 0.6


def test_imitation_lowers_the_loss_of_its_rows(model: Model) -> None:
    history = train(model, "sft", rows("sft", 3), steps=2, learning_rate=2e-5, batch_size=3)
    assert history[1]["loss"] < history[0]["loss"] < 5


def test_preferences_start_at_the_logarithm_of_two(model: Model) -> None:
    (step,) = train(model, "dpo", rows("preferences", 2), steps=1, learning_rate=1e-6, batch_size=2)
    assert step["loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert step["grad_norm"] > 0


def test_a_reward_model_learns_its_pairs(model: Model, folder: Path) -> None:
    table = rows("preferences", 2)
    sides = (table_tokens(model.encoder, table, name) for name in ("chosen", "rejected"))
    pairs = [RewardPair(*pair) for pair in zip(*sides, strict=True)]
    trainer: Trainer[RewardPair] = Trainer(
        Scorer(start_scorer(folder)), OptimizerSettings(1e-5), total_steps=2, micro_batch_tokens=512
    )
    first, second = (trainer.update(pairs, RewardObjective()) for _ in range(2))
    # the new head is small and random
    assert first["loss"] == pytest.approx(math.log(2), abs=0.2)
    assert second["loss"] < first["loss"]


@pytest.mark.parametrize("name", ["grpo", "chord"])
def test_an_update_on_own_answers_is_on_policy(model: Model, name: str) -> None:
    shown = rows("sft", 2) if name == "chord" else []
    (step,) = train(
        model, name, rows("problems", 2), reward="answer", steps=1, learning_rate=1e-6, batch_size=2, samples=3,
        max_new_tokens=8, demonstrations=shown,
    )  # fmt: skip
    assert step["mismatch/mean"] < 1e-3
    assert step["ratio/mean"] == pytest.approx(1.0, abs=1e-3)
    assert math.isfinite(step["grad_norm"])


def test_a_conversation_with_the_calculator_has_the_log_probabilities_of_one_pass(model: Model) -> None:
    asked = calculator.rows("problems", 1, 0)[0]

    def step(conversation: Any) -> Any:
        """Reply as the calculator, and once more to a model that did not call it."""
        said = conversation.said if conversation.turn > 1 else "calc(23 * 48)"
        result = calculator.called(said)
        return None if result is None else [{"role": "tool", "content": result}]

    # any word that ends in a frequent letter ends a turn here, so that turns are short
    ends = [i for i in range(100, 49152) if model.encoder.tokenizer.decode([i]).endswith(("a", "e", "s", " "))]
    engine = TurnEngine(NativeEngine(model.lm, ends), model.encoder, Turns(step, limit=2))
    prompt = tuple(model.encoder.prompt(asked["prompt"]))
    request = Request(prompt, ((0, 0), (0, 1)), asked["prompt"], {"answer": asked["answer"]})
    ((one, two),) = engine.sample([request], SamplingSettings(12, 1.0))
    several = [answer for answer in (one, two) if len(answer.messages) == 3]
    assert several
    for answer in several:
        row = Tokens(prompt, answer.tokens, weights=answer.weights)
        (numbers,) = token_logprobs(Policy(model.lm).eval(), [row], 1000)
        assert numbers.logprobs == pytest.approx(answer.logprobs, abs=0.01)
        assert "<|im_start|>tool\n1104<|im_end|>\n<|im_start|>assistant\n" in model.encoder.tokenizer.decode(
            answer.tokens
        )


def test_a_killed_training_continues_to_the_same_weights(root: Path, folder: Path, tmp_path: Path) -> None:
    def run(checkpoints: str, weights: str, *kill_at: str) -> int:
        command = [
            sys.executable,
            "-m",
            "tests.models.real_steps",
            str(folder),
            str(tmp_path / checkpoints),
            str(tmp_path / weights),
        ]
        return subprocess.run([*command, *kill_at], cwd=root, check=False).returncode

    assert run("undisturbed", "a.pt") == 0
    assert run("killed", "b.pt", "3") == -signal.SIGKILL
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == ["step-00000001", "step-00000002"]
    assert run("killed", "b.pt") == 0
    undisturbed, killed = (torch.load(tmp_path / name, weights_only=True) for name in ("a.pt", "b.pt"))
    assert undisturbed.keys() == killed.keys()
    assert all(torch.equal(undisturbed[name], killed[name]) for name in undisturbed)
    assert any(float(value.abs().max()) > 0 for name, value in undisturbed.items() if "lora_B" in name)


def test_it_is_exported_for_llama_cpp(folder: Path, tmp_path: Path) -> None:
    half = export_gguf(folder, tmp_path / "half.gguf", "f16")
    assert half.mean < 0.01
    eighth = export_gguf(folder, tmp_path / "eighth.gguf", "q8_0")
    assert half.mean < eighth.mean < 0.1
    assert (tmp_path / "eighth.gguf").stat().st_size < 150e6
