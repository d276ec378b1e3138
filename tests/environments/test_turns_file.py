"""The environment with turns that docs/environments.md shows, in its own file: every table, its replies, and GRPO on it."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.config.schema import TurnsParams
from pipelines.training.setup import with_turns
from posttrain.api import tiny
from posttrain.api_training import train
from posttrain.environments.base import Conversation, environment
from posttrain.environments.parts import KINDS
from posttrain.errors import ConfigError
from posttrain.rollouts.native import NativeEngine
from posttrain.rollouts.turns import TurnEngine, Turns

NAME = "letters_of_docs:ENVIRONMENT"


@pytest.fixture
def module(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    page = (root / "docs" / "environments.md").read_text(encoding="utf-8")
    code, _ = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "letters_of_docs.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield code
    sys.modules.pop("letters_of_docs", None)


def test_an_environment_with_turns_is_one_short_file(module: str) -> None:
    assert len(module.splitlines()) <= 45
    found = environment(NAME)
    prompts = [row["prompt"] for kind in KINDS for row in found.rows(kind, 20, 0)]
    assert len(set(prompts)) == 80
    assert found.step is not None
    asked = ({"role": "user", "content": "game 3: "}, {"role": "assistant", "content": "k"})
    replies = [found.step(Conversation(asked, {"answer": answer}, 1)) for answer in ("a", "k", "z")]
    assert replies == [[{"role": "user", "content": " earlier "}], None, [{"role": "user", "content": " later "}]]


def test_grpo_trains_on_it_by_import_path(module: str) -> None:
    found = environment(NAME)
    assert found.step is not None
    model = tiny(seed=0, hidden_size=16, intermediate_size=16, layers=1, heads=2, kv_heads=1)
    demonstrations = found.rows("sft", 24, 0)
    train(model, "sft", demonstrations, steps=3, learning_rate=3e-2, batch_size=8)
    history = train(
        model, "grpo", found.rows("problems", 12, 0), reward=NAME, turns=Turns(found.step, limit=2),
        steps=3, learning_rate=1e-2, batch_size=4, samples=12, max_new_tokens=3,
    )  # fmt: skip
    assert any(step["grad_norm"] > 0 for step in history)
    assert all(step["mismatch/max"] < 1e-3 for step in history)
    # some answers have two turns: more sampled tokens than a single turn may have
    assert max(step["length/mean"] for step in history) <= 2 * 3


def test_params_name_the_environment_and_one_without_turns_is_refused(module: str) -> None:
    model = tiny(seed=0, hidden_size=16, intermediate_size=16, layers=1, heads=2, kv_heads=1)
    engine = NativeEngine(model.lm, model.encoder.ends)
    assert with_turns(engine, model.encoder, None) is engine
    made = with_turns(engine, model.encoder, TurnsParams(environment=NAME, limit=2))
    assert isinstance(made, TurnEngine)
    assert (made.turns.limit, made.turns.on_error, made.turns.seconds) == (2, "stop", 10.0)
    with pytest.raises(ConfigError, match=r"turns\.environment = 'arithmetic': this environment has no `step`"):
        with_turns(engine, model.encoder, TurnsParams(environment="arithmetic"))
